"""Checks in some seconds that every available backend agrees with the reference.

    python -m moduli_kernels.env_report --check
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..backends import availability, backend
from ..geometry.presets import manifold
from ..penalty.function import moduli_penalty
from ..rnn.sparse_rnn import SparseRNN

TOLERANCE = 1e-5  # the largest relative difference in norm that is allowed, in float32
NEURONS = 130  # is not a multiple of any tile of the kernels
PRESETS = ("torus", "sphere", "klein", "r3")
DENSITY = 0.1


def _case(device: str, seed: int = 0) -> tuple[torch.Generator, Tensor, Tensor]:
    """Returns a generator, and a weight (n, n) and a mask (n, n) that were drawn from it."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(NEURONS, NEURONS, generator=generator, device=device)
    return generator, weight, torch.rand(NEURONS, NEURONS, generator=generator, device=device) < DENSITY


def penalty_results(device: str, preset: str, masked: bool) -> list[Tensor]:
    """Returns the value of the penalty, the gradient of the weight and the gradient of the points."""
    generator, weight, mask = _case(device)
    points = manifold(preset).sample(NEURONS, generator=generator, device=torch.device(device))
    leaves = [weight.requires_grad_(), points.requires_grad_()]
    value = moduli_penalty(*leaves, manifold=preset, mask=mask if masked else None)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def rnn_results(device: str, nonlinearity: str) -> list[Tensor]:
    """Returns the outputs of a masked net and all of its gradients."""
    generator, _, mask = _case(device)
    net = SparseRNN(5, NEURONS, nonlinearity=nonlinearity, path="sparse", device=device)
    bound = NEURONS**-0.5
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    net.set_mask("weight_hh_l0", mask)
    inputs = torch.randn(7, 3, 5, generator=generator, device=device, requires_grad=True)
    outputs, _ = net(inputs)
    into = torch.randn(outputs.shape, generator=generator, device=device)
    return [outputs.detach(), *torch.autograd.grad(outputs, [inputs, *net.parameters()], into)]


def _checks() -> Iterator[tuple[str, Callable[[str], list[Tensor]]]]:
    """Yields the name of each check and a function that runs it on a device."""
    for preset in PRESETS:
        yield f"penalty, {preset}, trained points", lambda device, p=preset: penalty_results(device, p, False)
    yield f"penalty, torus, {DENSITY:.0%} kept", lambda device: penalty_results(device, "torus", True)
    for nonlinearity in ("tanh", "relu"):
        yield f"SparseRNN, {nonlinearity}, {DENSITY:.0%} kept", lambda device, s=nonlinearity: rnn_results(device, s)


def self_test(say: Callable[[str], None] = print) -> bool:
    """Compares every available backend with the reference, says a line for each check, and returns whether all agree.

    They agree if no value or gradient has a relative difference in norm above TOLERANCE.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    serves = {"cpp": "cpu", "triton": "cuda", "cuda": "cuda"}
    present = [name for name, (there, _) in availability().items() if there and serves.get(name) in devices]
    if not present:
        say("nothing to check: only the reference is here, and the other backends would be compared with it")
    well = True
    for name in present:
        for what, run in _checks():
            begun = time.perf_counter()
            try:
                with backend("reference"):
                    expected = run(serves[name])
                with backend(name):
                    got = run(serves[name])
                apart = max(relative_difference(a, b) for a, b in zip(got, expected, strict=True))
                fine, finding = apart <= TOLERANCE, f"{apart:.1e} from the reference"
            except Exception as error:  # the report goes on with the other checks
                fine, finding = False, f"{type(error).__name__}: {error}"
            well &= fine
            say(f"{'ok  ' if fine else 'FAIL'}  {name:<7} {what:<32} {finding} ({time.perf_counter() - begun:.2f} s)")
    return well


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """Returns the relative difference in norm; NaN counts as infinite."""
    scale = expected.double().norm().item()
    difference = (got.double() - expected.double()).norm().item()
    apart = difference / scale if scale else difference
    return apart if apart == apart else float("inf")
