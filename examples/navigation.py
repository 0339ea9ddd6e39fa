"""Path integration: a recurrent net sees where a walker starts and how it moves, and says where it is.

This is the paper's navigation task, with the architecture of Cueva & Wei and of Sorscher et al. A walker roams a square
box. The net sees the displacement at every step, and the landmark activation of the first position only; it must give
the landmark activation of every later position. Lengths are in metres, times in seconds, angles in radians, errors in
cm. Tensors are time-major, (steps, batch, ...). The net is an `mk.SparseRNN`, whose steps get cheaper as it is pruned.

    python -m examples.navigation --net torus --cut 0.9
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import moduli_kernels as mk

from .training.preset import Preset
from .training.task import WORLD_SEED, Task

BOX = 2.2  # side of the arena, m
DT = 0.02  # duration of a step, s
SPEED_SCALE = 0.13 * 2 * math.pi  # scale of the Rayleigh-distributed forward speed, m/s
TURN_STD = 5.76 * 2  # standard deviation of the turning rate, rad/s
WALL_ZONE = 0.03  # a walker that is closer to a wall than this and heads for it turns along it, m
WALL_SLOWDOWN = 0.25  # the length of that step is multiplied by it
TEST_BATCHES = 5  # test walks, in batches


class Walks(NamedTuple):
    """A batch of walks. The first step after the walker was put down is dropped; `start` lies after it."""

    start: Tensor  # (batch, 2) m
    moves: Tensor  # (steps, batch, 2) m, the displacement of each step, which is the net's input
    positions: Tensor  # (steps, batch, 2) m, positions[t] = start + moves[:t + 1].sum(0)


def walks(batch: int, steps: int, *, box: float = BOX, generator: torch.Generator) -> Walks:
    """Draws random walks in a box centred at 0, the whole batch at once, on the generator's device.

    A step goes `speed * DT` along the heading, speed ~ Rayleigh(SPEED_SCALE); then the heading turns by
    Normal(0, TURN_STD) * DT. A walker near a wall that heads for it takes a step a quarter as long and turns parallel
    to the wall. Since the turn comes after the step, a long step can end a few cm outside the box.
    """
    device = generator.device
    uniform = torch.rand(steps + 1, batch, generator=generator, device=device)
    lengths = SPEED_SCALE * DT * torch.sqrt(-2 * torch.log1p(-uniform))
    turns = TURN_STD * DT * torch.randn(steps + 1, batch, generator=generator, device=device)
    position = (torch.rand(batch, 2, generator=generator, device=device) - 0.5) * box
    heading = 2 * math.pi * torch.rand(batch, generator=generator, device=device)

    moves = torch.empty(steps + 1, batch, 2, device=device)
    positions = torch.empty(steps + 1, batch, 2, device=device)
    for t in range(steps + 1):
        gap, axis = (box / 2 - position.abs()).min(dim=1)
        beyond = position.gather(1, axis[:, None])[:, 0] < 0  # the nearest wall is the left or the lower one
        wall = axis * (math.pi / 2) + beyond * math.pi  # direction of the nearest wall
        angle = torch.remainder(heading - wall + math.pi, 2 * math.pi) - math.pi
        hits = (gap < WALL_ZONE) & (angle.abs() < math.pi / 2)
        length = torch.where(hits, WALL_SLOWDOWN * lengths[t], lengths[t])
        moves[t] = length[:, None] * torch.stack((heading.cos(), heading.sin()), dim=1)
        position = position + moves[t]
        positions[t] = position
        heading = heading + turns[t] + torch.where(hits, angle.sign() * (math.pi / 2 - angle.abs()), 0.0)
    return Walks(positions[0], moves[1:], positions[1:])


def activation(positions: Tensor, landmarks: Tensor, width: float, target: str = "difference") -> Tensor:
    """Returns the activation of each landmark, (..., landmarks), >= 0 and summing to 1.

    Args:
        positions: (..., 2) m.
        landmarks: (landmarks, 2) m.
        width: sigma of a landmark, m.
        target: "difference", the default of the authors' code, is softmax(-d^2 / (2 width^2)) - softmax(-d^2 / (4
            width^2)), raised to minimum 0 and normalized. "softmax" is the first of these two alone. "gaussians" takes
            the paper's words literally: softmax(exp(-d^2 / (2 width^2))), which is almost uniform.
    """
    scaled = torch.cdist(positions, landmarks).square() / (-2 * width**2)
    if target != "difference":
        return torch.softmax(scaled if target == "softmax" else scaled.exp(), dim=-1)
    difference = torch.softmax(scaled, dim=-1) - torch.softmax(scaled / 2, dim=-1)
    raised = difference - difference.amin(dim=-1, keepdim=True)
    return raised / raised.sum(dim=-1, keepdim=True)


def decode(scores: Tensor, landmarks: Tensor, decoder: str = "top3") -> Tensor:
    """Returns the position (..., 2) in metres that activations or their logits (..., landmarks) stand for.

    Args:
        decoder: "top3" is the mean position of the 3 most active landmarks, as in the authors' code; it is the same for
            logits and activations. "mean" is that of all landmarks, weighted by the softmax of the logits, a reading of
            the paper's "Bayesian decoder".
    """
    if decoder == "mean":
        return torch.softmax(scores, dim=-1) @ landmarks
    return landmarks[scores.topk(3, dim=-1).indices].mean(dim=-2)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Returns -sum_i target_i log softmax(logits)_i in nats, averaged over steps and batch."""
    return -(target * torch.log_softmax(logits, dim=-1)).sum(dim=-1).mean()


