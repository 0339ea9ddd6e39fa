"""Kernel forms have the codes of csrc/, and a manifold or inhibitor comes back from its form unchanged."""
import pathlib
import re
from dataclasses import dataclass

import pytest
import torch

import moduli_kernels as mk
from moduli_kernels.geometry import INHIBITORS as INHIBITOR_CLASSES, MANIFOLDS as MANIFOLD_CLASSES, encoding
from moduli_kernels.geometry.base import KernelForm
from moduli_kernels.geometry.inhibitors import inhibitor as resolve_inhibitor
from tests.support.penalty_cases import INHIBITORS, MANIFOLDS, VARIANTS, draw_points

CSRC = pathlib.Path(__file__).resolve().parents[2] / "csrc"
KERNEL_INHIBITORS = {name: f for name, f in {**INHIBITORS, **VARIANTS}.items() if isinstance(f, mk.Inhibitor)}


def functors(file):
    """The functors of a C++ header that have a code: their names, codes and the names of their parameters."""
    pattern = r'struct (\w+)[^{;]*\{\n  static constexpr int64_t CODE = (\d+).*?PARAMETERS\[\] = \{([^}]*)\}'
    found = re.findall(pattern, (CSRC / file).read_text(), re.S)
    return {name: (int(code), tuple(re.findall(r'"(\w+)"', names))) for name, code, names in found}


# --- with the C++ headers --------------------------------------------------------------------------------

def test_manifold_codes_are_those_of_the_header():
    codes = {"Flat": mk.FlatTorus, "Sphere": mk.Sphere, "KleinBottle": mk.KleinBottle}
    found = {name: code for name, (code, _) in functors("manifolds.h").items()}
    assert found == {name: cls.kernel_form.code for name, cls in codes.items()}
    assert {cls.kernel_form.code for cls in MANIFOLD_CLASSES} == set(found.values())


def test_inhibitor_codes_are_those_of_the_header():
    codes = {cls.__name__: cls.kernel_form.code for cls in INHIBITOR_CLASSES}
    assert {name: code for name, (code, _) in functors("inhibitors.h").items()} == codes


@pytest.mark.parametrize("cls", INHIBITOR_CLASSES)
def test_parameters_stand_in_the_order_that_the_functor_reads(cls):
    assert functors("inhibitors.h")[cls.__name__][1] == cls.kernel_form.parameters


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
    code = encoding.encode_manifold(m)
    assert code == (factors, pytest.approx(parameters, rel=1e-15))
    assert all(type(n) is int for n in code.factors) and all(type(p) is float for p in code.parameters)


