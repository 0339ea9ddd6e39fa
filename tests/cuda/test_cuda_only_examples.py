"""The examples' trainer on a CUDA GPU: every net learns there, and the CUDA graph of a step does what the step does."""
from dataclasses import replace

import pytest
import torch

from tests.support.penalty_cases import DEVICE

pytest.importorskip("safetensors")

from examples.training.config import Config  # noqa: E402
from examples.training.trainer import Run  # noqa: E402

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(
    DEVICE != "cuda", reason="needs a CUDA GPU, and MODULI_KERNELS_TEST_DEVICE=cuda")]
ADDING = Config(
    task="adding", net="torus", seed=0, options={"hidden": 64, "steps": 10, "batch": 32, "tests": 500},
    schedule=[0.0, 0.0, 0.5, 0.5], batches=60, lr=1e-3, strength=1e-3, clip=0.5, frozen_epochs=1, device="cuda",
)
NAVIGATION = Config(
    task="navigation", net="torus", seed=0, options={"hidden": 64, "landmarks": 32, "steps": 8, "batch": 16},
    schedule=[0.0, 0.0, 0.5, 0.5], batches=40, lr=2e-3, strength=1e-2, device="cuda",
)


@pytest.fixture(autouse=True)
def not_deterministic(restored):
    """In a CUDA graph cuBLAS refuses the deterministic mode that the suite sets."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(deterministic)


def trained(config, folder):
    folder.mkdir(parents=True)
    return Run(config, folder).train()


@pytest.mark.parametrize("config", [ADDING, NAVIGATION], ids=lambda config: config.task)
@pytest.mark.parametrize("net", ["torus_trained", "l1_matched", "shuffled", "none"])
def test_nets_learn_and_are_pruned(config, net, tmp_path):
    result = trained(replace(config, net=net), tmp_path / net)
    assert result.collapsed is None and result.history[-1]["density"] < 0.7
    assert result.history[1]["loss"] < result.history[0]["loss"]
    assert {"forward", "backward", "penalty", "update"} <= result.parts.keys()
    assert all(s >= 0 for s in result.parts.values())


@pytest.mark.parametrize("config", [ADDING, NAVIGATION], ids=lambda config: config.task)
@pytest.mark.parametrize("net", ["torus", "torus_trained", "none"])
def test_a_graph_of_a_step_does_what_the_step_does(config, net, tmp_path):
    plain = trained(replace(config, net=net), tmp_path / "plain")
    graphed = trained(replace(config, net=net, graph=True), tmp_path / "graphed")
    for a, b in zip(plain.history, graphed.history, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-2) and b["density"] == pytest.approx(a["density"], abs=0.02)
    # the first epoch prunes nothing, so no weight can fall on either side of the threshold
    assert graphed.history[0]["loss"] == pytest.approx(plain.history[0]["loss"], rel=1e-3)
