"""The demo: table, pictures and record agree, processes end with it, and it picks up where it stopped."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import moduli_kernels as mk

for needed in ("safetensors", "matplotlib", "psutil", "rich"):
    pytest.importorskip(needed)

import psutil  # noqa: E402

from examples import demo  # noqa: E402
from examples.paper import demo_report  # noqa: E402
from examples.training import workers  # noqa: E402
from examples.training.config import Config, Result  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TINY = demo.Mode(
    "minute size, to test the machinery",
    {"lr": 1e-3, "strength": 0.1, "batches": 4, "schedule": [0.0, 0.9],
     "options": {"hidden": 16, "landmarks": 24, "steps": 4, "batch": 6}},
    (0.0, 0.9), nets=("torus", "none"),
)
TINY_ADDING = demo.Mode(
    "minute size, to test the machinery",
    {"lr": 1e-3, "strength": 1e-3, "batches": 4, "schedule": mk.linear_schedule(0.95, 2, hold=1),
     "frozen_epochs": 1, "clip": 0.5, "options": {"hidden": 12, "steps": 5, "batch": 6, "tests": 40}},
    (0.0, 0.95), nets=("torus_trained",), seeds=(0, 1),
)


def run(tmp_path, task, mode, **options):
    folders = {"runs": tmp_path / "runs", "results": tmp_path / "results"}
    return demo.run(task, "quick", mode, device="cpu", **folders, **options)


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_table_pictures_and_record_agree(tmp_path, capsys):
    folder = run(tmp_path, "navigation", TINY)
    printed = capsys.readouterr().out
    record = json.loads((folder / "record.json").read_text())

    assert [r["config"]["net"] for r in record["runs"]] == ["torus", "none"]
    for row, each in zip(record["summary"], record["runs"], strict=True):
        first, last = each["history"]
        assert [first["sparsity"], last["sparsity"]] == [0.0, 0.9]
        assert row["errors"] == {"0 %": [first["error"], None], "90 %": [last["error"], None]}
        assert row["density"] == [last["density"], None]
        assert row["minutes"] == [each["seconds"] / 60, None] and row["peak_mib"] == each["peak_mib"] > 0
        shown = rf"^{row['net']} +{first['error']:.1f} +{last['error']:.1f} +{100 * last['density']:.2f} +"
        assert re.search(shown, printed, re.MULTILINE)
        environment = each["environment"]
        assert environment["versions"]["torch"] and environment["device"] and "commit" in environment
        assert each["config"]["seed"] == 0 and not each["collapsed"]
    assert "4.67 ± 0.07" in printed and "full size" in printed and "paper, Table 1" in printed
    assert "One seed (0): differences between nets may be chance." in printed
    assert "staying at the start" in printed

    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == ["connections.png", "curves.png", "distance.png", "paths.png", "weights.png"]
    from matplotlib.image import imread

    for name in pictures:
        image = imread(folder / name)
        assert image.shape[0] > 300 and image.shape[1] > 300 and image[..., :3].std() > 0.05
        assert str(folder / name) in printed
    assert str(folder / "record.json") in printed


def test_adding_over_seeds_and_a_second_call_reuses_what_is_trained(tmp_path, capsys):
    folder = run(tmp_path, "adding", TINY_ADDING)
    printed = capsys.readouterr().out
    record = json.loads((folder / "record.json").read_text())
    row = record["summary"][0]
    assert list(row["errors"]) == ["0 %", "95 %", "95 %, stabilized"] and row["seeds"] == [0, 1]
    ends = [each["history"][-1]["error"] for each in record["runs"]]
    mean, spread = row["errors"]["95 %, stabilized"]
    assert mean == pytest.approx(sum(ends) / 2) and spread == pytest.approx(abs(ends[0] - ends[1]) / 2**0.5)
    assert f"{mean:.3f} ± {spread:.3f}" in printed and "standard deviation over seeds 0, 1" in printed
    assert (folder / "answers.png").exists()

    run(tmp_path, "adding", TINY_ADDING)
    assert "Going on from, or reusing" in capsys.readouterr().out
    again = json.loads((folder / "record.json").read_text())
    assert again["runs"] == record["runs"]


def test_stages_are_the_epochs_at_each_sparsity():
    navigation, adding = demo.modes("navigation")["demo"], demo.modes("adding")["demo"]
    schedule = navigation.settings["schedule"]
    at = demo_report.stages(schedule, navigation.wanted)
    assert list(at) == ["0 %", "50 %", "75 %", "90 %", "90 %, stabilized"]
    assert at["90 %, stabilized"] == len(schedule) - 1 and schedule[at["90 %"] - 1] < 0.9
    assert schedule[at["0 %"]] == 0 and schedule[at["0 %"] + 1] > 0
    at = demo_report.stages(adding.settings["schedule"], adding.wanted)
    assert list(at) == ["0 %", "50 %", "75 %", "90 %", "95 %", "95 %, stabilized"]
    assert at["95 %, stabilized"] - at["95 %"] == adding.settings["frozen_epochs"]


def test_full_has_three_seeds_and_shuffled():
    for task in ("navigation", "adding"):
        full = demo.modes(task)["full"]
        assert len(full.seeds) == 3 and "shuffled" in full.nets and set(demo.CONTROLS) <= set(full.nets)


def test_papers_figures_are_those_of_its_tables():
    # Table 1 and Tables 8 and 9 of the paper, as (net, stage) -> mean.
    assert demo_report.papers_numbers("navigation")["rows"]["none"]["90 %"] == (71.75, 32.67)
    assert demo_report.papers_numbers("navigation")["rows"]["torus"]["75 %"] == (4.86, 0.3)
    assert demo_report.papers_numbers("adding")["rows"]["torus_trained"]["95 %, stabilized"] == (0.055, 0.012)


def test_a_collapsed_net_is_reported_as_such():
    config = Config(task="navigation", seed=0, net="none", **TINY.settings)
    entry = {"epoch": 1, "sparsity": 0.0, "density": 1.0, "loss": 3.0, "penalty": 0.0, "error": 90.0}
    result = Result(history=[entry], collapsed="loss became non-finite at step 6 (epoch 2)")
    rows = demo_report.summarize([config], [result], (0.0, 0.9))
    text = demo_report.table("navigation", rows, "tiny", {})
    assert rows[0].density is None and list(rows[0].errors) == ["0 %"]
    assert "COLLAPSED none, seed 0: loss became non-finite at step 6 (epoch 2)" in text


def test_a_failing_net_is_named_and_the_others_are_kept(tmp_path):
    good = Config(task="navigation", seed=0, net="none", **TINY.settings)
    bad = replace(good, net="torus", strength=float("nan"))
    with pytest.raises(RuntimeError, match="^torus, seed 0: ValueError: strength must be") as caught:
        workers.train_all([bad, good], tmp_path)
    assert str(caught.value).count("seed 0") == 1
    assert (good.folder(tmp_path) / "checkpoint.safetensors").exists()


@pytest.fixture
def started(tmp_path):
    """A demo that trains, in a session of its own (Ctrl-C reaches all of one), and its children."""
    command = [sys.executable, "-m", "examples.demo", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    pipe = {"stdout": subprocess.PIPE, "text": True}
    # A job in the background of a shell ignores Ctrl-C, and so would all it starts: these tests too may be such a job.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        parent = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipe)
    finally:
        signal.signal(signal.SIGINT, before)
    with parent:
        lines = [parent.stdout.readline() for _ in range(2)]
        assert " loss " in lines[1], lines
        children = psutil.Process(parent.pid).children(recursive=True)
        assert children
        try:
            yield parent, children
        finally:
            for process in children:
                if process.is_running():
                    process.kill()
            if parent.poll() is None:
                parent.kill()


@pytest.mark.parametrize("how", ["Ctrl-C", "kill"])
def test_interrupted_it_stops_all_processes_at_once(started, how):
    parent, children = started
    begun = time.monotonic()
    if how == "Ctrl-C":
        os.killpg(parent.pid, signal.SIGINT)
    else:
        parent.terminate()
    output, _ = parent.communicate(timeout=60)
    assert parent.returncode == 130 and "The same command goes on from the last checkpoints." in output
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive and time.monotonic() - begun < 20


def test_children_end_when_the_parent_is_killed(started):
    parent, children = started
    parent.kill()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
