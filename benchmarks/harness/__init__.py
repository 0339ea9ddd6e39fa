"""What all benchmarks share: rounds of turns, the GPU's stopwatch, and the JSON records of runs."""
