"""The Trainer of the reward model: chosen and rejected in one forward, weighted pair by pair."""

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction, Trainer

from stagewise.losses.preference import pairwise_reward_loss
from stagewise.trainers.stage import DATASET_ID, NUM_TOKENS, StageTrainerMixin


class PairwiseRewardTrainer(StageTrainerMixin, Trainer):
    """Trains on the mean over the pairs of the whole accumulated batch, evaluates on the mean over the whole set.

    Batches are those of stagewise.data.collators.PairwiseCollator; the model is one with a score head.

    Args:
        center_coefficient: weight of the term that keeps the scores of a pair around 0.
        dataset_names: names that `dataset_id` in a batch refers to; where the evaluation set mixes several, each has
            its own figures in the report.

    Attributes:
        chosen_scores, rejected_scores: (N,), of the last evaluation; None before it.
    """

    def __init__(self, *args, center_coefficient: float = 0.0, dataset_names: tuple[str, ...] = (), **kwargs):
        super().__init__(*args, compute_metrics=self._evaluation_metrics, **kwargs)
        self.center_coefficient = center_coefficient
        self.dataset_names = dataset_names
        self.chosen_scores: np.ndarray | None = None
        self.rejected_scores: np.ndarray | None = None
        self.model_accepts_loss_kwargs = True  # compute_loss divides by num_items_in_batch

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one step, and the pairs in them on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs = torch.tensor(sum(len(batch["margin"]) for batch in batches), device=device)
        return batches, self.accelerator.gather(pairs.reshape(1)).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        self.count_tokens(inputs.pop(NUM_TOKENS, None))
        inputs.pop(DATASET_ID, None)
        margin = inputs.pop("margin")
        chosen, rejected = self._scores(model, inputs)
        loss = pairwise_reward_loss(chosen, rejected, margin, self.center_coefficient, num_items_in_batch)
        if num_items_in_batch is not None:
            # the sum of these losses over the processes is the mean, and what averages them divides once more
            loss = loss * self.accelerator.num_processes
        return (loss, {"scores": torch.stack([chosen, rejected], dim=1)}) if return_outputs else loss

    @staticmethod
    def _scores(model, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The scores of the chosen and of the rejected rows, (B,) each."""
        scores = model(**inputs, use_cache=False).logits.squeeze(-1).float()
        chosen, rejected = scores.chunk(2)
        return chosen, rejected

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Returns (None, (B, 2) scores of chosen and rejected, (B, 2) margin and dataset id)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return None, outputs["scores"], torch.stack([inputs["margin"], inputs[DATASET_ID].float()], dim=1)

    def _evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        chosen, rejected = np.asarray(prediction.predictions).reshape(-1, 2).T
        margins, ids = np.asarray(prediction.label_ids).reshape(-1, 2).T
        self.chosen_scores, self.rejected_scores = chosen, rejected
        self.name_rows_without_loss(np.isfinite(chosen) & np.isfinite(rejected))
        metrics = self._figures("", chosen, rejected, margins)
        evaluated = np.unique(ids)
        if len(evaluated) > 1:
            for index in evaluated:
                rows = ids == index
                name = f"{self.dataset_names[int(index)]}_"
                metrics |= self._figures(name, chosen[rows], rejected[rows], margins[rows])
        return metrics

    def _figures(self, prefix: str, chosen: np.ndarray, rejected: np.ndarray, margins: np.ndarray) -> dict:
        tensors = [torch.from_numpy(figures) for figures in (chosen, rejected, margins)]
        loss = pairwise_reward_loss(tensors[0], tensors[1], tensors[2], self.center_coefficient)
        return {
            f"{prefix}loss": loss.item(),
            f"{prefix}accuracy": float((chosen > rejected).mean()),
            f"{prefix}margin": float((chosen - rejected).mean()),
            f"{prefix}chosen_score": float(chosen.mean()),
            f"{prefix}rejected_score": float(rejected.mean()),
        }
