"""moduli_kernels: moduli regularization for recurrent nets, with fused kernels.

    import moduli_kernels as mk
    reg = mk.regularize(model.rnn, manifold="torus", strength=0.1)
    loss = criterion(model(x), y) + reg()

Importing touches neither CUDA nor Triton, and works without a compiler; `mk.env_report()` says what is available.
"""
from . import plots
from ._backend import backend
from ._version import __version__
from .compressed_rnn import CompressedRNN
from .embedding import ManifoldEmbedding
from .env_report import env_report
from .in_place import accumulate_penalty_grad_, proximal_step_
from .inhibitors import (
    Constant,
    DifferenceOfGaussians,
    Diffusion,
    Inhibitor,
    RickerWavelet,
    Sinusoid,
    TabulatedInhibitor,
)
from .lottery import reinitialize_, rewind_
from .manifolds import Circle, Euclidean, FlatTorus, KleinBottle, Manifold, Product, Sphere, manifold
from .ordering import manifold_order
from .penalty import moduli_penalty
from .pruning import MagnitudePruner
from .regularize import Regularization, Target, regularize
from .regularizer import CoefficientRegularizer, ModuliRegularizer
from .schedules import linear_schedule
from .sparse_rnn import SparseRNN
from .sparse_rnn_cell import SparseRNNCell, masked_rnn_step

__all__ = [
    "Circle", "CoefficientRegularizer", "CompressedRNN", "Constant", "DifferenceOfGaussians", "Diffusion", "Euclidean",
    "FlatTorus", "Inhibitor", "KleinBottle", "MagnitudePruner", "Manifold", "ManifoldEmbedding", "ModuliRegularizer",
    "Product", "Regularization", "RickerWavelet", "Sinusoid", "SparseRNN", "SparseRNNCell", "Sphere",
    "TabulatedInhibitor", "Target", "__version__", "accumulate_penalty_grad_", "backend", "env_report",
    "linear_schedule", "manifold", "manifold_order", "masked_rnn_step", "moduli_penalty", "plots", "proximal_step_",
    "regularize", "reinitialize_", "rewind_",
]
