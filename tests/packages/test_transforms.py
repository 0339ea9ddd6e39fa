"""Pruned modules of torch under what torch does to them: copies, functional calls, graphs, checkpointing."""
from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import moduli_kernels as mk
from moduli_kernels.masks import get_mask
from tests.support.held import INPUT, assert_sees_masked, assert_zero, loss_of, masks_of, pruned_net
from tests.support.pruning_cases import Net

# torch's own, for a plain nn.LSTM as well
pytestmark = [pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated"),
              pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning"),
              pytest.mark.filterwarnings(r"ignore:The tensor attributes self.rnn._flat_weights\[0\].* were assigned")]


class Recurrent(nn.Module):
    """A recurrent net and a decoder: (steps, batch, 3) -> (batch, 2)."""

    def __init__(self, kind, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.decoder = kind(3, 8, **settings), nn.Linear(8, 2)

    def forward(self, x):
        return self.decoder(self.rnn(x)[0][-1])


def pruned(net: nn.Module, *names: str, sparsity: float = 0.5) -> nn.Module:
    mk.MagnitudePruner(net, names).step_to(sparsity)
    return net


MODELS = {
    "linear": lambda: pruned(nn.Sequential(nn.Flatten(1), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 2)),
                             "1.weight", "3.weight"),
    "lstm": lambda: pruned(Recurrent(nn.LSTM), "rnn.weight_hh_l0", "rnn.weight_ih_l0", "decoder.weight"),
    "gru": lambda: pruned(Recurrent(nn.GRU), "rnn.weight_hh_l0", "decoder.weight"),
    "rnn": lambda: pruned(Recurrent(nn.RNN), "rnn.weight_hh_l0", "decoder.weight"),
}


def written(net: nn.Module) -> nn.Module:
    """The net with other weights under its masks too, as code writes them that knows of no masks."""
    g = torch.Generator().manual_seed(7)
    for parameter in net.parameters():
        parameter.data.normal_(generator=g)
    return net


def expected(net: nn.Module, x: torch.Tensor = INPUT) -> torch.Tensor:
    masks = masks_of(net)
    weights = {name: p.detach() * masks.get(name, 1) for name, p in net.named_parameters()}
    plain = copy.deepcopy(net)
    mk.MagnitudePruner([(plain.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in masks]
                       ).make_permanent()
    plain.load_state_dict(weights, strict=False)
    return plain(x)


# --- writes of other code -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", MODELS)
def test_a_vector_written_into_the_parameters(kind):
    net = MODELS[kind]()
    vector = torch.randn(sum(p.numel() for p in net.parameters()), generator=torch.Generator().manual_seed(2))
    nn.utils.vector_to_parameters(vector, net.parameters())
    assert torch.equal(expected(net), net(INPUT))
    assert_zero(net)
    assert_sees_masked(net)


@pytest.mark.parametrize("kind", ["linear", "lstm"])
def test_an_evolution_strategy(kind):
    """Each candidate is written through .data, evaluated, and taken back."""
    net, g = MODELS[kind](), torch.Generator().manual_seed(1)
    for _ in range(3):
        base = [p.data.clone() for p in net.parameters()]
        noise, scores = [], []
        for _ in range(4):
            noise.append([torch.randn(p.shape, generator=g) for p in base])
            for parameter, value, step in zip(net.parameters(), base, noise[-1], strict=True):
                parameter.data = value + 0.1 * step
            with torch.no_grad():
                want = expected(net)
                assert torch.equal(net(INPUT), want)
                scores.append(-(want - 1).square().mean())
        for i, (parameter, value) in enumerate(zip(net.parameters(), base, strict=True)):
            parameter.data.copy_(value + 0.05 * sum(s * each[i] for s, each in zip(scores, noise)))
    assert_sees_masked(net)


def test_weights_made_in_place_by_inits_and_clipping():
    net, pruner = pruned_net()
    for write in (lambda w: nn.init.xavier_uniform_(w), lambda w: nn.init.constant_(w, 3.0),
                  lambda w: w.data.clamp_(0.1, 0.2), lambda w: w.detach().add_(1)):
        write(net.rnn.weight_hh_l0)
        with pytest.warns(UserWarning, match="masked weights") if not pruner._warned else nullcontext():
            assert pruner.sparsity < 0.5
        assert_sees_masked(net)
        assert pruner.sparsity == pytest.approx(0.5, abs=0.01)


def test_a_replaced_parameter():
    for kind in MODELS:
        net = MODELS[kind]()
        name = next(iter(masks_of(net)))
        path, _, last = name.rpartition(".")
        module = net.get_submodule(path)
        setattr(module, last, nn.Parameter(torch.randn_like(getattr(module, last))))
        assert torch.equal(net(INPUT), expected(net))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(net).backward()
            optimizer.step()
        assert_sees_masked(net)
        assert_zero(net)


# --- copies and functional calls ----------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", MODELS)
def test_a_copy_is_trained_masked_and_the_original_stays(kind):
    net = MODELS[kind]()
    before = copy.deepcopy(net.state_dict())
    other = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(other).backward()
        optimizer.step()
        assert_zero(other)
    assert_sees_masked(other)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("kind", MODELS)
def test_a_functional_call_with_another_models_parameters_writes_none(kind):
    net, teacher = MODELS[kind](), written(copy.deepcopy(MODELS[kind]()))
    other = written(copy.deepcopy(teacher))
    names = masks_of(other)
    mk.MagnitudePruner([(other.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in names]
                       ).make_permanent()
    written(other)  # a dense model of its own
    parameters = dict(other.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    assert any(p[~names[name]].ne(0).any() for name, p in before.items() if name in names)
    mine = {name: p.detach().clone() for name, p in net.named_parameters()}
    output = torch.func.functional_call(net, parameters, (INPUT,))
    masks = masks_of(net)
    plain = torch.func.functional_call(net, {n: p.detach() * masks.get(n, 1) for n, p in parameters.items()}, (INPUT,))
    assert torch.equal(output, plain)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())
    assert all(torch.equal(p, mine[name]) for name, p in net.named_parameters())
    assert other(INPUT).ne(output).any()
    output.sum().backward()
    for name, parameter in parameters.items():
        assert name not in masks or parameter.grad[~masks[name]].eq(0).all()


def test_ensembles_by_vmap_over_stacked_parameters():
    nets = [pruned(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)), "0.weight") for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(nets)
    base, x = copy.deepcopy(nets[0]), torch.randn(4, 3)
    output = torch.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (x,)))(parameters, buffers)
    for net, each in zip(nets, output):
        torch.testing.assert_close(net(x), each)


