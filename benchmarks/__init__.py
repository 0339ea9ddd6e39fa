"""Benchmarks: our kernels against named peers and against a copy of the weight, in one run. See README.md."""
