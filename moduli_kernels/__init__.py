"""moduli_kernels: moduli regularization for recurrent nets, with fused kernels.

    import moduli_kernels as mk
    reg = mk.regularize(model.rnn, manifold="torus", strength=0.1)
    loss = criterion(model(x), y) + reg()

Importing touches neither CUDA nor Triton, and works without a compiler; `mk.env_report()` says what is available.
"""
from . import plots
from ._version import __version__
from .backends import backend
from .env_report import env_report
from .geometry.embedding import ManifoldEmbedding
from .geometry.inhibitors import (
    Constant,
    DifferenceOfGaussians,
    Diffusion,
    Inhibitor,
    RickerWavelet,
    Sinusoid,
    TabulatedInhibitor,
)
from .geometry.manifolds import Circle, Euclidean, FlatTorus, KleinBottle, Manifold, Product, Sphere, manifold
from .geometry.ordering import manifold_order
from .penalty.attach import Regularization, Target, regularize
from .penalty.function import moduli_penalty
from .penalty.in_place import accumulate_penalty_grad_, proximal_step_
from .penalty.modules import CoefficientRegularizer, ModuliRegularizer
from .pruning.lottery import reinitialize_, rewind_
from .pruning.pruner import MagnitudePruner
from .pruning.schedules import linear_schedule
from .rnn.cell import SparseRNNCell, masked_rnn_step
from .rnn.compressed import CompressedRNN
from .rnn.sparse_rnn import SparseRNN

__all__ = [
    "Circle", "CoefficientRegularizer", "CompressedRNN", "Constant", "DifferenceOfGaussians", "Diffusion", "Euclidean",
    "FlatTorus", "Inhibitor", "KleinBottle", "MagnitudePruner", "Manifold", "ManifoldEmbedding", "ModuliRegularizer",
    "Product", "Regularization", "RickerWavelet", "Sinusoid", "SparseRNN", "SparseRNNCell", "Sphere",
    "TabulatedInhibitor", "Target", "__version__", "accumulate_penalty_grad_", "backend", "env_report",
    "linear_schedule", "manifold", "manifold_order", "masked_rnn_step", "moduli_penalty", "plots", "proximal_step_",
    "regularize", "reinitialize_", "rewind_",
]
