"""mk.regularize: which weights it finds, how it reads them, and what it holds."""
from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import moduli_kernels as mk
from tests.support.penalty_cases import draw_weight, expected, generator, on_device, relative_error

pytestmark = on_device


def regularize(model: nn.Module, targets=None, **settings) -> mk.Regularization:
    return mk.regularize(model, targets, **{"generator": generator(), **settings})


def points_of(reg: mk.Regularization) -> dict[str, tuple[int, ...]]:
    """Returns for each weight how many row and column points it has, or one number where they are shared."""
    return {name: (len(r.rows),) if r.cols is r.rows else (len(r.rows), len(r.cols)) for name,
            r in reg.items()}


def wanted(weight: Tensor, r: mk.ModuliRegularizer) -> Tensor:
    cols = None if r.cols is r.rows else r.cols.points
    return expected(weight, r.rows.points, cols, manifold=r.manifold, inhibitor=r.inhibitor, power=r.power,
                    blocks=r.blocks, reduction=r.reduction, strength=r.strength).value


def check(reg: mk.Regularization, weights: dict[str, Tensor]) -> None:
    """Each loss is the penalty of its weight, and the sum is their sum."""
    losses = reg.losses()
    assert list(losses) == list(weights)
    for name, regularizer in reg.items():
        assert losses[name].dim() == 0 and relative_error(losses[name],
                                                          wanted(weights[name], regularizer)) <= 1e-6
    assert relative_error(reg(), sum(wanted(weights[n], r) for n, r in reg.items())) <= 1e-6


# --- the search -------------------------------------------------------------------------------------------

GATES = {nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4, nn.RNNCell: 1, nn.GRUCell: 3, nn.LSTMCell: 4}


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_finds_every_layer_and_direction(kind):
    model = kind(3, 6, num_layers=2, bidirectional=True)
    reg = regularize(model, strength=0.1)
    names = ["weight_hh_l0", "weight_hh_l0_reverse", "weight_hh_l1", "weight_hh_l1_reverse"]
    check(reg, {name: getattr(model, name) for name in names})
    assert points_of(reg) == dict.fromkeys(names, (6,))
    assert {r.blocks for _, r in reg.items()} == {GATES[kind]}
    clouds = [r.rows.points for _, r in reg.items()]
    assert not any(torch.equal(a, b) for i, a in enumerate(clouds) for b in clouds[:i])


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_finds_cells(kind):
    class Mine(kind):
        """A user's subclass."""

    for model in (kind(3, 5), Mine(3, 5)):
        reg = regularize(model)
        check(reg, {"weight_hh": model.weight_hh})
        assert [r.blocks for _, r in reg.items()] == [GATES[kind]]


def test_searches_the_whole_model():
    model = nn.ModuleDict({"encoder": nn.Linear(3, 4),
                           "core": nn.ModuleList([nn.GRU(4, 5), nn.LSTMCell(4, 6)]),
                           "decoder": nn.Linear(5, 2)})
    reg = regularize(model)
    check(reg,
          {"core.0.weight_hh_l0": model["core"][0].weight_hh_l0,
           "core.1.weight_hh": model["core"][1].weight_hh})


@pytest.mark.parametrize("relu", [False, True])
def test_relu_nets(relu):
    model = nn.RNN(3, 5, nonlinearity="relu" if relu else "tanh", bias=False, batch_first=True)
    check(regularize(model), {"weight_hh_l0": model.weight_hh_l0})


def test_settings_reach_each_regularizer():
    reg = regularize(nn.LSTM(3, 5, num_layers=2), manifold="klein", inhibitor=mk.Sinusoid(), power=2.0,
                     reduction="sum",
                     strength=0.3, trainable=True)
    for _, r in reg.items():
        assert (r.manifold, r.inhibitor, r.power, r.reduction, r.strength, r.blocks) == (
            mk.KleinBottle(), mk.Sinusoid(), 2.0, "sum", 0.3, 4)
        assert r.rows.trainable


def test_generator_makes_points_repeatable():
    one, other, third = (regularize(nn.GRU(3, 5, num_layers=2), generator=generator(s)) for s in (1, 1, 2))
    for (_, a), (_, b), (_, c) in zip(one.items(), other.items(), third.items()):
        assert torch.equal(a.rows.points, b.rows.points) and not torch.equal(a.rows.points, c.rows.points)


