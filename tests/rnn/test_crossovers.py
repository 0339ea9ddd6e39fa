"""Which path runs and why: the table of crossovers and its rule, the module's choice, explain, tune, the script that
measures the table."""
from __future__ import annotations

import functools
import itertools
import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import moduli_kernels as mk
from moduli_kernels import backends, runtime
from moduli_kernels.rnn import crossovers, layer, stack, timing
from tests.support.penalty_cases import DEVICE, KERNELS, needs_kernels, on_device
from tests.support.rnn_cases import PATHS, draw, net_of, quiet

pytestmark = [on_device, *quiet]

DENSITIES = (0.1, 1.0)


def table_file(ratio, **more) -> dict:
    """A small table; ratio(hidden, batch, steps, training, density or None)."""
    rows = [{"hidden": h, "batch": b, "steps": s, "training": t, "unmasked": ratio(h, b, s, t, None),
             "ratios": [ratio(h, b, s, t, d) for d in DENSITIES]}
            for h, b, s, t in itertools.product((16, 64), (1, 8), (1, 4), (False, True))]
    return {"device": "cpu", "dtype": "float32", "source": "test", "densities": DENSITIES, "rows": rows, **more}


@pytest.fixture
def table(monkeypatch):
    """Sets the tables, by what `table_file` takes."""
    def put(*files):
        made = {(file["device"], file["dtype"]): crossovers.parsed(file) for file in files}
        monkeypatch.setattr(crossovers, "tables", lambda: made)
        crossovers.predicted.cache_clear()
    yield put
    crossovers.predicted.cache_clear()


def predicted(hidden=16, batch=1, steps=1, density=0.1, training=True, dtype=torch.float32, device="cpu", **more):
    density_ih, density_hh = density if isinstance(density, tuple) else (density, density)
    return crossovers.predicted(device, dtype, hidden, batch, density_ih, density_hh, training, steps, **more)


# --- the table and its rule ---------------------------------------------------------------------------------------

def test_the_shipped_table():
    tables = crossovers.tables()
    assert ("cpu", "float32") in tables
    for table in tables.values():
        assert list(table.densities) == sorted(table.densities) and 0 < table.densities[0] and table.densities[-1] == 1
        assert all(len(row) == len(table.densities) + 1 and min(row) > 0 for row in table.ratios.values())
        assert len(table.ratios) == 2 * math.prod(map(len, table.grid)) and table.source


def test_what_was_measured_is_what_is_predicted(table):
    def ratio(h, b, s, t, d):
        return 1 + h + 3 * b + 5 * s + 7 * t + 11 * (d or 2)

    table(table_file(ratio))
    for h, b, s, t, d in itertools.product((16, 64), (1, 8), (1, 4), (False, True), (*DENSITIES, None)):
        assert predicted(h, b, s, d, t) == pytest.approx(ratio(h, b, s, t, d))


def test_between_and_beyond_the_grid(table):
    table(table_file(lambda h, b, s, t, d: h * b / s / (d or 1)))  # a straight line in the logarithms
    assert predicted(32, 2, 2, 0.3) == pytest.approx(32 * 2 / 2 / 0.3)
    assert predicted(1000, 1000, 1000, 0.001) == pytest.approx(64 * 8 / 4 / 0.1)
    assert predicted(1, 0, 0, 0.0) == pytest.approx(16 / 0.1)
    assert predicted(32, 2, 2, None) == pytest.approx(32)
    assert crossovers.neighbours((1, 2, 4), 2) == [(2, 1.0)]


def test_the_density_is_that_of_both_weights_together(table):
    table(table_file(lambda h, b, s, t, d: 1 / (d or 1)))
    assert predicted(density=(1.0, 0.2)) == pytest.approx(1 / 0.6)
    assert predicted(density=(None, 0.2)) == pytest.approx(1 / 0.6)
    assert predicted(density=(None, 0.2), inputs=0) == pytest.approx(1 / 0.2)
    assert predicted(density=(0.6, None), inputs=48) == pytest.approx(1 / 0.7)
    assert crossovers.joint_density(0.5, None, 4, 4) == 0.75 and crossovers.joint_density(1, 1, 0, 0) == 0


