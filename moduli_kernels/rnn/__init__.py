"""Masked recurrent nets that skip the weights their masks leave out."""
