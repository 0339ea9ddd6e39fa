"""The study of blocks: the ring, the penalties, convergence, resuming, the search, and what the report computes."""
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("scipy")

import moduli_kernels as mk  # noqa: E402
from examples.blocks import __main__ as command, penalties, plan, results, ring, speed, training  # noqa: E402
from examples.blocks.plan import SIDE, Trial  # noqa: E402
from examples.training import checkpoint  # noqa: E402
from examples.training.ledger import Ledger  # noqa: E402


def trial(kind="blocks", family="manifold", strength=1.0, **settings) -> Trial:
    return Trial("ring", kind, family, 0, strength, quick=True, **settings)


def geometry(n=128):
    return penalties.Geometry(trial(), n)


# --- the ring ------------------------------------------------------------------------------------------------

def test_turns_are_stationary_and_remember():
    drawn = ring.turns(20_000, 12, 0.3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.turns.std(1)[:, 0], torch.full((12,), 0.3), rtol=0.03, atol=0)
    pairs = torch.corrcoef(drawn.turns[..., 0])
    torch.testing.assert_close(pairs.diagonal(1), torch.full((11,), ring.MEMORY), rtol=0.02, atol=0)
    torch.testing.assert_close(drawn.directions, drawn.start + drawn.turns[..., 0].cumsum(0))
    assert drawn.start.min() >= 0 and drawn.start.max() <= 2 * math.pi


def test_perfect_activations_decode_to_the_direction():
    task = plan.FULL["ring"].task(**plan.FULL["ring"].options)
    directions = torch.linspace(-20, 20, 500)
    activations = task.activation(directions)
    torch.testing.assert_close(activations.sum(-1), torch.ones(500))
    assert ring.wrapped(task.decode(activations) - directions).abs().max() < 1e-4
    references = task.references()
    assert references["perfect activations, decoded"] < 0.01 < 60 < references["staying at the start"] < 90


def test_the_error_counts_the_short_way_round():
    task = ring.RingTask(hidden=16, steps=3, batch=4)
    guess = task.test.directions + 2 * math.pi * 3 - math.radians(10)
    assert task._mean_angle(guess) == pytest.approx(10, abs=1e-3)


def test_the_ring_is_learned():
    task = ring.RingTask(hidden=64, landmarks=16, width=20.0, steps=5, batch=16, spread=10.0)
    before = task.error()
    optimizer = task.optimizer([{"params": list(task.model.parameters())}], 3e-3)
    for batch in task.batches(150):
        optimizer.zero_grad()
        task.loss(batch).backward()
        optimizer.step()
    assert task.error() < 0.3 * before


# --- penalties and orders ------------------------------------------------------------------------------------

def test_penalties_have_one_scale():
    """All are 1 for a weight of ones, so that one grid of strengths serves all."""
    for family in ("manifold", "l1_matched", "shuffled", "group_lasso", "learned_order"):
        made = penalties.penalty(trial(family=family), geometry())
        assert float(made(torch.ones(128, 128))) == pytest.approx(1, rel=1e-4), family
    assert penalties.penalty(trial(family="none"), geometry()) is None
    assert penalties.penalty(trial(strength=0.0), geometry()) is None


def test_the_group_lasso_is_that_of_the_blocks_in_the_order():
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(1))
    order = geometry().order
    expected = sum(SIDE * weight[np.ix_(order[i:i + SIDE], order[j:j + SIDE])].norm()
                   for i in range(0, 128, SIDE) for j in range(0, 128, SIDE)) / 128**2
    torch.testing.assert_close(penalties.GroupLasso(order, SIDE)(weight), expected)


def test_the_group_lasso_leaves_empty_blocks_alone():
    weight = torch.zeros(32, 32)
    weight[:16, :16] = 1
    weight.requires_grad_()
    penalties.GroupLasso(torch.arange(32), SIDE)(weight).backward()
    assert weight.grad.isfinite().all() and not weight.grad[16:].any() and weight.grad[:16, :16].all()


def test_the_group_lasso_needs_whole_blocks():
    with pytest.raises(ValueError, match="side must divide the 40 neurons, got 16"):
        penalties.GroupLasso(torch.arange(40), SIDE)