def test_choose(table):
    table(table_file(lambda h, b, s, t, d: {None: 0.9, 0.1: 2.0, 1.0: 1.0}[d] if t else 0.5))
    arguments = ("cpu", torch.float32, 16, 1)
    assert crossovers.choose(*arguments, 0.1, 0.1, True, 1) == "sparse"
    assert crossovers.choose(*arguments, None, 0.1, True, 1, inputs=1) == "sparse"
    for others in ((0.1, 0.1, False, 1), (None, None, True, 1), (1.0, 1.0, True, 1)):
        assert crossovers.choose(*arguments, *others) == "dense"


def test_other_dtypes_and_devices(table):
    table(table_file(lambda *case: 2.0))
    assert predicted(dtype=torch.float64) == pytest.approx(2) and predicted(dtype=torch.bfloat16) is None
    assert predicted(device="cuda") is None
    assert crossovers.choose("cuda", torch.float32, 1, 1, 0.1, 0.1, True, 1) == "dense"
    table(table_file(lambda *case: 2.0), table_file(lambda *case: 3.0, dtype="float64"))
    assert predicted(dtype=torch.float64) == pytest.approx(3)


def test_a_grid_with_a_hole():
    file = table_file(lambda *case: 1.0)
    del file["rows"][3]
    with pytest.raises(KeyError):
        crossovers.parsed(file)


# --- the module's choice ------------------------------------------------------------------------------------------

def paths_taken(monkeypatch) -> list[str]:
    taken = []
    for path in PATHS:
        run = getattr(stack, path)
        monkeypatch.setattr(stack, path, lambda *a, run=run, path=path: taken.append(path) or run(*a))
    return taken


@needs_kernels
@pytest.mark.skipif(DEVICE != "cpu", reason="the table below is the CPU's")
def test_auto_follows_the_table(table, monkeypatch):
    monkeypatch.setattr(backends, "forced", None)
    taken, x = paths_taken(monkeypatch), draw(4, 8, 16)
    table(table_file(lambda h, b, s, t, d: {None: 0.5, 0.1: 4.0, 1.0: 0.25}[d] * (1 if t else 0.1)))
    net = net_of(16, 16, densities=(1.0, 1.0), path="auto")
    net(x)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        net.set_mask(name, torch.arange(256).view(16, 16) % 10 == 0)
    net(x)
    with torch.no_grad():
        net(x)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        net.set_mask(name, None)
    net(x)
    assert taken == ["dense", "sparse", "dense", "dense"]


def test_the_user_decides(monkeypatch):
    taken, x = paths_taken(monkeypatch), draw(4, 8, 16)
    net = net_of(16, 16, path="dense")
    net(x)
    net.path = "sparse"
    net(x)
    with mk.backend("reference"):
        net.path = "auto"
        net(x)
        net.path = "dense"
        net(x)
    net.path, net.leak = "auto", 0.5
    net(x)
    assert taken == ["dense", "sparse", "sparse", "dense", "sparse"]


