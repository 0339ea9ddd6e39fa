"""Build script: which native parts are built, how the wheel is named. scripts/native_build.py compiles them.

Environment variables
    MODULI_KERNELS_BUILD     auto (default): the C++ kernels if a compiler and torch are found, or a message;
                             python: nothing is compiled; cpu: the C++ kernels or an error; cuda: reserved.
    MODULI_KERNELS_FUNCTORS  1 or 0: build the NumPy module `moduli_kernels._functors`, or not. By default
                             in-place and editable builds have it, wheels do not (tied to one CPython).
    MAX_JOBS                 compilers run at the same time (default: the cores).
    TORCH_CUDA_ARCH_LIST     reserved for the CUDA kernels.

torch is not a build requirement, as build isolation would fetch gigabytes of another build of it:
install torch first, then `pip install --no-build-isolation .`
"""

import os
import sys
from functools import cache
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))  # build backends do not put the project on the path

import native_build  # noqa: E402


@cache
def build_mode() -> str:
    """The choice between "cpu" and "python"; exits with a sentence if what is asked for cannot be."""
    mode = os.environ.get("MODULI_KERNELS_BUILD") or "auto"
    if mode not in ("auto", "python", "cpu", "cuda"):
        native_build.fail(f"MODULI_KERNELS_BUILD must be auto, python, cpu or cuda, got {mode!r}")
    if mode == "cuda":
        native_build.fail("this version has no CUDA kernels to compile, they arrive with a later one; "
                          "build with MODULI_KERNELS_BUILD=cpu")
    if mode == "python":
        return mode
    obstacle = native_build.obstacle()
    if obstacle and mode == "cpu":
        native_build.fail(f"the C++ kernels cannot be built: {obstacle}")
    if obstacle:
        native_build.say(f"building without the C++ kernels: {obstacle}")
        return "python"
    return "cpu"


def functors_wanted(in_place: bool) -> bool:
    asked = os.environ.get("MODULI_KERNELS_FUNCTORS") or ("1" if in_place else "0")
    obstacle = native_build.functors_obstacle() if asked == "1" else None
    if obstacle:
        native_build.say(f"leaving out moduli_kernels._functors (for tests and NumPy users): {obstacle}")
    return asked == "1" and obstacle is None


class NativeDistribution(Distribution):
    """Its native files are no setuptools Extensions: one is no Python module, and sources differ in flags."""

    def has_ext_modules(self) -> bool:
        return build_mode() == "cpu"


class BuildNative(build_ext):
    """build_ext for the products of scripts/native_build.py."""

    def run(self) -> None:
        if build_mode() == "python":
            return
        in_place = bool(self.inplace or self.editable_mode)
        products = [native_build.ops_library()]
        if functors_wanted(in_place):
            products.append(native_build.functors_module())
        # In-place products go straight to the source folder: left in build_lib, they would slip into wheels.
        target = ROOT / "moduli_kernels" if in_place else Path(self.build_lib) / "moduli_kernels"
        if not in_place:
            native_build.remove_products(target)
        native_build.build(products, ROOT / "build", target)


class AbiWheel(bdist_wheel):
    """One wheel serves CPython >= 3.10: the ops library uses no Python API, only LibTorch's stable ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        if self.root_is_pure or functors_wanted(in_place=False):
            return python, abi, platform
        return "cp310", "abi3", platform


setup(distclass=NativeDistribution, cmdclass={"build_ext": BuildNative, "bdist_wheel": AbiWheel})
