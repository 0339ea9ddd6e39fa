"""The environments of scripts/environments.py: one list for the script, pyproject.toml and the workflows; and what the
script says and remembers.

`make environments` makes real ones. Here uv is a shell script.
"""
from __future__ import annotations

import json
import os
import re
import sys
import zipfile
from pathlib import Path

import pytest

from scripts import environments

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()
OLDEST_PYTHON, OLDEST_TORCH = environments.PYTHONS[0], next(iter(environments.TORCHES))
needs_workflows = pytest.mark.skipif(not (ROOT / ".github").is_dir(), reason="a source archive has no workflows")


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def workflow(name: str) -> dict:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())


# --- one list -------------------------------------------------------------------------------------------------

def test_the_list_is_in_order_with_one_release_for_each_minor_version_of_torch():
    for versions in (environments.PYTHONS, tuple(environments.TORCHES)):
        minors = [numbers(version)[1] for version in versions]
        assert minors == list(range(minors[0], minors[-1] + 1))
    triton = list(map(numbers, environments.TORCHES.values()))
    assert triton == sorted(triton)
    assert {(python, torch) for python, torch in environments.NOT_RELEASED} < {
        (python, torch) for python in environments.PYTHONS for torch in environments.TORCHES}


def test_pyprojects_bounds_are_the_oldest_of_the_list():
    oldest_triton = environments.TORCHES[OLDEST_TORCH].removesuffix(".0")
    assert f'requires-python = ">={OLDEST_PYTHON}"' in PROJECT
    assert f'"torch>={OLDEST_TORCH.removesuffix(".0")}"' in PROJECT
    assert f'"triton>={oldest_triton}; platform_system' in PROJECT
    classifiers = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert tuple(classifiers) == environments.PYTHONS
    assert f'requires = ["{environments.BUILD_TOOLS[1]}"]' in PROJECT
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\[", PROJECT, re.DOTALL).group(1)
    assert {*environments.EXTRAS, "environments"} <= set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE))


def test_the_released_wheel_is_built_with_the_oldest_of_the_list():
    tag = f"cp{OLDEST_PYTHON.replace('.', '')}"
    assert f'build = "{tag}-*"' in PROJECT and f'before-build = "pip install torch=={OLDEST_TORCH} ' in PROJECT
    assert f'"{tag}"' in (ROOT / "build_support" / "commands.py").read_text()


def test_the_commands_and_the_readme_name_the_oldest_of_the_list():
    torch = OLDEST_TORCH.removesuffix(".0")
    setup = (ROOT / "scripts" / "setup.sh").read_text()
    assert f"sys.version_info < {numbers(OLDEST_PYTHON)}" in setup
    assert f">= {numbers(torch)}" in setup and f"torch >= {torch}" in setup
    assert f">= {torch} is used as it is" in (ROOT / "Makefile").read_text()
    assert f"torch >= {torch}" in (ROOT / "README.md").read_text()


@needs_workflows
def test_the_workflows_run_every_pair_of_the_list():
    jobs = workflow("tests.yml")["jobs"]
    matrix = jobs["environments"]["strategy"]["matrix"]
    assert tuple(matrix["python"]) == tuple(jobs["suite"]["strategy"]["matrix"]["python"]) == environments.PYTHONS
    assert matrix["torch"] == list(environments.TORCHES)
    assert {(pair["python"], pair["torch"]) for pair in matrix["exclude"]} == environments.NOT_RELEASED
    [command] = [step["run"] for step in jobs["environments"]["steps"] if "scripts.environments" in step.get("run", "")]
    assert "--python ${{ matrix.python }} --torch ${{ matrix.torch }}" in command and "--wheel dist/" in command
    for job in ("wheel", "oldest-torch"):  # the wheel that all pairs share
        [setup] = [step for step in jobs[job]["steps"] if "setup-python" in step.get("uses", "")]
        assert setup["with"]["python-version"] == OLDEST_PYTHON
        assert jobs[job]["env"]["TORCH"].endswith(f"'torch=={OLDEST_TORCH}' }}}}")


@needs_workflows
def test_the_torch_that_a_newcomer_gets_is_of_the_list():
    [default] = re.findall(r"^TORCH=\$\{TORCH:-torch==([\d.]+)\}", (ROOT / "scripts" / "setup.sh").read_text(),
                           re.MULTILINE)
    named = {default}
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        named |= set(re.findall(r"TORCH: .*'torch==([\d.]+)' \}\}", path.read_text()))
    assert default in environments.TORCHES and named == {default, OLDEST_TORCH}


