"""The Triton kernels of the ops, for CUDA tensors. The first call that needs one imports it; the package never does.

    math, manifolds, inhibitors   functions of tiles; the last two own what there is to know of each of their kind
    device                        what the launchers ask about the GPU
    penalty/, rnn/                the kernels of each family of ops, each in one file with what launches it
"""
