"""`regularize` penalizes the weights that a forward pass uses, found by their exact names."""
import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import moduli_kernels as mk


def used(module, name):
    """The weight under `name` as a forward pass of the module has just used it, without a graph."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # RNNs say that their weights are no single chunk of memory
        size = getattr(module, "input_size", None) or module.in_features
        module.eval()(torch.zeros(1, size))
        return getattr(module, name).clone()


def expected(reg, name, weight):
    return dict(reg.items())[name](weight)


def old_hook(norm, module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return norm(module, name)


class Double(nn.Module):
    """A parametrization of one's own, with a Parameter."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, weight):
        return self.factor * weight


BEHIND = {
    "orthogonal": (parametrizations.orthogonal, ["parametrizations.{}.original"]),
    "weight_norm": (parametrizations.weight_norm,
                    ["parametrizations.{}.original0", "parametrizations.{}.original1"]),
    "spectral_norm": (parametrizations.spectral_norm, ["parametrizations.{}.original"]),
    "own": (lambda m, n: parametrize.register_parametrization(m, n, Double()),
            ["parametrizations.{}.original", "parametrizations.{}.0.factor"]),
    "two in a row": (lambda m, n: parametrize.register_parametrization(parametrizations.spectral_norm(m, n), n,
                                                                       Double()),
                     ["parametrizations.{}.original", "parametrizations.{}.1.factor"]),
    "old spectral_norm": (lambda m, n: old_hook(spectral_norm, m, n), ["{}_orig"]),
    "old weight_norm": (lambda m, n: old_hook(weight_norm, m, n), ["{}_g", "{}_v"]),
    "prune": (lambda m, n: prune.random_unstructured(m, n, 0.5), ["{}_orig"]),
}


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("how", BEHIND)
def test_every_layer_and_direction_counts_whatever_it_is_made_of(kind, how):
    rnn = getattr(nn, kind)(3, 6, num_layers=2, bidirectional=True)
    apply, behind = BEHIND[how]
    names = [f"weight_hh_l{k}{way}" for k in (0, 1) for way in ("", "_reverse")]
    for name in (names[0], names[3]):
        apply(rnn, name)
    reg = mk.regularize(rnn, manifold="torus")
    assert [name for name, _ in reg.items()] == names
    losses = reg.losses()
    sum(losses.values()).backward()
    reached = {name for name, p in rnn.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {names[1], names[2], *(text.format(n) for n in (names[0], names[3]) for text in behind)}
    for name in names:
        torch.testing.assert_close(losses[name].detach(), expected(reg, name, used(rnn, name)))


@pytest.mark.parametrize("how", BEHIND)
def test_after_an_optimizer_has_written_what_is_behind(how):
    """The attribute that an old hook or torch.nn.utils.prune writes is out of date then."""
    cell = nn.GRUCell(3, 6)
    BEHIND[how][0](cell, "weight_hh")
    reg = mk.regularize(cell)
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        (10 * reg() + cell(torch.ones(1, 3)).sum()).backward()
        optimizer.step()
    value = reg().detach()
    torch.testing.assert_close(value, expected(reg, "weight_hh", used(cell, "weight_hh")))


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, lambda m, n: old_hook(spectral_norm, m, n)])
def test_reading_makes_no_step_of_a_power_iteration(norm):
    rnn = nn.RNN(3, 6)
    norm(rnn, "weight_hh_l0")
    reg, before = mk.regularize(rnn), copy.deepcopy(rnn.state_dict())
    for _ in range(3):
        reg().backward()
    assert all(torch.equal(t, before[name]) for name, t in rnn.state_dict().items())


@pytest.mark.parametrize("extra", ["weight_hh_l0_scores", "weight_hh_l1", "weight_hh_l", "weight_hh_l0_reverse",
                                   "weight_hh_l0_lora_A", "weight_hh_l00"])
@pytest.mark.parametrize("kind", [nn.GRU, mk.SparseRNN])
def test_parameters_whose_names_only_begin_alike_are_left_alone(kind, extra):
    rnn = kind(3, 6)
    rnn.register_parameter(extra, nn.Parameter(torch.ones(6, 6)))
    reg = mk.regularize(rnn)
    assert [name for name, _ in reg.items()] == ["weight_hh_l0"]
    reg().backward()
    assert rnn.get_parameter(extra).grad is None


class Subclass(nn.LSTM):
    pass


class SubCell(nn.LSTMCell):
    pass


@pytest.mark.parametrize(("make", "name", "blocks"), [
    (lambda: Subclass(3, 4), "weight_hh_l0", 4), (lambda: SubCell(3, 4), "weight_hh", 4),
    (lambda: nn.GRUCell(3, 4), "weight_hh", 3), (lambda: mk.SparseRNNCell(3, 4), "weight_hh", 1)])
def test_subclasses_and_cells(make, name, blocks):
    module = make()
    parametrizations.weight_norm(module, name)
    reg = mk.regularize(nn.ModuleDict({"net": module}))
    ((found, regularizer),) = reg.items()
    assert (found, regularizer.blocks) == (f"net.{name}", blocks)
    reg().backward()


class WeightDrop(nn.RNN):
    """As the libraries write it: the Parameter has another name, and a hook writes the weight."""

    def __init__(self, raw="weight_hh_l0_raw"):
        super().__init__(3, 6)
        parameter = self._parameters.pop("weight_hh_l0")
        self.register_parameter(raw, nn.Parameter(parameter.detach()))
        self.weight_hh_l0 = parameter.detach()
        self.register_forward_pre_hook(self.drop)

    @staticmethod
    def drop(module, _):
        module.weight_hh_l0 = nn.functional.dropout(module.weight_hh_l0_raw, 0.5)


