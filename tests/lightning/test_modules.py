"""ModuliCallback fits each LightningModule that a Trainer is given: another one, and one that makes layers late."""
from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import moduli_kernels as mk

pytest.importorskip("lightning.pytorch")

from lightning.pytorch import LightningModule

from moduli_kernels.lightning import ModuliCallback
from tests.support.lightning_runs import (
    QUIET,
    SETTINGS,
    Model,
    assert_same,
    by_hand,
    fit,
    loader,
    points_of,
    trainer_of,
)

pytestmark = QUIET

SCHEDULE = [0.0, 0.3, 0.6]


def assert_pruned(model: nn.Module, sparsity: float = round(0.6 * 64) / 64) -> None:
    mask = model.rnn.weight_hh_l0_mask
    assert (~mask).float().mean() == pytest.approx(sparsity)
    assert model.rnn.weight_hh_l0[~mask].eq(0).all() and model.rnn.weight_hh_l0[mask].ne(0).all()


# --- another module ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("targets", [None, ["rnn.weight_hh_l0"]])
def test_one_callback_serves_the_folds_of_a_cross_validation(targets):
    callback = ModuliCallback(schedule=SCHEDULE, targets=iter(targets) if targets else None, **SETTINGS)
    models, regularizations = [Model() for _ in range(3)], []
    for model in models:
        fit(model, callback)
        assert_pruned(model)
        regularizations.append(callback.regularization)
        assert [t.module for t in callback.regularization.targets.values()] == [model.rnn]
        assert callback.pruner.masks["rnn.weight_hh_l0"] is model.rnn.weight_hh_l0_mask
    assert len(set(map(id, regularizations))) == 3
    with pytest.raises(ValueError, match="pruned weights never come back"):  # its schedule would start anew
        fit(models[-1], callback)


def test_each_fold_is_trained_as_with_a_callback_of_its_own():
    one = ModuliCallback(schedule=[0.5], manifold="circle", strength=0.3, generator=points_of())
    folds, alone = [Model(), Model()], [Model(), Model()]
    generator = points_of()
    for model, other in zip(folds, alone):
        fit(model, one)
        by_hand(other, mk.regularize(other, manifold="circle", strength=0.3, generator=generator), [0.5] * 3)
        assert_same(model, other)


def test_a_second_fit_of_one_module_goes_on_with_its_masks_and_points():
    model, callback = Model(), ModuliCallback(schedule=SCHEDULE, **SETTINGS)
    fit(model, callback)
    reg, pruner = callback.regularization, callback.pruner
    before = model.rnn.weight_hh_l0_mask.clone()
    trainer_of([callback]).validate(model, loader(), verbose=False)
    fit(model, ModuliCallback(**SETTINGS), epochs=1)  # one without a schedule, which could not go back to 0
    assert callback.regularization is reg and callback.pruner is pruner
    assert torch.equal(model.rnn.weight_hh_l0_mask, before)


FOREIGN = {
    "regularization": lambda other: ModuliCallback(mk.regularize(other, **SETTINGS)),
    "targets": lambda other: ModuliCallback(targets=[(other.rnn, "weight_hh_l0")], **SETTINGS),
    "pruned": lambda other: ModuliCallback(pruned=[(other.decoder, "weight")], schedule=[0.5], **SETTINGS),
}


@pytest.mark.parametrize("argument", FOREIGN)
def test_what_belongs_to_another_module_is_refused_with_advice(argument):
    other, model = Model(), Model()
    callback = FOREIGN[argument](other)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    words = f"{argument} must be of the LightningModule that the Trainer is given, got weight"
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        fit(model, callback)
    assert "names and settings" in str(error.value)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_regularization_of_the_first_fold_is_refused_in_the_second():
    model = Model()
    callback = ModuliCallback(mk.regularize(model, **SETTINGS))
    fit(model, callback, epochs=1)
    with pytest.raises(ValueError, match="regularization must be of the LightningModule"):
        fit(Model(), callback, epochs=1)
    fit(model, callback, epochs=1)


