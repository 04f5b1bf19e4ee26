"""What happens between the steps of a run."""

import json
import signal
from pathlib import Path

from transformers import Trainer, TrainerCallback

from stagewise.errors import InputError

STREAM_POSITION = "stream_position.json"


class SaveOnSignal(TrainerCallback):
    """The first SIGTERM or SIGINT saves a checkpoint after the step in hand and ends training; a second one kills.

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
        signal.signal(number, signal.SIG_DFL)

    def on_step_end(self, args, state, control, **kwargs):
        if self._any_process_stopped(args):
            control.should_save = True
            control.should_training_stop = True
        return control

    def _any_process_stopped(self, args) -> bool:
        if args.world_size == 1:
            return self.received is not None
        import torch
        import torch.distributed as dist

        flag = torch.tensor(self.received or 0, device=args.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self.received = int(flag) or None
        return self.received is not None

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class SaveStreamPosition(TrainerCallback):
    """Keeps with each checkpoint where in a stream of rows it was taken; does nothing for other data sets.

    A stream has `state_after(batches)` and `load_state(state)`; with several processes the first one reads for all.
    """

    def __init__(self, dataset):
        self.dataset = dataset if hasattr(dataset, "state_after") else None

    def on_save(self, args, state, control, **kwargs):
        if self.dataset is not None and state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            position = self.dataset.state_after(state.global_step)
            (folder / STREAM_POSITION).write_text(json.dumps(position), encoding="utf-8")


def resume_stream(trainer: Trainer, checkpoint: str) -> None:
    """Set a streamed data set to where the checkpoint was taken, so that nothing passed is read again.

    Raises:
        InputError: the checkpoint is of a run without --streaming.
    """
    dataset = trainer.train_dataset
    if not hasattr(dataset, "load_state"):
        return
    path = Path(checkpoint) / STREAM_POSITION
    if not path.is_file():
        raise InputError(f"{checkpoint}: was not written by a run with --streaming; resume without it")
    dataset.load_state(json.loads(path.read_text(encoding="utf-8")))
    trainer.args.ignore_data_skip = True  # the Trainer would read and throw away what the stream has passed
    trainer.add_callback(_RestoreRandomState(trainer, checkpoint))


class _RestoreRandomState(TrainerCallback):
    """Sets the random numbers of the checkpoint once more, after the data loader's start has drawn from them."""

    def __init__(self, trainer: Trainer, checkpoint: str):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._load_rng_state(self.checkpoint)
        self.trainer.remove_callback(self)