def test_a_weight_of_unknown_origin_is_refused_and_the_error_names_its_parameter():
    model = nn.Sequential(WeightDrop())
    with pytest.raises(ValueError, match=r"weight_hh_l0 of WeightDrop must be .* targets=\[\(module, "
                                         r"'weight_hh_l0_raw'\)\]"):
        mk.regularize(model)
    reg = mk.regularize(model, [(model[0], "weight_hh_l0_raw")])
    assert [name for name, _ in reg.items()] == ["0.weight_hh_l0_raw"]
    ((_, regularizer),) = reg.items()
    assert regularizer.cols is regularizer.rows
    reg().backward()
    assert model[0].weight_hh_l0_raw.grad is not None


class Wrapper(nn.Module):
    """As fastai does: the wrapper has the Parameter, and the net a plain tensor."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(3, 6)
        self.weight_hh_l0_raw = nn.Parameter(self.rnn._parameters.pop("weight_hh_l0").detach())
        self.rnn.weight_hh_l0 = self.weight_hh_l0_raw.clone()


def test_a_weight_whose_parameter_another_module_owns_is_refused_too():
    with pytest.raises(ValueError, match="where `module` is the one that owns it"):
        mk.regularize(Wrapper())


class Computed(nn.Module):
    """A weight that a property computes is never out of date."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))

    @property
    def weight(self):
        return self.a @ self.b


def test_a_weight_that_a_property_computes():
    module = Computed()
    reg = mk.regularize(module, [(module, "weight")])
    reg().backward()
    assert module.a.grad.any() and module.b.grad.any()
    torch.testing.assert_close(reg(), expected(reg, "weight", module.a @ module.b))


# --- tied weights -------------------------------------------------------------------------------------------------

class Of(nn.Module):
    """Gives another module's weight in place of the own."""

    def __init__(self, source, name):
        super().__init__()
        self.source, self.name = [source], name

    def forward(self, _):
        return getattr(self.source[0], self.name)


def tied_by_parametrization():
    a, b = nn.RNN(3, 6), nn.RNN(3, 6)
    parametrize.register_parametrization(b, "weight_hh_l0", Of(a, "weight_hh_l0"))
    return a, b


def tied_and_parametrized_alike():
    a, b = nn.GRU(3, 6), nn.GRU(3, 6)
    b.weight_hh_l0 = a.weight_hh_l0
    for each in (a, b):
        parametrize.register_parametrization(each, "weight_hh_l0", Triple())
    b.parametrizations.weight_hh_l0.original = a.parametrizations.weight_hh_l0.original
    return a, b


class Triple(nn.Module):
    def forward(self, weight):
        return 3 * weight


def tied_and_pruned():
    a, b = nn.RNN(3, 6), nn.RNN(3, 6)
    prune.random_unstructured(a, "weight_hh_l0", 0.5)
    prune.custom_from_mask(b, "weight_hh_l0", a.weight_hh_l0_mask)
    b.weight_hh_l0_orig = a.weight_hh_l0_orig
    return a, b


def tied():
    a, b = nn.LSTM(3, 6), nn.LSTM(3, 6)
    b.weight_hh_l0 = a.weight_hh_l0
    return a, b


@pytest.mark.parametrize("make", [tied, tied_by_parametrization, tied_and_parametrized_alike, tied_and_pruned])
def test_tied_weights_count_once(make):
    model = nn.ModuleList(make())
    assert [name for name, _ in mk.regularize(model).items()] == ["0.weight_hh_l0"]
    both = [(module, "weight_hh_l0") for module in model]
    assert len(list(mk.regularize(model, both).items())) == 1


def test_one_parameter_that_two_modules_turn_into_different_weights_counts_twice():
    a, b = nn.RNN(3, 6), nn.RNN(3, 6)
    b.weight_hh_l0 = a.weight_hh_l0
    parametrize.register_parametrization(b, "weight_hh_l0", Triple())
    b.parametrizations.weight_hh_l0.original = a.weight_hh_l0
    model = nn.ModuleList([a, b])
    reg = mk.regularize(model)
    assert len(list(reg.items())) == 2
    reg().backward()
    assert a.weight_hh_l0.grad is not None


def test_equal_weights_that_are_not_tied_count_twice():
    model = nn.ModuleList([nn.RNN(3, 6), nn.RNN(3, 6)])
    model[1].load_state_dict(model[0].state_dict())
    assert len(list(mk.regularize(model).items())) == 2


def test_equal_columns_are_one_target_however_they_are_written():
    linear = nn.Linear(8, 6)
    slices = [slice(2, None), slice(2, 8), slice(-6, None), slice(0, 6)]
    reg = mk.regularize(linear, [mk.Target(linear, "weight", columns=columns) for columns in slices])
    assert len(list(reg.items())) == 2


# --- masks --------------------------------------------------------------------------------------------------------

def test_masked_weights_cost_nothing_whoever_writes_them():
    net = mk.SparseRNN(3, 8)
    mask = torch.rand(8, 8) < 0.5
    net.set_mask("weight_hh_l0", mask)
    reg = mk.regularize(net)
    net.weight_hh_l0.data.normal_()
    torch.testing.assert_close(reg(), expected(reg, "weight_hh_l0", torch.where(mask, net.weight_hh_l0, 0)))
