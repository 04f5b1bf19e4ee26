"""One log line per logging step, one logger configuration for all scripts."""

import logging
import os
import sys
import time

import datasets
from transformers import TrainerCallback
from transformers.utils import logging as hf_logging

logger = logging.getLogger(__name__)


def setup_logging() -> None:
    """INFO on the main process, WARNING on the others; libraries at WARNING."""
    main = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", stream=sys.stdout, force=True
    )
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("stagewise", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO if main else logging.WARNING)
    hf_logging.set_verbosity_warning()
    if not sys.stderr.isatty():  # a bar in a file is a thousand lines
        hf_logging.disable_progress_bar()
        datasets.disable_progress_bars()


def peak_memory_gib() -> float:
    """Peak of the accelerator's allocated memory where there is one, of the process's resident memory otherwise."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def duration(seconds: float) -> str:
    """3725 -> 1:02:05"""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class LogLine(TrainerCallback):
    """Prints one line for each set of logged numbers; replaces the Trainer's own printer and progress bar."""

    SHOWN = (
        ("objective/scores", "score {:.3f}"),
        ("objective/kl", "kl {:.3f}"),
        ("objective/response_length", "length {:.1f}"),
        ("loss", "loss {:.4f}"),
        ("grad_norm", "grad_norm {:.3f}"),
        ("learning_rate", "lr {:.2e}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("mfu", "mfu {:.1%}"),
    )

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first_step = time.time(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        parts = [f"step {state.global_step}/{state.max_steps}", f"epoch {logs.get('epoch', 0):.2f}"]
        if "loss" in logs:
            parts += [form.format(logs[key]) for key, form in self.SHOWN if key in logs]
            elapsed = time.time() - self.started
            done = max(1, state.global_step - self.first_step)
            remaining = elapsed / done * (state.max_steps - state.global_step)
            parts += [f"{peak_memory_gib():.2f} GiB", f"{duration(elapsed)} < {duration(remaining)}"]
        else:
            parts += [f"{key} {value:.4f}" for key, value in logs.items() if _worth_a_line(key, value)]
        if len(parts) > 2:
            logger.info("  ".join(parts))


def _worth_a_line(key: str, value: object) -> bool:
    speed = ("runtime", "per_second", "flos", "epoch", "preparation_time")
    return isinstance(value, float) and not any(part in key for part in speed)
