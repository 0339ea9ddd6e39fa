"""Checks of training and saving under FSDP2 (fully_shard), against one process with the whole batch: run by
worker.py in 3 processes."""
from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

import moduli_kernels as mk
from tests.distributed.shards import mesh, raises, randn
from tests.distributed.worker import CLOSE, LossOf, Net, alike, batches, mine, regularizer, train, whole
from tests.support.pruning_cases import Weights


def training(kind: str, own_group: bool, n: int = 13, replicas: int = 1):
    """own_group: the recurrent net is sharded as a group of its own, so the penalty meets its shards; else only the
    root is, which stays whole from forward to backward."""
    def check():
        one, net = Net(kind, n), Net(kind, n)
        reg_of_one = regularizer(one.rnn)
        train(one, reg_of_one)
        if own_group:
            fully_shard(net.rnn, mesh=mesh(replicas))
        fully_shard(net, mesh=mesh(replicas))
        reg = regularizer(net.rnn)
        train(net, reg, part=mine)
        alike(net, reg, one, reg_of_one)
        saved = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
        again = Net(kind, n)
        pruner = mk.MagnitudePruner(again.targets())
        again.load_state_dict(saved)
        assert pruner.sparsity == mk.MagnitudePruner(one.targets()).sparsity
        x, _ = batches()[0]
        torch.testing.assert_close(again(x), one(x), **CLOSE)
    return check


def regularizer_inside(own_group: bool):
    """Points are sharded with the root, and whole when the penalty reads them; the weights are, with their own group,
    shards by then."""
    def check():
        one, net = Net("rnn", 13), Net("rnn", 13)
        reg_of_one, reg = regularizer(one.rnn), regularizer(net.rnn)
        train(one, reg_of_one)
        model = LossOf(net, reg)
        if own_group:
            fully_shard(net.rnn, mesh=mesh())
        fully_shard(model, mesh=mesh())
        train(net, reg, part=mine, loss_of=model)
        alike(net, reg, one, reg_of_one)
    return check


def masks_from_before():
    """A net that came with masks is sharded: a new pruner takes them over, the old one says so, and a full checkpoint
    loads with its masks."""
    one, net = Net("sparse", 13), Net("sparse", 13)
    earlier = mk.MagnitudePruner(one.targets())
    earlier.step_to(0.5)
    old = mk.MagnitudePruner(net.targets())
    old.step_to(0.5)
    fully_shard(net.rnn, mesh=mesh())
    fully_shard(net, mesh=mesh())
    raises(RuntimeError, "make a new MagnitudePruner", lambda: old.step_to(0.6))
    new = mk.MagnitudePruner(net.targets())
    assert new.sparsity == earlier.sparsity
    earlier.step_to(0.8)
    new.step_to(0.8)
    assert all(torch.equal(a, b) for a, b in zip(earlier.masks.values(), new.masks.values(), strict=True))
    x, _ = batches()[0]
    torch.testing.assert_close(net(x), one(x), **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(net(x), one(x), **CLOSE)  # the path without gradients
    net.reshard()  # a root stays whole after a forward pass without gradients
    set_model_state_dict(net, one.state_dict(), options=StateDictOptions(full_state_dict=True))
    torch.testing.assert_close(net(x), one(x), **CLOSE)
    assert new.sparsity == earlier.sparsity


def checkpoint():
    """Sharded, by torch.distributed.checkpoint: weights by their shards, masks whole."""
    folder = Path(sys.argv[2]) / "checkpoint"
    net, other = Net("sparse", 7), Net("sparse", 7)
    pruners = []
    for sharded in (net, other):
        fully_shard(sharded, mesh=mesh())
        pruners.append(mk.MagnitudePruner(sharded.targets()))
    pruners[0].step_to(0.6)
    dcp.save({"net": get_model_state_dict(net)}, checkpoint_id=folder)
    state = {"net": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state["net"])
    assert pruners[1].sparsity == pruners[0].sparsity > 0.59
    for a, b in zip(pruners[0].masks.values(), pruners[1].masks.values(), strict=True):
        assert torch.equal(a, b)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(p), whole(q))


def whole_for_a_while():
    """A root after a forward pass alone is whole: pruning then would change a copy. Plain error, and the way out."""
    net = Net("rnn", 7)
    fully_shard(net, mesh=mesh())
    pruner = mk.MagnitudePruner(net.targets())
    with torch.no_grad():
        net(batches()[0][0])
    before = pruner.state_dict()
    for write in (lambda: pruner.step_to(0.5), pruner.apply, lambda: pruner.load_state_dict(before)):
        raises(RuntimeError, "call reshard()", write)
    assert pruner.sparsity == 0  # reading is fine
    net.reshard()
    pruner.step_to(0.5)
    assert pruner.sparsity == round(0.5 * 84) / 84


def left_plain():
    """make_permanent and remove_hooks leave no trace on sharded parameters."""
    net = Weights(randn(7, 7))
    fully_shard(net, mesh=mesh())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = mk.MagnitudePruner(net.targets(), optimizer=optimizer)
    pruner.step_to(0.5)
    pruner.make_permanent()
    assert not net._buffers and not net.w0._post_accumulate_grad_hooks and not optimizer._optimizer_step_post_hooks
    assert int((whole(net.w0) == 0).sum()) == 24


def lottery():
    """Earlier weights, and fresh ones, on the masks of a sharded net."""
    net = Net("sparse", 7)
    fully_shard(net.rnn, mesh=mesh())
    fully_shard(net, mesh=mesh())
    pruner = mk.MagnitudePruner(net.targets())
    first = {key: value.clone() for key, value in net.state_dict().items()}
    pruner.step_to(0.6)
    pruned = {name: whole(p).clone() for name, p in net.named_parameters()}
    sparsity = pruner.sparsity
    raises(ValueError, "live tensor", lambda: mk.rewind_(net, pruner, net.state_dict()))
    mk.reinitialize_(net, pruner)
    assert any((whole(p) != pruned[name]).any() for name, p in net.named_parameters())
    masked = [~mask for mask in pruner.masks.values()]
    assert all((whole(p)[cut] == 0).all() for p, cut in zip((getattr(m, n) for m, n in net.targets()), masked))
    mk.rewind_(net, pruner, first)
    assert pruner.sparsity == sparsity > 0.59
    for name, p in net.named_parameters():
        assert torch.equal(whole(p), pruned[name]), name  # of weights that were cut and not trained


CHECKS = {
    "rnn": training("rnn", True),
    "rnn_root_only": training("rnn", False),
    "rnn_replicated": training("rnn", True, n=7, replicas=3),
    "lstm": training("lstm", True, n=7),
    "gru_root_only": training("gru", False, n=7),
    "sparse_rnn": training("sparse", True),
    "sparse_rnn_root_only": training("sparse", False),
    "sparse_rnn_dense_path": training("dense", True, n=7),
    "sparse_rnn_auto": training("auto", True, n=16),
    "regularizer_inside": regularizer_inside(True),
    "regularizer_inside_root_only": regularizer_inside(False),
    "masks_from_before": masks_from_before,
    "checkpoint": checkpoint,
    "whole_for_a_while": whole_for_a_while,
    "left_plain": left_plain,
    "lottery": lottery,
}
