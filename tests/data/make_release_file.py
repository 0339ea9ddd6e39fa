"""Writes release_<version>.pt: what this release saves, which later ones must load (tests/test_release_files.py).

Run it once a release, from the root of the checkout:

    python tests/data/make_release_file.py

The file holds state dicts, and what the modules that saved them computed, with float32 weights on the CPU. It has only
tensors, numbers and strings, so that torch.load(weights_only=True) reads it. The lists below are spelled out, not read
from the package, so that a file says what its release could save.
"""
from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import moduli_kernels as mk

INHIBITORS = {
    "dog": mk.DifferenceOfGaussians(), "diffusion": mk.Diffusion(), "sinusoid": mk.Sinusoid(),
    "ricker": mk.RickerWavelet(), "constant": mk.Constant(),
    "tabulated": mk.TabulatedInhibitor(torch.square, max_distance=10.0, samples=16),
}
MANIFOLDS = ("torus", "torus6", "circle", "sphere", "s3", "klein", "r3", "mixed")
N = 8


def regularizers() -> dict[str, mk.ModuliRegularizer]:
    """Makes a regularizer for each manifold and each inhibitor; its points are drawn."""
    made = {name: mk.ModuliRegularizer(N, manifold=name) for name in MANIFOLDS}
    made |= {name: mk.ModuliRegularizer(N, 5, inhibitor=f, power=2.0) for name, f in INHIBITORS.items()}
    return made | {"trained": mk.ModuliRegularizer(N, manifold="klein", trainable=True)}


def nets() -> dict[str, nn.Module]:
    """Makes a recurrent net of each kind; `state` gives them masks, which they save."""
    return {"rnn": mk.SparseRNN(3, N, bidirectional=True, leak=0.5, path="sparse"), "cell": mk.SparseRNNCell(3, N)}


def weight_for(regularizer: mk.ModuliRegularizer, weight: Tensor) -> Tensor:
    """Returns as many columns of the weight (N, N) as the regularizer has column points."""
    return weight[:, :len(regularizer.cols)]


def state() -> dict:
    """Returns the content of the file."""
    torch.manual_seed(0)
    made, rnn, cell = regularizers(), *nets().values()
    weight, x = torch.randn(N, N), torch.randn(4, 2, 3)
    model = nn.ModuleDict({"rnn": nn.RNN(3, N), "head": nn.Linear(N, 2)})
    reg = mk.regularize(model, targets=[(model["rnn"], "weight_hh_l0"), (model["head"], "weight")])
    mk.MagnitudePruner([(rnn, "weight_hh_l0"), (rnn, "weight_hh_l0_reverse")]).step_to(0.75)
    rnn.set_order("weight_hh_l0", torch.randperm(N))
    cell.set_mask("weight_hh", torch.rand(N, N) < 0.5)
    pruner = mk.MagnitudePruner([(model["rnn"], "weight_hh_l0")])
    pruner.step_to(0.5)
    with tempfile.TemporaryDirectory() as folder:
        rnn.compress().save(path := Path(folder, "rnn.safetensors"))
        compressed = torch.tensor(list(path.read_bytes()), dtype=torch.uint8)
    with torch.no_grad():
        return {
            "version": mk.__version__, "weight": weight, "x": x,
            "regularizers": {name: r.state_dict() for name, r in made.items()},
            "penalties": {name: float(r(weight_for(r, weight))) for name, r in made.items()},
            "nets": {"rnn": rnn.state_dict(), "cell": cell.state_dict()},
            "outputs": {"rnn": rnn(x)[0], "cell": cell(x[0])},
            "compressed": compressed,
            "model": model.state_dict(), "pruner": pruner.state_dict(), "regularization": reg.state_dict(),
            "penalty": float(reg()),
        }


if __name__ == "__main__":
    torch.save(state(), Path(__file__).with_name(f"release_{mk.__version__}.pt"))
