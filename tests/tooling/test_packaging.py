"""The build: what is compiled and when, its error sentences, and what wheels and the source archive hold."""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
NEEDS_COMPILER = pytest.mark.skipif(
    sys.platform == "win32" or not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="needs a C++ compiler",
)


def tree(folder, *names):
    """A copy of parts of the source tree, so that nothing is built or installed in this one."""
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
    """The build files with a C++ library of a few lines in place of csrc/."""
    tree(tmp_path, "scripts", "pyproject.toml", "setup.py", "LICENSE", "MANIFEST.in")
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
        script = small_tree / "scripts" / "native_build.py"
        text = script.read_text()
        assert text.count("ninja = find_ninja()") == 1
        script.write_text(text.replace("ninja = find_ninja()", "ninja = None"))
    stamps = []
    for answer in (42, 42, 43):
        header = small_tree / "csrc" / "answer.h"
        if str(answer) not in header.read_text():
            header.write_text(f"#define ANSWER {answer}\n")
        done = build(small_tree, "build_ext", "--inplace", MODULI_KERNELS_BUILD="cpu")
        assert done.returncode == 0, done.stdout + done.stderr
        [library] = (small_tree / "moduli_kernels").glob("_cpu_ops.*")
        stamps.append(library.stat().st_mtime_ns)
        # A copy, as one path is loaded only once in a process.
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
    blocked = ("import sys, importlib.util as u; find = u.find_spec; "
               "u.find_spec = lambda name: None if name == 'torch' else find(name); "
               "sys.path.insert(0, 'scripts'); import native_build; print(native_build.obstacle())")
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


def test_isa_objects_keep_to_their_namespace():
    """A function that an AVX-512 file shares by name with others could be the copy that the linker keeps, and
    would crash older CPUs."""
    objects = [path for path in (ROOT / "build").glob("native-*/_cpu_ops.*.o") if "_avx" in path.name]
    if not objects or not shutil.which("nm"):
        pytest.skip("needs nm and an in-place build")
    for path in objects:
        isa = re.search(r"_(avx\d+)\.o", path.name).group(1)
        symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        shared = re.findall(r"^\w+ [WVu] (.*)$", symbols, re.MULTILINE)
        assert [name for name in shared if f"moduli::{isa}::" not in name] == []


def test_source_archive_holds_what_a_build_and_the_tests_need(tmp_path):
    names = ["csrc", "scripts", "moduli_kernels", "tests", "examples", "benchmarks", "pyproject.toml",
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
    wanted = {str(path.relative_to(source)) for name in names[:6] for path in (source / name).rglob("*")
              if path.suffix in (".py", ".h", ".cpp", ".sh")}
    tables = {"moduli_kernels/rnn_crossovers.json", "examples/reference.json"}
    wanted |= {"LICENSE", "Makefile", "pyproject.toml", "moduli_kernels/py.typed", *tables}
    assert "csrc/cpu/penalty.cpp" in wanted and wanted - held == set()
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
