"""Builds the documentation into build/site: `make docs`, or `python -m docs.build`.

First the site's sources are put together in build/docs; then zensical turns them into HTML, where a warning is an
error; then every link of the result is followed. Nothing is kept twice in the repository: pictures are drawn or copied,
README files and records are read where they are, and the API pages list what the package exports.

A page in docs/ is Markdown, with three additions:

    <!-- include: PATTERN -->      every file of the repository that matches, folded; its picture stands before it
    <!-- sections: PATTERN -->     the same, each with its own heading
    <!-- api: every NAME -->       the reference of every exported subclass of the class moduli_kernels.NAME
    <!-- api: table -->            a table of all exported names, with links to their pages

and a picture may be linked by its path in the repository, outside docs/: it is copied.
"""
from __future__ import annotations

import argparse
import inspect
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import moduli_kernels as mk

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
ELSEWHERE = {  # page of the site -> file of the repository that it shows
    "examples.md": "examples/README.md",
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
INCLUDE = re.compile(r"^<!-- (include|sections): (\S+) -->$", re.MULTILINE)
EVERY = re.compile(r"^<!-- api: every (\w+) -->$", re.MULTILINE)
TABLE = "<!-- api: table -->"
REFERENCE = re.compile(r"^::: moduli_kernels\.(\w+)$", re.MULTILINE)
PICTURE = re.compile(r"(!\[[^\]]*\]\()([^)\s]+)(\))")
NUMBER = re.compile(r"\d+")
SENTENCE = re.compile(r".*?(?<!\beq)(?<!App)(?<!Fig)\.(?= |$)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


# --- pages ------------------------------------------------------------------------------------------------------

def sources() -> dict[str, Path]:
    """Which file each page of the site is written in: the pages of docs/, and those of ELSEWHERE."""
    pages = {page.relative_to(DOCS).as_posix(): page for page in sorted(DOCS.rglob("*.md"))}
    return pages | {page: ROOT / source for page, source in ELSEWHERE.items()}


def texts() -> dict[str, str]:
    """The Markdown text of each page, with everything that stands in the place of a comment."""
    pages = {page: with_references(with_files(file.read_text(), file)) for page, file in sources().items()}
    pages["api/index.md"] = pages["api/index.md"].replace(TABLE, name_table(pages))
    return pages


def assemble(target: Path) -> None:
    """Writes all sources of the site, pages and pictures, into the empty folder `target`."""
    from docs import pictures  # imports matplotlib

    for page, text in texts().items():
        write(target / page, with_pictures(text, page, target))
    for name in pictures.PICTURES:
        write(target / "pictures" / f"{name}.png", pictures.png(name))
    shutil.copytree(DOCS / "assets", target / "assets")


def write(path: Path, content: str | bytes) -> None:
    """Writes a file, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def with_files(text: str, page: Path) -> str:
    """The page with files in the place of `<!-- include: PATTERN -->` and `<!-- sections: PATTERN -->`."""
    def files(match: re.Match[str]) -> str:
        found = sorted(ROOT.glob(match[2]), key=lambda path: NUMBER.sub(lambda number: number[0].zfill(9), str(path)))
        if not found:
            raise SystemExit(f"{page}: no file matches {match[2]}; correct the page")
        return "\n\n".join(folded(path, page, match[1] == "sections") for path in found)
    return INCLUDE.sub(files, text)


def folded(path: Path, page: Path, section: bool) -> str:
    """A Markdown file as a block that opens at a click, after the picture of the same name if there is one.

    If `section`, the file's title becomes a heading of the page.
    """
    source = path.relative_to(ROOT).as_posix()
    text = path.read_text()
    title = text.split("\n")[0].removeprefix("# ")
    body = HEADING.sub(r"**\1**", text)  # bold, so that the page's table of contents stays short
    block = "\n".join("    " + line if line else "" for line in body.splitlines())
    picture = path.with_suffix(".png")
    shown = f"![Figures of {source}]({os.path.relpath(picture, page.parent)})\n\n" if picture.exists() else ""
    heading = f"## {title[:1].upper()}{title[1:]}\n\n" if section else ""
    return f'{heading}{shown}??? note "The numbers: {source}"\n\n{block}'


def with_pictures(text: str, page: str, target: Path) -> str:
    """The page with links to copies, in `target`/files, of the pictures that are outside docs/."""
    folder = sources()[page].parent

    def link(match: re.Match[str]) -> str:
        picture = (folder / match[2]).resolve()
        if not picture.is_file():
            return match[0]  # a picture that is drawn, or a link that `mistakes` will find
        copy = Path("files") / picture.relative_to(ROOT)
        write(target / copy, picture.read_bytes())
        return f"{match[1]}{'../' * page.count('/')}{copy.as_posix()}{match[3]}"
    return PICTURE.sub(link, text)


# --- the API ----------------------------------------------------------------------------------------------------

def exported_kinds(base: str) -> list[str]:
    """The names of the exported subclasses of moduli_kernels.`base`, and of that class, which comes last."""
    kind = getattr(mk, base)
    found = [name for name in mk.__all__ if inspect.isclass(getattr(mk, name)) and issubclass(getattr(mk, name), kind)]
    return sorted(found, key=lambda name: (name == base, name))


def with_references(text: str) -> str:
    """The page with a line `::: NAME` for every exported kind, and with names that a module bears too made clear."""
    text = EVERY.sub(lambda match: "\n\n".join(f"::: moduli_kernels.{name}" for name in exported_kinds(match[1])), text)
    return REFERENCE.sub(lambda match: f"::: {full_name(match[1])}", text)


def full_name(name: str) -> str:
    """What mkdocstrings calls an exported object: `env_report.env_report` where a module has the same name."""
    module = f"moduli_kernels.{name}"
    return f"{module}.{name}" if module in sys.modules and not inspect.ismodule(getattr(mk, name)) else module


def name_table(pages: dict[str, str]) -> str:
    """A table of all exported names, each with a link to its reference and the first sentence of its docstring.

    The references of names that no page has follow the table.
    """
    page_of = {name: page for page, text in pages.items() if page.startswith("api/")
               for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
    rows = ["| name | what it is |", "| --- | --- |"]
    missing = []
    for name in mk.__all__:
        if name.startswith("__"):
            continue
        page = page_of.get(full_name(name))
        if page is None:
            missing.append(name)
            page = "api/index.md"
        rows.append(f"| [`mk.{name}`]({page.removeprefix('api/')}#{full_name(name)}) | {first_sentence(name)} |")
    rows += [f"\n::: {full_name(name)}" for name in missing]
    return "\n".join(rows)


def first_sentence(name: str) -> str:
    """The first sentence of an exported object's docstring, as a cell of a Markdown table."""
    words = " ".join((inspect.getdoc(getattr(mk, name)) or "").split("\n\n")[0].split())
    sentence = SENTENCE.match(words)
    return (sentence[0] if sentence else words).rstrip(".:").replace("|", "\\|").replace("*", "\\*")


# --- the site ---------------------------------------------------------------------------------------------------

class Links(HTMLParser):
    """What a page links to, and the places in it that can be linked to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.page = page
        self.targets: list[tuple[str, Path, str]] = []  # as written, the file, the place in it
        self.places: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by the parser for each tag."""
        for name, value in attrs:
            if name == "id" and value:
                self.places.add(value)
            parts = urlsplit(value or "")
            if name in ("href", "src") and value and not (parts.scheme or parts.netloc):
                file = (self.page.parent / unquote(parts.path)).resolve() if parts.path else self.page
                self.targets.append((value, file, unquote(parts.fragment)))


def mistakes(site: Path) -> list[str]:
    """A line for each link within the site that leads nowhere, and for each page that the navigation lacks.

    zensical finds such links between Markdown pages only, not those to pictures, in HTML, or in the navigation.
    """
    site = site.resolve()
    pages = {page: Links(page) for page in site.rglob("*.html") if page.name != "404.html"}
    in_navigation = {file for _, file, _ in pages[site / "index.html"].targets}
    found = [f"{page.relative_to(site)} is not in docs/zensical.toml's nav" for page in pages.keys() - in_navigation]
    for page, links in pages.items():
        for link, file, place in links.targets:
            if not file.is_file() or (place and file in pages and place not in pages[file].places):
                found.append(f"{page.relative_to(site)} links to {link}, which does not exist")
    return sorted(set(found))


def build(folder: Path) -> Path:
    """Builds the site in `folder`/site and returns that path. Raises SystemExit where a page or a link is wrong."""
    if find_spec("zensical") is None:
        raise SystemExit("the documentation needs zensical, which needs Python 3.11 or newer: pip install -e '.[docs]'")
    for part in ("docs", "site"):
        shutil.rmtree(folder / part, ignore_errors=True)
    assemble(folder / "docs")
    config = folder / "zensical.toml"
    shutil.copyfile(DOCS / "zensical.toml", config)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "-f", str(config)]
    environment = {**os.environ, "NO_COLOR": "1"}
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        raise SystemExit("zensical has found what its warnings above say; correct the pages in docs/")
    found = mistakes(folder / "site")
    if found:
        raise SystemExit("\n".join(found))
    return folder / "site"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m docs.build", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build", help="where to build (default: build)")
    print(f"Open {build(parser.parse_args().folder.resolve()) / 'index.html'}")
