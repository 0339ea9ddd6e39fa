"""scripts/setup.sh: one plain sentence for each thing missing, and no belief in half-made environments."""
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOLS = "awk bash cat chmod cksum df dirname grep head ls mkdir mktemp mv rm sed"
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
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
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
