"""Compiles the Triton kernels as the launchers would, without a GPU: records a launch on CPU tensors, and compiles it
for an architecture. Used by tests/triton/test_machine_code.py. As a script it prints one line of JSON for each kernel:

    python -m tests.support.machine_code ARCHITECTURE[,...] CASE[,...] [--sass FOLDER]
"""
from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import moduli_kernels as mk
from moduli_kernels.geometry import encoding
from moduli_kernels.ops.penalty import PenaltyArguments
from moduli_kernels.triton import device
from moduli_kernels.triton.penalty import dense, finish, grouped, kept, proximal, scale

N = 4096
MODULES = (dense, kept, proximal, grouped, finish, scale)  # those that launch kernels
TOOLS = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
         torch.uint8: "u8", torch.bool: "i1", torch.int32: "i32", torch.int64: "i64"}
# What people train with, in full tiles. Name -> manifold, inhibitor, dtype, power, whether points have gradients.
CASES: dict[str, tuple[str, mk.Inhibitor, torch.dtype, float, bool]] = {
    "torus frozen": ("torus", mk.DifferenceOfGaussians(), torch.float32, 1.0, False),
    "torus trained": ("torus", mk.DifferenceOfGaussians(), torch.float32, 1.0, True),
    "torus trained bfloat16": ("torus", mk.DifferenceOfGaussians(), torch.bfloat16, 1.0, True),
    "torus trained power 2": ("torus", mk.DifferenceOfGaussians(), torch.float32, 2.0, True),
    "sphere trained": ("sphere", mk.DifferenceOfGaussians(), torch.float32, 1.0, True),
    "torus6 trained": ("torus6", mk.DifferenceOfGaussians(), torch.float32, 1.0, True),
    "klein trained": ("klein", mk.DifferenceOfGaussians(), torch.float32, 1.0, True),
    "s3 trained": ("s3", mk.DifferenceOfGaussians(), torch.float32, 1.0, True),
    "mixed trained": ("mixed", mk.DifferenceOfGaussians(), torch.float32, 1.0, True),
    "r3 trained": ("r3", mk.DifferenceOfGaussians(), torch.float32, 1.0, True),
    "circle sinusoid trained": ("circle", mk.Sinusoid(), torch.float32, 1.0, True),
    "torus ricker trained power 1.5": ("torus", mk.RickerWavelet(), torch.float32, 1.5, True),
    "torus diffusion frozen": ("torus", mk.Diffusion(), torch.float32, 1.0, False),
    "torus table trained": ("torus", mk.TabulatedInhibitor(torch.cos, 25.0), torch.float32, 1.0, True),
}


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


class Recorder:
    """Stands in for a kernel, and keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def record(*positional, **keywords):
            names = self.kernel.arg_names
            arguments = dict(zip(names, positional)) | {k: v for k, v in keywords.items() if k in names}
            options = {k: v for k, v in keywords.items() if k not in names}
            self.launches.append(Launch(self.kernel, grid, arguments, options))
        return record


def record(call) -> list[Launch]:
    """What `call` launches; nothing runs."""
    launches: list[Launch] = []
    kernels = [(module, name) for module in MODULES for name in vars(module)
               if name.endswith("_kernel") and isinstance(getattr(module, name), triton.JITFunction)]
    before = [getattr(*kernel) for kernel in kernels]
    try:
        for (module, name), kernel in zip(kernels, before):
            setattr(module, name, Recorder(kernel, launches))
        call()
    finally:
        for (module, name), kernel in zip(kernels, before):
            setattr(module, name, kernel)
    return launches


def op_arguments(manifold: str, inhibitor: mk.Inhibitor, dtype: torch.dtype, power: float, n: int = N,
                 blocks: int = 1) -> PenaltyArguments:
    """The arguments of the ops for an uninitialized weight with `blocks` blocks of n x n."""
    weight = torch.empty(blocks * n, n, dtype=dtype)
    m = mk.manifold(manifold)
    rows = torch.empty(n, m.ambient_dim, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    table = inhibitor.table(rows.dtype) if isinstance(inhibitor, mk.TabulatedInhibitor) else None
    kinds, parameters = encoding.encode_manifold(m)
    kind, numbers = encoding.encode_inhibitor(inhibitor)
    return PenaltyArguments(**dict.fromkeys(PenaltyArguments._fields) | {
        "weight": weight, "rows": rows, "table": table, "factors": kinds, "factor_parameters": parameters,
        "inhibitor": kind, "inhibitor_parameters": numbers, "power": power, "blocks": blocks, "scale": 1.0})


def compressed(arguments: PenaltyArguments, density: float) -> PenaltyArguments:
    """The same for a weight in compressed rows that has this share of its entries."""
    n_rows, entries = arguments.weight.shape[0], int(arguments.weight.numel() * density)
    return arguments._replace(
        weight=arguments.weight.new_empty(entries), crow_indices=torch.empty(n_rows + 1, dtype=torch.int64),
        col_indices=torch.empty(entries, dtype=torch.int64))


def on_generation(generation: int):
    """A context in which CPU tensors are launched as on a GPU of this generation."""
    return mock.patch.object(device, "INTERPRETED", device.INTERPRETED._replace(generation=generation))


def launches_of(case: str, generation: int, n: int = N) -> list[Launch]:
    """The launches of value and gradients for one of CASES."""
    manifold, inhibitor, dtype, power, trained = CASES[case]
    arguments = op_arguments(manifold, inhibitor, dtype, power, n)
    with on_generation(generation):
        return record(lambda: dense.penalty_with_grads(*arguments, True, trained))


def source(recorded: Launch) -> ASTSource:
    """The source as Triton's launcher specializes it: it notes pointers and integers that are multiples of 16 and makes
    constants of ones and None, except for the parameters that a kernel excludes."""
    signature, constants, attributes = {}, {}, {}

    def of(value, path, specialize=True):
        if isinstance(value, int) and not specialize:
            return "i32"
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return "*" + TYPES[value.dtype]
        if isinstance(value, tuple):
            return tuple(of(v, (*path, i)) for i, v in enumerate(value))
        if value is None or (isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, int):
            if value % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return "i32"
        return "fp32"

    for i, parameter in enumerate(recorded.kernel.params):
        value = recorded.arguments[parameter.name]
        if parameter.is_constexpr:
            constants[i,] = value
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = of(value, (i,), not parameter.do_not_specialize)
    return ASTSource(recorded.kernel, signature, constants, attributes)


def machine_code(recorded: Launch, architecture: int) -> bytes:
    return triton.compile(source(recorded), target=GPUTarget("cuda", architecture, 32),
                          options=recorded.options).asm["cubin"]


def tool(name: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True).stdout


def usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED ... of the only kernel in a cubin."""
    line = tool("cuobjdump", "-res-usage", cubin=cubin).split("Function", 1)[1]
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", line)}


