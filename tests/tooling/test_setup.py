"""scripts/setup.sh says in one plain sentence what is missing, and does not use a half-made environment."""
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOLS = "awk bash cat chmod df dirname grep head ls mkdir mktemp mv rm sed"
# A Python without torch, whose pip has no network; FAKE may say "old" or "no-venv".
FAKE_PYTHON = r"""#!/bin/bash
case "$*" in
    *'%d.%d'*) [[ $FAKE == *old* ]] && echo 3.8 || echo 3.11 ;;
    *version_info*) [[ $FAKE != *old* ]] ;;
    *sys.executable*) echo "$0" ;;
    *ensurepip*) [[ $FAKE != *no-venv* ]] ;;
    '-m venv .venv') mkdir -p .venv/bin; cat "$0" >.venv/bin/python; chmod +x .venv/bin/python ;;
    *--version) ;;
    *) exit 1 ;;
esac
"""


@pytest.fixture
def newcomer(tmp_path):
    """A fresh source tree on a machine with a few tools, a Python without torch and a C++ compiler."""
    for name in ("scripts", "build_support"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "moduli_kernels").mkdir()
    (tmp_path / "README.md").touch()
    for name in ("pyproject.toml", "setup.py", "LICENSE", "moduli_kernels/_version.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    for name in TOOLS.split():
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    write_tool(tmp_path, "python3", FAKE_PYTHON)
    write_tool(tmp_path, "c++", "#!/bin/bash\nexit 0\n")
    return tmp_path


def write_tool(folder, name, text):
    path = folder / "bin" / name
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def set_up(folder, *arguments, **environment):
    """Runs scripts/setup.sh; returns its exit status and its lines."""
    done = subprocess.run(
        [shutil.which("bash"), "scripts/setup.sh", *arguments], cwd=folder, text=True, timeout=120,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={"PATH": str(folder / "bin"), "HOME": str(folder), **environment},
    )
    return done.returncode, done.stdout.splitlines()


def failure(folder, *arguments, **environment):
    status, lines = set_up(folder, *arguments, **environment)
    assert status == 1
    failures = [line for line in lines if line.startswith("setup failed: ")]
    assert len(failures) == 1 and lines[-1] == failures[0] and "Traceback" not in "".join(lines)
    return lines[-1].removeprefix("setup failed: ")


def test_python_missing(newcomer):
    (newcomer / "bin" / "python3").unlink()
    assert failure(newcomer) == (
        "Python 3.10 or newer is needed, but 'python3' does not run; install it or set PYTHON=python3.11")
    assert "'nowhere/python' does not run" in failure(newcomer, PYTHON="nowhere/python")


def test_python_too_old(newcomer):
    assert failure(newcomer, FAKE="old") == (
        "Python 3.10 or newer is needed, but 'python3' is Python 3.8; name a newer one: PYTHON=python3.11")


def test_venv_module_missing(newcomer):
    assert failure(newcomer, FAKE="no-venv") == (
        f"Python's venv module is missing for {newcomer}/bin/python3; install it "
        "(Debian and Ubuntu: apt install python3-venv)")


def test_compiler_missing(newcomer):
    (newcomer / "bin" / "c++").unlink()
    assert failure(newcomer) == (
        "no C++ compiler was found; install g++ or clang++ (or do without: MODULI_KERNELS_BUILD=python)")
    assert "pip could not install" in failure(newcomer, MODULI_KERNELS_BUILD="python")


def test_compiler_broken(newcomer):
    write_tool(newcomer, "c++", "#!/bin/bash\necho 'unknown option -std=c++20' >&2\nexit 1\n")
    assert failure(newcomer) == (
        "the C++ compiler 'c++' cannot compile a small C++20 program (unknown option -std=c++20); "
        "install g++ 10 or newer")


def test_disk_full(newcomer):
    write_tool(newcomer, "df", "#!/bin/bash\necho Filesystem\necho 'disk 9000000 8000000 1048576 90% /'\n")
    assert failure(newcomer) == (
        f"about 4 GB of free disk are needed to install torch, but {newcomer} has 1024 MB")
    assert not (newcomer / ".venv").exists()


def test_no_network_leaves_a_venv_that_is_not_believed_in(newcomer):
    sentence = ("pip could not install torch==2.13.0 for .venv/bin/python (no network, or no such package?); "
                "its messages are in build/setup.log")
    assert failure(newcomer) == sentence
    left_over = newcomer / ".venv" / "left over"
    left_over.touch()
    status, lines = set_up(newcomer)
    assert status == 1 and lines[0] == "setup: removing the unfinished .venv of an interrupted set-up"
    assert not left_over.exists()


def test_a_second_make_waits_and_a_foreign_venv_is_left_alone(newcomer):
    (newcomer / ".venv").mkdir()
    assert failure(newcomer) == (
        "there is a .venv that make did not create; activate it and install torch, or move it away")
    (newcomer / ".venv" / "moduli-setup-unfinished").write_text(f"{os.getpid()}\n")
    assert failure(newcomer) == (
        f"process {os.getpid()} is already setting up .venv; wait for it, or end it, then run make again")
    assert (newcomer / ".venv").exists()


def test_a_python_with_torch_is_used_without_venv_or_network(newcomer):
    write_tool(newcomer, "python3", f"""#!/bin/bash
        [[ $* == *pip* ]] && echo "pip was called: $*" && exit 1
        exec '{sys.executable}' "$@"
        """)
    run = ("-c", "import sys; print(sys.path[0] == '', 'arguments:', *sys.argv[1:])", "a b")
    for expected in ([f"setup: using {sys.executable}, which has torch", "True arguments: a b"],
                     ["True arguments: a b"]):  # the second time at once
        status, lines = set_up(newcomer, *run, MODULI_KERNELS_BUILD="python")
        assert (status, lines) == (0, expected)
    assert not (newcomer / ".venv").exists()


# A Python that has torch and lacks other requirements until .venv's pip has run; FAKE=offline makes that pip fail.
LACKING_PYTHON = r"""#!/bin/bash
case "$*" in
    *missing_requirements*) [[ $0 == .venv/* && -e installed ]] || echo hypothesis ;;
    *'import torch; assert'*) ;;
    *sys.executable*) echo "$0" ;;
    '-m venv .venv') mkdir -p .venv/bin .venv/lib/python3/site-packages
        cat "$0" >.venv/bin/python; chmod +x .venv/bin/python ;;
    *'-m pip'*) [[ $FAKE == offline ]] && exit 1; call="$*"
        echo "$0: ${call#* install }" >>pip.calls; echo >installed ;;
    *) exec PYTHON "$@" ;;
esac
"""
RUN = ("-c", "print('it runs')")


def build_tools():
    [tools] = re.findall(r'^BUILD_TOOLS="(.*?)"', (ROOT / "scripts" / "setup.sh").read_text(), re.MULTILINE)
    return tools


@pytest.fixture
def borrower(newcomer):
    write_tool(newcomer, "python3", LACKING_PYTHON.replace("PYTHON", f"'{sys.executable}'", 1))
    return newcomer


def test_what_a_python_with_torch_lacks_goes_to_a_venv_that_borrows_its_torch(borrower):
    status, lines = set_up(borrower, *RUN, MODULI_KERNELS_BUILD="python", MODULI_KERNELS_EXTRAS="docs")
    assert status == 0 and lines == [
        f"setup: creating .venv, which borrows the torch of {borrower}/bin/python3, "
        "and installing the tools into it (log: build/setup.log)", "it runs"]
    torch = importlib.metadata.distribution("torch")
    constraint = "--constraint .venv/torch.txt"
    assert (borrower / ".venv" / "torch.txt").read_text() == f"torch=={torch.version}\n"
    borrowed = borrower / ".venv" / "lib" / "python3" / "site-packages" / "borrowed_torch.pth"
    assert pathlib.Path(borrowed.read_text().strip(), "torch", "version.py").is_file()
    calls = (borrower / "pip.calls").read_text().splitlines()
    assert calls == [f".venv/bin/python: {build_tools()} {constraint}",
                     f".venv/bin/python: --no-build-isolation {constraint} -e .[test,examples,docs]"]
    assert set_up(borrower, *RUN, MODULI_KERNELS_BUILD="python") == (0, ["it runs"])
    assert (borrower / "pip.calls").read_text().splitlines() == calls


def test_the_build_tools_are_those_of_pyproject():
    [required] = re.findall(r'^requires = \["(.*?)"\]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert build_tools().split()[0] == required


def test_a_whole_venv_outlives_an_update_without_network_and_not_another_python(borrower):
    assert set_up(borrower, *RUN, MODULI_KERNELS_BUILD="python")[0] == 0
    (borrower / "installed").unlink()
    assert "no network, or no such package?" in failure(borrower, FAKE="offline", MODULI_KERNELS_BUILD="python")
    (borrower / "installed").touch()
    assert set_up(borrower, *RUN, MODULI_KERNELS_BUILD="python") == (0, ["it runs"])
    for changed in ({"PYTHON": str(borrower / "bin" / "python4")}, {"TORCH": "torch==2.12.0"}):
        shutil.copy(borrower / "bin" / "python3", borrower / "bin" / "python4")
        status, lines = set_up(borrower, *RUN, MODULI_KERNELS_BUILD="python", **changed)
        assert status == 0 and lines[0] == "setup: removing the .venv that was made with another Python or torch"
        assert set_up(borrower, *RUN, MODULI_KERNELS_BUILD="python", **changed) == (0, ["it runs"])
