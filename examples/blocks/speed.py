"""Measures pruned nets on this machine: seconds of a training step and of an inference step, beside torch.nn.RNN.

The masks are those that the trials have left in runs/. What is timed is the recurrent layer at the task's sizes, on one
thread: `mk.SparseRNN(path="sparse")` with the trial's mask and order, forward and backward (training) and forward alone
(inference). torch.nn.RNN with dense weights is timed in alternation with it, so that whatever else the machine does
slows both. Each number is the median over ROUNDS rounds. The speed of a net is the ratio of the two medians.

Every net is measured anew at each call of the command, and the last record of a net counts: kernels change.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import moduli_kernels as mk
from moduli_kernels.env_report import environment
from moduli_kernels.rnn.timing import alternating

from ..training.ledger import Ledger
from .penalties import Geometry, start_mask
from .plan import CUTS, Protocol, Trial, picked, reported
from .training import WEIGHT, masks_of

ROUNDS = 25
Timed = dict[str, float]


def nets(protocol: Protocol) -> tuple[mk.SparseRNN, nn.RNN, Tensor, Tensor]:
    """Returns the two layers to be timed, with equal weights, an input (steps, batch, inputs) and a first state."""
    task = protocol.task(**protocol.options)
    rnn: Any = task.model.rnn
    batch = protocol.options["batch"]
    dense = nn.RNN(rnn.input_size, rnn.hidden_size, nonlinearity="relu", bias=False)
    sparse = mk.SparseRNN.from_rnn(dense, path="sparse", copy=True)
    generator = torch.Generator().manual_seed(0)
    moves = torch.randn(protocol.options["steps"], batch, rnn.input_size, generator=generator)
    state = torch.rand(1, batch, rnn.hidden_size, generator=generator)
    return sparse, dense, moves, state


def times(sparse: nn.RNN, dense: nn.RNN, moves: Tensor, state: Tensor, rounds: int = ROUNDS) -> Timed:
    """Returns seconds: training, inference, and dense_training and dense_inference of torch.nn.RNN beside them."""
    grad = torch.ones(*moves.shape[:2], dense.hidden_size)

    def training(net: nn.RNN) -> None:
        net.zero_grad()
        first = state.clone().requires_grad_()  # the encoder's gradient is needed, as in training
        net(moves, first)[0].backward(grad)

    def inference(net: nn.RNN) -> None:
        with torch.inference_mode():
            net(moves, state)

    work: dict[str, Callable[[], object]] = {
        "training": lambda: training(sparse), "dense_training": lambda: training(dense),
        "inference": lambda: inference(sparse), "dense_inference": lambda: inference(dense),
    }
    return alternating(work, torch.device("cpu"), rounds)


def record(trial: Trial, sparsity: float, timed: Timed, where: dict[str, Any]) -> dict[str, Any]:
    """Returns the ledger's line of one measured mask."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"key": f"speed-{trial.key}-{sparsity:g}-{now}", "of": trial.key, "sparsity": sparsity,
            **{name: float(f"{seconds:.4g}") for name, seconds in timed.items()},
            "training_ratio": timed["dense_training"] / timed["training"],
            "inference_ratio": timed["dense_inference"] / timed["inference"], "environment": where, "finished": now}


def measure(task: str, options: argparse.Namespace, ledger: Ledger) -> None:
    """Measures every reported mask of the task that lies in runs/, and records it."""
    torch.set_num_threads(1)
    strengths = picked(task, options.quick, ledger.trials())
    if strengths is None:
        raise RuntimeError(f"the strengths of {task} must be searched before speed is measured, got no such records; "
                           "train first")
    where = environment()
    rounds = 3 if options.quick else ROUNDS
    for trial in (t for seed in range(options.seeds) for t in reported(task, seed, strengths, options.quick)):
        for sparsity, order, mask in _masks(trial, options):
            sparse, *others = nets(trial.protocol)
            sparse.set_mask(WEIGHT, mask)
            sparse.set_order(WEIGHT, order)
            line = record(trial, sparsity, times(sparse, *others, rounds=rounds), where)
            ledger.add(line)
            print(f"{trial.in_words()}, {100 * sparsity:g} %: training {line['training_ratio']:.1f} x, inference "
                  f"{line['inference_ratio']:.1f} x", flush=True)


def _masks(trial: Trial, options: argparse.Namespace) -> list[tuple[float, Tensor, Tensor]]:
    """Returns (sparsity, order, mask) of each mask of a trial; none where it has not been trained here."""
    if trial.kind in CUTS:
        order, masks = masks_of(trial.folder(options.out / "runs")) or (np.empty(0), {})
        return [(sparsity, torch.from_numpy(order), torch.from_numpy(mask)) for sparsity, mask in masks.items()]
    if trial.kind == "start":
        geometry = Geometry(trial, trial.protocol.options["hidden"])
        return [(1 - trial.density, geometry.order, start_mask(trial, geometry))]
    return []


def latest(ledger: Ledger) -> dict[tuple[str, float], dict[str, Any]]:
    """Returns (key of the trial, sparsity) -> its newest record of speed."""
    found: dict[tuple[str, float], dict[str, Any]] = {}
    for line in ledger.trials().values():
        if "of" in line:
            name = line["of"], line["sparsity"]
            if name not in found or line["finished"] >= found[name]["finished"]:
                found[name] = line
    return found