def test_the_learned_order_finds_hidden_blocks():
    """A net that is local on a circle, with its neurons mixed: the order is found from the weights alone."""
    generator = torch.Generator().manual_seed(0)
    points = mk.Circle().sample(128, generator=generator)
    local = torch.exp(-mk.Circle().squared_distance(points, points))
    weight = local * torch.randn(128, 128, generator=generator)
    mask = local > 0.3
    order = penalties.learned_order(weight)
    assert torch.equal(order.sort().values, torch.arange(128))
    ideal = penalties.filled(mask, mk.manifold_order(points, "circle"))
    assert penalties.filled(mask, torch.arange(128)) == 1
    assert penalties.filled(mask, order) < 1.3 * ideal < 0.5


def test_starts_keep_as_many_blocks():
    protocol = plan.QUICK["ring"]
    for density in protocol.starts:
        masks = [penalties.start_mask(trial("start", family, 0.0, density=density), geometry())
                 for family in plan.STARTS]
        for mask in masks:
            blocks = penalties.grid(geometry().order).sums(mask)
            assert set(blocks.unique().tolist()) <= {0, SIDE**2}
            assert int((blocks > 0).sum()) == round(density * 64)
        assert not torch.equal(*masks)


# --- convergence ---------------------------------------------------------------------------------------------

RULE = replace(plan.QUICK["ring"], tolerance=0.1, patience=2, halvings=1)


@pytest.mark.parametrize("errors, rate", [
    ([], 1), ([10, 8, 6], 1), ([10, 9.5], 1), ([10, 9.5, 9.4], 0.5),  # 9.4 is not 10 % below the best, 10
    ([10, 9.5, 8.9], 1), ([10, 11, 12, 8, 9], 0.5), ([10, 11, 12, 9.5, 9.4], None), ([5, 5, 5, 5, 5], None),
    ([10, float("nan"), float("nan")], 0.5),
])
def test_rate_after(errors, rate):
    assert training.rate_after(errors, RULE) == rate


def test_a_net_that_has_not_converged_is_recorded_as_such(tmp_path, monkeypatch):
    monkeypatch.setitem(plan.QUICK, "ring", replace(plan.QUICK["ring"], patience=9))
    record = training.train(trial("dense"), tmp_path)
    assert record["converged"] is False and record["steps"] == 40 + 10
    monkeypatch.setitem(plan.QUICK, "ring", replace(plan.QUICK["ring"], patience=1, tolerance=0.99, most=1000))
    record = training.train(trial("dense"), tmp_path)
    assert record["converged"] is True and len(record["history"]) == 3  # a best one, and two that are no better


# --- training ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["manifold", "learned_order"])
def test_a_cut_records_its_stops_and_keeps_their_masks(tmp_path, family):
    its = trial(family=family)
    training.train(its.dense(), tmp_path)
    record = training.train(its, tmp_path)
    order, kept = training.masks_of(its.folder(tmp_path))
    order = torch.from_numpy(order)
    before = np.ones((128, 128), dtype=bool)
    for stop in record["stops"]:
        mask = kept[stop["sparsity"]]
        assert stop["density"] == mask.mean() and 0 <= stop["density"] - (1 - stop["sparsity"]) < 1 / 64
        assert stop["filled"] == stop["density"]  # blocks are whole
        assert penalties.filled(torch.from_numpy(mask), order) == stop["filled"]
        assert not (mask & ~before).any()
        before = mask
    assert [stop["steps"] for stop in record["stops"]] == [19, 32, 45, 58]
    manifold = geometry().order
    assert torch.equal(order, manifold) == (family == "manifold")


def test_scattered_cuts_are_exact_and_uncut_ones_cut_nothing(tmp_path):
    training.train(trial("dense"), tmp_path)
    scattered = training.train(trial("scattered"), tmp_path)
    assert [stop["density"] for stop in scattered["stops"]] == [round(s * 128**2) / 128**2 for s in (.1, .05, .02, .01)]
    uncut = training.train(trial("uncut"), tmp_path)
    assert [stop["density"] for stop in uncut["stops"]] == [1] * 4


def test_penalties_rest_while_a_net_settles_on_its_mask(tmp_path, monkeypatch):
    its, acted = trial(), []
    training.train(its.dense(), tmp_path)
    run = training.Training(its, tmp_path)
    inner = run.penalty

    def counted(weight):
        acted.append(run.progress.steps)
        return inner(weight)

    run.penalty = counted
    run.train()
    assert len(acted) == 3 * sum(run.protocol.events)  # between=3 steps after each event, none of the settling ones


