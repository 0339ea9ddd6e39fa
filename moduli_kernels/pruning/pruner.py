"""Global magnitude pruning with masks that live on the modules (paper, section 5).

A mask is a bool buffer on the module that owns the parameter (masks.py), so that it moves with `module.to(...)` and is
saved in the module's state_dict. A pruner keeps no copy: it reads the masks from the modules at each use.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import described, get_mask, is_mask, remove_mask, set_mask, zero_masked_
from . import blocks, hooks
from .schedules import fraction
from .targets import PrunedWeight, check_prunable, distinct_weights, target_pairs
from .torch_prune import hand_over, take_over


class MagnitudePruner:
    """Prunes the weights that are smallest in magnitude over all targets together, and keeps them at 0.

    Each module gets a bool buffer `<param>_mask` (True = kept) of the parameter's shape, which its state_dict holds. A
    mask that is there already (an earlier pruner's) is taken over, and the weights that it masks are set to 0. To load
    a checkpoint with masks, make the pruner first, then load.

    Args:
        targets: list of (module, parameter name). A Parameter that several pairs name (tied weights) counts once, at
            its first place, and every module that owns it gets the same mask buffer.
        optimizer: with it, gradients are masked as they arrive (before accumulation and clipping, as
            torch.nn.utils.prune does) and weights after each `optimizer.step()`, so that momentum and weight decay
            revive nothing. Without it only gradients are masked: call `apply()` after each step.
        block: (rows, columns) of the blocks in which matrices are pruned, which SparseRNN runs faster than scattered
            weights; blocks at the far edges may be smaller. Blocks rank by mean |w|, together with the single weights
            of targets that `order` does not name.
        order: {(module, name): (row_permutation, column_permutation)} of the matrices to prune in blocks, int64
            tensors of the lengths of the matrix. A matrix is put in this order first, best `mk.manifold_order` of its
            neurons' points (a recurrent weight takes the same permutation twice). Controls without points borrow the
            order of the penalized net. Neither block nor order is saved: give both again when a checkpoint is loaded.

    Hooks belong to the weights, not to this object: the net stays masked when the pruner is dropped, and
    `remove_hooks()` ends it. `copy.deepcopy(model)` copies masks but no hooks: make a new MagnitudePruner on the copy
    (and its optimizer), which takes the masks over. The same goes for a new optimizer.

    Under DistributedDataParallel every rank has a pruner and calls `step_to` at the same steps. Weights are equal on
    all ranks, and so are the masks. Under FSDP2 make the pruner after `fully_shard` (it takes over the masks that were
    there). `step_to` must then be called on every rank: each looks at its own rows, all weights are ranked together,
    and the masks are those of the unsharded net. Masks stay plain tensors of the whole weight's shape, equal on every
    rank (1 byte an entry). So they are saved, loaded and counted as without sharding, on any rank alone, and they fit
    the whole weight that a forward pass sees.

    Raises:
        TypeError, ValueError: targets, masks, block, order or an optimizer do not fit; nothing is changed then.
        NotImplementedError: sharded targets are to be pruned in blocks, or are sharded over different processes or not
            in rows; nothing is changed then.
        RuntimeError: what writes weights (`step_to`, `apply`, `load_state_dict`) finds a sharded weight whole (an FSDP
            root stays whole after a forward pass without gradients): call the root's `reshard()` first.
    """

    def __init__(self, targets: Iterable[tuple[nn.Module, str]], *,
                 optimizer: torch.optim.Optimizer | None = None,
                 block: tuple[int, int] | None = None, order: Mapping[Any, Any] | None = None):
        _check_optimizer(optimizer)
        pairs = target_pairs(targets)
        for i, (module, name) in enumerate(pairs):
            check_prunable(i, module, name)
        grids = blocks.block_grids(block, order, pairs)
        self.weights = distinct_weights(pairs)  # for this package; users have `masks`
        self._sharded = any(weight.sharded for weight in self.weights)
        if self._sharded:
            from . import sharded  # imports torch.distributed

            sharded.check_targets({w.key: w.parameter for w in self.weights}, block is not None)
        self._grids = [grids.get(id(weight.parameter)) for weight in self.weights]
        self.optimizer = optimizer
        self._hooked = True
        for weight in self.weights:
            mask = weight.found_mask()
            if mask is None:
                mask = torch.ones(weight.parameter.shape, dtype=torch.bool, device=weight.parameter.device)
            for module, name in weight.owners:
                if get_mask(module, name) is not mask:
                    set_mask(module, name, mask)
        self.apply()

    # -- pruning --

    @torch.no_grad()
    def step_to(self, sparsity: float) -> None:
        """Masks exactly round(sparsity * N) of the N weights of all targets (Python's round: halves to even).

        All weights are in one ranking: masked ones first, then by |w|, then by order of targets and flat (row-major)
        index. The first ones are masked: they and their gradients are set to 0. Where as many are masked already, no
        mask changes. Weights of different dtypes are compared in the widest one.

        With blocks, these rank by mean |w| over all their entries, masked ones as 0, in float64 and, where equal, in
        row-major order of the ordered matrix. Masked is the longest run from the bottom of the ranking that leaves at
        most round(sparsity * N) masked, so a little less than asked for. If weights have changed, asking for the same
        sparsity again may mask what then fits in.

        Args:
            sparsity: the fraction of all weights to be masked, in [0, 1].

        Raises:
            ValueError: sparsity lies outside [0, 1] or below what is masked already, or a weight is NaN; nothing is
                changed then.
            TypeError: sparsity is no number.
        """
        sparsity = fraction("sparsity", sparsity)
        self._check_writable()
        total, masked = self._size(), self._masked()
        count = round(sparsity * total)
        if count < masked:
            raise ValueError(
                f"sparsity must be at least the {masked / total:.6g} already cut ({masked} of {total} weights), "
                f"got {sparsity!r}; pruned weights never come back, load earlier masks to go back."
            )
        if count > masked:
            self._check_no_nan()
            for weight, mask in zip(self.weights, self._compute_masks(count), strict=True):
                weight.mask.copy_(mask)
        self.apply()
        for weight in self.weights:
            grad = weight.parameter.grad
            if grad is not None and grad.layout == torch.strided:
                zero_masked_(grad, weight.mask)
            elif grad is not None:
                weight.parameter.grad = grad * weight.mask

    def _compute_masks(self, count: int) -> list[Tensor]:
        """Returns the weights' masks after `count` entries in all are masked (with blocks: at most `count`)."""
        parameters, masks = [w.parameter.detach() for w in self.weights], [w.mask for w in self.weights]
        if self._sharded:
            from . import sharded

            return sharded.compute_masks(parameters, masks, count)
        if any(self._grids):
            return blocks.compute_masks(parameters, masks, self._grids, count)
        return _compute_masks(parameters, masks, count)

    def _check_no_nan(self) -> None:
        parameters, masks = [w.parameter for w in self.weights], [w.mask for w in self.weights]
        if self._sharded:
            from . import sharded

            found = sharded.any_nan(parameters, masks)
        else:
            found = ((p.isnan() & mask).any() for p, mask in zip(parameters, masks))
        for weight, has_nan in zip(self.weights, found, strict=True):
            if has_nan:
                raise ValueError(
                    f"weights must not hold NaN when they are ranked, got NaN in {weight.key}; no mask was "
                    "changed, look at the loss and the learning rate."
                )

    def apply(self) -> None:
        """Sets masked weights to 0. Call it after weights were written by hand, or by an optimizer not given here."""
        self._check_writable()
        for weight in self.weights:
            zero_masked_(weight.parameter, weight.mask)
            if self._hooked:
                hooks.register(*weight.owners[0], self.optimizer)

    def _check_writable(self) -> None:
        for weight in self.weights:
            weight.check_writable()

    def _check_alive(self) -> None:
        for weight in self.weights:
            weight.check_alive()

    # -- reading --

    def _size(self) -> int:
        """The number N of weights that are ranked, tied ones counted once."""
        return sum(w.parameter.numel() for w in self.weights)

    def _masked(self) -> int:
        """How many of the N weights are masked."""
        return sum(w.mask.numel() - int(torch.count_nonzero(w.mask)) for w in self.weights)

    @property
    def masks(self) -> dict[str, Tensor]:
        """The mask buffers themselves, bool, True = kept, by "<position in targets>.<parameter>": "0.weight_hh_l0"."""
        self._check_alive()
        return {w.key: w.mask for w in self.weights}

    @property
    def sparsity(self) -> float:
        """The fraction of all weights that is masked (0 where there are no weights)."""
        self._check_alive()
        return self._masked() / max(self._size(), 1)

    def densities(self) -> dict[str, float]:
        """Returns the kept fraction of each weight, with the keys of `masks` (1 for an empty weight)."""
        masks = self.masks.items()
        return {key: int(torch.count_nonzero(m)) / m.numel() if m.numel() else 1.0 for key, m in masks}

    def __repr__(self) -> str:
        return f"MagnitudePruner({', '.join(w.key for w in self.weights)})"

    # -- saving and loading --

    def state_dict(self) -> dict[str, Tensor]:
        """Returns copies of the masks: a flat dict of contiguous bool tensors with the keys of `masks`."""
        return {k: m.clone(memory_format=torch.contiguous_format) for k, m in self.masks.items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copies the masks of a `state_dict()`, sparser or denser than now, and sets masked weights to 0.

        Raises:
            ValueError: keys, shapes or dtypes do not fit; nothing is changed then.
        """
        self._check_writable()
        masks = self.masks
        for key in state_dict:
            if key not in masks:
                raise ValueError(
                    f"state_dict must hold a mask for each of {', '.join(masks)}, got {key!r}: a mask that "
                    "fits no parameter; give the pruner the targets it was saved with."
                )
        for key, mask in masks.items():
            new = state_dict.get(key)
            if not is_mask(new, mask):
                raise ValueError(
                    f"state_dict[{key!r}] must be a torch.bool mask {tuple(mask.shape)}, got "
                    f"{described(new)}; give the pruner the targets it was saved with."
                )
        for key, mask in masks.items():
            mask.copy_(state_dict[key])
        self.apply()

    def __getstate__(self) -> dict[str, Any]:
        """Names no class of this package, so that a pickle does not depend on where the package keeps its classes."""
        return {**vars(self), "weights": [vars(weight) for weight in self.weights],
                "_grids": [None if grid is None else vars(grid) for grid in self._grids]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.weights = [PrunedWeight(**weight) for weight in state["weights"]]
        self._grids = [None if grid is None else blocks.BlockGrid(**grid) for grid in state["_grids"]]

    # -- leaving --

    def remove_hooks(self) -> None:
        """Stops the masking of gradients, and of weights after optimizer steps. Masks stay, and `apply()` works."""
        self._hooked = False
        for weight in self.weights:
            hooks.remove(*weight.owners[0], self.optimizer)

    def make_permanent(self) -> None:
        """Leaves plain modules: masked weights are 0, mask buffers and hooks are removed. The pruner ends here."""
        self.apply()
        self.remove_hooks()
        for weight in self.weights:
            for module, name in weight.owners:
                remove_mask(module, name)

    def to_torch_prune(self) -> None:
        """Hands the masks to torch.nn.utils.prune: `<param>_orig`, `<param>_mask` and a forward pre-hook.

        `<param>_orig` is the same Parameter object, so that optimizers go on working. The pruner ends here.

        Raises:
            NotImplementedError: the targets are sharded.
        """
        if self._sharded:
            raise NotImplementedError(
                "targets must be whole to be handed to torch.nn.utils.prune, got sharded ones (fully_shard); hand over "
                "a net that was loaded without sharding."
            )
        masks = self.state_dict()
        self.make_permanent()
        for weight in self.weights:
            hand_over(weight, masks[weight.key])

    @classmethod
    def from_torch_prune(cls, targets_or_model: nn.Module | Iterable[tuple[nn.Module, str]],
                         optimizer: torch.optim.Optimizer | None = None) -> MagnitudePruner:
        """Takes over what torch.nn.utils.prune has pruned: all of a model, or the given targets.

        The Parameter object that was `<param>_orig` becomes `<param>` again, so that optimizers go on working. Targets
        that torch has not pruned start with all weights kept.

        Args:
            targets_or_model: (module, parameter name) pairs, or a model to be searched.
            optimizer: as the constructor takes it.

        Raises:
            ValueError: torch has pruned none of them, or a mask holds anything but 0 and 1; nothing is changed then.
        """
        _check_optimizer(optimizer)
        return cls(take_over(targets_or_model), optimizer=optimizer)


def _compute_masks(parameters: list[Tensor], masks: list[Tensor], count: int) -> list[Tensor]:
    """Returns the masks after the `count` lowest-ranked entries of all parameters are masked.

    The threshold is selected, not found by sorting, which takes 7 times as long.
    """
    dtype = reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
    sizes = [p.numel() for p in parameters]
    scores = torch.empty(sum(sizes), dtype=dtype, device=parameters[0].device)
    for parameter, mask, part in zip(parameters, masks, scores.split(sizes), strict=True):
        masked = ~mask.reshape(-1).to(part.device)
        part.copy_(parameter.reshape(-1)).abs_().masked_fill_(masked, -1)
    # On a GPU use_deterministic_algorithms refuses kthvalue, and sorting is fast.
    on_cpu = scores.device.type == "cpu"
    threshold = scores.kthvalue(count).values if on_cpu else scores.sort().values[count - 1]
    kept = scores >= threshold
    ties = count - int(torch.count_nonzero(~kept))
    kept[(scores == threshold).nonzero()[:ties, 0]] = False
    return [part.view(p.shape) for part, p in zip(kept.split(sizes), parameters, strict=True)]


def _check_optimizer(optimizer: Any) -> None:
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got a {type(optimizer).__name__}; pass the one that "
            "steps these weights, or None and call apply() after each step."
        )
