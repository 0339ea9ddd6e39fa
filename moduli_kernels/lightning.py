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
from torch.optim.swa_utils import AveragedModel

from .masks import MasksWhileLoading, copy_masks, get_mask, leave_out
from .models import weight_called
from .penalty.attach import Regularization, regularize
from .penalty.places import Target
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
        regularization: what `mk.regularize` returned for the LightningModule. With None the callback makes it by
            `mk.regularize(module, targets, **settings)`, and makes another for each module that it is given. Trained
            points must be in an optimizer: make the regularization in the LightningModule, as an attribute, pass its
            parameters to the optimizer (weight_decay 0), and give it here.
        schedule: the sparsity at the start of each epoch, as `mk.linear_schedule` returns it; later epochs keep the
            last value. With None nothing is pruned; masks that a checkpoint holds are kept.
        targets: the weights to penalize, as `mk.regularize` takes them, or their names in the LightningModule, such as
            "rnn.weight_hh_l0". None means every recurrent weight.
        pruned: the weights to prune, (module, name) pairs or names. None means those that are penalized.
        block, order, scope: as `mk.MagnitudePruner` takes them.
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
    the start of each epoch. `.regularization` and `.pruner` exist from `on_fit_start` on (or the start of validation,
    test or prediction), when the layers that the module makes in `setup` or `configure_model` are there.

    The callback's state in a checkpoint holds the points and the masks: give the Trainer the callback again to resume.
    The module's state_dict holds pruned weights as zeros and no masks of torch's own modules, so that
    `load_from_checkpoint` loads it into a plain module; masks of a SparseRNN or SparseRNNCell, which loads them, stay
    in it. A checkpoint of a dense run goes on with masks that keep every weight, or where masks are there already, with
    those that keep at least every weight that the checkpoint holds.

    Averages that other callbacks hold as torch.optim.swa_utils.AveragedModel (WeightAveraging, EMAWeightAveraging) have
    the current masks, and weights that StochasticWeightAveraging has averaged are masked when training ends.

    Raises:
        ValueError, TypeError: `mk.regularize` or `mk.MagnitudePruner` refuses its arguments, settings come beside a
            regularization, targets or a regularization belong to another module, the module has no weight of a given
            name, or trained points would be made here.
        NotImplementedError: an optimizer reads the loss's value (LBFGS), or a strategy shards weights (FSDP,
            DeepSpeed): put `reg()` into training_step instead.
    """

    def __init__(self, regularization: Regularization | None = None, *, schedule: Sequence[float] | None = None,
                 targets: Iterable[Target | tuple[nn.Module, str] | str] | None = None,
                 pruned: Iterable[tuple[nn.Module, str] | str] | None = None, block: tuple[int, int] | None = None,
                 order: Mapping[Any, tuple[Tensor, Tensor]] | None = None, scope: str = "global",
                 prefix: str = "moduli", **settings: Any):
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
        self.regularization = self._given = regularization
        self.pruner: MagnitudePruner | None = None
        self._schedule, self._settings = schedule, settings
        # Lists, since targets are read again for each module.
        self._targets = None if targets is None else list(targets)
        self._pruned = None if pruned is None else list(pruned)
        self._block, self._order, self._scope, self._prefix = block, order, scope, prefix
        self._module: LightningModule | None = None  # that regularization and pruner were made for
        self._within: list[nn.Module] = []  # those of its layers that are penalized or pruned
        self._loading: MasksWhileLoading | None = None
        self._loaded: dict[str, Any] | None = None
        self._gradient_came = False

    @property
    def state_key(self) -> str:
        """The key under which a checkpoint holds the callback's state."""
        return f"{type(self).__qualname__}[{self._prefix}]"

    # -- before training --

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sees to it that a checkpoint can be loaded. The module's layers need not be there yet."""
        strategy = type(trainer.strategy).__name__
        if strategy in _WITHOUT_WHOLE_WEIGHTS:
            raise NotImplementedError(
                f"ModuliCallback needs whole weights in each process, got {strategy}; add reg() to the loss in "
                "training_step, or use a single device or ddp.")
        self._forget_another_module(pl_module)
        # DDP would wait for the gradients of points in the module; they come later, and are equal on all processes.
        points = set() if self._given is None else {id(p) for p in self._given.parameters()}
        names = [name for name, parameter in pl_module.named_parameters() if id(parameter) in points]
        if names:
            names += getattr(pl_module, "_ddp_params_and_buffers_to_ignore", [])
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(pl_module, names)
        self._stop_loading()
        self._loading = MasksWhileLoading([pl_module, *_averages(trainer)], self._owners())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes regularization and pruner, and gives all processes the points of the first."""
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise NotImplementedError("LBFGS reads the loss's value, to which a callback cannot add, got it with "
                                          "ModuliCallback; add reg() to the loss in training_step.")
        self._prepare(trainer, pl_module)
        reg = self._regularization()
        reg.load_state_dict(trainer.strategy.broadcast(reg.state_dict()))  # each process has drawn its own
        reg.to(pl_module.device)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes regularization and pruner where no training has made them."""
        self._prepare(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes regularization and pruner where no training has made them."""
        self._prepare(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes regularization and pruner where no training has made them."""
        self._prepare(trainer, pl_module)

    @torch.inference_mode(False)  # which evaluation runs in, and points made in it could not be used in training
    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes what is not there yet, for the layers that the module has now, and takes a checkpoint's state."""
        if self._loading is None:
            return
        self._stop_loading()
        self._forget_another_module(pl_module)
        self._module = pl_module
        if self.regularization is None:
            targets = None if self._targets is None else [_target_of(pl_module, t) for t in self._targets]
            reg = regularize(pl_module, targets, **self._settings)
            if any(True for _ in reg.parameters()):
                raise ValueError(
                    "trainable points must be in an optimizer, got trainable=True in the callback; make reg = "
                    "mk.regularize(...) in the LightningModule, give its parameters to the optimizer, and pass "
                    "ModuliCallback(module.reg).")
            self.regularization = reg
        penalized = [(t.module, t.name) for t in self.regularization.targets.values()]
        given = "regularization" if self._targets is None else "targets"
        self._check_in_training(given, penalized, trainer, pl_module)
        saved = (self._loaded or {}).get("masks")
        if self.pruner is None and (self._schedule is not None or saved):
            pruned = dict.fromkeys(penalized) if self._pruned is None else self._pruned
            if self._schedule is None:
                pruned = saved
            pairs = [_target_of(pl_module, target) for target in pruned]
            self._check_in_training("pruned", pairs, trainer, pl_module)
            masked = [pair for pair in pairs if get_mask(*pair) is not None]
            self.pruner = MagnitudePruner(pl_module, pairs, block=self._block, order=self._order, scope=self._scope)
            for module, name in self._owners():
                if (module, name) not in masked and not getattr(module, "applies_masks", False):
                    leave_out(module, name)
        within = set(pl_module.modules())
        self._within = [module for module, _ in (*penalized, *self._owners()) if module in within]
        self._take_state()
        self._mask_averages(trainer, pl_module)

    def _owners(self) -> list[tuple[nn.Module, str]]:
        """(module, name) of the weights that are pruned."""
        return [] if self.pruner is None else [owner for weight in self.pruner.weights for owner in weight.owners]

    def _forget_another_module(self, pl_module: LightningModule) -> None:
        """Forgets what was made for another module, such as that of the last fold of a cross-validation, and for layers
        that the module has replaced since."""
        modules = set(pl_module.modules())
        if self._module is pl_module and all(module in modules for module in self._within) and all(
                get_mask(*owner) is not None for owner in self._owners()):
            return
        self.regularization, self.pruner, self._module = self._given, None, None

    def _check_in_training(self, argument: str, pairs: list[tuple[nn.Module, str]], trainer: Trainer,
                           pl_module: LightningModule) -> None:
        """Refuses weights that are neither in the module nor in an optimizer of its own."""
        modules = set(pl_module.modules())
        trained = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups
                   for p in group["params"]}
        for module, name in pairs:
            if module not in modules and not any(id(p) in trained for p in module.parameters(recurse=False)):
                raise ValueError(
                    f"{argument} must be of the LightningModule that the Trainer is given, got {name} of a "
                    f"{type(module).__name__} that is not in it; make mk.regularize(...) of this very module and pass "
                    "it to a new ModuliCallback, or pass names and settings, which fit every module.")

    def _mask_averages(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the averages of other callbacks the module's masks, before they are compared or validated."""
        for average in _averages(trainer) if self.pruner is not None else ():
            copy_masks(average, pl_module)

    def _stop_loading(self) -> None:
        if self._loading is not None:
            self._loading.stop()
            self._loading = None

    # -- training --

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prunes to the schedule's sparsity of this epoch."""
        if self.pruner is None:
            return
        if self._schedule is not None:
            self.pruner.step_to(self._schedule[min(trainer.current_epoch, len(self._schedule) - 1)])
            self._mask_averages(trainer, pl_module)
        self.pruner.apply()
        pl_module.log(f"{self._prefix}/sparsity", self.pruner.sparsity)
        for name, density in self.pruner.densities().items():
            pl_module.log(f"{self._prefix}/density/{name}", density)

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

    # -- after training --

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Masks the weights, which another callback may have written (averages, when training ends)."""
        if self.pruner is not None:
            self.pruner.apply()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves nothing behind that would change how the module loads a state_dict."""
        self._stop_loading()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves nothing behind, as `teardown`."""
        self._stop_loading()

    # -- checkpoints --

    def state_dict(self) -> dict[str, Any]:
        """Returns the points, the settings they were used with, and the masks."""
        state: dict[str, Any] = {}
        if self.regularization is not None:
            state["regularization"] = self.regularization.state_dict()
        if self.pruner is not None:
            state["masks"] = self.pruner.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads points and masks, now or once regularization and pruner are made."""
        self._loaded = state_dict
        if self._loading is None and self._module is not None:
            self._take_state()

    def _take_state(self) -> None:
        loaded, self._loaded = self._loaded or {}, None
        if "regularization" in loaded:
            self._regularization().load_state_dict(loaded["regularization"])
        if loaded.get("masks") and self.pruner is not None:
            self.pruner.load_state_dict(loaded["masks"])

    def _regularization(self) -> Regularization:
        if self.regularization is None:
            raise RuntimeError("ModuliCallback makes its regularization in on_fit_start, which has not run; call it "
                               "through a Trainer.")
        return self.regularization


def _averages(trainer: Trainer) -> list[AveragedModel]:
    """The averages of the module that other callbacks hold."""
    return [value for callback in trainer.callbacks for value in vars(callback).values()
            if isinstance(value, AveragedModel)]


def _target_of(module: nn.Module, target: Any) -> Any:
    """Returns a (module, name) pair for a name such as "rnn.weight_hh_l0", and any other target unchanged."""
    if not isinstance(target, str):
        return target
    try:
        return weight_called(module, target)
    except AttributeError as error:
        raise ValueError(
            f"targets must name weights of the LightningModule, got {target!r}: {error}; pass names such as those of "
            "its named_parameters().") from error
