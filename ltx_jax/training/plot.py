"""A picture of a run's metrics: `python -m ltx_jax.training.plot RUN/metrics.jsonl RUN/metrics.png`."""

from pathlib import Path
from typing import Annotated

import tyro

from ltx_jax.cache import written_whole
from ltx_jax.training.loop import read_metrics

_COLUMNS = 3


def plot_metrics(metrics: Path, picture: Path) -> None:
    """Draws each metric over the steps, in a panel of its own; written whole or not at all.

    Raises ValueError where there is nothing to draw, ModuleNotFoundError without matplotlib (the extra `train`).
    """
    from matplotlib.figure import Figure  # an extra: training itself does not need it

    lines = read_metrics(metrics)
    names = sorted({name for line in lines for name in line} - {"step"})
    if not names:
        raise ValueError(f"{metrics} has no metrics yet; a line is written every `log_every` steps of a run")
    rows = -(-len(names) // _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for axes, name in zip(panels, [*names, *[""] * _COLUMNS], strict=False):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if not points:
            axes.set_axis_off()
            continue
        axes.plot(*zip(*points, strict=True), linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        if min(value for _, value in points) > 0 and not name.endswith("_db"):
            axes.set_yscale("log")
    with written_whole(picture) as temporary:
        figure.savefig(temporary, format=picture.suffix.removeprefix(".") or "png", dpi=120)


def main(metrics: Annotated[Path, tyro.conf.Positional], picture: Annotated[Path, tyro.conf.Positional]) -> None:
    """Draws the metrics of a training run."""
    try:
        plot_metrics(metrics, picture)
    except (ValueError, ModuleNotFoundError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    tyro.cli(main)
