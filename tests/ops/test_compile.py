"""torch.compile and torch.library.opcheck: the stateless ops, one graph without breaks, the numbers of
eager."""
from __future__ import annotations

import copy
import pickle

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import moduli_kernels as mk
from moduli_kernels import reference
from moduli_kernels.geometry import encoding
from tests.support.penalty_cases import (
    BACKENDS,
    INHIBITORS,
    KERNELS,
    MANIFOLDS,
    bump,
    draw_points,
    draw_weight,
    expected,
    generator,
    needs_kernels,
    on_device,
    relative_error,
)

ops = torch.ops.moduli_kernels

# torch's own, on the way
pytestmark = [on_device, pytest.mark.filterwarnings("ignore::DeprecationWarning"),
              pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- opcheck ----------------------------------------------------------------------------------------------

def op_arguments(manifold: str = "torus", inhibitor: str = "dog", *, shape=(6, 9), dtype=torch.float32,
                 blocks: int = 1,
                 masked: bool = False, shared: bool = False, needs=(False, False, False),
                 power: float = 1.5) -> tuple:
    """What `penalty` takes (moduli_kernels/ops/penalty.py)."""
    point_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weight = draw_weight(blocks * shape[0], *shape[1:], dtype=dtype).requires_grad_(needs[0])
    rows = draw_points(manifold, shape[0], 1, point_dtype).requires_grad_(needs[1])
    cols = None if shared else draw_points(manifold, shape[1], 2, point_dtype).requires_grad_(needs[2])
    mask = torch.rand(weight.shape, generator=generator()) < 0.5 if masked else None
    f = INHIBITORS[inhibitor]
    table = f.table(point_dtype) if inhibitor == "tabulated" else None
    return (weight, rows, cols, mask, None, None, table, *encoding.encode_manifold(MANIFOLDS[manifold]),
            *encoding.encode_inhibitor(f),
            power, blocks, 0.25)


OP_CASES = {
    "plain": {},
    "trained": {"needs": (True, True, True)},
    "weight_trained": {"needs": (True, False, False)},
    "points_trained": {"needs": (False, True, False)},
    "shared": {"shape": (7, 7), "shared": True, "needs": (True, True, False)},
    "masked": {"masked": True, "needs": (True, True, True)},
    "blocks": {"blocks": 3, "needs": (True, True, True)},
    "kernel": {"shape": (6, 9, 3), "masked": True, "needs": (True, True, True)},
    "tabulated": {"inhibitor": "tabulated", "dtype": torch.float64, "needs": (True, True, True)},
    "product": {"manifold": "product", "needs": (True, True, True)},
    "float64": {"dtype": torch.float64, "needs": (True, True, True)},
    "bfloat16": {"dtype": torch.bfloat16, "needs": (True, True, True)},
    "empty": {"shape": (0, 9), "needs": (True, True, True)},
}


@needs_kernels
@pytest.mark.parametrize("case", OP_CASES)
def test_opcheck_of_penalty(case):
    torch.library.opcheck(ops.penalty.default, op_arguments(**OP_CASES[case]))


@needs_kernels
@pytest.mark.parametrize("need_weight", [False, True])
@pytest.mark.parametrize("need_points", [False, True])
@pytest.mark.parametrize("case", ["plain", "shared", "kernel", "blocks", "float64", "bfloat16", "empty"])
def test_opcheck_of_the_gradients(case, need_weight, need_points):
    """No autograd of their own: they are called where autograd is off."""
    arguments = op_arguments(**{**OP_CASES[case], "needs": (False, False, False)})
    grad = torch.tensor(-1.5, dtype=arguments[1].dtype)
    torch.library.opcheck(ops.penalty_with_grads.default, (*arguments, need_weight, need_points))
    torch.library.opcheck(ops.penalty_grads.default, (grad, *arguments, need_weight, need_points))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_opcheck_of_scaling(dtype):
    gradients = [draw_weight(5, 7, dtype=dtype), draw_weight(300, dtype=dtype)]
    factor = torch.tensor(0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    torch.library.opcheck(ops.scale_grads_.default, (gradients, factor))


@pytest.mark.parametrize("case", OP_CASES)
def test_ops_agree_with_their_fallback(case):
    """The implementation without a compiler, for any device, serves the same schemas."""
    arguments = op_arguments(**{**OP_CASES[case], "needs": (False, False, False)})
    dtype = arguments[0].dtype
    what = reference.Penalty(encoding.decode_manifold(*arguments[7:9]),
                             encoding.decode_inhibitor(*arguments[9:11], arguments[6]), *arguments[11:])
    value, gradients = reference.penalty_with_grads(*arguments[:4], what, True, True)
    got, *got_gradients = ops.penalty_with_grads(*arguments, True, True)
    assert relative_error(got, value) <= 1e-6
    for a, b, like in zip(got_gradients, gradients, arguments[:3]):
        if b is None:
            assert a.numel() == 0
        else:
            assert a.shape == like.shape and a.dtype == like.dtype and a.is_contiguous()
            assert relative_error(a, b) <= (1e-2 if dtype == torch.bfloat16 else 1e-5)


# --- torch.compile ----------------------------------------------------------------------------------------

class Net(nn.Module):
    """A loss with the penalty in it: (batch, n) -> 0-d."""

    def __init__(self, regularizer: nn.Module, n: int = 12, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.linear = nn.Linear(n, n, dtype=dtype)
        self.regularizer = regularizer

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x).tanh() - 0.5).square().mean() + 0.3 * self.regularizer(self.linear.weight)


def step(net: nn.Module, run, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    loss = run(x)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters())]


