"""The Triton kernels of the penalty, and what launches them.

    dense, kept, proximal, grouped  the ops: a dense weight, compressed rows, the proximal step, several small weights
    finish, scale                   kernels that follow: they add up parts, and multiply gradients in place
    entries                         functions of entries of W that the kernels share
    formula, results                what the launchers begin with: f(d) |w|^power for a kernel, arguments and memory
    tiles                           how a weight is cut, by GPU generation
"""
