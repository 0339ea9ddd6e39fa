"""What plots draw is what the arguments hold, on every manifold, without a display and without warnings.

The test suite turns warnings into errors.
"""
import io
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import moduli_kernels as mk
from moduli_kernels import plots
from moduli_kernels.plots import figures

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

from moduli_kernels.plots.charts import chart, great_circles, section  # noqa: E402
from tests.support.penalty_cases import MANIFOLDS  # noqa: E402

PRESETS = ("torus", "torus6", "circle", "sphere", "s3", "klein", "r3", "mixed")


class Segment(mk.Manifold):
    """[0, 1] as a user's own manifold, which remembers how many distances it computed at once at most."""

    ambient_dim = 1
    largest = 0

    def sample(self, n, *, generator=None, dtype=None, device=None):
        return torch.rand(n, 1, generator=generator, dtype=dtype, device=device)

    def squared_distance(self, x, y):
        Segment.largest = max(Segment.largest, len(x) * len(y))
        return (x[:, :1] - y[:, 0]).square()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def case(m, n=60, seed=0, density=0.2):
    """A manifold, n points on it and a sparse weight matrix."""
    m = mk.manifold(m)
    weight = torch.randn(n, n, generator=generator(seed + 1))
    weight *= torch.rand(n, n, generator=generator(seed + 2)) < density
    return m, m.sample(n, generator=generator(seed), dtype=torch.float64), weight


def render(ax):
    ax.figure.savefig(io.BytesIO(), format="png", dpi=40)
    return ax


def lines_of(ax):
    """The polylines of the links in a picture by `plot_connections`, one list for each neuron."""
    found = [c for c in ax.collections if isinstance(c, matplotlib.collections.LineCollection)]
    return [c.get_segments() for c in found]


def star(ax, label):
    return np.asarray(next(c for c in ax.collections if c.get_label().startswith(label)).get_offsets())[0]


# --- every picture on every manifold ---------------------------------------------------------------------

OTHERS = [mk.FlatTorus((6.0,)), mk.Sphere(1, 2.0), mk.Euclidean(1), mk.Euclidean(2), Segment(),
          mk.Product(mk.Circle(), mk.Euclidean(2)), mk.KleinBottle(6.0, 9.0)]


@pytest.mark.parametrize("m", [*PRESETS, *OTHERS, *(m for name, m in MANIFOLDS.items() if name not in PRESETS)],
                         ids=lambda m: "Segment" if isinstance(m, Segment) else str(m))
def test_every_picture_is_drawn_with_title_and_labels(m):
    m, points, weight = case(m)
    f = mk.DifferenceOfGaussians()
    mask = weight != 0
    for ax in (
        plots.plot_connections(mask, points, m),
        plots.plot_weight_heatmap(weight, points, m),
        plots.plot_kept_against_distance(mask, points, m, f),
        plots.plot_inhibitor(f, m),
        plots.plot_neuron_weights(weight, points, m, 7),
    ):
        render(ax)
        assert ax.get_title() and ax.get_xlabel() and ax.get_ylabel()


@pytest.mark.parametrize("name, label", [
    ("torus", "flat torus (10 x 10)"), ("torus6", "6-torus, first two coordinates (10 x 10)"),
    ("circle", "circle of radius 5"), ("sphere", "sphere of radius 5, equal-area map"),
    ("s3", "3-sphere of radius 5, first two coordinates"), ("klein", "Klein bottle (10 x 10)"),
    ("r3", "R^3, first two coordinates"), ("mixed", "sphere of radius 5, equal-area map, first of 2 factors"),
])
def test_titles_say_what_part_is_shown(name, label):
    m, points, weight = case(name)
    assert plots.plot_connections(weight, points, m).get_title().split("\n")[1] == label
    assert plots.plot_neuron_weights(weight, points, m, 0).get_title().split("\n")[1] == label


