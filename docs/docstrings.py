"""A griffe extension that shows the package's docstrings as the plain text that they are.

They are written to be read in a terminal, so a `*` in them is a product and a `<` a comparison. Markdown would read
emphasis and tags.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

CODE = re.compile(r"(`[^`]*`)")
ESCAPED = {"*": "\\*", "<": "&lt;"}
NAMES = re.compile(r"\s+\*{1,2}\w+(, \*{1,2}\w+)*:")  # "    *args, **kwargs:" begins the description of parameters


def plain(docstring: str) -> str:
    """Returns the docstring with `*` and `<` escaped, except in code."""
    lines, base = [], 0
    for line in docstring.split("\n"):
        indent = len(line) - len(line.lstrip())
        after_blank = not lines or not lines[-1].strip()
        # A paragraph that is indented by four columns or more is a formula, which Markdown shows as code. What follows
        # "Args:" is indented too, but its paragraph begins with that word, at the margin.
        if after_blank:
            base = indent
        if base >= 4 and indent >= 4:
            lines.append(line)
            continue
        names = NAMES.match(line)
        start = names.end() if names else 0
        parts = CODE.split(line[start:])
        parts[::2] = [part.translate(str.maketrans(ESCAPED)) for part in parts[::2]]
        lines.append(line[:start] + "".join(parts))
    return "\n".join(lines)


class PlainText(Extension):
    """Applies `plain` to every docstring of the package."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Is called by griffe for each object that it has read."""
        if obj.docstring:
            obj.docstring.value = plain(obj.docstring.value)
