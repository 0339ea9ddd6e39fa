"""Callbacks that average weights beside ModuliCallback, in either order: averages have the current masks."""
from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import moduli_kernels as mk

pytest.importorskip("lightning.pytorch")

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging

averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging", reason="needs Lightning 2.6")

from moduli_kernels.lightning import ModuliCallback
from tests.support.lightning_runs import (
    QUIET,
    SETTINGS,
    Model,
    assert_same,
    fit,
    loader,
    points_of,
    tensors,
    trainer_of,
)

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
              pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback, but loading"),
              pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model"),
              pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")]
SCHEDULE = [0.2, 0.4, 0.6]
LAST = round(0.6 * 64) / 64


class Norm(Model):
    """Has other buffers before and behind the masks, which averages take in the order of buffers."""

    def __init__(self, rnn=nn.RNN, **settings):
        super().__init__(rnn, **settings)
        torch.manual_seed(1)
        self.decoder = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.validated = []

    def validation_step(self, batch, index):
        loss = super().validation_step(batch, index)
        self.validated.append((self.rnn.weight_hh_l0.clone(), mask_of(self).clone()))
        return loss


class NormSparse(Norm):
    def __init__(self):
        super().__init__(mk.SparseRNN)


def mask_of(model: nn.Module) -> torch.Tensor:
    mask = getattr(model.rnn, "weight_hh_l0_mask", None)
    return torch.ones(8, 8, dtype=torch.bool) if mask is None else mask


class Late(Norm):
    def __init__(self):
        super().__init__()
        del self.rnn

    def configure_model(self):
        if not hasattr(self, "rnn"):
            torch.manual_seed(0)
            self.rnn = nn.RNN(3, 8, batch_first=True)


class Own(Callback):
    """A user's own: an AveragedModel of the module as it is when training starts, validated nowhere."""

    def on_fit_start(self, trainer, pl_module):
        self.average = AveragedModel(pl_module, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.average.update_parameters(pl_module)


AVERAGES = {
    "swa": lambda: averaging.WeightAveraging(),
    "ema": lambda: averaging.EMAWeightAveraging(decay=0.5),
    "ema_without_buffers": lambda: averaging.EMAWeightAveraging(decay=0.5, use_buffers=False),
    "never": lambda: averaging.EMAWeightAveraging(decay=0.5, update_starting_at_step=10**6),
}


def in_order(callback: Callback, other: Callback, first: bool) -> list[Callback]:
    return [callback, other] if first else [other, callback]


def average_of(callback: Callback) -> nn.Module:
    return next(value for value in vars(callback).values() if isinstance(value, AveragedModel)).module


def assert_masked(model: nn.Module, mask: torch.Tensor) -> None:
    assert torch.equal(model.rnn.weight_hh_l0_mask, mask)
    assert model.rnn.weight_hh_l0[~mask].eq(0).all() and model.rnn.weight_hh_l0[mask].ne(0).all()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("kind", "model"), [*((kind, Norm) for kind in AVERAGES), ("ema", NormSparse), ("ema", Late)])
def test_averages_have_the_current_masks(kind, model, first):
    net, callback, other = model(), ModuliCallback(schedule=SCHEDULE, **SETTINGS), AVERAGES[kind]()
    trainer = fit(net, in_order(callback, other, first), validate=True)
    assert callback.pruner.sparsity == LAST == trainer.callback_metrics["moduli/sparsity"]
    mask = callback.pruner.masks["rnn.weight_hh_l0"]
    assert_masked(net, mask)
    assert_masked(average_of(other), mask)
    sparsities = [1 - mask.float().mean().item() for _, mask in net.validated]
    assert sparsities == pytest.approx([0.0] * 2 + [round(s * 64) / 64 for s in SCHEDULE for _ in range(4)])
    for weight, mask in net.validated:
        assert weight[~mask].eq(0).all() and weight[mask].ne(0).all()
    assert all(buffer.isfinite().all() for buffer in net.buffers()) and net.decoder[0].running_var.gt(0).all()


