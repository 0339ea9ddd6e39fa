r"""Formulas of the documentation: `$...$` in a line and `$$...$$` as a paragraph, in LaTeX.

This Markdown extension turns them into MathML, which browsers draw without scripts, fonts or network. GitHub renders
the same notation. Write \lvert and \rvert for bars: a `|` would end the cell of a table.
"""
from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from markdown.util import AtomicString

FORMULA = r"(?<!\\)(\$\$?)(?=\S)(.+?)(?<=\S)\1"
BELOW_CODE = 185  # the priority: code spans (190) are taken out first, escapes such as \{ (180) come later


class Formula(InlineProcessor):
    """Replaces one formula by its <math> element."""

    def handleMatch(self, match: re.Match[str], data: str) -> tuple[ElementTree.Element, int, int]:
        """The element, and where in `data` the formula begins and ends."""
        latex = match[2].strip()
        math = ElementTree.fromstring(convert(latex, display="block" if match[1] == "$$" else "inline"))
        for element in math.iter():
            element.tag = element.tag.partition("}")[2] or element.tag  # without the namespace: HTML knows <math>
            if element.text in ("|", "\u2016"):
                element.attrib.update(lspace="0", rspace="0")  # a bar, not an operator between two things
            if element.text:
                element.text = AtomicString(element.text)  # Markdown must not look for emphasis in it
        math.set("alttext", latex)
        return math, match.start(), match.end()


class Formulas(Extension):
    """Registers `Formula`."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Called by Markdown."""
        md.inlinePatterns.register(Formula(FORMULA, md), "formula", BELOW_CODE)


def makeExtension(**settings: Any) -> Formulas:
    """The entry point that Markdown looks for."""
    return Formulas(**settings)
