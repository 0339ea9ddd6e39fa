"""What a regularization is about: the model as it is at the call, the copied one in a copy, or an error says so."""
import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

import moduli_kernels as mk


class Model(nn.Module):
    def __init__(self, kind=nn.RNN):
        super().__init__()
        self.rnn = kind(2, 6)
        self.head = nn.Linear(6, 1)


class ReferringToItself(Model):
    """It is freed by the garbage collector only, not as soon as nothing refers to it."""

    def __init__(self, kind=nn.RNN):
        super().__init__(kind)
        self.own = [self]


MODELS = [Model, ReferringToItself]
TOGETHER = {
    "model, reg": lambda model, reg: (model, reg), "list": lambda model, reg: [model, reg],
    "reg, model": lambda model, reg: (reg, model), "dict": lambda model, reg: {"reg": reg, "model": model},
}


def saved_and_loaded(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
          "save": saved_and_loaded}


def parts(pair):
    """(model, reg) from a container of both."""
    each = list(pair.values()) if isinstance(pair, dict) else list(pair)
    return each if isinstance(each[1], mk.Regularization) else each[::-1]


def is_about(reg, rnn):
    """Whether reg() follows this net's weights."""
    value = reg().item()
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(2)
        doubled = reg().item() == pytest.approx(2 * value)
        rnn.weight_hh_l0.mul_(0.5)
    return doubled


# --- copies -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("pair", TOGETHER)
def test_a_copy_of_model_and_regularization_is_about_the_copied_model(kind, how, pair):
    model = kind()
    reg = mk.regularize(model, trainable=True)
    model_2, reg_2 = parts(COPIES[how](TOGETHER[pair](model, reg)))
    assert torch.equal(reg(), reg_2()) and is_about(reg_2, model_2.rnn) and is_about(reg, model.rnn)
    reg_2().backward()
    assert model_2.rnn.weight_hh_l0.grad is not None and model.rnn.weight_hh_l0.grad is None
    assert reg_2.targets["rnn.weight_hh_l0"].module is model_2.rnn


@pytest.mark.parametrize("how", COPIES)
def test_a_model_that_holds_its_regularization_is_copied_with_it(how):
    model = Model()
    model.reg = mk.regularize(model)
    model_2 = COPIES[how](model)
    assert is_about(model_2.reg, model_2.rnn) and is_about(model.reg, model.rnn)
    assert torch.equal(model_2.reg(), model.reg())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_the_regularization_alone_says_that_it_is_about_no_model(kind, how):
    model = kind()
    reg = mk.regularize(model)
    alone = COPIES[how](reg)
    for use in (alone, alone.losses, lambda: alone.targets, lambda: alone.shuffled()()):
        with pytest.raises(ValueError, match=r"rnn.weight_hh_l0 must be a weight of a model that exists, got a RNN "
                                             r"that is gone: .* without it; copy and pickle \(model, reg\)"):
            use()
    assert "not found any more: rnn.weight_hh_l0" in repr(alone) and "not found" not in repr(reg)
    assert is_about(reg, model.rnn)
    again = mk.regularize(kind())
    again.load_state_dict(alone.state_dict())  # its points are of use


def test_the_model_is_not_kept_alive():
    model = Model()
    gone, reg = weakref.ref(model), mk.regularize(model)
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(ValueError, match="a model that exists"):
        reg()


# --- modules that are replaced ------------------------------------------------------------------------------------

def with_the_same_parameters(rnn, kind=nn.RNN):
    other = kind(2, 6)
    for name, parameter in rnn.named_parameters():
        setattr(other, name, parameter)
    return other


def regularized(whole):
    model = Model()
    return model, mk.regularize(model if whole else model.rnn)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("other", [lambda: nn.RNN(2, 6), lambda: nn.GRU(2, 6), lambda: nn.Identity(),
                                   lambda: mk.SparseRNN(2, 6)])
def test_another_module_in_the_place_of_a_regularized_one_is_an_error(whole, other):
    model, reg = regularized(whole)
    reg()
    model.rnn = other()
    with pytest.raises(ValueError, match="call regularize again" if whole else "call regularize for the new model"):
        reg()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", [nn.RNN, mk.SparseRNN])
def test_a_module_with_the_very_same_parameters_is_followed(whole, kind):
    model, reg = regularized(whole)
    value = reg()
    model.rnn = with_the_same_parameters(model.rnn, kind)
    assert torch.equal(reg(), value) and is_about(reg, model.rnn)
    assert next(iter(reg.targets.values())).module is model.rnn
    model.rnn = with_the_same_parameters(model.rnn)  # and once more
    assert is_about(reg, model.rnn)
    model.rnn = nn.RNN(2, 6)
    with pytest.raises(ValueError):
        reg()


def test_the_old_module_may_live_on_elsewhere():
    model = Model()
    reg, old = mk.regularize(model), model.rnn
    model.rnn = nn.RNN(2, 6)
    with pytest.raises(ValueError, match="got another module without its Parameters at 'rnn'"):
        reg()
    model.rnn = old
    assert is_about(reg, old)


