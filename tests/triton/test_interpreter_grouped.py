"""The Triton kernels of several weights without a GPU: in the interpreter, in a process of their own, and compiled."""
from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from moduli_kernels import runtime

HERE = pathlib.Path(__file__).parent
pytestmark = pytest.mark.skipif(not runtime.triton_installed, reason="Triton is not installed: pip install triton")


@pytest.mark.slow
def test_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreter_grouped.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled")
@pytest.mark.parametrize(("sizes", "manifold", "trained", "grad"), [
    ((128, 128, 128), "torus", True, False), ((128, 128, 128), "torus", False, False),
    ((128, 128, 128), "torus", True, True), ((37, 1, 130), "torus", True, False), ((128,) * 8, "sphere", True, False)],
    ids=str)
def test_compiles_without_spilling(monkeypatch, sizes, manifold, trained, grad):
    from moduli_kernels.triton.penalty import grouped
    from tests.support import machine_code as code

    launches: list[code.Launch] = []
    for name in ("penalties_kernel", "finish_penalties_kernel"):
        monkeypatch.setattr(grouped, name, code.Recorder(getattr(grouped, name), launches))
    each = [code.op_arguments(manifold, code.CASES["torus trained"][1], torch.float32, 1.0, n) for n in sizes]
    first, count = each[0], len(sizes)
    arguments = ([a.weight for a in each], [a.rows for a in each], [None] * count, None, *first[7:12], [1] * count,
                 [0.1] * count, [True] * count, [trained] * count)
    if grad:
        grouped.penalties_grads(torch.ones(()).expand(count), *arguments)
    else:
        grouped.penalties_with_grads(*arguments)
    assert [launch.kernel.__name__ for launch in launches] == ["penalties_kernel", "finish_penalties_kernel"]
    for recorded in launches:
        assert code.usage(code.machine_code(recorded, 90))["STACK"] == 0
