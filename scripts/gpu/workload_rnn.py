"""The part of workload.py for the masked RNN: each kernel of its steps, on small nets, against the CPU's reference."""
from __future__ import annotations

import torch

from moduli_kernels.ops import blocked_rnn as blocked_rnn_op
from moduli_kernels.ops.block_layout import lay_out_blocks
from moduli_kernels.reference import rnn as reference_rnn
from moduli_kernels.reference.rnn import Step
from moduli_kernels.triton.rnn import shares as shares_table
from moduli_kernels.triton.rnn.shares import Shares

ops = torch.ops.moduli_kernels
NAMES = ("states", "last state", "dx", "dh", "dW_ih", "dW_hh", "db")
TANH, LEAKY = Step("tanh", 1.0, False), Step("relu", 0.5, True)
# A small layer would not be given these programs of two strips and two parts of the batch.
STREAMED = Shares("streamed", 16, 16, 32, 1, 8, 2, 2, 1)
# Each case: rows; batch; what a step computes; the threshold above which a block is stored densely, or None for no
# block layout; the launch parameters, or None for those of the table.
CASES: tuple[tuple[int, int, Step, int | None, Shares | None], ...] = (
    (100, 9, TANH, None, None), (64, 20, LEAKY, None, None), (130, 20, TANH, None, None), (200, 5, LEAKY, None, None),
    (70, 20, LEAKY, None, STREAMED), (70, 20, TANH, 99999, None), (70, 20, LEAKY, 60, None), (130, 33, TANH, 40, None),
)
STEPS, INPUTS, SIDE = 4, 7, 16


def run(n: int, batch: int, step: Step, threshold: int | None) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Returns (name, result of the GPU, result of the CPU) for the states and for each gradient."""
    generator = torch.Generator().manual_seed(n + batch)
    sizes = ((STEPS, batch, INPUTS), (batch, n), (n, INPUTS), (n, n), (n,), (n,), (STEPS, batch, n), (batch, n))
    x, h, w_ih, w_hh, b_ih, b_hh, *grads = (torch.randn(size, generator=generator) / n**0.25 for size in sizes)
    mask_ih, mask_hh = (torch.rand(w.shape, generator=generator) < 0.3 for w in (w_ih, w_hh))
    lengths = torch.randint(0, STEPS + 1, (batch,), generator=generator) if step.leak != 1 else None
    floating = [t.double() for t in (x, h, w_ih, w_hh, b_ih, b_hh)]
    want = reference_rnn.masked_rnn(*floating, mask_ih, mask_hh, lengths, step)
    wanted = reference_rnn.masked_rnn_grads(*(g.double() for g in grads), *floating[:4], mask_ih, mask_hh, lengths,
                                            want[0], want[2], step, *[True] * 5)

    x, h, w_ih, w_hh, b_ih, b_hh, mask_ih, mask_hh, *grads = (
        t.cuda() for t in (x, h, w_ih, w_hh, b_ih, b_hh, mask_ih, mask_hh, *grads))
    lengths = None if lengths is None else lengths.cuda()
    if threshold is None:
        masks, forward, backward, compressed = (mask_ih, mask_hh), ops.masked_rnn, ops.masked_rnn_grads, [None] * 4
        where = [lengths, None, None]  # without orders
    else:
        order = torch.randperm(n, generator=generator).cuda()
        layout = blocked_rnn_op.flat(lay_out_blocks(mask_hh, order, order, side=SIDE, threshold=threshold))
        masks, compressed, where = (mask_ih, mask_hh, layout, SIDE), [], [lengths]
        forward, backward = ops.blocked_rnn, ops.blocked_rnn_grads
    output, h_n, *kept = forward(x, h, w_ih, w_hh, b_ih, b_hh, *masks, *compressed, *where, *step, True)
    kept = [output, *kept] if threshold is None else kept
    found = backward(*grads, x, h, w_ih, w_hh, *masks, *where, *kept, *step, *[True] * 5)
    return list(zip(NAMES, (output, h_n, *found), (*want[:2], *wanted)))


def cases():
    """Yields (name, result of the GPU, result of the CPU) for every case."""
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    shares_for = shares_table.shares_for
    for n, batch, step, threshold, shares in CASES:
        shares_table.shares_for = shares_for if shares is None else lambda *_, shares=shares: shares
        name = f"rnn of {n} x {batch}, {step.nonlinearity}" + ("" if threshold is None else f", blocks of {threshold}")
        for what, got, want in run(n, batch, step, threshold):
            yield f"{name}: {what}", got, want
    shares_table.shares_for = shares_for