@pytest.mark.parametrize("move", [
    lambda model: setattr(model, "rnn", nn.Sequential(model.rnn)),
    lambda model: setattr(model, "rnn", nn.ModuleDict({"net": model.rnn})),
    lambda model: (setattr(model, "encoder", model.rnn), delattr(model, "rnn")),
], ids=["wrapped", "in a dict", "renamed"])
def test_a_module_that_moves_within_its_model_is_followed(move):
    model = Model()
    reg, rnn = mk.regularize(model), model.rnn
    move(model)
    assert is_about(reg, rnn)


def test_a_module_that_was_deleted_is_an_error():
    model = Model()
    reg = mk.regularize(model)
    del model.rnn
    with pytest.raises(ValueError, match="rnn.weight_hh_l0 must still be a weight of the Model"):
        reg()


def test_a_parameter_that_is_replaced_is_read():
    model = Model()
    reg = mk.regularize(model)
    model.rnn.weight_hh_l0 = nn.Parameter(torch.randn(6, 6))
    assert is_about(reg, model.rnn)
    model.rnn = with_the_same_parameters(model.rnn)
    assert is_about(reg, model.rnn)


def test_weights_loaded_by_assignment_are_read():
    model = Model()
    reg = mk.regularize(model)
    model.load_state_dict({name: 2 * t for name, t in model.state_dict().items()}, assign=True)
    assert is_about(reg, model.rnn)


def test_tensors_that_a_functional_call_has_lent_are_not_kept():
    """They have a graph, and such tensors cannot be copied."""
    model = Model()
    model.reg = mk.regularize(model)
    lent = {name: 2 * parameter for name, parameter in model.named_parameters()}

    class Penalty(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return self.model.reg()

    value = torch.func.functional_call(Penalty(), {f"model.{name}": each for name, each in lent.items()})
    torch.testing.assert_close(value, 2 * model.reg())
    torch.func.functional_call(Penalty(), {f"model.{name}": each for name, each in lent.items()})
    twin = copy.deepcopy(model)
    assert is_about(twin.reg, twin.rnn) and not is_about(twin.reg, model.rnn)


@pytest.mark.parametrize("swap", [False, True])
def test_conversions_of_the_model_are_followed(swap):
    model = Model()
    reg = mk.regularize(model)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    reg.double()
    assert reg().dtype == torch.float64 and is_about(reg, model.rnn)


def test_controls_follow_as_well():
    model = Model()
    control = mk.regularize(model).matched()
    model.rnn = with_the_same_parameters(model.rnn)
    assert is_about(control, model.rnn)
    model.rnn = nn.RNN(2, 6)
    with pytest.raises(ValueError, match="call regularize again"):
        control()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by torch.compile's breaks
def test_in_a_compiled_step():
    model = Model(nn.RNNCell)
    reg = mk.regularize(model)
    step = torch.compile(lambda: reg() * 1, backend="eager")
    torch.testing.assert_close(step(), reg())
    cell = nn.RNNCell(2, 6)
    for name, parameter in model.rnn.named_parameters():
        setattr(cell, name, parameter)
    model.rnn = cell
    torch.testing.assert_close(step(), reg())
    model.rnn = nn.RNNCell(2, 6)
    with pytest.raises(ValueError, match="call regularize again"):
        step()


def test_targets_outside_of_the_model():
    model, outside = Model(), nn.RNN(2, 6)
    reg = mk.regularize(model, [(outside, "weight_hh_l0")])
    assert [name for name, _ in reg.items()] == ["RNN.weight_hh_l0"] and is_about(reg, outside)
    pair = copy.deepcopy((outside, reg))
    assert is_about(pair[1], pair[0])


# --- weights that are tied no more --------------------------------------------------------------------------------

def tied_layers():
    rnn = nn.RNN(6, 6, num_layers=2)
    rnn.weight_hh_l1 = rnn.weight_hh_l0
    return rnn


def replaced(rnn):
    rnn.weight_hh_l1 = nn.Parameter(torch.ones(6, 6))


def replaced_the_first(rnn):
    rnn.weight_hh_l0 = nn.Parameter(torch.ones(6, 6))


def loaded_by_assignment(rnn):
    rnn.load_state_dict({key: value.clone() for key, value in rnn.state_dict().items()}, assign=True)


@pytest.mark.parametrize("how", [None, *COPIES])
@pytest.mark.parametrize("untie", [replaced, replaced_the_first, loaded_by_assignment])
def test_a_weight_that_counted_as_another_and_is_another_now_is_an_error(untie, how):
    """It would not be penalized any more."""
    rnn = tied_layers()
    reg = mk.regularize(rnn)
    if how is not None:
        rnn, reg = COPIES[how]((rnn, reg))
    assert list(reg.losses()) == ["weight_hh_l0"]
    untie(rnn)
    for call in (reg, reg.losses):
        with pytest.raises(ValueError, match="^weight_hh_l1 must still be the Parameter of weight_hh_l0, with which"):
            call()
    rnn.weight_hh_l1 = rnn.weight_hh_l0
    reg()
    rnn.weight_hh_l1 = nn.Parameter(torch.ones(6, 6))
    assert list(mk.regularize(rnn).losses()) == ["weight_hh_l0", "weight_hh_l1"]


def test_tied_weights_of_a_module_that_is_replaced_with_the_same_parameters():
    model = nn.ModuleDict({"rnn": tied_layers()})
    reg = mk.regularize(model)
    before = reg()
    model["rnn"] = mk.SparseRNN.from_rnn(model["rnn"])
    assert torch.equal(reg(), before)