# --- autograd -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_gradient_checkpointing(kind, reentrant):
    net, x = written(MODELS[kind]()), INPUT.clone().requires_grad_()
    other = copy.deepcopy(net)
    checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()
    other(INPUT).square().sum().backward()
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    assert_zero(net)


@pytest.mark.parametrize("kind", MODELS)
def test_two_calls_before_the_backward_pass(kind):
    net = MODELS[kind]()
    other = copy.deepcopy(net)
    (net(INPUT) + net(INPUT * 2)).square().sum().backward()
    first, second = other(INPUT), other(INPUT * 2)
    gradient = 2 * (first + second).detach()
    for output in (first, second):
        output.backward(gradient)
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for name, mask in masks_of(net).items():
        assert net.get_parameter(name).grad[~mask].eq(0).all()


def test_a_siamese_net_with_momentum_encoder():
    """A momentum encoder is written through .data between the two calls, as MoCo and BYOL do."""
    net, pruner = pruned_net()
    key = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for sparsity in (0.5, 0.6, 0.7):
        pruner.step_to(sparsity)
        optimizer.zero_grad()
        with torch.no_grad():
            for p, q in zip(net.parameters(), key.parameters(), strict=True):
                q.data = q.data * 0.9 + p.data * 0.1
        (net(INPUT) - key(INPUT + 1).detach()).square().mean().backward()
        optimizer.step()
    assert_zero(net)
    assert_sees_masked(key)


# --- torch.nn.utils.prune -----------------------------------------------------------------------------------------

prune = nn.utils.prune
PRUNE = {
    "identity": lambda m, n: prune.identity(m, n),
    "random_unstructured": lambda m, n: prune.random_unstructured(m, n, 0.3),
    "l1_unstructured": lambda m, n: prune.l1_unstructured(m, n, 5),
    "random_structured": lambda m, n: prune.random_structured(m, n, 2, dim=0),
    "ln_structured": lambda m, n: prune.ln_structured(m, n, 2, n=2, dim=1),
    "global_unstructured": lambda m, n: prune.global_unstructured([(m, n)], prune.L1Unstructured, amount=0.6),
    "custom_from_mask": lambda m, n: prune.custom_from_mask(m, n, torch.rand_like(getattr(m, n)) < 0.7),
    "twice": lambda m, n: (prune.l1_unstructured(m, n, 0.2), prune.random_unstructured(m, n, 0.2)),
}


