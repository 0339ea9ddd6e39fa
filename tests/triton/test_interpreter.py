"""The Triton kernels without a GPU, and when they are available. The tests stand in tests/triton/interpreter*.py; each
file runs in a process of its own, because Triton reads TRITON_INTERPRET once, when it is imported."""
from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from moduli_kernels import backends, runtime

HERE = pathlib.Path(__file__).parent

needs_triton = pytest.mark.skipif(not runtime.triton_installed, reason="Triton is not installed: pip install triton")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", ["interpreter.py", "interpreter_kept.py"])
def test_in_the_interpreter(name):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def run(code: str, **variables: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "0"} | variables,
                          cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_and_the_cpu_need_no_triton():
    assert run("import sys, torch, moduli_kernels as mk\n"
               "w = torch.ones(3, 3, requires_grad=True)\n"
               "mk.moduli_penalty(w, torch.rand(3, 2), manifold='torus').backward()\n"
               "print('triton' in sys.modules)") == "False"


AVAILABILITY = "from moduli_kernels import backends; print(*backends.availability()['triton'], backends.active('cuda'))"


def test_unavailable_without_triton():
    """find_spec finds no Triton, as on a machine that lacks it."""
    hidden = ("import importlib.util as u; found = u.find_spec\n"
              "u.find_spec = lambda name, *a: None if name == 'triton' else found(name, *a)\n")
    assert run(hidden + AVAILABILITY) == ("False Triton is not installed (pip install triton; PyTorch's CUDA builds "
                                          "bring it along) reference")


@needs_triton
def test_unavailable_without_a_gpu():
    no_gpu = "import torch; torch.cuda.is_available = lambda: False\n"
    assert run(no_gpu + AVAILABILITY) == "False Triton is installed, but PyTorch finds no CUDA GPU reference"


@needs_triton
def test_available_with_a_gpu():
    gpu = "import torch; torch.cuda.is_available = lambda: True\n"
    assert run(gpu + AVAILABILITY) == "True Triton kernels, compiled at their first call triton"


@needs_triton
def test_available_in_the_interpreter():
    assert run(AVAILABILITY, TRITON_INTERPRET="1") == (
        "True Triton's interpreter runs its kernels on CPU tensors (TRITON_INTERPRET=1): slow, for tests reference")


@needs_triton
def test_not_chosen_unasked_in_the_interpreter():
    """TRITON_INTERPRET=1 alone changes nothing: the backend that served the CPU goes on serving it."""
    code = ("import sys, torch, moduli_kernels as mk\n"
            "from moduli_kernels import backends\n"
            "w = torch.ones(3, 3, requires_grad=True)\n"
            "mk.moduli_penalty(w, torch.rand(3, 2), manifold='torus').mul(2).backward()\n"
            "print(backends.active('cpu'), 'triton' in sys.modules)")
    assert run(code, TRITON_INTERPRET="1") == f"{backends.active('cpu')} False"
