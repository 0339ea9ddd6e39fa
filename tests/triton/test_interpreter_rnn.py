"""The Triton kernels of the masked RNN without a GPU, in the interpreter: each file in a process of its own."""
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
def test_in_the_interpreter(tmp_path):
    """All files run at the same time."""
    running = {}
    for name in ("rnn", "blocks", "barrier", "sparse_rnn"):
        with open(tmp_path / name, "w") as log:  # the process keeps its own handle
            running[name] = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                 HERE / f"interpreter_{name}.py"],
                env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=HERE.parents[1], stdout=log, stderr=subprocess.STDOUT)
    failed = [(tmp_path / name).read_text()[-4000:] for name, process in running.items() if process.wait()]
    assert not failed, "\n".join(failed)


def test_import_and_the_cpu_need_no_triton():
    code = ("import sys, torch, moduli_kernels\n"
            "x, h, w = torch.rand(2, 3, 4), torch.rand(3, 4), torch.rand(4, 4, requires_grad=True)\n"
            "nothing = [None] * 11\n"
            "output, *_ = torch.ops.moduli_kernels.masked_rnn(x, h, w, w, *nothing, 'tanh', 1.0, False, True)\n"
            "output.sum().backward()\n"
            "print('triton' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "0"}, cwd=HERE.parents[1],
                          capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_the_workload_of_compute_sanitizer(monkeypatch):
    """It runs on whatever serves the CPU and finds the reference's results, and it fails where a result is off."""
    from scripts.gpu import workload, workload_rnn

    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    cases = list(workload_rnn.cases())
    assert len(cases) == len(workload_rnn.NAMES) * len(workload_rnn.CASES)
    for case in cases:
        workload.check(*case, 1e-5)
    with pytest.raises(SystemExit, match="is off by"):
        workload.check(cases[0][0], cases[0][1] * 1.001, cases[0][2], 1e-5)