def test_a_sparse_start_is_scaled_to_its_fan_in(tmp_path):
    its = trial("start", "geometric", 0.0, density=0.05)
    rnn = training.Training(its, tmp_path).rnn
    plain = its.protocol.task(**its.protocol.options).model.rnn.weight_hh_l0
    torch.testing.assert_close(rnn.weight_hh_l0, plain / math.sqrt(3 / 64) * rnn.weight_hh_l0_mask)


class Killed(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("kind, family", [
    ("dense", "manifold"), ("dense", "shuffled"), ("blocks", "learned_order"), ("scattered", "group_lasso"),
    ("start", "random")])
def test_a_killed_trial_ends_where_an_unbroken_one_ends(tmp_path, monkeypatch, kind, family):
    its = trial("start", family, 0.0, density=0.05) if kind == "start" else trial(kind, family)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for root in (whole, broken):
        if kind in ("blocks", "scattered"):
            training.train(its.dense(), root)
    expected = training.train(its, whole)

    save, saves = training.Training._save, []

    def killed_after(self):
        save(self)
        saves.append(1)
        if len(saves) in (1, 3):
            raise Killed

    monkeypatch.setattr(training.Training, "_save", killed_after)
    for _ in range(2):
        with pytest.raises(Killed):
            training.train(its, broken)
    record = training.train(its, broken)
    timeless = ("seconds", "finished", "stops", "history")
    assert {k: v for k, v in record.items() if k not in timeless} == {
        k: v for k, v in expected.items() if k not in timeless}
    for ours, theirs in zip(record["stops"], expected["stops"], strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert [line[::2] for line in record["history"]] == [line[::2] for line in expected["history"]]
    (a, _), (b, _) = (checkpoint.load(its.folder(root)) for root in (whole, broken))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_cut_needs_its_dense_net(tmp_path):
    with pytest.raises(RuntimeError, match="needs the trained net of ring, manifold 1, dense, seed 0, got none"):
        training.train(trial(), tmp_path)


def test_a_collapse_is_recorded_and_so_is_that_of_the_cuts(tmp_path, monkeypatch):
    monkeypatch.setitem(plan.QUICK, "ring", replace(plan.QUICK["ring"], lr=float("inf")))
    dense = training.train(trial("dense"), tmp_path)
    assert "non-finite" in dense["collapsed"] and dense["error"] is None
    cut = training.train(trial(), tmp_path)
    assert cut["collapsed"] == dense["collapsed"] and cut["stops"] == [] and plan.score(cut) == math.inf


# --- the plan ------------------------------------------------------------------------------------------------

def test_every_family_is_searched_alike_on_a_seed_that_is_not_reported():
    trials = plan.search("ring", quick=False)
    counts: dict = {}
    for each in trials:
        counts.setdefault((each.family, each.kind), []).append(each.strength)
    assert all(tuple(strengths) == plan.FULL["ring"].strengths for strengths in counts.values())
    assert len(counts) == 5 + 4 and {each.seed for each in trials} == {plan.SEARCH_SEED}


def made_up(each: Trial, errors: list[float], collapsed=None) -> dict:
    stops = [{"sparsity": s, "density": 1 - s, "filled": 1 - s, "error": e, "steps": 1, "seconds": 1.0}
             for s, e in zip(each.protocol.stops, errors)]
    return {"key": each.key, "config": each.described(), "stops": stops, "collapsed": collapsed, "error": 1.0,
            "steps": 50, "converged": True, "history": [[10, 1.0, 9.0], [20, 2.0, 1.4], [30, 3.0, 1.0]]}


def test_the_best_strength_is_picked_by_the_geometric_mean_of_the_errors():
    trials = plan.search("ring", quick=True)
    known = {each.key: made_up(each, [1, 1, 1, 16] if each.strength == 1 else [3, 3, 3, 3]) for each in trials}
    assert set(plan.picked("ring", True, known).values()) == {0.0, 1.0}  # 2 against 3
    known = {each.key: made_up(each, [1, 1, 1, 1], "broken" if each.strength == 1 else None) for each in trials}
    assert plan.picked("ring", True, known)["manifold", "blocks"] == 10
    known.pop(trials[0].key)
    assert plan.picked("ring", True, known) is None


def test_chains_begin_with_the_dense_net_that_the_others_need():
    made = plan.chains(plan.search("ring", quick=True))
    assert len(made) == 4 * 2  # four penalties, two strengths
    for first, *others in made:
        assert first.kind == "dense" and others and all(each.dense() == first for each in others)
    shared = next(chain for chain in made if chain[0].family == "l1_matched")
    assert [each.family for each in shared[1:]] == ["l1_matched", "learned_order", "l1_matched"]


def test_keys_depend_on_the_protocol_and_not_on_which_other_trials_there_are(monkeypatch):
    before = trial().key
    monkeypatch.setitem(plan.QUICK, "ring", replace(plan.QUICK["ring"], strengths=(5.0,), starts=(0.1,)))
    assert trial().key == before
    monkeypatch.setitem(plan.QUICK, "ring", replace(plan.QUICK["ring"], settle=11))
    assert trial().key != before


# --- the report ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, speed_there", [
    (2.0, 10.0),  # exactly the second point
    (4.0, 40.0), (100.0, 40.0),  # the last point, and a curve that ends before the error is reached
    (math.sqrt(2 * 4), 20.0),  # half-way in both logarithms
    (1.0, 1.0), (0.5, 1.0),  # the dense net, and an error that no net has
])
def test_speed_at(error, speed_there):
    assert results.speed_at(error, [1.0, 10.0, 40.0], [1.0, 2.0, 4.0]) == pytest.approx(speed_there)


