"""Curves of a run as PNG files, from the Trainer's log history."""

from collections.abc import Sequence
from pathlib import Path


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, started at the first value, with `weight` on the past."""
    smoothed: list[float] = []
    for value in values:
        smoothed.append(value if not smoothed else weight * smoothed[-1] + (1 - weight) * value)
    return smoothed


def plot_loss(log_history: Sequence[dict], path: Path, title: str) -> bool:
    """Training loss (raw and smoothed) and evaluation loss over steps. Returns False if there is nothing to draw."""
    train = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    evaluation = [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    if not train and not evaluation:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # no pyplot: it would choose a window system and keep figures alive
    figure = Figure(figsize=(8, 5))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="training loss")
        axes.plot(steps, smooth(losses), color="tab:blue", label="training loss, smoothed")
    if evaluation:
        steps, losses = zip(*evaluation, strict=True)
        axes.plot(steps, losses, color="tab:orange", marker="o", label="evaluation loss")
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return True
