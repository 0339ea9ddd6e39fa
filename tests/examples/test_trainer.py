"""The examples' trainer: pruning, controls, collapse, checkpoints, and going on after SIGKILL."""
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import moduli_kernels as mk

pytest.importorskip("safetensors")

from examples.training import checkpoint  # noqa: E402
from examples.training.config import Config  # noqa: E402
from examples.training.trainer import Run  # noqa: E402
from tests.support.example_runs import assert_same_nets  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NAVIGATION = Config(
    task="navigation", net="torus", seed=0, options={"hidden": 16, "landmarks": 24, "steps": 5, "batch": 8},
    schedule=[0.0] + mk.linear_schedule(0.9, 3), batches=6, lr=1e-3, strength=1e-3,
)
ADDING = Config(
    task="adding", net="torus_trained", seed=1, options={"hidden": 12, "steps": 6, "batch": 8, "tests": 50},
    schedule=mk.linear_schedule(0.95, 4, hold=1), batches=6, lr=1e-2, strength=1e-3, clip=0.5,
    frozen_epochs=1,
)


pytestmark = pytest.mark.usefixtures("restored")


def train(config, folder):
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(config, folder)
    run.train()
    return run


def assert_same_end(a: Run, b: Run):
    assert_same_nets(a, b)
    x, y = a.optimizer.state_dict()["state"], b.optimizer.state_dict()["state"]
    assert x.keys() == y.keys()
    assert all(torch.equal(x[i][key], y[i][key]) for i in x for key in x[i])
    assert torch.equal(a.task.generator.get_state(), b.task.generator.get_state())


def test_a_run_prunes_by_its_schedule_and_learns(tmp_path):
    schedule = [0.0] * 8 + mk.linear_schedule(0.5, 3)
    run = train(replace(ADDING, schedule=schedule, batches=80, frozen_epochs=0), tmp_path)
    history = run.result.history
    assert [entry["sparsity"] for entry in history] == schedule
    assert [entry["epoch"] for entry in history] == list(range(1, 12))
    assert history[7]["error"] < 0.6 * run.result.references["always answering 1"]
    assert run.pruner.sparsity == pytest.approx(0.5, abs=1e-3)
    assert history[-1]["density"] == run.task.model.rnn.weight_hh_l0_mask.double().mean().item() < 1
    assert run.result.seconds > 0 and run.result.peak_mib > 50 and not run.result.collapsed


def test_the_controls_have_the_torus_coefficients_mean_and_the_same_points(tmp_path):
    nets = ("torus", "l1_matched", "shuffled", "none")
    runs = {net: Run(replace(NAVIGATION, net=net), tmp_path) for net in nets}
    ((_, torus),) = runs["torus"].penalty.items()
    coefficients = torus.coefficients()
    ((_, matched),) = runs["l1_matched"].penalty.items()
    ((_, shuffled),) = runs["shuffled"].penalty.items()
    assert matched.coefficients.item() == pytest.approx(coefficients.mean().item(), rel=1e-5)
    assert not torch.equal(shuffled.coefficients, coefficients)
    assert torch.equal(shuffled.coefficients.flatten().sort().values, coefficients.flatten().sort().values)
    assert runs["none"].penalty is None
    for run in runs.values():
        ((_, points),) = run.geometry.items()
        assert torch.equal(points.rows.points, torus.rows.points)
        assert torch.equal(run.task.model.rnn.weight_hh_l0, runs["torus"].task.model.rnn.weight_hh_l0)
    # Neurons' points and landmarks must not be one stream of draws.
    landmarks = runs["torus"].task.landmarks / 2.2 + 0.5
    assert (landmarks[:16] - torus.rows.points / 10).abs().max() > 0.1


def test_trained_points_move_and_rest_in_the_frozen_epochs(tmp_path):
    def points(epochs):
        config = replace(ADDING, schedule=[0.0] * epochs, frozen_epochs=2, batches=3)
        run = Run(config, tmp_path / str(epochs))
        (tmp_path / str(epochs)).mkdir()
        before = run.points[0].detach().clone()
        run.train()
        return before, run.points[0].detach()

    before, after = points(2)
    assert torch.equal(before, after)
    before, after = points(3)
    assert not torch.equal(before, after)


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step(tmp_path, monkeypatch):
    run = Run(NAVIGATION, tmp_path)
    whole, calls = run.task.loss, []

    def loss(batch):
        calls.append(batch)
        return whole(batch) * (math.nan if len(calls) >= 9 else 1.0)

    monkeypatch.setattr(run.task, "loss", loss)
    result = run.train()
    assert result.collapsed == "loss became non-finite at step 9 (epoch 2)"
    assert len(result.history) == 1
    assert Run(NAVIGATION, tmp_path).result.collapsed is None  # what is kept is the last good epoch


