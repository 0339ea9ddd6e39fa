"""Pruning while a net trains: masks by magnitude, schedules, lottery tickets."""