def test_dense_where_there_is_no_kernel(monkeypatch):
    """A device that only the reference serves; an extension that was not built."""
    monkeypatch.setattr(backends, "forced", None)
    taken, net = paths_taken(monkeypatch), mk.SparseRNN(3, 4, device="meta")
    net(torch.ones(2, 2, 3, device="meta"))
    assert taken == ["dense"] and "no compiled kernel serves meta here" in net.explain()
    net.path = "sparse"
    assert net(torch.ones(2, 2, 3, device="meta"))[0].shape == (2, 2, 4)
    monkeypatch.setattr(runtime, "cpu_ops_error", "not built")
    assert not layer.has_kernel("cpu")


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda net: mk.SparseRNN(3, 3, path="fast"), ValueError,
     "path must be one of 'auto', 'dense', 'sparse', got 'fast'; pick one of them."),
    (lambda net: setattr(net, "path", None), ValueError,
     "path must be one of 'auto', 'dense', 'sparse', got a NoneType; pick one of them."),
    *[(call, ValueError, "path must be 'auto' or 'sparse' where leak is not 1 (torch.nn.RNN knows no leak), got "
                         "'dense' with leak=0.5; leave it at 'auto'.")
      for call in (lambda net: mk.SparseRNN(3, 3, path="dense", leak=0.5), lambda net: setattr(net, "leak", 0.5))],
    (lambda net: setattr(net, "leak", 1.5), ValueError,
     "leak must be a number in (0, 1], got 1.5; pass a float such as 0.1, or 1.0 for none."),
    (lambda net: mk.SparseRNN(3, 3, leak=True), TypeError,
     "leak must be a number in (0, 1], got True; pass a float such as 0.1, or 1.0 for none."),
])
def test_settings_that_do_not_fit(call, error, message):
    net = mk.SparseRNN(3, 3, path="dense")
    with pytest.raises(error) as caught:
        call(net)
    assert str(caught.value) == message and net.path == "dense" and net.leak == 1


# --- explain and tune ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("sizes", "error"), [
    ({"batch": -3}, ValueError("batch must be an integer of at least 0, got -3; pass a larger one.")),
    ({"steps": 2.5}, TypeError("steps must be an integer of at least 0, got 2.5; pass an int."))])
def test_explain_refuses_sizes_that_no_input_has(sizes, error):
    with pytest.raises(type(error)) as raised:
        mk.SparseRNN(3, 4).explain(**sizes)
    assert str(raised.value) == str(error)


@needs_kernels
@pytest.mark.skipif(DEVICE != "cpu", reason="the table below is the CPU's")
def test_explain(table, monkeypatch):
    monkeypatch.setattr(backends, "forced", None)
    table(table_file(lambda h, b, s, t, d: 4.0 if d == 0.1 else 0.5))
    net = mk.SparseRNN(16, 16, 2, bidirectional=True)
    net.set_mask("weight_hh_l1_reverse", torch.arange(256).view(16, 16) % 10 == 0)
    for name in ("weight_hh_l0", "weight_hh_l0_reverse", "weight_hh_l1"):
        net.set_mask(name, torch.zeros(16, 16, dtype=torch.bool))
    table(table_file(lambda h, b, s, t, d: 0.5))
    assert net.explain() == (
        "dense: torch's own RNN over the whole stack, for 50 steps of a batch of 32, torch.float32 on cpu, forward and "
        "backward; by the table of crossovers dense takes about 1/2 of the time of sparse.\n"
        "  layer 0: dense; weight_ih_l0 without a mask, weight_hh_l0 0 % kept\n"
        "  layer 0, reverse: dense; weight_ih_l0_reverse without a mask, weight_hh_l0_reverse 0 % kept\n"
        "  layer 1: dense; weight_ih_l1 without a mask, weight_hh_l1 0 % kept\n"
        "  layer 1, reverse: dense; weight_ih_l1_reverse without a mask, weight_hh_l1_reverse 10.2 % kept")
    with torch.no_grad():
        net(draw(3, 7, 16))
    table(table_file(lambda h, b, s, t, d: 4.0))
    served = {"cpp": "cpp", "triton": "cpp"}[KERNELS]
    first = net.requires_grad_(False).explain().splitlines()[0]
    assert first == (f"sparse: the masked kernel ({served}), for 3 steps of a batch of 7, torch.float32 on cpu, "
                     "forward; by the table of crossovers sparse takes about 1/4 of the time of dense.")
    assert "for 5 steps of a batch of 2," in net.explain(batch=2, steps=5)
    net.bfloat16()
    assert "the table of crossovers has nothing for torch.bfloat16 on cpu; tune() measures it" in net.explain()
    net.path = "sparse"
    assert "path is 'sparse'" in net.explain()
    net.path, net.leak = "auto", 0.5
    assert "leak is 0.5, which torch's RNN does not know" in net.explain()
    with mk.backend("reference"):
        assert "sparse: the reference in plain PyTorch," in net.explain()