# --- the command ----------------------------------------------------------------------------------------------

def test_pairs_are_chosen_by_their_versions(capsys):
    pairs = environments.chosen_pairs
    assert len(pairs([], [])) == len(environments.PYTHONS) * len(environments.TORCHES)
    assert pairs(["3.12"], ["2.14"]) == [("3.12", "2.14.1")] == pairs(["3.12"], ["2.14.1"])
    assert {torch for _, torch in pairs([], ["2.10", "2.12"])} == {"2.10.0", "2.12.1"}
    for pythons, torches, sentence in (
        (["3.9"], [], f"--python must be one of {', '.join(environments.PYTHONS)}, got 3.9"),
        ([], ["2.9"], f"--torch must be one of {', '.join(environments.TORCHES)}, got 2.9"),
        ([], ["2.1"], f"--torch must be one of {', '.join(environments.TORCHES)}, got 2.1"),
    ):
        with pytest.raises(SystemExit) as raised:
            pairs(pythons, torches)
        assert raised.value.code == 2 and capsys.readouterr().err == f"environments: {sentence}\n"


def test_uv_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(environments.shutil, "which", lambda *_, **__: None)
    with pytest.raises(SystemExit):
        environments.find_uv()
    assert capsys.readouterr().err == "environments: uv is missing; pip install uv\n"


@pytest.mark.parametrize("message, words", [
    ("warning: a shim\n  cause: error: not this one\nerror: No interpreter found for Python 3.14\n",
     "No interpreter found for Python 3.14"),
    ("error: No solution found\n  cause: Because torch==2.15.0 has no\n      wheels, no.\n\nhint: You require CPython",
     "No solution found Because torch==2.15.0 has no wheels, no."),
    ("", "uv said nothing"),
])
def test_words_of_uv(message, words):
    assert environments.words_of(message) == words


# It fails where an argument is NAME and a file `no-NAME` lies beside it. Or else `uv venv` makes an environment whose
# Python copies the report.xml beside this uv as the report of its tests, and fails if there is none, or a file `crash`.
UV = r"""#!/bin/bash
here=$(dirname "$0"); echo "${@:1:2}" >>"$here/calls"
for word in "$@"; do
    [ -e "$here/no-$word" ] && echo "warning: of a shim" && echo "error: there is no $word" && exit 2
done
if [ "$1" = venv ]; then
    place="${@: -1}"; mkdir -p "$place/bin"
    cat >"$place/bin/python" <<'END'
#!/bin/bash
here=HERE
echo "$*" >>"$here/calls"
[ "$2" = moduli_kernels.env_report ] && exit 0
for word in "$@"; do
    case $word in --junitxml=*) cp "$here/report.xml" "${word#--junitxml=}" || exit 3;; esac
done
[ ! -e "$here/crash" ]
END
    sed -i "s|^here=HERE|here=$here|" "$place/bin/python"; chmod +x "$place/bin/python"
    mkdir -p "$place/lib/python3/site-packages/moduli_kernels"
fi
"""
REPORT = ('<testsuites><testsuite><testcase classname="a" name="b"/><testcase classname="a" name="c">{}</testcase>'
          '<testcase classname="a" name="d"><skipped/></testcase></testsuite></testsuites>')


@pytest.fixture
def uv(tmp_path, monkeypatch):
    """A folder with a uv that makes environments of shell scripts, and with what the script is told to use."""
    here = tmp_path / "uv"
    here.mkdir()
    (here / "uv").write_text(UV)
    (here / "uv").chmod(0o755)
    (here / "report.xml").write_text(REPORT.format(""))
    monkeypatch.setattr(environments, "find_uv", lambda: str(here / "uv"))
    monkeypatch.setattr(environments, "COPIED", ("LICENSE",))
    with zipfile.ZipFile(here / "a.whl", "w") as wheel:
        wheel.writestr("moduli_kernels/a.py", "a = 1\n")
    return here


def run(uv: Path, *pairs: tuple[str, str], again: bool = False, discard: bool = False, arguments=("tests/a.py",)):
    """Returns the exit status and what uv and Python were called with since the last time."""
    (uv / "calls").unlink(missing_ok=True)
    status = environments.main(list(pairs), uv.parent / "envs", uv / "a.whl", list(arguments), again, discard)
    return status, (uv / "calls").read_text().splitlines() if (uv / "calls").exists() else []


PAIR = ("3.12", "2.14.1")
posix = pytest.mark.skipif(sys.platform == "win32" or not os.path.exists("/bin/bash"), reason="needs bash")


