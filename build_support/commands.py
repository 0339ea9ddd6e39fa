"""The setuptools commands of setup.py: which products a build makes, and how its wheel is named."""
import os
from functools import cache
from pathlib import Path

from setuptools import Distribution
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

from . import compiling, products, toolchain
from .messages import fail, say
from .toolchain import ROOT


@cache
def build_mode() -> str:
    """Returns "cpu" or "python" as MODULI_KERNELS_BUILD asks; ends with a sentence if that cannot be had here."""
    mode = os.environ.get("MODULI_KERNELS_BUILD") or "auto"
    if mode not in ("auto", "python", "cpu", "cuda"):
        fail(f"MODULI_KERNELS_BUILD must be auto, python, cpu or cuda, got {mode!r}")
    if mode == "cuda":
        fail("this version has no CUDA kernels to compile, they arrive with a later one; "
             "build with MODULI_KERNELS_BUILD=cpu")
    if mode == "python":
        return mode
    obstacle = toolchain.obstacle()
    if obstacle and mode == "cpu":
        fail(f"the C++ kernels cannot be built: {obstacle}")
    if obstacle:
        say(f"building without the C++ kernels: {obstacle}")
        return "python"
    return "cpu"


def functors_wanted(in_place: bool) -> bool:
    """Says whether this build has moduli_kernels._functors: as asked for, or else in place only, and if it can."""
    asked = os.environ.get("MODULI_KERNELS_FUNCTORS") or ("1" if in_place else "0")
    obstacle = toolchain.functors_obstacle() if asked == "1" else None
    if obstacle:
        say(f"leaving out moduli_kernels._functors (for tests and NumPy users): {obstacle}")
    return asked == "1" and obstacle is None


class NativeDistribution(Distribution):
    """Says that the package holds compiled files although it has no setuptools Extension.

    Extensions do not fit: the library of the operators is no Python module, and its sources differ in their flags.
    """

    def has_ext_modules(self) -> bool:
        return build_mode() == "cpu"


class BuildNative(build_ext):
    """The command build_ext, which makes the products of products.py."""

    def run(self) -> None:
        if build_mode() == "python":
            return
        in_place = bool(self.inplace or self.editable_mode)
        wanted = [products.ops_library()]
        if functors_wanted(in_place):
            wanted.append(products.functors_module())
        # Products that are used in place go straight to the source folder: from build_lib they would slip into wheels.
        target = ROOT / "moduli_kernels" if in_place else Path(self.build_lib) / "moduli_kernels"
        if not in_place:
            products.remove_products(target)
        compiling.build(wanted, ROOT / "build", target)


class AbiWheel(bdist_wheel):
    """The command bdist_wheel, with a tag for every CPython >= 3.10.

    One wheel serves them all because the library of the operators uses no Python API, only LibTorch's stable ABI. A
    wheel with the functors is tied to one CPython, and a wheel without compiled files keeps its own tag.
    """

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        if self.root_is_pure or functors_wanted(in_place=False):
            return python, abi, platform
        return "cp310", "abi3", platform
