"""Pickles, and whole modules that torch.save has written, name classes as moduli_kernels.<name>: so they can be read
wherever in the package a class stands."""
from __future__ import annotations

import copy
import io
import pickle
import pydoc
import sys
import typing

import pytest
import torch
from torch import nn

import moduli_kernels as mk
from tests.support.rnn_cases import draw, quiet

pytestmark = [*quiet]

PUBLIC = {name: getattr(mk, name) for name in mk.__all__ if hasattr(getattr(mk, name), "__module__")}


class Unpickler(pickle.Unpickler):
    """Notes the classes and functions that a pickle names: (module, name)."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))
        self.named: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str):
        self.named.add((module, name))
        return super().find_class(module, name)


def through_pickle(value):
    """The value from its pickle, which may name nothing of the package but moduli_kernels.<name>."""
    unpickler = Unpickler(pickle.dumps(value))
    loaded = unpickler.load()
    ours = {(module, name) for module, name in unpickler.named if module.split(".")[0] == "moduli_kernels"}
    assert ours and {module for module, _ in ours} == {"moduli_kernels"}, ours
    return loaded


def through_torch_save(value):
    torch.save(value, buffer := io.BytesIO())
    assert b"moduli_kernels." not in buffer.getvalue()
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def masked_rnn(**settings) -> mk.SparseRNN:
    """A net with masks, orders and what tune() has measured."""
    torch.manual_seed(0)
    rnn = mk.SparseRNN(3, 8, **settings)
    mk.MagnitudePruner([(rnn, "weight_hh_l0"), (rnn, "weight_ih_l0")]).step_to(0.5)
    rnn.set_order("weight_hh_l0", torch.randperm(8))
    rnn.tune(draw(4, 2, 3))
    rnn(draw(4, 2, 3))
    return rnn


@pytest.mark.parametrize("copied", [through_pickle, through_torch_save, copy.deepcopy])
def test_a_pruned_rnn_with_its_regularization(copied):
    rnn = masked_rnn()
    reg = mk.regularize(rnn, manifold="mixed", strength=0.1, trainable=True)
    other = copied(nn.ModuleDict({"rnn": rnn, "reg": reg}))
    x = draw(4, 2, 3)
    assert isinstance(other["rnn"], mk.SparseRNN) and isinstance(other["reg"], mk.Regularization)
    assert torch.equal(other["rnn"](x)[0], rnn(x)[0]) and torch.equal(other["reg"](), reg())
    with torch.no_grad():
        other["rnn"].weight_hh_l0.mul_(2)
    assert not torch.equal(other["reg"](), reg())  # the copy's regularization reads the copy's weights


CELL = mk.SparseRNNCell(3, 8)
VALUES = {
    "compressed": lambda: masked_rnn().compress(),
    "cell": lambda: CELL,
    "pruner": lambda: mk.MagnitudePruner([(CELL, "weight_hh")]),
    "measured": lambda: masked_rnn().tune(draw(4, 2, 3)),
    "embedding": lambda: mk.ManifoldEmbedding(4, "klein", trainable=True),
    "shuffled": lambda: mk.regularize(CELL).shuffled(),
    "matched": lambda: mk.regularize(CELL).matched(),
    "a bare callable": lambda: mk.ModuliRegularizer(4, inhibitor=torch.square),
    "tabulated": lambda: mk.TabulatedInhibitor(torch.square, 10.0, 16),
    "inhibitors": lambda: [f() for f in (mk.Constant, mk.DifferenceOfGaussians, mk.Diffusion, mk.RickerWavelet,
                                         mk.Sinusoid)],
    "manifolds": lambda: [mk.manifold(name) for name in ("torus", "circle", "sphere", "klein", "r3", "mixed")],
    "functions": lambda: [value for value in PUBLIC.values() if not isinstance(value, type)],
    "classes": lambda: [value for value in PUBLIC.values() if isinstance(value, type)],
}


@pytest.mark.parametrize("name", VALUES)
def test_pickles_name_the_package_alone(name):
    value = VALUES[name]()
    assert type(through_pickle(value)) is type(value)


# --- the names ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name):
    assert PUBLIC[name].__module__ == "moduli_kernels" and PUBLIC[name].__qualname__ == name
    assert name in pydoc.render_doc(PUBLIC[name]).splitlines()[0]
    if name == "TabulatedInhibitor" and sys.version_info < (3, 11):
        return  # Python 3.10 has no hints for a class with dataclasses.InitVar
    typing.get_type_hints(PUBLIC[name])  # annotations still find the names that they use
    if isinstance(PUBLIC[name], type):
        typing.get_type_hints(PUBLIC[name].__init__)


def test_subclasses_keep_their_own_module():
    """Only the package's own classes are renamed, also where somebody inherits from them."""
    class Own(mk.Manifold):
        ambient_dim = 1

    assert Own.__module__ == __name__
