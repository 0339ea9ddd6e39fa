"""What `mkdocs build` adds to docs/: pictures drawn by the package, and pages that live elsewhere in the repository.

Nothing here is committed twice: READMEs and records of benchmarks are read where they are.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # `mkdocs build` does not put it there, `python -m mkdocs build` does
    sys.path.insert(0, str(ROOT))

PAGES = {  # page of the site -> file of the repository
    "examples.md": "examples/README.md",
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)  # a pattern of files, from the repository's root
NUMBER = re.compile(r"\d+")  # table-10 comes after table-9
HEADING = re.compile(r"^(#+ )", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pictures and the pages from elsewhere."""
    from docs import pictures  # imports torch and matplotlib

    for name in pictures.PICTURES:
        files.append(File.generated(config, f"pictures/{name}.png", content=pictures.png(name)))
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts files in the place of `<!-- include: PATTERN -->`, with headings two levels down."""
    return INCLUDE.sub(lambda match: included(match[1], page.file.src_uri), markdown)


def included(pattern: str, page: str) -> str:
    """All files that match, one after another, each after its path."""
    found = sorted(ROOT.glob(pattern), key=lambda path: NUMBER.sub(lambda match: match[0].zfill(9), path.as_posix()))
    if not found:
        raise PluginError(f"{page} includes {pattern}, of which there is no file; correct the page.")
    return "\n\n".join(f"*From `{path.relative_to(ROOT).as_posix()}`:*\n\n{deeper(path.read_text())}" for path in found)


def deeper(markdown: str) -> str:
    """Headings two levels down, so that they fit under a page's second level."""
    return HEADING.sub(r"##\1", markdown)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Rebuilds while serving when a page from elsewhere changes."""
    config.watch += [str(ROOT / source) for source in PAGES.values()]
    return config