@pytest.mark.parametrize("name", MANIFOLDS)
def test_decoded_manifolds_have_the_same_distances(name):
    back = encoding.decode_manifold(*encoding.encode_manifold(MANIFOLDS[name]))
    assert back.ambient_dim == MANIFOLDS[name].ambient_dim
    x, y = draw_points(name, 20, dtype=torch.float64), 3 * draw_points(name, 30, seed=1, dtype=torch.float64)
    torch.testing.assert_close(back.distance(x, y), MANIFOLDS[name].distance(x, y), rtol=1e-14, atol=0)
    slope = torch.randn(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for got, want in zip(back.pull_back(x, y, slope), MANIFOLDS[name].pull_back(x, y, slope)):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    assert encoding.encode_manifold(back) is not None


def test_codes_of_inhibitors():
    dog = mk.DifferenceOfGaussians(3, 1, 2, zero_min=False)
    assert encoding.encode_inhibitor(dog) == (0, [3.0, 1.0, 2.0, 3.0])
    dog = mk.DifferenceOfGaussians()
    assert encoding.encode_inhibitor(dog) == (0, [100.0, 0.25, 5.0, dog.offset])
    assert encoding.encode_inhibitor(mk.Diffusion(2, 3)) == (1, [2.0, 3.0])
    assert encoding.encode_inhibitor(mk.Sinusoid(2, 3)) == (2, [2.0, 3.0])
    assert encoding.encode_inhibitor(mk.RickerWavelet(2, 3)) == (3, [2.0, 3.0])
    assert encoding.encode_inhibitor(mk.Constant(2)) == (4, [2.0])
    assert encoding.encode_inhibitor(mk.TabulatedInhibitor(torch.cos, 7)) == (5, [7.0])


@pytest.mark.parametrize("name", KERNEL_INHIBITORS)
def test_decoded_inhibitors_are_the_same(name):
    f = KERNEL_INHIBITORS[name]
    code = encoding.encode_inhibitor(f)
    assert type(code.kind) is int and all(type(p) is float for p in code.parameters)
    table = f.table() if isinstance(f, mk.TabulatedInhibitor) else None
    back = encoding.decode_inhibitor(*code, table)
    assert back == f and hash(back) == hash(f)
    s = torch.linspace(0, 30, 500, dtype=torch.float64) ** 2
    assert torch.equal(back.from_squared(s), f.from_squared(s)) and torch.equal(back.slope(s), f.slope(s))


def test_a_table_decoded_from_float32_is_as_good_as_its_rounded_samples():
    f = mk.TabulatedInhibitor(torch.cos, 7.0)
    back = encoding.decode_inhibitor(*encoding.encode_inhibitor(f), f.table(torch.float32))
    d = torch.linspace(0, 7, 500, dtype=torch.float64)
    torch.testing.assert_close(back(d), f(d), rtol=0, atol=1e-7)


# --- what the kernels do not know ------------------------------------------------------------------------

@dataclass(frozen=True)
class Mine(mk.FlatTorus):
    """A subclass of a built-in may redefine anything."""


@dataclass(frozen=True)
class Steeper(mk.Diffusion):
    """A subclass of a built-in may redefine anything."""


def test_what_users_define_has_no_code():
    assert encoding.encode_manifold(Mine()) is None
    assert encoding.encode_manifold(mk.Product(mk.Circle(), Mine())) is None
    assert encoding.encode_manifold(mk.Manifold()) is None
    assert encoding.encode_inhibitor(Steeper()) is None
    assert encoding.encode_inhibitor(mk.Inhibitor()) is None
    assert encoding.encode_inhibitor(resolve_inhibitor(torch.cos)) is None


def test_an_unknown_code():
    last = INHIBITOR_CLASSES[-1].kernel_form.code
    with pytest.raises(ValueError) as caught:
        encoding.decode_inhibitor(last + 1, [1.0], None)
    assert str(caught.value) == f"inhibitor must be a code from 0 to {last}, got {last + 1}; use encode_inhibitor."
    last = MANIFOLD_CLASSES[-1].kernel_form.code
    with pytest.raises(ValueError) as caught:
        encoding.decode_manifold([0, 2, last + 1, 2], [1.0, 1.0, 1.0])
    assert str(caught.value) == f"factors[2] must be a code from 0 to {last}, got {last + 1}; use encode_manifold."


# --- the registry ----------------------------------------------------------------------------------------

def test_the_registry_holds_every_class_with_a_form_in_the_order_of_codes():
    assert [mk.Circle, mk.FlatTorus, mk.Euclidean, mk.Sphere, mk.KleinBottle] == MANIFOLD_CLASSES[:5]
    assert [mk.DifferenceOfGaussians, mk.Diffusion, mk.Sinusoid, mk.RickerWavelet, mk.Constant,
            mk.TabulatedInhibitor] == INHIBITOR_CLASSES[:6]
    for registry in (MANIFOLD_CLASSES, INHIBITOR_CLASSES):
        codes = [cls.kernel_form.code for cls in registry]
        assert codes == sorted(codes) and set(codes) == set(range(codes[-1] + 1))
        assert all(getattr(mk, cls.__name__) is cls for cls in registry)
    assert len({cls.kernel_form.code for cls in INHIBITOR_CLASSES}) == len(INHIBITOR_CLASSES)


def test_a_class_that_declares_a_form_is_known_at_once(monkeypatch):
    monkeypatch.setattr("moduli_kernels.geometry.base.MANIFOLDS", registry := MANIFOLD_CLASSES.copy())
    monkeypatch.setattr("moduli_kernels.geometry.encoding.MANIFOLDS", registry)

    @dataclass(frozen=True)
    class Brick(mk.Manifold):
        width: float = 2.0
        sides: tuple[float, ...] = (3.0, 4.0)
        ambient_dim = 5
        kernel_form = KernelForm(code=99, parameters=("width", "sides"))

        @classmethod
        def from_kernel(cls, columns, parameters):
            assert columns == 5
            return (cls(next(parameters), (next(parameters), next(parameters))),)

    assert registry[-1] is Brick and Brick not in MANIFOLD_CLASSES
    m = mk.Product(Brick(), mk.Circle(), Brick(7.0))
    code = encoding.encode_manifold(m)
    assert code.factors == [99, 5, 0, 1, 99, 5] and code.parameters[-3:] == [7.0, 3.0, 4.0]
    assert encoding.decode_manifold(*code).manifolds[::2] == m.manifolds[::2]
