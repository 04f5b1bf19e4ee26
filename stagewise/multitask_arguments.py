"""The flags of the multi-task loss, which PT and SFT share; as light as their scripts, which inherit from it."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from stagewise.errors import InputError

MODES = Literal[
    "case1", "case2", "case3", "case4", "selfpaced", "coba", "token", "sample", "task_token", "task_sample"
]
# Modes whose averages are over tasks, each with a weight that the user may give.
TASK_MEANS = ("case3", "case4", "task_token", "task_sample")
# Modes that set the weights themselves, from the tasks' validation losses; each has settings of its own.
FOLLOWING = ("selfpaced", "coba")
DEFAULTS = {
    "coba_warmup_steps": 100,
    "coba_history_length": 200,
    "coba_tau": 5.0,
    "selfpaced_history_length": 100,
    "selfpaced_scale_factor": 50.0,
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text, "group": "multi-task loss"})


@dataclass
class MultitaskArguments:
    """What the training loss is an average of, where each data set is a task."""

    weighted_loss_mode: MODES = _option(
        "case1",
        "The loss is a mean over tokens (case1), samples (case2), tasks by their tokens (case3) or by their samples "
        "(case4), or one over tasks whose weights follow their validation losses (selfpaced, coba).",
    )
    loss_scope: Literal["global", "micro"] = _option(
        "global",
        "Means over the whole batch of a step, however it is cut, or over each micro-batch alone (MFTCoder's way).",
    )
    task_weights: str | None = _option(
        None, "Weights of the tasks for case3 and case4: 3,1 in the order of --train_file_dir, or law=3,code=1."
    )
    task_update_interval: int | None = _option(
        None, "selfpaced, coba: take the tasks' validation losses every N steps; unset: at each evaluation."
    )
    task_update_samples: int | None = _option(
        None, "Rows of each task that --task_update_interval takes them on, the first ones; unset: all."
    )
    coba_warmup_steps: int | None = _option(
        None, "coba: all tasks weigh the same before so many validations, at least 3; unset: 100."
    )
    coba_history_length: int | None = _option(None, "coba: validations that count, the last ones; unset: 200.")
    coba_tau: float | None = _option(None, "coba: how sharply a diverging task is told; unset: 5.")
    selfpaced_history_length: int | None = _option(
        None, "selfpaced: validations that count, before so many all tasks weigh the same; unset: 100."
    )
    selfpaced_scale_factor: float | None = _option(None, "selfpaced: how sharply the weights differ; unset: 50.")

    def __post_init__(self) -> None:
        self._check_weights()
        self._check_updates()
        self._check_settings()

    def setting(self, name: str) -> float | int:
        """The value of a setting of coba or selfpaced, given or not."""
        found = getattr(self, name)
        return DEFAULTS[name] if found is None else found

    def _check_weights(self) -> None:
        mode = self.weighted_loss_mode
        if self.task_weights is not None and mode not in TASK_MEANS:
            why = "sets the weights itself" if mode in FOLLOWING else "is no mean over tasks"
            raise InputError(f"--task_weights: --weighted_loss_mode {mode} {why}; use case3 or case4, or leave it out")

    def _check_updates(self) -> None:
        for name in ("task_update_interval", "task_update_samples"):
            found = getattr(self, name)
            if found is not None and found < 1:
                raise InputError(f"--{name}: found {found}, expected 1 or more")
            if found is not None and self.weighted_loss_mode not in FOLLOWING:
                raise InputError(
                    f"--{name}: --weighted_loss_mode {self.weighted_loss_mode} follows no validation losses; use "
                    "selfpaced or coba, or leave it out"
                )
        if self.task_update_samples is not None and self.task_update_interval is None:
            raise InputError(
                "--task_update_samples: an evaluation takes all rows (--max_eval_samples limits them); give "
                "--task_update_interval as well"
            )

    def _check_settings(self) -> None:
        for name in DEFAULTS:
            owner = name.split("_")[0]
            if getattr(self, name) is not None and self.weighted_loss_mode != owner:
                raise InputError(f"--{name}: is of --weighted_loss_mode {owner}; give that as well, or leave it out")
        warmup, history = self.setting("coba_warmup_steps"), self.setting("coba_history_length")
        for name, fits, expected in (
            ("coba_warmup_steps", warmup >= 3, "3 or more validations, for a slope behind the first"),
            ("coba_history_length", history >= warmup, f"no less than --coba_warmup_steps, which is {warmup}"),
            ("coba_tau", 0 < self.setting("coba_tau") < math.inf, "a number above 0"),
            ("selfpaced_history_length", self.setting("selfpaced_history_length") >= 2, "2 or more, for a slope"),
            ("selfpaced_scale_factor", 0 < self.setting("selfpaced_scale_factor") < math.inf, "a number above 0"),
        ):
            if not fits:
                raise InputError(f"--{name}: found {self.setting(name)}, expected {expected}")
