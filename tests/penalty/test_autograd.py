"""Autograd of moduli_penalty: gradients handed over from forward to backward, how often, how long, to
whom."""
from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import moduli_kernels as mk
from tests.support.penalty_cases import (
    BACKENDS,
    DEVICE,
    draw_points,
    draw_weight,
    expected,
    on_device,
    penalty_and_gradients,
    relative_error,
    tiled_warning,
)

pytestmark = [tiled_warning, on_device]


@pytest.fixture(params=BACKENDS, autouse=True)
def either(request):
    with mk.backend(request.param):
        yield request.param


# --- one pass, handed over --------------------------------------------------------------------------------

class Problem:
    """A loss with the penalty in it, and the penalty's gradients as the float64 reference has them."""

    def __init__(self, n: int = 13, dtype: torch.dtype = torch.float32, **settings):
        self.weight = draw_weight(n, n, dtype=dtype).requires_grad_()
        self.rows = draw_points("torus", n, dtype=dtype).requires_grad_()
        self.leaves = (self.weight, self.rows)
        self.settings = {"manifold": "torus", **settings}
        self.want = expected(self.weight, self.rows, **self.settings)

    def penalty(self) -> Tensor:
        return mk.moduli_penalty(*self.leaves, **self.settings)

    def check(self, weight: Tensor | None, rows: Tensor | None, factor: float = 1.0,
              tolerance: float = 1e-5) -> None:
        if weight is not None:
            assert relative_error(weight, factor * self.want.weight) <= tolerance
        if rows is not None:
            assert relative_error(rows, factor * self.want.rows) <= tolerance


@pytest.mark.parametrize("dtype,tolerance",
                         [(torch.float32, 1e-5), (torch.float64, 1e-11), (torch.bfloat16, 5e-3),
                                             (torch.float16, 1e-3)], ids=str)
@pytest.mark.parametrize("grad", [1.0, 3.0, -2.5, 0.0])
def test_upstream_gradient(grad, dtype, tolerance):
    problem = Problem(dtype=dtype)
    (problem.penalty() * grad).backward()
    problem.check(problem.weight.grad, problem.rows.grad, grad, tolerance)


