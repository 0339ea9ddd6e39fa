"""The Triton kernels as machine code, without a GPU: registers and stack, what the inner loop is made of, and how many
bytes move. tests/support/machine_code.py compiles them."""
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
    from moduli_kernels.triton import device
    from moduli_kernels.triton.penalty import dense, proximal, tiles
    from tests.support import machine_code as code

ARCHITECTURES = (80, 86, 90, 100, 120)
# case -> at most so many registers and, for each entry of W, instructions and special-function operations in the loop
HOT = {
    "torus frozen": (128, 25, 2),
    "torus trained": (128, 42, 2),
    "torus trained bfloat16": (128, 44, 2),
    "sphere trained": (128, 85, 3.5),
    "klein trained": (128, 65, 2),
    "torus6 trained": (254, 82, 2),
}
OTHERS = {  # on one architecture
    "torus trained power 2": (128, 42, 2),
    "s3 trained": (254, 90, 3.5),
    "mixed trained": (254, 100, 3.5),
    "r3 trained": (128, 42, 2),
    "circle sinusoid trained": (128, 65, 2.5),
    "torus ricker trained power 1.5": (128, 85, 3.5),
    "torus diffusion frozen": (128, 20, 0),
    "torus table trained": (128, 65, 1),
}
CASES = [(case, a, *limits) for case, limits in HOT.items() for a in ARCHITECTURES]
CASES += [(case, 90, *limits) for case, limits in OTHERS.items()]


@pytest.mark.parametrize(("case", "architecture", "registers", "instructions", "special"), CASES)
def test_hot_kernels(case, architecture, registers, instructions, special):
    """Nothing is spilled, W and dW move in vectors of 16 bytes, and a tile costs no barrier."""
    first, finish = code.report(case, architecture)
    assert first["kernel"] == "penalty_kernel" and finish["kernel"] == "finish_kernel"
    assert first["STACK"] == first["LOCAL"] == finish["STACK"] == 0
    assert first["REG"] <= registers and finish["REG"] <= 128
    assert first["barriers"] == 0
    vectors = first["entries"] * (2 if "bfloat16" in case else 4) // 16
    tables = first["entries"] if "table" in case else 0
    coordinates = first["loads"] - first["loads128"]
    assert first["loads128"] == vectors + tables and first["stores128"] == first["stores"] == vectors
    assert 1 <= coordinates <= 6
    assert first["instructions"] <= instructions and first["special"] <= special


OTHER_KERNELS = {
    "ragged": {"n": 1000}, "unaligned": {"n": 650}, "small": {"n": 37}, "blocks": {"n": 512, "blocks": 4},
    "value": {"need": (False, False)}, "points": {"need": (False, True)},
    "float64": {"dtype": torch.float64}, "float16": {"dtype": torch.float16, "power": 1.5},
    "mask": {"mask": True}, "convolution": {"kernel": (3, 3), "n": 64}, "masked convolution": {
        "kernel": (3,), "mask": True, "n": 64, "dtype": torch.bfloat16}, "grad": {"grad": True},
    "accumulate": {"accumulate": True},
}


@pytest.mark.parametrize("settings", OTHER_KERNELS.values(), ids=OTHER_KERNELS)
def test_everything_compiles(settings):
    """The compiler may refuse what the interpreter accepts."""
    need = settings.get("need", (True, True))
    n, blocks, kernel = settings.get("n", 512), settings.get("blocks", 1), settings.get("kernel", ())
    arguments = list(code.op_arguments("mixed", code.CASES["torus trained"][1], settings.get("dtype", torch.float32),
                                       settings.get("power", 1.0), n, blocks))
    arguments[0] = arguments[0].reshape(blocks * n, n, *[1] * len(kernel)).expand(-1, -1, *kernel).contiguous()
    arguments[3] = torch.empty(arguments[0].shape, dtype=torch.bool) if settings.get("mask") else None
    if settings.get("accumulate"):
        grad = torch.empty_like(arguments[0])
        launches = code.record(lambda: dense.accumulate_penalty_grad_(grad, *arguments, True))
    elif settings.get("grad"):
        launches = code.record(lambda: dense.penalty_grads(torch.ones(()), *arguments, *need))
    else:
        launches = code.record(lambda: dense.penalty_with_grads(*arguments, *need))
    for recorded in launches:
        spills = settings.get("dtype") == torch.float64 or "kernel" in settings  # no speed goal
        assert spills or code.usage(code.machine_code(recorded, 90))["STACK"] == 0
        assert not spills or code.machine_code(recorded, 90)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_compiles(dtype):
    grads = [torch.ones(5000, dtype=dtype), torch.ones(7), torch.ones(7)]
    recorded, = code.record(lambda: dense.scale_grads_(grads, torch.ones(())))
    assert code.usage(code.machine_code(recorded, 90))["STACK"] == 0


# --- kept entries and the proximal step ------------------------------------------------------------------------

