"""The CPU figures of a run as a picture."""

import statistics
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

_SHOWN = ("µs a whole answer", "µs a chunk, 32 streams", "µs a chunk, 128 streams", "µs a chunk, 512 streams")


def draw(results: dict[str, list[dict[str, float]]], file: Path) -> None:
    """One small chart a figure, a bar a system: median, with a line from the lowest to the highest round."""
    names = [name for name in results if name != "direct"]
    figure, axes = plt.subplots(1, len(_SHOWN), figsize=(4 * len(_SHOWN), 3.5))
    for axis, shown in zip(axes, _SHOWN, strict=True):
        rounds = [[found[shown] for found in results[name]] for name in names]
        middles = [statistics.median(values) for values in rounds]
        spread = [
            [m - min(v) for m, v in zip(middles, rounds, strict=True)],
            [max(v) - m for m, v in zip(middles, rounds, strict=True)],
        ]
        colours = ["tab:blue" if name == "pd-proxy" else "lightgray" for name in names]
        axis.bar(names, middles, yerr=spread, color=colours)
        axis.set_title(shown)
        axis.tick_params(axis="x", rotation=30)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
