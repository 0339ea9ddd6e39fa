"""Modules to prune, a loss, and counts, which the tests of pruning share."""
from __future__ import annotations

import torch
from torch import nn

import moduli_kernels as mk
from tests.support.penalty_cases import generator


class Weights(nn.Module):
    """Owns the given tensors as parameters w0, w1, ..."""

    def __init__(self, *tensors: torch.Tensor):
        super().__init__()
        for i, tensor in enumerate(tensors):
            self.register_parameter(f"w{i}", nn.Parameter(tensor))

    def targets(self) -> list[tuple[nn.Module, str]]:
        return [(self, name) for name in self._parameters]


class Net(nn.Module):
    """An encoder, a recurrent net and a decoder: (steps, batch, 3) -> (batch, 2)."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Linear(3, 6)
        self.rnn = nn.RNN(6, 8)
        self.decoder = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.rnn(self.encoder(x))[0][-1])

    def targets(self) -> list[tuple[nn.Module, str]]:
        return [(self.encoder, "weight"), (self.rnn, "weight_hh_l0"), (self.rnn, "weight_ih_l0"),
                (self.decoder, "weight")]


class WithNorm(Net):
    """Has other buffers as well, of other dtypes."""

    def __init__(self, seed: int = 0):
        super().__init__(seed)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.norm(self.rnn(self.encoder(x))[0][-1]))


class Tied(nn.Module):
    """An encoder and a decoder that share one weight (7, 4)."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.decoder.weight = self.encoder.weight

    def targets(self):
        return [(self.encoder, "weight"), (self.decoder, "weight")]


def loss_of(net: nn.Module, seed: int = 1) -> torch.Tensor:
    x = torch.randn(5, 4, 3, generator=generator(seed))
    return (net(x) - 1).square().sum()


def size_of(pruner: mk.MagnitudePruner) -> int:
    """The number of weights that the pruner ranks."""
    return sum(mask.numel() for mask in pruner.masks.values())


def cut_count(targets) -> int:
    """The number of masked entries, those of tied weights counted at each target."""
    return sum(int((~getattr(m, f"{n}_mask")).sum()) for m, n in targets)
