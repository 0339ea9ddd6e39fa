"""Compiles and links products incrementally: through ninja where there is one, or one file after the other."""
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from . import toolchain
from .messages import fail, say
from .products import COMMON_FLAGS, MACOS, OPS_FILE, Product, isa_flags
from .toolchain import ROOT


def build(products: list[Product], build_folder: Path, target: Path) -> None:
    """Brings every product in `target` up to date; `build_folder` keeps the object files of each toolchain.

    Needs a compiler, torch and filelock: see toolchain.obstacle().
    """
    from filelock import FileLock  # torch requires it, so it is there; a build without kernels does without both

    cxx = toolchain.compiler()
    assert cxx is not None
    folder = toolchain.package_folder("torch")
    # Each Python, torch and compiler has its own subfolder, so that switching between them rebuilds nothing twice.
    version = toolchain.torch_version(folder) if folder else None
    key = (sysconfig.get_config_var("EXT_SUFFIX"), folder, version, cxx)
    work = build_folder / f"native-{hashlib.sha256(repr(key).encode()).hexdigest()[:12]}"
    work.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(work / "lock"):  # two builds of one source tree wait for each other
        ninja = toolchain.ninja()
        if ninja:
            run_ninja(ninja, cxx, products, work)
        else:
            for product in products:
                build_without_ninja(cxx, product, work)
        for product in products:
            install(work / product.filename, target / product.filename)


def install(built: Path, target: Path) -> None:
    """Copies a product and renames the copy to `target`.

    A build that is killed leaves the old file or the new one, and a process that has the old one loaded keeps it.
    """
    if target.exists() and target.stat().st_mtime_ns == built.stat().st_mtime_ns:
        return
    partial = target.with_name(f".{target.name}.partial")
    shutil.copy2(built, partial)
    os.replace(partial, target)


def object_name(product: Product, source: Path) -> str:
    """Names the object file of a source after its library and its path: _cpu_ops.cpu_rnn_avx2.o."""
    place = source.relative_to(ROOT / "csrc").with_suffix("")
    return f"{product.filename.split('.')[0]}.{'_'.join(place.parts)}.o"


def compile_command(cxx: list[str], product: Product, source: Path) -> list[str]:
    obj = object_name(product, source)
    flags = [*COMMON_FLAGS, *product.flags, *isa_flags(source)]
    return [*cxx, *flags, "-MD", "-MF", f"{obj}.d", "-c", str(source), "-o", obj]


def link_command(cxx: list[str], product: Product) -> list[str]:
    objects = [object_name(product, source) for source in product.sources]
    shared = "-dynamiclib" if MACOS and product.filename == OPS_FILE else "-bundle" if MACOS else "-shared"
    return [*cxx, shared, *objects, *product.link_flags, "-o", product.filename]


def jobs() -> int:
    """Returns how many compilers may run at the same time."""
    asked = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not asked.isdigit() or int(asked) < 1:
        fail(f"MAX_JOBS must be a positive whole number, got {asked!r}")
    return int(asked)


def run_ninja(ninja: list[str], cxx: list[str], products: list[Product], work: Path) -> None:
    """Writes build.ninja for the products into `work` and runs ninja there."""
    def escape(path: object) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    def command(words: list[str]) -> str:
        return f"  cmd = {shlex.join(words).replace('$', '$$')}"

    lines = [
        "ninja_required_version = 1.3",
        "rule compile", "  command = $cmd", "  depfile = $out.d", "  deps = gcc", "  description = C++ $name",
        "rule link", "  command = $cmd", "  description = link $out",
    ]
    for product in products:
        for source in product.sources:
            lines += [f"build {escape(object_name(product, source))}: compile {escape(source)}",
                      command(compile_command(cxx, product, source)),
                      f"  name = {source.relative_to(ROOT / 'csrc')}"]
        objects = " ".join(escape(object_name(product, source)) for source in product.sources)
        lines += [f"build {escape(product.filename)}: link {objects}", command(link_command(cxx, product))]
    (work / "build.ninja").write_text("\n".join(lines) + "\n")
    if subprocess.run([*ninja, "-C", str(work), "-j", str(jobs())]).returncode:
        fail("the C++ kernels did not compile; the compiler's messages are above")


def build_without_ninja(cxx: list[str], product: Product, work: Path) -> None:
    """Compiles one source after the other: all of them if any is newer than the library or a command has changed."""
    commands = [compile_command(cxx, product, source) for source in product.sources]
    commands.append(link_command(cxx, product))
    library, record = work / product.filename, work / f"{product.filename}.commands"
    inputs = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    if (library.exists() and record.exists() and record.read_text() == repr(commands)
            and all(path.stat().st_mtime_ns < library.stat().st_mtime_ns for path in inputs)):
        return
    record.unlink(missing_ok=True)
    say(f"compiling {product.filename} without ninja, one file after the other (pip install ninja is faster)")
    for command in commands:
        if subprocess.run(command, cwd=work).returncode:
            fail("the C++ kernels did not compile; the compiler's messages are above")
    record.write_text(repr(commands))  # last, so that an interrupted build is done again
