"""The Trainer of PT and SFT: exact token weighting in training and evaluation, and throughput in the log."""

import math
import time

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction, Trainer

from stagewise.errors import InputError

# What collators add beside the model's inputs: (B,) each.
NUM_TOKENS = "num_tokens"  # real tokens of a row, padding not counted
DATASET_ID = "dataset_id"  # index into `dataset_names`


class CausalLMTrainer(Trainer):
    """Trains on token means that do not depend on how a batch is cut, evaluates on the token mean of the whole set.

    The model's forward pass must be the one of stagewise.modeling.token_loss. Throughput (`tokens_per_second`) counts
    real tokens of all processes over wall-clock time without evaluations and checkpoints.

    Args:
        dataset_names: names that `dataset_id` in a batch refers to; where the evaluation set mixes several, each has
            its own loss and perplexity in the report.
        min_lr: the learning rate never falls below it: lr = max(schedule, min_lr).
    """

    def __init__(self, *args, dataset_names: tuple[str, ...] = (), min_lr: float | None = None, **kwargs):
        training_args = kwargs["args"]
        training_args.remove_unused_columns = False  # the collator picks what the model gets
        for flag in ("use_liger_kernel", "batch_eval_metrics"):
            if getattr(training_args, flag):
                raise InputError(f"--{flag}: the loss is computed here, without whole logits; leave the flag out")
        super().__init__(*args, compute_metrics=self._evaluation_metrics, **kwargs)
        self.dataset_names = dataset_names
        self.min_lr = min_lr
        self.model_accepts_loss_kwargs = True  # forward divides by num_items_in_batch
        self.label_smoother = None  # the model's own loss smooths
        self._new_tokens: Tensor | None = None  # since the last log; on the device
        self._clock = time.perf_counter()
        self._paused_s = 0.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        num_tokens = inputs.pop(NUM_TOKENS, None)
        inputs.pop(DATASET_ID, None)
        if model.training and num_tokens is not None:
            # stays on the device: no synchronisation before the next log
            total = num_tokens.sum()
            self._new_tokens = total if self._new_tokens is None else self._new_tokens + total
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Returns (None, (B, 2) negative log-likelihood and count of each row's trained tokens, (B,) dataset ids)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, outputs = self.compute_loss(model, inputs, return_outputs=True)
        stats = torch.stack([outputs["row_nll"].double(), outputs["row_tokens"].double()], dim=1)
        ids = inputs.get(DATASET_ID, torch.zeros(stats.shape[0], dtype=torch.long, device=stats.device))
        return None, stats, ids

    def _evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        nll, tokens = np.asarray(prediction.predictions).reshape(-1, 2).T
        metrics = _token_mean("", nll, tokens)
        ids = np.asarray(prediction.label_ids).reshape(-1)
        evaluated = np.unique(ids)
        if len(evaluated) > 1:
            for index in evaluated:
                metrics |= _token_mean(f"{self.dataset_names[index]}_", nll[ids == index], tokens[ids == index])
        return metrics

    def create_scheduler(self, num_training_steps, optimizer=None):
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.min_lr is not None and not getattr(scheduler, "has_floor", False):
            if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
                raise InputError(f"--min_lr: --lr_scheduler_type {self.args.lr_scheduler_type} takes no floor")
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

    def _save_checkpoint(self, *args, **kwargs):
        started = time.perf_counter()
        super()._save_checkpoint(*args, **kwargs)
        self._paused_s += time.perf_counter() - started

    def log(self, logs, start_time=None):
        if "loss" in logs and self._new_tokens is not None:
            logs |= self._throughput(self._new_tokens)
        super().log(logs, start_time)

    def _throughput(self, new_tokens: Tensor) -> dict[str, float]:
        tokens = int(self.accelerator.gather(new_tokens.reshape(1)).sum())
        now = time.perf_counter()
        seconds = now - self._clock - self._paused_s
        self._clock, self._paused_s, self._new_tokens = now, 0.0, None
        self.state.num_input_tokens_seen += tokens
        return {
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
            "num_tokens": self.state.num_input_tokens_seen,
        }

    def training_step(self, *args, **kwargs):
        if self._new_tokens is None:  # the first step after a log (or after the start)
            self._new_tokens = torch.zeros((), dtype=torch.long, device=self.args.device)
            if self.state.global_step == self._initial_global_step:
                self._clock, self._paused_s = time.perf_counter(), 0.0
        return super().training_step(*args, **kwargs)


def _with_floor(schedule, floor: float):
    """A schedule's factor, not below `floor`. A plain function: LambdaLR keeps those out of the checkpoint."""

    def factor(step: int) -> float:
        return max(schedule(step), floor)

    return factor


def _token_mean(prefix: str, nll: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    if tokens.sum() == 0:
        return {}
    loss = float(nll.sum() / tokens.sum())
    return {
        f"{prefix}loss": loss,
        f"{prefix}perplexity": math.exp(loss) if loss < 700 else math.inf,
        f"{prefix}tokens": int(tokens.sum()),
    }
