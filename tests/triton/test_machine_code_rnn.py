"""The Triton kernels of the masked RNN as machine code, without a GPU: registers, stack and shared memory, what the
barrier between steps is made of, and that nothing is read from the device."""
from __future__ import annotations

import os

import pytest
import torch

from moduli_kernels import runtime

pytestmark = [
    pytest.mark.skipif(not runtime.triton_installed, reason="Triton is not installed: pip install triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"),
]
if runtime.triton_installed:
    from moduli_kernels.triton.device import device_of
    from moduli_kernels.triton.rnn import masked
    from tests.support import machine_code_rnn as rnn

ARCHITECTURES = (80, 86, 90, 100, 120)
# what people train with: (rows, batch) -> the way that its steps take on an H100
HOT = {(128, 32): "alone", (650, 20): "held", (1024, 64): "held", (4096, 20): "streamed"}


def check(found, architecture: int) -> None:
    assert found.usage["STACK"] == 0, (found.launch.kernel.__name__, found.launch.arguments, found.usage)
    assert found.shared <= rnn.DEVICES[architecture].shared
    assert found.usage["REG"] * 32 * found.launch.options["num_warps"] <= 65536


@pytest.mark.parametrize(("size", "architecture"), [
    *((size, a) for size in ((128, 32), (650, 20)) for a in ARCHITECTURES), ((1024, 64), 90), ((4096, 20), 86),
    ((4096, 20), 90)], ids=str)
def test_hot_kernels(size, architecture):
    """Nothing is spilled, and a program fits on a multiprocessor. The steps are one launch, of programs that run at the
    same time."""
    inputs, steps, back, *products = rnn.record(lambda: rnn.train(*size), architecture)
    assert len(products) == 3
    for launch in (steps, back):
        assert launch.arguments["t_begin"] == 0
        assert architecture != 90 or launch.arguments["WAY"] == HOT[size]
        together = launch.arguments["WAY"] != "alone"
        assert launch.options["launch_cooperative_grid"] == launch.arguments["BARRIER"] == together
        assert not together or launch.grid[0] * launch.grid[1] <= rnn.DEVICES[architecture].multiprocessors
    for launch in (inputs, steps, back, *products):
        check(rnn.compiled(launch, architecture), architecture)


@pytest.mark.parametrize(("batch", "side", "share", "density", "architecture"), [
    *((20, 32, 0.0, 0.02, a) for a in (80, 90)), *((200, 32, 0.1, 0.0005, a) for a in ARCHITECTURES)], ids=str)
def test_kept_entries(batch, side, share, density, architecture):
    """A mask without structure at a small batch; blocks and a few strays at a large one. States move in vectors of 16
    bytes."""
    launches = rnn.record(lambda: rnn.train_blocked(4096, batch, side, share, density, steps=3), architecture)
    names = [launch.kernel.__name__ for launch in launches]
    steps = [launch for launch in launches if launch.arguments.get("WAY") == "kept"]
    assert len(steps) == 2
    assert names.count("sampled_blocks_kernel") == names.count("sampled_strays_kernel") == (share > 0)
    for launch in launches:
        found = rnn.compiled(launch, architecture)
        check(found, architecture)
        if launch in steps:
            assert launch.grid[0] * launch.grid[1] <= rnn.DEVICES[architecture].multiprocessors
            text = rnn.instructions(found.cubin)
            assert any(("LDGSTS" if share else "LDG.E") in line and ".128" in line for line in text)


@pytest.mark.parametrize(("n", "batch"), [(4096, 1), (650, 20)])
def test_compressed_rows(n, batch):
    """For inference the hidden weight is given as values: one launch does many steps, without gradients."""
    entries = n * n // 50
    x, h, w_ih, values = torch.empty(50, batch, 16), torch.empty(batch, n), torch.empty(n, 16), torch.empty(entries)
    crow, col = torch.empty(n + 1, dtype=torch.int64), torch.empty(entries, dtype=torch.int64)
    launches = rnn.record(lambda: masked.masked_rnn(
        x, h, w_ih, values, None, None, None, None, None, None, crow, col, None, None, None, "tanh", 1.0, False,
        False), 90)
    assert [launch.kernel.__name__ for launch in launches] == ["product_kernel", "forward_kernel"]
    for launch in launches:
        check(rnn.compiled(launch, 90), 90)


