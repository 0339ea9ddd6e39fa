"""The strength: a property that works at any time, part of the state, and no guess."""
import inspect

import numpy as np
import pytest
import torch
from torch import nn

import moduli_kernels as mk


def made(kind, **settings):
    model = nn.LSTM(3, 6, num_layers=2)
    reg = mk.regularize(model, **settings)
    return model, {"points": reg, "shuffled": reg.shuffled(), "matched": reg.matched()}[kind]


KINDS = ("points", "shuffled", "matched")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.3, 0, 2, np.float32(0.25), np.float64(0.7), np.int64(3)])
def test_setting_it_sets_the_penalty_of_every_weight(kind, value):
    model, reg = made(kind, strength=1.0)
    whole, each = reg(), reg.losses()
    reg.strength = value
    assert reg.strength == value and type(reg.strength) is float
    torch.testing.assert_close(reg(), whole * float(value))
    for name, loss in reg.losses().items():
        torch.testing.assert_close(loss, each[name] * float(value))


def test_each_weight_may_have_its_own():
    model, reg = made("points", strength=1.0)
    each = reg.losses()
    for k, (_, regularizer) in enumerate(reg.items()):
        regularizer.strength = 0.5 + k
    assert [r.strength for _, r in reg.items()] == [0.5, 1.5] and model.weight_hh_l0.grad is None
    torch.testing.assert_close(reg(), 0.5 * each["weight_hh_l0"] + 1.5 * each["weight_hh_l1"])
    with pytest.raises(ValueError, match="strength must be the same for all .* weight_hh_l0: 0.5, weight_hh_l1: 1.5"):
        _ = reg.strength
    reg.strength = 0.2
    assert reg.strength == 0.2


@pytest.mark.parametrize("value", [-0.1, -1, float("nan"), float("inf"), np.float32(-1), "0.1", None, True])
def test_what_is_no_strength_is_refused_and_nothing_changes(value):
    model, reg = made("points", strength=0.3)
    ((_, one), _) = reg.items()
    for owner in (reg, one):
        with pytest.raises((ValueError, TypeError), match="strength must be"):
            owner.strength = value
    assert reg.strength == 0.3
    for make in (lambda: mk.regularize(model, strength=value), lambda: mk.ModuliRegularizer(4, strength=value),
                 lambda: mk.CoefficientRegularizer(torch.ones(2, 2), strength=value)):
        with pytest.raises((ValueError, TypeError), match="strength must be"):
            make()


def test_an_ide_sees_the_options_of_regularize():
    options = inspect.signature(mk.regularize).parameters
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in options.values())
    assert {"manifold", "inhibitor", "power", "reduction", "strength", "trainable", "generator", "dtype",
            "device"} <= options.keys()
    assert all(p.annotation is not p.empty for p in options.values())
    regularizer = inspect.signature(mk.ModuliRegularizer).parameters
    same = [name for name in options if name in regularizer and name != "strength"]
    assert len(same) == 8 and all(options[name].default == regularizer[name].default for name in same)
    with pytest.raises(TypeError, match="unexpected keyword argument 'strenght'"):
        mk.regularize(nn.RNN(2, 3), strenght=0.1)


def test_the_default_is_what_the_documentation_calls_usual():
    assert mk.regularize(nn.RNN(2, 3)).strength == 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainable", [False, True])
def test_a_compiled_step_is_compiled_once_more_and_serves_all_strengths(kind, trainable):
    cell, graphs = nn.GRUCell(3, 6), []
    reg = mk.regularize(cell, trainable=trainable)
    reg = {"points": reg, "shuffled": reg.shuffled(), "matched": reg.matched()}[kind]

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda: reg() * 2, fullgraph=True, backend=backend)
    for strength in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.7, 0.0):
        reg.strength = strength
        cell.zero_grad()
        value = compiled()
        torch.testing.assert_close(value, 2 * reg())
        value.backward()
        torch.testing.assert_close(cell.weight_hh.grad, torch.autograd.grad(2 * reg(), cell.weight_hh)[0])
    assert len(graphs) <= 2