def test_unknown_tasks_and_nets_are_named():
    with pytest.raises(ValueError, match="net must be one of torus, .*, got 'bottle'"):
        replace(NAVIGATION, net="bottle")
    with pytest.raises(ValueError, match="task must be one of navigation, adding, .*, got 'chess'"):
        replace(NAVIGATION, task="chess")


def test_another_configuration_has_another_folder(tmp_path):
    changes = ({}, {"lr": 2e-3}, {"seed": 1}, {"net": "none"})
    folders = {replace(NAVIGATION, **change).folder(tmp_path) for change in changes}
    assert len(folders) == 4


KILLED = """
import json, os, signal, sys
from pathlib import Path
from examples.training import checkpoint
from examples.training.config import Config
from examples.training.trainer import Run

config, folder, where = Config(**json.loads(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
run = Run(config, folder)
if where == "in an epoch":
    loss, calls = run.task.loss, []
    run.task.loss = lambda batch: (calls.append(0), die() if len(calls) == 15 else None, loss(batch))[-1]
elif where == "while writing":
    fsync, calls = os.fsync, []
    os.fsync = lambda descriptor: (calls.append(0), die() if len(calls) == 5 else None, fsync(descriptor))[-1]
elif where == "after writing":
    save, calls = checkpoint.save, []
    checkpoint.save = lambda *a: (calls.append(save(*a)), die() if len(calls) == 2 else None)
run.train()
"""


@pytest.mark.parametrize("config, where", [
    (NAVIGATION, "while writing"), (ADDING, "in an epoch"),
    (replace(NAVIGATION, net="shuffled"), "after writing"),
], ids=lambda value: value.net if isinstance(value, Config) else value)
def test_killed_and_started_again_it_ends_bitwise_where_an_unbroken_run_ends(tmp_path, config, where):
    folder = tmp_path / "broken"
    folder.mkdir()
    command = [sys.executable, "-c", KILLED, json.dumps(asdict(config)), str(folder), where]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = Run(config, folder)
    assert len(again.result.history) == 2 < len(config.schedule)
    again.train()
    assert_same_end(again, train(config, tmp_path / "unbroken"))


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = train(NAVIGATION, tmp_path)
    before = (tmp_path / checkpoint.NAME).stat()
    second = train(NAVIGATION, tmp_path)
    assert_same_end(first, second)
    assert asdict(first.result) == asdict(second.result)
    assert (tmp_path / checkpoint.NAME).stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("size", [0, 5, 3000, -1])
def test_a_torn_checkpoint_is_told_plainly(tmp_path, size):
    train(replace(NAVIGATION, schedule=[0.0]), tmp_path)
    path = tmp_path / checkpoint.NAME
    data = path.read_bytes()
    path.write_bytes(data[:size])
    with pytest.raises(RuntimeError, match="must be a whole safetensors file .* delete the folder"):
        Run(replace(NAVIGATION, schedule=[0.0]), tmp_path)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    train(replace(NAVIGATION, schedule=[0.0]), tmp_path)
    with pytest.raises(RuntimeError, match="must be of this configuration, got another"):
        Run(NAVIGATION, tmp_path)


def test_a_failed_write_leaves_the_previous_checkpoint_and_no_rubbish(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, {"x": torch.ones(3)}, {"epoch": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, {"x": torch.zeros(3)}, {"epoch": 2})
    tensors, info = checkpoint.load(tmp_path)
    assert info == {"epoch": 1} and torch.equal(tensors["x"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.NAME]


def test_only_one_process_trains_in_a_folder_and_leftovers_are_cleared(tmp_path):
    (tmp_path / f"{checkpoint.NAME}abc.partial").write_bytes(b"half")
    with checkpoint.only_writer(tmp_path):
        assert not list(tmp_path.glob("*.partial"))
        with pytest.raises(RuntimeError, match="is being trained by another process"):
            with checkpoint.only_writer(tmp_path):
                pass
    with checkpoint.only_writer(tmp_path):
        pass
