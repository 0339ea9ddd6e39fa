"""Pruning while a net trains: masks by magnitude, sparsity schedules and lottery tickets."""
