"""The paper's tables as grids of trials, their training, and the verdicts on the paper's claims."""
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

pytest.importorskip("safetensors")

from examples import adding, reproduce  # noqa: E402
from examples.paper import claims, table_report  # noqa: E402
from examples.paper.tables import REFERENCE, all_tables  # noqa: E402
from examples.training import checkpoint, nets, workers  # noqa: E402
from examples.training.ledger import Ledger  # noqa: E402
from tests.support.example_runs import TINY, result  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not (ROOT.parent / "shared").exists(), reason="shared/ is not here")
def test_the_reference_is_the_papers():
    paper = ROOT.parent / "shared" / "paper" / "tables.json"
    assert json.loads(REFERENCE.read_text()) == json.loads(paper.read_text())


def test_every_cell_of_every_table_is_a_trial():
    known = all_tables()
    assert {"1", "2", "3", "8", "9", "10", "15", "17", "18", "adding-cuts"} <= known.keys()
    for table in known.values():
        for row in table.rows:
            for column in table.columns:
                settings = table.settings(row, column)
                assert settings["net"] in nets.NETS and 0 <= settings["cut"] < 1
    assert known["8"].columns == ("torus", "none", "l1", "l1_matched", "shuffled")
    assert known["8"].paper["95% sparse", "torus"] == (0.111, 0.035)
    assert ("95% sparse", "l1_matched") not in known["8"].paper
    assert known["9"].settings("95% lottery", "r3 trained") == {"net": "r3_trained", "cut": 0.95, "lottery": True}
    assert known["9"].settings("0% sparse", "torus fixed") == {"net": "torus", "cut": 0.0, "lottery": False}
    assert known["15"].settings("75% sparse", "diffusion")["inhibitor"] == "diffusion"
    sweep = known["17"].settings("l1 90% sparse", "1e-3")
    assert sweep == {"net": "l1", "cut": 0.9, "lottery": False, "strength": 1e-3}


def test_tables_share_trials_and_lotteries_follow_their_antecedents(tmp_path):
    ledger = Ledger(tmp_path / "adding.jsonl")
    chosen = [all_tables()[name] for name in ("8", "9", "10", "adding-cuts")]
    configs = reproduce.missing(chosen, [0, 1], "full", ledger, device="cpu")
    # 12 nets at 0 %, 95 % and as lotteries; 4 more at 98 and at 99 %
    assert len(configs) == len({config.key for config in configs}) == 2 * (3 * 12 + 8)
    place = {config.key: i for i, config in enumerate(configs)}
    lotteries = [config for config in configs if config.lottery]
    assert len(lotteries) == 24 and all(place[c.antecedent().key] < place[c.key] for c in lotteries)
    ledger.append(configs[0], result(configs[0]))
    assert reproduce.missing(chosen, [0, 1], "full", ledger, device="cpu") == configs[1:]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """reproduce's command on a table of tiny nets, in this process: no spawn, which would not know the preset."""
    monkeypatch.setitem(adding.PRESETS, "quick", TINY)

    def trained(configs, root, *, recorded=set, **_):
        for config in configs:
            if config.key not in recorded():
                folder = config.folder(root)
                folder.mkdir(parents=True, exist_ok=True)
                yield config.key, reproduce_run(config, folder)

    def reproduce_run(config, folder):
        from examples.training.trainer import Run

        with checkpoint.only_writer(folder):
            return Run(config, folder).train()

    monkeypatch.setattr(reproduce, "train_each", trained)
    here = ["--preset", "quick", "--device", "cpu", "--out", str(tmp_path)]
    return lambda *arguments: reproduce.main([*arguments, *here])


def test_reproduce_trains_what_is_missing_and_shows_it_beside_the_paper(tiny, tmp_path, capsys):
    assert tiny("9", "--seeds", "1") == 0
    shown = capsys.readouterr().out
    assert "adding: 12 trials to train" in shown and "0.055 ± 0.012" in shown and "not yet run" in shown
    assert len(re.findall(r"ours, (pruning ends|stabilized)", shown)) == 2
    lines = (tmp_path / "results" / "adding.jsonl").read_text().splitlines()
    assert len(lines) == 12 and all(json.loads(line)["environment"]["versions"]["torch"] for line in lines)
    pages = tmp_path / "results" / "tables"
    assert {path.name for path in pages.iterdir()} >= {"table-9-quick.md"}
    assert "| 95% lottery | ours |" in (pages / "table-9-quick.md").read_text()
    assert tiny("9", "--seeds", "1") == 0
    assert "adding: 0 trials to train" in capsys.readouterr().out
    assert (tmp_path / "results" / "adding.jsonl").read_text().splitlines() == lines