def test_draws_on_the_axes_given_and_leaves_pyplot_alone():
    from matplotlib import pyplot as plt

    m, points, weight = case("torus")
    before = plt.get_fignums()
    ax = matplotlib.figure.Figure().subplots()
    assert plots.plot_connections(weight, points, m, ax=ax) is ax
    assert plots.plot_weight_heatmap(weight, points, m, ax=ax) is ax
    assert plots.plot_kept_against_distance(weight, points, m, mk.Constant(), ax=ax) is ax
    assert plots.plot_inhibitor(mk.Constant(), m, ax=ax) is ax
    assert plots.plot_neuron_weights(weight, points, m, 0, ax=ax) is ax
    plots.plot_connections(weight, points, m)
    assert plt.get_fignums() == before


def test_takes_parameters_and_leaves_them_alone():
    m, points, weight = case("torus")
    weight, points = torch.nn.Parameter(weight), torch.nn.Parameter(points)
    copies = weight.detach().clone(), points.detach().clone()
    for ax in (plots.plot_connections(weight, points, m), plots.plot_weight_heatmap(weight, points, m),
               plots.plot_kept_against_distance(weight, points, m, mk.Constant()),
               plots.plot_neuron_weights(weight, points, m, 0)):
        render(ax)
    assert torch.equal(weight, copies[0]) and torch.equal(points, copies[1]) and weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_takes_16_bit_weights(dtype):
    m, points, weight = case("torus")
    image = plots.plot_weight_heatmap(weight.to(dtype), points.to(dtype), m).images[0]
    assert image.get_array().shape == (60, 60)
    plots.plot_neuron_weights(weight.to(dtype), points.to(dtype), m, 0)
    plots.plot_kept_against_distance(weight.to(dtype), points.to(dtype), m, mk.Constant())


# --- links -----------------------------------------------------------------------------------------------

def pairs_of(m, count, seed):
    a, b = (m.sample(count, generator=generator(s), dtype=torch.float64) for s in (seed, seed + 1))
    return a, b, m.distance(a, b).diagonal().numpy()


def links(picture, a, b):
    """The polylines of each pair, one list for each pair."""
    return [picture.links(a[i:i + 1].numpy(), b[i:i + 1].numpy()) for i in range(len(a))]


@pytest.mark.parametrize("m", [
    mk.FlatTorus(), mk.FlatTorus((6.0, 11.0)), mk.KleinBottle(), mk.KleinBottle(6.0, 11.0),
    mk.KleinBottle(11.0, 6.0),
], ids=str)
def test_rectangle_links_are_geodesics_cut_at_the_border(m):
    """Pieces stay in the rectangle, start and end at the two points, and go on where the border is glued.

    Together they are as long as the distance, so that none crosses the picture.
    """
    picture = chart(m)
    a, b, d = pairs_of(m, 300, 5)
    cut = 0
    for i, pieces in enumerate(links(picture, a, b)):
        cut += len(pieces) > 1
        assert np.allclose(pieces[0][0], a[i]) and np.allclose(pieces[-1][-1], b[i])
        assert sum(np.linalg.norm(p[1] - p[0]) for p in pieces) == pytest.approx(d[i], abs=1e-9)
        for p in pieces:
            assert (p >= -1e-9).all() and (p <= picture.sides + 1e-9).all()
        for p, q in zip(pieces, pieces[1:]):
            assert m.distance(torch.tensor(p[1:]), torch.tensor(q[:1])) < 1e-6
    assert cut > 100  # of 300, so that the test sees the border


def test_torus_links_are_never_longer_than_half_a_period():
    m, points, weight = case("torus", density=1.0)
    for segments in lines_of(plots.plot_connections(weight, points, m, neurons=range(10))):
        assert len(segments) >= 59
        assert max(np.ptp(s, axis=0).max() for s in segments) <= 5


