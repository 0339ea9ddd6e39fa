import argparse
import sys

from . import env_report
from .comparison import self_test

parser = argparse.ArgumentParser(prog="python -m moduli_kernels.env_report",
                                 description="What is installed and active, to paste in a bug report.")
parser.add_argument("--check", action="store_true", help="also run every backend against the reference, some seconds")
options = parser.parse_args()
print(env_report())
if options.check:
    print()
    sys.exit(0 if self_test() else 1)
