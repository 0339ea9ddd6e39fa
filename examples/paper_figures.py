"""Draws the paper's figures from our own runs: PNG files, each with a JSON file of what it shows.

    python -m examples.paper_figures [--figure 1c|6|7|8|rate_maps|all] [--run FOLDER] [--out DIR]

    1c         the connections that pruning kept, on the manifold
    6          inhibitors on the manifolds (needs no run)
    7          the weights of one neuron over the manifold, dense and pruned
    8          persistence diagrams of trained points
    rate_maps  where a navigation net's hidden units are active
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .paper.figures import FIGURES, draw
from .paper.saved_runs import Missing, finished_runs, saved
from .training.config import EXAMPLES


def main(arguments: list[str] | None = None) -> int:
    """Draws the figures that were asked for and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.paper_figures", description=__doc__.splitlines()[0])
    parser.add_argument("--figure", choices=(*FIGURES, "all"), default="all",
                        help="all (default): those that can be drawn")
    parser.add_argument("--run", type=Path, action="append", metavar="FOLDER",
                        help="folder of a run with its checkpoint; may be given several times (default: the newest run "
                             "that suits)")
    parser.add_argument("--runs", type=Path, default=EXAMPLES / "runs",
                        help="folder in which the newest runs are looked for")
    parser.add_argument("--out", type=Path, default=EXAMPLES / "results" / "paper_figures",
                        help="folder of the pictures")
    options = parser.parse_args(arguments)
    every = options.figure == "all"
    try:
        found = [saved(folder) for folder in options.run] if options.run else finished_runs(options.runs)
        for name in FIGURES if every else (options.figure,):
            try:
                for picture in draw(name, found, bool(options.run), options.out):
                    print(f"Figure {name}: {picture}")
            except Missing as missing:
                if not every:
                    raise
                print(f"Figure {name} left out: {missing}.")
    except Missing as missing:
        print(f"Failed: {missing}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
