"""Which implementation runs: by device, by `mk.backend`, by environment variable, and without the extension;
and every instruction set that the extension holds."""
from __future__ import annotations

import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import pytest
import torch

import moduli_kernels as mk
from moduli_kernels import backends, runtime
from tests.support.penalty_cases import BACKENDS, DEVICE, draw_points, draw_weight, expected, needs_cpp, relative_error

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    """As in a fresh process, whatever MODULI_KERNELS_BACKEND the suite runs under."""
    monkeypatch.setattr(backends, "forced", None)


def ops_called(call) -> set[str]:
    """The compiled ops that `call` went through."""
    called = set()

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "moduli_kernels":
                called.add(function._schema.name.removeprefix("moduli_kernels::"))
            return function(*args, **(kwargs or {}))

    with Recorder():
        call()
    return called


def penalty(manifold="torus", **settings) -> torch.Tensor:
    return mk.moduli_penalty(draw_weight(6, 6), draw_points(manifold, 6), manifold=manifold, **settings)


# --- the choice -------------------------------------------------------------------------------------------

@needs_cpp
def test_compiled_kernels_serve_the_cpu():
    assert backends.active("cpu") == "cpp"
    assert ops_called(penalty) == {"penalty"}


def test_the_reference_serves_devices_without_kernels():
    assert backends.active("meta") == backends.active("mps") == "reference"


def test_reference_by_choice():
    with mk.backend("reference"):
        assert backends.active("cpu") == "reference"
        assert ops_called(penalty) == set()


@needs_cpp
def test_gradients_by_each_backend():
    weight = draw_weight(6, 6).requires_grad_()
    rows = draw_points("torus", 6)

    def step():
        mk.moduli_penalty(weight, rows, manifold="torus").mul(2).backward()

    assert ops_called(step) == {"penalty_with_grads", "scale_grads_"}
    with mk.backend("reference"):
        assert ops_called(step) == set()


@needs_cpp
def test_a_graph_stays_with_the_backend_it_was_made_on():
    """Forward on one, backward on the other: the runner is kept, also for a repeated backward."""
    weight = draw_weight(6, 6).requires_grad_()
    with mk.backend("reference"):
        value = mk.moduli_penalty(weight, draw_points("torus", 6), manifold="torus")
    for retain in (True, False):
        assert ops_called(lambda retain=retain: value.backward(retain_graph=retain)) == set()


@needs_cpp
def test_nested_and_restored_after_errors():
    with mk.backend("reference"):
        with mk.backend("cpp"):
            assert backends.active("cpu") == "cpp"
        assert backends.active("cpu") == "reference"
        with pytest.raises(KeyError), mk.backend("cpp"):
            raise KeyError
        assert backends.active("cpu") == "reference"
        with pytest.raises(ValueError), mk.backend("nonsense"):
            pass
        assert backends.active("cpu") == "reference"
    assert backends.active("cpu") == "cpp"


@needs_cpp
def test_what_no_kernel_knows_runs_on_the_reference():
    """A bare callable, a sparse weight, a subclass: also where "cpp" is forced, with the same result."""
    class Line(mk.Manifold):
        ambient_dim = 1

        def squared_distance(self, x, y):
            return (x - y.T).square()

    line = Line()
    weight, rows = draw_weight(5, 5), torch.rand(5, 1)
    with mk.backend("cpp"):
        with pytest.warns(UserWarning,
                          match="the manifold Line has no compiled kernel: the penalty runs through the "
                                "tiled PyTorch path, with the same result and slower."):
            value = mk.moduli_penalty(weight, rows, manifold=line)
        # and warns no more
        assert ops_called(lambda: mk.moduli_penalty(weight, rows, manifold=line)) == set()
        same = mk.moduli_penalty(weight, rows, manifold=mk.Euclidean(1))
    assert relative_error(value, same.double()) <= 1e-6


def test_the_tiled_path_warns_where_the_user_calls(monkeypatch):
    monkeypatch.setattr(mk.Manifold, "warned", set())
    with pytest.warns(UserWarning, match="the inhibitor CallableInhibitor") as caught:
        penalty(inhibitor=lambda d: d)
    assert caught[0].filename == __file__


