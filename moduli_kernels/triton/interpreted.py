"""Repairs Triton's interpreter. Its scalars are arrays of one number, and from version 2.4 on NumPy refuses to use such
an array as an integer, so that no loop could run up to an argument. device.py imports this file where
TRITON_INTERPRET=1 is set."""
from __future__ import annotations

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, *scope):
    _patch(tensor, *scope)
    (scope[0].set_attr if scope else setattr)(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_lang_tensor
