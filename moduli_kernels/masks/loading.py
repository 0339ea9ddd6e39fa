"""Makes masks fit a checkpoint that is loaded, where they are left out of the state_dict and kept elsewhere."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .buffers import buffer_name, is_left_out, is_mask, leave_out, live_mask
from .holding import set_mask


class MasksWhileLoading:
    """While it lasts, masks that are left out of the state_dict keep at least every weight that is loaded.

    Else they would zero weights that a checkpoint of an earlier epoch, or of a dense run, still holds. The masks of the
    checkpoint itself may be loaded afterwards, from wherever they were saved. Where a state_dict does hold masks, as of
    a pruned model that was saved otherwise, they are taken.

    Args:
        models: the models whose state_dict will be loaded. Copies of them, made while it lasts, count as well.
        own: (module, name) of weights whose masks are treated likewise although they are in the state_dict.
    """

    def __init__(self, models: Iterable[nn.Module], own: list[tuple[nn.Module, str]]):
        self._own, self._active = own, True
        self._handles = [model.register_load_state_dict_pre_hook(self) for model in models]

    def stop(self) -> None:
        """Ends it, also for copies of the models, which hold this very object."""
        self._active, self._own = False, []
        for handle in self._handles:
            handle.remove()

    def __deepcopy__(self, memo: Any) -> MasksWhileLoading:
        return self

    def __call__(self, model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for path, module in model.named_modules() if self._active else ():
            start = f"{prefix}{path}." if path else prefix
            for name, weight in module._parameters.items():
                if weight is not None:
                    self._fit(module, name, weight, state_dict, start)

    def _fit(self, module: nn.Module, name: str, weight: Tensor, state_dict: dict[str, Any], start: str) -> None:
        """Makes the mask of one weight fit what will be loaded, and the state_dict fit the module's buffers."""
        key, mask = start + buffer_name(name), live_mask(module, name)
        saved, loaded = state_dict.get(key), state_dict.get(start + name)
        if mask is None:
            if is_mask(saved, weight) and not getattr(module, "applies_masks", False):
                set_mask(module, name, state_dict.pop(key).to(weight.device, copy=True))
                leave_out(module, name)
        elif is_left_out(module, name) or any(module is m and name == n for m, n in self._own):
            if isinstance(saved, Tensor) and is_mask(saved, mask):
                mask.copy_(saved)
            elif isinstance(loaded, Tensor) and loaded.shape == mask.shape:
                mask.logical_or_(loaded.to(mask.device) != 0)
            if is_left_out(module, name):
                state_dict.pop(key, None)
            else:
                state_dict[key] = mask.clone()
