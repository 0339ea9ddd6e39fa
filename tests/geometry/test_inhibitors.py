"""Compares f with the paper's formulas and df/ds with autograd and with its limits at 0; tests tables and errors."""
import copy
import math
import pickle

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import torch

import moduli_kernels as mk
from moduli_kernels import geometry
from moduli_kernels.geometry.inhibitors import CallableInhibitor, inhibitor
from tests.support.penalty_cases import with_every_class


def ricker(d, sigma):
    """psi as the paper defines it, in Appendix E."""
    height = 2 / np.sqrt(3 * sigma * np.sqrt(np.pi))
    return height * (1 - d**2 / sigma**2) * np.exp(-d**2 / (2 * sigma**2))


def dog(d, c, sigma1, sigma2):
    return c * (np.exp(-d**2 / sigma2) - np.exp(-d**2 / sigma1))


def bump(d):
    return 2 + torch.cos(0.7 * d) * torch.exp(-0.05 * d * d)


def bump_numpy(d):
    return 2 + np.cos(0.7 * d) * np.exp(-0.05 * d * d)


TABLE = mk.TabulatedInhibitor(bump, max_distance=20.0)
# Each case holds an inhibitor, f(d) in NumPy, and df/ds at s = 0.
CASES = {
    "dog, paper": (mk.DifferenceOfGaussians(3.0, 1.5, 2.5, zero_min=False), lambda d: 3 - dog(d, 3, 1.5, 2.5),
                   3 / 2.5 - 3 / 1.5),
    "dog, code": (mk.DifferenceOfGaussians(), lambda d: dog(np.sqrt(math.log(20) / 3.8), 100, 0.25, 5)
                  - dog(d, 100, 0.25, 5), 20 - 400),
    "diffusion": (mk.Diffusion(), lambda d: d**2, 1),
    "distance": (mk.Diffusion(0.5, 1.0), lambda d: 0.5 * d, 0),  # df/ds diverges
    "diffusion 0.5": (mk.Diffusion(2.0, 0.5), lambda d: 2 * d**0.5, 0),  # df/ds diverges
    "diffusion 3.5": (mk.Diffusion(0.1, 3.5), lambda d: 0.1 * d**3.5, 0),
    "sinusoid": (mk.Sinusoid(10.0, 2.0), lambda d: 10 + 10 * np.cos(2 * d), -10 * 2**2 / 2),
    "ricker": (mk.RickerWavelet(1.3, 2.0), lambda d: 2 * (ricker(0.0, 1.3) - ricker(d, 1.3)),
               3 * 2 * ricker(0.0, 1.3) / (2 * 1.3**2)),
    "constant": (mk.Constant(2.5), lambda d: np.full_like(d, 2.5), 0),
    "tabulated": (TABLE, bump_numpy, 0),  # a table gives no df/ds at 0
    "callable": (inhibitor(bump), bump_numpy, 0),
}
every_case = pytest.mark.parametrize("f, formula, limit", CASES.values(), ids=CASES.keys())
EVERY = with_every_class({name: f for name, (f, _, _) in CASES.items()}, geometry.INHIBITORS)
every_inhibitor = pytest.mark.parametrize("f", EVERY.values(), ids=EVERY.keys())
D = torch.from_numpy(np.concatenate([10 ** np.linspace(-8, 0, 200), np.linspace(0, 19.5, 400)]))


# --- values and slopes -----------------------------------------------------------------------------------

