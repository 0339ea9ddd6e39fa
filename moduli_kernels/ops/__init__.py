"""The package's ops as PyTorch knows them. Importing this package declares all of them in torch.ops.moduli_kernels,
which is `torch_ops` here; ops/registry.py says what a declaration holds.
"""
import torch

from . import blocked_rnn, found_blocks, grouped, masked_entries, masked_rnn, penalty

torch_ops = torch.ops.moduli_kernels

__all__ = ["blocked_rnn", "found_blocks", "grouped", "masked_entries", "masked_rnn", "penalty", "torch_ops"]
