"""Measures what it costs to hold masked weights at 0 in a training step on the CPU.

    python -m benchmarks.masks.holding [--threads 2] [--rounds 40] [--quick]

A step is forward, backward and Adam over a recurrent net of torch's whose weights (W_ih and W_hh of all layers) are
pruned to 95 %. Three nets with the same weights take turns, in an order drawn anew each round:

    plain   no masks and no hooks
    before  what masks cost when a pruner looked after the hooked step alone: gradients are masked as they arrive, and
            weights after the step, by `masked_fill_` with the inverted mask
    held    what MagnitudePruner registers: gradients, every optimizer's step, and a look at the weights before each
            forward pass

Medians of the ratios within a round are printed, with their quartiles. `guarantee` is held over before: what it costs
that masks hold however weights are written. Leave the machine alone meanwhile.
"""
from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable

import torch
from torch import nn

import moduli_kernels as mk
from benchmarks.harness.measuring import cpu_seconds, quartiles, share_of_others

CASES = {  # name: (kind of net, neurons, layers, batch, steps)
    "RNN, n = 128": (nn.RNN, 128, 1, 32, 50),
    "LSTM, n = 128": (nn.LSTM, 128, 1, 32, 50),
    "RNN, n = 650, 3 layers": (nn.RNN, 650, 3, 20, 35),
    "LSTM, n = 650": (nn.LSTM, 650, 1, 20, 35),
}


def targets_of(net: nn.RNNBase) -> list[tuple[nn.Module, str]]:
    return [(net, name) for names in net._all_weights for name in names[:2]]


def masked_by_hand(net: nn.RNNBase, optimizer: torch.optim.Optimizer, masks: list[torch.Tensor]) -> None:
    """Masks gradients as they arrive and weights after the step."""
    for (module, name), mask in zip(targets_of(net), masks, strict=True):
        parameter = getattr(module, name)
        parameter.register_hook(lambda grad, mask=mask: torch.where(mask, grad, 0))

        def zero(*_, parameter=parameter, mask=mask):
            with torch.no_grad():
                parameter.masked_fill_(~mask, 0)

        optimizer.register_step_post_hook(zero)


def step_of(net: nn.RNNBase, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        net(x)[0].square().mean().backward()
        optimizer.step()

    return step


def contestants(kind: type[nn.RNNBase], neurons: int, layers: int, batch: int, steps: int) -> dict[str, Callable]:
    torch.manual_seed(0)
    first, x = kind(neurons, neurons, layers), torch.randn(steps, batch, neurons)
    nets = {"plain": first, "before": copy.deepcopy(first), "held": copy.deepcopy(first)}
    optimizers = {who: torch.optim.Adam(net.parameters(), lr=1e-4) for who, net in nets.items()}
    pruner = mk.MagnitudePruner(targets_of(nets["held"]), scope="each")
    pruner.step_to(0.95)
    masked_by_hand(nets["before"], optimizers["before"], list(pruner.masks.values()))
    return {who: step_of(nets[who], optimizers[who], x) for who in nets}


def measure(calls: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; two rounds before these warm up."""
    taken: dict[str, list[float]] = {who: [] for who in calls}
    for number in range(-2, rounds):
        for who in random.sample(list(calls), len(calls)):
            begun = time.perf_counter()
            calls[who]()
            if number >= 0:
                taken[who].append(time.perf_counter() - begun)
    return taken


def line(name: str, taken: dict[str, list[float]]) -> str:
    def ratio(a: str, b: str) -> str:
        low, median, high = quartiles([x / y for x, y in zip(taken[a], taken[b])])
        return f"{median:.3f} [{low:.3f}, {high:.3f}]"

    milliseconds = 1e3 * quartiles(taken["plain"])[1]
    return (f"| {name} | {milliseconds:.2f} ms | {ratio('before', 'plain')} | {ratio('held', 'plain')} | "
            f"{ratio('held', 'before')} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="few rounds, which measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    before = cpu_seconds()
    print("| net | a plain step | before / plain | held / plain | guarantee: held / before |")
    print("| --- | --- | --- | --- | --- |")
    for name, case in CASES.items():
        print(line(name, measure(contestants(*case), 3 if options.quick else options.rounds)), flush=True)
    others = share_of_others(before)
    if others is not None:
        print(f"\nOther processes used {100 * others:.1f} % of the machine. torch {torch.__version__}, "
              f"{options.threads} threads.")


if __name__ == "__main__":
    main()
