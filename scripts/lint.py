"""`make lint`: ruff (ruff.toml), the types of the public modules (pyrightconfig.json), the layout of the C++ lines that
changed (.clang-format).

    python scripts/lint.py [--fix]      --fix: ruff and clang-format change what they can

BASE=origin/main: C++ lines that differ from there are looked at; default HEAD, so what is not committed yet. All tools
are run; ends with 0, or 1 if one of them found something, or 2 and what is missing.
"""
from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOLS = ("ruff", "basedpyright", "clang-format", "clang-format-diff.py", "git")


def find(tool: str) -> str | None:
    """A tool of this Python, else of the PATH."""
    beside = str(pathlib.Path(sys.executable).parent)
    return shutil.which(tool, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))


def run(*command: str, text: str | None = None) -> tuple[int, str]:
    done = subprocess.run(command, cwd=ROOT, input=text, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


def missing(base: str) -> str | None:
    """What keeps this from running, as a sentence; None if nothing does."""
    lacking = [tool for tool in TOOLS if find(tool) is None]
    if lacking:
        return f"{', '.join(lacking)} not found; install the tools with: {sys.executable} -m pip install '.[lint]'"
    if run(find("git"), "rev-parse", "--verify", "--quiet", f"{base}^{{commit}}")[0]:
        return f"BASE={base} is no commit here; fetch it, or name another"
    return None


def changed_cpp(base: str, fix: bool) -> tuple[int, str]:
    """clang-format's wishes for the lines of csrc/ that differ from `base`, as a diff; empty where there are none."""
    status, changes = run(find("git"), "diff", "-U0", "--no-color", base, "--", "csrc")
    if status:
        return status, changes
    formatter = ["-binary", find("clang-format"), "-p1", *(["-i"] if fix else [])]
    status, wishes = run(sys.executable, find("clang-format-diff.py"), *formatter, text=changes)
    return status or int(bool(wishes.strip()) and not fix), wishes


def main(fix: bool) -> int:
    base = os.environ.get("BASE") or "HEAD"
    obstacle = missing(base)
    if obstacle:
        print(f"lint: {obstacle}", file=sys.stderr)
        return 2
    found = {
        "ruff": run(find("ruff"), "check", *(["--fix"] if fix else [])),
        "types": run(find("basedpyright"), "--pythonpath", sys.executable),
        "clang-format": changed_cpp(base, fix),
    }
    failed = [name for name, (status, _) in found.items() if status]
    for name in failed:
        print(f"--- {name}\n{found[name][1]}")
    print(f"lint: {', '.join(failed)} found what is told above" if failed else "lint: nothing found")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main("--fix" in sys.argv[1:]))
