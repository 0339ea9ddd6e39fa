"""ModuliCallback beside Lightning's tuners, which save the module, run a trial without the callback, and restore it."""
from __future__ import annotations

import pytest
import torch

pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder
from lightning.pytorch.tuner import Tuner

from moduli_kernels.lightning import ModuliCallback
from tests.support.lightning_runs import QUIET, SETTINGS, Model, fit, loader, trainer_of

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:You called `self.log.*no logger"),
              pytest.mark.filterwarnings("ignore:The number of training batches"),
              pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")]


class Tuned(Model):
    """Has a learning rate to find."""

    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.lr = lr

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def assert_pruned(model: Model, callback: ModuliCallback) -> None:
    mask = callback.pruner.masks["rnn.weight_hh_l0"]
    assert model.rnn.weight_hh_l0_mask is mask and (~mask).sum() == 32
    assert model.rnn.weight_hh_l0[~mask].eq(0).all() and not model._load_state_dict_pre_hooks


def test_the_learning_rate_is_found_within_a_fit(tmp_path):
    model, callback = Tuned(), ModuliCallback(schedule=[0.5], **SETTINGS)
    finder = LearningRateFinder(num_training_steps=6, early_stop_threshold=None)
    fit(model, [callback, finder], default_root_dir=tmp_path)
    assert_pruned(model, callback)


def test_the_learning_rate_is_found_before_a_fit(tmp_path):
    model, callback = Tuned(), ModuliCallback(schedule=[0.5], **SETTINGS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = trainer_of([callback], max_epochs=2, default_root_dir=tmp_path)
    Tuner(trainer).lr_find(model, loader(), num_training=6, early_stop_threshold=None)
    assert not model._load_state_dict_pre_hooks and callback.pruner is None
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    trainer.fit(model, loader())
    assert_pruned(model, callback)


def test_what_it_logs_can_be_monitored():
    model, callback = Model(), ModuliCallback(schedule=[0.5], **SETTINGS)
    fit(model, [EarlyStopping("moduli/penalty", patience=5, check_on_train_epoch_end=True), callback])
    assert_pruned(model, callback)
