"""What a build prints: one sentence a line on standard error, which starts with the package's name."""
import sys
from typing import NoReturn


def say(message: str) -> None:
    print(f"moduli_kernels: {message}", file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    raise SystemExit(f"moduli_kernels: {message}")
