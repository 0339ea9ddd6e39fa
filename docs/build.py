"""Builds the documentation into build/site: `make docs`, or `python -m docs.build`.

First the site's sources are put together in build/docs; then zensical turns them into HTML, where a warning is an
error; then every link of the result is followed. Nothing is kept twice in the repository: pictures are drawn or copied,
README files and records are read where they are, and the API pages list what the package exports.

A page in docs/ is Markdown, with three additions:

    <!-- include: PATTERN -->      every file of the repository that matches, folded; its picture stands before it
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
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
EVERY = re.compile(r"^<!-- api: every (\w+) -->$", re.MULTILINE)
TABLE = "<!-- api: table -->"
REFERENCE = re.compile(r"^::: moduli_kernels\.(\w+)$", re.MULTILINE)
PICTURE = re.compile(r"(!\[[^\]]*\]\()([^)\s]+)(\))")
NUMBER = re.compile(r"\d+")
SENTENCE = re.compile(r".*?(?<!\beq)(?<!App)(?<!Fig)[.:](?= |$)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


# --- pages ------------------------------------------------------------------------------------------------------

def assemble(target: Path) -> None:
    """Writes all sources of the site, pages and pictures, into the empty folder `target`."""
    from docs import pictures  # imports matplotlib

    sources = {page.relative_to(DOCS).as_posix(): page for page in DOCS.rglob("*.md")}
    sources |= {page: ROOT / source for page, source in ELSEWHERE.items()}
    texts = {page: with_references(with_files(source.read_text(), source)) for page, source in sources.items()}
    texts["api/index.md"] = texts["api/index.md"].replace(TABLE, name_table(texts))
    for page, text in texts.items():
        depth = page.count("/")
        write(target / page, with_pictures(text, sources[page], target, depth))
    for name in pictures.PICTURES:
        write(target / "pictures" / f"{name}.png", pictures.png(name))
    shutil.copytree(DOCS / "assets", target / "assets")


def write(path: Path, content: str | bytes) -> None:
    """Writes a file, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def with_files(text: str, page: Path) -> str:
    """The page with files in the place of `<!-- include: PATTERN -->`."""
    def files(match: re.Match[str]) -> str:
        found = sorted(ROOT.glob(match[1]), key=lambda path: NUMBER.sub(lambda number: number[0].zfill(9), str(path)))
        if not found:
            raise SystemExit(f"{page}: no file matches {match[1]}; correct the page")
        return "\n\n".join(folded(path, page) for path in found)
    return INCLUDE.sub(files, text)


def folded(path: Path, page: Path) -> str:
    """A Markdown file as a block that opens at a click, after the picture of the same name if there is one."""
    source = path.relative_to(ROOT).as_posix()
    body = HEADING.sub(r"**\1**", path.read_text())  # bold, so that the page's table of contents stays short
    block = "\n".join("    " + line if line else "" for line in body.splitlines())
    picture = path.with_suffix(".png")
    shown = f"![Figures of {source}]({os.path.relpath(picture, page.parent)})\n\n" if picture.exists() else ""
    return f'{shown}??? note "The figures: {source}"\n\n{block}'


def with_pictures(text: str, source: Path, target: Path, depth: int) -> str:
    """The page with every picture from outside docs/ copied into `target`/files, and the links changed to these copies."""
    def link(match: re.Match[str]) -> str:
        picture = (source.parent / match[2]).resolve()
        if "://" in match[2] or not picture.is_file():
            return match[0]  # a generated picture, or a link that the build will complain about
        copy = Path("files") / picture.relative_to(ROOT)
        write(target / copy, picture.read_bytes())
        return f"{match[1]}{'../' * depth}{copy.as_posix()}{match[3]}"
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
    """What mkdocstrings calls an exported object: `moduli_kernels.env_report` alone would be the module."""
    module = f"moduli_kernels.{name}"
    return f"{module}.{name}" if module in sys.modules and not inspect.ismodule(getattr(mk, name)) else module


def name_table(texts: dict[str, str]) -> str:
    """A table of all exported names: a link to the page that has it, and the first sentence of its docstring."""
    pages = {name: page for page, text in texts.items() if page.startswith("api/")
             for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
    rows = ["| name | what it is |", "| --- | --- |"]
    missing = []
    for name in mk.__all__:
        if name.startswith("__"):
            continue
        page = pages.get(full_name(name))
        if page is None:
            missing.append(name)
            continue
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
        self.targets: list[str] = []
        self.places: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by the parser for each tag."""
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.targets.append(value)
            elif name == "id" and value:
                self.places.add(value)


def broken_links(site: Path) -> list[str]:
    """A line for each link within the site that leads to no file, or to no place in its page."""
    pages = {page.resolve(): Links(page) for page in site.rglob("*.html") if page.name != "404.html"}
    broken = []
    for page, links in pages.items():
        for link in links.targets:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            known = pages.get(file)
            if not file.is_file() or (parts.fragment and known and unquote(parts.fragment) not in known.places):
                broken.append(f"{page.relative_to(site.resolve())}: {link}")
    return sorted(set(broken))


def build(folder: Path) -> Path:
    """Builds the site in `folder`/site and returns that path. Raises SystemExit where a page or a link is wrong."""
    for part in ("docs", "site"):
        shutil.rmtree(folder / part, ignore_errors=True)
    assemble(folder / "docs")
    config = folder / "zensical.toml"
    shutil.copyfile(DOCS / "zensical.toml", config)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "-f", str(config)]
    environment = {**os.environ, "NO_COLOR": "1"}
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        raise SystemExit("zensical has found what its warnings above say; correct the pages in docs/")
    broken = broken_links(folder / "site")
    if broken:
        raise SystemExit("links that lead nowhere:\n" + "\n".join(broken))
    return folder / "site"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m docs.build", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build", help="where to build (default: build)")
    print(f"Open {build(parser.parse_args().folder.resolve()) / 'index.html'}")