@pytest.mark.parametrize("dtype,points", [(torch.float32, torch.float32), (torch.float64, torch.float64),
                                          (torch.bfloat16, torch.float32)], ids=str)
def test_points_follow_the_weight(dtype, points):
    reg = regularize(nn.RNN(3, 5, dtype=dtype))
    assert [r.rows.points.dtype for _, r in reg.items()] == [points]
    on_meta = mk.regularize(nn.RNN(3, 5, device="meta"))
    assert [r.rows.points.device.type for _, r in on_meta.items()] == ["meta"]
    chosen = regularize(nn.RNN(3, 5), dtype=torch.float64)
    assert [r.rows.points.dtype for _, r in chosen.items()] == [torch.float64]


# --- targets ----------------------------------------------------------------------------------------------

def test_linear_and_convolution_get_row_and_column_points():
    model = nn.Sequential(nn.Conv2d(3, 4, (2, 5)), nn.Conv1d(4, 6, 3), nn.Linear(7, 8), nn.Linear(5, 5))
    reg = regularize(model, [(m, "weight") for m in model])
    check(reg, {f"{i}.weight": m.weight for i, m in enumerate(model)})
    assert points_of(reg) == {"0.weight": (4, 3), "1.weight": (6, 4), "2.weight": (8, 7), "3.weight": (5, 5)}


def test_target_columns_of_a_cell_on_concatenated_input_and_state():
    """The adding problem's net: Linear(input + hidden, hidden); the hidden columns are its recurrent
    weight."""
    cell = nn.Linear(2 + 9, 9)
    reg = regularize(cell, [mk.Target(cell, "weight", columns=slice(2, None))])
    check(reg, {"weight": cell.weight[:, 2:]})
    assert points_of(reg) == {"weight": (9,)}
    reg().backward()
    assert not cell.weight.grad[:, :2].any() and cell.weight.grad[:, 2:].all()


def test_two_slices_of_one_weight():
    cell = nn.Linear(3 + 8, 8)
    reg = regularize(cell,
                     [mk.Target(cell, "weight", columns=slice(3, None)),
                      mk.Target(cell, "weight", columns=slice(0, 3))])
    check(reg, {"weight": cell.weight[:, 3:], "weight#2": cell.weight[:, :3]})
    assert points_of(reg) == {"weight": (8,), "weight#2": (8, 3)}


def test_target_blocks():
    """A hand-made gated cell: 3 gates in rows, input and state in columns."""
    cell = nn.Linear(2 + 5, 15)
    reg = regularize(cell, [mk.Target(cell, "weight", columns=slice(2, None), blocks=3)])
    check(reg, {"weight": cell.weight[:, 2:]})
    assert points_of(reg) == {"weight": (5,)} and [r.blocks for _, r in reg.items()] == [3]


@pytest.mark.parametrize("recurrent,points", [(None, (5, 5)), (True, (5,)), (False, (5, 5))])
def test_target_recurrent(recurrent, points):
    layer = nn.Linear(5, 5)
    assert points_of(regularize(layer,
                                [mk.Target(layer, "weight", recurrent=recurrent)])) == {"weight": points}


def test_plain_pairs_of_recurrent_modules():
    """(lstm, "weight_hh_l0") as one matrix: its rows are four gates, so rows and columns are told apart."""
    rnn, lstm = nn.RNN(3, 5), nn.LSTM(3, 5)
    assert points_of(regularize(rnn, [(rnn, "weight_hh_l0"), (rnn, "weight_ih_l0")])) == {
        "weight_hh_l0": (5,), "weight_ih_l0": (5, 3)}
    assert points_of(regularize(lstm, [mk.Target(lstm, "weight_hh_l0", blocks=4)])) == {"weight_hh_l0": (5,)}


def test_targets_may_be_any_iterable_and_outside_the_model():
    inside, outside = nn.Linear(3, 4), nn.Linear(5, 6)
    reg = regularize(inside, (pair for pair in [(inside, "weight"), (outside, "weight")]))
    check(reg, {"weight": inside.weight, "Linear.weight": outside.weight})


