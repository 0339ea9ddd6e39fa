"""zero_min="sampled": the offset of the authors' code, the largest difference of Gaussians over all pairs of points."""
import copy
import pickle

import pytest
import torch

import moduli_kernels as mk

SAMPLED = mk.DifferenceOfGaussians(zero_min="sampled")
MANIFOLDS = ("torus", "torus6", "circle", "sphere", "s3", "klein", "r3", "mixed")


def authors(weight, rows, cols=None, *, manifold, power=1.0, blocks=1, reduction="mean", strength=1.0):
    """The penalty as the authors' code makes it, from a matrix of coefficients, with gradients by autograd."""
    s = mk.manifold(manifold).squared_distance(rows, rows if cols is None else cols)
    g = 100 * (torch.exp(-s / 5) - torch.exp(-4 * s))
    f = (g.max() - g).repeat(blocks, 1)
    a = weight.abs() if weight.dim() == 2 else torch.linalg.vector_norm(weight.flatten(2), dim=2)
    cost = f * a**power
    return strength * (cost.mean() if reduction == "mean" else cost.sum())


def drawn(manifold, n, m=None, blocks=1, kernel=(), dtype=torch.float64):
    g = torch.Generator().manual_seed(n)
    sample = mk.manifold(manifold).sample
    points = [sample(k, generator=g, dtype=dtype).requires_grad_() for k in (n, m or n)]
    weight = torch.randn(blocks * n, m or n, *kernel, generator=g, dtype=dtype, requires_grad=True)
    return weight, points[0], points[1] if m else None


def close(found, expected, rtol=1e-10):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.detach().abs().max()))


@pytest.mark.parametrize("manifold", MANIFOLDS)
@pytest.mark.parametrize("settings", [{}, {"m": 7}, {"blocks": 3}, {"kernel": (2, 2), "m": 5}, {"power": 2.0},
                                      {"reduction": "sum", "strength": 0.3}])
def test_value_and_gradients_are_those_of_the_authors_code(manifold, settings):
    settings = dict(settings)
    tensors = drawn(manifold, 11, settings.pop("m", None), settings.get("blocks", 1), settings.pop("kernel", ()))
    leaves = [t for t in tensors if t is not None]
    expected = authors(*tensors, manifold=manifold, **settings)
    value = mk.moduli_penalty(*tensors, manifold=manifold, inhibitor=SAMPLED, **settings)
    close([value], [expected])
    close(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("manifold", ["torus6", "sphere"])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_every_backend_has_the_sampled_offset(manifold, backend):
    weight, rows, _ = drawn(manifold, 40, dtype=torch.float32)
    with mk.backend(backend):
        value = mk.moduli_penalty(weight, rows, manifold=manifold, inhibitor=SAMPLED)
        close(torch.autograd.grad(value, (weight, rows)),
              torch.autograd.grad(authors(weight, rows, manifold=manifold), (weight, rows)), rtol=1e-4)


def test_in_one_compiled_graph():
    weight, rows, _ = drawn("torus6", 30)
    fn = torch.compile(lambda w, x: mk.moduli_penalty(w, x, manifold="torus6", inhibitor=SAMPLED), fullgraph=True,
                       backend="aot_eager")
    value, expected = fn(weight, rows), authors(weight, rows, manifold="torus6")
    close([value], [expected])
    close(torch.autograd.grad(value, (weight, rows)), torch.autograd.grad(expected, (weight, rows)))


def test_in_place_forms():
    weight, rows, cols = drawn("torus6", 12, 9)
    expected = authors(weight, rows, cols, manifold="torus6", strength=0.2)
    value = mk.accumulate_penalty_grad_(weight, rows, cols, manifold="torus6", inhibitor=SAMPLED, strength=0.2)
    close([value, weight.grad, rows.grad, cols.grad],
          [expected.detach(), *torch.autograd.grad(expected, (weight, rows, cols))])
    f = SAMPLED.at_points(mk.manifold("torus6"), rows.detach(), cols.detach())
    thresholds = 0.5 * f.from_squared(mk.manifold("torus6").squared_distance(rows, cols)).detach() / weight.numel()
    shrunk = weight.detach().sign() * (weight.detach().abs() - thresholds).clamp(min=0)
    with torch.no_grad():
        mk.proximal_step_(weight, rows, cols, manifold="torus6", inhibitor=SAMPLED, step=0.5)
    close([weight.detach()], [shrunk])


def test_the_cheapest_pair_costs_nothing_and_the_analytic_offset_more():
    """At n = 128 on the 6-torus the analytic offset adds 20 to every coefficient on average, and up to 40."""
    added = []
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        sampled = mk.ModuliRegularizer(128, manifold="torus6", inhibitor=SAMPLED, generator=g).coefficients()
        analytic = mk.ModuliRegularizer(128, manifold="torus6", generator=g.manual_seed(seed)).coefficients()
        assert abs(sampled.min()) < 1e-4
        more = analytic - sampled
        torch.testing.assert_close(more, more.mean().expand_as(more), rtol=0, atol=1e-4)
        added.append(float(more.mean()))
    assert 0 < min(added) and 10 < sum(added) / 5 < 30 and max(added) < 50, added


def test_controls_are_made_of_the_sampled_coefficients():
    r = mk.ModuliRegularizer(20, manifold="torus6", inhibitor=SAMPLED)
    weight = torch.randn(20, 20)
    torch.testing.assert_close(r.matched()(weight), r.coefficients().mean() * weight.abs().mean())
    assert torch.equal(r.shuffled().coefficients.flatten().sort()[0], r.coefficients().flatten().sort()[0])


def test_through_regularize_and_in_several_layers():
    rnn = torch.nn.LSTM(3, 10, num_layers=2)
    reg = mk.regularize(rnn, manifold="torus6", inhibitor=SAMPLED, strength=0.1, trainable=True)
    expected = sum(authors(getattr(rnn, f"weight_hh_l{k}"), r.rows.points, manifold="torus6", blocks=4, strength=0.1)
                   for k, (_, r) in enumerate(reg.items()))
    leaves = [*reg.parameters(), rnn.weight_hh_l0, rnn.weight_hh_l1]
    value = reg()
    close([value], [expected], rtol=1e-5)
    close(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), rtol=1e-4)


