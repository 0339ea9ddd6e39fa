"""What test_distributed.py starts as many processes: `torchrun ... worker.py <ddp|fsdp> <folder>`.

Every check runs on every rank; what it raised, or null, goes to <folder>/<rank>.json. Weights are float64, so that the
order of sums, which sharding changes, shows as 1e-15 and no more, and a mistake as what it is.
"""
from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import moduli_kernels as mk

# A few hundred sums of a few hundred terms in another order, each term within 2**-53, over 6 steps of training.
CLOSE = {"rtol": 1e-11, "atol": 1e-13}
STEPS, BATCH = 6, 12  # the batch divides by 2 and by 3 ranks


def same(tensor: Tensor) -> None:
    """Bitwise equal on all ranks."""
    tensor = tensor.detach().contiguous()
    everywhere = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, tensor)
    assert all(torch.equal(other, tensor) for other in everywhere), "differs from rank to rank"


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


class Net(nn.Module):
    """A recurrent net and a read-out: (steps, batch, 3) -> (batch, 2)."""

    def __init__(self, kind: str, n: int):
        super().__init__()
        torch.manual_seed(0)
        kinds = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
        self.rnn = kinds[kind](3, n) if kind in kinds else mk.SparseRNN(3, n, path=kind)
        self.decoder = nn.Linear(n, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.rnn(x)[0][-1])

    def targets(self) -> list[tuple[nn.Module, str]]:
        return [(self.rnn, "weight_hh_l0"), (self.decoder, "weight"), (self.rnn, "weight_ih_l0")]


class LossOf(nn.Module):
    """Net and regularizer in one module, that is wrapped as a whole."""

    def __init__(self, net: Net, reg: nn.Module):
        super().__init__()
        self.net, self.reg = net, reg

    def forward(self, x, y):
        return (self.net(x) - y).square().mean() + self.reg()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(5, BATCH, 3, generator=generator, dtype=torch.float64),
             torch.randn(BATCH, 2, generator=generator, dtype=torch.float64)) for _ in range(STEPS)]


def mine(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of a batch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return x.chunk(ranks, 1)[rank], y.chunk(ranks)[rank]


def regularizer(net: nn.Module):
    """With points that are trained; strong enough to be seen."""
    generator = torch.Generator().manual_seed(2)
    return mk.regularize(net, manifold="torus", strength=2.0, trainable=True, generator=generator)


def train(net: Net, reg: nn.Module, *, model: nn.Module | None = None, part=lambda *batch: batch, loss_of=None) -> list:
    """Trains, cutting to 40 and then 70 %; the trace of losses. `model`: what wraps the net."""
    model = net if model is None else model
    groups = [{"params": list(net.parameters())}, {"params": list(reg.parameters()), "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.01)
    pruner = mk.MagnitudePruner(net.targets(), optimizer=optimizer)
    trace = []
    for step, batch in enumerate(batches()):
        if step in (2, 4):
            pruner.step_to({2: 0.4, 4: 0.7}[step])
        x, y = part(*batch)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean() + reg() if loss_of is None else loss_of(x, y)
        loss.backward()
        for (module, name), mask in zip(net.targets(), pruner.masks.values()):
            assert not whole(getattr(module, name).grad)[~mask].any(), f"gradient of {name} is not masked"
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        trace.append(loss.detach())
    for (module, name), mask in zip(net.targets(), pruner.masks.values()):
        assert not whole(getattr(module, name))[~mask].any(), f"masked {name} is not 0"
        same(mask)
    assert abs(pruner.sparsity - 0.7) < 0.01
    return trace


def alike(net: Net, reg: nn.Module, one: Net, reg_of_one: nn.Module) -> None:
    """Parameters, points and masks of a net trained by many processes, and of one that had the whole batch."""
    for (name, p), (_, q) in zip(net.named_parameters(), one.named_parameters(), strict=True):
        torch.testing.assert_close(whole(p), q.detach(), **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
        same(whole(p))
    for p, q in zip(reg.parameters(), reg_of_one.parameters(), strict=True):
        p = whole(p)
        torch.testing.assert_close(p, q.detach(), **CLOSE, msg=lambda m: f"points: {m}")
        same(p)
    for (name, a), (_, b) in zip(net.named_buffers(), one.named_buffers(), strict=True):
        assert torch.equal(a, b), name


def run(checks: dict, folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))  # a rank that failed leaves the others waiting
    results = {}
    for name, check in checks.items():
        try:
            check()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()  # no rank closes its connections while another still reads from them
    dist.destroy_process_group()
    # What each rank found is written. While Python shuts down, threads of process groups may still run, and then C++
    # aborts the process ("terminate called without an active exception", seen once in many runs).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if sys.argv[1] == "ddp":
        from tests.distributed.ddp import CHECKS
    else:
        from tests.distributed import fsdp, shards

        CHECKS = {**shards.CHECKS, **fsdp.CHECKS}
    run(CHECKS, Path(sys.argv[2]))
