"""The method in a loop of one's own, on data made here: python -m examples.plain_loop

A net reads 20 steps of a walk in the plane and says where it ends. Epoch by epoch more of its recurrent weights are
cut, up to 90 %; five more epochs let it recover. The lines marked with * are the package's.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

import moduli_kernels as mk  # *


class Walker(nn.Module):
    """Steps of a walk, (batch, 20, 2) -> its end, (batch, 2)."""

    def __init__(self, hidden: int = 64):
        super().__init__()
        self.rnn = mk.SparseRNN(2, hidden, batch_first=True)  # * or nn.RNN
        self.decoder = nn.Linear(hidden, 2)

    def forward(self, steps: Tensor) -> Tensor:
        return self.decoder(self.rnn(steps)[0][:, -1])


def walks(batches: int, batch_size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Batches of walks and their ends."""
    steps = 0.3 * torch.randn(batches, batch_size, 20, 2)
    return list(zip(steps, steps.sum(2)))


def train(epochs: int = 10, batches: int = 50, sparsity: float = 0.9, hold: int = 5) -> list[tuple[float, ...]]:
    """Trains, prints and returns (error, penalty, sparsity) of each epoch; error: mean square, of the last batch."""
    torch.manual_seed(0)
    model, data, history = Walker(), walks(batches), []
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    reg = mk.regularize(model, manifold="torus", strength=0.01)  # *
    pruner = mk.MagnitudePruner([(model.rnn, "weight_hh_l0")], optimizer=optimizer)  # *

    for epoch, share in enumerate(mk.linear_schedule(sparsity, epochs, hold=hold)):  # *
        pruner.step_to(share)  # *
        for steps, end in data:
            error, penalty = nn.functional.mse_loss(model(steps), end), reg()  # *
            optimizer.zero_grad()
            (error + penalty).backward()  # *
            optimizer.step()
        history.append((error.item(), penalty.item(), pruner.sparsity))
        print("epoch {}: error {:.3f}, penalty {:.3f}, sparsity {:.0%}".format(epoch + 1, *history[-1]))
    return history


if __name__ == "__main__":
    train()