@pytest.mark.parametrize("first", [True, False])
def test_an_average_is_that_of_the_masked_weights(first):
    class Watching(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.seen.append(pl_module.rnn.weight_hh_l0.detach().clone())

    net, callback, watching = Norm(), ModuliCallback(schedule=[0.5], **SETTINGS), Watching()
    fit(net, [watching, *in_order(callback, averaging.WeightAveraging(), first)])
    torch.testing.assert_close(net.rnn.weight_hh_l0.detach(), torch.stack(watching.seen).mean(0))


@pytest.mark.parametrize(("model", "first"), [(Norm, True), (Norm, False), (Model, True)])
def test_stochastic_weight_averaging_leaves_masked_weights(model, first):
    net, callback = model(), ModuliCallback(schedule=[0.2, 0.4, 0.6, 0.6], **SETTINGS)
    other = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)
    trainer = fit(net, in_order(callback, other, first), epochs=4, validate=True)
    assert_masked(net, callback.pruner.masks["rnn.weight_hh_l0"])
    assert callback.pruner.sparsity == LAST == trainer.callback_metrics["moduli/sparsity"]


@pytest.mark.parametrize("first", [True, False])
def test_an_average_of_the_users_own(first):
    net, callback, own = Norm(), ModuliCallback(schedule=SCHEDULE, **SETTINGS), Own()
    fit(net, in_order(callback, own, first))
    assert_masked(average_of(own), callback.pruner.masks["rnn.weight_hh_l0"])
    assert average_of(own).rnn.weight_hh_l0.ne(net.rnn.weight_hh_l0).any()


@pytest.mark.parametrize(("model", "first"), [(Norm, True), (Norm, False), (NormSparse, True)])
def test_checkpoints_beside_an_average_load(model, first, tmp_path):
    def callbacks(seed: int) -> list[Callback]:
        return in_order(ModuliCallback(schedule=SCHEDULE, generator=points_of(seed), **SETTINGS),
                        averaging.EMAWeightAveraging(decay=0.5), first)

    whole, resumed, tested = model(), model(), model()
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(whole, [*callbacks(5), saving], enable_checkpointing=True)
    again = ModelCheckpoint(tmp_path, save_top_k=-1, filename="again-{epoch}")
    loaded = model.load_from_checkpoint(tmp_path / "epoch=1.ckpt")
    assert loaded.rnn.weight_hh_l0.eq(0).sum() == round(0.4 * 64)
    fit(resumed, [*callbacks(77), again], enable_checkpointing=True, resume=tmp_path / "epoch=1.ckpt")
    assert_same(resumed, whole)
    trainer_of([*callbacks(77), saving], enable_checkpointing=True).test(
        tested, loader(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert torch.equal(tested.rnn.weight_hh_l0, loaded.rnn.weight_hh_l0)


@pytest.mark.parametrize(("with_average", "first"), [(True, True), (True, False), (False, True)])
def test_a_dense_run_goes_on_with_an_average(with_average, first, tmp_path):
    dense = [averaging.EMAWeightAveraging(decay=0.5)] if with_average else []
    fit(Norm(), dense, epochs=1).save_checkpoint(tmp_path / "dense.ckpt")
    net, callback = Norm(), ModuliCallback(schedule=SCHEDULE, **SETTINGS)
    other = averaging.EMAWeightAveraging(decay=0.5)
    with nullcontext() if with_average else pytest.warns(UserWarning, match="not created with WeightAveraging"):
        fit(net, in_order(callback, other, first), resume=tmp_path / "dense.ckpt")
    assert_masked(net, callback.pruner.masks["rnn.weight_hh_l0"])
    assert_masked(average_of(other), callback.pruner.masks["rnn.weight_hh_l0"])


@pytest.mark.parametrize("first", [True, False])
def test_a_second_fit_and_folds_beside_an_average(first, tmp_path):
    callback, other = ModuliCallback(schedule=[0.6], **SETTINGS), averaging.EMAWeightAveraging(decay=0.5)
    for net in (Norm(), Norm()):
        trainer = fit(net, in_order(callback, other, first), validate=True)
        assert_masked(net, callback.pruner.masks["rnn.weight_hh_l0"])
        assert_masked(average_of(other), callback.pruner.masks["rnn.weight_hh_l0"])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = averaging.EMAWeightAveraging(decay=0.5)
    fit(net, in_order(callback, other, first), epochs=5, resume=tmp_path / "last.ckpt", validate=True)
    assert_masked(net, callback.pruner.masks["rnn.weight_hh_l0"])
    assert_masked(average_of(other), callback.pruner.masks["rnn.weight_hh_l0"])
    assert not any(name.endswith("_mask") for name in average_of(other).state_dict())
    assert any(name.endswith("_mask") for name in tensors(net))
