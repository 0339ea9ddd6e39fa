"""Path integration: a recurrent net is told where it starts and how it moves, and says where it is.

The paper's navigation task (architecture of Cueva & Wei and of Sorscher et al.): a walker roams a square box;
the net sees its displacement at every step and the landmark activation of its first position only, and must
give the landmark activation of every later position. Lengths are metres, times seconds, angles radians,
errors cm. Tensors are time-major, (steps, batch, ...), as `torch.nn.RNN` likes them best.
The net is an `mk.SparseRNN`: as it is pruned, its steps get cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import moduli_kernels as mk

from .task import WORLD_SEED, Task

BOX = 2.2  # side of the arena, m
DT = 0.02  # s
SPEED_SCALE = 0.13 * 2 * math.pi  # scale of the Rayleigh-distributed forward speed, m/s
TURN_STD = 5.76 * 2  # standard deviation of the turning rate, rad/s
WALL_ZONE = 0.03  # closer than this to a wall and heading for it, the walker turns along it, m
WALL_SLOWDOWN = 0.25
TEST_BATCHES = 5


class Walks(NamedTuple):
    """A batch of walks. `start` is one step after the walker was put down: that first step is dropped."""

    start: Tensor  # (batch, 2) m
    moves: Tensor  # (steps, batch, 2) m, the displacement of each step: the net's input
    positions: Tensor  # (steps, batch, 2) m, positions[t] = start + moves[:t + 1].sum(0)


def walks(batch: int, steps: int, *, box: float = BOX, generator: torch.Generator) -> Walks:
    """Random walks in a box centred at 0, all of the batch at once, on the generator's device.

    A step goes `speed * DT` along the heading, speed ~ Rayleigh(SPEED_SCALE); then the heading turns by
    Normal(0, TURN_STD) * DT. Near a wall and heading for it, the step is a quarter as long and the heading
    turns parallel to the wall. The turn comes after the step: a long step can end a few cm outside the box.
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


def activation(positions: Tensor, landmarks: Tensor, width: float) -> Tensor:
    """Activation of each landmark, (..., 2) m, (landmarks, 2) m, m -> (..., landmarks), >= 0, summing to 1.

    The default of the authors' code: softmax(-d^2 / (2 width^2)) - softmax(-d^2 / (4 width^2)), raised to
    minimum 0 and normalized.
    """
    scaled = torch.cdist(positions, landmarks).square() / (-2 * width**2)
    difference = torch.softmax(scaled, dim=-1) - torch.softmax(scaled / 2, dim=-1)
    raised = difference - difference.amin(dim=-1, keepdim=True)
    return raised / raised.sum(dim=-1, keepdim=True)


def decode(scores: Tensor, landmarks: Tensor) -> Tensor:
    """Mean position of the 3 most active landmarks, (..., landmarks) -> (..., 2) m."""
    return landmarks[scores.topk(3, dim=-1).indices].mean(dim=-2)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-sum_i target_i log softmax(logits)_i, mean over steps and batch; nats."""
    return -(target * torch.log_softmax(logits, dim=-1)).sum(dim=-1).mean()


class PathIntegrator(nn.Module):
    """Encoder (start -> state), ReLU net (moves -> states), decoder (states -> landmarks); no biases."""

    def __init__(self, landmarks: int, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(landmarks, hidden, bias=False)
        self.rnn = mk.SparseRNN(2, hidden, nonlinearity="relu", bias=False)
        self.decoder = nn.Linear(hidden, landmarks, bias=False)

    def forward(self, start: Tensor, moves: Tensor) -> Tensor:
        """(batch, landmarks), (steps, batch, 2) m -> logits (steps, batch, landmarks)."""
        states, _ = self.rnn(moves, self.encoder(start)[None])
        return self.decoder(states)


class NavigationTask(Task):
    """The defaults are the paper's size. `width_cm` is the landmarks' sigma.
    """

    METRIC = "mean error"
    UNIT = "cm"
    DIGITS = 1

    def __init__(self, *, hidden: int = 4096, landmarks: int = 512, width_cm: int = 12, steps: int = 50,
                 batch: int = 200, seed: int = 0, device: str = "cpu") -> None:
        self.batch_size, self.steps = batch, steps
        torch.manual_seed(seed)  # the initial weights: PyTorch's default
        self.model = PathIntegrator(landmarks, hidden).to(device)
        # Nets of one seed see the same landmarks and walks in the same order.
        self.generator = torch.Generator(device).manual_seed(WORLD_SEED + seed)
        self.landmarks = (torch.rand(landmarks, 2, generator=self.generator, device=device) - 0.5) * BOX
        self.width = width_cm / 100
        self.test = walks(TEST_BATCHES * batch, steps, generator=self.generator)

    def batches(self, count: int) -> Iterator[Walks]:
        """`count` fresh batches, drawn in one go: the loop over steps then costs next to nothing a batch."""
        drawn = walks(count * self.batch_size, self.steps, generator=self.generator)
        for i in range(0, count * self.batch_size, self.batch_size):
            part = slice(i, i + self.batch_size)
            yield Walks(drawn.start[part], drawn.moves[:, part], drawn.positions[:, part])

    def activation(self, positions: Tensor) -> Tensor:
        return activation(positions, self.landmarks, self.width)

    def logits(self, batch: Walks) -> Tensor:
        return self.model(self.activation(batch.start), batch.moves)

    def loss(self, batch: Walks) -> Tensor:
        return soft_cross_entropy(self.logits(batch), self.activation(batch.positions))

    @torch.no_grad()
    def decoded(self, batch: Walks) -> Tensor:
        """Where the net says it is, (steps, batch, 2) m."""
        return decode(self.logits(batch), self.landmarks)

    def error(self) -> float:
        """Mean distance between decoded and true position over all steps of the test walks, cm."""
        return 100 * (self.decoded(self.test) - self.test.positions).norm(dim=-1).mean().item()

    def references(self) -> dict[str, float]:
        """Errors (cm) that put the net's into proportion."""
        start, _, positions = self.test
        guesses = {
            "always the middle": torch.zeros_like(start),
            "staying at the start": start,
            "perfect activations, decoded": decode(self.activation(positions), self.landmarks),
        }
        return {name: 100 * (guess - positions).norm(dim=-1).mean().item() for name, guess in guesses.items()}

    def pruned(self) -> list[tuple[nn.Module, str]]:
        rnn = self.model.rnn
        linear = [(self.model.encoder, "weight"), (self.model.decoder, "weight")]
        return [*linear, (rnn, "weight_hh_l0"), (rnn, "weight_ih_l0")]

    def recurrent(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.model.rnn.weight_hh_l0.detach(), self.model.rnn.weight_hh_l0_mask)]


TASK = NavigationTask
