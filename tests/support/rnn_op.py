"""Both ops of the masked RNN in one call, as the compiled kernels serve them or as the reference does."""
import torch

STEPS = [("tanh", 1.0, False), ("relu", 1.0, True), ("tanh", 0.5, True), ("relu", 0.3, False)]
NEEDS = (True,) * 5


def both(forward, backward, tensors, masks, where, grads, step):
    """output, last state, s(a), and all gradients. where: lengths and the orders of inputs and neurons."""
    found = forward(*tensors, *masks, *(None,) * 4, *where, *step, True)
    return (*found, *backward(*grads, *tensors[:4], *masks, *where, found[0], found[2], *step, *NEEDS))


def compiled(*arguments):
    ops = torch.ops.moduli_kernels
    with torch._C._AutoDispatchBelowAutograd():
        return both(ops.masked_rnn, ops.masked_rnn_grads, *arguments)
