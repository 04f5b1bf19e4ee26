"""What happens between the steps of a run."""

import json
import logging
import math
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import Trainer, TrainerCallback

from stagewise.distributed import decide_on_first
from stagewise.errors import InputError, TrainingDiverged
from stagewise.modeling.sharded import not_finite

logger = logging.getLogger(__name__)

STREAM_POSITION = "stream_position.json"
# Of a prompt in the table of sampled texts, and of the table in a file.
SHOWN_CHARS, SHOWN_WIDTH = 200, 120


class SaveOnSignal(TrainerCallback):
    """The first SIGTERM or SIGINT saves a checkpoint after the step in hand and ends training; a second kills.

    `received` is the signal's number, or None. Every process of a group gets the signal from its launcher, and stops
    at the same step because the flag is agreed on before each decision.
    """

    def __init__(self):
        self.received: int | None = None
        self.previous = {}

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous[number] = signal.signal(number, self._handle)

    def _handle(self, number, frame):
        self.received = number
        for each in self.previous:
            signal.signal(each, signal.SIG_DFL)

    def on_step_end(self, args, state, control, **kwargs):
        if self._any_process_stopped(args):
            control.should_save = True
            control.should_training_stop = True
        return control

    def _any_process_stopped(self, args) -> bool:
        if args.world_size == 1:
            return self.received is not None
        import torch.distributed as dist

        flag = torch.tensor(self.received or 0, device=args.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self.received = int(flag) or None
        return self.received is not None

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class EvaluationGuard(TrainerCallback):
    """An evaluation without finite figures is named, and ends the run where it is the weights that are not finite.

    Raises:
        TrainingDiverged: on all processes.
    """

    def __init__(self):
        self._sound_step = 0  # the last whose evaluation was finite

    def on_evaluate(self, args, state, control, metrics, model=None, **kwargs):
        found = figures_not_finite(metrics)
        if not found:
            self._sound_step = state.global_step
            return
        weights = not_finite(model)
        if args.world_size > 1:
            shares: list = [None] * args.world_size
            torch.distributed.all_gather_object(shares, weights)
            weights = list(dict.fromkeys(name for share in shares for name in share))
        figures = ", ".join(f"{name} is {metrics[name]}" for name in found)
        if weights:
            more = f" and {len(weights) - 3} more" if len(weights) > 3 else ""
            raise TrainingDiverged(
                f"evaluation after step {state.global_step}: {figures}, and there are weights that are not finite: "
                f"{', '.join(weights[:3])}{more}",
                self._sound_step,
            )
        if state.is_world_process_zero:
            logger.warning("evaluation after step %d: %s, although all weights are finite", state.global_step, figures)


def figures_not_finite(metrics: Mapping[str, object]) -> list[str]:
    """The names of figures that are not finite; a perplexity is infinite where the loss alone is a float."""
    bad = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
    return [name for name in bad if not name.endswith("perplexity") or math.isnan(float(str(metrics[name])))]


def stream_position_writer(trainer: Trainer) -> Callable[[Path], None]:
    """Writes where in a stream of rows a checkpoint is taken into its folder; does nothing for other data sets."""

    def write(folder: Path) -> None:
        if trainer.stream_position is not None and trainer.is_world_process_zero():
            (folder / STREAM_POSITION).write_text(trainer.stream_position, encoding="utf-8")

    return write


class SaveSamples(TrainerCallback):
    """Every `every` steps some sampled texts go into a table in the log and into completions.jsonl; 0 is never.

    Args:
        samples: called with a number, returns that many dicts with step, prompt, completion, score, kl.
    """

    FILE = "completions.jsonl"

    def __init__(self, samples: Callable[[int], list[dict]], every: int, count: int = 4):
        self.samples, self.every, self.count = samples, every, count

    def on_train_begin(self, args, state, control, **kwargs):
        path = Path(args.output_dir) / self.FILE
        if state.is_world_process_zero and path.is_file():  # what a resumed run will write again
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
            path.write_text("".join(kept), encoding="utf-8")

    def on_step_end(self, args, state, control, **kwargs):
        if not self.every or state.global_step % self.every or not state.is_world_process_zero:
            return
        rows = self.samples(self.count)
        with open(Path(args.output_dir) / self.FILE, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        table = Table(title=f"answers of step {state.global_step}")
        for column in ("prompt", "completion", "score", "kl"):
            table.add_column(column, overflow="fold")
        for row in rows:
            prompt = row["prompt"] if len(row["prompt"]) <= SHOWN_CHARS else "..." + row["prompt"][-SHOWN_CHARS:]
            # text, not markup: an answer may hold [brackets]
            table.add_row(Text(prompt), Text(row["completion"]), f"{row['score']:.3f}", f"{row['kl']:.3f}")
        Console(width=SHOWN_WIDTH if not Console().is_terminal else None).print(table)


def resume_stream(trainer: Trainer, checkpoint: str) -> None:
    """Set a streamed data set to where the checkpoint was taken, so that nothing passed is read again.

    Raises:
        InputError: the checkpoint is of a run without --streaming.
    """
    dataset = trainer.train_dataset
    if not hasattr(dataset, "load_state"):
        return
    path = Path(checkpoint) / STREAM_POSITION

    def read() -> str:
        if not path.is_file():
            raise InputError(f"{checkpoint}: was not written by a run with --streaming; resume without it")
        return path.read_text(encoding="utf-8")

    dataset.load_state(json.loads(decide_on_first(read)))  # another machine may have no copy of it
    trainer.args.ignore_data_skip = True  # the Trainer would read and throw away what the stream has passed
    trainer.add_callback(_RestoreRandomState(trainer, checkpoint))


class _RestoreRandomState(TrainerCallback):
    """Sets the random numbers of the checkpoint once more, after the data loader's start has drawn from them."""

    def __init__(self, trainer: Trainer, checkpoint: str):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._load_rng_state(self.checkpoint)
        self.trainer.remove_callback(self)
