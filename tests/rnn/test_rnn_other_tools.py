"""SparseRNN, SparseRNNCell and CompressedRNN in the hands of tools that record, transform or replace modules: they work
as torch.nn.RNN does there, or say what to do."""
from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence

import moduli_kernels as mk
from tests.support.penalty_cases import on_device
from tests.support.rnn_cases import draw, draw_mask, net_of, quiet

# torch's own: its tracers and exporters are on the way out or warn of every RNN
pytestmark = [on_device, *quiet, pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning",
    "ignore:The tensor attributes self._flat_weights", "ignore:.*torch.jit.*",
    "ignore:There is a performance drop because we have not yet implemented the batching rule",
    "ignore:The given buffer is not writable")]  # torch.export.load's

ALL_PATHS = ("auto", "sparse", "dense")
MASKS = {"no mask": (None, None), "a mask": (None, 0.3), "masks": (0.5, 0.3)}


class Model(nn.Module):
    """A net in a model, as users have it."""

    def __init__(self, rnn: nn.Module, outputs: int = 40):
        super().__init__()
        self.rnn, self.out = rnn, nn.Linear(outputs, 2)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.rnn(x)
        return self.out(output)


def model_of(path: str, **settings) -> Model:
    net = net_of(4, 40, path=path, **settings)
    return Model(net, 80 if net.bidirectional else 40)


class CellModel(nn.Module):
    def __init__(self, cell: nn.RNNCell):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.cell(x, self.cell(x))


def masked_cell(**settings) -> mk.SparseRNNCell:
    torch.manual_seed(0)
    cell = mk.SparseRNNCell(4, 6, **settings)
    cell.set_mask("weight_hh", draw_mask(6, 6, density=0.4))
    return cell


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5)


def same_gradients(a, b, model: nn.Module, x: Tensor) -> bool:
    """Whether the losses of two forward passes have the same gradients; `a` may have copies of Parameters, in order."""
    parameters = list(a.parameters()) if isinstance(a, nn.Module) else list(model.parameters())
    found = torch.autograd.grad(a(x).square().sum(), parameters)
    want = torch.autograd.grad(b(x).square().sum(), list(model.parameters()))
    return all(torch.allclose(mine, its, rtol=1e-3, atol=1e-4) for mine, its in zip(found, want))


# --- torch.fx -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize("masks", MASKS)
def test_symbolic_trace_keeps_it_whole(path, masks):
    model, x = model_of(path, densities=MASKS[masks], num_layers=2), draw(5, 3, 4)
    for _ in range(2):
        model(x)
    graph = torch.fx.symbolic_trace(model)
    nodes = [node for node in graph.graph.nodes if node.op == "call_module"]
    assert [node.target for node in nodes] == ["rnn", "out"] and graph.rnn is model.rnn
    assert torch.equal(graph(x), model(x))
    assert [node.op for node in graph.graph.nodes] == [
        node.op for node in torch.fx.symbolic_trace(Model(nn.RNN(4, 40))).graph.nodes]


def test_symbolic_trace_of_other_ways_to_call():
    class WithState(nn.Module):
        def __init__(self, rnn: nn.Module):
            super().__init__()
            self.inner = nn.ModuleDict({"rnn": rnn})

        def forward(self, x: Tensor, hx: Tensor) -> Tensor:
            output, h_n = self.inner["rnn"](x, hx=hx)
            return output[-1] + h_n[0]

    model, x, hx = WithState(net_of(4, 6)), draw(5, 3, 4), draw(1, 3, 6)
    graph = torch.fx.symbolic_trace(model)
    assert torch.equal(graph(x, hx), model(x, hx))
    assert torch.equal(copy.deepcopy(graph)(x, hx), model(x, hx))


def test_symbolic_trace_of_cell_and_compressed_net():
    x = draw(5, 3, 4)
    cells, small = CellModel(masked_cell()), Model(net_of(4, 40).compress())
    assert torch.equal(torch.fx.symbolic_trace(cells)(x[0]), cells(x[0]))
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(small)(x), small(x))


def test_symbolic_trace_of_the_net_itself_fails_as_that_of_nn_rnn():
    with pytest.raises(torch.fx.proxy.TraceError) as its:
        torch.fx.symbolic_trace(nn.RNN(4, 6))
    with pytest.raises(type(its.value)):
        torch.fx.symbolic_trace(mk.SparseRNN(4, 6))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("path", ALL_PATHS)
