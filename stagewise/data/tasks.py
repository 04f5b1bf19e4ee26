"""The data sets of a run as tasks: how the training loss weighs them, from MultitaskArguments."""

import math
from collections.abc import Sized
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from stagewise.arguments import DataArguments
from stagewise.data import sources
from stagewise.data.streaming import RowStream
from stagewise.errors import InputError
from stagewise.losses.multitask import AVERAGES, CoBaWeights, SelfPacedWeights
from stagewise.multitask_arguments import FOLLOWING, MultitaskArguments


@dataclass(frozen=True)
class TaskPlan:
    """How the loss weighs the data sets.

    names: of the data sets that are trained, the tasks, in the order of --train_file_dir.
    mode: a key of AVERAGES; scope: "global" or "micro".
    weights: one for each name, or None for equal ones.
    scheme: what sets the weights as the run goes on, or None.
    update_interval: steps from one update of the scheme to the next; None: at each evaluation.
    update_samples: validation rows of each task that such an update takes; None: all.
    """

    names: tuple[str, ...]
    mode: str = "case1"
    scope: str = "global"
    weights: tuple[float, ...] | None = None
    scheme: SelfPacedWeights | CoBaWeights | None = None
    update_interval: int | None = None
    update_samples: int | None = None

    @property
    def weighs_tokens(self) -> bool:
        """Whether tokens of a batch may weigh differently."""
        return AVERAGES[self.mode] != "token"

    def check(self, train: Sized | RowStream, validation: Dataset | None, args) -> None:
        """Refuse a scheme that has no validation rows of a task, or never comes to weigh anything.

        Args:
            train, validation: the rows of the run.
            args: the TrainingArguments.

        Raises:
            InputError: names the tasks; or says how many validations there are, and how many are needed.
        """
        if self.scheme is None:
            return
        there = set() if validation is None else set(validation.unique("dataset"))
        missing = [name for name in self.names if name not in there]
        if missing:
            raise InputError(
                f"--weighted_loss_mode {self.mode}: follows the validation loss of every task, and "
                f"{', '.join(missing)} has no validation row; name a folder or file of the same name in "
                "--validation_file_dir (without it rows of each are held out), and leave --max_eval_samples at -1"
            )
        if isinstance(self.scheme, CoBaWeights):
            needed, flag = self.scheme.warmup, "--coba_warmup_steps"
        else:
            needed, flag = self.scheme.history_length, "--selfpaced_history_length"
        updates = self._updates(train, args)
        if updates is not None and updates < needed:
            raise InputError(
                f"--weighted_loss_mode {self.mode}: weighs the tasks from validation {needed} on, and this run has "
                f"{updates} before its last step; lower {flag}, or --task_update_interval (or --eval_steps), or train "
                "longer"
            )

    def _updates(self, train: Sized | RowStream, args) -> int | None:
        """Updates of the scheme before the last step; None where nobody knows how long an epoch is."""
        epoch = None
        if isinstance(train, Sized):
            batches = len(train) / (args.per_device_train_batch_size * args.world_size)
            whole = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
            epoch = max(1, math.ceil(whole / args.gradient_accumulation_steps))
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * (epoch or 1))
        if self.update_interval is not None:
            return (steps - 1) // self.update_interval
        every = epoch
        if args.eval_strategy == "steps":
            every = math.ceil(steps * args.eval_steps) if args.eval_steps < 1 else int(args.eval_steps)
        return None if every is None else (steps - 1) // every + bool(args.eval_on_start)

    def update_rows(self, validation: Dataset) -> Dataset:
        """The rows that an update between evaluations takes: the first `update_samples` of each task."""
        names = np.asarray(validation["dataset"][:])
        members = [np.flatnonzero(names == name)[: self.update_samples] for name in self.names]
        return validation.select(np.sort(np.concatenate(members)))