@every_case
def test_f_is_the_papers_formula(f, formula, limit):
    np.testing.assert_allclose(f(D).numpy(), formula(D.numpy()), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(f.from_squared(D.square()).numpy(), formula(D.numpy()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("f, d, value", [
    (mk.DifferenceOfGaussians(2.0, 1.0, 3.0, zero_min=False), 0.0, 2.0),
    (mk.DifferenceOfGaussians(2.0, 1.0, 3.0, zero_min=False), 1e3, 2.0),
    (mk.DifferenceOfGaussians(), math.sqrt(math.log(20) / 3.8), 0.0),
    (mk.Diffusion(3.0, 2.0), 4.0, 48.0),
    (mk.Diffusion(3.0, 1.0), 4.0, 12.0),
    (mk.Diffusion(), 0.0, 0.0),
    (mk.Sinusoid(10.0, 2.0), 0.0, 20.0),
    (mk.Sinusoid(10.0, 2.0), math.pi / 2, 0.0),
    (mk.RickerWavelet(), 0.0, 0.0),
    (mk.RickerWavelet(2.0, 3.0), 2.0, 3 * 2 / math.sqrt(6 * math.sqrt(math.pi))),  # psi(sigma) = 0
    (mk.Constant(7.0), 3.0, 7.0),
])
def test_hand_values(f, d, value):
    assert float(f(torch.tensor(d, dtype=torch.float64))) == pytest.approx(value, rel=1e-14, abs=1e-13)


def test_the_default_is_the_experiments_one_and_its_cheapest_distance_is_free():
    f = mk.DifferenceOfGaussians()
    assert f == mk.DifferenceOfGaussians(c=100.0, sigma1=0.25, sigma2=5.0, zero_min=True) == inhibitor(None)

    def at(d):
        return float(f(torch.tensor(d, dtype=torch.float64)))

    best = scipy.optimize.minimize_scalar(at, (0.5, 1, 2))
    assert best.x == pytest.approx(0.89, abs=5e-3) and best.fun == pytest.approx(0, abs=1e-12)
    assert (f(D) >= 0).all()


def test_the_default_runs_from_0_to_81_with_mean_66_on_the_torus():
    """These are the numbers of paper.md, section 4, for the experiments' code, which drew points at random."""
    axis = (torch.arange(500, dtype=torch.float64) + 0.5) / 50
    grid = torch.cartesian_prod(axis, axis)
    f = mk.DifferenceOfGaussians()(mk.FlatTorus().distance(torch.zeros(1, 2, dtype=torch.float64), grid))
    assert float(f.max()) == pytest.approx(81.1, abs=0.05)
    assert float(f.min()) == pytest.approx(0, abs=1e-3)
    assert float(f.mean()) == pytest.approx(66.3, abs=0.1)


def test_the_ricker_wavelet_is_normalized_and_has_no_mean():
    f = mk.RickerWavelet(1.7)

    def psi(d):
        return f.peak - float(f(torch.tensor(d, dtype=torch.float64)))

    assert scipy.integrate.quad(lambda d: psi(d) ** 2, -30, 30, limit=200)[0] == pytest.approx(1, rel=1e-9)
    assert scipy.integrate.quad(psi, -30, 30, limit=200)[0] == pytest.approx(0, abs=1e-9)


@every_inhibitor
def test_slope_is_the_derivative_in_s(f):
    s = D.square()[D > 1e-3].requires_grad_()
    autograd, = torch.autograd.grad(f.from_squared(s).sum(), s, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(f.slope(s.detach()), autograd, rtol=1e-9, atol=1e-9)


@every_case
def test_slope_is_the_difference_quotient_of_the_papers_formula(f, formula, limit):
    s = D.square()[D > 1e-3]
    step = 1e-4 * s
    d = [torch.sqrt(s + k * step).numpy() for k in (1, -1)]
    by_difference = (formula(d[0]) - formula(d[1])) / (2 * step.numpy())
    np.testing.assert_allclose(f.slope(s).numpy(), by_difference, rtol=1e-4, atol=1e-5)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slope_at_coincidence_is_the_limit_or_0_where_there_is_none(f, formula, limit, dtype):
    slope = f.slope(torch.zeros(2, dtype=dtype))
    assert slope.dtype == dtype and slope.tolist() == pytest.approx([limit] * 2, rel=1e-6, abs=1e-12)
    if limit:
        near = f.slope(torch.full((1,), 1e-12, dtype=torch.float64))
        assert near.item() == pytest.approx(limit, rel=1e-9)


@every_inhibitor
def test_gradient_in_d_is_finite_at_0(f):
    d = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(f(d).sum(), d, allow_unused=True, materialize_grads=True)
    assert gradient.isfinite().all()


@every_inhibitor
def test_float32_is_close_to_float64(f):
    s = D.square()[D > 1e-2]
    for of in (f.from_squared, f.slope):
        single, double = of(s.float()), of(s.float().double())
        assert single.dtype == torch.float32 and double.dtype == torch.float64
        assert (single - double).abs().max() <= 4e-6 * double.abs().max()


@every_inhibitor
def test_nan_stays_nan(f):
    s = torch.tensor([1.0, math.nan, 4.0], dtype=torch.float64)
    assert f.from_squared(s).isnan().tolist() == [False, True, False]
    assert f.slope(s).isnan().tolist() == [False, True, False]


@every_inhibitor
def test_works_elementwise_on_any_shape(f):
    s = D[:24].reshape(2, 3, 4).square()
    assert torch.equal(f.from_squared(s), f.from_squared(s.flatten()).reshape(2, 3, 4))
    assert f.from_squared(s[:0]).shape == f.slope(s[:0]).shape == (0, 3, 4)
    assert f(torch.tensor(2.0)).shape == ()


@every_inhibitor
def test_whole_distances_are_numbers_too(f):
    assert float(f(2)) == pytest.approx(float(f(2.0)), rel=1e-6)
    assert torch.equal(f(torch.tensor([0, 3])), f(torch.tensor([0.0, 3.0])))


# --- tables ----------------------------------------------------------------------------------------------

def test_a_table_converges_with_the_fourth_power_of_its_step():
    d = torch.linspace(0, 8, 5001, dtype=torch.float64)
    values, slopes = [], []
    for samples in (33, 65, 129, 257):
        f = mk.TabulatedInhibitor(bump, 8.0, samples)
        x = d.clone().requires_grad_()
        slopes.append(torch.autograd.grad(f(x).sum(), x)[0][1:-1])
        values.append(float((f(d) - bump(d)).abs().max()))
    x = d.clone().requires_grad_()
    true = torch.autograd.grad(bump(x).sum(), x)[0][1:-1]
    slopes = [float((slope - true).abs().max()) for slope in slopes]
    for fine, coarse in zip(values[1:], values):
        assert 14 < coarse / fine < 18
    for fine, coarse in zip(slopes[1:], slopes):
        assert 7 < coarse / fine < 9
    assert values[-1] < 2e-9


def test_a_table_reproduces_cubics_and_its_nodes():
    def cubic(d):
        return 30 - 4 * d + 0.5 * d**2 + 0.25 * d**3

    f = mk.TabulatedInhibitor(cubic, 5.0, samples=8)
    d = torch.linspace(0, 5, 301, dtype=torch.float64)
    torch.testing.assert_close(f(d), cubic(d), rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(f.slope(d[1:-1].square()), (-4 + d + 0.75 * d**2)[1:-1] / (2 * d[1:-1]))
    nodes = torch.linspace(0, 20, 4096, dtype=torch.float64)
    torch.testing.assert_close(TABLE(nodes), bump(nodes), rtol=1e-13, atol=1e-13)


def test_a_table_is_constant_beyond_its_end():
    f = mk.TabulatedInhibitor(bump, 3.0, samples=64)
    far = torch.tensor([3.0, 3.0 + 1e-9, 4.0, 1e6, math.inf], dtype=torch.float64)
    assert (f(far) == bump(far[0])).all()
    assert (f.slope(far.square()) == 0).all()


def test_a_table_holds_cubics_per_dtype_made_once():
    f = mk.TabulatedInhibitor(bump, 8.0, samples=100)
    table = f.table()
    assert table.shape == (100, 4) and table.dtype == torch.float64 and f.table() is table
    torch.testing.assert_close(table[:, 0], bump(torch.linspace(0, 8, 100, dtype=torch.float64)))
    ends = table[:-1].sum(1)  # each cubic ends, at t = 1, where the next begins
    torch.testing.assert_close(ends, table[1:, 0], rtol=1e-14, atol=1e-14)
    assert table[-1].tolist() == [f.values[-1], 0, 0, 0]
    assert torch.equal(f.table(torch.float32), table.float())
    assert f.table(torch.float32, torch.device("cpu")) is f.table(torch.float32)


def test_tables_are_their_samples():
    f = mk.TabulatedInhibitor(bump, 8.0, samples=100)
    assert f == mk.TabulatedInhibitor(lambda d: bump(d), 8.0, 100)
    assert f == mk.TabulatedInhibitor.from_values(f.values, 8.0)
    assert f != mk.TabulatedInhibitor(torch.cos, 8.0, 100) and f != mk.TabulatedInhibitor(bump, 9.0, 100)
    assert mk.TabulatedInhibitor(lambda d: 3.0, 2.0, 8).values == (3.0,) * 8  # one number serves all distances
    d = torch.tensor(2.0, requires_grad=True)
    assert not mk.TabulatedInhibitor(lambda x: d * x, 2.0, 8)(torch.ones(1)).requires_grad


# --- objects ---------------------------------------------------------------------------------------------

def test_which_inhibitors_may_train_points():
    assert {name: case[0].trainable for name, case in CASES.items()} == {
        "dog, paper": True, "dog, code": True, "diffusion": False, "distance": False, "diffusion 0.5": False,
        "diffusion 3.5": False, "sinusoid": True, "ricker": True, "constant": False, "tabulated": True,
        "callable": True,
    }
    assert not mk.TabulatedInhibitor(torch.exp, 3.0).trainable
    assert not mk.TabulatedInhibitor(lambda d: -d, 3.0).trainable
    assert not mk.TabulatedInhibitor(torch.ones_like, 3.0).trainable


@every_inhibitor
def test_inhibitors_are_values(f):
    f(torch.ones(1))  # what this call caches must not matter
    for other in (copy.deepcopy(f), copy.copy(f), pickle.loads(pickle.dumps(f))):
        assert other == f and hash(other) == hash(f) and other.trainable == f.trainable
        assert torch.equal(other(D), f(D))
    assert f != mk.Constant(77.0)
    if not isinstance(f, CallableInhibitor):
        with pytest.raises(AttributeError):
            f.c = 3.0


@pytest.mark.parametrize("f", [f for f in EVERY.values() if type(f) not in
                               (mk.TabulatedInhibitor, CallableInhibitor)])
def test_what_is_printed_makes_the_same_inhibitor(f):
    assert eval(repr(f), vars(mk)) == f


def test_a_table_prints_its_size_not_its_values():
    assert repr(TABLE) == "TabulatedInhibitor(max_distance=20.0, samples=4096)"


def test_callables_are_wrapped_and_the_rest_refused():
    f = inhibitor(bump)
    assert isinstance(f, mk.Inhibitor) and f == inhibitor(bump) and f != inhibitor(torch.cos)
    assert hash(f) == hash(inhibitor(bump)) and repr(f) == "CallableInhibitor(bump)"
    assert inhibitor(f) is f
    assert (inhibitor(lambda d: torch.ones_like(d)).slope(torch.ones(3)) == 0).all()
    sigmoid = torch.nn.Sigmoid()
    assert torch.equal(inhibitor(sigmoid)(D), torch.sigmoid(D))


def test_a_subclass_gives_f_and_its_slope():
    with pytest.raises(NotImplementedError):
        mk.Inhibitor()(torch.ones(1))
    with pytest.raises(NotImplementedError):
        mk.Inhibitor().slope(torch.ones(1))


# --- errors ----------------------------------------------------------------------------------------------

def positive(name, got):
    return f"{name} must be a positive finite number, got {got}; pass a float such as 5.0."


@pytest.mark.parametrize("make, error, message", [
    (lambda: mk.DifferenceOfGaussians(sigma1=5.0, sigma2=0.25), ValueError,
     "sigma1 must be smaller than sigma2 (narrow minus wide Gaussian), got sigma1=5.0 and sigma2=0.25; swap "
     "them or widen sigma2."),
    (lambda: mk.DifferenceOfGaussians(sigma1=2.0, sigma2=2.0), ValueError,
     "sigma1 must be smaller than sigma2 (narrow minus wide Gaussian), got sigma1=2.0 and sigma2=2.0; swap "
     "them or widen sigma2."),
    (lambda: mk.DifferenceOfGaussians(sigma1=0.0), ValueError, positive("sigma1", "0.0")),
    (lambda: mk.DifferenceOfGaussians(sigma2=math.inf), ValueError, positive("sigma2", "inf")),
    (lambda: mk.DifferenceOfGaussians(c=-1.0), ValueError, positive("c", "-1.0")),
    (lambda: mk.DifferenceOfGaussians(c=None), TypeError, positive("c", "a NoneType")),
    (lambda: mk.Diffusion(-1.0), ValueError, positive("c", "-1.0")),
    (lambda: mk.Diffusion(1.0, 0.0), ValueError, positive("exponent", "0.0")),
    (lambda: mk.Sinusoid(c=math.nan), ValueError, positive("c", "nan")),
    (lambda: mk.Sinusoid(mu=-2.0), ValueError, positive("mu", "-2.0")),
    (lambda: mk.RickerWavelet(0.0), ValueError, positive("sigma", "0.0")),
    (lambda: mk.RickerWavelet(c="1"), TypeError, positive("c", "'1'")),
    (lambda: mk.Constant(0.0), ValueError, positive("c", "0.0")),
    (lambda: mk.TabulatedInhibitor(bump, -1.0), ValueError, positive("max_distance", "-1.0")),
    (lambda: mk.TabulatedInhibitor(bump, 1.0, 7), ValueError,
     "samples must be an integer of at least 8, got 7; pass a larger one."),
    (lambda: mk.TabulatedInhibitor(bump, 1.0, 100.0), TypeError,
     "samples must be an integer of at least 8, got 100.0; pass an int."),
    (lambda: mk.TabulatedInhibitor(lambda d: 1 / d, 1.0), ValueError,
     "f must be finite on [0, max_distance], got NaN or infinity in its samples; choose a smaller "
     "max_distance or an inhibitor without a pole."),
    (lambda: inhibitor("dog"), TypeError,
     "inhibitor must be an Inhibitor, a callable d -> f(d) or None, got 'dog'; pass for example "
     "DifferenceOfGaussians()."),
    (lambda: inhibitor(3.0), TypeError,
     "inhibitor must be an Inhibitor, a callable d -> f(d) or None, got 3.0; pass for example "
     "DifferenceOfGaussians()."),
])
def test_errors(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == message