def test_make_fx(path, mode):
    model, x = model_of(path), draw(5, 3, 4)
    graph = make_fx(lambda x: model(x), tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    assert same(graph(x), model(x))
    model.rnn.weight_hh_l0.data.add_(1)  # what is recorded masks the weights whatever they hold
    assert same(graph(x), model(x))


# --- torch.export -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("grad", [True, False])
def test_export(path, masks, grad):
    model, x = model_of(path, densities=MASKS[masks]), draw(5, 3, 4)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (x,))
        assert same(program.module()(x), model(x))
    assert path == "sparse" or not any("moduli_kernels" in str(node.target) for node in program.graph.nodes)
    assert same(program.run_decompositions().module()(x), model(x))
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    assert same(torch.export.load(saved).module()(x), model(x))


@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize("settings", [{"num_layers": 2, "bidirectional": True},
                                      {"nonlinearity": "relu", "bias": False}])
def test_export_of_other_nets_and_their_training(path, settings):
    model, x = model_of(path, **settings), draw(5, 3, 4)
    assert same_gradients(torch.export.export(model, (x,)).module(), model, model, x)


@pytest.mark.parametrize("path", ALL_PATHS)
def test_export_masks_what_the_weights_hold_later(path):
    model, x = model_of(path), draw(5, 3, 4)
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        for each in (exported, model):
            each.get_parameter("rnn.weight_hh_l0").fill_(0.1)
    assert same(exported(x), model(x))


@pytest.mark.parametrize("path", ALL_PATHS)
def test_export_in_strict_mode_and_with_batches_that_vary(path):
    model, x = model_of(path), draw(5, 3, 4)
    with torch._dynamo.config.patch(allow_rnn=True):  # which any nn.RNN needs there
        assert same(torch.export.export(model, (x,), strict=True).module()(x), model(x))
    program = torch.export.export(model, (x,), dynamic_shapes=({1: torch.export.Dim("batch", min=2)},))
    assert same(program.module()(draw(5, 7, 4)), model(draw(5, 7, 4)))


def test_export_with_a_leak_and_of_cell_and_compressed_net():
    x = draw(5, 3, 4)
    leaky, cells = model_of("auto", leak=0.3), CellModel(masked_cell())
    assert same(torch.export.export(leaky, (x,)).module()(x), leaky(x))
    for strict in (False, True):
        program = torch.export.export(cells, (x[0],), strict=strict)
        assert same(program.module()(x[0]), cells(x[0]))
        assert not any("moduli_kernels" in str(node.target) for node in program.graph.nodes)
    small = Model(net_of(4, 40).compress())
    with torch.no_grad():
        assert same(torch.export.export(small, (x,)).module()(x), small(x))


def test_fake_and_meta_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for path in ALL_PATHS:
        with FakeTensorMode():
            assert model_of(path)(torch.randn(5, 3, 4)).shape == (5, 3, 2)
        assert model_of(path).to("meta")(torch.randn(5, 3, 4, device="meta")).shape == (5, 3, 2)


# --- torch.jit ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("grad", [True, False])
def test_jit_trace(path, masks, grad):
    model, x, other = model_of(path, densities=MASKS[masks]), draw(5, 3, 4), draw(7, 2, 4)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (x,))
    saved = io.BytesIO()
    torch.jit.save(traced, saved)
    saved.seek(0)
    for each in (traced, torch.jit.load(saved)):
        assert same(each(x), model(x)) and same(each(other), model(other))
        assert same_gradients(each, model, model, x)


@pytest.mark.parametrize("settings", [{"num_layers": 2, "bidirectional": True}, {"leak": 0.3}, {"batch_first": True}])
def test_jit_trace_of_other_nets(settings):
    model, x = model_of("sparse", **settings), draw(5, 3, 4)
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode:
            traced = torch.jit.trace(model, (x,))
        assert same(traced(x), model(x)) and same_gradients(traced, model, model, x)


def test_jit_trace_masks_what_the_weights_hold_later():
    for path in ALL_PATHS:
        model, x = model_of(path), draw(5, 3, 4)
        with torch.no_grad():
            traced = torch.jit.trace(model, (x,))
            model.rnn.weight_hh_l0.fill_(0.1)
            assert same(traced(x), model(x))


def test_jit_trace_of_cell_and_compressed_net():
    x = draw(5, 3, 4)
    for cell in (masked_cell(), masked_cell(leak=0.5)):
        cells = CellModel(cell)
        assert same(torch.jit.trace(cells, (x[0],))(x[0]), cells(x[0]))
    small = Model(net_of(4, 40).compress())
    with torch.no_grad():
        assert same(torch.jit.trace(small, (x,))(x), small(x))


@pytest.mark.parametrize(("module", "words"), [
    (lambda: net_of(4, 6), r"SparseRNN, .* put rnn.to_rnn\(\) in its place before, or use torch.jit.trace"),
    (lambda: mk.SparseRNN(4, 6), r"SparseRNN, .* put rnn.to_rnn\(\) in its place"),
    (lambda: net_of(4, 6).compress(), r"CompressedRNN, .* put small.to_sparse_rnn\(\).to_rnn\(\) in its place"),
    (lambda: masked_cell(), "SparseRNNCell, .* put a torch.nn.RNNCell with its weights")])
