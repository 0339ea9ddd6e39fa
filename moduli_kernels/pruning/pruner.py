"""Global magnitude pruning with masks that live on the modules (paper, section 5).

A mask is a bool buffer on the module that owns the parameter (masks.py), so that it moves with `module.to(...)` and is
saved in the module's state_dict. A pruner keeps no copy: it reads the masks from the modules at each use.
"""
from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import one_of
from ..masks import (
    described,
    get_mask,
    hold,
    is_mask,
    is_zero_where_masked,
    mask_changed,
    remove_mask,
    set_mask,
    stop_holding,
    zero_masked_,
)
from . import blocks, optimizers
from .schedules import fraction
from .targets import Pairs, PrunedWeight, check_prunable, distinct_weights, named_targets
from .torch_prune import hand_over, take_over

# A target that keeps less than EMPTIED times the mean density is warned of, unless it would keep few weights anyway.
EMPTIED, FEW = 0.1, 16


class MagnitudePruner:
    """Prunes the weights that are smallest in magnitude over all targets together, and keeps them at 0.

    Each module gets a bool buffer `<param>_mask` (True = kept) of the parameter's shape, which its state_dict holds. A
    mask that is there already (an earlier pruner's) is taken over, and the weights that it masks are set to 0. To load
    a checkpoint with masks, make the pruner first, then load; or `mk.load_pruned_(model, state_dict)` makes the masks.

    Args:
        model: the model, whose recurrent weights are pruned (weight_hh of RNN, GRU, LSTM and cells, as `regularize`
            finds them), or `targets` where these are given. Or, in its place, a list of (module, parameter name).
        targets: names such as "rnn.weight_hh_l0" in the model, or (module, parameter name) pairs. A Parameter that
            several targets name (tied weights) counts once, at its first place, and every module that owns it gets the
            same mask buffer.
        optimizer: the optimizer, or optimizers, that train the targets: torch's, or a wrapper that has param_groups or
            an attribute `optimizer` (Accelerate's, Lightning's). It is only checked: one must have a target. Weights
            are held at 0 whatever optimizer steps them.
        block: (rows, columns) of the blocks in which matrices are pruned, which SparseRNN runs faster than scattered
            weights; blocks at the far edges may be smaller. Blocks rank by mean |w|, together with the single weights
            of targets that `order` does not name.
        order: {target: (row_permutation, column_permutation)} of the matrices to prune in blocks, int64 tensors of the
            lengths of the matrix; a target is a (module, name) pair or a name, as in `targets`. A matrix is put in
            this order first, best `mk.manifold_order` of its neurons' points (a recurrent weight takes the same
            permutation twice). Controls without points borrow the order of the penalized net. Neither block nor order
            is saved: give both again when a checkpoint is loaded.
        scope: "global" ranks the weights of all targets together; "each" ranks those of each target by themselves, so
            that each is pruned to the same sparsity. Together, a penalized or smaller matrix may be emptied: there is
            one warning where a target keeps less than a tenth of the mean share.

    Masks hold through every way in which weights are written. Gradients are masked as they arrive (before accumulation
    and clipping, as torch.nn.utils.prune does), weights after each step of any torch.optim.Optimizer, before a forward
    pass of their module, before its state_dict is made and after one is loaded (a dense checkpoint included). What an
    optimizer has gathered of weights that become masked (momentum) is set to 0 at its next step. AveragedModel, with
    what is built on it, takes masks as they are. Weights that are used without a forward pass of their module (of
    nn.MultiheadAttention's out_proj, say) are masked after steps and loading. So are those of a model that
    torch.compile compiled before its pruner was made, and of one for which it has the graph of a dense model of that
    class: it looks for hooks only where torch._dynamo.config.skip_nnmodule_hook_guards = False is set before.
    `torch.jit.script` compiles no hooks: script a copy after `make_permanent()`.

    What holds a mask belongs to the weights, not to this object: the net stays masked when the pruner is dropped, and
    in copies and pickles of it; `remove_hooks()` ends it. A pruner is for the modules that it was made with: make a
    new one on a copy of the model, which takes the masks over.

    Under DistributedDataParallel every rank has a pruner and calls `step_to` at the same steps. Weights are equal on
    all ranks, and so are the masks. Under FSDP2 make the pruner after `fully_shard` (it takes over the masks that were
    there). `step_to` must then be called on every rank: each looks at its own rows, all weights are ranked together,
    and the masks are those of the unsharded net. Masks stay plain tensors of the whole weight's shape, equal on every
    rank (1 byte an entry). So they are saved, loaded and counted as without sharding, on any rank alone, and they fit
    the whole weight that a forward pass sees.

    Raises:
        TypeError, ValueError: model, targets, masks, block, order, scope or an optimizer do not fit, or no optimizer
            has a target; nothing is changed then.
        NotImplementedError: sharded targets are to be pruned in blocks or with scope "each", or are sharded over
            different processes or not in rows; nothing is changed then.
        RuntimeError: what writes weights (`step_to`, `apply`, `load_state_dict`) finds a sharded weight whole (an FSDP
            root stays whole after a forward pass without gradients): call the root's `reshard()` first.
    """

    def __init__(self, model: nn.Module | Iterable[tuple[nn.Module, str]] | None = None,
                 targets: Iterable[str | tuple[nn.Module, str]] | None = None, *,
                 optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
                 block: tuple[int, int] | None = None, order: Mapping[Any, Any] | None = None,
                 scope: str = "global"):
        self._set_up(*named_targets(model, targets), optimizer, block, order, scope)

    def _set_up(self, pairs: Pairs, keys: list[str], optimizer: Any, block: Any, order: Any, scope: str) -> None:
        for i, (module, name) in enumerate(pairs):
            check_prunable(i, module, name)
        grids = blocks.block_grids(block, order, pairs, keys)
        self.scope = one_of("scope", scope, ("global", "each"))
        self.weights = distinct_weights(pairs, keys)  # for this package; users have `masks`
        optimizers.check_has_one_of(optimizer, [weight.parameter for weight in self.weights])
        self._sharded = any(weight.sharded for weight in self.weights)
        if self._sharded:
            from . import sharded  # imports torch.distributed

            sharded.check_targets({w.key: w.parameter for w in self.weights}, block is not None, scope == "each")
        self._grids = [grids.get(id(weight.parameter)) for weight in self.weights]
        self._hooked = True
        self._warned: set[str] = set()  # what has been warned of already
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
        groups = [self.weights] if self.scope == "global" else [[weight] for weight in self.weights]
        counts = [self._count_to_mask(group, sparsity) for group in groups]
        growing = [(group, count) for group, count in zip(groups, counts) if count > _masked(group)]
        self._check_no_nan([weight for group, _ in growing for weight in group])
        found = [self._compute_masks(group, count) for group, count in growing]
        for (group, _), masks in zip(growing, found):
            for weight, mask in zip(group, masks, strict=True):
                weight.mask.copy_(mask)
                mask_changed(*weight.owners[0])
        self.apply()
        self._warn_of_emptied_targets()
        for weight in self.weights:
            grad = weight.parameter.grad
            if grad is not None and grad.layout == torch.strided:
                zero_masked_(grad, weight.mask)
            elif grad is not None:
                weight.parameter.grad = grad * weight.mask

    def _count_to_mask(self, group: list[PrunedWeight], sparsity: float) -> int:
        """How many of the weights of a group, which are ranked together, are to be masked."""
        total, masked = _size(group), _masked(group)
        count = round(sparsity * total)
        if count < masked:
            where = "" if self.scope == "global" else f" of {group[0].key}"
            raise ValueError(
                f"sparsity must be at least the {masked / total:.6g} already cut ({masked} of {total} weights{where}), "
                f"got {sparsity!r}; pruned weights never come back, load earlier masks to go back."
            )
        return count

    def _compute_masks(self, group: list[PrunedWeight], count: int) -> list[Tensor]:
        """Returns the masks of a group after `count` entries in all are masked (with blocks: at most `count`)."""
        parameters, masks = [w.parameter.detach() for w in group], [w.mask for w in group]
        if self._sharded:
            from . import sharded

            return sharded.compute_masks(parameters, masks, count)
        grids = [grid for weight, grid in zip(self.weights, self._grids) if weight in group]
        if any(grids):
            return blocks.compute_masks(parameters, masks, grids, count)
        return _compute_masks(parameters, masks, count)

    def _check_no_nan(self, weights: list[PrunedWeight]) -> None:
        parameters, masks = [w.parameter for w in weights], [w.mask for w in weights]
        if self._sharded and weights:
            from . import sharded

            found = sharded.any_nan(parameters, masks)
        else:
            found = ((p.isnan() & mask).any() for p, mask in zip(parameters, masks))
        for weight, has_nan in zip(weights, found, strict=True):
            if has_nan:
                raise ValueError(
                    f"weights must not hold NaN when they are ranked, got NaN in {weight.key}; no mask was "
                    "changed, look at the loss and the learning rate."
                )

    def _warn_of_emptied_targets(self) -> None:
        """Warns, once a pruner, where the common ranking has left a target next to nothing."""
        mean = 1 - _masked(self.weights) / max(_size(self.weights), 1)
        for weight in self.weights if self.scope == "global" else ():
            size = weight.parameter.numel()
            density = 1 - _masked([weight]) / max(size, 1)
            if density < EMPTIED * mean and mean * size >= FEW:
                self._warn("emptied", f"{weight.key} keeps {100 * density:.2g} % of its weights where all targets "
                           f"together keep {100 * mean:.2g} %, because weights are ranked over all targets; "
                           'MagnitudePruner(..., scope="each") prunes each to the same sparsity.')

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(message, UserWarning, stacklevel=4)

    def apply(self) -> None:
        """Sets masked weights to 0 at once; else the next forward pass of their module does."""
        self._check_writable()
        for weight in self.weights:
            zero_masked_(weight.parameter, weight.mask)
            for owner in weight.owners if self._hooked else ():
                hold(*owner)

    def _check_writable(self) -> None:
        for weight in self.weights:
            weight.check_writable()

    def _check_alive(self) -> None:
        for weight in self.weights:
            weight.check_alive()

    # -- reading --

    @property
    def masks(self) -> dict[str, Tensor]:
        """The mask buffers themselves, bool, True = kept, by the names of the weights in the model, such as
        "rnn.weight_hh_l0". For a pruner that was given pairs alone they are "<position>.<parameter>"."""
        self._check_alive()
        return {w.key: w.mask for w in self.weights}

    @property
    def sparsity(self) -> float:
        """The fraction of all weights that is masked and 0 (0 where there are no weights).

        Masked weights that something has written since are not 0, and do not count; there is one warning then. The next
        forward pass of their module sets them to 0, and so does `apply()`. Those of a SparseRNN count as 0 whatever
        they hold, as in its forward pass. Of sharded weights the masks alone count.
        """
        self._check_alive()
        return (_masked(self.weights) - sum(self._written().values())) / max(_size(self.weights), 1)

    def densities(self) -> dict[str, float]:
        """Returns the fraction of each weight that is not masked and 0, with the keys of `masks` (1 for an empty one).

        Warns as `sparsity` does.
        """
        self._check_alive()
        written = self._written()
        return {w.key: 1 - (_masked([w]) - written[w.key]) / w.parameter.numel() if w.parameter.numel() else 1.0
                for w in self.weights}

    def _written(self) -> dict[str, int]:
        """How many masked weights of each target are not 0. Warns where there are any."""
        counts = {weight.key: 0 for weight in self.weights}
        for weight in self.weights:
            applied = all(getattr(module, "applies_masks", False) for module, _ in weight.owners)
            if not (applied or weight.sharded) and not is_zero_where_masked(weight.parameter.detach(), weight.mask):
                counts[weight.key] = int(torch.count_nonzero(weight.parameter.detach().masked_fill(weight.mask, 0)))
        if any(counts.values()):
            first = next(key for key, count in counts.items() if count)
            self._warn("written", f"{sum(counts.values())} masked weights (the first in {first}) are not 0: something "
                       "has written them since the last forward pass; the next sets them to 0, as apply() does now.")
        return counts

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
        state_dict = self._with_our_keys(state_dict)
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
        for weight in self.weights:
            weight.mask.copy_(state_dict[weight.key])
            mask_changed(*weight.owners[0])
        self.apply()

    def _with_our_keys(self, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A pruner with pairs and one with a model name the same weights differently; both end with the parameter's
        name and have the same order."""
        keys = list(self.masks)
        if len(state_dict) != len(keys) or set(state_dict) == set(keys):
            return state_dict
        ends = [[key.rpartition(".")[2] for key in each] for each in (state_dict, keys)]
        return dict(zip(keys, state_dict.values())) if ends[0] == ends[1] else state_dict

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
        """Stops holding the masked weights at 0, and masking gradients. Masks stay, and `apply()` works."""
        self._hooked = False
        for weight in self.weights:
            for owner in weight.owners:
                stop_holding(*owner)

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
                         optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
                         scope: str = "global") -> MagnitudePruner:
        """Takes over what torch.nn.utils.prune has pruned: all of a model, or the given targets.

        The Parameter object that was `<param>_orig` becomes `<param>` again, so that optimizers go on working. Targets
        that torch has not pruned start with all weights kept.

        Args:
            targets_or_model: (module, parameter name) pairs, or a model to be searched.
            optimizer, scope: as the constructor takes them.

        Raises:
            ValueError: torch has pruned none of them, or a mask holds anything but 0 and 1; nothing is changed then.
        """
        one_of("scope", scope, ("global", "each"))
        optimizers.check(optimizer)
        pairs, keys = take_over(targets_or_model, optimizer)
        pruner = cls.__new__(cls)
        pruner._set_up(pairs, keys, optimizer, None, None, scope)
        return pruner


def _size(weights: list[PrunedWeight]) -> int:
    """The number of entries of these weights."""
    return sum(w.parameter.numel() for w in weights)


def _masked(weights: list[PrunedWeight]) -> int:
    """How many entries of these weights are masked."""
    return sum(w.mask.numel() - int(torch.count_nonzero(w.mask)) for w in weights)


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
