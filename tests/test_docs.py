"""The documentation: every Python example in it and in README.md runs, the API pages hold every public name, and the
site builds without a warning (where mkdocs is installed).

An HTML comment before an example says how it is run: `<!-- test: warns TEXT -->`, `<!-- test: torchrun N -->` (as a
script of N processes), `<!-- test: skip REASON -->`. Code that a reader need not see stands in `<!-- preamble ... -->`.
"""
from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import moduli_kernels as mk
from moduli_kernels.geometry.base import Manifold

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
EXAMPLE = re.compile(
    r"^<!-- preamble\n(?P<preamble>.*?)^-->$"
    r"|(?:^<!-- test: (?P<how>\w+) (?P<what>.*?) -->\n)?^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL)
ENVIRONMENT = {"NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}


class Example(NamedTuple):
    """A block of code, the line it begins at, and how it is run: "code", "preamble", or as a comment says."""

    code: str
    line: int
    how: str
    what: str | None


def examples(page: Path) -> list[Example]:
    text = page.read_text()
    found = []
    for match in EXAMPLE.finditer(text):
        part = "preamble" if match["preamble"] is not None else "code"
        line = text.count("\n", 0, match.start(part)) + 1
        found.append(Example(textwrap.dedent(match[part]), line, match["how"] or part, match["what"]))
    return found


WITH_CODE = [
    pytest.param(page, id=page.relative_to(DOCS).as_posix(), marks=[pytest.mark.slow] * any(
        example.how == "torchrun" for example in examples(page)))
    for page in PAGES if examples(page)
]


class ReadmeModel(nn.Module):
    """What README.md calls `model`."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(2, 16), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0][-1])


def readme_names() -> dict[str, Any]:
    """What README.md's examples take for granted."""
    model = ReadmeModel()
    return {"model": model, "optimizer": torch.optim.Adam(model.parameters()), "criterion": nn.MSELoss(), "epochs": 2,
            "batches": [(torch.rand(5, 3, 2), torch.rand(3, 1))], "points": mk.manifold("torus").sample(4096)}


def run(page: Path, names: dict[str, Any], folder: Path) -> None:
    """All examples of a page, one after another, with one namespace."""
    for code, line, how, what in examples(page):
        # Numbered as on the page, so that a traceback points there.
        compiled = compile("\n" * (line - 1) + code, str(page), "exec")
        if how == "warns":
            with pytest.warns(UserWarning, match=what):
                exec(compiled, names)
        elif how == "torchrun":
            torchrun(code, int(what), folder)
        elif how in ("code", "preamble"):
            exec(compiled, names)
        else:
            assert how == "skip" and what, f"{page}:{line}: an example is run, or skipped for a reason that is told"


def torchrun(code: str, processes: int, folder: Path) -> None:
    """Every process must come to the end of the script. What torch's gloo threads do after that is not looked at: they
    sometimes abort while the interpreter shuts down ("terminate called without an active exception")."""
    script = folder / "train.py"
    script.write_text(code + "import os; open(f'ended{os.environ[\"RANK\"]}', 'w').close()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", script]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    ended = [rank for rank in range(processes) if (folder / f"ended{rank}").exists()]
    assert ended == list(range(processes)), done.stdout + done.stderr


@pytest.fixture
def user(monkeypatch, tmp_path):
    """In a folder of their own, in a process that has not been warned yet and allows torch.compile what it does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Manifold, "warned", set())
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=False):
        yield tmp_path
    torch._dynamo.reset()


@pytest.mark.parametrize("page", WITH_CODE)
@pytest.mark.filterwarnings(  # torch's, on the way
    "ignore:Sparse CSR tensor support is in beta state", "ignore::DeprecationWarning:torch.*")
def test_examples_run(page, user):
    run(page, {"__name__": "docs"}, user)


def test_readme_runs(user):
    readme = ROOT / "README.md"
    assert examples(readme)
    run(readme, readme_names(), user)


def test_no_fence_of_python_is_overlooked():
    for page in (*PAGES, ROOT / "README.md"):
        shown = [example for example in examples(page) if example.how != "preamble"]
        assert len(shown) == len(re.findall("```py", page.read_text())), page


def documented() -> list[str]:
    pages = (DOCS / "api").glob("*.md")
    return [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]


def test_api_pages_hold_every_public_name():
    objects = []
    for name in documented():
        module, _, attribute = name.rpartition(".")
        objects.append(getattr(importlib.import_module(module), attribute))
    missing = [name for name in mk.__all__ if not any(getattr(mk, name) is each for each in objects)]
    assert missing == [], "add `::: moduli_kernels.NAME` to a page in docs/api"


def test_no_name_is_documented_twice():
    assert sorted(documented()) == sorted(set(documented()))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` builds it. Warnings, which --strict makes failures, are: a link or an entry of the
    navigation that leads nowhere, and a page that is not in the navigation."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python", "matplotlib"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_site_builds_with_every_page_and_picture(site):
    for page in PAGES:
        assert (site / page.relative_to(DOCS).with_suffix(".html")).is_file()
    for page in PAGES:
        for picture in re.findall(r"!\[[^]]*\]\((\S+)\)", page.read_text()):
            path = site / page.parent.relative_to(DOCS) / picture
            assert path.read_bytes().startswith(b"\x89PNG"), picture


@pytest.mark.slow
def test_site_has_every_public_name(site):
    text = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    for name in mk.__all__:
        assert re.search(rf'id="moduli_kernels\.(\w+\.)?{name}"', text), name


@pytest.mark.slow
def test_site_needs_no_network(site):
    """Nothing is fetched when a page is viewed: scripts, styles, fonts and pictures lie beside it."""
    fetched = re.compile(r'<(?:script|img|link)\b[^>]*?\b(?:src|href)="?(https?://[^\s">]+)')
    for page in site.rglob("*.html"):
        assert fetched.findall(page.read_text()) == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import\s*)[\"']?https?://", style.read_text()), style


@pytest.mark.slow
def test_docstrings_are_read_as_plain_text(site):
    """docs/docstrings.py: products are no emphasis, and nothing shows that they were kept from it."""
    text = {page.stem: page.read_text() for page in (site / "api").glob("*.html")}
    assert "(blocks*R, C), or (R, C, *kernel)" in text["penalty"]
    assert "<code>**settings</code>" in text["regularizers"]
    for name, page in text.items():
        assert not re.search(r"\\[*&<]|&amp;lt;", page), name


@pytest.mark.slow
def test_reports_are_read_from_the_repository(site):
    text = (site / "measured.html").read_text()
    reports = list((ROOT / "benchmarks" / "results").glob("*/report*.md"))
    assert reports
    for report in reports:
        assert report.relative_to(ROOT).as_posix() in text
        commit = re.search(r"commit (\w+)", report.read_text())
        assert commit and commit[0] in text
    text = (site / "tables.html").read_text()
    for table in (ROOT / "examples" / "results" / "tables").glob("*.md"):
        assert table.relative_to(ROOT).as_posix() in text


@pytest.mark.slow
def test_no_source_of_this_machine_is_in_the_site(site):
    for page in site.rglob("*.html"):
        assert str(ROOT) not in page.read_text(), page
