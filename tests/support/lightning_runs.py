"""A LightningModule, its data and its Trainer, for the tests of ModuliCallback; it imports Lightning."""
from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

import moduli_kernels as mk
from tests.support.penalty_cases import generator

SETTINGS = {"manifold": "torus", "strength": 0.3}
EPOCHS, BATCHES = 3, 4

# Lightning's own warnings: of loaders without processes, of torch's pytrees, and of modules that are not validated.
QUIET = [pytest.mark.filterwarnings(f"ignore:{words}") for words in (
    "The '.*' does not have many workers", ".*isinstance.treespec, LeafSpec.*:FutureWarning",
    "You defined a `validation_step` but have no `val_dataloader`")]


class Model(LightningModule):
    """An RNN and a decoder: (batch, steps, 3) -> (batch, 2)."""

    def __init__(self, rnn: type[nn.RNN] = nn.RNN, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.decoder = rnn(3, 8, batch_first=True), nn.Linear(8, 2)
        self.make, self.reg = optimizer, None

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.rnn(x)[0][:, -1])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self):
        return self.make([*self.parameters()])


def batches() -> list[list[Tensor]]:
    g = generator(1, "cpu")
    return [[torch.randn(5, 6, 3, generator=g), torch.randn(5, 2, generator=g)] for _ in range(BATCHES)]


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(batches(), batch_size=None)


def trainer_of(callbacks: list[Callback], **settings) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu",
             "enable_checkpointing": False, "devices": 1}
    return Trainer(callbacks=callbacks, **quiet | settings)


def fit(model: Model, callback: Callback | list[Callback] | None, epochs: int = EPOCHS, resume: str | None = None,
        validate: bool = False, **settings) -> Trainer:
    callbacks = callback if isinstance(callback, list) else [] if callback is None else [callback]
    trainer = trainer_of(callbacks, max_epochs=epochs, **settings)
    trainer.fit(model, loader(), loader() if validate else None, ckpt_path=resume)
    return trainer


def by_hand(model: Model, reg: mk.Regularization, schedule: list[float] | None = None, accumulate: int = 1,
            clip: float | None = None, skip=lambda k: False) -> None:
    """Trains as `fit` does, in a plain loop with the penalty in the loss."""
    optimizer = model.make([*model.parameters()])
    pruner = mk.MagnitudePruner([(model.rnn, "weight_hh_l0")], optimizer=optimizer) if schedule else None
    for epoch in range(EPOCHS):
        if pruner is not None:
            pruner.step_to(schedule[epoch])
        optimizer.zero_grad()
        for k, batch in enumerate(batches()):
            if skip(k):
                continue
            (Model.training_step(model, batch, k) / accumulate).backward()
            if (k + 1) % accumulate == 0:
                reg().backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()


def points_of(seed: int = 5) -> torch.Generator:
    return generator(seed, "cpu")


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, with masks that the state_dict leaves out."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def assert_same(model: nn.Module, other: nn.Module, atol: float = 1e-6) -> None:
    mine, its = tensors(model), tensors(other)
    for name in its:
        assert torch.allclose(mine[name], its[name], rtol=1e-5, atol=atol), name
    start = Model().state_dict()
    assert not torch.allclose(mine["rnn.weight_hh_l0"], start["rnn.weight_hh_l0"], atol=1e-3)  # it has learned
