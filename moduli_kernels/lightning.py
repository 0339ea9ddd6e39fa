"""`ModuliCallback` adds the penalty and a pruning schedule to a Lightning Trainer; the LightningModule stays as it is.

    from moduli_kernels.lightning import ModuliCallback
    trainer = Trainer(callbacks=[ModuliCallback(manifold="torus", strength=0.1, schedule=mk.linear_schedule(0.9, 20))])

Importing this module imports Lightning: `lightning`, or `pytorch_lightning` where the program has imported that.
"""
from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .penalty.attach import Regularization, Target, regularize
from .pruning.pruner import MagnitudePruner
from .pruning.schedules import fraction

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    # A Trainer accepts only callbacks of its own package.
    try:
        if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
            from pytorch_lightning import Callback
        else:
            try:
                from lightning.pytorch import Callback
            except ImportError:
                from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError(
            "moduli_kernels.lightning needs Lightning, which is not installed; run pip install lightning.") from error

# With these a process holds only a part of each weight, or steps the optimizer outside the Trainer.
_WITHOUT_WHOLE_WEIGHTS = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy", "XLAFSDPStrategy")


class ModuliCallback(Callback):
    """Adds the penalty to the training, prunes by a schedule, and logs both.

    Args:
        regularization: what `mk.regularize` returned. With None the callback makes it by
            `mk.regularize(module, targets, **settings)`. Trained points must be in an optimizer: make the
            regularization in the LightningModule, as an attribute, pass its parameters to the optimizer (weight_decay
            0), and give it here.
        schedule: the sparsity at the start of each epoch, as `mk.linear_schedule` returns it; later epochs keep the
            last value. With None nothing is pruned.
        targets: the weights to penalize, as `mk.regularize` takes them, or their names in the LightningModule, such as
            "rnn.weight_hh_l0". None means every recurrent weight.
        pruned: the weights to prune, (module, name) pairs or names. None means those that are penalized.
        block: as `mk.MagnitudePruner` takes it.
        order: as `mk.MagnitudePruner` takes it.
        prefix: the first part of the names under which values are logged. Callbacks with different prefixes keep
            separate states in a checkpoint.
        **settings: keyword arguments of `mk.ModuliRegularizer`: manifold, strength, inhibitor, ...

    The penalty's gradient is added before each optimizer step (in `on_before_optimizer_step`, which comes after
    gradients have been accumulated, reduced over processes and unscaled, and before they are clipped), for the weights
    that this optimizer has. The sum is the gradient of loss + penalty. It is added once a step, whatever
    accumulate_grad_batches is, with every precision, in automatic and in manual optimization. Where there are several
    optimizers, each gets it at its own step, at the weights as they are then. The loss that is logged and returned is
    the module's own.

    With ddp all processes take the points of the first, and stay equal.

    It logs <prefix>/penalty at each step, and <prefix>/sparsity and <prefix>/density/<weight> (the kept fraction) at
    the start of each epoch. `.regularization` and `.pruner` exist from `setup` on. Masks are saved in the module's
    state_dict and the points in the callback's state: give the Trainer the callback again to load or to resume.

    Raises:
        ValueError, TypeError: `mk.regularize` or `mk.MagnitudePruner` refuses its arguments, settings come beside a
            regularization, the module has no weight of a given name, or trained points would be made here.
        NotImplementedError: an optimizer reads the loss's value (LBFGS), or a strategy shards weights (FSDP,
            DeepSpeed): put `reg()` into training_step instead.
    """

    def __init__(self, regularization: Regularization | None = None, *, schedule: Sequence[float] | None = None,
                 targets: Iterable[Target | tuple[nn.Module, str] | str] | None = None,
                 pruned: Iterable[tuple[nn.Module, str] | str] | None = None, block: tuple[int, int] | None = None,
                 order: Mapping[tuple[nn.Module, str], tuple[Tensor, Tensor]] | None = None, prefix: str = "moduli",
                 **settings: Any):
        super().__init__()
        if regularization is not None and (settings or targets is not None):
            given = ", ".join([*settings, *([] if targets is None else ["targets"])])
            raise ValueError(f"regularization must come alone, since it has its settings, got {given} beside it; pass "
                             "one or the other.")
        if regularization is not None and not isinstance(regularization, Regularization):
            raise TypeError(
                f"regularization must be what mk.regularize returns, got a {type(regularization).__name__}; pass its "
                "settings by name: ModuliCallback(manifold=\"torus\", strength=0.1).")
        if schedule is not None:
            schedule = [fraction("schedule", share) for share in schedule]
            if not schedule:
                raise ValueError("schedule must hold a sparsity for each epoch, got none; pass mk.linear_schedule(0.9, "
                                 "epochs), or None to prune nothing.")
        self.regularization = regularization
        self.pruner: MagnitudePruner | None = None
        self._schedule, self._targets, self._pruned, self._settings = schedule, targets, pruned, settings
        self._pairs: list[tuple[nn.Module, str]] = []  # (module, name) of the weights to prune
        self._block, self._order, self._prefix = block, order, prefix
        self._loaded: dict[str, Any] | None = None
        self._gradient_came = False

    @property
    def state_key(self) -> str:
        """The key under which a checkpoint holds the callback's state."""
        return f"{type(self).__qualname__}[{self._prefix}]"

    # -- before a checkpoint is loaded and the optimizers are made --

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes the regularization, and the masks, so that a checkpoint finds buffers to load them into."""
        strategy = type(trainer.strategy).__name__
        if strategy in _WITHOUT_WHOLE_WEIGHTS:
            raise NotImplementedError(
                f"ModuliCallback needs whole weights in each process, got {strategy}; add reg() to the loss in "
                "training_step, or use a single device or ddp.")
        if self.regularization is None:
            targets = None if self._targets is None else [_target_of(pl_module, t) for t in self._targets]
            self.regularization = regularize(pl_module, targets, **self._settings)
            if any(True for _ in self.regularization.parameters()):
                self.regularization = None
                raise ValueError(
                    "trainable points must be in an optimizer, got trainable=True in the callback; make reg = "
                    "mk.regularize(...) in the LightningModule, give its parameters to the optimizer, and pass "
                    "ModuliCallback(module.reg).")
        if self._schedule is not None and self.pruner is None:
            penalized = {(t.module, t.name): None for t in self.regularization.targets.values()}
            self._pairs = [*penalized] if self._pruned is None else [_target_of(pl_module, t) for t in self._pruned]
            self.pruner = self._make_pruner()
        # DDP would wait for the gradients of points in the module; they come later, and are equal on all processes.
        points = {id(p) for p in self.regularization.parameters()}
        names = [name for name, parameter in pl_module.named_parameters() if id(parameter) in points]
        if names:
            names += getattr(pl_module, "_ddp_params_and_buffers_to_ignore", [])
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(pl_module, names)
        self._take_state()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives all processes the points of the first, moves them to the module's device, and hooks the optimizers."""
        reg = self._regularization()
        reg.load_state_dict(trainer.strategy.broadcast(reg.state_dict()))  # each process has drawn its own
        reg.to(pl_module.device)
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise NotImplementedError("LBFGS reads the loss's value, to which a callback cannot add, got it with "
                                          "ModuliCallback; add reg() to the loss in training_step.")
            if self.pruner is not None:  # the new one takes the masks over
                self.pruner = self._make_pruner(optimizer)

    def _make_pruner(self, optimizer: torch.optim.Optimizer | None = None) -> MagnitudePruner:
        return MagnitudePruner(self._pairs, optimizer=optimizer, block=self._block, order=self._order)

    # -- training --

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prunes to the schedule's sparsity of this epoch."""
        if self.pruner is None or self._schedule is None:
            return
        self.pruner.step_to(self._schedule[min(trainer.current_epoch, len(self._schedule) - 1)])
        pl_module.log(f"{self._prefix}/sparsity", self.pruner.sparsity)
        paths = {module: path for path, module in pl_module.named_modules()}
        densities = self.pruner.densities()
        for weight in self.pruner.weights:
            module, name = weight.owners[0]
            path = f"{paths.get(module, type(module).__name__)}.{name}".lstrip(".")
            pl_module.log(f"{self._prefix}/density/{path}", densities[weight.key])

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that there is a gradient: where training_step returned None, no step is made for the penalty alone."""
        self._gradient_came = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule,
                                 optimizer: torch.optim.Optimizer) -> None:
        """Adds the penalty's gradient to the gradients of the weights that this optimizer has."""
        if pl_module.automatic_optimization and not self._gradient_came:
            return
        self._gradient_came = False
        reg = self._regularization()
        ours = {id(p) for module in (reg, *(t.module for t in reg.targets.values())) for p in module.parameters()}
        has = (p for group in optimizer.param_groups for p in group["params"])
        parameters = [p for p in has if id(p) in ours and p.requires_grad]
        if not parameters:
            return
        with torch.enable_grad():  # an optimizer may call its closure without gradients
            penalty = reg()
        if penalty.requires_grad:
            # Gradients are still scaled here for optimizers that unscale them in their step (fused ones).
            scaler = trainer.scaler if getattr(optimizer, "_step_supports_amp_scaling", False) else None
            (penalty if scaler is None else scaler.scale(penalty)).backward(inputs=parameters)
        pl_module.log(f"{self._prefix}/penalty", penalty.detach())

    # -- checkpoints --

    def state_dict(self) -> dict[str, Any]:
        """Returns the points and the settings they were used with; the masks are in the module's state_dict."""
        return {} if self.regularization is None else {"regularization": self.regularization.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the points, now or once `setup` has made the regularization."""
        self._loaded = state_dict
        self._take_state()

    def _take_state(self) -> None:
        if self._loaded and self.regularization is not None:
            self.regularization.load_state_dict(self._loaded["regularization"])
            self._loaded = None

    def _regularization(self) -> Regularization:
        if self.regularization is None:
            raise RuntimeError("ModuliCallback makes its regularization in setup, which has not run; call it through a "
                               "Trainer.")
        return self.regularization


def _target_of(module: nn.Module, target: Any) -> Any:
    """Returns a (module, name) pair for a name such as "rnn.weight_hh_l0", and any other target unchanged."""
    if not isinstance(target, str):
        return target
    path, _, name = target.rpartition(".")
    try:
        return module.get_submodule(path), name
    except AttributeError as error:
        raise ValueError(
            f"targets must name weights of the LightningModule, got {target!r}: {error}; pass names such as those of "
            "its named_parameters().") from error
