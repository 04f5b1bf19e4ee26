"""What happens between the steps of a run."""

import signal

from transformers import TrainerCallback


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
