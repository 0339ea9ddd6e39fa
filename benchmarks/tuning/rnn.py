"""Measures where the masked RNN is faster than the vendor's, and writes moduli_kernels/rnn/crossovers.json.

    python -m benchmarks.tuning.rnn [--device cpu] [--dtype float32] [--threads 2] [--batches 1 8] [--quick]
                                    [--output FILE]

A case is one layer with as many inputs as neurons, forward alone or with backward, for each size of hidden, batch and
steps. It is measured without masks and with both weights masked at random to each density. One round runs
torch.nn.RNN's path once and the sparse path once for each density, every other round in reverse order. The ratio of the
medians counts; moduli_kernels/rnn/crossovers.py says how it is used. A case stops after --seconds, but not before 3
rounds. The file keeps what it holds for other devices and dtypes, and for other batches than those of --batches. Leave
the machine alone meanwhile.
"""
from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import platform
import sys
import time
from collections.abc import Callable

import torch

import moduli_kernels as mk
from examples.training import files
from moduli_kernels.rnn import crossovers, timing

HIDDEN, BATCH, STEPS = (32, 128, 256, 650, 1024, 4096), (1, 8, 32, 200), (1, 20)
DENSITIES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
QUICK = ((16, 32), (1, 4), (1, 3), (0.1, 1.0))
ROUNDS = 3, 15  # at least, at most


def drawn(hidden: int, density: float | None, device: str, dtype: torch.dtype) -> mk.SparseRNN:
    """Makes a layer with this share of its weights kept at random; without masks for None."""
    net = mk.SparseRNN(hidden, hidden, nonlinearity="relu", device=device, dtype=dtype, path="sparse")
    if density is not None:
        for name in ("weight_ih_l0", "weight_hh_l0"):
            net.set_mask(name, torch.rand(hidden, hidden, device=device) < density)
    return net


def one_pass(net: torch.nn.RNN, x: torch.Tensor, training: bool) -> Callable[[], None]:
    """Returns a call of the net, with backward if training."""
    parameters = list(net.parameters())

    def run() -> None:
        with torch.set_grad_enabled(training):
            output, _ = net(x)
            if training:
                torch.autograd.grad(output, parameters, torch.ones_like(output))

    return run


def ratios(hidden: int, batch: int, steps: int, training: bool, densities: tuple[float, ...], device: str,
           dtype: torch.dtype, seconds: float) -> dict:
    """Measures a row of the table: the dense path's time over the sparse path's, without masks and by density."""
    x = torch.randn(steps, batch, hidden, device=device, dtype=dtype)
    nets = {density: drawn(hidden, density, device, dtype) for density in (*densities, None)}
    vendor = torch.nn.RNN(hidden, hidden, nonlinearity="relu", device=device, dtype=dtype)
    vendor.load_state_dict(nets[None].state_dict())
    passes = {density: one_pass(net, x, training) for density, net in nets.items()} | {
        "dense": one_pass(vendor, x, training)}
    begin = time.perf_counter()
    for run in passes.values():
        run()
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(seconds / (time.perf_counter() - begin))))
    times = timing.alternating(passes, x.device, rounds)
    found = {density: round(times["dense"] / times[density], 3) for density in nets}
    return {"hidden": hidden, "batch": batch, "steps": steps, "training": training, "unmasked": found.pop(None),
            "ratios": list(found.values())}


def as_json(tables: list[dict]) -> str:
    """Writes the tables with a row on each line."""
    parts = []
    for table in tables:
        head = ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in table.items() if key != "rows")
        rows = ",\n   ".join(json.dumps(row) for row in table["rows"])
        parts.append(f"  {{{head},\n   \"rows\": [\n   {rows}]}}")
    return "{\"tables\": [\n" + ",\n".join(parts) + "]}\n"


def machine(device: str) -> str:
    """Names the processor or GPU that was measured."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")] if pathlib.Path("/proc/cpuinfo").exists() else []
    return f"{(names or [platform.processor()])[0]}, {torch.get_num_threads()} threads"


def main() -> int:
    """Measures the grid, writes the file, and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning.rnn", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="float32, float64, bfloat16 or float16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds for one case of the grid")
    parser.add_argument("--batches", type=int, nargs="+", help=f"sizes of the batch (default: {BATCH})")
    parser.add_argument("--quick", action="store_true", help="a tiny grid: does everything work? No figures")
    parser.add_argument("--output", type=pathlib.Path, default=crossovers.FILE)
    asked = parser.parse_args()
    if asked.quick and asked.output == crossovers.FILE:
        parser.error("--quick measures no figures for the package: name a file of your own with --output")
    torch.set_num_threads(asked.threads)
    torch.manual_seed(1)
    grid = QUICK if asked.quick else (HIDDEN, asked.batches or BATCH, STEPS, DENSITIES)
    before = json.loads(asked.output.read_text())["tables"] if asked.output.exists() else []
    own = [table for table in before if (table["device"], table["dtype"]) == (asked.device, asked.dtype)]
    rows = [row for table in own for row in table["rows"] if row["batch"] not in grid[1]] if asked.batches else []
    for hidden, batch, steps, training in itertools.product(*grid[:3], (False, True)):
        rows.append(ratios(hidden, batch, steps, training, grid[3], asked.device, getattr(torch, asked.dtype),
                           0.1 if asked.quick else asked.seconds))
        print(f"tune: {json.dumps(rows[-1])}", file=sys.stderr, flush=True)
    found = {"device": asked.device, "dtype": asked.dtype, "source": f"measured: {machine(asked.device)}, torch "
             f"{torch.__version__}", "densities": list(grid[3]), "rows": rows}
    found["rows"].sort(key=lambda row: [row[key] for key in (*crossovers.AXES, "training")])
    files.write_text(asked.output, as_json([*(table for table in before if table not in own), found]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
