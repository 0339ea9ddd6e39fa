"""What a regularizer saves, and what it takes: safetensors, settings by value, NumPy's numbers, the meta device."""
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import moduli_kernels as mk


def saved_and_loaded(module, path):
    save_file(module.state_dict(), str(path / "state.safetensors"))
    return load_file(str(path / "state.safetensors"))


# --- safetensors --------------------------------------------------------------------------------------------------

MAKERS = {
    "recurrent": lambda: mk.ModuliRegularizer(5),
    "trained": lambda: mk.ModuliRegularizer(5, trainable=True),
    "rows and columns": lambda: mk.ModuliRegularizer(5, 4, manifold="sphere"),
    "one embedding given twice": lambda: (lambda e: mk.ModuliRegularizer(e, e))(mk.ManifoldEmbedding(5)),
    "given points with other strides": lambda: mk.ModuliRegularizer(
        mk.ManifoldEmbedding(5, points=torch.rand(2, 5).T)),
    "coefficients": lambda: mk.CoefficientRegularizer(torch.rand(4, 5).T),
    "matched": lambda: mk.ModuliRegularizer(5).matched(),
    "shuffled": lambda: mk.ModuliRegularizer(5, blocks=3).shuffled(),
    "grid": lambda: mk.ManifoldEmbedding(6, "sphere", layout="grid"),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_save_file_takes_the_state_dict(kind, tmp_path):
    torch.manual_seed(0)
    module = MAKERS[kind]()
    torch.manual_seed(1)
    other = MAKERS[kind]()
    other.load_state_dict(saved_and_loaded(module, tmp_path))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


@pytest.mark.parametrize("make", [lambda: nn.GRU(3, 5, num_layers=2, bidirectional=True), lambda: nn.LSTMCell(3, 5)])
def test_save_file_takes_what_regularize_returns(make, tmp_path):
    model = make()
    reg, other = mk.regularize(model, strength=0.3), mk.regularize(model)
    other.load_state_dict(saved_and_loaded(reg, tmp_path))
    assert torch.equal(reg(), other())
    save_file(nn.ModuleDict({"net": model, "reg": reg}).state_dict(), str(tmp_path / "both.safetensors"))


def test_shared_points_are_saved_once():
    assert list(mk.ModuliRegularizer(5).state_dict()) == ["_extra_state", "rows.points"]
    assert list(mk.ModuliRegularizer(5, 4).state_dict()) == ["_extra_state", "rows.points", "cols.points"]


def as_before(regularizer):
    """The state dict as it was while shared points stood in it twice."""
    state = regularizer.state_dict()
    return {**state, "cols.points": state["rows.points"]}


def test_a_state_that_holds_shared_points_twice_loads():
    saved, other = mk.ModuliRegularizer(5), mk.ModuliRegularizer(5)
    other.load_state_dict(as_before(saved))
    assert torch.equal(other.rows.points, saved.rows.points)
    model = nn.GRU(3, 5)
    reg, other = mk.regularize(model), mk.regularize(model)
    state = reg.state_dict()
    other.load_state_dict({**state, "regularizers.weight_hh_l0.cols.points":
                           state["regularizers.weight_hh_l0.rows.points"]})
    assert torch.equal(reg(), other())


def test_columns_of_their_own_are_not_dropped_silently():
    saved, other = mk.ModuliRegularizer(5, 5), mk.ModuliRegularizer(5)
    with pytest.raises(RuntimeError, match="cols.points must equal the points of the rows"):
        other.load_state_dict(saved.state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*cols.points"):
        mk.ModuliRegularizer(5, 5).load_state_dict(mk.ModuliRegularizer(5).state_dict())


# --- settings are compared by value -------------------------------------------------------------------------------

def damped(d):
    return torch.exp(-d)


SAME = {
    "radius": ({"manifold": mk.Circle(5)}, {"manifold": mk.Circle(5.0)}),
    "numpy radius": ({"manifold": mk.Circle(np.float32(5))}, {"manifold": mk.Circle()}),
    "periods": ({"manifold": mk.FlatTorus((10, 10))}, {"manifold": "torus"}),
    "list of periods": ({"manifold": mk.FlatTorus([np.int64(10), 10.0])}, {"manifold": "torus"}),
    "klein": ({"manifold": mk.KleinBottle(10, np.float64(10))}, {"manifold": "klein"}),
    "dimension": ({"manifold": mk.Sphere(np.int64(3), 5)}, {"manifold": "s3"}),
    "euclidean": ({"manifold": mk.Euclidean(np.int32(3), 10)}, {"manifold": "r3"}),
    "product": ({"manifold": mk.Product(mk.Sphere(2, 5), mk.FlatTorus((10, 10)))}, {"manifold": "mixed"}),
    "c": ({"inhibitor": mk.DifferenceOfGaussians(c=100)}, {"inhibitor": mk.DifferenceOfGaussians(c=100.0)}),
    "numpy c": ({"inhibitor": mk.DifferenceOfGaussians(np.float64(100), zero_min=np.bool_(True))}, {}),
    "sinusoid": ({"inhibitor": mk.Sinusoid(10, np.float32(2))}, {"inhibitor": mk.Sinusoid()}),
    "ricker": ({"inhibitor": mk.RickerWavelet(1, 1)}, {"inhibitor": mk.RickerWavelet()}),
    "diffusion": ({"inhibitor": mk.Diffusion(1, 2)}, {"inhibitor": mk.Diffusion()}),
    "constant": ({"inhibitor": mk.Constant(np.int64(1))}, {"inhibitor": mk.Constant()}),
    "table": ({"inhibitor": mk.TabulatedInhibitor(damped, 18)}, {"inhibitor": mk.TabulatedInhibitor(damped, 18.0)}),
    "power": ({"power": 2}, {"power": 2.0}),
    "numpy power": ({"power": np.float32(2)}, {"power": 2.0}),
    "function": ({"inhibitor": damped}, {"inhibitor": damped}),
}


@pytest.mark.parametrize("case", SAME)
def test_equal_settings_are_equal_however_they_are_written(case):
    one, other = (mk.ModuliRegularizer(4, **settings) for settings in SAME[case])
    other.load_state_dict(one.state_dict())
    one.load_state_dict(other.state_dict())
    assert one.manifold == other.manifold and one.inhibitor == other.inhibitor and one.power == other.power
    assert "np." not in repr(one) and repr(one) == repr(other)


COEFFICIENTS = torch.ones(4, 4)


@pytest.mark.parametrize(("saved", "mine", "name"), [
    (mk.ModuliRegularizer(4, reduction="sum", strength=1e-3), mk.ModuliRegularizer(4), "reduction"),
    (mk.CoefficientRegularizer(COEFFICIENTS, reduction="sum"), mk.CoefficientRegularizer(COEFFICIENTS), "reduction"),
    (mk.CoefficientRegularizer(COEFFICIENTS, power=2), mk.CoefficientRegularizer(COEFFICIENTS), "power"),
])
def test_a_strength_is_not_taken_over_to_another_reduction_or_power(saved, mine, name):
    with pytest.raises(ValueError, match=f"^{name} of the saved regularizer must equal this one's"):
        mine.load_state_dict(saved.state_dict())
    assert mine.strength == 1


def with_settings(regularizer, **settings):
    """Its state as an earlier release saved it, with the text that the settings then had, and without a strength."""
    state = regularizer.state_dict()
    used = {"manifold": "FlatTorus(periods=(10.0, 10.0))", "power": 1.0,
            "inhibitor": "DifferenceOfGaussians(c=100.0, sigma1=0.25, sigma2=5.0, zero_min=True)", **settings}
    return {**state, "_extra_state": torch.tensor(list(json.dumps(used).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(("settings", "text"), [
    ({}, {}),
    ({"manifold": "circle"}, {"manifold": "Circle(radius=5)"}),
    ({"manifold": "circle"}, {"manifold": "Circle(radius=np.float64(5.0))"}),
    ({"manifold": "s3"}, {"manifold": "Sphere(dim=np.int64(3), radius=5)"}),
    ({}, {"inhibitor": "DifferenceOfGaussians(c=100, sigma1=0.25, sigma2=5, zero_min=True)"}),
    ({"power": 2.0}, {"power": 2}),
    ({"inhibitor": damped}, {"inhibitor": "CallableInhibitor(damped)"}),
])
def test_texts_of_earlier_releases_load(settings, text):
    regularizer = mk.ModuliRegularizer(4, **settings)
    regularizer.load_state_dict(with_settings(regularizer, **text))


@pytest.mark.parametrize("text", [
    {"manifold": "Circle(radius=5.0)"}, {"manifold": "FlatTorus(periods=(10.0, 10.5))"}, {"power": 2.0},
    {"inhibitor": "DifferenceOfGaussians(c=100.0, sigma1=0.25, sigma2=5.0, zero_min=False)"},
    {"inhibitor": "DifferenceOfGaussians(c=100.0, sigma1=0.25, sigma2=5.0, zero_min='sampled')"},
])
def test_other_settings_are_refused(text):
    regularizer = mk.ModuliRegularizer(4)
    with pytest.raises(ValueError, match=f"{next(iter(text))} of the saved regularizer must equal this one's"):
        regularizer.load_state_dict(with_settings(regularizer, **text))


class Line(mk.Manifold):
    """A manifold of one's own, whose text holds an address in memory."""

    ambient_dim = 1

    def sample(self, n, *, generator=None, dtype=None, device=None):
        return torch.rand(n, 1, generator=generator, dtype=dtype, device=device)

    def squared_distance(self, x, y):
        return (x[:, None, 0] - y[None, :, 0]).square()


def test_a_manifold_of_ones_own_is_the_same_in_the_next_process():
    one, other = mk.ModuliRegularizer(4, manifold=Line()), mk.ModuliRegularizer(4, manifold=Line())
    other.load_state_dict(one.state_dict())


@pytest.mark.parametrize("owner", [
    mk.Circle(np.float32(5)), mk.Sphere(np.int64(2), np.float64(5)), mk.FlatTorus(np.array([10, 12])),
    mk.KleinBottle(np.int32(10), np.float16(10)), mk.Euclidean(np.int64(2), np.float32(3)),
    mk.DifferenceOfGaussians(np.float32(100), np.float64(0.25), np.int64(5)), mk.Diffusion(np.float32(1), np.int64(2)),
    mk.Sinusoid(np.float32(10), np.float64(2)), mk.RickerWavelet(np.float64(1), np.int64(2)), mk.Constant(np.int64(2)),
    mk.TabulatedInhibitor(damped, np.float32(18), np.int64(64)), mk.FlatTorus((10, 12)), mk.Constant(3),
], ids=lambda owner: repr(owner))
def test_numbers_are_kept_as_pythons_floats_and_ints(owner):
    for name, value in vars(owner).items():
        for number in value if isinstance(value, tuple) else (value,):
            assert type(number) is (int if name in ("dim", "samples") else bool if name == "zero_min"
                                    or name == "trainable" else float) or number is None, name


def test_numpy_scalars_as_arguments_of_a_regularizer():
    r = mk.ModuliRegularizer(np.int64(4), np.int32(3), power=np.float32(2), blocks=np.int64(2),
                             strength=np.float64(0.5))
    assert [type(v) for v in (r.power, r.blocks, r.strength)] == [float, int, float]
    assert r(torch.ones(8, 3)).isfinite()


# --- the meta device ----------------------------------------------------------------------------------------------

def on_meta(make):
    with torch.device("meta"):
        return make()


@pytest.mark.parametrize("layout", ["uniform", "grid"])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("manifold", ["torus", "sphere", "circle"])
def test_an_embedding_made_on_meta_gets_points_by_reset_parameters(layout, trainable, manifold):
    make = lambda: mk.ManifoldEmbedding(6, manifold, layout=layout, trainable=trainable)  # noqa: E731
    embedding = on_meta(make)
    assert embedding.points.is_meta
    embedding.to_empty(device="cpu")
    assert embedding.points.isnan().all()  # nothing that could be taken for points
    torch.manual_seed(3)
    embedding.reset_parameters()
    torch.manual_seed(3)
    assert torch.equal(embedding.points, make().points) and embedding.trainable == trainable


def test_reset_parameters_takes_a_generator_and_keeps_dtype_and_storage():
    embedding = mk.ManifoldEmbedding(6, "klein", dtype=torch.float64, trainable=True)
    before, address = embedding.points, embedding.points.data_ptr()
    embedding.reset_parameters(torch.Generator().manual_seed(5))
    again = mk.ManifoldEmbedding(6, "klein", dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert torch.equal(embedding.points, again.points)
    assert embedding.points is before and embedding.points.data_ptr() == address


def test_given_points_are_restored():
    points = torch.rand(5, 2)
    embedding = mk.ManifoldEmbedding(5, points=points, trainable=True)
    with torch.no_grad():
        embedding.points.add_(1)
    embedding.reset_parameters()
    assert torch.equal(embedding.points, points)
    embedding = embedding.to("meta").to_empty(device="cpu")
    embedding.reset_parameters()
    assert torch.equal(embedding.points, points)
    unknown = mk.ManifoldEmbedding(5, points=points.to("meta")).to_empty(device="cpu")
    with pytest.raises(ValueError, match="points must be drawn or given with values to be reset"):
        unknown.reset_parameters()


def everything_reset(module):
    """The protocol of FSDP and others: every module that has reset_parameters is asked to initialize itself."""
    for each in module.modules():
        if hasattr(each, "reset_parameters"):
            each.reset_parameters()


@pytest.mark.parametrize("trainable", [False, True])
def test_a_model_and_its_regularization_made_on_meta(trainable):
    model = on_meta(lambda: nn.GRU(3, 5, num_layers=2))
    reg = on_meta(lambda: mk.regularize(model, trainable=trainable, strength=0.2))
    both = nn.ModuleList([model, reg]).to_empty(device="cpu")
    for each in model.modules():
        each.reset_parameters()
    assert reg().isnan()  # until its points are drawn
    everything_reset(both)
    assert reg().isfinite() and reg() > 0 and reg.strength == 0.2
    points = [r.rows.points for _, r in reg.items()]
    assert not torch.equal(*points)
    reg.reset_parameters(torch.Generator().manual_seed(1))
    again = mk.regularize(model, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(a.rows.points, b.rows.points) for (_, a), (_, b) in zip(reg.items(), again.items()))


def test_rows_and_columns_are_drawn_one_after_the_other():
    r = on_meta(lambda: mk.ModuliRegularizer(5, 4)).to_empty(device="cpu")
    r.reset_parameters(torch.Generator().manual_seed(2))
    again = mk.ModuliRegularizer(5, 4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(r.rows.points, again.rows.points) and torch.equal(r.cols.points, again.cols.points)


def test_a_state_dict_initializes_as_well():
    saved = mk.ModuliRegularizer(5)
    r = on_meta(lambda: mk.ModuliRegularizer(5)).to_empty(device="cpu")
    r.load_state_dict(saved.state_dict())
    assert torch.equal(r.rows.points, saved.rows.points)
    r = on_meta(lambda: mk.ModuliRegularizer(5))
    r.load_state_dict(saved.state_dict(), assign=True)
    assert r(torch.ones(5, 5)) == saved(torch.ones(5, 5))


def test_controls_of_what_is_on_meta_are_nan_until_they_are_loaded():
    saved = mk.ModuliRegularizer(5).shuffled()
    control = on_meta(lambda: mk.ModuliRegularizer(5).shuffled()).to_empty(device="cpu")
    assert control(torch.ones(5, 5)).isnan()
    control.load_state_dict(saved.state_dict())
    assert control(torch.ones(5, 5)) == saved(torch.ones(5, 5))
    model = nn.RNN(2, 3)
    with pytest.raises(TypeError, match="regularizers must have points to be drawn again"):
        mk.regularize(model).matched().reset_parameters()
