"""What a build compiles and when, its error sentences, and what wheels and the source archive hold.

setup.py must find build_support in every kind of build. The tests run `python setup.py` and the functions that pip,
build and cibuildwheel call, in environments with torch and without it.
"""
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile

import pytest
import setuptools

ROOT = pathlib.Path(__file__).resolve().parents[2]
NEEDS_COMPILER = pytest.mark.skipif(
    sys.platform == "win32" or not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="needs a C++ compiler",
)


def tree(folder, *names):
    """Copies parts of the source tree to a folder, so that nothing is built or installed in this tree."""
    for name in names:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib", "results")
            shutil.copytree(source, folder / name, ignore=ignore)
        else:
            shutil.copy(source, folder / name)
    return folder


def build(folder, *command, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *command], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "MODULI_KERNELS_FUNCTORS": "0", **environment})


@pytest.fixture
def small_tree(tmp_path):
    """Copies the build files beside a C++ library of a few lines in place of csrc/."""
    tree(tmp_path, "build_support", "pyproject.toml", "setup.py", "LICENSE", "MANIFEST.in")
    (tmp_path / "README.md").touch()
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "answer.h").write_text("#define ANSWER 42\n")
    (tmp_path / "csrc" / "cpu" / "a.cpp").write_text(
        '#include "answer.h"\n'
        'extern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }\n')
    (tmp_path / "moduli_kernels").mkdir()
    shutil.copy(ROOT / "moduli_kernels" / "_version.py", tmp_path / "moduli_kernels")
    return tmp_path


@NEEDS_COMPILER
@pytest.mark.parametrize("ninja", [True, False])
def test_build_is_incremental_and_follows_headers(small_tree, ninja):
    import ctypes

    if not ninja:
        script = small_tree / "build_support" / "compiling.py"
        text = script.read_text()
        assert text.count("ninja = toolchain.ninja()") == 1
        script.write_text(text.replace("ninja = toolchain.ninja()", "ninja = None"))
    stamps = []
    for answer in (42, 42, 43):
        header = small_tree / "csrc" / "answer.h"
        if str(answer) not in header.read_text():
            header.write_text(f"#define ANSWER {answer}\n")
        done = build(small_tree, "build_ext", "--inplace", MODULI_KERNELS_BUILD="cpu")
        assert done.returncode == 0, done.stdout + done.stderr
        [library] = (small_tree / "moduli_kernels").glob("_cpu_ops.*")
        stamps.append(library.stat().st_mtime_ns)
        # A process loads one path only once, so each library is copied to a path of its own.
        copy = shutil.copy(library, small_tree / f"copy{len(stamps)}.so")
        assert ctypes.CDLL(str(copy)).answer() == answer
    assert stamps[0] == stamps[1] < stamps[2]


@NEEDS_COMPILER
def test_compiler_errors_are_shown(small_tree):
    (small_tree / "csrc" / "cpu" / "a.cpp").write_text("int broken( {}\n")
    done = build(small_tree, "build_ext", "--inplace")
    assert done.returncode == 1 and "a.cpp:1" in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == (
        "moduli_kernels: the C++ kernels did not compile; the compiler's messages are above")
    assert not list((small_tree / "moduli_kernels").glob("_cpu_ops.*"))


@pytest.mark.parametrize("environment, status, sentence", [
    ({"MODULI_KERNELS_BUILD": "gpu"}, 1, "MODULI_KERNELS_BUILD must be auto, python, cpu or cuda, got 'gpu'"),
    ({"MODULI_KERNELS_BUILD": "cuda"}, 1,
     "this version has no CUDA kernels to compile, they arrive with a later one; "
     "build with MODULI_KERNELS_BUILD=cpu"),
    ({"MODULI_KERNELS_BUILD": "cpu", "CXX": "no-such-cxx"}, 1,
     "the C++ kernels cannot be built: the compiler CXX=no-such-cxx was not found; correct or unset CXX"),
    ({"MODULI_KERNELS_BUILD": "", "CXX": "no-such-cxx"}, 0,
     "building without the C++ kernels: the compiler CXX=no-such-cxx was not found; correct or unset CXX"),
    pytest.param({"MODULI_KERNELS_BUILD": "cpu", "MAX_JOBS": "all"}, 1,
                 "MAX_JOBS must be a positive whole number, got 'all'", marks=NEEDS_COMPILER),
])
def test_build_variables(small_tree, environment, status, sentence):
    done = build(small_tree, "build_ext", "--inplace", **environment)
    assert (done.returncode, done.stderr.splitlines()) == (status, [f"moduli_kernels: {sentence}"])


