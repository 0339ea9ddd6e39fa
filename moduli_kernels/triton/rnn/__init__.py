"""The Triton kernels of the masked RNN, and what launches them.

    masked, blocked           the ops: a dense hidden weight, and one walked by a block layout of its mask
    steps, forward, backward  the steps of a sequence in one launch; barrier: how programs wait for each other
    recurrent, block_product  W h of one step; nonlinearity
    sequence_product, sampled products over a whole sequence: inputs and gradients
    shares                    which program does what
"""