def test_names_that_collide():
    """Dots become underscores in module names: a.b_weight and a_b.weight stay two."""
    model = nn.Module()
    model.a, model.a_b = nn.Module(), nn.Linear(3, 4)
    model.a.register_parameter("b_weight", nn.Parameter(draw_weight(5, 6)))
    reg = regularize(model, [(model.a, "b_weight"), (model.a_b, "weight")])
    check(reg, {"a.b_weight": model.a.b_weight, "a_b.weight#2": model.a_b.weight})


# --- reading weights --------------------------------------------------------------------------------------

def test_weights_are_read_afresh():
    model = nn.RNN(3, 6)
    reg = regularize(model)
    check(reg, {"weight_hh_l0": model.weight_hh_l0})
    with torch.no_grad():
        model.weight_hh_l0.mul_(3)
    check(reg, {"weight_hh_l0": model.weight_hh_l0})
    model.weight_hh_l0 = nn.Parameter(draw_weight(6, 6))
    check(reg, {"weight_hh_l0": model.weight_hh_l0})
    reg().backward()
    assert model.weight_hh_l0.grad is not None


@pytest.mark.parametrize("when", ["before", "after"])
def test_pruned_by_torch(when):
    """orig * mask as it is now, though the attribute holds it only after a forward; the gradient reaches
    orig."""
    model = nn.Sequential(nn.Linear(6, 6))
    layer = model[0]
    if when == "before":
        prune.random_unstructured(layer, "weight", 0.5)
    reg = regularize(model, [(layer, "weight")])
    if when == "after":
        prune.random_unstructured(layer, "weight", 0.5)
    with torch.no_grad():
        layer.weight_orig.copy_(draw_weight(6, 6))  # as an optimizer would; layer.weight is stale now
        layer.weight_mask[0] = 0
    check(reg, {"0.weight": layer.weight_orig * layer.weight_mask})
    reg().backward()
    assert torch.equal(layer.weight_orig.grad != 0, layer.weight_mask.bool())
    prune.remove(layer, "weight")
    check(reg, {"0.weight": layer.weight})


def test_finds_what_torch_has_pruned():
    model = nn.RNN(3, 6)
    prune.l1_unstructured(model, "weight_hh_l0", 0.5)
    reg = regularize(model)
    check(reg, {"weight_hh_l0": model.weight_hh_l0_orig * model.weight_hh_l0_mask})


def test_pruned_by_magnitude_pruner():
    """Its masked weights are zeros: they cost nothing."""
    model = nn.RNN(3, 8)
    reg = regularize(model)
    pruner = mk.MagnitudePruner([(model, "weight_hh_l0")])
    pruner.step_to(0.75)
    check(reg, {"weight_hh_l0": model.weight_hh_l0})
    value = reg().item()
    reg().backward()
    assert not model.weight_hh_l0.grad[~model.weight_hh_l0_mask].any()
    assert value > 0


def test_parametrized_weights():
    layer = parametrizations.weight_norm(nn.Linear(4, 5))
    reg = regularize(layer, [(layer, "weight")])
    check(reg, {"weight": layer.weight})
    reg().backward()
    assert all(p.grad is not None for name, p in layer.named_parameters() if "weight" in name)


def test_parametrized_weights_are_not_taken_for_tied():
    """Their tensors are made anew at each access, perhaps where the last one lay."""
    model = nn.ModuleList([parametrizations.weight_norm(nn.Linear(4, 5)) for _ in range(40)])
    reg = regularize(model, [(m, "weight") for m in model])
    check(reg, {f"{i}.weight": m.weight for i, m in enumerate(model)})


def test_tied_parametrized_weights_once():
    layer = parametrizations.weight_norm(nn.Linear(4, 5))
    assert len(list(regularize(layer, [(layer, "weight"), (layer, "weight")]).items())) == 1


def test_tied_weights_once():
    model = nn.ModuleList([nn.RNNCell(3, 5), nn.RNNCell(3, 5)])
    model[1].weight_hh = model[0].weight_hh
    reg = regularize(model)
    check(reg, {"0.weight_hh": model[0].weight_hh})
    shared = nn.GRU(3, 5)
    assert len(list(regularize(nn.ModuleList([shared, nn.Sequential(shared)])).items())) == 1


def test_tied_and_pruned_once():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model[1].weight = model[0].weight
    reg = regularize(model, [(m, "weight") for m in model])
    assert [name for name, _ in reg.items()] == ["0.weight"]


# --- what it holds ----------------------------------------------------------------------------------------

