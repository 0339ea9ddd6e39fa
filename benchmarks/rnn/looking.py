"""Measures what it costs that SparseRNN looks at masks and weights at each call without gradients.

    python -m benchmarks.rnn.looking [--threads 2] [--quick] [--output FILE]

A case is one layer with as many inputs as neurons whose hidden weight is masked at random, on path "auto". In
alternation run the net as it is, the same net with what it would find put in place of looking (the shares of the masks,
and that masked weights are 0), and torch.nn.RNN over the same weights. The medians count. Each row says which path runs
and the time of a call over that of the other two; FILE gets the rows as JSON. Leave the machine alone meanwhile.
"""
from __future__ import annotations

import argparse
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import moduli_kernels as mk
from moduli_kernels.rnn import masked_module, sparse_rnn, timing

HIDDEN, BATCH, STEPS, DENSITIES = (128, 512, 1024, 4096), (1, 8), (1, 50), (0.02, 0.1, 0.5)
QUICK = ((16, 64), (1,), (1, 3), (0.1,))


@contextmanager
def without_looking(share: float) -> Iterator[None]:
    """Puts answers in the place of the functions that look at masks and weights."""
    places = ((masked_module, "kept_share", lambda mask: share),
              (masked_module, "is_zero_where_masked", lambda weight, mask: True),
              (sparse_rnn, "is_zero_where_masked", lambda weight, mask: True))
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, answer in places:
        setattr(module, name, answer)
    try:
        yield
    finally:
        for (module, name, _), function in zip(places, before):
            setattr(module, name, function)


def measured(hidden: int, batch: int, steps: int, density: float, runs: int) -> dict[str, Any]:
    """Measures a case, and returns a row: seconds by contestant and the path that "auto" takes."""
    torch.manual_seed(0)
    net = mk.SparseRNN(hidden, hidden)
    net.set_mask("weight_hh_l0", torch.rand(hidden, hidden) < density)
    plain, x, share = net.to_rnn(), torch.randn(steps, batch, hidden), masked_module.kept_share(net.weight_hh_l0_mask)

    def blind() -> None:
        with without_looking(share):
            net(x)

    passes: dict[str, Callable[[], object]] = {
        "looking": lambda: net(x), "not looking": blind, "torch.nn.RNN": lambda: plain(x)}
    with torch.no_grad():
        seconds = timing.alternating(passes, torch.device("cpu"), runs)
        path = net.explain(batch, steps).split(":")[0]
    return {"hidden": hidden, "batch": batch, "steps": steps, "density": density, "path": path, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small cases, to see that it works")
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    print("    n batch steps  kept  path   us a call / not looking / nn.RNN")
    for case in itertools.product(*(QUICK if arguments.quick else (HIDDEN, BATCH, STEPS, DENSITIES))):
        row = measured(*case, runs=5 if arguments.quick else 101 if case[0] < 4096 else 15)
        looking, blind, plain = row["seconds"].values()
        print(f"{case[0]:5} {case[1]:5} {case[2]:5} {case[3]:5.0%}  {row['path']:6} {1e6 * looking:9.0f} "
              f"{looking / blind:13.2f} {looking / plain:8.2f}", flush=True)
        rows.append(row)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
