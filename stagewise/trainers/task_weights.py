"""Task weights that follow the validation losses of a run: fed, kept with its checkpoints, restored."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from stagewise.errors import InputError, TrainingDiverged
from stagewise.losses.multitask import CoBaWeights, SelfPacedWeights

# Where trainer_state.json has the state, among that of callbacks: it is saved when the rest is, or not at all.
STATE = "task_weights"


class FollowValidation(TrainerCallback):
    """Feeds a scheme with the tasks' validation losses while the run trains.

    All processes get the same losses from an evaluation, so they come to the same weights without asking each other.

    Args:
        mode: the scheme's name, which a resumed run must share.
        names: of the tasks, in the scheme's order.
        scheme: what gets the losses and has the `weights`.
        interval: steps between two updates that call `measure`; None: an update at each evaluation of the run.
        measure: gives the metrics of a validation, as an evaluation with the prefix "eval" would.
    """

    def __init__(
        self,
        mode: str,
        names: Sequence[str],
        scheme: SelfPacedWeights | CoBaWeights,
        interval: int | None,
        measure: Callable[[], Mapping[str, float]],
    ):
        self.mode, self.names, self.scheme = mode, list(names), scheme
        self.interval, self.measure = interval, measure
        self._untouched = scheme.state_dict()
        self._training = False
        self._sound_step = 0  # the last whose losses were numbers

    def on_train_begin(self, args, state, control, **kwargs):
        # a run begins anew in the same process where it looks for a batch size that fits
        found = state.stateful_callbacks.get(STATE) if state.global_step else self._state(self._untouched)
        expected = {"mode": self.mode, "tasks": self.names}
        if found is None or {key: found[key] for key in expected} != expected:
            trained = f"{found['mode']} of {', '.join(found['tasks'])}" if found else "no such weights"
            raise InputError(
                f"--weighted_loss_mode {self.mode} of {', '.join(self.names)}: the checkpoint that is resumed was "
                f"trained with {trained}; pass the mode and the data sets of that run, or start anew"
            )
        self.scheme.load_state_dict(found["state"])
        state.stateful_callbacks[STATE] = found  # a checkpoint may come before the first validation
        self._training, self._sound_step = True, state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if self.interval is not None and state.global_step % self.interval == 0:
            self._update(state, self.measure())

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if self.interval is None and self._training:  # a trained model is evaluated once more; nothing follows that
            self._update(state, metrics)

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False

    def _update(self, state, metrics: Mapping[str, float]) -> None:
        losses = [metrics.get(f"eval_{name}_loss", math.nan) for name in self.names]
        try:
            self.scheme.update(losses)
        except ValueError as error:
            raise TrainingDiverged(
                f"--weighted_loss_mode {self.mode}, step {state.global_step}: {error}", self._sound_step
            ) from error
        self._sound_step = state.global_step
        state.stateful_callbacks[STATE] = self._state(self.scheme.state_dict())

    def _state(self, scheme: dict[str, Any]) -> dict[str, Any]:
        return {"mode": self.mode, "tasks": self.names, "state": scheme}