def test_speed_at_takes_the_fastest_of_several_crossings():
    assert results.speed_at(1.5, [1.0, 10.0, 20.0, 40.0], [1.0, 2.0, 1.0, 3.0]) > 20


def test_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(5, 2, 400)
    low, high = results.interval(values)
    mean, half = values.mean(), 1.96 * values.std() / 20
    assert (low, high) == (pytest.approx(mean - half, abs=0.03), pytest.approx(mean + half, abs=0.03))


def ledger_of(path, seeds: int, ours: float, theirs: float) -> Ledger:
    """A ledger in which block nets are `ours` or `theirs` bad at every stop, and all nets equally fast at a stop."""
    ledger = Ledger(path)
    for each in plan.search("ring", quick=True):
        ledger.add(made_up(each, [1.0] * 4))
    strengths = plan.picked("ring", True, ledger.trials())
    for seed in range(seeds):
        for each in plan.reported("ring", seed, strengths, quick=True):
            is_ours = (each.family, each.kind) == results.OURS
            factor = ours if is_ours else theirs * (1 + 0.02 * (seed - 2))
            errors = [factor * e for e in (1.2, 1.5, 2.0, 3.0)]
            if each.kind != "start" and each.dense().key not in ledger.trials():
                ledger.add(made_up(each.dense(), []))
            ledger.add(made_up(each, errors if each.kind != "start" else []))
            for number, stop in enumerate(each.protocol.stops if each.kind in plan.CUTS else ()):
                timed = {"training": 1e-3, "dense_training": 1e-3 * 3**(number + 1),
                         "inference": 1e-3, "dense_inference": 1e-3 * 2**(number + 1)}
                ledger.add(speed.record(each, stop, timed, {}))
    return ledger


@pytest.mark.parametrize("seeds, ours, theirs, end", [
    (5, 1.0, 1.5, "geometry pays."), (5, 1.5, 1.0, "geometry does not pay."),
    (3, 1.0, 1.5, "too few seeds for a verdict."), (5, 1.0, 1.0, "no difference can be told."),
])
def test_the_verdict_is_computed_from_the_records(tmp_path, seeds, ours, theirs, end):
    ledger = ledger_of(tmp_path / "blocks.jsonl", seeds, ours, theirs)
    said = results.verdict(results.read("ring", True, 5, ledger), "training")
    assert said.endswith(end) and f"{seeds} seeds" in said
    times = float(re.search(r"is (\S+) times", said)[1])
    assert (times > 1.05) == (ours < theirs) and (times < 0.95) == (ours > theirs)


def test_no_verdict_without_speeds(tmp_path):
    ledger = ledger_of(tmp_path / "blocks.jsonl", 1, 1.0, 1.0)
    lines = [line for line in ledger.path.read_text().splitlines() if '"of"' not in line]
    ledger.path.write_text("\n".join(lines) + "\n")
    found = results.read("ring", True, 5, ledger)
    assert "run `python -m examples.blocks speed` first" in results.verdict(found, "training")


