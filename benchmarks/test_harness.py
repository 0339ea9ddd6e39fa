"""The harness: a wrong peer is put out, a wrong kernel stops the run, verdicts follow the numbers."""
from __future__ import annotations

import pytest
import torch

from benchmarks import report
from benchmarks.harness.measuring import quartiles, relative_error
from benchmarks.penalty.cases import CASES, GOALS, Goal
from benchmarks.penalty.contest import PenaltyContest
from benchmarks.penalty.peers import Contestant
from benchmarks.penalty.report import goal_row

# torch's compiler gives a DeprecationWarning when it is first imported.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning:torch")

TRAINED = next(case for case in CASES if case.name == "torus-dog-4096-trained").smaller()


@pytest.fixture
def contest():
    """A contest whose peers need no compiler: ours, the floors and two eager forms."""
    made = PenaltyContest(TRAINED)
    made.contestants = [one for one in made.contestants if one.kind != "compiled"]
    return made


def _add(contest: PenaltyContest, kind: str, value=1.0, weight=1.0, points=1.0) -> None:
    """Adds a contestant that is right but for the factors given."""
    right = next(one for one in contest.contestants if one.name == "eager formula")

    def run(me: Contestant) -> torch.Tensor:
        result = right.run(me) * value
        me.weight.grad *= weight
        me.points.grad *= points
        return result

    leaves = [leaf.detach().requires_grad_() for leaf in (right.weight, right.points)]
    contest.contestants.insert(0 if kind == "ours" else len(contest.contestants), Contestant(kind, kind, *leaves, run))


@pytest.mark.parametrize("part", ["value", "weight", "points"])
def test_a_wrong_peer_is_put_out(contest, part):
    _add(contest, "compiled", **{part: 1.001})
    contest.verify()
    assert part in contest.refused["compiled"] and set(contest.refused) == {"compiled"}
    assert "compiled" not in [one.name for one in contest.contestants]


def test_a_right_peer_stays(contest):
    _add(contest, "compiled")
    contest.verify()
    assert not contest.refused and contest.contestants[-1].name == "compiled"


def test_a_peer_that_gives_nan_is_put_out(contest):
    _add(contest, "compiled", weight=float("nan"))
    contest.verify()
    assert "compiled" in contest.refused


def test_a_wrong_kernel_stops_the_run(contest):
    _add(contest, "ours", weight=1 + 5e-5)
    with pytest.raises(AssertionError, match="weight is off by .*nothing is timed"):
        contest.verify()


def test_rounds_are_shared_and_recorded(contest):
    contest.verify()
    contest.warm_up(1)
    for _ in range(4):
        contest.others()
        contest.ours()
    record = contest.record()
    assert record["rounds"] == 4
    for one in record["contestants"]:
        assert one["rounds"] == 4 and one["time"][0] > 0
    assert record["contestants"][0]["ratio"] == [1, 1, 1]
    assert all(one.weight.grad is None for one in contest.contestants)


def test_release_inside_keeps_the_gradient_for_the_next_round():
    case = next(case for case in CASES if case.release).smaller()
    contest = PenaltyContest(case)
    contest.contestants = [one for one in contest.contestants if one.kind in ("ours", "floor")]
    contest.verify()
    contest.others()
    contest.ours()
    assert contest.contestants[0].weight.grad is not None


def test_relative_error_and_quartiles():
    assert relative_error(torch.tensor([3.0, 4.4]), torch.tensor([3.0, 4.0], dtype=torch.double)) == pytest.approx(0.08)
    assert relative_error(torch.tensor(0.5), torch.tensor(0.0)) == 0.5
    assert quartiles([1.0, 2.0, 3.0]) == [1.5, 2.0, 2.5]


def _record(**ratios):
    """compiled_a=... times ours; copy=..."""
    names = {"copy": ("copy into a buffer", "floor")}
    return {"contestants": [
        {"name": names.get(name, (name, "compiled"))[0], "kind": names.get(name, (name, "compiled"))[1],
         "ratio": [ratio, ratio, ratio]} for name, ratio in ratios.items()]}


def test_verdicts():
    faster, copy = Goal("c", "c", "fastest compiled form", 12.0), Goal("c", "c", "copy into a buffer", 2.0)
    assert "slow_one" not in goal_row(faster, _record(slow_one=20.0, quick_one=12.5), False)
    assert goal_row(faster, _record(slow_one=20.0, quick_one=12.5), False).endswith("| reached |")
    assert goal_row(faster, _record(slow_one=20.0, quick_one=11.9), False).endswith("| NOT reached |")
    assert goal_row(copy, _record(copy=0.51), False).endswith("its time | reached |")
    assert goal_row(copy, _record(copy=0.49), False).endswith("its time | NOT reached |")
    assert "not measured" in goal_row(copy, _record(quick_one=3.0), False)
    assert "reached" not in goal_row(faster, _record(quick_one=12.5), True)


def test_every_goal_names_a_case():
    assert {goal.case for goal in GOALS} <= {case.name for case in CASES}
    assert len({case.name for case in CASES}) == len(CASES)


def test_no_report_while_tests_are_red(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["report", "--run", __file__])
    monkeypatch.setattr(report.records, "load", lambda path: {})
    assert report.main() == 1
    assert "no correctness tests" in capsys.readouterr().err
    tests = tmp_path / "tests" / "penalty"
    tests.mkdir(parents=True)
    (tests / "test_penalty.py").write_text("def test_red():\n    assert False\n")
    assert report.main() == 1
    assert "tests are red" in capsys.readouterr().err
    (tests / "test_penalty.py").write_text("def test_green():\n    pass\n")
    assert report.failing_tests() is None
