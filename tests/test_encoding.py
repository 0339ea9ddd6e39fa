"""_encoding.py: the same codes as in csrc/, and there and back gives the same distances and f."""
import pathlib
import re
from dataclasses import dataclass

import pytest
import torch
from penalty_cases import INHIBITORS, MANIFOLDS, VARIANTS, draw_points

import moduli_kernels as mk
from moduli_kernels import _encoding
from moduli_kernels.inhibitors import inhibitor as resolve_inhibitor

CSRC = pathlib.Path(__file__).resolve().parent.parent / "csrc"
KERNEL_INHIBITORS = {name: f for name, f in {**INHIBITORS, **VARIANTS}.items() if isinstance(f, mk.Inhibitor)}


def functors(file):
    """The functors of a C++ header that have a code: their names, codes and the names of their parameters."""
    pattern = r'struct (\w+)[^{;]*\{\n  static constexpr int64_t CODE = (\d+).*?PARAMETERS\[\] = \{([^}]*)\}'
    found = re.findall(pattern, (CSRC / file).read_text(), re.S)
    return {name: (int(code), tuple(re.findall(r'"(\w+)"', names))) for name, code, names in found}


# --- with the C++ headers --------------------------------------------------------------------------------

def test_manifold_codes_are_those_of_the_header():
    codes = {"Flat": _encoding.FLAT, "Sphere": _encoding.SPHERE, "KleinBottle": _encoding.KLEIN}
    assert {name: code for name, (code, _) in functors("manifolds.h").items()} == codes


def test_inhibitor_codes_are_those_of_the_header():
    codes = {cls.__name__: code for cls, (code, _) in _encoding.INHIBITORS.items()}
    assert {name: code for name, (code, _) in functors("inhibitors.h").items()} == codes


@pytest.mark.parametrize("cls", _encoding.INHIBITORS)
def test_parameters_stand_in_the_order_that_the_functor_reads(cls):
    assert functors("inhibitors.h")[cls.__name__][1] == _encoding.INHIBITORS[cls][1]


# --- there and back --------------------------------------------------------------------------------------

@pytest.mark.parametrize("m, factors, parameters", [
    (mk.Circle(0.5), [0, 1], [3.141592653589793]),
    (mk.FlatTorus((3, 7)), [0, 2], [3.0, 7.0]),
    (mk.Euclidean(3), [0, 3], [0.0, 0.0, 0.0]),
    (mk.Sphere(4, 2), [1, 5], [2.0]),
    (mk.KleinBottle(3, 4), [2, 2], [3.0, 4.0]),
    (mk.Product(mk.KleinBottle(3, 4), mk.Euclidean(1), mk.Product(mk.Sphere(), mk.FlatTorus((9,)))),
     [2, 2, 0, 1, 1, 3, 0, 1], [3.0, 4.0, 0.0, 5.0, 9.0]),
])
def test_codes_of_manifolds(m, factors, parameters):
    code = _encoding.encode_manifold(m)
    assert code == (factors, pytest.approx(parameters, rel=1e-15))
    assert all(type(n) is int for n in code.factors) and all(type(p) is float for p in code.parameters)


@pytest.mark.parametrize("name", MANIFOLDS)
def test_decoded_manifolds_have_the_same_distances(name):
    back = _encoding.decode_manifold(*_encoding.encode_manifold(MANIFOLDS[name]))
    assert back.ambient_dim == MANIFOLDS[name].ambient_dim
    x, y = draw_points(name, 20, dtype=torch.float64), 3 * draw_points(name, 30, seed=1, dtype=torch.float64)
    torch.testing.assert_close(back.distance(x, y), MANIFOLDS[name].distance(x, y), rtol=1e-14, atol=0)
    slope = torch.randn(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for got, want in zip(back.pull_back(x, y, slope), MANIFOLDS[name].pull_back(x, y, slope)):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    assert _encoding.encode_manifold(back) is not None


def test_codes_of_inhibitors():
    dog = mk.DifferenceOfGaussians(3, 1, 2, zero_min=False)
    assert _encoding.encode_inhibitor(dog) == (0, [3.0, 1.0, 2.0, 3.0])
    dog = mk.DifferenceOfGaussians()
    assert _encoding.encode_inhibitor(dog) == (0, [100.0, 0.25, 5.0, dog.offset])
    assert _encoding.encode_inhibitor(mk.Diffusion(2, 3)) == (1, [2.0, 3.0])
    assert _encoding.encode_inhibitor(mk.Sinusoid(2, 3)) == (2, [2.0, 3.0])
    assert _encoding.encode_inhibitor(mk.RickerWavelet(2, 3)) == (3, [2.0, 3.0])
    assert _encoding.encode_inhibitor(mk.Constant(2)) == (4, [2.0])
    assert _encoding.encode_inhibitor(mk.TabulatedInhibitor(torch.cos, 7)) == (5, [7.0])


@pytest.mark.parametrize("name", KERNEL_INHIBITORS)
def test_decoded_inhibitors_are_the_same(name):
    f = KERNEL_INHIBITORS[name]
    code = _encoding.encode_inhibitor(f)
    assert type(code.kind) is int and all(type(p) is float for p in code.parameters)
    table = f.table() if isinstance(f, mk.TabulatedInhibitor) else None
    back = _encoding.decode_inhibitor(*code, table)
    assert back == f and hash(back) == hash(f)
    s = torch.linspace(0, 30, 500, dtype=torch.float64) ** 2
    assert torch.equal(back.from_squared(s), f.from_squared(s)) and torch.equal(back.slope(s), f.slope(s))


def test_a_table_decoded_from_float32_is_as_good_as_its_rounded_samples():
    f = mk.TabulatedInhibitor(torch.cos, 7.0)
    back = _encoding.decode_inhibitor(*_encoding.encode_inhibitor(f), f.table(torch.float32))
    d = torch.linspace(0, 7, 500, dtype=torch.float64)
    torch.testing.assert_close(back(d), f(d), rtol=0, atol=1e-7)


# --- what the kernels do not know ------------------------------------------------------------------------

@dataclass(frozen=True)
class Mine(mk.FlatTorus):
    """A subclass of a built-in may redefine anything."""


@dataclass(frozen=True)
class Steeper(mk.Diffusion):
    """The same."""


def test_what_users_define_has_no_code():
    assert _encoding.encode_manifold(Mine()) is None
    assert _encoding.encode_manifold(mk.Product(mk.Circle(), Mine())) is None
    assert _encoding.encode_manifold(mk.Manifold()) is None
    assert _encoding.encode_inhibitor(Steeper()) is None
    assert _encoding.encode_inhibitor(mk.Inhibitor()) is None
    assert _encoding.encode_inhibitor(resolve_inhibitor(torch.cos)) is None


def test_an_unknown_code():
    with pytest.raises(ValueError) as caught:
        _encoding.decode_inhibitor(6, [1.0], None)
    assert str(caught.value) == "inhibitor must be a code from 0 to 5, got 6; use encode_inhibitor."