def test_the_newest_speed_counts(tmp_path):
    ledger = Ledger(tmp_path / "blocks.jsonl")
    for minute, factor in (("00", 2), ("07", 3)):
        line = speed.record(trial(), 0.9, dict.fromkeys(("training", "inference"), 1.0) | dict.fromkeys(
            ("dense_training", "dense_inference"), float(factor)), {})
        finished = f"2026-01-01T00:{minute}:00Z"
        ledger.add({**line, "finished": finished, "key": f"speed-{finished}"})
    assert speed.latest(ledger)[trial().key, 0.9]["training_ratio"] == 3


def test_steps_to_an_error():
    record = {"history": [[10, 1.0, 9.0], [20, 2.0, 3.0], [30, 3.0, 4.0]]}
    assert results.reached(record, 3.5) == (20, 2.0) and results.reached(record, 1.0) is None


# --- the command ---------------------------------------------------------------------------------------------

def test_two_layers_that_are_timed_compute_the_same():
    sparse, dense, moves, state = speed.nets(plan.QUICK["ring"])
    mask = penalties.start_mask(trial("start", "geometric", 0.0, density=0.05), geometry())
    sparse.set_mask("weight_hh_l0", mask)
    with torch.no_grad():
        dense.weight_hh_l0 *= mask
    torch.testing.assert_close(sparse(moves, state)[0], dense(moves, state)[0])
    timed = speed.times(sparse, dense, moves, state, rounds=2)
    assert all(seconds > 0 for seconds in timed.values()) and len(timed) == 4


@pytest.mark.slow
def test_the_command_trains_measures_and_reports_and_trains_nothing_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(plan.QUICK, "ring", replace(plan.QUICK["ring"], strengths=(1.0,), stops=(0.9, 0.95),
                                                    events=(1, 1), starts=(0.05,), most=10, every=5, settle=3))
    arguments = ["--tasks", "ring", "--seeds", "1", "--jobs", "1", "--quick", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    ledger = tmp_path / "results" / "blocks-quick.jsonl"
    lines = len(ledger.read_text().splitlines())
    # The search: dense, blocks, scattered. Seed 0: dense, uncut, blocks, scattered, starts.
    assert lines == (4 + 5 + 4) + (5 + 1 + 6 + 5 + 2)
    assert command.main(arguments) == 0 and len(ledger.read_text().splitlines()) == lines
    assert "run `python -m examples.blocks speed` first" in capsys.readouterr().out
    assert command.main(["speed", *arguments]) == 0
    assert len(ledger.read_text().splitlines()) == lines + 11 * 2 + 2
    assert command.main(["report", *arguments]) == 0
    text = capsys.readouterr().out
    assert "too few seeds for a verdict" in text and "## Sparse from the start" in text
    assert (tmp_path / "results" / "blocks" / "ring-quick.md").read_text() in text
    for picture in ("speed", "masks"):
        assert (tmp_path / "results" / "blocks" / f"ring-quick-{picture}.png").stat().st_size > 10_000


def test_one_net_that_fails_stops_no_other(tmp_path):
    ledger = Ledger(tmp_path / "results" / "blocks-quick.jsonl")
    trials = plan.cut_trials("ring", "manifold", "blocks", 0, (1.0, 10.0), quick=True)
    with checkpoint.only_writer(trials[0].dense().folder(tmp_path / "runs")):
        with pytest.raises(RuntimeError, match="1 of 2 chains failed; the first: .* is being trained by another"):
            command.train_all(trials, ledger, tmp_path / "runs", 1)
    assert set(ledger.trials()) == {trials[1].dense().key, trials[1].key}


@pytest.mark.slow
def test_several_nets_are_trained_at_once(tmp_path):
    arguments = ["--tasks", "ring", "--seeds", "1", "--quick", "--out", str(tmp_path)]
    options = command.parser().parse_args([*arguments, "--jobs", "2"])
    ledger = Ledger(tmp_path / "results" / "blocks-quick.jsonl")
    trials = plan.cut_trials("ring", "manifold", "blocks", 0, (1.0, 10.0), quick=True)
    command.train_all(trials, ledger, options.out / "runs", options.jobs)
    assert {each.key for chain in plan.chains(trials) for each in chain} == set(ledger.trials())


def test_bad_options(capsys):
    for arguments in (["--seeds", "0"], ["--jobs", "0"], ["--tasks", "maze"]):
        with pytest.raises(SystemExit):
            command.main(arguments)
    assert "seeds and jobs must be at least 1" in capsys.readouterr().err
