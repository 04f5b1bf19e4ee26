"""What the Trainer of every stage does: throughput in the log, a floor of the learning rate, noise on embeddings."""

import dataclasses
import logging
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from stagewise.checkpoint_files import PARTIAL, publish, saving, seal
from stagewise.data.collators import LOCATION, WithLocations
from stagewise.data.streaming import POSITION
from stagewise.modeling.neftune import embedding_noise
from stagewise.modeling.sharded import settle_sharded
from stagewise.trainers.step_guard import NAMED_ROWS, StepGuard

logger = logging.getLogger(__name__)

# What collators add beside the model's inputs.
NUM_TOKENS = "num_tokens"  # real tokens of each row, padding not counted
DATASET_ID = "dataset_id"  # (B,), index into `dataset_names`
SAMPLE_IDS = "sample_ids"  # (B, T), which sample of its row a token belongs to

if TYPE_CHECKING:  # the mixin calls what the Trainer behind it has
    from transformers import Trainer as _Base
else:
    _Base = object


class StageTrainerMixin(_Base):
    """Stands in front of a Trainer class: `class CausalLMTrainer(StageTrainerMixin, Trainer)`.

    Throughput (`tokens_per_second`) counts real tokens of all processes over wall-clock time without evaluations and
    checkpoints; the class's compute_loss hands them to `count_tokens`. `mfu` is its share of `full_speed`.

    Args:
        min_lr: the learning rate never falls below it: lr = max(schedule, min_lr).
        on_nan, max_loss: see StepGuard.
    """

    def __init__(
        self, *args, min_lr: float | None = None, on_nan: str = "stop", max_loss: float | None = None, **kwargs
    ):
        arguments = kwargs["args"]
        arguments.remove_unused_columns = False  # the collator picks what the model gets
        arguments.logging_nan_inf_filter = False  # it would hide a loss, and wait for the device in every micro-batch
        super().__init__(*args, **kwargs)
        settle_sharded(self.model)
        self.step_guard = StepGuard(on_nan, max_loss, gradients_may_overflow=self.args.fp16)
        self.neftune_noise_alpha = None  # the noise is ours, see train
        self.min_lr = min_lr
        self.full_speed: float | None = None  # tokens a second of a device that did nothing but multiply, if known
        # called with the folder of a checkpoint while it is written, on the process that saves
        self.checkpoint_writers: list[Callable[[Path], object]] = []
        self.stream_position: str | None = None  # after the step in hand, of a stream of rows
        self._run_dir: str | None = None  # where a checkpoint is being written
        self._new_tokens: Tensor | None = None  # since the last log; on the device
        self._loss_before: Tensor | None = None  # the Trainer's sum of losses before the step in hand
        self._clock = time.perf_counter()
        self._paused_s = 0.0

    def create_accelerator_and_postprocess(self) -> None:
        """FSDP 2 in 16 bits casts parameters, but neither what goes into a model (token weights) nor what comes out
        of it (losses, log-probabilities); gradients of the processes are summed up in float32, as without FSDP.
        """
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = dataclasses.replace(
                plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
            )

    def count_tokens(self, num_tokens: Tensor | None) -> None:
        """Add the real tokens of a training batch, given row by row; those of an evaluation are not counted."""
        if num_tokens is not None and self.model.training:
            # stays on the device: no synchronisation before the next log
            total = num_tokens.sum()
            self._new_tokens = total if self._new_tokens is None else self._new_tokens + total

    def train(self, *args, **kwargs):
        with embedding_noise(self.model, self.args.neftune_noise_alpha):
            return super().train(*args, **kwargs)

    def create_scheduler(self, num_training_steps, optimizer=None):
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.min_lr is not None and not getattr(scheduler, "has_floor", False):
            assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)  # others take no floor: check_start
            scheduler.lr_lambdas = [
                _with_floor(schedule, self.min_lr / base)
                for schedule, base in zip(scheduler.lr_lambdas, scheduler.base_lrs, strict=True)
            ]
            scheduler.has_floor = True
        return scheduler

    def evaluate(self, *args, **kwargs):
        started = time.perf_counter()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._paused_s += time.perf_counter() - started

    def name_rows_without_loss(self, finite: np.ndarray) -> None:
        """Say in the log which rows of the evaluation in hand have no finite loss.

        Args:
            finite: (rows,), in the order of the data set.
        """
        rows = self.callback_handler.eval_dataloader.dataset
        if finite.all() or not self.is_world_process_zero():
            return
        in_order = self.args.train_sampling_strategy != "group_by_length" and len(rows) == len(finite)
        bad = np.flatnonzero(~finite)
        places = [rows[int(row)].get(LOCATION, f"row {row + 1}") for row in bad[:NAMED_ROWS]] if in_order else []
        more = f" and {len(bad) - NAMED_ROWS} more" if in_order and len(bad) > NAMED_ROWS else ""
        logger.warning(
            "evaluation: the loss of %d of %d rows is not finite%s", len(bad), len(finite),
            f": {', '.join(places)}{more}" if places else "",
        )  # fmt: skip

    def _save_checkpoint(self, model, trial):
        """The Trainer's, but complete or not there: written in a folder beside, sealed, renamed.

        Raises:
            SaveFailed: it could not be written; what was written of it is deleted, earlier checkpoints stay.
        """
        started = time.perf_counter()
        run_dir = Path(self.args.output_dir)
        final = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.machines.keeps:
            shutil.rmtree(run_dir / PARTIAL, ignore_errors=True)  # of a run that was killed while it saved
        self.accelerator.wait_for_everyone()
        with saving(final.name, run_dir) as partial:
            self._write_checkpoint(model, trial, partial / final.name, final)
        self.accelerator.wait_for_everyone()
        if self.args.machines.keeps:
            rotate_checkpoints(
                str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
        self._paused_s += time.perf_counter() - started

    def _write_checkpoint(self, model, trial, partial: Path, final: Path) -> None:
        run_dir, self._run_dir = self._run_dir, str(partial.parent)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._run_dir = run_dir
        if self.state.best_global_step == self.state.global_step:  # known without looking, so on every process
            self.state.best_model_checkpoint = str(final)
        if self.args.should_save:
            self.state.save_to_json(str(partial / "trainer_state.json"))
            for write in self.checkpoint_writers:
                write(partial)
        machines = self.args.machines
        machines.mirror(partial, self.args.device)
        if machines.keeps and not self.args.should_save:
            self._name_own_best(partial / "trainer_state.json")
        written = machines.names_below(partial)
        self.accelerator.wait_for_everyone()  # every process has written its part
        if machines.keeps:
            seal(partial, written)
            publish(partial, final)
            shutil.rmtree(partial.parent, ignore_errors=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _name_own_best(self, path: Path) -> None:
        """In a state that another machine has written: where the best checkpoint lies on this one."""
        state = TrainerState.load_from_json(str(path))
        state.best_model_checkpoint = self.state.best_model_checkpoint
        state.save_to_json(str(path))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """An upload runs on beside the training: it is begun when the folder has got its name."""
        if self._run_dir is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _get_output_dir(self, trial) -> str:
        return self._run_dir or super()._get_output_dir(trial)

    def log(self, logs, start_time=None):
        if "loss" in logs and self._new_tokens is not None:
            logs |= self._throughput(self._new_tokens)
        if "loss" in logs:
            self._leave_out_skipped(logs)
        super().log(logs, start_time)

    def _leave_out_skipped(self, logs: dict[str, float]) -> None:
        """The mean loss of the steps since the last log is that of those that were taken."""
        taken, skipped = self.step_guard.count()
        if skipped:
            logs["loss"] *= (taken + skipped) / taken if taken else math.nan
            logs["skipped_steps"] = skipped

    def _throughput(self, new_tokens: Tensor) -> dict[str, float]:
        tokens = int(self.accelerator.gather(new_tokens.reshape(1)).sum())
        now = time.perf_counter()
        seconds = now - self._clock - self._paused_s
        self._clock, self._paused_s, self._new_tokens = now, 0.0, None
        self.state.num_input_tokens_seen += tokens
        speed = tokens / max(seconds, 1e-9)
        figures = {"tokens_per_second": round(speed, 1), "num_tokens": self.state.num_input_tokens_seen}
        if self.full_speed is not None:
            figures["mfu"] = round(speed / (self.full_speed * self.args.world_size), 4)
        return figures

    def start_clock(self) -> None:
        """Called when the work of a step begins."""
        if self._new_tokens is None:  # the first step after a log (or after the start)
            self._new_tokens = torch.zeros((), dtype=torch.long, device=self.args.device)
            if self.state.global_step == self._initial_global_step:
                self._clock, self._paused_s = time.perf_counter(), 0.0

    def _prepare_input(self, data):
        """To the device, and no more: under DeepSpeed the Trainer rounds all numbers to 16 bits, and ours are weights
        of tokens, margins, log-probabilities; nothing that a model multiplies."""
        if isinstance(data, Tensor):
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def get_train_dataloader(self):
        collate = self.data_collator  # type: ignore[has-type]
        self.data_collator = WithLocations(collate)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def training_step(self, model, inputs, *args, **kwargs):
        self.start_clock()
        if not self.step_guard.in_step:
            self._loss_before = self._tr_loss.clone()
        locations = inputs.pop(LOCATION, None)
        self.stream_position = inputs.pop(POSITION, None)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.step_guard.add(loss, locations)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """The Trainer's, which it asks for between the gradients and the optimizer's step; a bad step loses its
        gradients here, and an optimizer leaves weights without a gradient, and what it knows of them, as they are.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if self.step_guard.is_bad(grad_norm, self.accelerator, self.state.global_step):
            model.zero_grad()
            self._tr_loss.copy_(self._loss_before)
        return grad_norm


def _with_floor(schedule, floor: float):
    """A schedule's factor, not below `floor`. A plain function: LambdaLR keeps those out of the checkpoint."""

    def factor(step: int) -> float:
        return max(schedule(step), floor)

    return factor
