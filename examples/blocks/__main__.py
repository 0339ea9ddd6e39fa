"""Trains, measures and reports the study of blocks: does geometry pay for them?

    python -m examples.blocks [train|speed|report] [--tasks ring navigation] [--seeds 5] [--jobs N] [--quick]

`train` first searches the strength of every penalty on a seed that is not reported, then trains the seeds 0, 1, ...
Every trial that ends becomes a line in results/blocks.jsonl and is not trained again. After Ctrl-C or a kill the same
command goes on; what is lost is one leg of each net in training, at most 400 steps. `speed` measures the nets that lie
in runs/, alone on the machine if the numbers are to be used. `report` writes the table and the pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from ..training.command_line import resumable
from ..training.config import EXAMPLES
from ..training.ledger import Ledger
from ..training.workers import SPAWN, cores
from .plan import FULL, Trial, chains, picked, reported, search


def train_chain(chain: list[Trial], ledger: Ledger, root: Path, say: Callable[[str], None] = print) -> None:
    """Trains the trials of a chain one after the other, and records each as it ends."""
    from .training import train

    for trial in chain:
        if trial.key in ledger.trials() and trial.kind != "dense":
            continue
        record = train(trial, root)  # a dense trial that is recorded may lack its checkpoint, which the others need
        if trial.key not in ledger.trials():
            ledger.add(record)
            errors = [stop["error"] for stop in record["stops"]] or [record["error"]]
            say(f"{trial.in_words()}: {record['collapsed'] or ' '.join(f'{error:.4g}' for error in errors)}; "
                f"{record['steps']} steps, {record['seconds']:.0f} s")


def _quietly(chain: list[Trial], path: Path, root: Path) -> list[str]:
    said: list[str] = []
    train_chain(chain, Ledger(path), root, said.append)
    return said


def train_all(trials: list[Trial], ledger: Ledger, root: Path, jobs: int) -> None:
    """Trains what the ledger lacks, `jobs` chains at once.

    Raises RuntimeError at the end if some chains failed, with the reason of the first.
    """
    made = [chain for chain in chains(trials) if any(trial.key not in ledger.trials() for trial in chain)]
    failures: list[BaseException] = []
    if jobs == 1:
        for chain in made:
            try:
                train_chain(chain, ledger, root, lambda line: print(line, flush=True))
            except (RuntimeError, OSError) as error:  # a net that another process trains among them
                failures.append(error)
    else:
        with ProcessPoolExecutor(jobs, mp_context=SPAWN) as pool:
            for future in as_completed([pool.submit(_quietly, chain, ledger.path, root) for chain in made]):
                error = future.exception()
                if error is not None:
                    failures.append(error)
                else:
                    print("\n".join(future.result()), flush=True)
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(made)} chains failed; the first: {failures[0]}") from failures[0]


def train_task(task: str, options: argparse.Namespace, ledger: Ledger) -> None:
    """Searches the strengths of a task, then trains its seeds, one after the other."""
    root = options.out / "runs"
    train_all(search(task, options.quick), ledger, root, options.jobs)
    strengths = picked(task, options.quick, ledger.trials())
    assert strengths is not None
    for (family, cut), strength in strengths.items():
        print(f"{task}: strength of {family}, {cut}: {strength:g}", flush=True)
    trials = [trial for seed in range(options.seeds) for trial in reported(task, seed, strengths, options.quick)]
    train_all(trials, ledger, root, options.jobs)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    made = argparse.ArgumentParser(prog="python -m examples.blocks", description=__doc__.splitlines()[0])
    made.add_argument("what", nargs="?", choices=("train", "speed", "report"), default="train")
    made.add_argument("--tasks", nargs="+", choices=tuple(FULL), default=list(FULL), metavar="TASK",
                      help=f"{', '.join(FULL)} (default both)")
    made.add_argument("--seeds", type=int, default=5, help="reported seeds 0, 1, ... (default 5)")
    made.add_argument("--jobs", type=int, default=cores(), help="nets trained at once, one core each (default all)")
    made.add_argument("--quick", action="store_true",
                      help="nets of 128 neurons and a few steps: a check that all works, too short to judge by")
    made.add_argument("--out", type=Path, default=EXAMPLES, help="folder for runs/ (checkpoints) and results/")
    return made


def run(options: argparse.Namespace) -> None:
    """Trains, measures or reports the tasks that were asked for."""
    quick = "-quick" if options.quick else ""
    ledger = Ledger(options.out / "results" / f"blocks{quick}.jsonl")
    for task in options.tasks:
        if options.what == "train":
            train_task(task, options, ledger)
        elif options.what == "speed":
            from .speed import measure

            measure(task, options, ledger)
        if options.what != "speed":
            from .report import write

            print(write(task, options, ledger), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Does what was asked for and returns the exit status."""
    options = parser().parse_args(arguments)
    if options.seeds < 1 or options.jobs < 1:
        parser().error(f"seeds and jobs must be at least 1, got {options.seeds} and {options.jobs}")
    return resumable(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
