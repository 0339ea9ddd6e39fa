"""The method in a training loop of your own, on data that is made here: python -m examples.plain_loop

A net reads the 20 steps of a walk in the plane and says where the walk ends. Epoch by epoch, more of its recurrent
weights are cut, up to 90 %; five more epochs let it recover. Lines that use the package are marked with *.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

import moduli_kernels as mk  # *


class Walker(nn.Module):
    """A net that maps the steps of a walk, (batch, 20, 2), to its end, (batch, 2)."""

    def __init__(self, hidden: int = 64):
        super().__init__()
        self.rnn = mk.SparseRNN(2, hidden, batch_first=True)  # * or nn.RNN
        self.decoder = nn.Linear(hidden, 2)

    def forward(self, steps: Tensor) -> Tensor:
        return self.decoder(self.rnn(steps)[0][:, -1])


def walks(batches: int, batch_size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Draws batches of walks and their ends."""
    steps = 0.3 * torch.randn(batches, batch_size, 20, 2)
    return list(zip(steps, steps.sum(2)))


def train(epochs: int = 10, batches: int = 50, sparsity: float = 0.9, hold: int = 5) -> list[tuple[float, ...]]:
    """Trains the net, prints each epoch and returns (error, penalty, sparsity) of each.

    The error is the mean square error on the epoch's last batch.
    """
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