def test_weights_outside_the_module_that_its_optimizer_has_are_penalized():
    class Outside(Model):
        def __init__(self):
            super().__init__()
            self.hidden = [nn.RNN(3, 5)]

        def configure_optimizers(self):
            return self.make([*self.parameters(), *self.hidden[0].parameters()])

    model = Outside()
    reg = mk.regularize(model.hidden[0], **SETTINGS)
    before = reg().item()
    fit(model, ModuliCallback(reg), epochs=1)
    assert reg() < before
    callback = ModuliCallback(targets=[(model.hidden[0], "weight_hh_l0")], **SETTINGS)
    fit(model, callback, epochs=1)
    made = callback.regularization
    fit(model, callback, epochs=1)
    assert callback.regularization is made


# --- layers that are made late ------------------------------------------------------------------------------------

class Late(LightningModule):
    """Makes its layers in `configure_model`, or at each `setup`."""

    make = staticmethod(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    forward, training_step, validation_step = Model.forward, Model.training_step, Model.validation_step
    test_step, predict_step, configure_optimizers = Model.test_step, Model.predict_step, Model.configure_optimizers

    def _make_layers(self):
        torch.manual_seed(0)
        self.rnn, self.decoder = nn.RNN(3, 8, batch_first=True), nn.Linear(8, 2)


class InConfigureModel(Late):
    def configure_model(self):
        if not hasattr(self, "rnn"):
            self._make_layers()


class InSetup(Late):
    def setup(self, stage):
        self._make_layers()


class Partly(Late):
    """Has a first recurrent layer in __init__, and a second from `setup` on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cell = nn.RNNCell(3, 4)

    def setup(self, stage):
        self._make_layers()


LATE = {"configure_model": InConfigureModel, "setup": InSetup, "setup_in_part": Partly}


@pytest.mark.parametrize("kind", LATE)
def test_layers_made_late_are_penalized_and_pruned(kind):
    model, other = LATE[kind](), Model()
    callback = ModuliCallback(schedule=SCHEDULE, targets=["rnn.weight_hh_l0"], generator=points_of(), **SETTINGS)
    fit(model, callback)
    by_hand(other, mk.regularize(other, generator=points_of(), **SETTINGS), SCHEDULE)
    assert_same(model, other)


@pytest.mark.parametrize("kind", LATE)
def test_the_search_finds_layers_made_late(kind):
    model, callback = LATE[kind](), ModuliCallback(schedule=[0.5], **SETTINGS)
    fit(model, callback, epochs=1)
    names = ["cell.weight_hh"] * (kind == "setup_in_part") + ["rnn.weight_hh_l0"]
    assert [*callback.regularization.targets] == [*callback.pruner.masks] == names


@pytest.mark.parametrize("kind", LATE)
def test_layers_made_late_are_resumed_and_tested_from_a_checkpoint(kind, tmp_path):
    schedule = [0.3, 0.3, 0.6]
    settings = {"schedule": schedule, "targets": ["rnn.weight_hh_l0"], **SETTINGS}
    whole, half = LATE[kind](), LATE[kind]()
    fit(whole, ModuliCallback(generator=points_of(), **settings))
    fit(half, ModuliCallback(generator=points_of(), **settings), epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    tested, callback = LATE[kind](), ModuliCallback(generator=points_of(77), **settings)
    trainer_of([callback]).test(tested, loader(), ckpt_path=tmp_path / "half.ckpt", verbose=False)
    assert torch.equal(tested.rnn.weight_hh_l0, half.rnn.weight_hh_l0)
    assert torch.equal(tested.rnn.weight_hh_l0_mask, half.rnn.weight_hh_l0_mask)
    resumed = LATE[kind]()
    fit(resumed, ModuliCallback(generator=points_of(77), **settings), resume=tmp_path / "half.ckpt")
    assert_same(resumed, whole)


def test_layers_that_setup_makes_anew_get_new_masks():
    """As in a fold that resets its module, or a test after training."""
    model, callback = InSetup(), ModuliCallback(schedule=SCHEDULE, **SETTINGS)
    fit(model, callback)
    trained = model.rnn
    fit(model, callback)
    assert model.rnn is not trained and callback.pruner.masks["rnn.weight_hh_l0"] is model.rnn.weight_hh_l0_mask
    assert_pruned(model)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_training_works_after_another_stage(stage):
    """That stage runs in inference mode, in which points and masks could not be trained with."""
    model, other = Model(), Model()
    callback = ModuliCallback(schedule=SCHEDULE, generator=points_of(), **SETTINGS)
    trainer = trainer_of([callback])
    getattr(trainer, stage)(model, loader(), **({} if stage == "predict" else {"verbose": False}))
    assert callback.regularization is not None and callback.pruner.sparsity == 0
    fit(model, callback)
    by_hand(other, mk.regularize(other, generator=points_of(), **SETTINGS), SCHEDULE)
    assert_same(model, other)


# --- names, and several optimizers ----------------------------------------------------------------------------------

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        gru, lstm = nn.GRU(3, 6, batch_first=True, bidirectional=True), nn.LSTM(12, 8, batch_first=True)
        self.layers = nn.ModuleList([gru, lstm])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)[0]
        return x, None


class Deep(Model):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.rnn = Encoder()


def test_names_are_those_of_named_parameters():
    model, callback = Deep(), ModuliCallback(schedule=[0.5], scope="each", **SETTINGS)
    trainer = fit(model, callback, epochs=1)
    names = ["rnn.layers.0.weight_hh_l0", "rnn.layers.0.weight_hh_l0_reverse", "rnn.layers.1.weight_hh_l0"]
    assert [*callback.pruner.masks] == [*callback.regularization.losses()] == names
    assert set(names) < dict(model.named_parameters()).keys()
    densities = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("moduli/density/")}
    assert densities == {f"moduli/density/{name}": 0.5 for name in names}


def test_an_order_by_name_and_blocks():
    order = torch.arange(8).flip(0)
    callback = ModuliCallback(schedule=[0.5], block=(2, 2), order={"rnn.weight_hh_l0": (order, order)}, **SETTINGS)
    fit(Model(), callback, epochs=1)
    blocks = callback.pruner.masks["rnn.weight_hh_l0"][order][:, order].unflatten(0, (4, 2)).unflatten(2, (4, 2))
    assert torch.equal(blocks.all(3).all(1), blocks.any(3).any(1)) and callback.pruner.sparsity == 0.5


class Two(Deep):
    """Trains with two optimizers by hand, as a GAN does, one of which is stepped every second time."""

    automatic_optimization = False

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        self.manual_backward(loss, retain_graph=True)
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        if index % 2:
            second.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            second.step()

    def configure_optimizers(self):
        return [self.make([*self.rnn.layers[0].parameters()]),
                torch.optim.AdamW([*self.rnn.layers[1].parameters(), *self.decoder.parameters()], weight_decay=0.1)]


def test_masks_hold_with_several_optimizers_optimized_by_hand():
    model, callback = Two(), ModuliCallback(schedule=SCHEDULE, scope="each", **SETTINGS)
    trainer = fit(model, callback)
    assert trainer.callback_metrics["moduli/sparsity"] == pytest.approx(0.6, abs=0.01)
    for name, mask in callback.pruner.masks.items():
        weight = model.get_parameter(name)
        assert weight[~mask].eq(0).all() and weight[mask].ne(0).all() and not mask.all()


def test_frozen_weights_can_be_pruned():
    """No optimizer has them."""
    model = Model(optimizer=lambda p: torch.optim.SGD([q for q in p if q.requires_grad], lr=0.1))
    model.rnn.requires_grad_(False)
    before = model.rnn.weight_hh_l0.clone()
    fit(model, ModuliCallback(schedule=[0.5], **SETTINGS), epochs=1)
    assert torch.equal(model.rnn.weight_hh_l0, before * model.rnn.weight_hh_l0_mask)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
def test_a_compiled_module_is_penalized_and_pruned():
    model, callback = Model(), ModuliCallback(schedule=SCHEDULE, **SETTINGS)
    model.decoder = torch.compile(model.decoder, backend="eager")
    fit(model, callback)
    assert_pruned(model)
