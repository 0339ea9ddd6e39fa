"""How a hexagonal torus and a saturating inhibitor are added to a copy of the source tree, in three files each.

The folder toy/ beside this file holds the texts.
"""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

TEXTS = Path(__file__).with_name("toy")

# Each file, the text that adds to it, and how: at its end, or before a line, with the name put into a list of types.
MANIFOLD = {
    "moduli_kernels/geometry/flat.py": ("flat.py.txt", None, None),
    "csrc/manifolds.h": ("manifolds.h.txt", "// The list of all manifolds that the kernels know.",
                         ("using Manifolds = TypeList<", "HexagonalTorus<T>, ")),
    "moduli_kernels/triton/manifolds.py": ("triton_manifolds.py.txt", None, None),
}
INHIBITOR = {
    "moduli_kernels/geometry/inhibitors.py": ("inhibitors.py.txt", None, None),
    "csrc/inhibitors.h": ("inhibitors.h.txt", "// The list of all inhibitors that the kernels know.",
                          ("using Inhibitors = TypeList<", "Saturation<T>, ")),
    "moduli_kernels/triton/inhibitors.py": ("triton_inhibitors.py.txt", None, None),
}


def add_toys(tree: Path, names: Iterable[str]) -> None:
    """Adds the toys to those files of a copy of the source tree that are named, of MANIFOLD and INHIBITOR."""
    for name in names:
        addition, before, entry = (MANIFOLD | INHIBITOR)[name]
        text, added = (tree / name).read_text(), (TEXTS / addition).read_text()
        if before is None:
            text += added
        else:
            assert text.count(before) == 1 and text.count(entry[0]) == 1
            text = text.replace(before, added + "\n" + before).replace(entry[0], "".join(entry))
        (tree / name).write_text(text)
