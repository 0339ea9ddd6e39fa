"""Compares ModuliCallback in a Lightning Trainer with plain loops.

The gradients are those of loss + penalty, whatever the Trainer does to them; pruning follows the schedule; logs and
checkpoints are complete.
"""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import moduli_kernels as mk

pytest.importorskip("lightning.pytorch")

from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy

from moduli_kernels.lightning import ModuliCallback
from tests.support.lightning_runs import (
    EPOCHS,
    QUIET,
    SETTINGS,
    Model,
    assert_same,
    batches,
    by_hand,
    fit,
    points_of,
    tensors,
)

pytestmark = QUIET


class Manual(Model):
    """Optimizes manually, with one optimizer for the RNN and one for the decoder."""

    automatic_optimization = False

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return self.make([*self.rnn.parameters()]), self.make([*self.decoder.parameters()])


class Skipping(Model):
    """Leaves out every second batch."""

    def training_step(self, batch, index):
        return None if index % 2 else super().training_step(batch, index)


CASES = {
    "plain": ({}, {}),
    "accumulated": ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
    "clipped": ({"gradient_clip_val": 0.05}, {"clip": 0.05}),
    "accumulated_clipped": ({"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
                            {"accumulate": 2, "clip": 0.05}),
}


@pytest.mark.parametrize("rnn", [nn.RNN, mk.SparseRNN])
@pytest.mark.parametrize("case", CASES)
def test_parameters_are_those_of_a_loop_with_the_penalty_in_the_loss(case, rnn):
    trainer_settings, loop_settings = CASES[case]
    model, other, schedule = Model(rnn), Model(rnn), mk.linear_schedule(0.5, EPOCHS)
    callback = ModuliCallback(schedule=schedule, generator=points_of(), **SETTINGS)
    fit(model, callback, **trainer_settings)
    by_hand(other, mk.regularize(other, generator=points_of(), **SETTINGS), schedule, **loop_settings)
    assert_same(model, other)
    assert callback.pruner.sparsity == 0.5 and model.rnn.weight_hh_l0[~model.rnn.weight_hh_l0_mask].eq(0).all()


def test_without_a_schedule_nothing_is_pruned_and_the_penalty_counts():
    model, other, bare = Model(), Model(), Model()
    callback = ModuliCallback(generator=points_of(), **SETTINGS)
    fit(model, callback)
    by_hand(other, mk.regularize(other, generator=points_of(), **SETTINGS))
    assert_same(model, other)
    fit(bare, None)
    assert callback.pruner is None and not [*model.buffers()]
    assert callback.regularization() < mk.regularize(bare, generator=points_of(), **SETTINGS)()


def test_a_step_that_is_left_out_adds_no_penalty():
    model, other = Skipping(optimizer=lambda p: torch.optim.SGD(p, lr=0.1)), Model(
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.warns(UserWarning, match="returned `None`"):
        fit(model, ModuliCallback(generator=points_of(), **SETTINGS))
    by_hand(other, mk.regularize(other, generator=points_of(), **SETTINGS), skip=lambda k: k % 2)
    assert_same(model, other)


def test_manual_optimization_with_two_optimizers():
    """The penalty is added once, to the optimizer that has the weights."""
    model, other, schedule = Manual(), Model(), mk.linear_schedule(0.5, EPOCHS)
    fit(model, ModuliCallback(schedule=schedule, generator=points_of(), **SETTINGS))
    by_hand(other, mk.regularize(other, generator=points_of(), **SETTINGS), schedule)
    assert_same(model, other)


def with_trained_points(model: Model) -> Model:
    model.reg = mk.regularize(model.rnn, trainable=True, generator=points_of(), **SETTINGS)
    return model


def test_trained_points():
    model, other = with_trained_points(Model()), with_trained_points(Model())
    before = [p.detach().clone() for p in model.reg.parameters()]
    fit(model, ModuliCallback(model.reg))
    by_hand(other, other.reg)
    assert_same(model, other)
    assert all((p - q).abs().max() > 1e-3 for p, q in zip(before, model.reg.parameters(), strict=True))


def test_weights_and_points_in_two_optimizers():
    """Each optimizer gets its gradient at its own step, the second at the weights that the first has moved."""
    class Split(Manual):
        def configure_optimizers(self):
            return self.make([*self.rnn.parameters(), *self.decoder.parameters()]), self.make([*self.reg.parameters()])

    model, other = with_trained_points(Split()), with_trained_points(Model())
    fit(model, ModuliCallback(model.reg))
    groups = [[*other.rnn.parameters(), *other.decoder.parameters()], [*other.reg.parameters()]]
    optimizers = [other.make(group) for group in groups]
    for batch in batches() * EPOCHS:
        other.zero_grad()
        Model.training_step(other, batch, 0).backward()
        for optimizer, group in zip(optimizers, groups):
            for parameter, gradient in zip(group, torch.autograd.grad(other.reg(), group, allow_unused=True)):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            optimizer.step()
    assert_same(model, other)


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale(fused):
    """GradScaler has unscaled the gradients before the penalty's is added, or a fused optimizer will afterwards."""
    def adam(p):
        return torch.optim.AdamW(p, lr=0.02, fused=fused)

    def precision(scale: float) -> MixedPrecision:
        return MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))

    models = [Model(mk.SparseRNN, optimizer=adam) for _ in range(2)]
    for model, scale in zip(models, (1.0, 1024.0)):
        callback = ModuliCallback(generator=points_of(), **SETTINGS | {"reduction": "sum", "strength": 1e-3})
        trainer = fit(model, callback, plugins=[precision(scale)])
        assert trainer.scaler.get_scale() == scale  # no step was skipped
    assert_same(*models, atol=2e-3)  # float16 rounds the loss's gradients differently at another scale
    bare = Model(mk.SparseRNN, optimizer=adam)
    fit(bare, None, plugins=[precision(1024.0)])
    assert not torch.allclose(bare.rnn.weight_hh_l0, models[1].rnn.weight_hh_l0, atol=2e-2)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions(precision):
    model = Model(mk.SparseRNN)
    callback = ModuliCallback(schedule=mk.linear_schedule(0.5, EPOCHS), generator=points_of(), **SETTINGS)
    before = mk.regularize(model, generator=points_of(), **SETTINGS)().item()
    trainer = fit(model, callback, precision=precision)
    assert trainer.callback_metrics["moduli/penalty"] < before and callback.pruner.sparsity == 0.5