def test_parameters_are_the_embeddings_only():
    model = nn.LSTM(3, 5, num_layers=2)
    assert list(regularize(model).parameters()) == []
    reg = regularize(model, trainable=True)
    assert [tuple(p.shape) for p in reg.parameters()] == [(5, 2), (5, 2)]
    ours = {id(p) for p in reg.parameters()}
    assert not ours & {id(p) for p in model.parameters()}
    assert [name for name, _ in reg.named_parameters()] == [
        "regularizers.weight_hh_l0.rows.points", "regularizers.weight_hh_l1.rows.points"]
    assert list(reg.modules()) and not any(isinstance(m, nn.LSTM) for m in reg.modules())


def test_does_not_touch_the_model():
    model = nn.GRU(3, 5)
    state, modules = {n: t.clone() for n, t in model.state_dict().items()}, list(model.modules())
    reg = regularize(model, trainable=True)
    reg().backward()
    assert list(model.modules()) == modules
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_gradients_of_weights_and_points():
    model = nn.LSTM(3, 5)
    reg = regularize(model, trainable=True, strength=0.1)
    (model(draw_weight(4, 3))[0].square().mean() + reg()).backward()
    r, = (r for _, r in reg.items())
    want = expected(model.weight_hh_l0, r.rows.points, blocks=4, strength=0.1)
    assert relative_error(r.rows.points.grad, want.rows) <= 1e-5
    assert torch.isfinite(model.weight_hh_l0.grad).all()


def test_state_dict_round_trip():
    model = nn.GRU(3, 5, num_layers=2)
    one, other = regularize(model, generator=generator(1)), regularize(model, generator=generator(2))
    assert not torch.equal(one(), other())
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(one(), other())
    with pytest.raises(ValueError, match="manifold of the saved regularizer must equal this one's"):
        regularize(model, manifold="klein").load_state_dict(one.state_dict())


def test_saved_with_its_model():
    """deepcopy and pickle of model and regularization together keep them together."""
    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.RNN(3, 5)
            self.reg = regularize(self.rnn)

    trained = Trained()
    copied = copy.deepcopy(trained)
    with torch.no_grad():
        copied.rnn.weight_hh_l0.mul_(2)
    assert torch.allclose(copied.reg(), 2 * trained.reg(), rtol=1e-6)
    pair = pickle.loads(pickle.dumps((trained.rnn, trained.reg)))
    with torch.no_grad():
        pair[0].weight_hh_l0.mul_(3)
    assert torch.allclose(pair[1](), 3 * trained.reg(), rtol=1e-6)


def test_moves_as_modules_do():
    model = nn.RNN(3, 5).double()
    reg = regularize(nn.RNN(3, 5)).double()
    assert all(r.rows.points.dtype == torch.float64 for _, r in reg.items())
    assert regularize(model)().dtype == torch.float64


def test_controls():
    model = nn.LSTM(3, 5, num_layers=2)
    reg = regularize(model, strength=0.1, power=2.0)
    for control in (reg.matched(), reg.shuffled(generator(5))):
        assert list(control.losses()) == list(reg.losses()) and list(control.parameters()) == []
        for (_, c), (_, r) in zip(control.items(), reg.items()):
            assert isinstance(c, mk.CoefficientRegularizer)
            assert (c.strength, c.power, c.reduction) == (0.1, 2.0, "mean")
            assert float(c.coefficients.mean()) == pytest.approx(float(r.coefficients().mean()), rel=1e-6)
        with torch.no_grad():
            before = control().item()
            for name in reg.losses():
                getattr(model, name).mul_(2)
        assert control().item() == pytest.approx(4 * before, rel=1e-5)
    one, other = (regularize(model).shuffled(generator(s)) for s in (1, 1))
    assert torch.equal(one(), other())


def test_warns_of_an_untrainable_inhibitor():
    with pytest.warns(UserWarning, match="inhibitor should not be monotone where points are trained"):
        regularize(nn.RNN(3, 5), inhibitor=mk.Diffusion(), trainable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regularize(nn.RNN(3, 5), inhibitor=mk.Diffusion())


def test_no_graph_stays_behind():
    model = nn.RNN(3, 5)
    reg = regularize(model, trainable=True)
    loss = reg()
    alive = weakref.ref(loss)
    loss.backward()
    del loss
    gc.collect()
    assert alive() is None
