"""Triton's interpreter, mended: its scalars are arrays of one number, which NumPy from 2.4 on does not take for an
integer, so a loop could not run to an argument. Imported where TRITON_INTERPRET=1 only."""
from __future__ import annotations

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, *scope):
    _patch(tensor, *scope)
    (scope[0].set_attr if scope else setattr)(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_lang_tensor
