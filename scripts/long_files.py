"""Advises to split long files. `make lint` prints the advice and never fails because of it.

    python scripts/long_files.py FILE ...
"""
import sys
from pathlib import Path

MOST_LINES = 300


def main(names: list[str]) -> None:
    lengths = {name: len(Path(name).read_text().splitlines()) for name in names}
    for name, length in sorted(lengths.items(), key=lambda item: -item[1]):
        if length > MOST_LINES:
            print(f"{name} has {length} lines, which is more than {MOST_LINES}; consider splitting it")


if __name__ == "__main__":
    main(sys.argv[1:])