def assert_as_eager(net: nn.Module, x: Tensor, tolerance: float = 1e-5, **options) -> None:
    want = step(net, net, x)
    got = step(net, torch.compile(net, fullgraph=True, **options), x)
    assert len(got) == len(want)
    for g, w in zip(got, want):
        assert g.dtype == w.dtype and relative_error(g, w.double()) <= tolerance


def regularizer(manifold="torus", inhibitor="dog", n: int = 12, trainable: bool = True,
                **settings) -> mk.ModuliRegularizer:
    return mk.ModuliRegularizer(n, manifold=MANIFOLDS[manifold], inhibitor=INHIBITORS[inhibitor],
                                trainable=trainable,
                                generator=generator(), **settings)


@needs_kernels
def test_compiled_loss():
    """Through inductor to machine code."""
    with mk.backend(KERNELS):
        assert_as_eager(Net(regularizer()), draw_weight(5, 12))


# With "aot_eager" everything but the last step, inductor's code.

@pytest.mark.parametrize("manifold,inhibitor,power,trainable", [
    ("mixed", "dog", 1.0, True), ("klein", "sinusoid", 2.0, True), ("circle", "tabulated", 1.5, True),
    ("s3", "ricker", 2.7, False)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_in_one_graph(backend, manifold, inhibitor, power, trainable):
    net = Net(regularizer(manifold, inhibitor, power=power, trainable=trainable))
    with mk.backend(backend):
        assert_as_eager(net, draw_weight(5, 12), backend="aot_eager")


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_with_a_bare_callable(backend):
    def penalty(weight: Tensor, rows: Tensor) -> Tensor:
        return mk.moduli_penalty(weight, rows, manifold="torus", inhibitor=bump) * 2

    weight, rows = draw_weight(12, 12).requires_grad_(), draw_points("torus", 12).requires_grad_()
    with mk.backend(backend):
        value = torch.compile(penalty, fullgraph=True, backend="aot_eager")(weight, rows)
        value.backward()
    want = expected(weight, rows, manifold="torus", inhibitor=bump, grad=2.0)
    for got, wanted in ((value / 2, want.value), (weight.grad, want.weight), (rows.grad, want.rows)):
        assert relative_error(got, wanted) <= 1e-5


@pytest.mark.parametrize("settings",
                         [{"blocks": 2}, {"mask": True}, {"kernel": (3,)}, {"dtype": torch.float64},
                                      {"dtype": torch.bfloat16}, {"reduction": "sum", "strength": 0.1}],
                                      ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_settings(backend, settings):
    settings = dict(settings)
    dtype, kernel = settings.pop("dtype", torch.float32), settings.pop("kernel", ())
    weight = draw_weight(settings.get("blocks", 1) * 8, 11, *kernel, dtype=dtype).requires_grad_()
    rows, cols = (draw_points("torus", n, n).requires_grad_() for n in (8, 11))
    mask = torch.rand(weight.shape, generator=generator()) < 0.5 if settings.pop("mask", False) else None

    def penalty(*tensors: Tensor) -> Tensor:
        return mk.moduli_penalty(*tensors, manifold="torus", power=1.5, mask=mask, **settings)

    leaves = (weight, rows, cols)
    with mk.backend(backend):
        eager, compiled = penalty(*leaves), torch.compile(penalty, fullgraph=True,
                                                          backend="aot_eager")(*leaves)
        assert compiled.dtype == eager.dtype and relative_error(compiled, eager) <= 1e-6
        for a, b in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves)):
            assert a.dtype == b.dtype and relative_error(a, b) <= (1e-2 if dtype == torch.bfloat16 else 1e-5)


@needs_kernels
@pytest.mark.parametrize("layout", ["transposed", "rows", "columns"])
def test_compiled_with_strides(layout):
    base = draw_weight(24, 24).requires_grad_()
    take = {"transposed": lambda w: w[:12, :10].T, "rows": lambda w: w[:20:2, :12],
            "columns": lambda w: w[:10, 5:17]}[layout]
    rows, cols = draw_points("torus", 10, 1), draw_points("torus", 12, 2)

    def penalty(w: Tensor) -> Tensor:
        return mk.moduli_penalty(take(w), rows, cols, manifold="torus")

    with mk.backend(KERNELS):
        eager = torch.autograd.grad(penalty(base), base)[0]
        compiled = torch.autograd.grad(torch.compile(penalty, fullgraph=True, backend="aot_eager")(base),
                                       base)[0]
    assert relative_error(compiled, eager) <= 1e-6


@pytest.mark.parametrize("first", ["compiled", "eager", "inference"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_outlive_the_mode_they_were_made_in(backend, first):
    """A table is made at its first use and kept: also while tracing, or under inference_mode."""
    f = mk.TabulatedInhibitor(bump, 25.0, 64)
    weight, rows = draw_weight(9, 9).requires_grad_(), draw_points("torus", 9).requires_grad_()

    def penalty(w: Tensor, e: Tensor) -> Tensor:
        return mk.moduli_penalty(w, e, manifold="torus", inhibitor=f)

    compiled = torch.compile(penalty, fullgraph=True, backend="aot_eager")
    want = expected(weight, rows, manifold="torus", inhibitor=f)
    f.__dict__.pop("_tables")
    with mk.backend(backend):
        if first == "inference":
            with torch.inference_mode():
                penalty(weight, rows)
        for run in (compiled, penalty) if first == "compiled" else (penalty, compiled):
            value = run(weight, rows)
            assert relative_error(value, want.value) <= 1e-6
            for gradient, wanted in zip(torch.autograd.grad(value, (weight, rows)), want[1:]):
                assert relative_error(gradient, wanted) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("made", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f)), copy.copy],
                         ids=["deepcopy", "pickle", "copy"])
