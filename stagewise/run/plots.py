"""Curves and histograms of a run as PNG files."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

SCORE_BINS = 24
# How figures begin that are no noisy sample of anything: each is a point, and none is smoothed.
EXACT = ("eval_", "task_weight/")


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
    figure, axes = _figure()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="training loss")
        axes.plot(steps, smooth(losses), color="tab:blue", label="training loss, smoothed")
    if evaluation:
        steps, losses = zip(*evaluation, strict=True)
        axes.plot(steps, losses, color="tab:orange", marker="o", label="evaluation loss")
    axes.set(xlabel="step", ylabel="loss", title=title)
    _save(figure, axes, path)
    return True


def plot_curves(log_history: Sequence[dict], curves: Mapping[str, Sequence[str]], path: Path, title: str) -> None:
    """One plot for each entry of `curves`, with the logged figures that it lists over steps, in one picture."""
    figure, axes = _figure(rows=math.ceil(len(curves) / 2), columns=2)
    for axis, (label, names) in zip(axes.flat, curves.items(), strict=False):
        for name in names:
            points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
            if points:
                steps, values = zip(*points, strict=True)
                exact = name.startswith(EXACT)
                (line,) = axis.plot(steps, values, alpha=1 if exact else 0.3, marker="o" if exact else None)
                smoothed = values if exact else smooth(values)
                axis.plot(steps, smoothed, color=line.get_color(), label=name)
                axis.legend()
        axis.set(xlabel="step", title=label)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def plot_scores(chosen: Sequence[float], rejected: Sequence[float], path: Path, title: str) -> None:
    """Histograms of the scores that a reward model gives to chosen and to rejected answers, over the same bins."""
    figure, axes = _figure()
    low, high = min(*chosen, *rejected), max(*chosen, *rejected)
    bins = [low + (high - low) * i / SCORE_BINS for i in range(SCORE_BINS + 1)] if high > low else 1
    for scores, label, colour in ((chosen, "chosen", "tab:green"), (rejected, "rejected", "tab:red")):
        axes.hist(scores, bins=bins, alpha=0.5, color=colour, label=label)
        axes.axvline(sum(scores) / len(scores), color=colour, linestyle="--")
    axes.set(xlabel="score (dashed: mean)", ylabel="answers", title=title)
    _save(figure, axes, path)


def _figure(rows: int = 1, columns: int = 1):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # no pyplot: it would choose a window system and keep figures alive
    figure = Figure(figsize=(8 if columns == 1 else 6 * columns, 5 if rows == 1 else 4 * rows))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def _save(figure, axes, path: Path) -> None:
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
