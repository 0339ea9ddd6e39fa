"""The examples' ledger of trials: append-only, several writers, torn lines, full disks."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("safetensors")

from examples.training.ledger import Ledger  # noqa: E402
from tests.support.example_runs import CONFIG, result  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def test_a_record_holds_both_measuring_points(tmp_path):
    ledger = Ledger(tmp_path / "results" / "adding.jsonl")
    assert ledger.trials() == {}
    ledger.append(CONFIG, result())
    (trial,) = ledger.trials().values()
    assert trial["key"] == CONFIG.key and trial["config"]["net"] == "torus"
    assert trial["pruned_error"] == pytest.approx(1 / 100, rel=1e-5)  # the 100th epoch is the first at 95 %
    assert trial["error"] == pytest.approx(1 / 110, rel=1e-5) and len(trial["errors"]) == 110
    lottery = replace(CONFIG, lottery=True)
    ledger.append(lottery, result(lottery))
    assert ledger.trials()[lottery.key]["pruned_error"] == 1.0  # at 95 % from the first epoch on


def test_a_collapsed_trial_is_recorded_as_one(tmp_path):
    ledger = Ledger(tmp_path / "adding.jsonl")
    ledger.append(CONFIG, result(collapsed="loss became non-finite at step 9 (epoch 1)"))
    trial = ledger.trials()[CONFIG.key]
    assert trial["error"] is None and trial["pruned_error"] is None and "step 9" in trial["collapsed"]
    assert len(trial["errors"]) == 4


def test_the_device_is_not_part_of_the_key_and_all_else_is():
    assert replace(CONFIG, device="cuda").key == CONFIG.key
    moved = replace(CONFIG, options={**CONFIG.options, "data": "elsewhere"})
    assert moved.key == CONFIG.key and "elsewhere" not in str(moved.described())
    changes = ({"seed": 1}, {"net": "none"}, {"lottery": True}, {"precision": "tf32"}, {"strength": 1.0},
               {"inhibitor": "gauss"}, {"options": {**CONFIG.options, "steps": 49}})
    assert len({CONFIG.key} | {replace(CONFIG, **change).key for change in changes}) == 8


def test_a_torn_line_counts_as_none_and_the_next_begins_afresh(tmp_path):
    ledger, other = Ledger(tmp_path / "adding.jsonl"), replace(CONFIG, seed=1)
    ledger.append(CONFIG, result())
    ledger.append(other, result(other))
    text = ledger.path.read_bytes()
    ledger.path.write_bytes(text[:-40])
    assert set(ledger.trials()) == {CONFIG.key}
    ledger.append(other, result(other))
    assert set(ledger.trials()) == {CONFIG.key, other.key}
    assert len(ledger.path.read_text().splitlines()) == 3


def test_the_first_of_two_trials_with_one_key_counts(tmp_path):
    ledger = Ledger(tmp_path / "adding.jsonl")
    ledger.append(CONFIG, result())
    again = result()
    again.history[-1]["error"] = 7.0
    ledger.append(CONFIG, again)
    assert ledger.trials()[CONFIG.key]["error"] != 7.0


def test_a_full_disk_leaves_the_lines_before(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "adding.jsonl")
    ledger.append(CONFIG, result())
    before = ledger.path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        ledger.append(replace(CONFIG, seed=1), result())
    assert ledger.path.read_bytes() == before


WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
from examples.training.ledger import Ledger
from tests.support.example_runs import CONFIG, result
ledger = Ledger(Path(sys.argv[1]))
for seed in range(int(sys.argv[2]), int(sys.argv[2]) + 40):
    ledger.append(replace(CONFIG, seed=seed), result())
"""


def test_several_writers_lose_and_mix_no_line(tmp_path):
    path = tmp_path / "adding.jsonl"
    there = os.environ | {"PYTHONPATH": str(ROOT)}
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(k)], env=there) for k in (0, 40, 80)]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    assert {json.loads(line)["config"]["seed"] for line in path.read_text().splitlines()} == set(range(120))
