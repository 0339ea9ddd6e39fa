"""The documentation: every Python example in it and in README.md runs, the API pages hold every public name, and the
site builds without a warning, works without network and opens from disk (where zensical is installed).

An HTML comment before an example says how it is run: `<!-- test: warns TEXT -->`, `<!-- test: torchrun N -->` (as a
script of N processes), `<!-- test: skip REASON -->`. Code that a reader need not see stands in `<!-- preamble ... -->`.
"""
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import moduli_kernels as mk
from docs import build

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
EXAMPLE = re.compile(
    r"^<!-- preamble\n(?P<preamble>.*?)^-->$"
    r"|(?:^<!-- test: (?P<how>\w+) (?P<what>.*?) -->\n)?^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL)
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
REFERENCE = re.compile(r"^::: (\S+)$", re.MULTILINE)


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
            assert how == "skip" and what, f"{page}:{line}: an example runs, or a comment says why it is skipped"


def torchrun(code: str, processes: int, folder: Path) -> None:
    """Every process must reach the end of the script. Exit statuses do not count: torch's gloo threads sometimes abort
    while the interpreter shuts down ("terminate called without an active exception")."""
    script = folder / "train.py"
    script.write_text(code + "import os; open(f'ended{os.environ[\"RANK\"]}', 'w').close()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", script]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    ended = [rank for rank in range(processes) if (folder / f"ended{rank}").exists()]
    assert ended == list(range(processes)), done.stdout + done.stderr


@pytest.fixture
def user(monkeypatch, tmp_path):
    """A user in an empty folder, whose process has given no warning yet and has torch.compile's default settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mk.Manifold, "warned", set())
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


def references() -> dict[str, list[str]]:
    """The names on each API page, as the site has them."""
    return {page: REFERENCE.findall(text) for page, text in build.texts().items() if page.startswith("api/")}


def documented() -> list[str]:
    return [name for names in references().values() for name in names]


def test_api_pages_hold_every_public_name():
    assert {build.full_name(name) for name in mk.__all__} <= set(documented())


def test_no_name_is_documented_twice():
    assert sorted(documented()) == sorted(set(documented()))


def test_new_names_are_documented_without_a_line_in_docs(monkeypatch):
    class Cone(mk.Manifold):
        """A cone."""

    class Hill(mk.Inhibitor):
        """A hill."""

    def unfold():
        """Unfolds a cone. Carefully."""

    for new in (Cone, Hill, unfold):
        monkeypatch.setattr(mk, new.__name__, new, raising=False)
        monkeypatch.setattr(mk, "__all__", [*mk.__all__, new.__name__])
    pages = references()
    assert "moduli_kernels.Cone" in pages["api/manifolds.md"]
    assert pages["api/manifolds.md"][-1] == "moduli_kernels.Manifold"  # the base class comes last
    assert "moduli_kernels.Hill" in pages["api/inhibitors.md"]
    assert "moduli_kernels.unfold" in pages["api/index.md"]
    table = build.texts()["api/index.md"]
    assert "| [`mk.Cone`](manifolds.md#moduli_kernels.Cone) | A cone |" in table
    assert "| [`mk.unfold`](index.md#moduli_kernels.unfold) | Unfolds a cone |" in table


def test_first_sentences_do_not_end_at_abbreviations(monkeypatch):
    def cited():
        """The cost f (paper, App. E, eq. 7): it grows. It is the default."""

    monkeypatch.setattr(mk, "cited", cited, raising=False)
    assert build.first_sentence("cited") == "The cost f (paper, App. E, eq. 7): it grows"


def test_files_that_are_included_follow_their_pictures_and_are_folded():
    tables = build.texts()["tables.md"]
    found = list((ROOT / "examples" / "results" / "tables").glob("*.md"))
    assert found
    for table in found:
        source = table.relative_to(ROOT).as_posix()
        picture = tables.index(f"](../{source.removesuffix('.md')}.png)")
        assert tables.rindex("## ", 0, picture) < picture < tables.index(f'??? note "The numbers: {source}"')
    assert not re.search(r"^\|", tables, re.MULTILINE)  # tables are indented, as what opens at a click is
    assert tables.index("Table 9:") < tables.index("Table 10:")


def test_an_include_without_files_is_an_error():
    with pytest.raises(SystemExit, match="no file matches examples/nothing"):
        build.with_files("<!-- include: examples/nothing*.md -->", DOCS / "index.md")


def test_formulas_become_mathml_and_code_stays_as_it_is():
    markdown = pytest.importorskip("markdown")
    pytest.importorskip("latex2mathml")
    text = "A $w_{jk}$ and `$w_1$`, `$(PYTHON)`, 5 $ and 6 $.\n\n$$\\sum_j \\lvert w_j \\rvert$$\n\n    $x$\n"
    html = markdown.markdown(text, extensions=["docs.formulas"])
    assert html.count("<math") == 2 and html.count('display="block"') == 1
    assert 'alttext="w_{jk}"' in html and "<msub><mi>w</mi>" in html
    for code in ("<code>$w_1$</code>", "<code>$(PYTHON)</code>", "5 $ and 6 $", "<code>$x$"):
        assert code in html


def test_mistakes_of_a_site_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<h1 id="top">A</h1><a href="#top">up</a><a href="https://example.org/x">out</a>')
    (tmp_path / "lost.html").write_text("<p>Nobody links here.</p>")
    (tmp_path / "index.html").write_text(
        '<a href="index.html">home</a><a href="a.html#top">A</a><a href="a.html#nowhere">A</a><img src="no.png">'
        '<a href="gone.html">gone</a>')
    assert build.mistakes(tmp_path) == [
        "index.html links to a.html#nowhere, which does not exist",
        "index.html links to gone.html, which does not exist",
        "index.html links to no.png, which does not exist",
        "lost.html is not in docs/zensical.toml's nav",
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the site was built, as `make docs` builds it: the pages are in docs/, the HTML in site/."""
    for package in ("zensical", "latex2mathml", "mkdocstrings_handlers.python", "matplotlib"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("documentation")
    command = [sys.executable, "-m", "docs.build", "--folder", str(folder)]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def site(folder):
    return folder / "site"


@pytest.mark.slow
def test_site_builds_with_every_page_and_picture(folder, site):
    pages = sorted((folder / "docs").rglob("*.md"))
    assert {page.relative_to(DOCS) for page in PAGES} < {page.relative_to(folder / "docs") for page in pages}
    pictures = 0
    for page in pages:
        html = (site / page.relative_to(folder / "docs")).with_suffix(".html")
        assert html.is_file()
        for picture in re.findall(r"!\[[^]]*\]\((\S+)\)", page.read_text()):
            assert (html.parent / picture).read_bytes().startswith(b"\x89PNG"), picture
            pictures += 1
    assert pictures > 25


@pytest.mark.slow
def test_pictures_of_results_are_on_the_site(site):
    shown = {path.relative_to(site / "files").as_posix() for path in (site / "files").rglob("*.png")}
    results = ROOT / "examples" / "results"
    wanted = [*(results / "paper_figures").glob("*.png"), *(results / "tables").glob("*.png"),
              *(ROOT / "benchmarks" / "results").glob("*/penalty.png"), ROOT / "benchmarks" / "masks" / "masks.png"]
    assert len(wanted) > 10 and {path.relative_to(ROOT).as_posix() for path in wanted} <= shown


@pytest.mark.slow
def test_formulas_are_rendered(site):
    theory = (site / "theory.html").read_text()
    assert theory.count("<math") > 30 and "$" not in re.sub(r"<(script|style)\b.*?</\1>", "", theory, flags=re.DOTALL)


@pytest.mark.slow
def test_search_works_from_disk(site):
    """A browser fetches nothing from disk and starts no Worker there: the index is a script, and so is its stand-in."""
    index = (site / "search.js").read_text()
    found = json.loads(re.sub(r"^[^=]*=|;\s*$", "", index))
    assert any("Klein bottle" in item["text"] for item in found["items"])
    for page in site.rglob("*.html"):
        text = page.read_text()
        shim, bundle = text.index("assets/iframe-worker.js"), text.index("assets/javascripts/bundle")
        assert shim < bundle, page  # the bundle makes the worker
    assert 'location.protocol === "file:"' in (site / "assets" / "iframe-worker.js").read_text()


SEARCH = """<script>
function* elements(root) {
  for (const element of root.querySelectorAll("*")) {
    yield element;
    if (element.shadowRoot) yield* elements(element.shadowRoot);
  }
}
setTimeout(() => document.querySelector(".md-search__button").click(), 500);
setTimeout(() => {
  const input = [...elements(document)].find(element => element.tagName === "INPUT" && element.type === "text");
  input.value = "Klein bottle";
  input.dispatchEvent(new Event("input", { bubbles: true, composed: true }));
}, 1500);
setTimeout(() => {
  const lists = [...elements(document)].filter(element => element.tagName === "OL");
  document.title = lists.map(list => list.innerText).join();
}, 4000);
</script>"""


@pytest.mark.slow
def test_a_browser_finds_words_from_disk(folder, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium or google-chrome")
    site = shutil.copytree(folder / "site", tmp_path / "site")
    for page in (site / "index.html", site / "guides" / "speed.html"):
        page.write_text(page.read_text() + SEARCH)
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
                   "--virtual-time-budget=10000", "--dump-dom", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
        assert title and "Klein bottle" in title[1] and "plot_connections" in title[1], done.stderr


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
    assert "(blocks*R, C), or (blocks*R, C, *kernel)" in text["penalty"]
    assert "<code>*manifolds</code>" in text["manifolds"]
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