@pytest.mark.parametrize(("n", "side", "dtype"), [(650, 16, "bfloat16"), (650, 32, "float16"), (4096, 64, "float32"),
                                                  (1000, 64, "bfloat16"), (100, 32, "float32")])
def test_other_blocks(n, side, dtype):
    launches = rnn.record(lambda: rnn.train_blocked(n, 33, side, 0.2, 0.001, 3, 5, getattr(torch, dtype), 0.5), 90)
    for launch in launches:
        check(rnn.compiled(launch, 90), 90)


OTHERS = {
    "bfloat16": {"dtype": torch.bfloat16}, "float16": {"dtype": torch.float16}, "leak": {"leak": 0.5},
    "lengths": {"lengths": True, "reverse": True}, "no mask": {"with_masks": False}, "three inputs": {"inputs": 3},
    "one step": {"steps": 1},
}


@pytest.mark.parametrize(("n", "settings"), [
    *((650, settings) for settings in OTHERS.values()), (1, OTHERS["one step"]), (100, OTHERS["lengths"]),
    (300, OTHERS["leak"]), (750, {}), (1001, {}), (1901, {}), (3001, {}), (3001, OTHERS["bfloat16"])], ids=str)
def test_others(n, settings):
    """The compiler may refuse what the interpreter accepts."""
    for launch in rnn.record(lambda: rnn.train(n, 20, **settings), 90):
        check(rnn.compiled(launch, 90), 90)


@pytest.mark.parametrize("n", [60, 500, 650])
def test_without_tf32(n):
    for launch in rnn.record(lambda: rnn.train(n, 20), 90, "ieee"):
        assert launch.arguments["PRECISION"] == "tf32x3"
        check(rnn.compiled(launch, 90), 90)


# --- the barrier -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("size", "architecture"), [*(((650, 20), a) for a in ARCHITECTURES), ((4096, 20), 90)],
                         ids=str)
def test_the_barrier(size, architecture):
    """It stands in the code once. All threads have stored before one adds, after a fence; one waits for a number and
    drops what the first-level cache holds; then all go on, and states are loaded only after that."""
    for launch in rnn.record(lambda: rnn.train(*size), architecture)[1:3]:
        text = rnn.instructions(rnn.compiled(launch, architecture).cubin)
        places = {name: [i for i, line in enumerate(text) if name in line]
                  for name in ("MEMBAR", "RED", "LD.E.STRONG.GPU", "LDG.E.STRONG.GPU", "CCTL.IVALL", "BAR.SYNC")}
        fences = [i for i in places["MEMBAR"] if ".GPU" in text[i]]
        adds = [i for i, line in enumerate(text) if ("REDG" in line or "RED.E" in line or "ATOMG" in line)
                and ".ADD" in line]
        asked = places["LD.E.STRONG.GPU"] + places["LDG.E.STRONG.GPU"]
        assert len(adds) == 1 and len(asked) == 1 and ".STRONG.GPU" in text[adds[0]]
        assert any(b < f < adds[0] for b in places["BAR.SYNC"] for f in fences if adds[0] - f < 12)
        between = [text[i] for i in range(max(i for i in places["BAR.SYNC"] if i < adds[0]), adds[0])]
        assert not any("STG" in line for line in between)
        assert any(asked[0] < i <= asked[0] + 4 for i in places["CCTL.IVALL"])
        after = text[asked[0] + 1:]
        first = next(i for i, line in enumerate(after) if "BAR.SYNC" in line)
        assert not any("LDG" in line or "LDGSTS" in line for line in after[:first])


def test_nothing_is_read_back_from_the_device():
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function.namespace == "aten" and function._opname in (
                "empty", "empty_like", "new_empty", "zeros", "select", "slice", "view", "t", "transpose", "clone",
                "sum", "detach"), function
            return function(*args, **(kwargs or {}))

    def train():
        with Watch():
            rnn.train(650, 20, leak=0.5, lengths=True)

    assert len(rnn.record(train, 90)) == 6
    assert device_of(torch.empty(0)).interpreted  # what was patched is back