def test_jit_script_says_what_to_do_and_leaves_the_model_alone(module, words):
    its = module()
    model = Model(its)
    for script in (lambda: torch.jit.script(model), lambda: torch.jit.script(its)):
        with pytest.raises(RuntimeError, match=f"torch.jit.script cannot compile a {words}"):
            script()
        assert model.rnn is its


def test_jit_script_by_the_advice():
    class ScriptedModel(nn.Module):  # torch can't call a scripted nn.RNN by itself
        def __init__(self, rnn: nn.Module):
            super().__init__()
            self.rnn = rnn

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    net, x = net_of(4, 6), draw(5, 3, 4)
    assert same(torch.jit.script(ScriptedModel(net.to_rnn()))(x), net(x)[0])


# --- torch.func and forward mode ----------------------------------------------------------------------------------

@pytest.mark.parametrize("path", ["auto", "dense"])
@pytest.mark.parametrize("masks", MASKS)
def test_torch_func(path, masks):
    model, x = model_of(path, densities=MASKS[masks]), draw(5, 3, 4)
    plain = Model(model.rnn.to_rnn())
    plain.out = model.out
    for each in (model, plain):  # twice, since the first call must not decide about the second
        each(x)
    results = []
    for each in (model, plain):
        parameters = {name: p.detach() for name, p in each.named_parameters()}

        def loss(parameters, x, each=each):
            return torch.func.functional_call(each, parameters, (x,)).square().sum()

        def outputs(x, each=each):
            return each(x)

        gradients = torch.func.grad(loss)(parameters, x)
        for name in parameters:
            if (mask := getattr(model.rnn, f"{name.removeprefix('rnn.')}_mask", None)) is not None:
                gradients[name] = gradients[name] * mask
        vjp = torch.func.vjp(outputs, x)[1](draw(5, 3, 2))
        jvp = torch.func.jvp(outputs, (x,), (draw(5, 3, 4, seed=1),))
        results.append([*gradients.values(), torch.func.grad(loss, argnums=1)(parameters, x), *vjp, *jvp])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*results))


def test_gradients_of_a_masked_weight_are_zero_under_torch_func():
    for net in (net_of(4, 6, path="auto"), net_of(4, 6, path="dense")):
        found = torch.func.grad(lambda w, net=net: torch.func.functional_call(
            net, {"weight_hh_l0": w}, (draw(5, 3, 4),))[0].sum())(torch.ones(6, 6))
        assert found[~net.weight_hh_l0_mask].eq(0).all() and found.any()


def test_forward_mode_on_auto():
    net, x, t = net_of(4, 6, path="auto"), draw(5, 3, 4), draw(5, 3, 4, seed=1)
    plain = net.to_rnn()
    with torch.autograd.forward_ad.dual_level():
        dual = net(torch.autograd.forward_ad.make_dual(x, t))[0]
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    assert same(tangent, torch.func.jvp(lambda x: plain(x)[0], (x,), (t,))[1])


@pytest.mark.parametrize("settings", [{"path": "sparse"}, {"path": "auto", "leak": 0.5}])
def test_the_sparse_path_refuses_torch_func_in_words(settings):
    with pytest.raises(NotImplementedError, match="does not work under torch.func transforms"):
        torch.func.grad(lambda x: net_of(4, 6, **settings)(x)[0].sum())(draw(5, 3, 4))


def test_torch_func_of_the_masked_cell():
    cell, x = masked_cell(), draw(3, 4)
    found = torch.func.grad(lambda x: cell(x).square().sum())(x)
    y = x.clone().requires_grad_()
    cell(y).square().sum().backward()
    assert same(found, y.grad)
    assert same(torch.func.vmap(lambda x: cell(x))(x[:, None])[:, 0], cell(x))


# --- torch.nn.RNN replaced at run time ----------------------------------------------------------------------------

@pytest.fixture
def patched(monkeypatch):
    """How people make a model zoo use another class."""
    its = nn.RNN, nn.RNNCell
    monkeypatch.setattr(nn, "RNN", mk.SparseRNN)
    monkeypatch.setattr(nn, "RNNCell", mk.SparseRNNCell)
    return its