def test_first_two_coordinates_of_a_6_torus_wrap_too():
    m = mk.manifold("torus6")
    a, b, _ = pairs_of(m, 100, 5)
    flat = mk.FlatTorus()
    d = flat.distance(a[:, :2], b[:, :2]).diagonal()
    for i, pieces in enumerate(links(chart(m), a, b)):
        assert sum(np.linalg.norm(p[1] - p[0]) for p in pieces) == pytest.approx(d[i].item(), abs=1e-9)


@pytest.mark.parametrize("m", [mk.Circle(), mk.FlatTorus((6.0,))], ids=str)
def test_ring_links_go_the_short_way_round(m):
    picture = chart(m)
    a, b, d = pairs_of(m, 100, 5)
    for i, (line,) in enumerate(links(picture, a, b)):
        assert np.allclose(line[[0, -1]], picture.place(np.concatenate([a[i:i + 1], b[i:i + 1]])))
        turned = np.unwrap(np.arctan2(line[:, 1], line[:, 0]))
        assert abs(turned[-1] - turned[0]) * picture.radius == pytest.approx(d[i])
        assert (np.linalg.norm(line, axis=1) <= picture.radius + 1e-9).all()


def test_great_circles():
    m = mk.Sphere(3, 2.0)
    a, b, d = pairs_of(m, 50, 5)
    # The last two pairs are a point and itself, and antipodes.
    a, b = torch.cat([a, a[:1], a[:1]]).numpy(), torch.cat([b, a[:1], -a[:1]]).numpy()
    arcs = great_circles(a, b)
    assert np.allclose(np.linalg.norm(arcs, axis=2), 2)
    assert np.allclose(arcs[:, 0], a) and np.allclose(arcs[:, -1], b)
    length = np.linalg.norm(np.diff(arcs, axis=1), axis=2).sum(1)
    assert np.allclose(length, [*d, 0, 2 * math.pi], rtol=1e-3)


def test_sphere_links_are_cut_at_the_date_line():
    m = mk.Sphere()
    picture = chart(m)
    a, b, _ = pairs_of(m, 300, 5)
    on_it = torch.tensor([[-5.0, -0.0, 1.0], [-5.0, 0.0, 1.0], [-5.0, -0.0, 1.0]], dtype=torch.float64)
    near_it = torch.tensor([[-4.0, 3.0, 0.0], [-4.0, 3.0, 0.0], [-5.0, -0.0, -1.0]], dtype=torch.float64)
    a, b = torch.cat([a, on_it]), torch.cat([b, near_it])
    drawn = links(picture, a, b)
    assert sum(len(lines) > 1 for lines in drawn) > 50
    for i, lines in enumerate(drawn):
        assert np.allclose(lines[0][0], picture.place(a[i:i + 1].numpy())[0])
        assert np.allclose(lines[-1][-1], picture.place(b[i:i + 1].numpy())[0])
        for left, right in zip(lines, lines[1:]):  # the border is an ellipse of 2 : 1, and its opposite points are one
            assert np.allclose(left[-1], right[0] * [-1, 1]) and abs(left[-1][0]) > 0
            assert (left[-1] ** 2 / [8, 2]).sum() == pytest.approx(1)
        for line in lines:  # the map is 5.7 wide, so no step goes across it
            assert np.linalg.norm(np.diff(line, axis=0), axis=1).max() < 1.2


def test_the_map_of_the_sphere_has_equal_areas():
    size = 40
    x, y, points, _ = chart(mk.Sphere()).mesh(size)
    corners = np.stack([x, y], -1)
    diagonal1, diagonal2 = corners[1:, 1:] - corners[:-1, :-1], corners[1:, :-1] - corners[:-1, 1:]
    area = np.abs(diagonal1[..., 0] * diagonal2[..., 1] - diagonal1[..., 1] * diagonal2[..., 0]) / 2
    edges = np.sin(np.linspace(-math.pi / 2, math.pi / 2, size + 1))
    expected = np.diff(edges)[:, None] * math.pi / size
    assert np.allclose(area, expected, rtol=0.03)
    assert area.sum() == pytest.approx(4 * math.pi, rel=2e-3)


