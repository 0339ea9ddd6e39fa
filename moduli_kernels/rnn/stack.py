"""Runs all layers and directions of a recurrent net over a sequence, as torch.nn.RNN arranges them.

SparseRNN and CompressedRNN share it. A net here is a module with nn.RNN's attributes (num_layers, bidirectional,
batch_first, dropout, nonlinearity, ...), its check_forward_args, and leak. Its weights come layer by layer, and in a
layer the forward direction comes before the reverse one.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ..reference import compute_dtype
from ..reference.rnn import Step
from . import checks
from .layer import Weights, autocast_dtype, masked_rnn


class Batch(NamedTuple):
    """The checked input of a net, as torch._VF takes it.

    data: (T, B, I), with batch_first (B, T, I), packed (elements of all steps, I).
    hx: (layers * directions, B, H), for a packed sequence in its sorted order.
    size: B, the number of sequences.
    steps: T, the length of the longest.
    batched: False where the input had no batch dimension and one was inserted.
    batch_sizes, sorted_indices, unsorted_indices: those of a PackedSequence, else None.
    """

    data: Tensor
    hx: Tensor
    size: int
    steps: int
    batched: bool
    batch_sizes: Tensor | None
    sorted_indices: Tensor | None
    unsorted_indices: Tensor | None


def batch_of(net: nn.Module, input: Tensor | PackedSequence, hx: Tensor | None, weight: Tensor) -> Batch:
    """Checks a net's input and hx in nn.RNN's words. `weight` is any weight of the net, for its dtype and device."""
    batched, indices, batch_sizes = True, (None, None), None
    if isinstance(input, PackedSequence):
        data, batch_sizes, *indices = input
        if hx is not None and indices[0] is not None:
            hx = hx.index_select(1, indices[0])
        size, steps = int(batch_sizes[0]), len(batch_sizes)
    else:
        data, batched = input, checks.sequence_dim(input, hx)
        if not batched:
            data, hx = data.unsqueeze(0 if net.batch_first else 1), None if hx is None else hx.unsqueeze(1)
        size, steps = data.shape[:2] if net.batch_first else data.shape[1::-1]
    if hx is None:
        states = net.num_layers * (2 if net.bidirectional else 1)
        hx = torch.zeros(states, size, net.hidden_size, dtype=data.dtype, device=data.device)
    net.check_forward_args(data, hx, batch_sizes)
    autocast = autocast_dtype(data.device.type, weight) is not None
    checks.sequence_tensors(data, hx, weight, steps, autocast)
    return Batch(data, hx, size, steps, batched, batch_sizes, *indices)


def results(net: nn.Module, batch: Batch, output: Tensor, h_n: Tensor) -> tuple[Tensor | PackedSequence, Tensor]:
    """Turns output, laid out like batch.data, and h_n, laid out like batch.hx, into what the net returns."""
    if batch.batch_sizes is not None:
        packed = PackedSequence(output, batch.batch_sizes, batch.sorted_indices, batch.unsorted_indices)
        return packed, h_n if batch.unsorted_indices is None else h_n.index_select(1, batch.unsorted_indices)
    if not batch.batched:
        return output.squeeze(0 if net.batch_first else 1), h_n.squeeze(1)
    return output, h_n


# --- through the masked op -------------------------------------------------------------------------------------

def sparse(net: nn.Module, batch: Batch, weights: list[Weights]) -> tuple[Tensor, Tensor]:
    """Returns (output, h_n) by the masked op, layer by layer and direction by direction."""
    device, weight = batch.data.device.type, weights[0].w_hh
    dtype, result = compute_dtype(weight), autocast_dtype(device, weight) or batch.data.dtype
    x, lengths, host_lengths = _time_major(net, batch)
    x, hx = x.to(dtype), batch.hx.to(dtype)
    directions, last = 2 if net.bidirectional else 1, net.num_layers - 1
    states = []
    for layer in range(net.num_layers):
        outputs = []
        for k in range(layer * directions, (layer + 1) * directions):
            step = Step(net.nonlinearity, net.leak, reverse=k % directions == 1)
            output, state = masked_rnn(x, hx[k], weights[k], lengths, step)
            outputs.append(output)
            states.append(state)
        x = outputs[0] if directions == 1 else torch.cat(outputs, 2)
        if layer < last and net.training and net.dropout:
            x = _dropped(x, net.dropout, host_lengths)
    h_n = (states[0][None] if len(states) == 1 else torch.stack(states)).to(result)
    if batch.batch_sizes is not None:
        output = x.flatten(0, 1) if host_lengths is None else pack_padded_sequence(x, host_lengths).data
        return output.to(result), h_n
    return (x.transpose(0, 1) if net.batch_first else x).to(result), h_n


def _time_major(net: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns x (T, B, I) and the steps of each sequence (B,), on the device and on the host; None where all are T."""
    if batch.batch_sizes is None:
        return batch.data.transpose(0, 1) if net.batch_first else batch.data, None, None
    if int(batch.batch_sizes[-1]) == batch.size:
        return batch.data.view(batch.steps, batch.size, -1), None, None
    x, lengths = pad_packed_sequence(PackedSequence(batch.data, batch.batch_sizes))
    return x, lengths.to(x.device), lengths


def _dropped(x: Tensor, probability: float, lengths: Tensor | None) -> Tensor:
    """Applies dropout with the random numbers of nn.RNN on the CPU: a packed sequence draws for its elements alone."""
    if lengths is None:
        return nn.functional.dropout(x, probability)
    packed = pack_padded_sequence(x, lengths)
    return pad_packed_sequence(packed._replace(data=nn.functional.dropout(packed.data, probability)))[0]


# --- through torch's own RNN ---------------------------------------------------------------------------------

def dense(net: nn.Module, batch: Batch, flat_weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns (output, h_n) by torch's own RNN, from nn.RNN's flat list of weights, in which masked ones are 0."""
    run = torch._VF.rnn_tanh if net.nonlinearity == "tanh" else torch._VF.rnn_relu
    if torch.compiler.is_compiling():
        return _dense_traced(net, batch, flat_weights, run)
    settings = (net.bias, net.num_layers, net.dropout, net.training, net.bidirectional)
    if batch.batch_sizes is not None:
        return run(batch.data, batch.batch_sizes, batch.hx, flat_weights, *settings)
    return run(batch.data, batch.hx, flat_weights, *settings, net.batch_first)


def _dense_traced(net, batch, flat_weights, run):
    """Calls torch's RNN once a layer, because torch.compile's form of the whole stack leaves the dropout out."""
    directions = 2 if net.bidirectional else 1
    count = len(flat_weights) // net.num_layers
    x, states = batch.data.transpose(0, 1) if net.batch_first else batch.data, []
    for layer in range(net.num_layers):
        x, state = run(
            x, batch.hx[layer * directions:(layer + 1) * directions], flat_weights[layer * count:(layer + 1) * count],
            net.bias, 1, 0.0, net.training, net.bidirectional, False)
        states.append(state)
        if layer < net.num_layers - 1 and net.training and net.dropout:
            x = nn.functional.dropout(x, net.dropout)
    return x.transpose(0, 1) if net.batch_first else x, torch.cat(states)