def test_torch_missing(small_tree):
    blocked = ("import importlib.util as u; find = u.find_spec; "
               "u.find_spec = lambda name: None if name == 'torch' else find(name); "
               "from build_support import toolchain; print(toolchain.obstacle())")
    done = subprocess.run([sys.executable, "-c", blocked], cwd=small_tree, capture_output=True, text=True,
                          env={**os.environ, "CXX": sys.executable})
    assert done.stdout == (
        f"torch is not installed for {sys.executable}; install torch >= 2.10 first, "
        "then build with pip's --no-build-isolation\n")


@NEEDS_COMPILER
def test_wheels_hold_the_library_and_nothing_stale(small_tree):
    def wheel(**environment):
        done = build(small_tree, "bdist_wheel", "--dist-dir", "wheel", **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        [path] = (small_tree / "wheel").iterdir()
        unpacked = small_tree / "unpacked"
        shutil.rmtree(unpacked, ignore_errors=True)
        shutil.unpack_archive(path, unpacked, "zip")
        path.unlink()
        return path.name, sorted(file.name for file in (unpacked / "moduli_kernels").iterdir())

    assert build(small_tree, "build_ext", "--inplace").returncode == 0  # must not slip into the pure wheel
    name, files = wheel(MODULI_KERNELS_BUILD="cpu")
    assert "-cp310-abi3-" in name and len(files) == 2 and files[0].startswith("_cpu_ops.")
    name, files = wheel(MODULI_KERNELS_BUILD="python")
    assert name.endswith("-py3-none-any.whl") and files == ["_version.py"]


# Calls a function of the build backend with the code that pip has for it. The function runs in a process of its own,
# whose path does not hold the project's folder. Arguments: project, Python, name of the function, its argument.
FRONT_END = """
import json, sys
import tomllib
from pip._vendor.pyproject_hooks import BuildBackendHookCaller
project, python, function, *arguments = sys.argv[1:]
with open(project + "/pyproject.toml", "rb") as opened:
    system = tomllib.load(opened)["build-system"]
hooks = BuildBackendHookCaller(project, system["build-backend"], system["backend-path"], python_executable=python)
print(json.dumps(getattr(hooks, function)(*arguments)))
"""
if sys.version_info < (3, 11):
    FRONT_END = FRONT_END.replace("import tomllib", "from pip._vendor import tomli as tomllib")


def call_backend(project, function, *arguments, python=sys.executable, **environment):
    """Returns what the function returned, and all that it printed."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", FRONT_END, *map(str, (project, python, function, *arguments))],
                          cwd=project, capture_output=True, text=True,
                          env={**inherited, "PYTHONSAFEPATH": "1", "MODULI_KERNELS_FUNCTORS": "0", **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def names_in(wheel):
    with zipfile.ZipFile(wheel) as opened:
        return opened.namelist()


@NEEDS_COMPILER
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_build_front_ends_without_isolation_compile_the_library(small_tree, tmp_path, kind):
    """`pip install --no-build-isolation [-e] .`, and what cibuildwheel runs."""
    out = tmp_path / "out"
    out.mkdir()
    name, _ = call_backend(small_tree, f"build_{kind}", out, MODULI_KERNELS_BUILD="cpu")
    names = names_in(out / name)
    assert kind == "editable" or "-cp310-abi3-" in name
    library = [path for path in names if "_cpu_ops." in path]
    in_place = [path.name for path in (small_tree / "moduli_kernels").glob("_cpu_ops.*")]
    assert (len(library), len(in_place)) == ((1, 0) if kind == "wheel" else (0, 1))
    assert not [path for path in names if path.startswith("build_support")]


def test_an_isolated_build_has_no_torch_and_makes_a_wheel_of_python_files(small_tree, tmp_path):
    """`pip install .`: pip makes an environment that holds the build requirements and nothing else."""
    isolated, out = tmp_path / "isolated", tmp_path / "out"
    venv.create(isolated, with_pip=False)
    [site] = isolated.glob("lib/python*/site-packages")
    installed = pathlib.Path(setuptools.__file__).parents[1]
    for path in [installed / "setuptools", installed / "_distutils_hack", *installed.glob("setuptools-*.dist-info")]:
        if path.exists():
            (site / path.name).symlink_to(path)
    out.mkdir()
    python = isolated / "bin" / "python"
    assert call_backend(small_tree, "get_requires_for_build_wheel", python=python)[0] == []
    name, printed = call_backend(small_tree, "build_wheel", out, python=python, CXX=sys.executable)
    assert name.endswith("-py3-none-any.whl")
    assert f"building without the C++ kernels: torch is not installed for {python}" in printed
    assert not [path for path in names_in(out / name) if path.startswith("build_support") or "_cpu_ops" in path]


@NEEDS_COMPILER
def test_the_source_archive_builds_a_wheel(small_tree, tmp_path):
    archive, _ = call_backend(small_tree, "build_sdist", tmp_path)
    shutil.unpack_archive(tmp_path / archive, tmp_path / "unpacked")
    [source] = (tmp_path / "unpacked").iterdir()
    name, _ = call_backend(source, "build_wheel", tmp_path, MODULI_KERNELS_BUILD="cpu")
    assert "-cp310-abi3-" in name and [path for path in names_in(tmp_path / name) if "_cpu_ops." in path]


def test_sources_of_the_library_are_found_in_every_folder_and_keep_apart():
    from build_support import compiling, products

    assert products.isa_flags(pathlib.Path("csrc/cpu/rnn/avx2.cpp")) == products.AVX2_FLAGS
    assert products.isa_flags(pathlib.Path("csrc/cpu/penalty_avx512.cpp")) == products.AVX512_FLAGS
    assert products.isa_flags(pathlib.Path("csrc/cpu/rnn/portable.cpp")) == []
    library = products.ops_library()
    assert {path.name for path in (ROOT / "csrc" / "cpu").rglob("*.cpp") if not products.isa_flags(path)} <= {
        path.name for path in library.sources}
    objects = [compiling.object_name(library, source) for source in library.sources]
    assert len(set(objects)) == len(objects) > 1


def test_isa_objects_keep_to_their_namespace():
    """The linker keeps one copy of a function that files share by name.

    If that copy came from an AVX-512 file, it would crash older CPUs.
    """
    objects = [path for path in (ROOT / "build").glob("native-*/_cpu_ops.*.o") if "_avx" in path.name]
    if not objects or not shutil.which("nm"):
        pytest.skip("needs nm and an in-place build")
    for path in objects:
        isa = re.search(r"_(avx\d+)\.o", path.name).group(1)
        symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        shared = re.findall(r"^\w+ [WVu] (.*)$", symbols, re.MULTILINE)
        assert [name for name in shared if f"moduli::{isa}::" not in name] == []


def test_source_archive_holds_what_a_build_and_the_tests_need(tmp_path):
    names = ["build_support", "csrc", "scripts", "moduli_kernels", "tests", "examples", "benchmarks", "pyproject.toml",
             "setup.py", "Makefile", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    tree(source, *(name for name in names if (ROOT / name).exists()))
    done = build(source, "sdist", "--dist-dir", str(out))
    assert done.returncode == 0, done.stderr
    [archive] = out.iterdir()
    with tarfile.open(archive) as packed:
        held = {str(pathlib.PurePosixPath(name).relative_to(archive.name.removesuffix(".tar.gz")))
                for name in packed.getnames()}
    wanted = {str(path.relative_to(source)) for name in names[:7] for path in (source / name).rglob("*")
              if path.suffix in (".py", ".h", ".cpp", ".sh")}
    tables = {"moduli_kernels/rnn/crossovers.json", "examples/paper/reference.json", "tests/data/bitwise.json"}
    wanted |= {"LICENSE", "Makefile", "pyproject.toml", "moduli_kernels/py.typed", *tables}
    assert "csrc/cpu/penalty/registration.cpp" in wanted and wanted - held == set()
    assert not [name for name in held - tables if name.endswith((".so", ".pyc", ".json"))]


def test_one_version():
    import moduli_kernels

    version = moduli_kernels.__version__
    assert build(ROOT, "--version", MODULI_KERNELS_BUILD="python").stdout.splitlines()[-1] == version
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_import_without_compiled_library_and_without_triton(tmp_path):
    tree(tmp_path, "moduli_kernels")
    done = subprocess.run([sys.executable, "-c", """
import sys, torch
loaded = "triton" in sys.modules
import moduli_kernels as mk
assert ("triton" in sys.modules) == loaded, "importing the package imports triton"
assert not torch.cuda.is_initialized()
weight = torch.ones(3, 3, requires_grad=True)
mk.moduli_penalty(weight, mk.manifold("torus").sample(3), manifold="torus").backward()
print(weight.grad.shape == (3, 3), mk.backends.active("cpu"), mk.backends.availability()["cpp"][0])
"""], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.stderr == "" and done.stdout == "True reference False\n"
