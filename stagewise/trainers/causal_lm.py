"""The Trainer of PT and SFT: exact token weighting in training and evaluation."""

import math
import time

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer

from stagewise.data.tasks import TaskPlan
from stagewise.distributed import groups_of_rows
from stagewise.losses.multitask import task_counts, token_weights
from stagewise.modeling.sequence_parallel import shards_of, sharing_rows
from stagewise.trainers.stage import DATASET_ID, NUM_TOKENS, SAMPLE_IDS, StageTrainerMixin
from stagewise.trainers.task_weights import FollowValidation


class CausalLMTrainer(StageTrainerMixin, Trainer):
    """Trains on means that do not depend on how a batch is cut, evaluates on the token mean of the whole set.

    The mean over tokens is what the model's forward pass makes of num_items_in_batch, the trained tokens of a step on
    all processes. Other means (see stagewise.losses.multitask) reach it as weights of single tokens, which are known
    once the batches of a step are there, because they depend on them through counts alone.

    The model's forward pass must be the one of stagewise.modeling.token_loss.

    Args:
        dataset_names: names that `dataset_id` in a batch refers to, those that are trained first; where the evaluation
            set mixes several, each has its own loss and perplexity in the report, and where training does, its own
            loss in the log.
        tasks: how the loss weighs the data sets; None: every token alike.
        min_lr: see StageTrainerMixin.
    """

    def __init__(self, *args, dataset_names: tuple[str, ...] = (), tasks: TaskPlan | None = None, **kwargs):
        super().__init__(*args, compute_metrics=self._evaluation_metrics, **kwargs)
        self.dataset_names = dataset_names
        self.tasks = tasks or TaskPlan(dataset_names)
        assert self.tasks.names == dataset_names[: len(self.tasks.names)]
        self.task_weights = self.tasks.weights  # of the step in hand; None: alike
        if self.tasks.scheme is not None:
            follow = FollowValidation(
                self.tasks.mode, self.tasks.names, self.tasks.scheme, self.tasks.update_interval, self._measure_tasks
            )
            self.add_callback(follow)
        self.model_accepts_loss_kwargs = True  # forward divides by num_items_in_batch
        self._router_losses: list[Tensor] = []  # of the batches since the last log, where there are routers
        self._task_sums: Tensor | None = None  # since the last log: nll and trained tokens of each task
        self._task_rows: DataLoader | None = None  # what the tasks are measured on between evaluations
        self.label_smoother = None  # the model's own loss smooths
        base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        self.row_shards = shards_of(base)  # where processes share rows

    def get_cp_size(self) -> int:
        """How many processes have the same batch: the Trainer counts rows and tokens of a step by it."""
        return self.args.world_size // groups_of_rows(self.args)

    def get_train_dataloader(self):
        with sharing_rows(self.accelerator, self.row_shards):
            return super().get_train_dataloader()

    def count_tokens(self, num_tokens: Tensor | None) -> None:
        if self.row_shards is None or self.row_shards.rank == 0:  # the others have the same rows
            super().count_tokens(num_tokens)

    def floating_point_ops(self, inputs) -> int:
        return super().floating_point_ops(inputs) // self.get_cp_size()

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one step, with the weights of their tokens where these differ.

        In the scope "micro" the number of trained tokens is kept back: each micro-batch then has a mean of its own,
        and the Trainer takes the mean of those.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.tasks.weighs_tokens:
            self._weigh_tokens(batches, device)
        return batches, num_items if self.tasks.scope == "global" else None

    def _weigh_tokens(self, batches: list[dict], device: torch.device) -> None:
        if self.tasks.scheme is not None:
            self.task_weights = tuple(self.tasks.scheme.weights)
        weights = None if self.task_weights is None else torch.tensor(self.task_weights)
        places = [(batch["labels"], batch[SAMPLE_IDS], batch[DATASET_ID][:, None]) for batch in batches]
        names = self.tasks.names
        counts = [task_counts(*place, len(names)).to(device) for place in places]
        if self.tasks.scope == "global":
            total = sum(counts, torch.zeros(2, len(names), dtype=torch.long, device=device))
            if self.args.average_tokens_across_devices:  # compute_loss multiplies by the processes then
                total = self.accelerator.gather(total[None]).sum(0)
            counts = [total] * len(batches)
        for batch, place, count in zip(batches, places, counts, strict=True):
            batch["token_weights"] = token_weights(*place, count, self.tasks.mode, weights)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        self.count_tokens(inputs.pop(NUM_TOKENS, None))
        inputs.pop(SAMPLE_IDS, None)
        dataset_ids = inputs.pop(DATASET_ID, None)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.model.training and len(self.tasks.names) > 1:
            self._add_to_tasks(dataset_ids, outputs)
        if outputs.get("router_loss") is not None:
            self._router_losses.append(outputs["router_loss"])
        return (loss, outputs) if return_outputs else loss

    def _add_to_tasks(self, dataset_ids: Tensor, outputs) -> None:
        sums = torch.stack([outputs["row_nll"], outputs["row_tokens"].to(outputs["row_nll"].dtype)])
        if self._task_sums is None:
            self._task_sums = sums.new_zeros(2, len(self.tasks.names))
        self._task_sums.index_add_(1, dataset_ids, sums)

    def log(self, logs, start_time=None):
        if "loss" in logs and self._router_losses:
            logs["router_loss"] = torch.stack(self._router_losses).mean().item()
            self._router_losses.clear()
        if "loss" in logs and self._task_sums is not None:
            logs |= self._task_figures(self._task_sums)
            self._task_sums = None
        super().log(logs, start_time)

    def _task_figures(self, sums: Tensor) -> dict[str, float]:
        """The mean loss per token of each task that was trained since the last log, on all processes, and the weights
        of the last step where they change."""
        nll, tokens = self.accelerator.gather(sums[None]).sum(0).tolist()
        names = self.tasks.names
        figures = {f"task_loss/{name}": nll[i] / tokens[i] for i, name in enumerate(names) if tokens[i]}
        if self.tasks.scheme is not None and self.task_weights is not None:
            figures |= {f"task_weight/{name}": weight for name, weight in zip(names, self.task_weights, strict=True)}
        return figures

    def curves(self) -> dict[str, list[str]]:
        """What of the log belongs in one plot, for each plot of the tasks; nothing where there is only one."""
        names = self.tasks.names
        if len(names) < 2:
            return {}
        curves = {
            "training loss of each task": [f"task_loss/{name}" for name in names],
            "validation loss of each task": [f"eval_{name}_loss" for name in names],
        }
        if self.tasks.scheme is not None:
            curves["weight of each task"] = [f"task_weight/{name}" for name in names]
        return curves

    def _measure_tasks(self) -> dict[str, float]:
        """The tasks' validation losses between evaluations: nothing is logged, no best model is looked for."""
        started = time.perf_counter()
        if self._task_rows is None:
            # not get_eval_dataloader, which may keep it for the next evaluation
            self._task_rows = self.get_test_dataloader(self.tasks.update_rows(self.eval_dataset))
        output = self.evaluation_loop(self._task_rows, "Task weights", metric_key_prefix="eval")
        self._paused_s += time.perf_counter() - started
        return output.metrics

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Returns (None, (negative log-likelihoods, counts) of each row's trained tokens, dataset ids), (B,) each."""
        inputs, shards = self._prepare_inputs(inputs), self.row_shards
        batches = [inputs] if shards is None else shards.batches(inputs)  # each process has rows of its own here
        found = []
        for batch in batches:
            with torch.no_grad(), self.compute_loss_context_manager():
                _, outputs = self.compute_loss(model, batch, return_outputs=True)
            stats = (outputs["row_nll"], outputs["row_tokens"])
            found.append(stats if shards is None else tuple(map(shards.total, stats)))
        stats = found[0 if shards is None else shards.rank]
        return None, stats, inputs.get(DATASET_ID, torch.zeros_like(stats[1]))

    def _evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        nll, tokens = (np.asarray(found).reshape(-1).astype(np.float64) for found in prediction.predictions)
        self.name_rows_without_loss(np.isfinite(nll))
        metrics = _token_mean("", nll, tokens)
        ids = np.asarray(prediction.label_ids).reshape(-1)
        evaluated = np.unique(ids)
        if len(evaluated) > 1:
            for index in evaluated:
                metrics |= _token_mean(f"{self.dataset_names[index]}_", nll[ids == index], tokens[ids == index])
        return metrics


def _token_mean(prefix: str, nll: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    if tokens.sum() == 0:
        return {}
    loss = float(nll.sum() / tokens.sum())
    return {
        f"{prefix}loss": loss,
        f"{prefix}perplexity": math.inf if loss >= 700 else math.exp(loss),  # not a number stays that
        f"{prefix}tokens": int(tokens.sum()),
    }
