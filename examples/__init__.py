"""Examples: two tasks of the paper, a small resumable trainer, and the demo (`python -m examples.demo`)."""
