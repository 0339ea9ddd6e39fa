"""The command line of the four tasks: every option reaches the run, and a run reaches the ledger."""
import importlib
import json
import math
from dataclasses import replace

import pytest

pytest.importorskip("safetensors")

from examples.adding import PRESETS  # noqa: E402
from examples.training import command_line, trainer  # noqa: E402
from examples.training.config import TASKS, Config, Result, task_class  # noqa: E402
from examples.training.nets import INHIBITORS, NETS  # noqa: E402

OF_TASKS = {  # what paper.md 6.5 finds paper and code to differ in
    "navigation": ("--target", "--loss-at", "--decoder", "--weight-decay", "--zero-below", "--fresh-tests", "--world"),
    "adding": ("--hidden", "--steps"),
    "language_model": ("--rest", "--share", "--data"),
    "speech": ("--recurrent", "--split", "--data"),
}


def asked(task, *arguments):
    return command_line.config_of(task, command_line.parser(task).parse_args(arguments))


@pytest.mark.parametrize("task", TASKS)
def test_help_lists_what_paper_and_code_differ_in(task, capsys):
    pytest.importorskip("soundfile" if task == "speech" else "torch")
    with pytest.raises(SystemExit) as left:
        command_line.main(task, ["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0
    for option in ("--reduction", "--r3", "--hold", "--batches", "--lottery", "--precision", *OF_TASKS[task]):
        assert option in shown, option
    assert all(net in shown for net in NETS) and all(name in shown for name in INHIBITORS)


@pytest.mark.parametrize("task", TASKS)
def test_presets_name_every_option_of_the_task(task):
    """So that a change of a default cannot change what a line of the ledger stands for."""
    pytest.importorskip("soundfile" if task == "speech" else "torch")
    module = importlib.import_module(f"examples.{task}")
    options = command_line.task_options(task)
    assert set(module.OPTIONS) == set(options)
    assert {"full", "quick"} <= module.PRESETS.keys()
    for preset in module.PRESETS.values():
        assert preset.options.keys() == set(options) - {"data"}
        config = preset.config(task, "torus", 0, 0.9)
        assert config.schedule[-1] == 0.9 and len(config.schedule) == preset.before + preset.epochs + preset.hold


def test_options_reach_the_configuration():
    assert asked("adding") == PRESETS["quick"].config("adding", "torus", 0)
    assert asked("adding", "--preset", "full", "--cut", "0.95", "--net", "l1", "--seed", "3") == PRESETS["full"].config(
        "adding", "l1", 3, 0.95)
    config = asked(
        "adding", "--preset", "full", "--hold", "3", "--epochs", "7", "--before", "2", "--batches", "5", "--lr", "0.5",
        "--clip", "2", "--strength", "4", "--reduction", "sum", "--r3", "code", "--inhibitor", "gauss", "--cut", "0.6",
        "--point-damping", "1", "--steps", "9", "--precision", "bfloat16", "--lottery", "--net", "r3_trained")
    assert (len(config.schedule), config.schedule[:2], config.frozen_epochs) == (12, [0.0, 0.0], 3)
    assert (config.batches, config.lr, config.clip, config.strength) == (5, 0.5, 2.0, 4.0)
    assert (config.reduction, config.r3, config.inhibitor, config.point_damping) == ("sum", "code", "gauss", 1.0)
    assert config.options["steps"] == 9 and config.options["hidden"] == 128
    assert (config.precision, config.lottery, config.net) == ("bfloat16", True, "r3_trained")
    its = asked("navigation", "--target", "softmax", "--fresh-tests", "--weight-decay", "0.01", "--world", "0").options
    assert (its["target"], its["fresh_tests"], its["weight_decay"], its["world"]) == ("softmax", True, 0.01, 0)
    assert task_class("navigation").UNIT == "cm"


@pytest.fixture
def in_this_process(monkeypatch):
    """A run without a process of its own: spawning takes seconds."""

    def train_all(configs, root, *, logs=False):
        results = []
        for config in configs:
            folder = config.folder(root)
            folder.mkdir(parents=True, exist_ok=True)
            results.append(trainer.Run(config, folder, logs=logs).train())
        return results

    monkeypatch.setattr(command_line, "train_all", train_all)


TINY = ("--hidden", "8", "--steps", "5", "--batch", "4", "--tests", "20", "--before", "0", "--epochs", "2",
        "--hold", "1", "--batches", "3", "--cut", "0.5", "--device", "cpu")


def test_a_run_is_a_line_in_the_ledger_and_says_what_came_of_it(in_this_process, tmp_path, capsys):
    arguments = [*TINY, "--out", str(tmp_path), "--net", "none"]
    assert command_line.main("adding", arguments) == 0 and command_line.main("adding", arguments) == 0
    shown = capsys.readouterr().out
    assert "error as pruning ends" in shown and "always answering 1" in shown and "of the training steps: " in shown
    (line,) = (tmp_path / "results" / "adding.jsonl").read_text().splitlines()
    assert json.loads(line)["config"]["options"]["hidden"] == 8


def test_a_collapse_is_told_and_recorded(in_this_process, tmp_path, capsys, monkeypatch):
    loss = task_class("adding").loss
    monkeypatch.setattr(task_class("adding"), "loss", lambda self, batch: loss(self, batch) * math.nan)
    assert command_line.main("adding", [*TINY, "--out", str(tmp_path)]) == 1
    assert "COLLAPSED: loss became non-finite at step 1" in capsys.readouterr().out
    assert "non-finite" in json.loads((tmp_path / "results" / "adding.jsonl").read_text())["collapsed"]


def test_bad_input_is_one_sentence(tmp_path, capsys):
    assert command_line.main("adding", ["--cut", "1.5", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert "must be in [0, 1], got 1.5" in shown and "Traceback" not in shown
    with pytest.raises(ValueError, match="graph must be False on the CPU"):
        replace(asked("adding"), graph=True)
    with pytest.raises(ValueError, match="graph must be False for language_model"):
        Config("language_model", "torus", 0, {}, [0.0], 1, 1.0, 1.0, device="cuda", graph=True)


def test_tensorboard_logs_of_a_run_that_was_interrupted(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = asked("adding", *TINY)
    first = trainer.Run(config, tmp_path, logs=True)

    def stop(epoch):
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.train(after_epoch=stop)
    trainer.Run(config, tmp_path, logs=True).train()
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert [event.step for event in events.Scalars("error")] == [1, 2, 3]
    assert "share of a step/penalty" in events.Tags()["scalars"]


def test_the_shares_of_a_step_add_up():
    from examples.training.timing import StepClock, shares

    parts = StepClock("cpu")
    for _ in range(3):
        parts.begin()
        for name in ("data", "forward"):
            sum(range(1000))
            parts.end(name)
    seconds = parts.seconds()
    assert set(seconds) == {"data", "forward"} and all(spent > 0 for spent in seconds.values())
    assert shares({"a": 3.0, "b": 1.0}) == "a 75.0 %, b 25.0 %" and shares({}) == "-"
    assert isinstance(Result().parts, dict)
