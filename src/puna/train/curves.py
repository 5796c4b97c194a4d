"""A picture of a run's metrics."""

import csv
from pathlib import Path


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draw loss, held-out bits per byte, speed and expert balance over the steps of a metrics.csv."""
    from matplotlib.figure import Figure

    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    panels = (("loss", "nats a token"), ("heldout_bpb", "bits per byte"), ("tokens_per_second", "tokens/s"),
              ("expert_imbalance", "busiest expert, 1 is even"))  # fmt: skip
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (column, label) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o" if len(points) < 50 else None, linewidth=1)
        axes.set(title=column, xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