def instructions(cubin: bytes) -> list[tuple[int, str, str]]:
    """(address, predicate or "", instruction) of each machine instruction."""
    out = []
    for line in tool("cuobjdump", "-sass", cubin=cubin).splitlines():
        if match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@\S+ )?\s*(.*?)\s*;", line):
            out.append((int(match[1], 16), match[2] or "", match[3]))
    return out


def innermost_loop(code: list[tuple[int, str, str]]) -> list[str]:
    """The longest loop that holds no other: what runs once a tile. A loop is what stands between a backward branch and
    its target."""
    loops = []
    for address, _, text in code:
        if match := re.match(r"BRA(?:\.\S+)? (?:\S+, )?0x([0-9a-f]+)", text):
            target = int(match[1], 16)
            if target < address:
                loops.append((target, address))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    start, end = max(inner, key=lambda loop: loop[1] - loop[0])
    return [text for address, _, text in code if start <= address <= end]


def report(case: str, architecture: int, folder: str | None = None) -> list[dict]:
    out = []
    for recorded in launches_of(case, architecture // 10):
        cubin = machine_code(recorded, architecture)
        facts = {"case": case, "architecture": architecture, "kernel": recorded.kernel.fn.__name__, **usage(cubin)}
        if recorded.kernel is dense.penalty_kernel:
            tile = recorded.arguments
            entries = tile["REPEAT"] * tile["WIDTH"] * tile["TILE_ROWS"] // (32 * recorded.options["num_warps"])
            body = innermost_loop(instructions(cubin))
            names = [text.split()[0] for text in body]
            facts |= {
                "entries": entries, "instructions": len(body) / entries,
                "special": sum(n.startswith("MUFU") for n in names) / entries,
                "loads128": sum(n.startswith("LDG") and ".128" in n for n in names),
                "stores128": sum(n.startswith("STG") and ".128" in n for n in names),
                "loads": sum(n.startswith("LDG") for n in names), "stores": sum(n.startswith("STG") for n in names),
                "shuffles": sum(n.startswith("SHFL") for n in names),
                "barriers": sum(n.startswith("BAR") for n in names),
            }
        if folder:
            name = f"{case} {architecture} {facts['kernel']}".replace(" ", "_")
            (pathlib.Path(folder) / f"{name}.sass").write_text(tool("cuobjdump", "-sass", cubin=cubin))
        out.append(facts)
    return out


if __name__ == "__main__":
    sass = sys.argv[sys.argv.index("--sass") + 1] if "--sass" in sys.argv else None
    for case in (sys.argv[2].split(",") if sys.argv[2] != "all" else CASES):
        for architecture in map(int, sys.argv[1].split(",")):
            for facts in report(case, architecture, sass):
                print(json.dumps(facts), flush=True)