# --- plot_connections ------------------------------------------------------------------------------------

def test_links_come_from_the_row_of_each_neuron():
    m, points, _ = case("r3", n=20)
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[3, [5, 9]] = True  # connections from 5 and 9 into 3
    mask[[1, 2], 3] = True  # connections out of 3 are not drawn
    mask[4, 4] = True
    ax = plots.plot_connections(mask, points, m, neurons=(3, 4))
    place = points[:, :2].numpy()
    into3, into4 = lines_of(ax)
    assert np.allclose(into3, [place[[3, 5]], place[[3, 9]]])
    assert len(into4) <= 1
    assert np.allclose(star(ax, "neuron 3: 2"), place[3]) and np.allclose(star(ax, "neuron 4: 1"), place[4])
    assert ax.get_title().startswith("3 kept connections into 2 neurons\n")


def test_weights_and_their_mask_draw_the_same():
    m, points, weight = case("torus")
    a, b = (plots.plot_connections(x, points, m, neurons=[0, 1]) for x in (weight, weight != 0))
    for left, right in zip(lines_of(a), lines_of(b)):
        assert np.array_equal(left, right)


def test_points_outside_the_rectangle_are_drawn_inside():
    m, points, weight = case("torus")
    ax = plots.plot_connections(weight, points + 30, m, neurons=[0])
    assert np.allclose(star(ax, "neuron 0"), points[0])


def test_without_neurons_four_spread_over_the_picture_are_taken():
    m, points, weight = case("torus", n=400)
    ax = plots.plot_connections(weight, points, m)
    places = [np.asarray(c.get_offsets())[0] for c in ax.collections if c.get_label().startswith("neuron ")]
    quarters = sorted((p > 5).tolist() for p in places)
    assert quarters == [[False, False], [False, True], [True, False], [True, True]]
    few = plots.plot_connections(weight[:2, :2], points[:2], m)
    assert few.get_title().split("\n")[0].endswith("into 2 neurons")


# --- plot_weight_heatmap ---------------------------------------------------------------------------------

def test_small_heatmap_is_the_permuted_matrix():
    m, points, weight = case("klein", n=100)
    order = mk.manifold_order(points, m)
    shown = plots.plot_weight_heatmap(weight, points, m).images[0].get_array()
    assert np.array_equal(shown, weight.abs()[order][:, order].double().numpy())