@pytest.mark.parametrize(("kind", "remove"), [("linear", False), ("linear", True), ("lstm", False)])
@pytest.mark.parametrize("method", PRUNE)
def test_torchs_prune_keeps_what_is_masked(kind, method, remove):
    net = MODELS[kind]()
    name = next(iter(masks_of(net)))
    path, _, last = name.rpartition(".")
    module = net.get_submodule(path)
    ours = get_mask(module, last).clone()
    PRUNE[method](module, last)
    if remove:
        prune.remove(module, last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for k in range(2):
        optimizer.zero_grad()
        if not (remove and k):
            weight = getattr(module, last)
            assert weight[~ours].eq(0).all() and weight.ne(0).any()
        net(INPUT).square().sum().backward()
        if not remove:
            optimizer.step()
    net(INPUT)
    assert getattr(module, last)[~ours].eq(0).all()


# --- graphs -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", MODELS)
def test_tracing_records_plain_operations(kind):
    net = MODELS[kind]().eval()
    with torch.no_grad():
        want = net(INPUT)
        traced = torch.jit.trace(net, INPUT)
    assert "moduli" not in str(traced.inlined_graph)
    assert torch.equal(traced(INPUT), want) and torch.allclose(traced(INPUT * 2), net(INPUT * 2))


@pytest.mark.parametrize("kind", MODELS)
def test_symbolic_tracing(kind):
    net = MODELS[kind]()
    graph = torch.fx.symbolic_trace(net)
    written(net)
    assert torch.equal(graph(INPUT), expected(net))
    loss_of(graph).backward()
    for name, mask in masks_of(net).items():
        assert net.get_parameter(name).grad[~mask].eq(0).all()


@pytest.mark.parametrize(("kind", "strict"), [*((kind, False) for kind in MODELS), ("linear", True), ("lstm", True)])
def test_export(kind, strict):
    net = MODELS[kind]().eval()
    program = torch.export.export(net, (INPUT,), strict=strict)
    torch.testing.assert_close(program.module()(INPUT * 2), net(INPUT * 2))
    before = net(INPUT)
    assert torch.equal(net(INPUT), before)
    assert_zero(net)


@pytest.mark.parametrize("kind", ["linear", "gru"])
def test_scripting_after_make_permanent_and_the_error_before(kind):
    """torch.jit.script compiles hooks as TorchScript, which ours are not."""
    net = MODELS[kind]()
    want = net(INPUT)
    with pytest.raises(AttributeError, match=r"torch.jit.script must be given a module without masks.*make_permanent"):
        torch.jit.script(net)
    plain = copy.deepcopy(net)
    names = masks_of(plain)
    mk.MagnitudePruner(plain, names).make_permanent()
    assert torch.equal(torch.jit.script(plain)(INPUT), want)
    assert masks_of(net)


def test_data_parallel_on_the_cpu_is_the_module_itself():
    net, pruner = pruned_net()
    wrapped = nn.DataParallel(net)
    assert torch.equal(wrapped(INPUT), net(INPUT))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(wrapped).backward()
        optimizer.step()
    assert_zero(net)
    assert set(k.removeprefix("module.") for k in wrapped.state_dict()) == set(net.state_dict())
    assert pruner.sparsity == pytest.approx(0.5, abs=0.01)


# --- attention ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(training):
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    pruned(attention, "in_proj_weight")
    x = torch.randn(2, 5, 8)
    attention.train(training)
    attention.in_proj_weight.data.normal_()
    plain = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
    state = {k: v for k, v in attention.state_dict().items() if not k.endswith("_mask")}
    plain.load_state_dict(state)
    attention.in_proj_weight.data.normal_()
    plain.in_proj_weight.data.copy_(attention.in_proj_weight * attention.in_proj_weight_mask)
    with torch.set_grad_enabled(training):
        assert torch.equal(attention(x, x, x)[0], plain(x, x, x)[0])
    assert_zero(attention)


@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_layer_sees_masked_weights_on_the_fast_path_too(training):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    pruned(layer, "linear1.weight", "linear2.weight", "self_attn.in_proj_weight", "self_attn.out_proj.weight")
    x = torch.randn(2, 5, 8)
    layer.train(training)
    for name in ("linear1.weight", "linear2.weight", "self_attn.in_proj_weight"):
        layer.get_parameter(name).data.normal_()
    plain = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    masks = masks_of(layer)
    plain.load_state_dict({name: p.detach() * masks.get(name, 1) for name, p in layer.named_parameters()})
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(layer(x), plain(x))
    assert_zero(layer)


def test_a_transformer_encoder_is_trained_masked():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    names = [n for n, p in encoder.named_parameters() if p.ndim == 2]
    pruner = mk.MagnitudePruner(encoder, names)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.01, weight_decay=0.1)
    for sparsity in (0.3, 0.6):
        pruner.step_to(sparsity)
        for _ in range(2):
            optimizer.zero_grad()
            encoder(torch.randn(2, 5, 8)).square().sum().backward()
            optimizer.step()
            assert_zero(encoder)
    encoder.eval()
    with torch.no_grad():
        assert encoder(torch.randn(2, 5, 8)).isfinite().all()
    assert_zero(encoder)