@needs_kernels
@pytest.mark.parametrize("winner", PATHS)
def test_tune_measures_and_remembers(monkeypatch, winner):
    measured = []

    def alternating(passes, device, runs=timing.RUNS):
        for run in passes.values():
            run()
        measured.append(list(passes))
        return {path: 1.0 if path == winner else 2.0 for path in passes}

    monkeypatch.setattr(backends, "forced", None)
    monkeypatch.setattr(timing, "alternating", alternating)
    net, x = net_of(4, 6, 2, path="auto", dropout=0.5), draw(5, 3, 4)
    state = torch.get_rng_state()
    found = net.tune(x)
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in net.parameters())
    assert found == (winner, {"dense": 1.0 + (winner != "dense"), "sparse": 1.0 + (winner != "sparse")}, True)
    assert net.path == "auto" and measured == [["dense", "sparse"]]
    taken = paths_taken(monkeypatch)
    net(x)
    assert taken == [winner] and "tune() measured it" in net.explain()
    assert "tune() measured it" in net.explain(batch=4) and "tune() measured it" not in net.explain(batch=40)
    with torch.no_grad():
        assert "tune() measured it" not in net.explain()
    net.eval()
    assert not net.tune(x).training and not net.tune(x, draw(2, 3, 6)).training
    net.set_mask("weight_hh_l0", torch.zeros(6, 6, dtype=torch.bool))
    net.set_mask("weight_hh_l1", torch.zeros(6, 6, dtype=torch.bool))
    assert "tune() measured it" not in net.explain()
    leaky = net_of(4, 6, leak=0.5)
    assert list(leaky.tune(x).seconds) == ["sparse"] and leaky.path == "sparse"
    with pytest.raises(RuntimeError, match="input.size"):
        net.tune(draw(5, 3, 3))
    assert net.path == "auto"


def test_timing_alternates():
    turns = []
    passes = {name: (lambda name=name: turns.append(name)) for name in "ab"}
    seconds = timing.alternating(passes, torch.device("cpu"), runs=3)
    assert "".join(turns) == "ab" + "ab" + "ba" + "ab" and list(seconds) == ["a", "b"] and min(seconds.values()) >= 0


@pytest.mark.skipif(DEVICE != "cpu", reason="runs on the CPU")
def test_the_script_that_measures_the_table(tmp_path):
    output = tmp_path / "table.json"
    before = [table_file(lambda *case: 1.0, device=device) for device in ("cpu", "cuda")]
    output.write_text(json.dumps({"tables": before}))
    command = [sys.executable, "-m", "benchmarks.tuning.rnn", "--quick"]
    run = functools.partial(subprocess.run, check=False, cwd=crossovers.FILE.parents[2], capture_output=True, text=True)
    done = run([*command, "--output", str(output)])
    assert done.returncode == 0, done.stderr
    written = json.loads(output.read_text())["tables"]
    assert [table["device"] for table in written] == ["cuda", "cpu"] and written[1]["source"].startswith("measured: ")
    assert crossovers.parsed(written[1]).densities == (0.1, 1.0)
    refused = run(command)
    assert refused.returncode == 2 and "--output" in refused.stderr


def test_importing_reads_no_table():
    code = ("import moduli_kernels.rnn.crossovers as p, sys; assert not p.tables.cache_info().misses; "
            "assert 'torch._dynamo' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=crossovers.FILE.parents[2])


def test_the_dense_path_is_nn_rnns_own():
    net, x = mk.SparseRNN(4, 6, 2, path="dense"), draw(5, 3, 4)
    plain = nn.RNN(4, 6, 2)
    plain.load_state_dict(net.state_dict())
    assert torch.equal(net(x)[0], plain(x)[0])
