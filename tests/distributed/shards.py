"""Checks of what is computed on shards, the penalty and the ranking of a pruner, against whole weights: run by
worker.py in 3 processes, so that most shards are uneven and some empty."""
from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import moduli_kernels as mk
from tests.distributed.worker import CLOSE, Net, regularizer, same, whole
from tests.support.pruning_cases import Weights


def mesh(replicas: int = 1):
    """All ranks in a row; or, for HSDP, shards over 3 / replicas of them."""
    ranks = dist.get_world_size()
    return init_device_mesh("cpu", (ranks,)) if replicas == 1 else init_device_mesh(
        "cpu", (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))


def randn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def raises(kind: type[Exception], words: str, call) -> None:
    try:
        call()
    except kind as error:
        assert words in str(error), error
        return
    raise AssertionError(f"no {kind.__name__}")


# --- the penalty --------------------------------------------------------------------------------------------

PENALTIES = {  # weight's shape, column points or None, settings
    "square_13": ((13, 13), None, {}),
    "square_16": ((16, 16), None, {"power": 2.0, "manifold": "sphere"}),
    "uneven_7_by_5": ((7, 5), 5, {"reduction": "sum", "manifold": "klein"}),
    "two_rows": ((2, 9), 9, {}),  # the third rank has none
    "one_row": ((1, 9), 9, {"manifold": "torus6"}),
    "lstm_7": ((28, 7), None, {"blocks": 4}),  # 10, 10 and 8 rows: shards cut through gate blocks
    "gru_5_by_3": ((15, 3), 3, {"blocks": 3, "power": 1.5}),
    "convolution": ((7, 4, 3, 2), 4, {}),
    "own_inhibitor": ((7, 7), None, {"inhibitor": lambda d: 1 + d * d}),  # through plain PyTorch
}