class PathIntegrator(nn.Module):
    """Encoder (start -> state), ReLU net (moves -> states), decoder (states -> landmarks); no biases."""

    def __init__(self, landmarks: int, hidden: int, inputs: int = 2) -> None:
        super().__init__()
        self.encoder = nn.Linear(landmarks, hidden, bias=False)
        self.rnn = mk.SparseRNN(inputs, hidden, nonlinearity="relu", bias=False)
        self.decoder = nn.Linear(hidden, landmarks, bias=False)

    def forward(self, start: Tensor, moves: Tensor) -> Tensor:
        """Maps start (batch, landmarks) and moves (steps, batch, inputs) to logits (steps, batch, landmarks)."""
        states, _ = self.rnn(moves, self.encoder(start)[None])
        return self.decoder(states)


class NavigationTask(Task):
    """Path integration. `OPTIONS` says what the arguments are; the defaults are the paper's sizes."""

    METRIC = "mean error"
    UNIT = "cm"
    DIGITS = 1
    FIXED_SHAPES = True

    def __init__(self, *, hidden: int = 4096, landmarks: int = 512, width_cm: int = 12, steps: int = 50,
                 batch: int = 200, target: str = "difference", loss_at: str = "all", decoder: str = "top3",
                 weight_decay: float = 0.0, zero_below: float = 0.0, fresh_tests: bool = False, world: int = -1,
                 seed: int = 0, device: str = "cpu") -> None:
        self.batch_size, self.steps = batch, steps
        self.target, self.loss_at, self.decoder = target, loss_at, decoder
        self.weight_decay, self.zero_below, self.fresh_tests = weight_decay, zero_below, fresh_tests
        torch.manual_seed(seed)  # the initial weights: PyTorch's default
        self.model = PathIntegrator(landmarks, hidden).to(device)
        # Nets with one seed see the same landmarks, and the same walks in the same order.
        self.generator = torch.Generator(device).manual_seed(WORLD_SEED + (seed if world < 0 else world))
        self.landmarks = (torch.rand(landmarks, 2, generator=self.generator, device=device) - 0.5) * BOX
        self.width = width_cm / 100
        self.test = self._tests()

    def _tests(self) -> Walks:
        return walks(TEST_BATCHES * self.batch_size, self.steps, generator=self.generator)

    def optimizer(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Returns AdamW, which without decay is Adam."""
        return torch.optim.AdamW(groups, lr=lr, weight_decay=self.weight_decay, fused=True)

    def batches(self, count: int) -> Iterator[Walks]:
        """Yields `count` fresh batches. They are drawn together, so that the loop over steps costs little for each."""
        drawn = walks(count * self.batch_size, self.steps, generator=self.generator)
        for i in range(0, count * self.batch_size, self.batch_size):
            part = slice(i, i + self.batch_size)
            yield Walks(drawn.start[part], drawn.moves[:, part], drawn.positions[:, part])

    def activation(self, positions: Tensor) -> Tensor:
        """Returns the activations of the task's landmarks at these positions."""
        return activation(positions, self.landmarks, self.width, self.target)

    def logits(self, batch: Walks) -> Tensor:
        """Returns the net's answers, (steps, batch, landmarks)."""
        return self.model(self.activation(batch.start), batch.moves)

    def loss(self, batch: Walks) -> Tensor:
        """Returns the cross entropy with the true activations, nats."""
        logits, positions = self.logits(batch), batch.positions
        if self.loss_at == "last":
            logits, positions = logits[-1:], positions[-1:]
        return soft_cross_entropy(logits, self.activation(positions))

    @torch.no_grad()
    def decoded(self, batch: Walks) -> Tensor:
        """Returns where the net says the walkers are, (steps, batch, 2) m."""
        return decode(self.logits(batch), self.landmarks, self.decoder)

    @torch.no_grad()
    def error(self) -> float:
        """Returns the mean distance between decoded and true position over all steps of the test walks, cm."""
        if self.fresh_tests:
            self.test = self._tests()
        weight = self.model.rnn.weight_hh_l0
        kept = weight.clone()
        weight.masked_fill_(weight.abs() < self.zero_below, 0.0)
        error = 100 * (self.decoded(self.test) - self.test.positions).norm(dim=-1).mean().item()
        weight.copy_(kept)
        return error

    def references(self) -> dict[str, float]:
        """Returns errors (cm) of simple answers, to set the net's beside."""
        start, _, positions = self.test
        perfect = self.activation(positions)
        scores = perfect.log() if self.decoder == "mean" else perfect  # logarithms would make ties among the top 3
        guesses = {
            "always the middle": torch.zeros_like(start),
            "staying at the start": start,
            "perfect activations, decoded": decode(scores, self.landmarks, self.decoder),
        }
        return {name: 100 * (guess - positions).norm(dim=-1).mean().item() for name, guess in guesses.items()}

    def pruned(self) -> list[tuple[nn.Module, str]]:
        rnn = self.model.rnn
        linear = [(self.model.encoder, "weight"), (self.model.decoder, "weight")]
        return [*linear, (rnn, "weight_hh_l0"), (rnn, "weight_ih_l0")]

    def recurrent(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.model.rnn.weight_hh_l0.detach(), self.model.rnn.weight_hh_l0_mask)]


