"""Global magnitude pruning with masks that live on the modules (paper, section 5).

A mask is a bool buffer `<param>_mask` (True = kept) on the module that owns the parameter, so it moves with
`module.to(...)` and is saved in the module's state_dict. Everything here reads it afresh from the module.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import zero_masked_
from . import blocks as blocks_of_pruning, hooks, torch_prune as torch_prune_masks
from .schedules import fraction
from .targets import described, grouped, is_mask, prunable, target_pairs


class MagnitudePruner:
    """Cuts the smallest weights of all targets together, step by step, and keeps them cut.

    Args:
        targets: list of (module, parameter name). A Parameter reached twice (tied) is counted once, at its
            first place, and every module that owns it gets the same mask buffer.
        optimizer: with it, gradients are masked as they arrive (before accumulation and clipping, as
            torch.nn.utils.prune does) and weights after each `optimizer.step()`, so momentum and decay revive
            nothing. Without it only gradients are masked: call `apply()` after each step.
        block: (rows, columns) of the blocks to cut matrices in, which SparseRNN runs faster than scattered weights;
            those at the far edges may be smaller. Blocks rank by mean |w|, together with the single weights of
            targets that `order` does not name.
        order: {(module, name): (row_permutation, column_permutation)}, int64, of the matrices to cut in blocks: each
            is put in this order first, best `mk.manifold_order` of its neurons' points (a recurrent weight takes the
            same permutation twice). Controls without points borrow the order of the penalized net. Neither block
            nor order is saved: give both again when a checkpoint is loaded.

    Each module gets a bool buffer `<param>_mask` (True = kept), saved in its state_dict; one that is there
    already (an earlier pruner's) is taken over, and the weights it cuts are set to 0. To load a checkpoint
    with masks, make the pruner first, then load.

    Hooks belong to the weights, not to this object: dropping the pruner keeps the net masked,
    `remove_hooks()` ends it. `copy.deepcopy(model)` copies the masks but no hooks: make a new MagnitudePruner
    on the copy (and its optimizer), which takes the masks over. The same goes for a new optimizer.

    Under DistributedDataParallel every rank has a pruner and calls `step_to` at the same steps: weights are equal on
    all ranks, so masks are. Under FSDP2 make the pruner after `fully_shard` (it takes masks over that were there):
    `step_to` ranks the weights of all ranks together, each rank looking at its own rows, gives the masks of the
    unsharded net, and must be called on every rank. Masks stay plain tensors of the whole weight's shape, equal on
    every rank (1 byte an entry): they are saved, loaded and counted as without sharding, on any rank alone, and fit the
    whole weight that a forward pass sees.

    Raises:
        TypeError, ValueError: targets, masks, block, order or an optimizer that do not fit; nothing is changed then.
        NotImplementedError: sharded targets in blocks, sharded in unlike ways or not in rows; nothing is changed then.
        RuntimeError: from what writes weights (`step_to`, `apply`, `load_state_dict`), where a sharded weight is whole
            at the moment (an FSDP root after a forward pass without gradients): call the root's `reshard()` first.
    """

    def __init__(self, targets: Iterable[tuple[nn.Module, str]], *,
                 optimizer: torch.optim.Optimizer | None = None,
                 block: tuple[int, int] | None = None, order: Mapping[Any, Any] | None = None):
        _optimizer(optimizer)
        pairs = target_pairs(targets)
        for i, (module, name) in enumerate(pairs):
            prunable(i, module, name)
        blocks = blocks_of_pruning.checked_blocks(block, order, pairs)
        self._weights = grouped(pairs)
        self._sharded = any(weight.sharded for weight in self._weights)
        if self._sharded:
            from . import sharded as sharded_pruning  # needs torch.distributed

            sharded_pruning.check_targets({w.key: w.parameter for w in self._weights}, block is not None)
        self._blocks = [blocks.get(id(weight.parameter)) for weight in self._weights]
        self.optimizer = optimizer
        self._hooked = True
        for weight in self._weights:
            mask = weight.found_mask()
            if mask is None:
                mask = torch.ones(weight.parameter.shape, dtype=torch.bool, device=weight.parameter.device)
            for module, name in weight.owners:
                if module._buffers.get(f"{name}_mask") is not mask:
                    module.register_buffer(f"{name}_mask", mask)
        self.apply()

    # -- pruning --

    @torch.no_grad()
    def step_to(self, sparsity: float) -> None:
        """Masks exactly round(sparsity * N) of the N weights of all targets (Python's round: halves to even).

        All weights are ranked together: masked first, then by |w|, then by order of targets and flat
        (row-major) index; the first ones are cut. Masked weights and their gradients are set to 0. Asking for
        what is already cut changes no mask. Mixed dtypes are compared in the widest one.

        With blocks, these are ranked by mean |w| over all their entries, masked ones as 0, in float64 and, where
        equal, in row-major order of the ordered matrix. Cut is the longest run from the bottom of the ranking
        that leaves at most round(sparsity * N) masked, so a little less than asked. If weights have changed, the
        same sparsity asked again may cut what then fits in.

        Raises:
            ValueError: sparsity outside [0, 1] or below what is already cut, NaN among the weights; nothing is changed.
            TypeError: sparsity is no number.
        """
        sparsity = fraction("sparsity", sparsity)
        self._check_writable()
        total, cut = self._size(), self._cut()
        count = round(sparsity * total)
        if count < cut:
            raise ValueError(
                f"sparsity must be at least the {cut / total:.6g} already cut ({cut} of {total} weights), "
                f"got {sparsity!r}; pruned weights never come back, load earlier masks to go back."
            )
        if count > cut:
            self._check_no_nan()
            for weight, mask in zip(self._weights, self._masks_at(count), strict=True):
                weight.mask.copy_(mask)
        self.apply()
        for weight in self._weights:
            grad = weight.parameter.grad
            if grad is not None and grad.layout == torch.strided:
                zero_masked_(grad, weight.mask)
            elif grad is not None:
                weight.parameter.grad = grad * weight.mask

    def _masks_at(self, count: int) -> list[Tensor]:
        """Masks with `count` entries cut (of blocks: at most). By selection: sorting takes 7 x longer."""
        parameters, masks = [w.parameter.detach() for w in self._weights], [w.mask for w in self._weights]
        if self._sharded:
            from . import sharded as sharded_pruning

            return sharded_pruning.keep(parameters, masks, count)
        if any(self._blocks):
            return blocks_of_pruning.keep(parameters, masks, self._blocks, count)
        dtype = reduce(torch.promote_types, (w.parameter.dtype for w in self._weights), torch.float32)
        shapes = [w.parameter.shape for w in self._weights]
        sizes = [shape.numel() for shape in shapes]
        scores = torch.empty(sum(sizes), dtype=dtype, device=self._weights[0].parameter.device)
        for weight, part in zip(self._weights, scores.split(sizes), strict=True):
            cut = ~weight.mask.reshape(-1).to(part.device)
            part.copy_(weight.parameter.reshape(-1)).abs_().masked_fill_(cut, -1)
        # On a GPU kthvalue is refused by use_deterministic_algorithms, and sorting is fast.
        on_cpu = scores.device.type == "cpu"
        threshold = scores.kthvalue(count).values if on_cpu else scores.sort().values[count - 1]
        keep = scores >= threshold
        ties = count - int(torch.count_nonzero(~keep))
        keep[(scores == threshold).nonzero()[:ties, 0]] = False
        return [part.view(shape) for part, shape in zip(keep.split(sizes), shapes, strict=True)]

    def _check_no_nan(self) -> None:
        if self._sharded:
            from . import sharded as sharded_pruning

            found = sharded_pruning.any_nan([w.parameter for w in self._weights], [w.mask for w in self._weights])
        else:
            found = ((weight.parameter.isnan() & weight.mask).any() for weight in self._weights)
        for weight, has_nan in zip(self._weights, found, strict=True):
            if has_nan:
                raise ValueError(
                    f"weights must not hold NaN when they are ranked, got NaN in {weight.key}; no mask was "
                    "changed, look at the loss and the learning rate."
                )

    def apply(self) -> None:
        """Sets masked weights to 0: after an optimizer step the pruner does not see, or writes by hand."""
        self._check_writable()
        for weight in self._weights:
            zero_masked_(weight.parameter, weight.mask)
            if self._hooked:
                hooks.attach(*weight.owners[0], self.optimizer)

    def _check_writable(self) -> None:
        for weight in self._weights:
            weight.check_writable()

    def _check_alive(self) -> None:
        for weight in self._weights:
            weight.check_alive()

    # -- reading --

    def _size(self) -> int:
        return sum(w.parameter.numel() for w in self._weights)

    def _cut(self) -> int:
        return sum(w.mask.numel() - int(torch.count_nonzero(w.mask)) for w in self._weights)

    @property
    def masks(self) -> dict[str, Tensor]:
        """The live mask buffers, True = kept, by "<position in targets>.<parameter>": "0.weight_hh_l0"."""
        self._check_alive()
        return {w.key: w.mask for w in self._weights}

    @property
    def sparsity(self) -> float:
        """Fraction of all weights that is cut (0 for no weights)."""
        self._check_alive()
        return self._cut() / max(self._size(), 1)

    def densities(self) -> dict[str, float]:
        """Kept fraction of each weight, with the keys of `masks` (1 for an empty one)."""
        masks = self.masks.items()
        return {key: int(torch.count_nonzero(m)) / m.numel() if m.numel() else 1.0 for key, m in masks}

    def __repr__(self) -> str:
        return f"MagnitudePruner({', '.join(w.key for w in self._weights)})"

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the masks: a flat dict of contiguous bool tensors with the keys of `masks`."""
        return {k: m.clone(memory_format=torch.contiguous_format) for k, m in self.masks.items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Takes the masks of `state_dict()`, sparser or denser than now, and sets masked weights to 0.

        Raises:
            ValueError: keys, shapes or dtypes do not fit; nothing is changed.
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

    # -- leaving --

    def remove_hooks(self) -> None:
        """Stops masking gradients, and weights after optimizer steps. Masks stay and `apply()` works."""
        self._hooked = False
        for weight in self._weights:
            hooks.detach(*weight.owners[0], self.optimizer)

    def make_permanent(self) -> None:
        """Leaves plain modules: masked weights are 0, mask buffers and hooks are gone. It ends here."""
        self.apply()
        self.remove_hooks()
        for weight in self._weights:
            for module, name in weight.owners:
                delattr(module, f"{name}_mask")

    def to_torch_prune(self) -> None:
        """Hands the masks to torch.nn.utils.prune: `<param>_orig`, `<param>_mask` and a forward pre-hook.

        `<param>_orig` is the same Parameter object, so optimizers go on working. This pruner ends here.

        Raises:
            NotImplementedError: sharded targets.
        """
        if self._sharded:
            raise NotImplementedError(
                "targets must be whole to be handed to torch.nn.utils.prune, got sharded ones (fully_shard); hand over "
                "a net that was loaded without sharding."
            )
        masks = self.state_dict()
        self.make_permanent()
        for weight in self._weights:
            torch_prune_masks.hand_over(weight, masks[weight.key])

    @classmethod
    def from_torch_prune(cls, targets_or_model: nn.Module | Iterable[tuple[nn.Module, str]],
                         optimizer: torch.optim.Optimizer | None = None) -> MagnitudePruner:
        """Takes over what torch.nn.utils.prune has pruned: all of a model, or the given targets.

        The Parameter object that was `<param>_orig` becomes `<param>` again, so optimizers go on working.
        Targets that torch has not pruned start with nothing cut. optimizer is that of the constructor.

        Raises:
            ValueError: torch has pruned none of them, or a mask holds anything but 0 and 1; nothing is changed.
        """
        _optimizer(optimizer)
        return cls(torch_prune_masks.take_over(targets_or_model), optimizer=optimizer)


def _optimizer(optimizer: Any) -> None:
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got a {type(optimizer).__name__}; pass the one that "
            "steps these weights, or None and call apply() after each step."
        )