def penalty(case: str, dtype: torch.dtype = torch.float64, masked: bool = False, replicas: int = 1):
    def check():
        shape, columns, settings = PENALTIES[case]
        settings = {"manifold": "torus", "strength": 3.0, **settings}
        manifold = mk.manifold(settings["manifold"])
        points = [manifold.sample(n, generator=torch.Generator().manual_seed(n), dtype=dtype)
                  for n in (shape[0] // settings.get("blocks", 1), columns) if n is not None]
        weight = randn(*shape).to(dtype)
        mask = randn(*shape, seed=4) > 0 if masked else None

        def gradients(weight: Tensor) -> list[Tensor]:
            given = [p.clone().requires_grad_() for p in points]
            value = mk.moduli_penalty(weight, *given, mask=mask, **settings)
            (5 * value).backward()
            return [value.detach(), weight.grad, *(p.grad for p in given)]

        expected = gradients(weight.clone().requires_grad_())
        placements = [Shard(0)] if replicas == 1 else [Replicate(), Shard(0)]
        sharded = distribute_tensor(weight, mesh(replicas), placements).requires_grad_()
        got = gradients(sharded)
        assert got[1].placements == sharded.placements and got[1].to_local().shape == sharded.to_local().shape
        # float32: the kernel's own error; sums of up to 200 float32 terms in another order
        close = CLOSE if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(whole(g), e, **close)
            same(whole(g))
        with torch.no_grad():
            torch.testing.assert_close(mk.moduli_penalty(sharded, *points, mask=mask, **settings), expected[0], **close)
    return check


def own_rows_only():
    """No weight travels between ranks: a penalty and its backward exchange two small sums."""
    net = Net("rnn", 13)
    fully_shard(net.rnn, mesh=mesh())
    fully_shard(net, mesh=mesh())
    reg = regularizer(net.rnn)
    seen = []
    all_reduce = dist.all_reduce

    def counting(tensor, *args, **kwargs):
        seen.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        with CommDebugMode() as exchanged:
            reg().backward()
    finally:
        dist.all_reduce = all_reduce
    assert seen == [1, 13 * 2], seen
    assert exchanged.get_total_counts() == 2, exchanged.get_comm_counts()


def controls():
    """Shuffled and matched coefficients, and a slice of the columns."""
    def losses(net: nn.Module):
        reg = mk.regularize(net, [mk.Target(net, "w0", columns=slice(2, None))], manifold="torus", strength=3.0,
                            generator=torch.Generator().manual_seed(2))
        each = [reg, reg.matched(), reg.shuffled(torch.Generator().manual_seed(5))]
        found = []
        for r in each:
            net.w0.grad = None
            value = r()
            value.backward()
            found += [value.detach(), whole(net.w0.grad)]
        return found

    one, net = Weights(randn(7, 9)), Weights(randn(7, 9))
    expected = losses(one)
    fully_shard(net, mesh=mesh())
    for g, e in zip(losses(net), expected, strict=True):
        torch.testing.assert_close(g, e, **CLOSE)
    assert all(expected[i].abs().max() > 1e-3 for i in range(6))


# --- pruning ------------------------------------------------------------------------------------------------

def tied_weights() -> list[Tensor]:
    """Few different values, zeros of both signs, infinity; a vector, an empty matrix; 0 to 5 rows a rank."""
    shapes = [(13, 4), (2, 9), (5,), (0, 3), (7, 7)]
    coarse = [(randn(*shape, seed=i) * 2).round() / 2 for i, shape in enumerate(shapes)]
    coarse[0][0, 0] = torch.inf
    coarse[4][3] *= -1
    coarse[4][2] *= 0
    return coarse


def selection(dtypes: tuple[torch.dtype, ...]):
    def check():
        tensors = [t.to(dtypes[i % len(dtypes)]) for i, t in enumerate(tied_weights())]
        one, net = Weights(*copy.deepcopy(tensors)), Weights(*copy.deepcopy(tensors))
        fully_shard(net, mesh=mesh())
        pruners = mk.MagnitudePruner(one.targets()), mk.MagnitudePruner(net.targets())
        total = sum(t.numel() for t in tensors)
        for count in (1, 17, 18, 60, 61, 90, total - 1, total):
            for pruner in pruners:
                pruner.step_to(count / total)
            for (key, expected), (_, mask) in zip(pruners[0].masks.items(), pruners[1].masks.items(), strict=True):
                assert torch.equal(mask, expected), (count, key)
            for (_, p), (_, q) in zip(one.named_parameters(), net.named_parameters(), strict=True):
                assert torch.equal(p, whole(q))
            assert pruners[1].sparsity == count / total
    return check


def selection_at_random():
    """Weights without ties, down to the last bit; many targets' worth of thresholds."""
    for dtype in (torch.float32, torch.float64):
        tensors = [randn(16, 7, seed=5).to(dtype), 1e-3 * randn(3, 50, seed=6).to(dtype)]
        one, net = Weights(*copy.deepcopy(tensors)), Weights(*copy.deepcopy(tensors))
        fully_shard(net, mesh=mesh())
        pruners = mk.MagnitudePruner(one.targets()), mk.MagnitudePruner(net.targets())
        for sparsity in (0.1, 0.33, 0.5, 0.7, 0.95):
            for pruner in pruners:
                pruner.step_to(sparsity)
            masks, expected = pruners[1].state_dict(), pruners[0].state_dict()
            assert all(torch.equal(masks[key], expected[key]) for key in expected)


def pruning_exchanges_counts():
    """Per call of step_to: histograms and counts, and one byte an entry for the masks; no weights."""
    net = Weights(randn(13, 13).float())
    fully_shard(net, mesh=mesh())
    pruner = mk.MagnitudePruner(net.targets())
    with CommDebugMode() as exchanged:
        pruner.step_to(0.5)
    assert exchanged.get_total_counts() == 6, exchanged.get_comm_counts()  # NaN, 3 histograms, ties, masks
    with CommDebugMode() as exchanged:
        assert pruner.sparsity and pruner.densities() and pruner.state_dict()
    assert exchanged.get_total_counts() == 0, exchanged.get_comm_counts()


def nan_on_one_rank():
    net = Weights(randn(7, 7))
    fully_shard(net, mesh=mesh())
    pruner = mk.MagnitudePruner(net.targets())
    if dist.get_rank() == 2:
        with torch.no_grad():
            net.w0.to_local()[0, 3] = torch.nan
    raises(ValueError, "got NaN in 0.w0", lambda: pruner.step_to(0.5))
    assert pruner.sparsity == 0


# --- errors ------------------------------------------------------------------------------------------------

def errors():
    points = mk.manifold("torus").sample(6, dtype=torch.float64)
    by_columns = distribute_tensor(randn(6, 6), mesh(), [Shard(1)])
    raises(NotImplementedError, "sharded along dimension 0",
           lambda: mk.moduli_penalty(by_columns, points, manifold="torus"))
    weight = distribute_tensor(randn(6, 6), mesh(), [Shard(0)])
    raises(NotImplementedError, "must be a plain tensor",
           lambda: mk.accumulate_penalty_grad_(weight, points, manifold="torus"))
    raises(NotImplementedError, "must be a plain tensor",
           lambda: mk.proximal_step_(weight, points, manifold="torus", step=0.1))
    raises(ValueError, "weight must have shape", lambda: mk.moduli_penalty(weight, points[:5], manifold="torus"))
    embedding = mk.ManifoldEmbedding(6, trainable=True, dtype=torch.float64)
    fully_shard(embedding, mesh=mesh())
    for each in (weight, randn(6, 6)):
        raises(NotImplementedError, "rows must be whole",
               lambda each=each: mk.moduli_penalty(each, embedding.points, manifold="torus"))
    net, plain = Weights(randn(7, 7)), Weights(randn(7, 7))
    fully_shard(net, mesh=mesh())
    raises(NotImplementedError, "none of them", lambda: mk.MagnitudePruner([*net.targets(), *plain.targets()]))
    order = {(net, "w0"): (torch.arange(7), torch.arange(7))}
    raises(NotImplementedError, "block must be None",
           lambda: mk.MagnitudePruner(net.targets(), block=(2, 2), order=order))
    columns = Weights()
    columns.register_parameter("w0", nn.Parameter(by_columns))
    raises(NotImplementedError, "0.w0 must be sharded along", lambda: mk.MagnitudePruner(columns.targets()))
    assert not net._buffers and not plain._buffers and not columns._buffers, "a refused pruner left masks"
    pruner = mk.MagnitudePruner(net.targets())
    raises(NotImplementedError, "torch.nn.utils.prune", pruner.to_torch_prune)


CHECKS = {
    **{f"penalty_{case}": penalty(case) for case in PENALTIES},
    "penalty_float32": penalty("square_13", torch.float32),
    "penalty_masked": penalty("lstm_7", masked=True),
    "penalty_replicated": penalty("square_13", replicas=3),  # HSDP: each rank has all rows
    "own_rows_only": own_rows_only,
    "controls": controls,
    "selection_float32": selection((torch.float32,)),
    "selection_mixed": selection((torch.float64, torch.float32)),
    "selection_16_bit": selection((torch.bfloat16, torch.float16)),
    "selection_at_random": selection_at_random,
    "pruning_exchanges_counts": pruning_exchanges_counts,
    "nan_on_one_rank": nan_on_one_rank,
    "errors": errors,
}
