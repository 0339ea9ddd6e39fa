"""Lists the shared libraries that a build makes, with their sources and their compiler and linker flags."""
import platform
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from .toolchain import ROOT, package_folder

X86 = platform.machine().lower() in ("x86_64", "amd64")
MACOS = sys.platform == "darwin"
OPS_FILE = "_cpu_ops.dylib" if MACOS else "_cpu_ops.so"

COMMON_FLAGS = [
    "-std=c++20", "-O3", "-fPIC", "-Wall", "-fvisibility=hidden", "-fvisibility-inlines-hidden",
    # -ffast-math is not used, because NaN and Inf must reach the value. These flags give up errno, floating-point
    # exception flags, and the rounding between a product and the sum that it is added to.
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd",
    # GCC gives these warnings falsely for its own intrinsics headers.
    "-Wno-maybe-uninitialized", "-Wno-uninitialized",
    # GCC warns that vectors as arguments have no stable ABI; ours are never passed between translation units.
    "-Wno-psabi",
]
# Exceptions are off because their tables would put a symbol that files share into code of one instruction set.
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi", "-fno-exceptions"]
AVX512_FLAGS = [
    *AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512",
]
ISA_FLAGS = {"avx2": AVX2_FLAGS, "avx512": AVX512_FLAGS}  # instruction sets of x86-64


@dataclass(frozen=True)
class Product:
    """One shared library.

    filename: its name, without a folder.
    sources: its C++ files.
    flags: compiler flags for all of its sources, beside COMMON_FLAGS and isa_flags.
    link_flags: linker flags.
    """

    filename: str
    sources: list[Path]
    flags: list[str]
    link_flags: list[str]


def isa_flags(source: Path) -> list[str]:
    """Returns the flags of the instruction set that ends a file's name (avx2.cpp, penalty_avx512.cpp); [] elsewhere."""
    return ISA_FLAGS.get(source.stem.rpartition("_")[2], [])


def ops_library() -> Product:
    """Describes the library of the CPU operators, which torch.ops.load_library opens; it is no Python module.

    It uses LibTorch's stable ABI only, so one library runs on every torch >= 2.10. Needs torch: see obstacle().
    """
    folder = package_folder("torch")
    assert folder is not None
    sources = sorted((ROOT / "csrc" / "cpu").rglob("*.cpp"))
    if not X86:
        sources = [source for source in sources if not isa_flags(source)]
    flags = [
        "-DTORCH_TARGET_VERSION=0x020a000000000000",  # torch 2.10
        f"-I{ROOT / 'csrc'}", "-isystem", str(folder / "include"),
        f"-DMODULI_KERNELS_X86={int(X86)}",
    ]
    # The library stores no path to libtorch_cpu: torch is loaded before it, so the name is enough.
    libraries = [f"-L{folder / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    link_flags = libraries if MACOS else ["-Wl,--no-undefined", "-Wl,--as-needed", *libraries]
    return Product(OPS_FILE, sources, flags, link_flags)


def functors_module() -> Product:
    """Describes the pybind11 module moduli_kernels._functors: the functors of csrc/ over NumPy arrays.

    Needs pybind11: see functors_obstacle().
    """
    pybind11 = package_folder("pybind11")
    assert pybind11 is not None
    flags = [
        f"-I{ROOT / 'csrc'}", "-isystem", str(pybind11 / "include"),
        "-isystem", sysconfig.get_paths()["include"],
    ]
    return Product(
        "_functors" + sysconfig.get_config_var("EXT_SUFFIX"), [ROOT / "csrc" / "functors_module.cpp"], flags,
        ["-undefined", "dynamic_lookup"] if MACOS else [],
    )


def remove_products(folder: Path) -> None:
    """Deletes earlier products from a folder, so that they cannot slip into a wheel."""
    for pattern in ("_cpu_ops.*", "_functors.*"):
        for path in folder.glob(pattern):
            path.unlink()