def test_it_may_change_between_forward_and_backward_of_a_compiled_step():
    cell = nn.GRUCell(3, 6)
    reg = mk.regularize(cell, strength=0.5)
    compiled = torch.compile(lambda: reg(), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(reg(), cell.weight_hh)[0]
    value = compiled()
    reg.strength = 3.0
    value.backward()
    torch.testing.assert_close(cell.weight_hh.grad, expected)


@pytest.mark.skipif(torch.__version__.startswith("2.10."), reason="torch 2.10 sets it at the end of the step")
def test_it_may_be_set_within_a_compiled_step():
    cell = nn.GRUCell(3, 6)
    reg = mk.regularize(cell, strength=0.5)

    @torch.compile(backend="eager")
    def step(strength):
        reg.strength = strength
        return reg()

    for strength in (0.1, 0.2, 0.3):
        torch.testing.assert_close(step(strength), reg())
        assert reg.strength == pytest.approx(strength)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_part_of_the_state(kind):
    _, saved = made(kind, strength=0.4)
    _, reg = made(kind)
    reg.load_state_dict(saved.state_dict())
    assert reg.strength == 0.4
    reg.double()
    assert reg.strength == 0.4


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_was_saved_without_it_loads_and_leaves_it(kind):
    _, saved = made(kind, strength=0.4)
    state = saved.state_dict()
    for key in [key for key in state if key.endswith("_extra_state")]:
        if kind == "points":  # as releases wrote it that had only the settings
            state[key] = torch.tensor(list(bytes(state[key].tolist()).replace(b', "strength": 0.4', b"")),
                                      dtype=torch.uint8)
        else:  # a control had none
            del state[key]
    _, reg = made(kind, strength=0.7)
    reg.load_state_dict(state)
    assert reg.strength == 0.7


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by torch.compile's breaks
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_in_one_graph_with_a_net_of_torch_the_error_names_the_setting_and_the_setting_works(kind):
    net = kind(3, 6)
    reg = mk.regularize(net)
    compiled = torch.compile(lambda: reg() * 2, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(allow_rnn=False):
        with pytest.raises(torch._dynamo.exc.Unsupported, match="allow_rnn = True"):
            compiled()
        torch.testing.assert_close(torch.compile(lambda: reg() * 2, backend="aot_eager")(), 2 * reg())
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        torch.testing.assert_close(compiled(), 2 * reg())


# --- suggest ------------------------------------------------------------------------------------------------------

class Model(nn.Module):
    def __init__(self, kind=nn.GRU):
        super().__init__()
        self.rnn, self.head = kind(2, 8, num_layers=2), nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0][-1])


def gradient_norm(value, parameters):
    gradients = torch.autograd.grad(value, parameters, retain_graph=True)
    return torch.cat([g.flatten() for g in gradients]).norm().item()


@pytest.mark.parametrize("settings", [{}, {"power": 2.0}, {"reduction": "sum"}, {"trainable": True}, {"strength": 7.0}])
@pytest.mark.parametrize("share", [0.1, 0.5, np.float32(2.0)])
def test_at_the_suggested_strength_the_gradients_have_that_ratio(settings, share, capsys):
    model = Model()
    reg = mk.regularize(model, **settings)
    loss = model(torch.randn(5, 4, 2)).square().mean()
    found = reg.suggest(loss, share)
    assert type(found) is float and reg.strength == settings.get("strength", 0.1)
    assert capsys.readouterr().out == ""
    reg.strength = found
    weights = [model.rnn.weight_hh_l0, model.rnn.weight_hh_l1]
    assert gradient_norm(reg(), weights) == pytest.approx(float(share) * gradient_norm(loss, weights), rel=1e-4)
    assert all(p.grad is None for p in (*model.parameters(), *reg.parameters()))
    (loss + reg()).backward()


def test_the_default_share_is_a_tenth():
    model = Model()
    reg, loss = mk.regularize(model), model(torch.randn(5, 4, 2)).square().mean()
    assert reg.suggest(loss) == pytest.approx(reg.suggest(loss, 0.1))


def test_suggestions_for_a_control_and_for_a_parametrized_weight():
    model = Model()
    torch.nn.utils.parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    loss = model(torch.randn(5, 4, 2)).square().mean()
    for reg in (mk.regularize(model), mk.regularize(model).shuffled()):
        assert reg.suggest(loss) > 0


def zero_weights():
    model = Model()
    reg, loss = mk.regularize(model), model(torch.randn(5, 4, 2)).square().mean()
    for name, parameter in model.rnn.named_parameters():
        if "weight_hh" in name:
            parameter.data.zero_()
    return reg.suggest(loss)


@pytest.mark.parametrize(("call", "message"), [
    (lambda reg, loss: reg.suggest(3.0), "loss must be a tensor"),
    (lambda reg, loss: reg.suggest(loss.detach()), "loss must be 0-d with a graph .* without a graph"),
    (lambda reg, loss: reg.suggest(loss[None]), "loss must be 0-d with a graph"),
    (lambda reg, loss: reg.suggest(loss, 0.0), "share must be a positive"),
    (lambda reg, loss: reg.suggest(loss, -1), "share must be a positive"),
    (lambda reg, loss: reg.suggest(torch.ones((), requires_grad=True) * 2), "loss must have a finite gradient other"),
    (lambda reg, loss: reg.suggest(loss * float("nan")), "loss must have a finite gradient other"),
    (lambda reg, loss: zero_weights(), "the penalty must have a finite gradient other"),
])
def test_a_loss_that_says_nothing_about_the_weights_is_refused(call, message):
    model = Model()
    reg, loss = mk.regularize(model), model(torch.randn(5, 4, 2)).square().mean()
    with pytest.raises((TypeError, ValueError), match=message):
        call(reg, loss)
