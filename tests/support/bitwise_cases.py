"""Prints as JSON a digest of what the compiled kernels give, to the last bit, over a fixed set of cases.

    python tests/support/bitwise_cases.py           with MODULI_KERNELS_ISA=portable, avx2 or avx512

Inputs are made by integer arithmetic and contain no vendor product, so that the digests depend on the kernels and
their compiler alone. test_bitwise.py compares them with those in data/bitwise.json; `--record` writes that file, which
is for a change that is meant to change results.
"""
from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import moduli_kernels as mk

RECORD = pathlib.Path(__file__).parents[1] / "data" / "bitwise.json"
ISAS = ("portable", "avx2", "avx512")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = {"few": 63, "odd": 131, "many": 420}


def numbers(*shape: int, seed: int) -> Tensor:
    """Multiples of 2^-20 in [-0.5, 0.5), float64, the same on every machine: a hash of the index."""
    index = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(seed << 32)
    index = (index ^ (index >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    index = (index ^ (index >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    top = (index >> np.uint64(44)).astype(np.float64)
    return torch.from_numpy(top / 2**20 - 0.5).reshape(shape)


def table() -> Tensor:
    """(samples, 4): the cubics of a tabulated inhibitor, made by hand, since those of the class pass through LAPACK."""
    made = numbers(40, 4, seed=7)
    made[-1, 1:] = 0
    return made


PRESETS = ("torus", "torus6", "circle", "sphere", "s3", "klein", "r3", "mixed")
MANIFOLDS = {name: mk.manifold(name) for name in PRESETS} | {
    "product": mk.Product(mk.Circle(2.0), mk.KleinBottle(7.0, 9.0), mk.Sphere(3, 2.0), mk.FlatTorus((4.0, 6.0, 3.0)))}
INHIBITORS = {
    "dog": mk.DifferenceOfGaussians(), "diffusion": mk.Diffusion(), "distance": mk.Diffusion(0.5, 1.0),
    "diffusion_3.5": mk.Diffusion(0.1, 3.5), "sinusoid": mk.Sinusoid(), "ricker": mk.RickerWavelet(1.3, 2.0),
    "constant": mk.Constant(3.0)}


def points(manifold: mk.Manifold, n: int, seed: int, dtype: torch.dtype) -> Tensor:
    return (20 * numbers(n, manifold.ambient_dim, seed=seed)).to(dtype)


def penalty(n: int, dtype: torch.dtype, manifold: str = "torus", inhibitor: str = "dog", *, power: float = 1.0,
            blocks: int = 1, columns: int | None = None, kernel: tuple[int, ...] = (), masked: bool = False,
            sparse: bool = False, trained: bool = True, strided: bool = False) -> list[Tensor]:
    """Value and gradients of moduli_penalty."""
    m = MANIFOLDS[manifold]
    other = columns or n
    weight = numbers(blocks * n, other, *kernel, seed=1).to(dtype)
    kept = numbers(*weight.shape, seed=2) < -0.3
    if strided:
        weight = torch.cat([weight, weight], 1)[:, :other]
    if sparse:
        weight = (weight * kept).to_sparse_csr()
    weight.requires_grad_()
    of_points = dtype if dtype == torch.float64 else torch.float32
    rows = points(m, n, 3, of_points).requires_grad_(trained)
    cols = points(m, other, 4, of_points).requires_grad_(trained) if columns else None
    value = mk.moduli_penalty(weight, rows, cols, manifold=m, inhibitor=INHIBITORS[inhibitor], power=power,
                              blocks=blocks, mask=kept if masked else None, strength=0.7)
    wanted = [weight, *([rows] if trained else []), *([cols] if trained and columns else [])]
    grads = torch.autograd.grad(value, wanted)
    return [value, *(g.values() if g.layout == torch.sparse_csr else g for g in grads)]


def tabulated(n: int, dtype: torch.dtype) -> list[Tensor]:
    """The op itself, for its table is made by hand."""
    weight, rows = numbers(n, n, seed=1).to(dtype), points(MANIFOLDS["torus"], n, 3, dtype)
    return list(torch.ops.moduli_kernels.penalty_with_grads(
        weight, rows, None, None, None, None, table().to(dtype), [0, 2], [10.0, 10.0], 5, [6.0], 1.0, 1, 0.01, True,
        True))


def in_place(n: int, dtype: torch.dtype, masked: bool) -> list[Tensor]:
    """accumulate_penalty_grad_ and proximal_step_."""
    weight = numbers(n, n, seed=1).to(dtype).requires_grad_()
    weight.grad = numbers(n, n, seed=5).to(dtype)
    mask = numbers(n, n, seed=2) < -0.3 if masked else None
    rows = points(MANIFOLDS["torus"], n, 3, dtype).requires_grad_()
    value = mk.accumulate_penalty_grad_(weight, rows, manifold="torus", mask=mask)
    grad = weight.grad.clone()
    mk.proximal_step_(weight, rows.detach(), manifold="torus", mask=mask, step=30.0)
    return [value, grad, rows.grad, weight]


def several_layers(dtype: torch.dtype) -> list[Tensor]:
    """A regularizer of three weights, in one launch where the package does so."""
    net = torch.nn.LSTM(20, 48, num_layers=3).to(dtype)
    reg = mk.regularize(net, manifold="torus", strength=0.3, trainable=True)
    with torch.no_grad():
        for k, parameter in enumerate([*net.parameters(), *reg.parameters()]):
            parameter.copy_(10 * numbers(*parameter.shape, seed=20 + k))
    value = reg()
    value.backward()
    return [value, *(getattr(net, f"weight_hh_l{k}").grad for k in range(3)), *(p.grad for p in reg.parameters())]


def rnn(batch: int, hidden: int, dtype: torch.dtype, *, nonlinearity: str = "tanh", leak: float = 1.0, layers: int = 1,
        bidirectional: bool = False, density: float | None = 0.3, packed: bool = False, gradients: bool = True,
        compressed: bool = False) -> list[Tensor]:
    """Outputs and gradients of a SparseRNN on its sparse path."""
    inputs, steps = hidden // 2 + 1, 4
    net = mk.SparseRNN(inputs, hidden, layers, nonlinearity=nonlinearity, bidirectional=bidirectional, leak=leak,
                       path="sparse").to(dtype)
    for k, (name, parameter) in enumerate(list(net.named_parameters())):
        with torch.no_grad():
            parameter.copy_(numbers(*parameter.shape, seed=30 + k) * (4 / hidden**0.5))
        if density is not None and name.startswith("weight"):
            net.set_mask(name, numbers(*parameter.shape, seed=60 + k) < density - 0.5)
    x = numbers(steps, batch, inputs, seed=90).to(dtype).requires_grad_()
    hx = numbers(layers * (2 if bidirectional else 1), batch, hidden, seed=91).to(dtype)
    lengths = torch.arange(batch) % steps + 1
    given = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False) if packed else x
    if not gradients:
        with torch.no_grad():
            output, h_n = (net.compress() if compressed else net)(given, hx)
            return [output.data if packed else output, h_n]
    output, h_n = net(given, hx)
    output = output.data if packed else output
    grads = torch.autograd.grad([output, h_n], [x, *net.parameters()],
                                [numbers(*t.shape, seed=92).to(dtype) for t in (output, h_n)])
    return [output, h_n, *grads]


def cases() -> Iterator[tuple[str, list[Tensor]]]:
    for name in MANIFOLDS:
        for dtype in (torch.float32, torch.float64):
            yield f"penalty of {name}, {dtype}", penalty(SIZES["odd"], dtype, name)
            yield f"penalty of {name}, two sets of points, {dtype}", penalty(SIZES["few"], dtype, name, columns=95)
        yield f"penalty of {name}, frozen", penalty(SIZES["odd"], torch.float32, name, trained=False)
        yield f"penalty of {name}, few kept", penalty(SIZES["odd"], torch.float32, name, sparse=True)
    for name in INHIBITORS:
        for dtype in (torch.float32, torch.float64):
            yield f"penalty with {name}, {dtype}", penalty(SIZES["odd"], dtype, "klein", name)
            yield (f"penalty with {name}, two sets of points, {dtype}",
                   penalty(SIZES["few"], dtype, "s3", name, columns=95))
    for dtype in DTYPES:
        yield f"penalty, large, {dtype}", penalty(SIZES["many"], dtype)
        yield f"penalty, masked, {dtype}", penalty(SIZES["odd"], dtype, masked=True)
        yield f"penalty, strided, {dtype}", penalty(SIZES["odd"], dtype, strided=True)
        yield f"penalty, gate blocks, {dtype}", penalty(SIZES["few"], dtype, blocks=4)
        yield f"penalty, stored entries, {dtype}", penalty(SIZES["odd"], dtype, sparse=True, columns=75)
        for power in (1.5, 2.0, 2.7):
            yield f"penalty, power {power}, {dtype}", penalty(SIZES["odd"], dtype, power=power)
        yield f"penalty, kernels, {dtype}", penalty(SIZES["few"], dtype, columns=41, kernel=(3, 2))
        yield f"penalty, kernels, masked, {dtype}", penalty(SIZES["few"], dtype, columns=41, kernel=(3,), masked=True)
    for dtype in (torch.float32, torch.float64):
        yield f"tabulated, {dtype}", tabulated(SIZES["odd"], dtype)
        for masked in (False, True):
            yield f"in place, {masked=}, {dtype}", in_place(SIZES["odd"], dtype, masked)
        yield f"several layers, {dtype}", several_layers(dtype)
        for batch in (1, 3, 8, 17, 20, 32, 64, 70):
            yield f"RNN, batch {batch}, {dtype}", rnn(batch, 67, dtype)
            yield f"RNN, batch {batch}, no mask, {dtype}", rnn(batch, 40, dtype, nonlinearity="relu", density=None)
        for density in (0.02, 0.6, 0.95):
            yield f"RNN, {density} kept, {dtype}", rnn(20, 150, dtype, density=density)
            yield f"RNN, {density} kept, batch 1, {dtype}", rnn(1, 300, dtype, density=density)
        yield f"RNN, leak, {dtype}", rnn(17, 50, dtype, leak=0.4)
        yield f"RNN, both directions, {dtype}", rnn(9, 33, dtype, bidirectional=True, layers=2)
        yield f"RNN, packed, {dtype}", rnn(9, 33, dtype, packed=True, nonlinearity="relu")
        yield f"RNN, no gradients, {dtype}", rnn(20, 150, dtype, density=0.05, gradients=False)
        yield f"RNN, compressed, {dtype}", rnn(20, 150, dtype, density=0.05, gradients=False, compressed=True)


def digest(tensors: list[Tensor]) -> str:
    """Hashes the bytes of all tensors, and the shapes of those that have one. Signs of zeros and bits of NaN count."""
    found = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().contiguous()
        found.update(str(tuple(plain.shape)).encode() + plain.view(torch.uint8).numpy().tobytes()
                     if plain.dim() else plain.reshape(1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def compiler() -> str:
    """What compiled the loaded library, as it wrote into it; "" where it wrote nothing."""
    library = next(iter(pathlib.Path(mk.__file__).parent.glob("_cpu_ops.*")), None)
    found = re.search(rb"GCC: \([^)\0]*\) [\d.]+|clang version [\d.]+", library.read_bytes() if library else b"")
    return found.group().decode() if found else ""


def child(isa: str) -> dict[str, str]:
    """The digests on one instruction set, in a process of its own, which reads the variable once."""
    root = pathlib.Path(__file__).resolve().parents[2]
    environment = os.environ | {"MODULI_KERNELS_ISA": isa, "MODULI_KERNELS_BACKEND": "cpp",
                                "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    done = subprocess.run([sys.executable, __file__], env=environment, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


if __name__ == "__main__":
    if "--record" in sys.argv:
        recorded = {"compiler": compiler(), "digests": {isa: child(isa) for isa in ISAS}}
        RECORD.write_text(json.dumps(recorded, indent=1) + "\n")
    else:
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        print(json.dumps({name: digest(tensors) for name, tensors in cases()}))
