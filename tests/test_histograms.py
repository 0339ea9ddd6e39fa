"""Tests the counts of kept connections by distance, and their histograms in TensorBoard."""
from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

import moduli_kernels as mk
from moduli_kernels import plots
from moduli_kernels.histograms import add_histograms, kept_by_distance
from moduli_kernels.plots import figures
from tests.support.penalty_cases import generator, on_device
from tests.support.rnn_cases import draw, quiet

pytestmark = [on_device, *quiet]


@pytest.mark.parametrize("case", ["mask", "weight", "blocks", "columns", "kernel"])
def test_kept_by_distance_is_a_brute_force_histogram(case):
    rows, cols, blocks, bins = 300, 40 if case in ("columns", "kernel") else 300, 3 if case == "blocks" else 1, 12
    m = mk.manifold("sphere")
    points, others = (m.sample(n, generator=generator(n), dtype=torch.float64) for n in (rows, cols))
    others = points if rows == cols else others
    d = m.distance(points, others).repeat(blocks, 1)
    weight = torch.where(d < 4, draw(blocks * rows, cols, dtype=torch.float64), 0)
    weight[:5] = 0
    mask = {"mask": weight != 0, "kernel": weight[:, :, None] * torch.tensor([0, 1.0, 0])}.get(case, weight)
    got = kept_by_distance(mask, points, m, cols=None if rows == cols else others, bins=bins, blocks=blocks)
    pairs, edges = np.histogram(d.cpu(), bins, (0, d.max().item()))
    kept = np.histogram(d[weight != 0].cpu(), bins, (0, d.max().item()))[0]
    assert np.allclose(got.edges, edges) and got.counts.tolist() == pairs.tolist()
    assert np.array_equal((got.fraction * got.counts).round(), kept) and 0.1 < kept.sum() / pairs.sum() < 0.4


def test_kept_by_distance_is_what_the_plot_draws():
    m, points = mk.manifold("torus"), mk.manifold("torus").sample(70, generator=generator())
    mask = m.distance(points, points) < 2.5
    got = kept_by_distance(mask, points, "torus", bins=9)
    drawn = plots.plot_kept_against_distance(mask, points, m, mk.DifferenceOfGaussians(), bins=9).lines[0].get_data()
    enough = got.counts >= figures.MIN_PAIRS
    assert enough.sum() > 5 and np.allclose((got.edges[1:] + got.edges[:-1]) / 2, drawn[0])
    assert np.array_equal(got.fraction[enough], drawn[1][enough])


def test_nothing_as_large_as_the_weight_is_made():
    class Line(mk.Euclidean):
        largest = 0

        def squared_distance(self, x, y):
            Line.largest = max(Line.largest, len(x) * len(y))
            return super().squared_distance(x, y)

    points = 10 * torch.rand(1500, 1, generator=generator())
    kept_by_distance(torch.ones(1500, 1500, dtype=torch.bool), points, Line(1))
    assert 0 < Line.largest <= 256 * 1500


def test_a_bin_without_connections_has_no_fraction():
    got = kept_by_distance(torch.eye(2) > 0, torch.tensor([[0.0], [3.0]]), mk.Euclidean(1), bins=4)
    assert got.counts.tolist() == [2, 0, 0, 2] and got.edges.tolist() == [0, 0.75, 1.5, 2.25, 3]
    assert got.fraction[[0, 3]].tolist() == [1, 0] and got.fraction[1:3].isnan().all()


@pytest.mark.parametrize(("mask", "settings", "error", "message"), [
    ([[1]], {}, TypeError, "mask must be a tensor (rows, columns), got a list"),
    (torch.ones(4), {}, ValueError, "mask must have shape (blocks*R, C) with blocks=1"),
    (torch.ones(4, 4), {"blocks": 3}, ValueError, "mask must have shape (blocks*R, C) with blocks=3"),
    (torch.ones(4, 5), {}, ValueError, "cols must be the points of the 5 columns, got None"),
    (torch.ones(5, 5), {}, ValueError, "points must have shape (5, 2)"),
    (torch.ones(4, 4), {"bins": 0}, ValueError, "bins must be an integer of at least 1, got 0"),
    (torch.eye(4).to_sparse(), {}, TypeError, "mask must be dense, got torch.sparse_coo; pass mask.to_dense()."),
])
def test_kept_by_distance_refuses(mask, settings, error, message):
    with pytest.raises(error, match=re.escape(message)):
        kept_by_distance(mask, torch.rand(4, 2), "torus", **settings)


def test_tensorboard_histograms(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    net = nn.ModuleDict({"gru": nn.GRU(3, 20), "rnn": mk.SparseRNN(20, 20)})
    reg, pruner = mk.regularize(net), mk.MagnitudePruner([(net["rnn"], "weight_hh_l0")])
    pruner.step_to(0.8)
    with torch.no_grad():
        net["rnn"].weight_hh_l0.fill_(1)  # what the mask removes must not count, whatever its value
    with SummaryWriter(str(tmp_path)) as writer:
        add_histograms(writer, reg, 7, pruner=pruner, bins=5)
        with pytest.raises(TypeError, match="got a CoefficientRegularizer for gru.weight_hh_l0; pass the"):
            add_histograms(writer, reg.matched(), 8)
    events = EventAccumulator(str(tmp_path), size_guidance={HISTOGRAMS: 0}).Reload()
    assert sorted(events.Tags()["histograms"]) == [
        f"kept {what} by distance/{name}.weight_hh_l0" for what in ("connections", "share") for name in ("gru", "rnn")]
    (number,) = events.Histograms("kept connections by distance/rnn.weight_hh_l0")
    (share,) = events.Histograms("kept share by distance/rnn.weight_hh_l0")
    points = dict(reg.items())["rnn.weight_hh_l0"].rows.points
    want = kept_by_distance(net["rnn"].weight_hh_l0_mask, points, "torus", bins=5)
    assert number.step == 7 and sum(number.histogram_value.bucket) == 80  # 20 % of 400 connections
    assert number.histogram_value.bucket_limit == want.edges[1:].tolist()
    assert share.histogram_value.bucket == want.fraction.tolist()
    (gates,) = events.Histograms("kept connections by distance/gru.weight_hh_l0")
    assert sum(gates.histogram_value.bucket) == gates.histogram_value.num == 3 * 400
    assert events.Scalars("sparsity")[0].value == pytest.approx(0.8)
