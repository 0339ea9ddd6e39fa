"""Checkpoints of a Trainer with ModuliCallback: a plain module loads them, runs go on from them and from dense ones."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import moduli_kernels as mk

pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import ModelCheckpoint

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

pytestmark = QUIET
SCHEDULE = [0.2, 0.4, 0.6]


def pruning(**settings) -> ModuliCallback:
    return ModuliCallback(schedule=SCHEDULE, generator=points_of(), **SETTINGS | settings)


def assert_held(model: nn.Module, sparsity: float) -> None:
    mask = model.rnn.weight_hh_l0_mask
    assert (~mask).sum() == round(sparsity * mask.numel())
    assert model.rnn.weight_hh_l0[~mask].eq(0).all() and model.rnn.weight_hh_l0[mask].ne(0).all()


class Gru(Model):
    """With two layers of a GRU, both directions, and a decoder that is pruned as well."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.decoder = nn.GRU(3, 8, 2, batch_first=True, bidirectional=True), nn.Linear(16, 2)


class Sparse(Model):
    def __init__(self):
        super().__init__(mk.SparseRNN)


# --- load_from_checkpoint -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("model", [Model, Gru, Sparse])
def test_load_from_checkpoint_of_a_pruned_module(model, weights_only, tmp_path):
    trained = model()
    trainer = fit(trained, pruning())
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=weights_only)
    loaded = model.load_from_checkpoint(tmp_path / "last.ckpt")
    for name, parameter in trained.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert bool([*loaded.buffers()]) == (model is Sparse)  # which loads its masks
    assert torch.equal(loaded(torch.ones(2, 4, 3)), trained(torch.ones(2, 4, 3)))


@pytest.mark.parametrize("weights_only", [False, True])
def test_load_from_what_model_checkpoint_has_saved(weights_only, tmp_path):
    saving = ModelCheckpoint(tmp_path, save_weights_only=weights_only, save_top_k=-1)
    fit(Model(), [saving, pruning()], enable_checkpointing=True)
    for epoch, path in enumerate(sorted(tmp_path.glob("*.ckpt"))):
        loaded = Model.load_from_checkpoint(path)
        assert loaded.rnn.weight_hh_l0.eq(0).sum() == round(SCHEDULE[epoch] * 64)


def test_a_state_dict_after_training_loads_into_a_plain_module():
    trained, plain = Gru(), Gru()
    fit(trained, pruning(pruned=["rnn.weight_hh_l1_reverse", "decoder.weight"]))
    plain.load_state_dict(trained.state_dict())
    assert plain.decoder.weight.eq(0).any() and torch.equal(plain.decoder.weight, trained.decoder.weight)


def test_masks_that_the_module_makes_itself_stay_in_its_state_dict(tmp_path):
    class Masked(Model):
        def __init__(self):
            super().__init__()
            mk.MagnitudePruner(self).step_to(0.1)

    trained = Masked()
    fit(trained, pruning()).save_checkpoint(tmp_path / "last.ckpt")
    loaded = Masked.load_from_checkpoint(tmp_path / "last.ckpt")
    assert_same(loaded, trained)
    assert_held(loaded, 0.6)


def test_masks_after_load_from_checkpoint_are_in_the_callbacks_state(tmp_path):
    trained, callback = Model(), pruning()
    fit(trained, callback).save_checkpoint(tmp_path / "last.ckpt")
    loaded = Model.load_from_checkpoint(tmp_path / "last.ckpt")
    masks = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]["masks"]
    pruner = mk.MagnitudePruner(loaded)
    pruner.load_state_dict(masks)
    assert_held(loaded, 0.6)


# --- runs that go on ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model", [Model, Gru, Sparse])
def test_a_dense_run_goes_on_with_the_callback(model, tmp_path):
    dense = model()
    fit(dense, None, epochs=1).save_checkpoint(tmp_path / "dense.ckpt")
    seen = {}

    class Looking(ModuliCallback):
        def on_train_start(self, trainer, pl_module):
            seen.update(copy.deepcopy(tensors(pl_module)))

    resumed = model()
    callback = Looking(schedule=[0.0, 0.0, 0.6], **SETTINGS)
    fit(resumed, callback, resume=tmp_path / "dense.ckpt")
    for name, tensor in seen.items():
        assert tensor.all() if name.endswith("_mask") else torch.equal(tensor, dense.get_parameter(name)), name
    assert any(name.endswith("_mask") for name in seen) and callback.pruner.sparsity == pytest.approx(0.6, abs=0.01)