def test_what_is_logged():
    model = Model()
    callback = ModuliCallback(schedule=[0.0, 0.25], targets=["rnn.weight_hh_l0"],
                              pruned=["rnn.weight_hh_l0", (model.decoder, "weight")], prefix="geometry", **SETTINGS)
    trainer = fit(model, callback, epochs=EPOCHS)  # more epochs than the schedule has
    got = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert got["geometry/sparsity"] == callback.pruner.sparsity == 20 / 80
    masks = {"rnn.weight_hh_l0": model.rnn.weight_hh_l0_mask, "decoder.weight": model.decoder.weight_mask}
    for name, mask in masks.items():
        assert got[f"geometry/density/{name}"] == pytest.approx(mask.float().mean().item())
    assert len(got) == 4 and 0 < got["geometry/penalty"] < 10
    assert [name for name, _ in callback.regularization.items()] == ["rnn.weight_hh_l0"]


@pytest.mark.parametrize("rnn", [nn.RNN, mk.SparseRNN])
def test_a_run_goes_on_from_a_checkpoint(rnn, tmp_path):
    """As in a new process, the points are others at first and the module has no masks."""
    schedule = [0.0, 0.3, 0.6]
    whole, half, rest = Model(rnn), Model(rnn), Model(rnn)
    one = ModuliCallback(schedule=schedule, generator=points_of(), **SETTINGS)
    fit(whole, one)
    trainer = fit(half, ModuliCallback(schedule=schedule, generator=points_of(), **SETTINGS), epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    other = ModuliCallback(schedule=schedule, generator=points_of(77), **SETTINGS)
    fit(rest, other, resume=str(tmp_path / "half.ckpt"))
    for name, tensor in tensors(whole).items():
        assert torch.equal(tensors(rest)[name], tensor), name
    assert other.pruner.sparsity == round(0.6 * 64) / 64
    for mine, its in zip(other.regularization.state_dict().values(), one.regularization.state_dict().values()):
        assert torch.equal(mine, its)


def test_the_state_can_come_before_setup_and_two_callbacks_keep_their_own():
    model, callback = Model(), ModuliCallback(generator=points_of(), **SETTINGS)
    assert callback.state_dict() == {}
    fit(model, callback, epochs=1)
    second = ModuliCallback(generator=points_of(77), prefix="second", **SETTINGS)
    assert (callback.state_key, second.state_key) == ("ModuliCallback[moduli]", "ModuliCallback[second]")
    second.load_state_dict(callback.state_dict())
    fit(model, second, epochs=1)
    (_, mine), (_, its) = *second.regularization.items(), *callback.regularization.items()
    assert torch.equal(mine.rows.points, its.rows.points)
    other = ModuliCallback(manifold="circle")
    other.load_state_dict(callback.state_dict())
    with pytest.raises(ValueError, match="manifold of the saved regularizer must equal this one's"):
        fit(Model(), other, epochs=1)


def test_every_process_takes_the_points_of_the_first():
    first = mk.regularize(Model(), generator=points_of(1), **SETTINGS).state_dict()

    class Second(SingleDeviceStrategy):
        def broadcast(self, obj, src=0):
            return first if isinstance(obj, dict) and obj.keys() == first.keys() else obj

    callback = ModuliCallback(generator=points_of(2), **SETTINGS)
    fit(Model(), callback, epochs=1, strategy=Second(device="cpu"))
    assert torch.equal(next(callback.regularization.buffers()), first["regularizers.rnn_weight_hh_l0.rows.points"])


TWO_PROCESSES = """
import os, warnings
warnings.simplefilter("ignore")
import torch
from torch import nn
from lightning.pytorch import Trainer
import moduli_kernels as mk
from moduli_kernels.lightning import ModuliCallback
from tests.support.lightning_runs import Model, batches, tensors

model = Model()
torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)))  # each process draws other points, and sees other data
for parameter in model.parameters():
    nn.init.normal_(parameter)
model.reg = mk.regularize(model.rnn, manifold="torus", strength=0.3, trainable=True)
trainer = Trainer(max_epochs=3, callbacks=[ModuliCallback(model.reg, schedule=[0.0, 0.3, 0.6])], logger=False,
                  enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, accelerator="cpu",
                  devices=2, strategy="ddp", use_distributed_sampler=False)
mine = batches()[trainer.global_rank::2]
trainer.fit(model, torch.utils.data.DataLoader(mine, batch_size=None))
states = [None, None]
torch.distributed.all_gather_object(states, tensors(model))
equal = [torch.equal(states[0][name], states[1][name]) for name in states[0]]
assert all(equal) and any(name.endswith("points") for name in states[0]), dict(zip(states[0], equal))
assert (~model.rnn.weight_hh_l0_mask).sum() == round(0.6 * 64)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_of_ddp_stay_equal(tmp_path):
    (script := tmp_path / "two.py").write_text(TWO_PROCESSES)
    here = Path(__file__).parents[1]
    paths = os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


REFUSED = {
    "settings": (lambda: ModuliCallback(mk.regularize(nn.RNN(3, 4)), strength=0.1, targets=["a"]), ValueError,
                 "regularization must come alone, since it has its settings, got strength, targets beside it"),
    "no_regularization": (lambda: ModuliCallback(nn.Linear(2, 2)), TypeError,
                          "regularization must be what mk.regularize returns, got a Linear"),
    "schedule": (lambda: ModuliCallback(schedule=[]), ValueError, "schedule must hold a sparsity for each epoch"),
    "fraction": (lambda: ModuliCallback(schedule=[90]), ValueError, "schedule must be in [0, 1], got 90"),
    "trainable": (lambda: fit(Model(), ModuliCallback(trainable=True)), ValueError,
                  "trainable points must be in an optimizer, got trainable=True in the callback"),
    "name": (lambda: fit(Model(), ModuliCallback(targets=["rrn.weight_hh_l0"])), ValueError,
             "targets must name weights of the LightningModule, got 'rrn.weight_hh_l0'"),
    "lbfgs": (lambda: fit(Model(optimizer=torch.optim.LBFGS), ModuliCallback()), NotImplementedError,
              "LBFGS reads the loss's value"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_refuses(case):
    call, error, words = REFUSED[case]
    with pytest.raises(error, match=re.escape(words)):
        call()


def test_sharded_weights_are_refused():
    callback, model = ModuliCallback(), Model()
    trainer = type("T", (), {"strategy": object.__new__(FSDPStrategy)})
    with pytest.raises(NotImplementedError, match=re.escape("needs whole weights in each process, got FSDPStrategy")):
        callback.setup(trainer, model, "fit")


def test_the_package_does_not_import_lightning_and_the_older_name_works():
    code = """
import sys, warnings
warnings.simplefilter("ignore")
import moduli_kernels
assert not any(name.partition(".")[0] in ("lightning", "pytorch_lightning") for name in sys.modules)
try:
    import pytorch_lightning
except ImportError:
    sys.exit(5)
from moduli_kernels.lightning import ModuliCallback
assert issubclass(ModuliCallback, pytorch_lightning.Callback)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode == 5:
        pytest.skip("pytorch_lightning is not installed")
    assert done.returncode == 0, done.stderr


def test_without_lightning_the_error_says_what_to_do():
    code = """
import sys
sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None
try:
    import moduli_kernels.lightning
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ("moduli_kernels.lightning needs Lightning, which is not installed; run pip install "
                                   "lightning.")