def test_backward_twice():
    """The first backward takes the gradients made in forward, the second makes them again: same bits, and
    .grad holds the sum; the first gradients, which may be .grad itself, are not scaled again."""
    problem = Problem()
    value = problem.penalty() * 3
    first = torch.autograd.grad(value, problem.leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(value, problem.leaves, retain_graph=True)
    third = torch.autograd.grad(value, problem.leaves)
    problem.check(*first, 3.0)
    for a, b, c, d in zip(first, kept, second, third):
        assert torch.equal(a, b)
        assert relative_error(a, c.double()) <= 1e-6 and torch.equal(c, d)

    value = problem.penalty() * 3
    value.backward(retain_graph=True)
    value.backward()
    problem.check(problem.weight.grad, problem.rows.grad, 6.0)


def test_gradients_accumulate():
    problem = Problem()
    for _ in range(3):
        (problem.penalty() + problem.penalty()).backward()
    problem.check(problem.weight.grad, problem.rows.grad, 6.0)


def test_backward_without_retain_graph_frees():
    problem = Problem()
    value = problem.penalty()
    value.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


@pytest.mark.parametrize("needs", [(w, r, c) for w in (0, 1) for r in (0, 1) for c in (0, 1)], ids=str)
def test_only_what_is_asked_for(needs):
    """Each of weight, rows and cols frozen or not."""
    tensors = [draw_weight(7, 9), draw_points("torus", 7, 1), draw_points("torus", 9, 2)]
    want = expected(*tensors, manifold="torus")
    for tensor, need in zip(tensors, needs):
        tensor.requires_grad_(bool(need))
    value = mk.moduli_penalty(*tensors, manifold="torus")
    assert value.requires_grad == any(needs)
    if any(needs):
        value.backward()
    for tensor, need, wanted in zip(tensors, needs, want[1:]):
        assert (tensor.grad is not None) == bool(need)
        if need:
            assert relative_error(tensor.grad, wanted) <= 1e-5


def test_same_tensor_as_rows_and_cols():
    """Given twice, points get both parts, as they do with cols=None."""
    problem = Problem()
    mk.moduli_penalty(problem.weight, problem.rows, problem.rows, **problem.settings).backward()
    problem.check(problem.weight.grad, problem.rows.grad)


def test_weights_made_by_other_operations():
    """The penalty as a node in a larger graph: weight = mask * v, points through a chart."""
    problem = Problem()
    v = (problem.weight.detach() / 2).requires_grad_()
    e = (problem.rows.detach() - 1).requires_grad_()
    loss = mk.moduli_penalty(2 * v, e + 1, **problem.settings) * 0.5 + (v * 0).sum()
    loss.backward()
    problem.check(v.grad / 2, e.grad, 0.5)


# --- no gradient, and what lives how long -----------------------------------------------------------------

@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_value_only(context):
    problem = Problem()
    with context():
        value = problem.penalty()
    assert not value.requires_grad and value.grad_fn is None
    assert relative_error(value, problem.want.value) <= 1e-6


def buffers_of(value: Tensor) -> list[weakref.ref]:
    """The gradients that wait for a backward."""
    waiting = [weakref.ref(g) for g in value.grad_fn.grads if g is not None]
    assert waiting
    return waiting


@pytest.fixture
def no_collector():
    """Whatever is freed is freed at once: there are no reference cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_buffers_die_with_an_unused_graph(no_collector):
    problem = Problem()
    penalty = problem.penalty()
    value = penalty * 2 + 1
    waiting = buffers_of(penalty)
    del penalty, value
    assert all(ref() is None for ref in waiting)


def test_backward_hands_the_buffers_over(no_collector):
    """They become .grad without a copy, the graph lets go of them, and nothing else holds them."""
    problem = Problem()
    value = problem.penalty()
    waiting = buffers_of(value)
    address = value.grad_fn.grads[0].data_ptr()
    value.backward(retain_graph=True)
    assert value.grad_fn.grads is None
    assert problem.weight.grad.data_ptr() == address
    problem.weight.grad = problem.rows.grad = None
    assert all(ref() is None for ref in waiting)


def test_no_tensor_is_left_behind(no_collector):
    problem = Problem()

    def tensors() -> int:
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    def step(run_backward: bool):
        value = problem.penalty() * 2
        if run_backward:
            value.backward(retain_graph=True)
            value.backward(create_graph=False)
        problem.weight.grad = problem.rows.grad = None

    step(True), step(False)
    before = tensors()
    for _ in range(5):
        step(True), step(False)
    assert tensors() == before


@pytest.mark.parametrize("again", [False, True])
def test_weight_changed_between_forward_and_backward(again):
    """A backward never mixes old and new weights: it gives the gradients of the value computed, or autograd's
    error."""
    problem = Problem()
    value = problem.penalty()
    if again:
        value.backward(retain_graph=True)
        problem.weight.grad = problem.rows.grad = None
    with torch.no_grad():
        problem.weight.mul_(-2)
    if again:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()
    else:
        value.backward()
        problem.check(problem.weight.grad, problem.rows.grad)


# --- second derivatives -----------------------------------------------------------------------------------

DOUBLE = ("moduli_penalty is differentiable once, got a second derivative (double backward); leave the "
          "penalty out of the loss you differentiate twice, or use moduli_kernels.reference.penalty_formula.")


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("retained", [False, True])
def test_double_backward_is_refused(retained):
    problem = Problem()
    value = problem.penalty()
    if retained:
        torch.autograd.grad(value, problem.leaves, retain_graph=True)
    gradients = torch.autograd.grad(value, problem.leaves, create_graph=True)
    problem.check(*gradients)
    for gradient in gradients:
        with pytest.raises(NotImplementedError) as error:
            gradient.square().sum().backward(retain_graph=True)
        assert str(error.value) == DOUBLE


def test_double_backward_through_the_upstream_gradient_is_refused():
    problem = Problem()
    factor = torch.tensor(2.0, requires_grad=True)
    gradient, = torch.autograd.grad(problem.penalty() * factor, problem.weight, create_graph=True)
    with pytest.raises(NotImplementedError) as error:
        torch.autograd.grad(gradient.sum(), factor)
    assert str(error.value) == DOUBLE


def test_create_graph_leaves_the_rest_of_the_loss_alone():
    """A gradient penalty on the other terms: create_graph=True passes through the penalty unharmed."""
    problem = Problem()
    x = torch.tensor(3.0, requires_grad=True)
    slope, weight_slope = torch.autograd.grad(x**3 + problem.penalty(), (x, problem.weight),
                                              create_graph=True)
    slope.square().backward()
    assert float(x.grad) == pytest.approx(2 * 27 * 18)
    problem.check(weight_slope, None)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev], ids=["grad", "jacrev"])
def test_torch_func_is_refused(transform):
    problem = Problem()
    with pytest.raises(RuntimeError, match="functorch transforms"):
        transform(lambda w: mk.moduli_penalty(w, problem.rows.detach(),
                                              manifold="torus"))(problem.weight.detach())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("argument", ["weight", "rows"])
@pytest.mark.parametrize("api", ["func", "dual_level"])
def test_forward_mode_is_refused(api, argument):
    """There is no forward derivative: an error, not a tangent of 0."""
    problem = Problem()
    tensors = {"weight": problem.weight.detach(), "rows": problem.rows.detach()}
    x = tensors.pop(argument)

    def penalty(t: Tensor) -> Tensor:
        return mk.moduli_penalty(**{argument: t}, **tensors, manifold="torus")

    with pytest.raises((NotImplementedError, RuntimeError), match="(?i)forward"):
        if api == "func":
            torch.func.jvp(penalty, (x,), (x,))
        else:
            with torch.autograd.forward_ad.dual_level():
                penalty(torch.autograd.forward_ad.make_dual(x, x))


# --- in the company of other machinery --------------------------------------------------------------------

@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    problem = Problem()
    value = checkpoint(lambda w, e: mk.moduli_penalty(w, e, **problem.settings) * 2, *problem.leaves,
                       use_reentrant=reentrant)
    value.backward()
    problem.check(problem.weight.grad, problem.rows.grad, 2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(dtype):
    problem = Problem()
    outside = problem.penalty()
    with torch.autocast(DEVICE, dtype=dtype):
        inside = problem.penalty()
        controlled = mk.CoefficientRegularizer(torch.tensor(2.0))(problem.weight)
    assert torch.equal(inside, outside) and controlled.dtype == torch.float32
    inside.backward()
    problem.check(problem.weight.grad, problem.rows.grad)


def in_threads(count: int, work) -> None:
    failures: list[BaseException] = []

    def guarded():
        try:
            work()
        except BaseException as failure:  # noqa: BLE001 - handed on to the test
            failures.append(failure)

    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_backward_in_threads():
    """Graphs of several threads, as in nn.DataParallel; and one graph that several threads go back
    through."""
    problem = Problem(n=64)
    shared = problem.penalty() * 3
    barrier = threading.Barrier(4)

    def work():
        barrier.wait()
        for _ in range(10):
            problem.check(*torch.autograd.grad(shared, problem.leaves, retain_graph=True), 3.0)
            problem.check(*torch.autograd.grad(problem.penalty() * -2, problem.leaves), -2.0)

    in_threads(4, work)


def test_hooks_see_the_gradient():
    problem = Problem()
    problem.weight.register_hook(lambda g: g * 2)
    seen = []
    problem.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    problem.penalty().backward()
    problem.check(seen[0], None, 2.0)


@pytest.mark.parametrize("grad", [1.0, 1024.0])
def test_float16_gradients_meet_the_loss_scale_unrounded(grad):
    """The gradients of a mean over many entries underflow in float16; scaled by the loss they must not
    have."""
    n = 120
    weight, rows = draw_weight(n, n, dtype=torch.float16), draw_points("torus", n)
    settings = {"manifold": "torus", "strength": 1e-4}  # entries of 5e-7: below float16's normal numbers
    want = expected(weight, rows, grad=grad, **settings)
    got = penalty_and_gradients(weight, rows, grad=grad, **settings)
    exact = want.weight.to(torch.float16)
    assert (got.weight - exact).abs().max() <= torch.finfo(torch.float16).eps * exact.abs().max() / 2
    if grad > 1:
        assert relative_error(got.weight, want.weight) <= 1e-3
