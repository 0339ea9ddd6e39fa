"""What makes a tensor honours its argument's device and torch's default device."""
import pytest
import torch
from torch import nn

import moduli_kernels as mk

PRESETS = ("torus", "torus6", "circle", "sphere", "s3", "klein", "r3", "mixed")
INHIBITORS = {
    "dog": mk.DifferenceOfGaussians, "sampled": lambda: mk.DifferenceOfGaussians(zero_min="sampled"),
    "table": lambda: mk.TabulatedInhibitor(lambda d: torch.exp(-d) + torch.tensor(1.0), 18.0, 64),
    "sinusoid": mk.Sinusoid, "callable": lambda: torch.cos,
}


def by_context(call):
    with torch.device("meta"):
        return call()


def by_setting(call):
    torch.set_default_device("meta")
    try:
        return call()
    finally:
        torch.set_default_device(None)


ELSEWHERE = [by_context, by_setting]


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
@pytest.mark.parametrize("manifold", PRESETS)
def test_arguments_on_the_cpu_give_the_same_under_another_default_device(elsewhere, manifold):
    m = mk.manifold(manifold)
    points = m.sample(70, generator=torch.Generator().manual_seed(0), device="cpu")
    weight = torch.randn(70, 70)

    def calls():
        return [mk.manifold_order(points, m), m.distance(points, points), m.fundamental(points),
                mk.moduli_penalty(weight, points, manifold=m)]

    for plain, other in zip(calls(), elsewhere(calls)):
        assert other.device.type == "cpu" and torch.equal(plain, other)


@pytest.mark.filterwarnings("ignore:the inhibitor CallableInhibitor")
@pytest.mark.parametrize("elsewhere", ELSEWHERE)
@pytest.mark.parametrize("inhibitor", INHIBITORS)
def test_penalties_and_regularizers_are_where_their_weights_are(elsewhere, inhibitor):
    model = nn.GRU(3, 6)
    seeded = torch.Generator().manual_seed

    def calls():
        reg = mk.regularize(model, inhibitor=INHIBITORS[inhibitor](), generator=seeded(0))
        reg.strength = 0.3
        state = reg.state_dict()
        reg.load_state_dict(state)
        assert all(t.device.type == "cpu" for t in state.values())
        return [reg(), reg.shuffled(seeded(1))(), reg.matched()()]

    for plain, other in zip(calls(), elsewhere(calls)):
        assert other.device.type == "cpu" and torch.equal(plain, other)


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
@pytest.mark.parametrize("f", [
    mk.DifferenceOfGaussians(), mk.Diffusion(exponent=1.5), mk.Sinusoid(), mk.RickerWavelet(), mk.Constant(),
    INHIBITORS["table"]()], ids=lambda f: type(f).__name__)
def test_inhibitors_give_their_values_where_the_distances_are(elsewhere, f):
    for d in (torch.linspace(0, 9, 20), torch.arange(5)):
        value, other = f(d), elsewhere(lambda d=d: f(d))
        assert other.device.type == "cpu" and torch.equal(value, other)
        assert torch.equal(f.slope(d.float()), elsewhere(lambda d=d: f.slope(d.float())))
    assert f(2).device.type == "cpu"


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
@pytest.mark.parametrize("manifold", PRESETS)
def test_points_are_made_on_the_default_device_unless_another_is_named(elsewhere, manifold):
    assert elsewhere(lambda: mk.manifold(manifold).sample(4)).is_meta
    assert elsewhere(lambda: mk.ManifoldEmbedding(4, manifold)).points.is_meta
    assert elsewhere(lambda: mk.ModuliRegularizer(4, 3, manifold=manifold)).cols.points.is_meta
    named = elsewhere(lambda: mk.ManifoldEmbedding(4, manifold, device="cpu")).points
    assert named.device.type == "cpu" and named.isfinite().all()
    assert mk.ManifoldEmbedding(4, manifold, device="meta").points.is_meta
    assert mk.ManifoldEmbedding(4, manifold).points.device.type == "cpu"


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
@pytest.mark.parametrize("manifold", ["torus", "sphere", "klein", "r3"])
def test_grids(elsewhere, manifold):
    try:
        plain = mk.ManifoldEmbedding(6, manifold, layout="grid").points
    except ValueError:
        pytest.skip("it has no grid")
    assert elsewhere(lambda: mk.ManifoldEmbedding(6, manifold, layout="grid")).points.is_meta
    assert torch.equal(elsewhere(lambda: mk.ManifoldEmbedding(6, manifold, layout="grid", device="cpu")).points, plain)


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
def test_plots_and_histograms(elsewhere):
    pytest.importorskip("matplotlib").use("Agg")
    points, weight = mk.manifold("torus").sample(40, device="cpu"), torch.randn(40, 40)
    mask = weight > 1

    def calls():
        mk.plots.plot_connections(mask, points, "torus")
        mk.plots.plot_weight_heatmap(weight, points, "torus")
        mk.plots.plot_inhibitor(mk.DifferenceOfGaussians(), "torus")
        mk.plots.plot_neuron_weights(weight, points, "torus", 3)
        return mk.plots.plot_kept_against_distance(mask, points, "torus", inhibitor=mk.DifferenceOfGaussians())

    elsewhere(calls)
    __import__("matplotlib.pyplot").pyplot.close("all")


def test_a_generator_tells_the_device():
    generator = torch.Generator("cpu").manual_seed(0)
    assert by_context(lambda: mk.ManifoldEmbedding(4, generator=generator)).points.device.type == "cpu"


def test_points_without_values_have_no_order():
    with pytest.raises(ValueError, match="points must have values, got a tensor on the meta device"):
        mk.manifold_order(torch.empty(5, 2, device="meta"), "torus")