def test_unknown_tables_are_named(tiny, capsys):
    assert tiny("42") == 2 and "got 42" in capsys.readouterr().err
    assert tiny("all") == 2


def test_a_lottery_has_the_antecedents_masks_and_other_weights(tmp_path):
    from examples.training.trainer import Run

    sparse = TINY.config("adding", "torus_trained", 0, 0.9)
    lottery = replace(sparse, lottery=True)
    folders = [config.folder(tmp_path) for config in (sparse, lottery)]
    for folder in folders:
        folder.mkdir()
    with pytest.raises(RuntimeError, match="the lottery needs the finished run"):
        Run(lottery, folders[1])
    first = Run(sparse, folders[0])
    fresh = [p.clone() for p in first.task.model.parameters()]
    first.train()
    second = Run(lottery, folders[1])
    masks = [mask for _, mask in first.task.recurrent()] + [first.task.model.readout.weight_mask]
    kept = [mask for _, mask in second.task.recurrent()] + [second.task.model.readout.weight_mask]
    assert all(map(lambda a, b: bool((a == b).all()), masks, kept)) and not masks[0].all()
    weights = list(second.task.model.parameters())
    assert all((a != b).any() for a, b in zip(weights, first.task.model.parameters()) if b.requires_grad)
    assert all((a != b).any() for a, b in zip(weights, fresh) if b.requires_grad)
    before = second.points[0].detach().clone()
    assert (before == first.points[0]).all()
    history = second.train().history
    assert [entry["sparsity"] for entry in history] == [0.9] * 3 and (second.points[0] == before).all()


def recorded(ledger, table, row, column, values, preset="full"):
    for seed, value in enumerate(values):
        config = table.config(row, column, seed, preset)
        its = result(config, collapsed=None if value is not None else "gone")
        if value is not None:
            its.history[-1]["error"] = value
        ledger.append(config, its)


def test_verdicts_by_welchs_test(tmp_path):
    ledger, table = Ledger(tmp_path / "adding.jsonl"), all_tables()["8"]
    row = "95% sparse"
    recorded(ledger, table, row, "torus", [0.10, 0.11, 0.12, 0.10, 0.11])
    recorded(ledger, table, row, "none", [0.20, 0.22, 0.19, 0.21, 0.20])
    recorded(ledger, table, row, "l1", [0.05, 0.06, 0.05, 0.04, 0.05])
    recorded(ledger, table, row, "l1_matched", [0.08, 0.16, 0.11, 0.05, 0.17])
    recorded(ledger, table, row, "shuffled", [0.2, 0.2, 0.2, 0.2])
    found = {v.pair: v for v in claims.verdicts(["8"], "full", ledger, list(range(5))) if "at the end" in v.pair}
    verdict = {pair.split(" < ")[1].split(",")[0]: v for pair, v in found.items()}
    assert {net: v.verdict for net, v in verdict.items()} == {
        "none": "held", "l1": "not held", "l1_matched": "undecided", "shuffled": "not yet run"}
    assert verdict["shuffled"].counts == (5, 4) and verdict["shuffled"].p is None
    # by hand: t = (0.108 - 0.204) / sqrt((7e-5 + 1.3e-4) / 5) = -15.2, 7.4 degrees of freedom
    assert verdict["none"].means == pytest.approx((0.108, 0.204)) and 1e-7 < verdict["none"].p < 5e-6


def test_collapsed_trials_are_counted_apart(tmp_path):
    ledger, table = Ledger(tmp_path / "adding.jsonl"), all_tables()["8"]
    recorded(ledger, table, "95% sparse", "torus", [0.1, None, 0.3])
    assert claims.errors(table, "95% sparse", "torus", "full", ledger, [0, 1, 2, 3]) == ([0.1, 0.3], 1)
    assert table_report.spread([0.1, 0.3], 3, 1) == "0.200 ± 0.141 (2, 1 collapsed)"
    assert table_report.spread([], 3, 2) == "2 collapsed" and table_report.spread([], 3) == "-"


