"""moduli_kernels: moduli regularization for recurrent nets, with fused kernels.

    import moduli_kernels as mk
    reg = mk.regularize(model.rnn, manifold="torus", strength=0.1)
    loss = criterion(model(x), y) + reg()

Importing touches neither CUDA nor Triton, and works without a compiler; `mk.env_report()` says what is available.
"""
import inspect
import sys
from typing import Any

from . import geometry, plots
from ._version import __version__
from .backends import backend
from .env_report import env_report
from .geometry import *  # noqa: F403
from .geometry.inhibitors import CallableInhibitor
from .masks import hook_of_modules as _hook_of_modules
from .penalty.attach import Regularization, regularize
from .penalty.function import moduli_penalty
from .penalty.in_place import accumulate_penalty_grad_, proximal_step_
from .penalty.modules import CoefficientRegularizer, ModuliRegularizer
from .penalty.places import Target
from .pruning.checkpoints import load_pruned_
from .pruning.geometric import geometric_mask
from .pruning.lottery import reinitialize_, rewind_
from .pruning.pruner import MagnitudePruner
from .pruning.schedules import linear_schedule
from .rnn.cell import SparseRNNCell, masked_rnn_step
from .rnn.compressed import CompressedRNN
from .rnn.path_choice import Measured
from .rnn.sparse_rnn import SparseRNN

__all__ = [
    "CoefficientRegularizer", "CompressedRNN", "MagnitudePruner", "ModuliRegularizer", "Regularization", "SparseRNN",
    "SparseRNNCell", "Target", "__version__", "accumulate_penalty_grad_", "backend", "env_report", "geometric_mask",
    "linear_schedule", "load_pruned_", "masked_rnn_step", "moduli_penalty", "plots", "proximal_step_", "regularize",
    "reinitialize_", "rewind_",
]
__all__ += geometry.__all__  # so that a new manifold or inhibitor is named in its own file only


# Pickles of public objects hold these, which are not public.
_IN_PICKLES = (CallableInhibitor, Measured)


def _name_after_the_package() -> None:
    """Makes pickles, repr() and help() name public classes and functions as moduli_kernels.<name>.

    A pickle that names the module of a file cannot be read once the file has moved.
    """
    for named in (*(globals()[name] for name in __all__), *_IN_PICKLES):
        if not getattr(named, "__module__", "").startswith("moduli_kernels."):
            continue
        if isinstance(named, type):
            # Annotations that stay text would be looked up in this module from now on. Public names count too, since
            # files import each other's classes for the type checker alone where they would import in a circle.
            own = vars(sys.modules[named.__module__])
            named.__annotations__ = inspect.get_annotations(named, globals=globals(), locals=own, eval_str=True)
        named.__module__ = "moduli_kernels"


_name_after_the_package()


def __getattr__(name: str) -> Any:
    """Gives the hooks that pickles of modules with masks ask for; none is public."""
    hook = _hook_of_modules(name)
    if hook is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return hook
