"""benchmarks/masks: blocks counted against brute force, orders that are found again, files read and written."""
from __future__ import annotations

import json
import sys
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import moduli_kernels as mk

for package in ("scipy", "matplotlib", "safetensors"):
    pytest.importorskip(package)

from benchmarks.masks import blocks as counting, table as mask_table, training  # noqa: E402


def draw_mask(shape, density, seed):
    return np.random.default_rng(seed).random(shape) < density


def blocks(mask, side):
    return [mask[i:i + side, j:j + side] for i in range(0, mask.shape[0], side) for j in range(0, mask.shape[1], side)]


def torus_mask(n, reach, seed=0):
    """A mask of all pairs of neurons within `reach`, and their points on the torus."""
    torus = mk.manifold("torus")
    points = torus.sample(n, generator=torch.Generator().manual_seed(seed))
    return (torus.distance(points, points) <= reach).numpy(), points


# --- counting ---------------------------------------------------------------------------------------------------

@settings(max_examples=60)
@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 40)), side=st.integers(1, 45), seed=st.integers(0, 1000),
       density=st.sampled_from([0, 0.02, 0.3, 1]))
def test_counts_equal_brute_force(shape, side, seed, density):
    mask = draw_mask(shape, density, seed)
    counts = counting.block_counts(mask, side)
    expected = [int(block.sum()) for block in blocks(mask, side)]
    assert counts.shape == (-(-shape[0] // side), -(-shape[1] // side)) and counts.ravel().tolist() == expected
    assert counting.filled(counts) == np.mean([block.any() for block in blocks(mask, side)])


@settings(max_examples=60)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=7), percent=st.sampled_from([1, 50, 90, 100]))
def test_the_blocks_that_hold_a_share_are_the_fewest(counts, percent):
    fewest = next(k for k in range(len(counts) + 1)
                  if any(100 * sum(some) >= percent * sum(counts) for some in combinations(counts, k)))
    assert counting.holding(np.array(counts), percent) == fewest / len(counts)


def test_random_masks_keep_so_many_and_fill_what_chance_fills():
    first, second = (counting.random_mask(512, 5000, seed) for seed in (0, 1))
    assert first.sum() == second.sum() == 5000 and (first != second).any()
    assert (first == counting.random_mask(512, 5000, 0)).all()
    by_chance = 1 - (1 - 5000 / 512**2) ** 256
    assert counting.filled(counting.block_counts(first, 16)) == pytest.approx(by_chance, abs=0.02)


# --- orders -----------------------------------------------------------------------------------------------------

