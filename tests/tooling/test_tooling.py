"""What surrounds the code: the citation, the workflows, the issue templates, `make lint`, and words no file says."""
from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

import moduli_kernels as mk

yaml = pytest.importorskip("yaml")

ROOT = pathlib.Path(__file__).resolve().parents[2]
if not (ROOT / ".github").is_dir():
    pytest.skip("a source archive has no workflows", allow_module_level=True)

# The hosts of package registries, in pieces, because this file is searched too.
HOSTS = ["pypi" + ".org", "python" + "hosted.org", "pytorch" + ".org/whl", "anaconda" + ".org", "npmjs" + ".org"]
TEXT = {".py", ".sh", ".md", ".yml", ".yaml", ".toml", ".cff", ".json", ".h", ".cpp", ".cu", ".txt", ".in", ""}


def tracked() -> list[pathlib.Path]:
    """Returns the files of the repository, including those that are not committed yet."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a repository")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def load(path: str):
    return yaml.safe_load((ROOT / path).read_text())


def steps_of(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


# --- citation -------------------------------------------------------------------------------------------------

def test_the_citation_names_this_version_and_the_paper():
    citation = load("CITATION.cff")
    assert str(citation["version"]) == mk.__version__
    assert citation["license"] == "BSD-3-Clause" and citation["type"] == "software"
    [paper] = citation["references"]
    families = [author["family-names"] for author in paper["authors"]]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert ", ".join(families) in readme and paper["title"] in readme and paper["url"] in readme


# --- workflows ------------------------------------------------------------------------------------------------

WORKFLOWS = sorted(path.name for path in (ROOT / ".github" / "workflows").glob("*.y*ml"))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_call_commands_that_exist(name):
    workflow = load(f".github/workflows/{name}")
    assert workflow["name"] and (True in workflow or "on" in workflow)  # YAML reads the key `on` as true
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for step in steps_of(workflow):
        assert ("run" in step) != ("uses" in step)
        for target in re.findall(r"^\s*make ([\w-]+)", step.get("run", ""), re.MULTILINE):
            assert target in targets, f"{name} calls make {target}, which the Makefile does not have"
    for job in workflow["jobs"].values():
        assert job["runs-on"] and set(job.get("permissions", {})) <= {"id-token", "contents"}


def test_the_suite_runs_as_a_newcomer_runs_it_everywhere():
    suite = load(".github/workflows/tests.yml")["jobs"]["suite"]
    assert "make test" in [step.get("run") for step in suite["steps"]]
    assert "make test" in (ROOT / "README.md").read_text() and "make test" in (ROOT / ".ci" / "run").read_text()
    matrix = suite["strategy"]["matrix"]
    assert {system.split("-")[0] for system in matrix["os"]} == {"ubuntu", "macos"}
    least = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text()).group(1)
    assert least == matrix["python"][0]


def test_only_a_tag_publishes_and_no_password_is_kept():
    release = load(".github/workflows/release.yml")
    assert release["jobs"]["publish"]["if"] == "github.ref_type == 'tag'"
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert set(release["jobs"]["publish"]["needs"]) == set(release["jobs"]) - {"publish"}
    for name in WORKFLOWS:
        assert "secrets." not in (ROOT / ".github" / "workflows" / name).read_text()


# --- issue templates ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, required", [("bug", True), ("speed", True), ("wish", False)])
def test_issue_templates_ask_for_the_report(name, required):
    template = load(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert template["name"] and template["description"]
    fields = {field["id"]: field for field in template["body"]}
    assert len(fields) == len(template["body"])
    assert "`python -m moduli_kernels.env_report`" in fields["report"]["attributes"]["label"]
    assert fields["report"].get("validations", {}).get("required", False) is required


# --- make lint ------------------------------------------------------------------------------------------------

def hooks_of(stage: str) -> dict[str, dict]:
    """Returns the hooks of pre-commit that run in a stage, by their ids."""
    [repository] = load(".pre-commit-config.yaml")["repos"]
    default = load(".pre-commit-config.yaml")["default_stages"]
    return {hook["id"]: hook for hook in repository["hooks"] if stage in hook.get("stages", default)}


def test_lint_needs_no_network_and_fixes_only_where_it_is_asked():
    [repository] = load(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local" and {hook["language"] for hook in repository["hooks"]} == {"system"}
    checks, fixes = hooks_of("pre-commit"), hooks_of("manual")
    assert {name.removesuffix("-fix") for name in fixes} == set(checks)
    assert {name for name in fixes if name not in checks} == {"ruff-fix", "clang-format-fix"}
    assert not any("--fix" in hook["entry"] or "--force " in hook["entry"] for hook in checks.values())
    makefile = (ROOT / "Makefile").read_text()
    assert "-m pre_commit run --all-files" in makefile and "--hook-stage manual" in makefile


def test_lint_advises_to_split_long_files_and_does_not_fail(tmp_path):
    long, short = tmp_path / "long.py", tmp_path / "short.py"
    long.write_text("x = 1\n" * 301), short.write_text("x = 1\n" * 300)
    hook = hooks_of("pre-commit")["long-files"]
    command = [sys.executable, ROOT / hook["entry"].split()[1], short, long]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{long} has 301 lines, which is more than 300; consider splitting it\n"
    assert hook["verbose"]  # or else pre-commit would not show what a hook prints that passes


# --- files ----------------------------------------------------------------------------------------------------

def test_no_file_names_the_host_of_a_registry():
    found = []
    for path in tracked():
        if path.suffix in TEXT and "results" not in path.parts:
            text = path.read_text(errors="ignore")
            found += [f"{path.relative_to(ROOT)}: {host}" for host in HOSTS if host in text]
    assert found == []