@pytest.mark.parametrize("path", ALL_PATHS)
def test_torch_nn_rnn_replaced_by_sparse_rnn(patched, path):
    rnn_class, cell_class = patched
    net, x = nn.RNN(4, 6, 2), draw(5, 3, 4)
    net.path = path
    plain = net.to_rnn()
    assert type(plain) is rnn_class and isinstance(net, mk.SparseRNN)
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode:
            for _ in range(3):
                assert same(net(x)[0], plain(x)[0])
    net.set_mask("weight_hh_l0", draw_mask(6, 6, density=0.5))
    for _ in range(2):
        assert same(net(x)[0], net.to_rnn()(x)[0])
    small = net.compress()
    with torch.no_grad():
        assert same(small(x)[0], net(x)[0]) and same(small.to_sparse_rnn()(x)[0], net(x)[0])
    assert type(mk.SparseRNN.from_rnn(plain)) is mk.SparseRNN
    assert same(copy.deepcopy(net)(x)[0], net(x)[0]) and net.explain()
    cell = nn.RNNCell(4, 6)
    for _ in range(3):
        assert same(cell(x[0]), cell_class.forward(cell, x[0]))
    cell.set_mask("weight_hh", draw_mask(6, 6, density=0.5))
    cell(x[0]), cell(x[0])


# --- tensor-likes -------------------------------------------------------------------------------------------------

class Subclass(torch.Tensor):
    """As most subclasses of Tensor are: it inherits __torch_function__."""


class Counting(torch.Tensor):
    """It notes which functions it meets."""

    seen: list[str] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs)


class Wrapper:
    """Not a Tensor: it has what torch.nn.RNN asks of its input, and __torch_function__."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    dtype = property(lambda self: self.tensor.dtype)
    device = property(lambda self: self.tensor.device)

    def dim(self) -> int:
        return self.tensor.dim()

    def size(self, *dim: int):
        return self.tensor.size(*dim)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        def bare(value):
            return value.tensor if isinstance(value, Wrapper) else value

        results = func(*map(bare, args), **{key: bare(value) for key, value in (kwargs or {}).items()})
        return tuple(map(Wrapper, results)) if isinstance(results, tuple) else Wrapper(results)


@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize("masks", MASKS)
def test_tensor_likes_as_in_nn_rnn(path, masks):
    net, x, hx = net_of(4, 40, path=path, densities=MASKS[masks]), draw(5, 3, 4), draw(1, 3, 40)
    plain = net.to_rnn()
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode:
            for _ in range(2):
                for arguments in ((x.as_subclass(Subclass),), (x, hx.as_subclass(Subclass)), (Wrapper(x),),
                                  (Wrapper(x), hx), (Wrapper(x), Wrapper(hx))):
                    for mine, its in zip(net(*arguments), plain(*arguments)):
                        assert type(mine) is type(its)
                        assert same(*(t.tensor if isinstance(t, Wrapper) else t for t in (mine, its)))
    Counting.seen.clear()
    net(x.as_subclass(Counting))
    mine = [name for name in Counting.seen if "rnn" in name]
    Counting.seen.clear()
    plain(x.as_subclass(Counting))
    assert mine == [name for name in Counting.seen if "rnn" in name]


def test_a_packed_sequence_of_a_subclass():
    net = net_of(4, 40)
    packed = nn.utils.rnn.pack_sequence([draw(n, 4, seed=n) for n in (3, 2)])
    packed = PackedSequence(packed.data.as_subclass(Subclass), packed.batch_sizes)
    mine, its = net(packed)[0], net.to_rnn()(packed)[0]
    assert type(mine.data) is type(its.data) is Subclass and same(mine.data, its.data)


def test_tensor_likes_where_there_is_a_leak():
    """nn.RNN has none: subclasses of Tensor work, other objects are refused in words."""
    net, cell, x = net_of(4, 40, leak=0.5), masked_cell(leak=0.5), draw(5, 3, 4)
    output, h_n = net(x.as_subclass(Subclass))
    assert type(output) is type(h_n) is Subclass and torch.equal(output.as_subclass(Tensor), net(x)[0])
    output.sum().backward()
    assert net.weight_hh_l0.grad.any() and type(cell(x[0].as_subclass(Subclass))) is Subclass
    with pytest.raises(TypeError) as error:
        net(Wrapper(x))
    assert str(error.value) == (
        "input must be a tensor where leak is not 1 (torch.nn.RNN, which takes any object with __torch_function__, "
        "knows no leak), got a Wrapper; pass a tensor or a subclass of it.")


def test_tensor_likes_in_the_cell_as_in_nn_rnn_cell():
    cell, x = masked_cell(), draw(3, 4)
    plain = nn.RNNCell(4, 6)
    plain.load_state_dict({name: p for name, p in cell.named_parameters()})
    for value in (x.as_subclass(Subclass), Wrapper(x)):
        if isinstance(value, Wrapper):
            mine, its = (each(value, draw(3, 6)) for each in (cell, plain))
        else:
            mine, its = cell(value), plain(value)
        assert type(mine) is type(its)


def test_a_mode_of_torch_function_is_no_tensor_like():
    """torch.set_default_device is such a mode."""
    net, x = net_of(4, 40), draw(5, 3, 4)
    with torch.device(x.device):
        assert same(net(x)[0], net.to_rnn()(x)[0]) and net.path == "sparse"