TASK = NavigationTask
# The authors' sizes. OPTIONS says where paper and code differ.
SIZE = {"hidden": 4096, "landmarks": 512, "width_cm": 12, "steps": 50, "batch": 200, "target": "difference",
        "loss_at": "all", "decoder": "top3", "weight_decay": 0.0, "zero_below": 0.0, "fresh_tests": False, "world": -1}
# The demo's sizes; README.md says how they were chosen.
QUICK = {**SIZE, "hidden": 512, "landmarks": 128, "width_cm": 24, "steps": 20, "batch": 50}
PRESETS = {
    "full": Preset("the authors' size, 30 epochs of 1000 batches", SIZE, epochs=30, batches=1000, lr=1e-4,
                   strength=0.1),
    "quick": Preset("n = 512, 128 landmarks, 20 steps, 40 epochs of 85 batches: some minutes on a core", QUICK,
                    before=17, epochs=19, hold=4, batches=85, lr=2e-3, strength=0.1),
}
OPTIONS = {
    "hidden": "neurons (paper 4096)", "landmarks": "landmarks in the box (paper 512)",
    "width_cm": "sigma of a landmark in cm (paper 12)",
    "steps": "steps of a walk (paper 50)", "batch": "walks in a batch (paper 200)",
    "target": "activations to be learned: `difference` of two softmaxes (the code's default), `softmax` of "
              "-d^2/(2 sigma^2), or the paper's literal softmax of the `gaussians`, almost uniform",
    "loss_at": "`all` steps (code) or the `last` one (paper)",
    "decoder": "`top3`: mean of the 3 most active landmarks (code); `mean`: of all, weighted by their probabilities (a "
               "reading of the paper's Bayesian decoder)",
    "weight_decay": "0 is the paper's Adam (default); the code has AdamW with 0.01",
    "zero_below": "evaluate with |w_hh| below this set to 0 (the code: 1e-3; default 0)",
    "fresh_tests": "new test walks at every evaluation, as the code has it (default: the same ones)",
    "world": "seed of landmarks and walks for all trials, as the code's NumPy seed 0 (default -1: each trial its own)",
}
CHOICES = {"target": ("difference", "softmax", "gaussians"), "loss_at": ("all", "last"), "decoder": ("top3", "mean")}

if __name__ == "__main__":
    from .training.command_line import main

    sys.exit(main("navigation"))