@posix
def test_a_pair_that_has_passed_is_not_run_again(uv, capsys):
    status, calls = run(uv, PAIR)
    assert status == 0 and [call.split()[0] for call in calls] == ["venv", "pip", "pip", "-m", "-m"]
    assert "| 3.12 | 2.14.1 | passed | 2 | 0 | 1 |" in capsys.readouterr().out
    assert (uv.parent / "envs" / "results.md").read_text().count("\n") == 3
    assert run(uv, PAIR) == (0, [])
    status, calls = run(uv, PAIR, again=True)
    assert status == 0 and [call.split()[0] for call in calls] == ["pip", "pip", "-m", "-m"]
    assert run(uv, PAIR, arguments=["tests/b.py"])[1]  # other tests
    with zipfile.ZipFile(uv / "a.whl", "w") as wheel:
        wheel.writestr("moduli_kernels/a.py", "a = 2\n")
    assert run(uv, PAIR, arguments=["tests/b.py"])[1] and not run(uv, PAIR, arguments=["tests/b.py"])[1]


@posix
def test_a_pair_that_failed_is_run_again_and_its_tests_are_named(uv, capsys):
    (uv / "report.xml").write_text(REPORT.format("<failure/>"))
    assert run(uv, PAIR)[0] == 1
    printed = capsys.readouterr().out
    assert "| 3.12 | 2.14.1 | failed | 1 | 1 | 1 |" in printed and "3.12, 2.14.1: a::c" in printed
    (uv / "report.xml").write_text(REPORT.format(""))
    assert run(uv, PAIR)[0] == 0
    (uv / "report.xml").unlink()
    assert run(uv, PAIR, again=True)[0] == 1
    assert "3.12, 2.14.1: pytest ended with 3 and without a report" in capsys.readouterr().out
    (uv / "report.xml").write_text(REPORT.format(""))
    (uv / "crash").touch()
    assert run(uv, PAIR)[0] == 1
    assert "3.12, 2.14.1: pytest ended with 1\n" in capsys.readouterr().out


@posix
def test_what_cannot_be_had_is_said_and_the_others_run(uv, capsys):
    (uv / "no-3.14").touch(), (uv / "no-torch==2.11.0").touch()
    pairs = [("3.10", "2.15.0"), ("3.14", "2.15.0"), ("3.12", "2.11.0"), PAIR]
    status, calls = run(uv, *pairs)
    printed = capsys.readouterr().out
    assert status == 0 and len(calls) == 3 + 5 and "| 3.12 | 2.14.1 | passed |" in printed
    assert "| 3.10 | 2.15.0 | not to be had: torch 2.15.0 was not released for Python 3.10 |" in printed
    assert ("| 3.14 | 2.15.0 | not to be had: Python 3.14 is not on this machine, and uv cannot fetch it "
            "(there is no 3.14) |") in printed
    assert "| 3.12 | 2.11.0 | not to be had: there is no torch==2.11.0 |" in printed
    (uv / "no-torch==2.11.0").unlink()
    assert run(uv, pairs[2], PAIR)[1][0] == "venv --clear"  # what was left of it is not trusted
    assert run(uv, pairs[0])[0] == 1  # nothing could be had
    saved = json.loads((uv.parent / "envs" / "results.json").read_text())
    assert {(each["python"], each["torch"]) for each in saved} == set(pairs)


@posix
def test_a_full_disk_is_said_and_discarded_environments_are_gone(uv, monkeypatch, capsys):
    assert run(uv, PAIR, discard=True)[0] == 0
    assert not (uv.parent / "envs" / "py3.12-torch2.14.1").exists()
    usage = environments.shutil.disk_usage(uv)
    monkeypatch.setattr(environments.shutil, "disk_usage", lambda _: usage._replace(free=3 << 30))
    assert run(uv, ("3.11", "2.14.1")) == (1, [])
    assert "not to be had: about 8 GB of free disk are needed, but" in capsys.readouterr().out


def test_the_tree_holds_what_the_tests_need_and_not_the_package(tmp_path):
    environments.copy_tree(tmp_path / "tree")
    held = {path.name for path in (tmp_path / "tree").iterdir()}
    assert {"tests", "examples", "scripts", "pyproject.toml"} <= held and "moduli_kernels" not in held
    first = environments.hash_of_tests(tmp_path / "tree", [])
    assert environments.hash_of_tests(tmp_path / "tree", ["-x"]) != first
    (tmp_path / "tree" / "tests" / "conftest.py").write_text("")
    assert environments.hash_of_tests(tmp_path / "tree", []) != first