def test_the_table_of_a_copy_is_made_in_a_graph(backend, made):
    original = mk.TabulatedInhibitor(bump, 25.0, 64)
    f, weight, points = made(original), draw_weight(9, 9).requires_grad_(), draw_points("torus", 9)
    compiled = torch.compile(lambda w: mk.moduli_penalty(w, points, manifold="torus", inhibitor=f), fullgraph=True,
                             backend="aot_eager")
    with mk.backend(backend):
        value = compiled(weight)
    want = expected(weight, points, manifold="torus", inhibitor=original)
    assert relative_error(value, want.value) <= 1e-6
    assert relative_error(torch.autograd.grad(value, weight)[0], want[1]) <= 1e-5


@needs_kernels
def test_dynamic_shapes():
    """One graph for all sizes from 2 on (torch.compile always takes 0 and 1 apart)."""
    def penalty(weight: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        return mk.moduli_penalty(weight, rows, cols, manifold="torus")

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(penalty, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for n, m in ((5, 8), (6, 17), (40, 3)):
        leaves = [t.requires_grad_() for t in (draw_weight(n, m), draw_points("torus", n, 1),
                                               draw_points("torus", m, 2))]
        want = expected(*leaves, manifold="torus")
        with mk.backend(KERNELS):
            value = compiled(*leaves)
        assert relative_error(value, want.value) <= 1e-6
        for gradient, wanted in zip(torch.autograd.grad(value, leaves), want[1:]):
            assert relative_error(gradient, wanted) <= 1e-5
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[0]


@needs_kernels
def test_strength_changed_between_steps():
    """A schedule of ten strengths does not run into the limit of recompilations (8)."""
    reg, weight = regularizer(), draw_weight(12, 12)
    compiled = torch.compile(reg, fullgraph=True, backend="aot_eager")
    with mk.backend(KERNELS):
        for k in range(10):
            reg.strength = 0.1 * k
            assert relative_error(compiled(weight), reg(weight).double()) <= 1e-6


@pytest.mark.filterwarnings("ignore:.* has no compiled kernel")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of", ["mean", "sum", "callable", "coefficients"])
def test_strengths_after_the_second_do_not_compile_again(of, backend):
    """The compiler takes the first for a constant and those that follow for a variable, on torch 2.10 as well."""
    weight, points = draw_weight(12, 12).requires_grad_(), draw_points("torus", 12)
    control = mk.CoefficientRegularizer(torch.rand(12, 12, generator=generator()))
    settings = {"reduction": "sum"} if of == "sum" else {"inhibitor": bump} if of == "callable" else {}

    def penalty(weight: Tensor, strength: float) -> Tensor:
        if of != "coefficients":
            return mk.moduli_penalty(weight, points, manifold="torus", strength=strength, **settings)
        control.strength = strength
        return control(weight)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(penalty, fullgraph=True, backend=counter)
    with mk.backend(backend):
        for k in range(1, 11):
            value, wanted = compiled(weight, 0.1 * k), penalty(weight, 0.1 * k)
            assert relative_error(value, wanted.double()) <= 1e-6
            got, want = (torch.autograd.grad(each, weight)[0] for each in (value, wanted))
            assert relative_error(got, want.double()) <= 1e-5
    setter = of == "coefficients" and torch.__version__.startswith("2.10.")  # which compiles the property's setter too
    assert counter.frame_count <= (4 if setter else 2)


@needs_kernels
def test_the_compiled_graph_holds_the_op():
    """Not a formula that was traced through: one op, and in backward one more."""
    names = []

    def record(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    weight, rows = draw_weight(8, 8).requires_grad_(), draw_points("torus", 8).requires_grad_()
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    with mk.backend(KERNELS):
        torch.compile(lambda w, e: mk.moduli_penalty(w, e, manifold="torus"), fullgraph=True,
                      backend=backend)(
            weight, rows).backward()
    ours = [name for name in names if name.startswith("moduli_kernels")]
    assert ours == ["moduli_kernels.penalty.default", "moduli_kernels.penalty_grads.default"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_without_gradients(backend):
    weight, rows = draw_weight(8, 8).requires_grad_(), draw_points("torus", 8)
    compiled = torch.compile(lambda w: mk.moduli_penalty(w, rows, manifold="torus"), fullgraph=True,
                             backend="aot_eager")
    with mk.backend(backend), torch.no_grad():
        assert relative_error(compiled(weight), expected(weight, rows, manifold="torus").value) <= 1e-6


def test_compiled_regularization_reads_weights_afresh():
    """The loop of the README with the whole loss compiled. (nn.RNN, LSTM, GRU torch.compile itself
    refuses.)"""
    torch.manual_seed(0)
    cell = nn.GRUCell(4, 10)
    reg = mk.regularize(cell, manifold="torus", strength=0.1, generator=generator())
    compiled = torch.compile(lambda: reg() * 2, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert relative_error(compiled(), 2 * reg().double()) <= 1e-6
        with torch.no_grad():
            cell.weight_hh.mul_(1.5)
