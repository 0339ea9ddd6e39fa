"""Docstrings of the package are plain text first: this griffe extension keeps Markdown from reading them otherwise."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

CODE = re.compile(r"(`[^`]*`)")
MEANS_SOMETHING = {"*": "\\*", "<": "&lt;"}  # a product, a name's brackets; to Markdown emphasis, a tag
NAMES = re.compile(r"\s+\*{1,2}\w+(, \*{1,2}\w+)*:")  # "    *args, **kwargs:" begins a parameter's line


def plain(docstring: str) -> str:
    """The docstring with `*` and `<` escaped, except in code."""
    lines, base = [], 0
    for line in docstring.split("\n"):
        indent = len(line) - len(line.lstrip())
        after_blank = not lines or not lines[-1].strip()
        # Formulas stand in paragraphs of their own, four columns in; so does what follows "Args:" on the next line.
        if after_blank:
            base = indent
        if base >= 4 and indent >= 4:
            lines.append(line)
            continue
        names = NAMES.match(line)
        start = names.end() if names else 0
        parts = CODE.split(line[start:])
        parts[::2] = [part.translate(str.maketrans(MEANS_SOMETHING)) for part in parts[::2]]
        lines.append(line[:start] + "".join(parts))
    return "\n".join(lines)


class PlainText(Extension):
    """Applies `plain` to every docstring."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for each object that griffe has read."""
        if obj.docstring:
            obj.docstring.value = plain(obj.docstring.value)
