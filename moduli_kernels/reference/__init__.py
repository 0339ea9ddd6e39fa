"""The specification: what every kernel computes, in plain PyTorch. It also runs where no kernel is built."""
from .penalty import (
    Gradients,
    Penalty,
    compute_dtype,
    magnitude,
    penalty_formula,
    penalty_with_grads,
    poison,
    proximal_step_,
)

__all__ = ["Gradients", "Penalty", "compute_dtype", "magnitude", "penalty_formula", "penalty_with_grads", "poison",
           "proximal_step_"]
