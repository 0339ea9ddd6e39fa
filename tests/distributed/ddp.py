"""Checks of DistributedDataParallel, run by worker.py in 2 processes."""
from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import moduli_kernels as mk
from tests.distributed.worker import CLOSE, LossOf, Net, alike, batches, mine, regularizer, same, train

N = 13


def one_process(kind: str, n: int = N) -> tuple[Net, nn.Module]:
    net = Net(kind, n)
    reg = regularizer(net.rnn)
    train(net, reg)
    return net, reg


def training(kind: str, masks_first: bool = False, **options):
    def check():
        net = Net(kind, N)
        reg = regularizer(net.rnn)
        if masks_first:  # DDP hands the masks out with the other buffers
            mk.MagnitudePruner(net.targets())
        trace = train(net, reg, model=DistributedDataParallel(net, **options), part=mine)
        everywhere = [torch.empty_like(trace[0]) for _ in range(2)]
        dist.all_gather(everywhere, trace[0])
        assert everywhere[0] != everywhere[1], "the ranks saw one batch: nothing was averaged"
        alike(net, reg, *one_process(kind))
    return check


def regularizer_inside():
    net = Net("rnn", N)
    reg = regularizer(net.rnn)
    if dist.get_rank() == 1:  # as without a generator, where each rank draws its own points
        with torch.no_grad():
            for points in reg.parameters():
                points.add_(1)
    model = DistributedDataParallel(LossOf(net, reg))
    train(net, reg, part=mine, loss_of=model)
    alike(net, reg, *one_process("rnn"))


def gradients_without_exchange():
    """Gradients of points outside of DDP are the same on each rank, since the penalty has no batch."""
    net = Net("rnn", N)
    reg = regularizer(net.rnn)
    model = DistributedDataParallel(net)
    x, y = mine(*batches()[0])
    ((model(x) - y).square().mean() + reg()).backward()
    (points,) = reg.parameters()
    assert points.grad.abs().max() > 1e-3
    same(points.grad)


def penalty_in_place():
    """accumulate_penalty_grad_ after backward: each rank adds the same to what has been averaged."""
    def step(model, net, reg, part):
        x, y = part(*batches()[0])
        (model(x) - y).square().mean().backward()
        (_, r), = reg.items()
        value = mk.accumulate_penalty_grad_(net.rnn.weight_hh_l0, r.rows.points, manifold=r.manifold, strength=2.0)
        return [value, net.rnn.weight_hh_l0.grad, r.rows.points.grad]

    net, one = Net("rnn", N), Net("rnn", N)
    got = step(DistributedDataParallel(net), net, regularizer(net.rnn), mine)
    for g, expected in zip(got, step(one, one, regularizer(one.rnn), lambda *batch: batch)):
        same(g)
        torch.testing.assert_close(g, expected, **CLOSE)


CHECKS = {
    "rnn": training("rnn"),
    "lstm": training("lstm", gradient_as_bucket_view=True),
    "sparse_rnn": training("sparse", masks_first=True),
    "sparse_rnn_dense_path": training("dense", find_unused_parameters=True),
    "sparse_rnn_auto": training("auto", static_graph=True),
    "regularizer_inside": regularizer_inside,
    "gradients_without_exchange": gradients_without_exchange,
    "penalty_in_place": penalty_in_place,
}
