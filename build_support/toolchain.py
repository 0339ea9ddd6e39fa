"""Looks for what a build needs on this machine: a C++ compiler, torch and pybind11."""
import importlib.util
import os
import re
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the source tree
MIN_TORCH = (2, 10)


def compiler() -> list[str] | None:
    """Returns the C++ compiler's command line: $CXX, or else the first of c++, g++, clang++ on the PATH, or None."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        return command if shutil.which(command[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def package_folder(name: str) -> Path | None:
    """Returns the folder of an installed package without importing it, or None if it is not installed."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def torch_version(folder: Path) -> str:
    """Reads torch's version from its folder."""
    match = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())
    return match.group(1) if match else "0.0"


def obstacle() -> str | None:
    """Says in one sentence why the C++ kernels cannot be built here; returns None if they can."""
    if not (ROOT / "csrc" / "cpu").is_dir():
        return "the folder csrc/ is missing from this source tree; take the full one"
    if sys.platform == "win32":
        return "Windows is not supported yet; the PyTorch reference runs there, or use WSL"
    if compiler() is None:
        if os.environ.get("CXX"):
            return f"the compiler CXX={os.environ['CXX']} was not found; correct or unset CXX"
        return "no C++ compiler was found; install g++ or clang++, or name yours in CXX"
    folder = package_folder("torch")
    if folder is None:
        return (f"torch is not installed for {sys.executable}; install torch >= 2.10 first, "
                "then build with pip's --no-build-isolation")
    version = torch_version(folder)
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MIN_TORCH:
        return f"torch {version} is too old; install torch >= 2.10"
    if not (folder / "include" / "torch" / "csrc" / "stable").is_dir():
        return f"torch {version} has come without its C++ headers ({folder}/include); install it with pip"
    if package_folder("filelock") is None:
        return f"filelock, which torch requires, is not installed for {sys.executable}; install it with pip"
    return None


def functors_obstacle() -> str | None:
    """Says in one sentence why the pybind11 module cannot be built here; returns None if it can."""
    if not (ROOT / "csrc" / "functors_module.cpp").is_file():
        return "csrc/functors_module.cpp is missing"
    if package_folder("pybind11") is None:
        return "pybind11 is missing; install it with pip"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if header.is_file() else "Python.h is missing; install python3-dev or its like"


def ninja() -> list[str] | None:
    """Returns the command of this Python's package `ninja`, or else of a ninja on the PATH, or None.

    The package comes first because it does not depend on the PATH: another version of ninja would compile all again.
    """
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    return ["ninja"] if shutil.which("ninja") else None
