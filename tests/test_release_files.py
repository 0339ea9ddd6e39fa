"""Loads what earlier releases saved and checks that it computes the same.

tests/data/make_release_file.py writes the files.
"""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import moduli_kernels as mk
from tests.data import make_release_file as saved
from tests.support.penalty_cases import on_device
from tests.support.rnn_cases import quiet, weight_names

pytestmark = [on_device, *quiet]

RELEASES = sorted(Path(__file__).with_name("data").glob("release_*.pt"))


@pytest.mark.parametrize("file", [*RELEASES, None], ids=lambda file: file.stem if file else "this one")
def test_what_a_release_saved_loads_and_computes_the_same(file, tmp_path):
    if file is None:
        torch.save(saved.state(), file := tmp_path / f"release_{mk.__version__}.pt")
    state = torch.load(file, weights_only=True, map_location=torch.get_default_device())
    assert file.name == f"release_{state['version']}.pt" and file.stat().st_size < 50_000
    torch.manual_seed(1)  # points and weights must differ from the saved ones before these are loaded
    made, rnns = saved.regularizers(), saved.nets()
    assert state["regularizers"].keys() <= made.keys() and state["nets"].keys() <= rnns.keys()
    for name, expected in state["penalties"].items():
        weight = saved.weight_for(made[name], state["weight"])
        drawn = made[name](weight).item()
        made[name].load_state_dict(state["regularizers"][name])
        assert made[name](weight).item() == pytest.approx(expected, rel=1e-5)
        assert name == "constant" or drawn != pytest.approx(expected, rel=1e-5)
    for name, net in rnns.items():
        net.load_state_dict(state["nets"][name])
        output = net(state["x"])[0] if name == "rnn" else net(state["x"][0])
        assert torch.allclose(output, state["outputs"][name], atol=1e-5)
    assert not rnns["rnn"].weight_hh_l0_mask.all() and not rnns["cell"].weight_hh_mask.all()
    assert all(not getattr(rnns["rnn"], name)[~getattr(rnns["rnn"], f"{name}_mask")].any()
               for name in weight_names(rnns["rnn"]) if "hh" in name)
    (tmp_path / "rnn.safetensors").write_bytes(bytes(state["compressed"].tolist()))
    small = mk.CompressedRNN.load(tmp_path / "rnn.safetensors", torch.get_default_device())
    assert torch.allclose(small(state["x"])[0], state["outputs"]["rnn"], atol=1e-5)
    model = nn.ModuleDict({"rnn": nn.RNN(3, saved.N), "head": nn.Linear(saved.N, 2)})
    pruner = mk.MagnitudePruner([(model["rnn"], "weight_hh_l0")])
    reg = mk.regularize(model, targets=[(model["rnn"], "weight_hh_l0"), (model["head"], "weight")], strength=1.0)
    for part, key in ((model, "model"), (pruner, "pruner"), (reg, "regularization")):
        part.load_state_dict(state[key])
    assert reg().item() == pytest.approx(state["penalty"], rel=1e-5) and pruner.sparsity == 0.5