# --- errors -----------------------------------------------------------------------------------------------

def test_backends_of_later_versions():
    with pytest.raises(RuntimeError) as error, mk.backend("cuda"):
        pass
    assert str(error.value) == ("backend 'cuda' is not available: its kernels are not part of this version; python -m "
                                "moduli_kernels.env_report says more.")


@pytest.mark.parametrize("name", ["gpu", "", None, 3])
def test_unknown_backends(name):
    with pytest.raises(ValueError) as error, mk.backend(name):
        pass
    assert str(error.value) == ("backend (or MODULI_KERNELS_BACKEND) must be one of 'reference', 'cpp', "
                                f"'triton', 'cuda', got {name!r}; pick one of them.")


@needs_cpp
def test_tensors_elsewhere():
    weight, rows = torch.ones(3, 3, device="meta"), torch.ones(3, 2, device="meta")
    with mk.backend("cpp"), pytest.raises(RuntimeError) as error:
        mk.moduli_penalty(weight, rows, manifold="torus")
    assert str(error.value) == ("backend 'cpp' runs on cpu tensors, got one on meta; move it or leave the "
                                "choice to the package.")


def test_availability():
    found = backends.availability()
    assert list(found) == list(backends.BACKENDS) and found["reference"][0]
    assert found["cpp"] == ((True, "compiled CPU kernels are loaded") if runtime.cpu_ops_error is None
                            else (False, runtime.cpu_ops_error))


# --- without the extension --------------------------------------------------------------------------------

def test_in_words_why_the_extension_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "runtime.py"))
    missing = runtime.load_cpu_ops()
    assert re.fullmatch(r"the extension is not built \(.*`make build`.*\)", missing)
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    (tmp_path / f"_cpu_ops{suffix}").write_bytes(b"not a library")
    broken = runtime.load_cpu_ops()
    assert re.fullmatch(rf"_cpu_ops{suffix} does not load \(.*\); rebuild it with `make build`", broken,
                        re.DOTALL)

    monkeypatch.setattr(runtime, "cpu_ops_error", missing)
    assert backends.active("cpu") == "reference"
    with pytest.raises(RuntimeError) as error, mk.backend("cpp"):
        pass
    assert str(error.value) == (f"backend 'cpp' is not available: {missing}; python -m "
                                "moduli_kernels.env_report says more.")


def child(code: str, path: pathlib.Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """A fresh Python that imports the package from `path`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MODULI_KERNELS")}
    return subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=path, capture_output=True,
                          text=True,
                          env={**clean, **environment, "PYTHONPATH": str(path),
                               "PYTHONDONTWRITEBYTECODE": "1"})


# The same call in every child: a backend's name and the numbers.
RUN = """
import json, torch
import moduli_kernels as mk
from moduli_kernels import backends
g = torch.Generator().manual_seed(0)
weight = torch.randn(7, 7, generator=g, dtype=torch.float64).requires_grad_()
reg = mk.ModuliRegularizer(7, generator=g, dtype=torch.float64, trainable=True)
value = reg(weight)
value.backward()
ops = torch.ops.moduli_kernels.scale_grads_([weight.grad], torch.tensor(1.0, dtype=torch.float64))
print(json.dumps([backends.active("cpu"), value.item(), weight.grad.tolist(), reg.rows.points.grad.tolist()]))
"""


@pytest.fixture(scope="module")
def here() -> list[torch.Tensor]:
    """What RUN computes, in this process."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 7, generator=g, dtype=torch.float64)
    reg = mk.ModuliRegularizer(7, generator=g, dtype=torch.float64)
    want = expected(weight, reg.rows.points)
    return [want.value, want.weight, want.rows]


def check_child(done: subprocess.CompletedProcess, backend: str, here: list[torch.Tensor]) -> None:
    assert done.returncode == 0, done.stderr
    active, *numbers = json.loads(done.stdout)
    assert active == backend
    for got, want in zip(numbers, here):
        assert relative_error(torch.tensor(got, dtype=torch.float64), want) <= 1e-11


def test_without_the_shared_library(tmp_path, here):
    """A checkout that nobody built: everything works, on plain PyTorch, without a warning."""
    shutil.copytree(ROOT / "moduli_kernels", tmp_path / "moduli_kernels",
                    ignore=shutil.ignore_patterns("*.so", "*.dylib", "*.dll", "__pycache__"))
    check_child(child(RUN, tmp_path), "reference", here)


def test_environment_variable(here):
    check_child(child(RUN, MODULI_KERNELS_BACKEND="reference"), "reference", here)


@needs_cpp
def test_environment_variable_that_is_wrong():
    # importing does not fail: env_report must be able to tell
    done = child("import moduli_kernels as mk, torch\n"
                 "mk.moduli_penalty(torch.ones(2, 2), torch.ones(2, 2), manifold='torus')",
                 MODULI_KERNELS_BACKEND="gpu")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "ValueError: backend (or MODULI_KERNELS_BACKEND) must be one of 'reference', 'cpp', 'triton', "
        "'cuda', got 'gpu'; pick one of them.")