def plan_tasks(multitask: MultitaskArguments, data: DataArguments, args) -> TaskPlan:
    """What the flags ask for, checked against the names of the data sets and the evaluations of the run.

    Args:
        args: the TrainingArguments.

    Raises:
        InputError: weights that fit no data set; weights, or a mode that sets them, for a single data set; a mode that
            follows validation losses in a run that has none.
    """
    mode, names = multitask.weighted_loss_mode, _task_names(data)
    if mode in FOLLOWING or multitask.task_weights is not None:
        flag = f"--weighted_loss_mode {mode}" if mode in FOLLOWING else "--task_weights"
        if len(names) == 1:
            raise InputError(
                f"{flag}: weighs tasks against each other, and {names[0]} is the only one; give several data sets to "
                "--train_file_dir, or leave it out"
            )
    if mode in FOLLOWING and args.do_train:
        _check_evaluations(multitask, args)
    return TaskPlan(
        names,
        mode,
        multitask.loss_scope,
        _parse_weights(multitask.task_weights, names),
        _scheme(multitask, len(names)) if args.do_train else None,
        multitask.task_update_interval,
        multitask.task_update_samples,
    )


def _task_names(data: DataArguments) -> tuple[str, ...]:
    if data.train_file_dir:
        return sources.source_names(data.train_file_dir)
    return (sources.hub_name(data.dataset_name or ""),)


def _check_evaluations(multitask: MultitaskArguments, args) -> None:
    flag = f"--weighted_loss_mode {multitask.weighted_loss_mode}"
    if not args.do_eval:
        raise InputError(f"{flag}: follows validation losses, and --do_eval is off; turn it on")
    if multitask.task_update_interval is None and args.eval_strategy == "no":
        raise InputError(
            f"{flag}: follows validation losses, and the run takes none; pass --eval_strategy steps and --eval_steps, "
            "or --task_update_interval"
        )


def _parse_weights(text: str | None, names: tuple[str, ...]) -> tuple[float, ...] | None:
    """Weights given as "3,1", in the order of `names`, or as "law=3,code=1", where a task that is not named has 1."""
    if text is None:
        return None
    parts = [part.strip() for part in text.strip().removeprefix("[").removesuffix("]").split(",")]
    named = [part.rpartition("=") for part in parts]
    try:
        found = [float(value) for _, _, value in named]
    except ValueError:
        found = [math.nan]
    if not all(0 <= weight < math.inf for weight in found) or len({sign for _, sign, _ in named}) > 1:
        raise InputError(f"--task_weights: found {text!r}, expected numbers, 0 or more, such as 3,1 or law=3,code=1")
    if not named[0][1]:
        if len(found) != len(names):
            raise InputError(
                f"--task_weights: found {text!r}, expected one weight for each of the {len(names)} data sets of "
                f"--train_file_dir: {', '.join(names)}"
            )
        weights = tuple(found)
    else:
        by_name = {name.strip(): weight for (name, _, _), weight in zip(named, found, strict=True)}
        unknown = [name for name in by_name if name not in names]
        if unknown or len(by_name) < len(found):
            what = f"{', '.join(unknown)} is no data set" if unknown else "a data set is named twice"
            raise InputError(f"--task_weights: found {text!r}, but {what}; there is {', '.join(names)}")
        weights = tuple(by_name.get(name, 1.0) for name in names)
    if not any(weights):
        raise InputError(f"--task_weights: found {text!r}, where nothing has any weight; expected one above 0")
    return weights


def _scheme(multitask: MultitaskArguments, tasks: int) -> SelfPacedWeights | CoBaWeights | None:
    if multitask.weighted_loss_mode == "coba":
        return CoBaWeights(
            tasks,
            int(multitask.setting("coba_warmup_steps")),
            int(multitask.setting("coba_history_length")),
            multitask.setting("coba_tau"),
        )
    if multitask.weighted_loss_mode == "selfpaced":
        return SelfPacedWeights(
            tasks,
            int(multitask.setting("selfpaced_history_length")),
            multitask.setting("selfpaced_scale_factor"),
        )
    return None
