"""The paper's figures from our own runs: rate maps and grid scores of known maps, persistence of known shapes, and
that what is drawn is what the run holds."""
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import moduli_kernels as mk

pytest.importorskip("safetensors")
matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

from examples import paper_figures  # noqa: E402
from examples.navigation import BOX  # noqa: E402
from examples.paper import figures, persistence, rate_maps, saved_runs  # noqa: E402
from examples.training.config import Config  # noqa: E402
from examples.training.trainer import Run  # noqa: E402

NAVIGATION = Config(
    task="navigation", net="torus", seed=0, options={"hidden": 24, "landmarks": 24, "steps": 5, "batch": 8},
    schedule=[0.0] + mk.linear_schedule(0.9, 3), batches=6, lr=1e-3, strength=1e-3,
)
ADDING = Config(
    task="adding", net="r3_trained", seed=1, options={"hidden": 20, "steps": 6, "batch": 8, "tests": 50},
    schedule=mk.linear_schedule(0.8, 2), batches=4, lr=1e-3, strength=1e-3,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of short runs: pruned and unpruned navigation on the torus, adding with trained points of R^3."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    root = tmp_path_factory.mktemp("runs")
    for config in (NAVIGATION, replace(NAVIGATION, schedule=[0.0] * 4), ADDING):
        folder = config.folder(root)
        folder.mkdir()
        Run(config, folder).train()
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    return root


pytestmark = pytest.mark.usefixtures("restored")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- rate maps -------------------------------------------------------------------------------------------

BINS = 40
MIDDLES = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS * BOX - BOX / 2
Y, X = torch.meshgrid(MIDDLES, MIDDLES, indexing="ij")


def waves(spacing, angles, at=(0.0, 0.0)):
    """A map of plane waves whose crests are `spacing` metres apart, never negative."""
    k = 2 * math.pi / spacing
    x, y = X - at[0], Y - at[1]
    return sum(1 + torch.cos(k * (x * math.cos(a) + y * math.sin(a))) for a in angles)


def hexagons(spacing, turn=0.0, at=(0.1, 0.2)):
    """Fields on a hexagonal lattice, `spacing` metres apart."""
    return waves(spacing * math.sqrt(3) / 2, [turn + i * math.pi / 3 for i in range(3)], at)


def test_rate_map_of_a_known_function_of_the_place():
    positions = (torch.rand(200, 1000, 2, generator=generator()) - 0.5) * BOX
    x, y = positions[..., 0], positions[..., 1]
    states = torch.stack((x + 2.0, y * y, torch.ones_like(x)), dim=-1)
    sums = rate_maps.Accumulator(3, bins=20)
    for part in range(0, 200, 50):
        sums.add(states[part:part + 50], positions[part:part + 50])
    maps, visits = sums.maps(sigma=0)
    middles = (torch.arange(20, dtype=torch.float64) + 0.5) / 20 * BOX - BOX / 2
    assert visits.sum() == 200_000 and visits.min() > 350  # 500 a bin
    assert torch.allclose(maps[0], (middles + 2).expand(20, 20), atol=0.01)  # x grows along the second axis
    assert torch.allclose(maps[1], middles.square()[:, None].expand(20, 20), atol=0.02)
    assert torch.equal(maps[2], torch.ones(20, 20, dtype=torch.float64))
    smooth, same = sums.maps(sigma=1.5)
    assert torch.equal(same, visits)
    assert torch.allclose(smooth[2], torch.ones(20, 20, dtype=torch.float64))
    inner = slice(5, -5)  # away from the border a Gaussian leaves a linear function as it is
    assert torch.allclose(smooth[0][inner, inner], (middles + 2).expand(20, 20)[inner, inner], atol=0.02)


def test_bins_with_too_few_visits_have_no_rate_and_steps_outside_are_left_out():
    sums = rate_maps.Accumulator(1, bins=10)
    inside, outside = torch.full((7, 2), 0.05), torch.tensor([[BOX / 2 + 0.01, 0.0], [0.0, -BOX / 2 - 0.01]])
    sums.add(torch.ones(9, 1), torch.cat((inside, outside)))
    maps, visits = sums.maps(sigma=0)
    assert visits.sum() == 7 and visits[5, 5] == 7
    assert maps[0, 5, 5] == 1 and maps.isnan().sum() == 99


def test_spatial_information_of_a_unit_that_is_active_in_a_part_of_the_arena():
    quarter, half = torch.zeros(BINS, BINS, dtype=torch.float64), torch.zeros(BINS, BINS, dtype=torch.float64)
    quarter[:20, :20], half[:20] = 3.0, 0.5
    maps = torch.stack((quarter, half, torch.ones_like(half), torch.zeros_like(half)))
    maps[:, 0, 0] = torch.nan
    visits = torch.full((BINS, BINS), 10.0, dtype=torch.float64)
    bits = rate_maps.spatial_information(maps, visits)
    known = BINS**2 - 1  # -log2 of the share of the arena
    expected = [math.log2(known / 399), math.log2(known / 799), 0.0]
    assert bits[:3].tolist() == pytest.approx(expected, abs=1e-12)
    assert bits[3].isnan()


def test_autocorrelogram_is_that_of_a_plain_loop():
    maps = torch.rand(2, 9, 9, generator=generator(), dtype=torch.float64)
    maps[0, 2, 3:5] = torch.nan
    found = rate_maps.autocorrelograms(maps)
    seen = 0
    for m, image in zip(maps.numpy(), found.numpy()):
        for dy in range(-8, 9):
            for dx in range(-8, 9):
                a = m[max(0, dy):9 + min(0, dy), max(0, dx):9 + min(0, dx)]
                b = m[max(0, -dy):9 + min(0, -dy), max(0, -dx):9 + min(0, -dx)]
                both = ~np.isnan(a) & ~np.isnan(b)
                got = image[dy + 8, dx + 8]
                if both.sum() < rate_maps.LEAST_OVERLAP:
                    assert np.isnan(got)
                else:
                    seen += 1
                    assert got == pytest.approx(np.corrcoef(a[both], b[both])[0, 1], abs=1e-9)
    assert seen > 150


@pytest.mark.parametrize("spacing", [0.4, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("turn", [0.0, 0.3])
def test_grid_score_is_high_for_hexagons_alone(spacing, turn):
    maps = torch.stack((
        hexagons(spacing, turn), waves(spacing, [turn, turn + math.pi / 2]), waves(spacing, [turn]),
        torch.exp(-(X**2 + Y**2) / 0.1), torch.ones_like(X),
    ))
    hexagonal, square, stripes, place, constant = rate_maps.grid_scores(maps)
    assert hexagonal > 1
    assert square < -0.5
    assert stripes < 0.3 and place < 0.3
    assert constant.isnan()


def test_grid_score_does_not_depend_on_scale_chunks_or_a_missing_edge():
    maps = torch.stack((hexagons(0.7), waves(0.7, [0.0, math.pi / 2]), hexagons(0.5)))
    scores = rate_maps.grid_scores(maps)
    assert torch.allclose(rate_maps.grid_scores(1e-3 * maps + 5, chunk=2), scores, atol=1e-6)
    maps[:, :2] = torch.nan
    assert torch.allclose(rate_maps.grid_scores(maps), scores, atol=0.1)


class KnownUnits:
    """A navigation task whose net's units are known functions of the place: hexagons, noise, silence."""

    steps = 20

    class model(torch.nn.Module):
        class rnn:
            hidden_size = 3

            def __new__(cls, moves, start):
                positions = start[0] + moves.cumsum(dim=0)
                x, y = positions[..., 0] - 0.1, positions[..., 1] - 0.2
                k = 2 * math.pi / (0.7 * math.sqrt(3) / 2)
                hexagonal = sum(1 + torch.cos(k * (x * math.cos(a) + y * math.sin(a)))
                                for a in (0.0, math.pi / 3, 2 * math.pi / 3))
                noise = torch.rand(hexagonal.shape, generator=generator(int(1000 * moves.sum().abs())))
                return torch.stack((hexagonal, noise, torch.zeros_like(noise)), dim=-1), None

        @staticmethod
        def encoder(start):
            return start

    def __init__(self):
        self.generator = generator()

    def activation(self, start):
        return start


def test_measure_finds_the_grid_unit_among_noise_and_silence():
    task = KnownUnits()
    before = task.generator.get_state()
    found = rate_maps.measure(task, samples=40_000, shuffles=4)
    assert torch.equal(task.generator.get_state(), before)
    assert found.active.tolist() == [True, True, False]
    scores, bits = found.scores["grid_score"], found.scores["spatial_information"]
    assert scores[0] > 1 and scores[0] > found.threshold("grid_score")
    assert bits[0] > found.threshold("spatial_information") > bits[1] and bits[1] < 0.01
    assert scores[2].isnan() and bits[2].isnan()
    assert found.share("spatial_information") == 0.5  # one of the two active ones
    assert found.shuffled["grid_score"].shape == (4, 3) and found.shuffled["grid_score"][:, 2].isnan().all()
    # A walk's states at another walk's places tell little of the place.
    assert (found.shuffled["spatial_information"][:, 0] < 0.2 * bits[0]).all()
    numbers = json.loads(json.dumps(found.numbers(), allow_nan=False))
    assert numbers["units"] == 3 and numbers["active"] == 2
    assert numbers["grid_score"]["largest"] == pytest.approx(scores[0].item(), abs=1e-4)
    assert numbers["grid_score"]["of each unit"][2] is None


# --- persistence -----------------------------------------------------------------------------------------

def test_a_circle_has_one_long_loop_and_no_other():
    pytest.importorskip("ripser")
    points = torch.arange(40)[:, None] * (2 * math.pi * 5 / 40)
    components, loops = persistence.diagrams(points, "circle")
    gap = 2 * math.pi * 5 / 40
    assert len(components) == 39 and np.allclose(components, [0, gap], atol=1e-4)
    assert len(loops) == 1
    # Born when neighbours are joined; filled when three points are within a third of the way round of each other.
    assert loops[0, 0] == pytest.approx(gap, rel=1e-4)
    assert loops[0, 1] == pytest.approx(14 * gap, rel=1e-4)  # 13 1/3 gaps, in whole ones
    assert persistence.longest(loops) == pytest.approx(13 * gap, rel=1e-4)
    assert persistence.largest_ratio(loops) == pytest.approx(14, rel=1e-4)


def test_a_torus_has_two_long_loops_and_one_void():
    pytest.importorskip("ripser")
    points = mk.manifold("torus").grid(100)
    _, loops, voids = persistence.diagrams(points, "torus", 2)
    lives = np.sort(np.ptp(loops, axis=1))[::-1]
    assert (lives[:2] > 2).all() and (lives[2:] < 0.5).all()
    assert (np.ptp(voids, axis=1) > 0.5).sum() == 1


def test_persistence_of_no_features():
    assert persistence.longest(np.zeros((0, 2))) == 0 and persistence.largest_ratio(np.zeros((0, 2))) == 1


def test_misread_rows_are_those_whose_view_gives_the_points():
    points = torch.randn(7, 3, generator=generator())
    rows = persistence.misread(points)
    assert rows.shape == (7, 3)
    assert torch.equal(rows.contiguous().view(3, 7, 1)[..., 0].T, points)  # as the authors' code reads them
    assert not torch.equal(rows, points)
    assert torch.equal(rows.flatten().sort().values, points.flatten().sort().values)
    line = torch.randn(7, 1, generator=generator())
    assert torch.equal(persistence.misread(line), line)


def test_points_are_compared_with_draws_of_their_own_start():
    pytest.importorskip("ripser")
    torus = mk.manifold("torus")
    config = replace(NAVIGATION, net="torus_trained")
    lattice = torus.grid(49)  # as regular as no draw
    used, rows = persistence.compare(config, lattice, torus, draws=5)
    numbers = used.numbers()
    assert numbers["H0"]["longest"]["own"] == pytest.approx(10 / 7)
    assert numbers["H0"]["median"]["own"] == pytest.approx(10 / 7)
    assert numbers["H0"]["median"]["p"] == pytest.approx(1 / 6)  # no draw's gaps are all that wide
    assert len(numbers["H0"]["longest"]["drawn"]) == 5
    assert numbers["H0"]["longest"]["p"] == 1  # every draw has a longer gap
    assert set(numbers) == {"H0", "H1", "H2"}
    assert len(rows.own[0]) < len(used.own[0]) == 48  # re-paired, some nodes fall on each other: no life to speak of
    again = persistence.compare(config, lattice, torus, draws=5)[0].numbers()
    assert again == numbers
    (only,) = persistence.compare(replace(config, net="circle_trained"), mk.manifold("circle").grid(20),
                                  mk.manifold("circle"), draws=1)
    assert only.what == "points as the penalty used them"
    part = persistence.compare(config, torus.grid(100), torus, most=30, draws=1)[0]
    assert len(part.own[0]) == 29 and len(part.drawn[0][0]) == 29


def test_fresh_points_are_drawn_as_the_run_drew_its_own():
    r3 = mk.manifold("r3")
    paper = persistence.fresh_points(ADDING, r3, 2000, generator())
    assert (paper >= 0).all() and paper.max() <= 10 and paper.mean().item() == pytest.approx(5, abs=0.2)
    code = persistence.fresh_points(replace(ADDING, r3="code"), r3, 2000, generator())
    assert code.std().item() == pytest.approx(10, rel=0.05)  # AddingTask.R3_SPREAD


def test_without_ripser_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ripser", None)
    with pytest.raises(ImportError) as error:
        persistence.diagrams(torch.rand(5, 2), "torus")
    assert str(error.value) == ("persistence diagrams need ripser, which is not installed; run pip install "
                                "'moduli-kernels[tda]' or pip install ripser")


# --- the pictures ----------------------------------------------------------------------------------------

def lines_of(ax):
    return [c.get_segments() for c in ax.collections if isinstance(c, matplotlib.collections.LineCollection)]


def test_a_saved_run_is_the_run(root):
    for config in (NAVIGATION, ADDING):
        folder = config.folder(root)
        run = Run(config, folder)
        weight, mask = run.task.recurrent()[0]
        _, regularizer = next(iter(run.geometry.items()))
        saved = saved_runs.saved(folder)
        assert saved.config == config and saved.result == run.result
        for got, expected in zip(saved.first(), (weight, mask, regularizer.rows.points)):
            assert torch.equal(got, expected.detach())
        assert saved.manifold == regularizer.manifold


def test_kept_connections_drawn_are_the_mask(root, monkeypatch):
    drawn = []
    plot = figures.plots.plot_connections

    def seen(mask, points, manifold, neurons, ax):
        drawn.append((mask, neurons))
        return plot(mask, points, manifold, neurons=neurons, ax=ax)

    monkeypatch.setattr(figures.plots, "plot_connections", seen)
    pictures, runs, numbers = figures.connections(saved_runs.finished_runs(root), False)
    assert [run.config for run in runs] == [NAVIGATION]  # unpruned nets and R^3 are not taken
    run = Run(NAVIGATION, NAVIGATION.folder(root))
    (mask, neurons), = drawn
    assert torch.equal(mask, run.task.recurrent()[0][1])
    counts = mask.sum(dim=1)
    assert len(neurons) == 3 and min(counts[neurons]) >= counts.topk(4).values[3]
    assert list(numbers[runs[0].folder.name].values()) == counts[neurons].tolist()
    lines = lines_of(pictures["connections"].axes[0])
    points = runs[0].first()[2]
    for pieces, j in zip(lines, neurons):
        sources = {tuple(np.round(points[k].tolist(), 4)) for k in mask[j].nonzero()[:, 0].tolist() if k != j}
        ends = {tuple(np.round(end, 4)) for piece in pieces for end in piece}
        assert sources <= ends


def test_weights_drawn_are_rows_and_columns_dense_and_pruned(root):
    pictures, runs, numbers = figures.neuron_weights(saved_runs.finished_runs(root), False)
    assert [run.sparsity for run in runs] == [0.0, 0.9]
    axes = [ax for ax in pictures["neuron_weights"].axes if "neuron" in ax.get_title()]
    assert len(axes) == 4
    neuron = runs[1].first()[1].sum(dim=1).argsort(descending=True, stable=True)[0]
    for run, pair in zip(runs, (axes[:2], axes[2:])):
        weight, mask, _ = run.first()
        weight = weight * mask
        for ax, row in zip(pair, (weight[neuron], weight[:, neuron])):
            values = next(c for c in ax.collections if c.get_array() is not None).get_array()
            assert np.allclose(np.sort(values), np.sort(row[row != 0].numpy()))
    assert numbers[runs[0].folder.name][0] == f"24 non-zero weights into neuron {neuron}"


def test_inhibitors_of_figure_6_are_the_papers():
    d = torch.linspace(0, 7, 50, dtype=torch.float64)
    expected = (d**2, 10 - 10 * (torch.exp(-d**2 / 5) - torch.exp(-d**2)), 10 + 10 * torch.cos(2 * d))
    for inhibitor, values in zip(figures.INHIBITORS.values(), expected, strict=True):
        assert torch.allclose(inhibitor(d), values)


def test_every_figure_of_short_runs(root, tmp_path, monkeypatch, capsys):
    pytest.importorskip("ripser")
    monkeypatch.setattr(rate_maps, "picture", small_rate_maps)
    monkeypatch.setattr(figures, "DPI", 40)
    assert paper_figures.main(["--runs", str(root), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "left out" not in out and out.count("Figure ") == 5
    records = {}
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000
        records[path.stem.split("-")[0]] = json.loads(path.with_suffix(".json").read_text())
    assert set(records) == {"connections", "inhibitors", "neuron_weights", "persistence", "rate_maps"}
    (run,) = records["persistence"]["runs"]
    assert run["config"]["net"] == "r3_trained" and run["config"]["seed"] == 1
    assert run["end"] == saved_runs.saved(ADDING.folder(root)).result.history[-1]
    for record in records.values():
        assert {"commit", "dirty", "versions"} <= record["drawn_at"].keys() and record["numbers"]
        assert all({"commit", "versions"} <= run["trained_at"].keys() for run in record["runs"])


original = rate_maps.picture


def small_rate_maps(task, untrained, what):
    """As `rate_maps.picture`, over few walks."""
    measure = rate_maps.measure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rate_maps, "measure", lambda task: measure(task, samples=12_000, shuffles=2))
        return original(task, untrained, what)


def test_given_runs_are_drawn(root, tmp_path, capsys):
    folder = NAVIGATION.folder(root)
    assert paper_figures.main(["--figure", "1c", "--run", str(folder), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"Figure 1c: {tmp_path / 'connections.png'}\n"
    record = json.loads((tmp_path / "connections.json").read_text())
    assert [run["folder"] for run in record["runs"]] == [folder.name]


def test_figures_without_a_run_are_left_out_or_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "DPI", 40)
    runs, out = ["--runs", str(tmp_path / "none")], ["--out", str(tmp_path / "out")]
    assert paper_figures.main([*runs, *out]) == 0  # figure 6 needs none
    said = capsys.readouterr().out
    assert said.count("left out: the figure needs") == 4 and (tmp_path / "out" / "inhibitors.png").exists()
    assert paper_figures.main([*runs, *out, "--figure", "8"]) == 1
    assert capsys.readouterr().err == (
        "Failed: the figure needs a finished run with trained points, got none; train one, e.g. with python -m "
        "examples.adding --net r3_trained --cut 0.95, or name its folder with --run.\n")


def test_folders_that_are_no_finished_run_are_refused(root, tmp_path, capsys):
    def refused(folder, figure="1c"):
        assert paper_figures.main(["--figure", figure, "--run", str(folder), "--out", str(tmp_path)]) == 1
        return capsys.readouterr().err

    assert refused(tmp_path) == (f"Failed: run must be a folder with a checkpoint.safetensors, got {tmp_path}; train a "
                                 "net, e.g. with python -m examples.navigation --net torus --cut 0.9.\n")
    (tmp_path / "checkpoint.safetensors").write_bytes(b"half of one")
    assert refused(tmp_path).startswith("Failed: run must be a checkpoint of this trainer, got ")
    config = replace(ADDING, seed=2)
    unfinished = config.folder(tmp_path)
    unfinished.mkdir()

    class Stop(Exception):
        pass

    run = Run(config, unfinished)
    run._epoch, epoch = lambda e, *rest: epoch(e, *rest) if e == 0 else (_ for _ in ()).throw(Stop), run._epoch
    with pytest.raises(Stop):
        run.train()
    assert refused(unfinished) == f"Failed: run must be finished, got {unfinished} after 1 of 2 epochs; let it go on.\n"
    assert saved_runs.finished_runs(tmp_path) == []
    adding = ADDING.folder(root)
    assert refused(adding, "rate_maps") == ("Failed: run must be of navigation, on a device that is here, got adding "
                                            f"on cpu in {adding}; name another.\n")


def test_figure_8_without_ripser(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ripser", None)
    assert paper_figures.main(["--figure", "8", "--runs", str(root), "--out", str(tmp_path)]) == 1
    assert "need ripser, which is not installed; run pip install" in capsys.readouterr().err