def test_the_offset_follows_points_that_are_written():
    r = mk.ModuliRegularizer(16, manifold="torus6", inhibitor=SAMPLED)
    weight = torch.randn(16, 16)
    r(weight)
    r.rows.points.data.copy_(mk.manifold("torus6").sample(16))
    close([r(weight)], [authors(weight, r.rows.points, manifold="torus6")], rtol=1e-5)


def test_one_pair_and_no_pair():
    one, none = torch.zeros(1, 2), torch.zeros(0, 2)
    assert mk.moduli_penalty(torch.ones(1, 1), one, manifold="torus", inhibitor=SAMPLED) == 0
    assert mk.moduli_penalty(torch.ones(0, 0), none, manifold="torus", inhibitor=SAMPLED) == 0
    far = torch.tensor([[5.0, 5.0]])
    assert mk.moduli_penalty(torch.ones(1, 1), one, far, manifold="torus", inhibitor=SAMPLED).abs() < 1e-5


def test_nan_in_points_reaches_the_value():
    rows = mk.manifold("torus").sample(5)
    rows[2, 0] = float("nan")
    assert mk.moduli_penalty(torch.ones(5, 5), rows, manifold="torus", inhibitor=SAMPLED).isnan()


def test_it_says_what_it_is():
    assert repr(SAMPLED) == "DifferenceOfGaussians(c=100.0, sigma1=0.25, sigma2=5.0, zero_min='sampled')"
    for twin in (copy.deepcopy(SAMPLED), pickle.loads(pickle.dumps(SAMPLED)),
                 mk.DifferenceOfGaussians(100, zero_min="sampled")):
        assert twin == SAMPLED and hash(twin) == hash(SAMPLED) and twin != mk.DifferenceOfGaussians()
    at = SAMPLED.at_points(mk.manifold("torus"), torch.zeros(1, 2))
    assert at != SAMPLED and at.offset == 0.0 and "zero_min='sampled', offset=0.0" in repr(at)
    assert pickle.loads(pickle.dumps(at)) == at
    assert mk.DifferenceOfGaussians().at_points(mk.manifold("torus"), torch.zeros(1, 2)) == mk.DifferenceOfGaussians()


def test_the_setting_is_saved_with_a_regularizer():
    sampled = mk.ModuliRegularizer(4, inhibitor=SAMPLED)
    mk.ModuliRegularizer(4, inhibitor=SAMPLED).load_state_dict(sampled.state_dict())
    with pytest.raises(ValueError, match="inhibitor of the saved regularizer"):
        mk.ModuliRegularizer(4).load_state_dict(sampled.state_dict())


@pytest.mark.parametrize("call", [lambda: SAMPLED(torch.ones(3)), lambda: SAMPLED.offset,
                                  lambda: SAMPLED.from_squared(torch.ones(2, 2))])
def test_without_points_it_says_what_is_missing(call):
    with pytest.raises(ValueError, match=r"zero_min='sampled' must be given points .* inhibitor.at_points"):
        call()


@pytest.mark.parametrize(("value", "error"), [("sample", ValueError), ("true", ValueError), (None, TypeError),
                                              (0.5, TypeError), (2, TypeError)])
def test_other_values_of_zero_min_are_refused(value, error):
    with pytest.raises(error, match="zero_min must be True, False or 'sampled', got"):
        mk.DifferenceOfGaussians(zero_min=value)
