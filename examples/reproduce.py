"""Trains what is missing of the paper's tables, then shows them beside the paper's numbers.

    python -m examples.reproduce TABLE ... [--seeds 5] [--jobs N] [--preset full|quick] [--show]

TABLE is 1-10, 15-20, adding-cuts, speech, or "all" of --task. Every trial that ends becomes a line in the ledger
examples/results/<task>.jsonl and is not trained again. After Ctrl-C or a kill, the same command goes on. Several
processes, and several machines that share examples/, may run it at once: each takes what is missing.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import torch

from .paper.claims import verdicts
from .paper.table_report import write
from .paper.tables import Table, all_tables
from .training.command_line import resumable, task_options
from .training.config import EXAMPLES, PRECISIONS, TASKS, Config, task_module
from .training.ledger import Ledger
from .training.workers import train_each


def missing(chosen: list[Table], seeds: list[int], preset: str, ledger: Ledger, rows: str = "",
            **changes) -> list[Config]:
    """Returns the trials of the tables that the ledger lacks, each once, one seed after the other.

    Nets that are not cut at all come last, since no claim of the paper rests on them.

    Args:
        rows: a pattern; only rows in whose name it is found count.
        changes: fields of Config for all trials, such as the device.
    """
    known = ledger.trials()
    found: dict[str, Config] = {}
    for seed in seeds:
        for table in chosen:
            for config in table.trials_of([seed], preset, rows, **changes):
                if config.key not in known:
                    found.setdefault(config.key, config)
    # A lottery comes after its antecedent, also where another table asks for that.
    return sorted(found.values(), key=lambda config: (config.schedule[-1] == 0, config.seed, config.lottery))


def run(configs: list[Config], ledger: Ledger, runs: Path, jobs: int | None) -> None:
    """Trains the runs and adds a line to the ledger as each ends."""
    by_key = {config.key: config for config in configs}
    for key, result in train_each(configs, runs, jobs=jobs, recorded=lambda: set(ledger.trials()), patient=True):
        if key not in ledger.trials():
            ledger.append(by_key[key], result)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    made = argparse.ArgumentParser(prog="python -m examples.reproduce", description=__doc__.splitlines()[0])
    made.add_argument("table", nargs="+", help=f"{', '.join(all_tables())}, or all of --task")
    made.add_argument("--task", choices=TASKS, help="task whose tables `all` means")
    made.add_argument("--seeds", type=int, default=5, help="trials a cell, seeds 0, 1, ... (default 5)")
    made.add_argument("--rows", default="", metavar="PATTERN",
                      help="train only rows in whose name this regular expression is found, e.g. '9.%% sparse'")
    made.add_argument("--jobs", type=int, help="nets at once (default: one a core, two a GPU)")
    made.add_argument("--preset", choices=("full", "quick"), default="full",
                      help="full: the authors' protocol (default); quick: reduced, minutes a net on a core")
    made.add_argument("--precision", choices=PRECISIONS, default="float32")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", choices=("cpu", "cuda"), default=best, help=f"here {best}")
    made.add_argument("--graph", action="store_true", help="steps as CUDA graphs (adding, navigation)")
    made.add_argument("--data", default="",
                      help="folder with the data sets (language_model, speech); without it they are fetched")
    made.add_argument("--show", action="store_true", help="train nothing, show what the ledger has")
    made.add_argument("--out", type=Path, default=EXAMPLES, help="folder for runs/ (checkpoints) and results/")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Trains and shows the tables that were asked for, and returns the exit status."""
    options = parser().parse_args(arguments)
    known = all_tables()
    names = [n for n, t in known.items() if t.task == options.task] if options.table == ["all"] else options.table
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        print(f"table must be of {', '.join(known)}, or all with --task, got {', '.join(unknown) or 'all'}",
              file=sys.stderr)
        return 2
    chosen, seeds = [known[name] for name in names], list(range(options.seeds))
    place = {"device": options.device, "precision": options.precision, "graph": options.graph}
    for task in dict.fromkeys(table.task for table in chosen):
        ledger = Ledger(options.out / "results" / f"{task}.jsonl")
        its = [table for table in chosen if table.task == task]
        changes = {**place, "data": options.data} if "data" in task_options(task) else place
        if not options.show:
            configs = missing(its, seeds, options.preset, ledger, options.rows, **changes)
            print(f"{task}: {len(configs)} trials to train", flush=True)
            status = resumable(functools.partial(run, configs, ledger, options.out / "runs", options.jobs))
            if status:
                return status
        what = task_module(task).PRESETS[options.preset].what
        for table in its:
            found = verdicts([table.name], options.preset, ledger, seeds, **changes)
            shown, paths = write(options.out / "results" / "tables", table, options.preset, what, ledger, seeds, found,
                                 **changes)
            print(f"\n{shown}\n")
            print("\n".join(f"Written: {path}" for path in paths), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
