"""The Trainer of PT and SFT: exact token weighting in training and evaluation."""

import math

import numpy as np
import torch
from transformers import EvalPrediction, Trainer

from stagewise.errors import InputError
from stagewise.modeling.liger import liger_config
from stagewise.trainers.stage import DATASET_ID, NUM_TOKENS, StageTrainerMixin


class CausalLMTrainer(StageTrainerMixin, Trainer):
    """Trains on token means that do not depend on how a batch is cut, evaluates on the token mean of the whole set.

    The model's forward pass must be the one of stagewise.modeling.token_loss.

    Args:
        dataset_names: names that `dataset_id` in a batch refers to; where the evaluation set mixes several, each has
            its own loss and perplexity in the report.
        min_lr: see StageTrainerMixin.
    """

    def __init__(self, *args, dataset_names: tuple[str, ...] = (), **kwargs):
        arguments = kwargs["args"]
        if arguments.batch_eval_metrics:
            raise InputError("--batch_eval_metrics: there are no logits to evaluate in batches; leave the flag out")
        if arguments.use_liger_kernel:
            arguments.liger_kernel_config = liger_config(arguments.liger_kernel_config)
        super().__init__(*args, compute_metrics=self._evaluation_metrics, **kwargs)
        self.dataset_names = dataset_names
        self.model_accepts_loss_kwargs = True  # forward divides by num_items_in_batch
        self._router_losses: list[torch.Tensor] = []  # of the batches since the last log, where there are routers
        self.label_smoother = None  # the model's own loss smooths

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        self.count_tokens(inputs.pop(NUM_TOKENS, None))
        inputs.pop(DATASET_ID, None)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if outputs.get("router_loss") is not None:
            self._router_losses.append(outputs["router_loss"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        if "loss" in logs and self._router_losses:
            logs["router_loss"] = torch.stack(self._router_losses).mean().item()
            self._router_losses.clear()
        super().log(logs, start_time)

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


def _token_mean(prefix: str, nll: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    if tokens.sum() == 0:
        return {}
    loss = float(nll.sum() / tokens.sum())
    return {
        f"{prefix}loss": loss,
        f"{prefix}perplexity": math.exp(loss) if loss < 700 else math.inf,
        f"{prefix}tokens": int(tokens.sum()),
    }