# --- instruction sets -------------------------------------------------------------------------------------

# Value and gradients against the float64 reference, over all the stages of the kernel. Prints the errors.
ISA_RUN = """
import itertools, json, sys
sys.path.insert(0, "tests")
import torch
from tests.support.penalty_cases import *
worst = {}
for manifold, inhibitor, power, dtype in itertools.product(
        ["circle", "product"], [n for n in INHIBITORS if n != "callable"], [1.0, 2.0, 2.7],
        [torch.float32, torch.float64, torch.bfloat16, torch.float16]):
    f = INHIBITORS[inhibitor]
    for blocks, kernel, masked in ((1, (), False), (2, (3,), True)):
        weight = draw_weight(blocks * 9, 37, *kernel, dtype=dtype)
        points = torch.float64 if dtype == torch.float64 else torch.float32
        rows, cols = draw_points(manifold, 9, 1, points), draw_points(manifold, 37, 2, points)
        settings = {"manifold": MANIFOLDS[manifold], "inhibitor": f, "power": power, "blocks": blocks,
                    "mask": weight > -0.5 if masked else None}
        got = penalty_and_gradients(weight, rows, cols, grad=0.5, **settings)
        want = expected(weight, rows, cols, grad=0.5, **settings)
        for name, g, w in zip(Result._fields, got, want):
            key = f"{name} {dtype}"
            worst[key] = max(worst.get(key, 0), relative_error(g, w))
print(json.dumps(worst))
"""


@needs_cpp
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="elsewhere there is one path only")
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_instruction_sets(isa):
    """As accurate as the newest, which all other tests run on; a machine that lacks one runs the best it
    has."""
    done = child(ISA_RUN, MODULI_KERNELS_ISA=isa, MODULI_KERNELS_BACKEND="cpp", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    rounding = {"torch.float32": 1e-5, "torch.float64": 1e-11, "torch.bfloat16": 2**-8,
                "torch.float16": 2**-11 + 1e-5}
    for key, error in json.loads(done.stdout).items():
        name, dtype = key.split()
        value = 1e-12 if dtype == "torch.float64" else 1e-6
        points = rounding[dtype] if dtype in ("torch.float32", "torch.float64") else 1e-5
        allowed = {"value": value, "weight": rounding[dtype]}.get(name, points)
        assert error <= allowed, f"{isa}: {key} off by {error}, allowed {allowed}"


@needs_cpp
def test_an_unknown_instruction_set():
    done = child("import moduli_kernels as mk, torch\n"
                 "mk.moduli_penalty(torch.ones(2, 2), torch.ones(2, 2), manifold='torus')",
                 MODULI_KERNELS_ISA="sse9")
    assert done.returncode == 1
    assert ("MODULI_KERNELS_ISA must be portable, avx2 or avx512, got sse9; unset it to let the package pick."
            in done.stderr)


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_backends_are_reached_by_name(backend):
    with mk.backend(backend):
        assert backends.active(DEVICE) == backend