def reordered(mask, order):
    return mask[np.ix_(order, order)]


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_block_diagonal_mask_is_found_again(shuffled):
    n, side = 192, 16
    mask = np.kron(np.eye(n // side, dtype=bool), np.ones((side, side), dtype=bool))
    if shuffled:
        mask = reordered(mask, np.random.default_rng(0).permutation(n))
    share = {name: counting.filled(counting.block_counts(reordered(mask, order), side))
             for name, order in counting.own_orders(mask).items()}
    assert min(share.values()) == side / n
    counted = counting.blocks_of(mask, mk.manifold("torus").sample(n, generator=torch.Generator().manual_seed(0)))
    assert counted["filled"][16]["rcm"] == 12 / 144 and counted["holding"][16]["rcm"] == 11 / 144
    assert counted["filled"][16]["random"] > 0.99 and counted["filled"][16]["manifold"] > 0.5


def test_orders_are_permutations_and_idle_neurons_come_last():
    mask, _ = torus_mask(150, 1.0)
    idle = [3, 77, 149]
    mask[idle] = mask[:, idle] = False
    mask = np.triu(mask)  # of a pattern that is not symmetric
    orders = counting.own_orders(mask)
    assert tuple(orders) == counting.OWN
    for order in orders.values():
        assert sorted(order) == list(range(150)) and sorted(order[-3:]) == idle
    degrees = (mask | mask.T).sum(0)[orders["degree"]]
    assert (np.diff(degrees) <= 0).all()


def test_a_local_mask_fills_few_blocks_in_manifold_order_and_hubs_in_order_of_degree():
    mask, points = torus_mask(512, 1.0)
    share = counting.blocks_of(mask, points)["filled"][16]
    assert share["manifold"] < 0.25 and min(share[name] for name in counting.OWN) < 0.35 and share["random"] > 0.99
    hubs = np.zeros((512, 512), dtype=bool)
    some = np.random.default_rng(0).choice(512, 64, replace=False)
    hubs[np.ix_(some, some)] = True
    share = counting.blocks_of(hubs, points)["filled"][16]
    assert share["degree"] == (64 / 512) ** 2 and share["manifold"] > 0.5


# --- files ------------------------------------------------------------------------------------------------------

CUTS = (90, 95, 98)


def stored(folder, name, n, seed=0):
    """Writes a run's masks as train_masks does; they are local on the torus. Gives masks and points."""
    mask, points = torus_mask(n, 2.0, seed)
    masks = {cut: mask & draw_mask((n, n), density, seed) for cut, density in zip(CUTS, (0.8, 0.4, 0.2))}
    packed = {f"mask_{cut}": np.packbits(mask, axis=1) for cut, mask in masks.items()}
    training.write_arrays(folder / f"{name}.npz", packed | {"points": points.numpy()})
    return masks, points


@pytest.mark.parametrize("n", [64, 77])  # a byte's last bits are padding at 77
def test_masks_come_back_as_they_were_stored(tmp_path, n):
    masks, points = stored(tmp_path, "run", n)
    read, read_points = mask_table.read(tmp_path / "run.npz")
    assert torch.equal(points, read_points) and read.keys() == masks.keys()
    for cut, mask in masks.items():
        assert read[cut].dtype == bool and (read[cut] == mask).all()


def recorded(config, errors):
    schedule = config.schedule[-len(errors):]
    history = [{"sparsity": sparsity, "error": error} for sparsity, error in zip(schedule, errors)]
    return {"config": vars(config), "history": history}


@pytest.fixture
def folder(tmp_path):
    """What train_masks leaves half-way: two nets (small ones) with masks, and some of the quality runs."""
    all_runs, found = training.runs(None), {}
    for name, last in (("torus-0.5-n768-block", 15.0), ("torus-0.5-n768-plain", 11.0)):  # finished in this order
        stored(tmp_path, name, 80, seed=int(last))
        found[name] = recorded(all_runs[name], [40, 30, 20, 13, *[50] * 3, 14, *[60] * 3, last])
    for i, name in enumerate(("quality-n512-block16-random-seed1", "quality-n512-block1-seed0",
                              "quality-n512-block16-random-seed0")):
        found[name] = recorded(all_runs[name], [40, 10.0 + i])
    (tmp_path / "runs.json").write_text(json.dumps(found))
    return tmp_path


def test_a_row_for_each_run_and_sparsity(folder):
    rows = mask_table.measured(folder)
    assert [(row["run"], row["cut"]) for row in rows] == [
        (name, cut) for name in ("torus-0.5-n768-plain", "torus-0.5-n768-block") for cut in CUTS]
    assert [row["error"] for row in rows] == [13, 14, 11, 13, 14, 15]
    masks, points = mask_table.read(folder / "torus-0.5-n768-plain.npz")
    order = mk.manifold_order(points, "torus").numpy()
    distance = mk.manifold("torus").distance(points, points).numpy()
    for row, mask in zip(rows, masks.values()):
        assert row["density"] == mask.mean() and row["near"] == 1 and row["neurons"] == 80 and row["block"] == 1
        assert row["near_by_chance"] == (distance <= 2).mean()
        assert row["idle"] == np.mean([not mask[i].any() and not mask[:, i].any() for i in range(80)])
        for side in (16, 32, 64):
            counts = np.array([block.sum() for block in blocks(reordered(mask, order), side)])
            assert row["filled"][side]["manifold"] == (counts > 0).mean()
            assert row["holding"][side]["manifold"] == counting.holding(counts)


def test_quality_runs_by_block_and_order(folder):
    assert mask_table.quality(folder) == [{"block": 1, "order": "-", "errors": {0: 11.0}},
                                          {"block": 16, "order": "random", "errors": {0: 12.0, 1: 10.0}}]


def test_files_written(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mask_table", "--folder", str(folder)])
    mask_table.main()
    text = (folder / "TABLE.md").read_text()
    assert capsys.readouterr().out == text
    lines = text.splitlines()
    assert "| 16 | random | 11.0 | 12.0 | 10.0 |" in lines and "| 1 | - | 11.0 | 11.0 |  |" in lines
    assert sum(line.startswith("| torus-0.5-n768-block | 95 |") for line in lines) == 3
    for heading in (i for i, line in enumerate(lines) if line.startswith("| ---")):  # every table is rectangular
        table = [lines[heading - 1]]
        while heading < len(lines) and lines[heading].startswith("|"):
            table.append(lines[heading])
            heading += 1
        assert len({line.count("|") for line in table}) == 1
    figures = {"masks": mask_table.measured(folder), "quality": mask_table.quality(folder)}
    assert json.loads((folder / "table.json").read_text()) == json.loads(json.dumps(figures))  # keys are strings there
    assert (folder / "masks.png").read_bytes().startswith(b"\x89PNG")


def test_no_runs_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mask_table", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit):
        mask_table.main()
    assert "train nets first with `python -m benchmarks.masks.training`" in capsys.readouterr().err