@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kept_entries(architecture, monkeypatch):
    """Nothing is spilled, whether rows are compressed or masked; in the proximal step W moves in vectors."""
    monkeypatch.setattr(device, "INTERPRETED", device.INTERPRETED._replace(generation=architecture // 10))
    arguments = code.op_arguments("torus", code.CASES["torus trained"][1], torch.float32, 1.0)
    few = code.compressed(arguments, 0.02)
    rows, columns, _ = code.record(lambda: dense.penalty_with_grads(*few, True, True))
    assert [k.arguments["TRANSPOSED"] for k in (rows, columns)] == [False, True]
    entries = rows.arguments["ROWS"] * rows.arguments["WIDTH"]
    assert rows.grid[0] * rows.arguments["ROWS"] == 4096 and rows.arguments["WIDTH"] == 128 and entries == 512
    grad = torch.empty_like(arguments.weight)
    masked, _ = code.record(lambda: dense.accumulate_penalty_grad_(
        grad, *arguments._replace(mask=torch.empty(4096, 4096, dtype=torch.bool)), True))
    step, = code.record(lambda: proximal.proximal_step_(*arguments, 1.0))
    kept_step, = code.record(lambda: proximal.proximal_step_(*few, 1.0))
    for recorded in (rows, columns, masked, step, kept_step):
        cubin = code.machine_code(recorded, architecture)
        assert code.usage(cubin)["STACK"] == 0 and code.usage(cubin)["REG"] <= 128
        if recorded is step:
            moves = [text.split()[0] for _, _, text in code.instructions(cubin)]
            assert any(m.startswith("STG") and ".128" in m for m in moves)
            assert all(".128" in m for m in moves if m.startswith("STG"))


@pytest.mark.parametrize("what", ["kept float64", "kept klein blocks table", "proximal masked convolution",
                                  "proximal ragged bfloat16", "masked blocks"])
def test_other_kept_entries_compile(what):
    f = code.CASES["torus table trained" if "table" in what else "torus trained"][1]
    dtype = torch.float64 if "float64" in what else torch.bfloat16 if "bfloat16" in what else torch.float32
    n, blocks = 100 if "ragged" in what else 64, 3 if "blocks" in what else 1
    arguments = code.op_arguments("klein" if "klein" in what else "torus", f, dtype, 1.0, n, blocks)
    if "convolution" in what:
        arguments = arguments._replace(weight=torch.empty(n, n, 3))
    if "masked" in what:
        arguments = arguments._replace(mask=torch.empty(arguments.weight.shape, dtype=torch.bool))
    if "kept" in what:
        arguments = code.compressed(arguments, 0.1)
        few = code.record(lambda: dense.penalty_grads(torch.empty((), dtype=dtype), *arguments, True, True))
    elif "proximal" in what:
        few = code.record(lambda: proximal.proximal_step_(*arguments, 1.0))
    else:
        few = code.record(lambda: dense.penalty_with_grads(*arguments, True, True))[:1]
    for recorded in few:
        assert code.machine_code(recorded, 90)


# --- what the launch grid says --------------------------------------------------------------------------------

@pytest.mark.parametrize("case", ["torus frozen", "torus trained", "sphere trained", "torus6 trained"])
@pytest.mark.parametrize("generation", [8, 9])
@pytest.mark.parametrize("n", [2048, 4096])
def test_bytes_moved(case, generation, n):
    """Each entry is in one tile, so W is read once and dW written once. The parts stay under 1 % x coordinates of W, or
    of 64 MB if W is smaller."""
    penalty, finish = code.launches_of(case, generation, n)
    a = penalty.arguments
    tile = a["TILES"] * a["TILE_ROWS"] * a["GROUP"] * a["REPEAT"] * a["WIDTH"]
    assert a["EVEN"] and tile * penalty.grid[0] * penalty.grid[1] == n * n
    parts = [a[name] for name in ("row_parts", "column_parts") if a[name] is not None]
    coordinates = a["COORDINATES"]
    limit = 0.01 * coordinates * 4 * max(n * n, tiles.SMALL)
    assert sum(t.numel() * t.element_size() for t in parts) <= limit
    assert len(parts) == (0 if "frozen" in case else 2) and a["value_parts"].numel() <= 4096
    if n == 4096:  # besides W and dW, points are read once a strip or group, and parts are written and read
        points = 4 * coordinates * n * (penalty.grid[0] + penalty.grid[1])
        assert points + 2 * sum(4 * t.numel() for t in parts) <= 2 * 4 * n * n * 0.015 * coordinates
    assert finish.grid[0] <= 1 + 2 * n


def test_programs_fill_a_gpu_at_the_sizes_that_count():
    for n, programs in ((1024, 128), (2048, 256), (4096, 256), (8192, 512)):
        for trained in (False, True):
            tile = tiles.tile_for(9, 2, False, trained)
            for itemsize in (2, 4):
                partition = tiles.partition_of(n, n, tile, tile.vectors(itemsize) * 128 // itemsize, trained)
                assert partition.strips * partition.groups >= programs


def test_generations_that_are_not_in_the_table():
    assert tiles.tile_for(7, 2, True, True) == tiles.tile_for(8, 2, True, True)
    assert tiles.tile_for(11, 2, True, True) == tiles.tile_for(10, 2, True, True)
    assert tiles.tile_for(13, 2, True, True) == tiles.tile_for(12, 2, True, True)


def test_nothing_is_read_back_from_the_device(monkeypatch):
    """Numbers travel as kernel arguments: there is no .item(), no .cpu(), and no tensor is copied to the device."""
    arguments = code.op_arguments("mixed", code.CASES["torus trained"][1], torch.float32, 1.0, 64)
    few = code.compressed(arguments, 0.1)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function.namespace == "aten" and function._opname in (
                "empty", "empty_like", "new_empty", "select", "view", "empty_strided", "arange", "sort", "searchsorted",
                "_to_copy", "sub_"), function
            return function(*args, **(kwargs or {}))

    with Watch():
        launches = code.record(lambda: dense.penalty_with_grads(*arguments, True, True))
        launches += code.record(lambda: dense.penalty_grads(torch.empty(()), *arguments, True, True))
        launches += code.record(lambda: dense.penalty_with_grads(*few, True, True))
        launches += code.record(lambda: proximal.proximal_step_(*few, 1.0))
        launches += code.record(lambda: proximal.proximal_step_(*arguments, 1.0))
    assert len(launches) == 9