def test_a_pruned_run_goes_on_without_the_callback_and_its_zeros(tmp_path):
    """Lightning itself says that the callback is missing."""
    fit(Model(), pruning()).save_checkpoint(tmp_path / "last.ckpt")
    model = Model()
    with pytest.warns(UserWarning, match="ModuliCallback"):
        fit(model, None, epochs=4, resume=tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match="ModuliCallback"):
        trainer_of([]).test(tested := Model(), loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert tested.rnn.weight_hh_l0.eq(0).sum() == round(0.6 * 64) and not [*tested.buffers()]


def test_a_pruned_run_goes_on_without_a_schedule_and_keeps_its_masks(tmp_path):
    fit(Gru(), pruning(pruned=["rnn.weight_hh_l1", "decoder.weight"])).save_checkpoint(tmp_path / "last.ckpt")
    model, callback = Gru(), ModuliCallback(**SETTINGS)
    trainer = fit(model, callback, epochs=5, resume=tmp_path / "last.ckpt")
    assert callback.pruner.sparsity == round(0.6 * 224) / 224 == trainer.callback_metrics["moduli/sparsity"]
    assert [*callback.pruner.masks] == ["rnn.weight_hh_l1", "decoder.weight"]


@pytest.mark.parametrize("model", [Model, Sparse])
def test_an_earlier_checkpoint_is_loaded_whole_into_the_trained_module(model, tmp_path):
    """The masks of the last epoch would zero weights that the first still has."""
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    trained, callback = model(), pruning()
    trainer = fit(trained, [callback, saving], enable_checkpointing=True)
    assert_held(trained, 0.6)
    trainer.test(trained, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert_held(trained, 0.2)
    first = model.load_from_checkpoint(tmp_path / "epoch=0.ckpt")
    assert torch.equal(trained.rnn.weight_hh_l0, first.rnn.weight_hh_l0)
    again = model()
    with pytest.warns(UserWarning, match="Please add the following callbacks: .*ModelCheckpoint"):
        fit(again, pruning(), resume=tmp_path / "epoch=0.ckpt")
        fit(trained, callback, resume=tmp_path / "epoch=0.ckpt")
    assert_same(trained, again)


@pytest.mark.parametrize("model", [Model, Sparse])
def test_weights_alone_loaded_into_the_trained_module_keep_their_zeros_masked(model, tmp_path):
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", save_weights_only=True)
    trained = model()
    trainer = fit(trained, [pruning(), saving], enable_checkpointing=True)
    trainer.test(trained, loader(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert_held(trained, 0.4)


@pytest.mark.parametrize("model", [Model, Sparse])
def test_a_dense_checkpoint_loaded_into_the_trained_module(model, tmp_path):
    dense = model()
    fit(dense, None, epochs=1).save_checkpoint(tmp_path / "dense.ckpt")
    trained, callback = model(), pruning()
    fit(trained, callback)
    trainer_of([callback]).test(trained, loader(), ckpt_path=tmp_path / "dense.ckpt", verbose=False)
    assert torch.equal(trained.rnn.weight_hh_l0, dense.rnn.weight_hh_l0) and trained.rnn.weight_hh_l0_mask.all()


@pytest.mark.parametrize("fresh", [True, False])
def test_a_checkpoint_with_masks_in_its_state_dict_still_loads(fresh, tmp_path):
    """As they were saved before masks were left out, without masks in the callback's state."""
    trained, callback = Model(), pruning()
    trainer = fit(trained, callback, epochs=2)
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=False)
    masks = checkpoint["callbacks"][callback.state_key].pop("masks")
    checkpoint["state_dict"]["rnn.weight_hh_l0_mask"] = masks["rnn.weight_hh_l0"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    models = [Model() if fresh else copy.deepcopy(trained) for _ in range(2)]
    for model, name in zip(models, ("new", "old")):
        fit(model, pruning(), resume=tmp_path / f"{name}.ckpt")
        assert_held(model, 0.6)
    assert_same(*models)


def test_loading_by_hand_after_training_holds_the_masks_and_says_so():
    trained, dense = Model(), Model().state_dict()
    fit(trained, pruning())
    with pytest.warns(UserWarning, match="weight_hh_l0 of RNN: 38 weights of the state_dict .* are masked here"):
        trained.load_state_dict(dense)
    assert_held(trained, 0.6)


def test_a_failed_fit_leaves_nothing_behind(tmp_path):
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0", "callbacks": {}, "loops": {}},
               tmp_path / "empty.ckpt")
    model = Model()
    with pytest.raises(RuntimeError, match="Missing key"):
        fit(model, pruning(), resume=tmp_path / "empty.ckpt")
    assert not model._load_state_dict_pre_hooks and not [*model.buffers()]
    fit(model, pruning())
    assert not model._load_state_dict_pre_hooks
    assert_held(model, 0.6)