def test_every_claim_names_cells_of_its_table():
    for claim in claims.CLAIMS:
        table = all_tables()[claim.table]
        cells = [cell for pair in claim.pairs() for cell in pair]
        assert cells and all(row in table.rows and column in table.columns for row, column in cells)


def test_a_run_that_another_process_holds_is_left_to_it(tmp_path):
    """In processes of its own: one holds a run, the workers train the other and then see the first one recorded."""
    held, free = (TINY.config("adding", net, 0) for net in ("none", "torus"))
    asked = []

    def known():
        asked.append(time.monotonic())
        return {held.key} if len(asked) > 2 else set()

    with checkpoint.only_writer(held.folder(tmp_path)):
        with pytest.raises(RuntimeError, match="none, seed 0: being trained by another process"):
            workers.train_all([held, free], tmp_path)
        found = dict(workers.train_each([held, free], tmp_path, jobs=1, recorded=known, patient=True))
    assert set(found) == {free.key}


COMMAND = """
import sys
from pathlib import Path
from examples.reproduce import run
from examples.training.ledger import Ledger
from tests.support.example_runs import TINY
from dataclasses import replace
slow = replace(TINY, batches=60, epochs=6)
configs = [slow.config("adding", net, 0, 0.9) for net in ("none", "torus")]
run(configs, Ledger(Path(sys.argv[1]) / "adding.jsonl"), Path(sys.argv[1]) / "runs", 2)
"""


def test_killed_and_started_again_it_ends_with_one_line_a_trial_and_the_same_errors(tmp_path):
    there = os.environ | {"PYTHONPATH": str(ROOT)}

    def started(folder):
        return subprocess.Popen([sys.executable, "-c", COMMAND, str(folder)], env=there, stdout=subprocess.DEVNULL,
                                start_new_session=True)

    broken = started(tmp_path / "a")
    limit = time.monotonic() + 100
    while not list((tmp_path / "a").glob("runs/*/checkpoint.safetensors")):
        assert time.monotonic() < limit and broken.poll() is None
        time.sleep(0.05)
    os.killpg(broken.pid, signal.SIGKILL)
    broken.wait()
    assert started(tmp_path / "a").wait(200) == 0 and started(tmp_path / "b").wait(200) == 0
    ends = [
        {t["config"]["net"]: t["errors"] for t in Ledger(tmp_path / side / "adding.jsonl").trials().values()}
        for side in "ab"
    ]
    assert ends[0] == ends[1] and set(ends[0]) == {"none", "torus"}
    assert len((tmp_path / "a" / "adding.jsonl").read_text().splitlines()) == 2


def test_a_failure_that_repeats_ends_it_in_one_sentence(tmp_path):
    missing = "must be a folder"
    configs = [
        replace(TINY.config("adding", "none", seed), task="language_model", options={"data": str(tmp_path / "no")})
        for seed in range(6)
    ]
    with pytest.raises(RuntimeError, match=rf"none, seed 0 and 1 more: DataError: .*{missing}") as told:
        dict(workers.train_each(configs, tmp_path, jobs=2))
    assert str(told.value).count(missing) == 1


def test_a_gpu_that_is_not_there_is_told(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="device must be cpu here, got cuda"):
        workers.train_all([TINY.config("adding", "none", 0, device="cuda")], tmp_path)


def test_a_table_shows_what_the_papers_measure_says_beside_the_headline(tmp_path):
    pytest.importorskip("pooch")
    ledger, table = Ledger(tmp_path / "language_model.jsonl"), all_tables()["4"]
    config = table.config("90% sparse", "torus", 0, "quick")
    its = result(config)
    its.history[-1] |= {"error": 449.8, "paper_perplexity": 69.0}
    ledger.append(config, its)
    assert claims.errors(table, "90% sparse", "torus", "quick", ledger, [0], "paper") == ([69.0], 0)
    lines = table_report.lines_of(table, "quick", ledger, [0])
    shown = {(row, which): cells[0] for row, which, *cells in lines}
    assert shown["90% sparse", "ours"] == "449.8 (1)"
    assert shown["90% sparse", "ours, 2^loss as the paper"] == "69.0 (1)"
    assert shown["90% sparse", "paper"] == "43.41 ± 7.53"