@pytest.mark.parametrize("n", [512, 600])
def test_large_heatmap_is_its_cell_means(n):
    m, points, weight = case("torus", n=n)
    mask = weight != 0
    order = mk.manifold_order(points, m)
    permuted = mask[order][:, order].double().numpy()
    edges = np.searchsorted(np.arange(n) * 256 // n, np.arange(257))
    spans = [slice(a, b) for a, b in zip(edges, edges[1:])]
    expected = [[permuted[rows, columns].mean() for columns in spans] for rows in spans]
    ax = plots.plot_weight_heatmap(mask, points, m)
    assert np.allclose(ax.images[0].get_array(), expected)
    assert ax.images[0].get_extent() == [0, n, n, 0]
    assert ax.get_title().startswith("Kept connections in manifold order")


def test_heatmap_of_zeros():
    m, points, weight = case("torus")
    assert plots.plot_weight_heatmap(0 * weight, points, m).images[0].get_array().max() == 0


# --- plot_kept_against_distance --------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["torus", "sphere", "mixed"])
def test_fractions_are_those_of_a_brute_force_histogram(name):
    n, bins = 300, 25  # there are more rows than one tile has
    m, points, weight = case(name, n=n)
    d = m.distance(points, points).numpy()
    weight = torch.where(torch.from_numpy(d) < 3, weight, 0)
    f = mk.DifferenceOfGaussians()
    ax = plots.plot_kept_against_distance(weight, points, m, f, bins=bins)
    middle, fraction = ax.lines[0].get_data()
    pairs, edges = np.histogram(d, bins, (0, d.max()))
    kept, _ = np.histogram(d, bins, (0, d.max()), weights=(weight != 0).double().numpy())
    enough = pairs >= figures.MIN_PAIRS
    assert enough.any() and (name != "mixed" or not enough.all())  # so the test sees a bin that is left out
    assert np.allclose(middle, (edges[1:] + edges[:-1]) / 2)
    assert np.allclose(fraction[enough], kept[enough] / pairs[enough], atol=3e-4)
    assert np.isnan(fraction[~enough]).all()
    assert ax.lines[1].get_ydata()[0] == pytest.approx((weight != 0).double().mean().item())
    x, y = next(other for other in ax.figure.axes if other is not ax).lines[0].get_data()
    assert np.allclose(y, f(torch.from_numpy(x)).numpy()) and x[-1] == pytest.approx(d.max())


def test_distances_are_looked_at_in_tiles():
    Segment.largest = 0
    m, points, weight = case(Segment(), n=1500, density=0.1)
    plots.plot_kept_against_distance(weight, points, m, mk.Constant())
    assert 0 < Segment.largest <= 256 * 1500


@pytest.mark.parametrize("n", [1, 2])
def test_kept_against_distance_with_too_few_pairs_for_any_bin(n):
    m, points, _ = case("torus", n=n)
    ax = plots.plot_kept_against_distance(torch.zeros(n, n, dtype=torch.bool), points, m, mk.Constant())
    assert np.isnan(ax.lines[0].get_ydata()).all()
    render(ax)


# --- plot_inhibitor and plot_neuron_weights --------------------------------------------------------------

def test_inhibitor_on_the_torus_is_f_of_the_wrapped_distance():
    f = mk.Sinusoid()
    ax = plots.plot_inhibitor(f, "torus")
    image = next(c for c in ax.collections if isinstance(c, matplotlib.collections.QuadMesh))
    values, corners = np.asarray(image.get_array()), image.get_coordinates()
    middles = (corners[1:, 1:] + corners[:-1, :-1]) / 2
    delta = np.abs(middles - [3, 3])
    d = np.linalg.norm(np.minimum(delta, 10 - delta), axis=-1)
    assert np.allclose(values.reshape(d.shape), 10 + 10 * np.cos(2 * d))


@pytest.mark.parametrize("name", PRESETS)
def test_inhibitor_sections_are_geodesic(name):
    """Distances in the picture are distances on the whole manifold: f = d runs from 0 to the largest of them."""
    ax = plots.plot_inhibitor(lambda d: d, name)
    image = next(c for c in ax.collections if isinstance(c, matplotlib.collections.QuadMesh))
    values = np.asarray(image.get_array())
    half = 5 * math.pi if name in ("circle", "sphere", "s3", "mixed") else 50**0.5
    assert values.min() < 0.1
    assert values.max() == pytest.approx(half, rel=0.02) or name == "klein"
    picture = section(mk.manifold(name))
    assert ax.get_title().split("\n")[1] == picture.label


def test_inhibitor_on_an_own_manifold_is_shown_at_samples():
    ax = plots.plot_inhibitor(lambda d: d, Segment())
    dots = ax.collections[0]
    place = np.asarray(dots.get_offsets())[:, 0]
    assert len(place) == 2000 and np.allclose(dots.get_array(), np.abs(place - place[0]))


def test_neuron_weights_are_those_of_its_row_at_their_sources():
    m, points, weight = case("torus")
    ax = plots.plot_neuron_weights(weight, points, m, 7)
    dots = next(c for c in ax.collections if c.get_array() is not None)
    drawn = {tuple(p): w for p, w in zip(np.asarray(dots.get_offsets()), np.asarray(dots.get_array()))}
    expected = {tuple(points[k].tolist()): weight[7, k].item() for k in weight[7].nonzero()[:, 0]}
    assert drawn == expected
    assert ax.get_title().startswith(f"{len(expected)} non-zero weights into neuron 7 (star)")
    assert np.allclose(m.fundamental(points)[7], np.asarray(ax.collections[-1].get_offsets())[0])
    top = weight[7].abs().max().item()
    assert dots.get_clim() == (-top, top)  # 0 has the middle colour


def test_a_neuron_without_weights():
    m, points, weight = case("torus")
    assert plots.plot_neuron_weights(0 * weight, points, m, 7).get_title().startswith("0 non-zero weights")
    assert lines_of(plots.plot_connections(0 * weight, points, m, neurons=[7])) == [[]]


# --- errors ----------------------------------------------------------------------------------------------

X, W = torch.rand(6, 2), torch.ones(6, 6)


@pytest.mark.parametrize("call, error, text", [
    (lambda: plots.plot_connections(np.ones((6, 6)), X, "torus"), TypeError,
     "mask must be a tensor (n, n), got a ndarray; pass torch.as_tensor(mask)."),
    (lambda: plots.plot_weight_heatmap(torch.ones(24, 6), X, "torus"), ValueError,
     "weight must have shape (n, n) with n at least 1, got (24, 6); of stacked gate blocks pass one, such as "
     "weight[:n]."),
    (lambda: plots.plot_connections(torch.ones(0, 0), X[:0], "torus"), ValueError,
     "mask must have shape (n, n) with n at least 1, got (0, 0); of stacked gate blocks pass one, such as "
     "mask[:n]."),
    (lambda: plots.plot_neuron_weights(W.to(torch.complex64), X, "torus", 0), TypeError,
     "weight must be real or bool, got torch.complex64; pass weight.abs()."),
    (lambda: plots.plot_weight_heatmap(W.to_sparse(), X, "torus"), TypeError,
     "weight must be dense, got torch.sparse_coo; pass weight.to_dense()."),
    (lambda: plots.plot_connections(W, X[:5], "torus"), ValueError,
     "points must have shape (6, 2) for n=6 on FlatTorus(periods=(10.0, 10.0)), got (5, 2); give one row a "
     "neuron."),
    (lambda: plots.plot_connections(W, X, "torus", neurons=[0, 6]), ValueError,
     "neurons must be from 0 to 5 for 6 neurons, got 6; pick a row of the matrix."),
    (lambda: plots.plot_connections(W, X, "torus", neurons=3), TypeError,
     "neurons must be a sequence of integers, got 3; pass for example [0, 7]."),
    (lambda: plots.plot_connections(W, X, "torus", neurons=[0.5]), TypeError,
     "neurons must be a sequence of integers, got [0.5]; pass for example [0, 7]."),
    (lambda: plots.plot_neuron_weights(W, X, "torus", -1), ValueError,
     "neuron must be from 0 to 5 for 6 neurons, got -1; pick a row of the matrix."),
    (lambda: plots.plot_neuron_weights(W, X, "torus", "a"), TypeError,
     "neuron must be an integer, got 'a'; pass an index such as 0."),
    (lambda: plots.plot_kept_against_distance(W, X, "torus", 3.0), TypeError,
     "inhibitor must be callable on distances, got 3.0; pass for example DifferenceOfGaussians()."),
    (lambda: plots.plot_kept_against_distance(W, X, "torus", mk.Constant(), bins=0), ValueError,
     "bins must be an integer of at least 1, got 0; pass a larger one."),
    (lambda: plots.plot_inhibitor(None, "torus"), TypeError,
     "inhibitor must be callable on distances, got None; pass for example DifferenceOfGaussians()."),
])
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text


def test_without_matplotlib_the_package_imports_and_plots_say_so():
    program = (
        "import sys, torch\n"
        "import moduli_kernels as mk\n"
        "assert 'matplotlib' not in sys.modules\n"
        "sys.modules['matplotlib'] = sys.modules['matplotlib.figure'] = None\n"
        "try: mk.plots.plot_connections(torch.ones(6, 6), torch.rand(6, 2), 'torus')\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "plots need matplotlib, which is not installed; run pip install matplotlib.\n"
