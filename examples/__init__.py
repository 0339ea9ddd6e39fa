"""The paper's four experiments, its tables and figures, a demo (`python -m examples.demo`) and a loop to copy."""
