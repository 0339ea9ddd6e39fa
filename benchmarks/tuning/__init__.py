"""Measurements from which the package chooses: launch parameters of the penalty, paths of the RNN."""
