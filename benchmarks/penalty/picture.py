"""Draws speed against n: one line for each contestant, with the copy of W as the floor."""
from __future__ import annotations

import pathlib
from typing import Any

FLOOR = "copy into a buffer"
# (trained points, contestant, label, colour): each contestant has its colour, the floor is grey
LINES = (
    (True, "hand-derived, symmetric", "torch.compile, hand-derived gradients", "#c0563b"),
    (True, "ours", "moduli_kernels", "#1f6f8b"),
    (True, FLOOR, "copy of W (floor)", "#8a8a8a"),
    (False, "cached", "torch.compile, cached coefficients", "#c0563b"),
    (False, "cached, hand-derived", "the same, hand-derived gradients", "#d9a441"),
    (False, "ours", "moduli_kernels", "#1f6f8b"),
    (False, FLOOR, "copy of W (floor)", "#8a8a8a"),
)


def draw(run: dict[str, Any], path: pathlib.Path) -> pathlib.Path | None:
    """Draws the sweep of a run to `path` and returns it; None where the run holds fewer than two sizes."""
    curves = _curves(run["penalty"])
    if max((len(points) for points in curves.values()), default=0) < 2:
        return None
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("drawing needs matplotlib; install it with `pip install matplotlib`.") from error

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for axis, trained in zip(axes, (True, False)):
        for of_trained, name, label, colour in LINES:
            points = sorted(curves.get((trained, name), {}).items()) if of_trained == trained else []
            if points:
                n, times = [n for n, _ in points], [time for _, time in points]
                axis.fill_between(n, [t[0] * 1e3 for t in times], [t[2] * 1e3 for t in times], color=colour, alpha=0.2,
                                  linewidth=0)
                axis.plot(n, [t[1] * 1e3 for t in times], color=colour, marker="o", markersize=4, label=label,
                          linestyle="--" if name == FLOOR else "-")
        axis.set(xscale="log", yscale="log", xlabel="n (neurons; W is n x n)",
                 title="trained points: value, dW and dE" if trained else "frozen points: value and dW")
        sizes = sorted({n for points in curves.values() for n in points})
        axis.set_xticks(sizes, [str(n) for n in sizes])
        axis.minorticks_off()
        axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9, loc="upper left")
    axes[0].set_ylabel("ms (median; band: quartiles)")
    environment = run["environment"]
    gpu = run.get("device") == "cuda"
    where = environment["device"] if gpu else f"{run['threads']} threads, {environment['cpu']}"
    figure.suptitle(f"Penalty on torus + DoG, float32, {where}, commit "
                    f"{(environment['commit'] or 'unknown')[:12]}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _curves(penalty: list[dict[str, Any]]) -> dict[tuple[bool, str], dict[int, list[float]]]:
    """Returns (trained, contestant) -> n -> quartiles of seconds, from the plain torus + DoG cases."""
    curves: dict[tuple[bool, str], dict[int, list[float]]] = {}
    allocators = {one.get("allocator") for one in penalty}  # a GPU's record names none
    preferred = "retained" if "retained" in allocators else "default" if "default" in allocators else None
    for record in penalty:
        name = f"torus-dog-{record.get('n')}-{'trained' if record.get('trained') else 'frozen'}"
        if record.get("allocator") == preferred and record["case"] == name:
            for one in record["contestants"]:
                curves.setdefault((record["trained"], one["name"]), {})[record["n"]] = one["time"]
    return curves
