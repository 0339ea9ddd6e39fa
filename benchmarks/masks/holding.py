"""Measures what it costs to hold masked weights at 0 in a training step on the CPU.

    python -m benchmarks.masks.holding [--threads 2] [--rounds 40] [--quick]

A step is forward, backward and Adam over a recurrent net of torch's whose weights (W_ih and W_hh of all layers) are
pruned to 95 %. The same net and optimizer take turns in three ways, in an order drawn anew each round:

    plain   no hooks
    before  what masks cost when a pruner looked after the hooked step alone: gradients are masked as they arrive, and
            weights after the step, by `masked_fill_` with the inverted mask
    held    what MagnitudePruner registers: gradients, every optimizer's step, and a look at the weights before each
            forward pass

Medians of the ratios within a round are printed, with their quartiles. `guarantee` is held over before: what it costs
that masks hold however weights are written. The last column is the time of the hooks alone, called by themselves: the
look before the forward pass, and the one after the step. Leave the machine alone meanwhile.
"""
from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import moduli_kernels as mk
from benchmarks.harness.measuring import cpu_seconds, quartiles, share_of_others
from moduli_kernels.masks import holding

CASES = {  # name: (kind of net, neurons, layers, batch, steps)
    "RNN, n = 128": (nn.RNN, 128, 1, 32, 50),
    "LSTM, n = 128": (nn.LSTM, 128, 1, 32, 50),
    "RNN, n = 650, 3 layers": (nn.RNN, 650, 3, 20, 35),
    "LSTM, n = 650": (nn.LSTM, 650, 1, 20, 35),
}


def targets_of(net: nn.RNNBase) -> list[tuple[nn.Module, str]]:
    return [(net, name) for names in net._all_weights for name in names[:2]]


@contextmanager
def masked_by_hand(net: nn.RNNBase, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Masks gradients as they arrive and weights after the step."""
    handles = []
    for module, name in targets_of(net):
        parameter, mask = getattr(module, name), getattr(module, f"{name}_mask")

        def zero(*_, parameter=parameter, mask=mask):
            with torch.no_grad():
                parameter.masked_fill_(~mask, 0)

        handles += [parameter.register_hook(lambda grad, mask=mask: torch.where(mask, grad, 0)),
                    optimizer.register_step_post_hook(zero)]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def held(net: nn.RNNBase, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    pruner = mk.MagnitudePruner(targets_of(net))
    yield
    pruner.remove_hooks()


def step(net: nn.RNNBase, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    net(x)[0].square().mean().backward()
    optimizer.step()


WAYS = {"plain": lambda net, optimizer: nullcontext(), "before": masked_by_hand, "held": held}


def measure(kind: type[nn.RNNBase], neurons: int, layers: int, batch: int, steps: int,
            rounds: int) -> dict[str, list[float]]:
    """Seconds of a step in each way, round by round; two rounds before these warm up."""
    torch.manual_seed(0)
    net, x = kind(neurons, neurons, layers), torch.randn(steps, batch, neurons)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    pruner = mk.MagnitudePruner(targets_of(net), scope="each")
    pruner.step_to(0.95)
    pruner.remove_hooks()
    taken: dict[str, list[float]] = {who: [] for who in WAYS}
    for number in range(-2, rounds):
        for who in random.sample(list(WAYS), len(WAYS)):
            pruner.apply()
            with WAYS[who](net, optimizer):
                step(net, optimizer, x)  # the first step after hooks were registered does more than later ones
                begun = time.perf_counter()
                step(net, optimizer, x)
                seconds = time.perf_counter() - begun
            if number >= 0:
                taken[who].append(seconds)
    with held(net, optimizer):
        step(net, optimizer, x)
        for who, hook in (("look before", lambda: holding.zero_before_forward(net, ())),
                          ("look after", lambda: [after(optimizer, (), {}) for after in _all_steps_hooks()])):
            taken[who] = []
            for _ in range(rounds):
                begun = time.perf_counter()
                hook()
                taken[who].append(time.perf_counter() - begun)
    return taken


def _all_steps_hooks() -> list:
    return list(_global_optimizer_post_hooks.values())


def line(name: str, taken: dict[str, list[float]]) -> str:
    def ratio(a: str, b: str) -> str:
        low, median, high = quartiles([x / y for x, y in zip(taken[a], taken[b])])
        return f"{median:.3f} [{low:.3f}, {high:.3f}]"

    median = {who: quartiles(seconds)[1] for who, seconds in taken.items()}
    looks = [f"{100 * median[who] / median['plain']:.2f} %" for who in ("look before", "look after")]
    return (f"| {name} | {1e3 * median['plain']:.2f} ms | {ratio('before', 'plain')} | {ratio('held', 'plain')} | "
            f"{ratio('held', 'before')} | {' + '.join(looks)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="few rounds, which measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    before = cpu_seconds()
    print("| net | a plain step | before / plain | held / plain | guarantee: held / before | the looks alone |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, case in CASES.items():
        print(line(name, measure(*case, 3 if options.quick else options.rounds)), flush=True)
    others = share_of_others(before)
    if others is not None:
        print(f"\nOther processes used {100 * others:.1f} % of the machine. torch {torch.__version__}, "
              f"{options.threads} threads.")


if __name__ == "__main__":
    main()
