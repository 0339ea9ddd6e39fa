"""Pictures of what a penalty and pruning made of a weight matrix. They need matplotlib, imported by the first one."""
from .figures import (
    COLOURS,
    plot_connections,
    plot_inhibitor,
    plot_kept_against_distance,
    plot_neuron_weights,
    plot_weight_heatmap,
)

__all__ = ["COLOURS", "plot_connections", "plot_inhibitor", "plot_kept_against_distance", "plot_neuron_weights",
           "plot_weight_heatmap"]
