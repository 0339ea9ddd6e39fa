"""Manifolds, inhibitors, and the points of neurons on a manifold."""
