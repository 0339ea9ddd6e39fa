"""Masked recurrent nets that skip the weights their masks leave out.

Imports run from the nets downwards: sparse_rnn > compressed, path_choice, other_nets > ordered_module > masked_module,
stack, cell > layer > checks, crossovers, timing, tracing.
"""
