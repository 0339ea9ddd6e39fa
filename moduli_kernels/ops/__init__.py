"""The ops of the package as PyTorch knows them: schema, fake kernel, derivative and fallback.

Importing this package declares all of them in torch.ops.moduli_kernels, which is `torch_ops` here.
"""
import torch

from . import blocked_rnn, masked_rnn, penalty

torch_ops = torch.ops.moduli_kernels

__all__ = ["blocked_rnn", "masked_rnn", "penalty", "torch_ops"]