# --- loading ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ["linear", "gru"])
def test_a_dense_checkpoint_does_not_undo_pruning(kind, assign):
    net = MODELS[kind]()
    dense = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    net.load_state_dict(dense, strict=False, assign=assign)
    assert_zero(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
    assert_zero(net)
    assert_sees_masked(net)


def test_the_nets_of_these_tests_are_pruned():
    assert all(0.4 < (~mask).float().mean() < 0.95 for mask in masks_of(pruned_net()[0]).values()) or Net()
    for make in MODELS.values():
        assert_zero(make())


# --- other modules, and other ways to step ------------------------------------------------------------------------

OTHERS = {
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), lambda: (torch.randn(1, 3, 6, 6),), "weight"),
    "conv_transpose": (lambda: nn.ConvTranspose1d(3, 4, 3), lambda: (torch.randn(1, 3, 6),), "weight"),
    "bilinear": (lambda: nn.Bilinear(3, 3, 2), lambda: (torch.randn(2, 3), torch.randn(2, 3)), "weight"),
    "embedding": (lambda: nn.Embedding(10, 4, max_norm=1.0), lambda: (torch.arange(10),), "weight"),
    "embedding_bag": (lambda: nn.EmbeddingBag(10, 4), lambda: (torch.arange(10)[None],), "weight"),
    "lstm_cell": (lambda: nn.LSTMCell(3, 8), lambda: (torch.randn(2, 3),), "weight_hh"),
    "layer_norm": (lambda: nn.LayerNorm(8), lambda: (torch.randn(2, 8),), "weight"),
    "bias": (lambda: nn.GRUCell(3, 8), lambda: (torch.randn(2, 3),), "bias_hh"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_modules_of_other_kinds(kind):
    make, inputs, name = OTHERS[kind]
    module, inputs = make(), inputs()
    nn.init.normal_(getattr(module, name))
    pruned(module, name)
    getattr(module, name).data.normal_()
    plain = copy.deepcopy(module)
    mk.MagnitudePruner(plain, [name]).make_permanent()
    outputs, expected = module(*inputs), plain(*inputs)
    torch.testing.assert_close(outputs, expected)
    assert_zero(module)


def test_an_optimizer_for_each_parameter_that_steps_during_the_backward_pass():
    net, pruner = pruned_net()
    optimizers = {p: torch.optim.AdamW([p], lr=0.05, weight_decay=0.1) for p in net.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for sparsity in (0.5, 0.5, 0.7):
        pruner.step_to(sparsity)
        loss_of(net).backward()
        assert_zero(net)
    assert pruner.sparsity == pytest.approx(0.7, abs=0.01)


def test_a_linear_layer_fused_with_its_normalization():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).eval()
    pruned(net, "0.weight")
    fused, x = nn.utils.fusion.fuse_linear_bn_eval(net[0], net[1]), torch.randn(3, 4)
    torch.testing.assert_close(fused(x), net(x))
    assert_zero(fused)


def test_weights_in_shared_memory():
    net, pruner = pruned_net()
    net.share_memory()
    pruner.step_to(0.6)
    assert net.rnn.weight_hh_l0.is_shared() and net.rnn.weight_hh_l0_mask.is_shared()
    net.rnn.weight_hh_l0.data.normal_()
    assert_sees_masked(net)
