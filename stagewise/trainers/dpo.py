"""DPO through trl's DPOTrainer, fed with ids of ours, and checked at its first step."""

import dataclasses
import functools
import logging
import math
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from stagewise.errors import InputError
from stagewise.losses.logprobs import IGNORE_INDEX
from stagewise.modeling.quantization import is_quantized
from stagewise.modeling.randomness import turn_randomness_off
from stagewise.modeling.small_copy import on_small_copy
from stagewise.modeling.token_loss import forward_of
from stagewise.trainers.stage import StageTrainerMixin

logger = logging.getLogger(__name__)

# The loss of a policy that equals its reference; rounding of the two forward passes apart.
FIRST_LOSS_TOLERANCE = 1e-3
FIRST_LOSS_TOLERANCE_LOW_PRECISION = 2e-2


def dpo_config(args: TrainingArguments, **options: Any):
    """trl's DPOConfig with every setting of `args`, and `options` of DPO.

    Rows arrive tokenized and cut, so trl's own max_length is off; dropout is off in both models.

    Raises:
        InputError: trl refuses the combination.
    """
    from huggingface_hub import constants
    from trl import DPOConfig

    constants.HF_HUB_DISABLE_TELEMETRY = True  # trl reports its use; the environment is read when that is imported

    known = {field.name for field in dataclasses.fields(DPOConfig) if field.init}
    values = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(args)
        if field.init and field.name in known
    }
    try:
        # the loss of the routers is another objective, which trl adds unless it is told not to
        config = DPOConfig(**{**values, "max_length": None, "router_aux_loss_coef": 0.0, **options})
    except ValueError as error:
        raise InputError(f"DPO settings: {error}") from error
    config.machines = args.machines  # no field, as who keeps output_dir is no flag
    return config


def dpo_trainer_class() -> type:
    """trl's DPOTrainer for rows of prompt_ids, chosen_ids, rejected_ids.

    With `reference_free` the reference gives every answer the same probability. Otherwise, where the reference is the
    policy's own start, the sigmoid loss of the first step must be -log sigmoid(0) = ln 2: a run that begins elsewhere
    trains against a wrong reference and is stopped.
    """
    from trl import DPOTrainer

    class PreferenceTrainer(StageTrainerMixin, DPOTrainer):
        def __init__(self, *args, reference_free: bool = False, starts_at_reference: bool = True, **kwargs):
            given = {name: parameter.detach().clone() for name, parameter in _trained_on_quantized(kwargs["model"])}
            super().__init__(*args, **kwargs)
            _restore_float32(self.model, given)
            turn_randomness_off(self.model)  # trl does for modules of torch's Dropout alone
            _score_labels(_base_of(self.model))
            if self.ref_model is not None:
                reference = self.accelerator.unwrap_model(self.ref_model)
                if not _trl_scores_as(reference) or _asks_routers(reference):
                    _score_labels(reference)
            self.reference_free = reference_free
            if reference_free:
                self.precompute_ref_logps = True  # taken from the batch, where they are 0
                self.ref_model = None
            sigmoid_only = self.loss_types == ["sigmoid"] and not self.label_smoothing
            self._check_first_loss = starts_at_reference and not reference_free and sigmoid_only

        def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
            return dataset  # rendered, tokenized and cut by stagewise.data.preferences

        def _compute_loss(self, model, inputs, return_outputs):
            self.count_tokens(inputs["attention_mask"].sum(1))
            if self.reference_free:
                pairs = inputs["input_ids"].shape[0] // 2
                zeros = inputs["input_ids"].new_zeros(pairs).float()
                inputs = {**inputs, "ref_chosen_logps": zeros, "ref_rejected_logps": zeros}
            compute = super()._compute_loss
            result = compute(model, inputs, return_outputs)
            if self._check_first_loss and self.model.training:
                self._check_first_loss = False
                if self.state.global_step == 0:
                    found = (result[0] if return_outputs else result).item()
                    _require_ln2(self, found, lambda: compute(model, inputs, False).item())
            return result

    return PreferenceTrainer


def _require_ln2(trainer: Any, found: float, again: Callable[[], float]) -> None:
    """Raises InputError, with the cause, where the first loss is another; again() computes it once more."""
    low = trainer.args.bf16 or trainer.args.fp16
    tolerance = FIRST_LOSS_TOLERANCE_LOW_PRECISION if low else FIRST_LOSS_TOLERANCE

    def is_ln2(loss: float) -> bool:
        return abs(loss - math.log(2)) <= tolerance

    if is_ln2(found):
        return
    cause = "policy and reference differ before training"
    advice = "check --peft_path and --model_name_or_path"
    if trainer.accelerator.num_processes == 1:  # of several, the others may have found nothing to ask about
        with torch.no_grad():
            repeated = again()
            trainer.model.eval()
            evaluated = again()
            trainer.model.train()
        name = type(_base_of(trainer.model)).__name__
        if abs(repeated - found) > tolerance:
            cause = f"{name} draws random numbers in training, so that two passes over the same rows differ"
            advice = "set what its configuration calls dropout, jitter or noise to 0"
        elif is_ln2(evaluated):
            cause = f"{name} computes something else in training than in evaluation"
            advice = "choose a model of another architecture"
    raise InputError(f"DPO loss at step 0 is {found:.4f}, not ln 2 = {math.log(2):.4f}: {cause}; {advice}")


def _score_labels(model: PreTrainedModel) -> None:
    """Let trl's forward pass of log-probabilities fit the model.

    Where logits are head(decoder(x)) it runs inside of one call of the head. It multiplies with lm_head.weight and
    never calls the head, around whose call FSDP makes the weight whole and takes up its gradient. The decoder has run
    before, so that the head is whole for no longer than it is needed.

    An architecture that does something else in between keeps its own logits, whole in memory.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    of_trl = model.forward
    asks_routers = _asks_routers(model)

    @functools.wraps(of_trl)
    def forward(self, *args, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs):
        if not fused_lm_head:
            return of_trl(*args, labels=labels, **kwargs)
        if asks_routers:  # for a loss that DPO has no use for
            kwargs["output_router_logits"] = False
        return scored(*args, labels=labels, **kwargs)

    def in_the_head(*args, labels: Tensor | None = None, **kwargs):
        head, decoder = model.get_output_embeddings(), model.base_model
        outputs = decoder(*args, **kwargs)

        def log_probabilities(hidden: Tensor):
            def decoded(*_, **__):
                return dataclasses.replace(outputs, last_hidden_state=hidden)

            with forward_of(decoder, decoded):
                return of_trl(*args, fused_lm_head=True, labels=labels, **kwargs)

        with forward_of(head, log_probabilities):
            return head(outputs.last_hidden_state)

    def of_own_logits(*args, labels: Tensor, **kwargs):
        logits = of_trl(*args, **{**kwargs, "use_cache": False}).logits[:, :-1].float()
        mask = labels[:, 1:] != IGNORE_INDEX
        targets = labels[:, 1:].clamp(min=0)
        log_probs = logits.log_softmax(-1)
        chosen = log_probs.gather(-1, targets[..., None]).squeeze(-1) * mask
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs).sum(-1) * mask
            figures = {"mean_logits": logits.mean(-1) * mask, "is_top1": (logits.argmax(-1) == targets) & mask}
        loss = -chosen.sum() / mask.sum().clamp(min=1)
        return FusedCausalLMOutput(loss=loss, log_probs=chosen, entropy=entropy, label_mask=mask, **figures)

    scored: Callable = in_the_head
    if not _trl_scores_as(model):
        logger.warning(
            "%s does more than head(decoder(x)): its own logits are used, whole in memory", type(model).__name__
        )
        scored = of_own_logits
    model.forward = types.MethodType(forward, model)


def _trl_scores_as(model: PreTrainedModel) -> bool:
    """Whether trl's log-probabilities are those of the architecture's own logits: tried on a small copy."""

    @torch.no_grad()
    def same(copy: PreTrainedModel) -> bool:
        ids = torch.arange(1, 9)[None]
        logits = copy(input_ids=ids, use_cache=False).logits[:, :-1]
        own = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        add_fused_lm_head(copy)
        return torch.allclose(copy(input_ids=ids, labels=ids, fused_lm_head=True).log_probs, own, atol=1e-3, rtol=1e-3)

    from trl.trainer.utils import add_fused_lm_head

    try:
        return on_small_copy(model, "eager", same)
    except Exception as error:  # see on_small_copy
        logger.info("%s: trl cannot score it (%s: %s)", type(model).__name__, type(error).__name__, error)
        return False


def _asks_routers(model: PreTrainedModel) -> bool:
    return getattr(model.config.get_text_config(), "output_router_logits", False)


def _base_of(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _trained_on_quantized(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What an adapter on a quantized base trains; nothing of any other model."""
    parameters = model.named_parameters() if hasattr(model, "peft_config") and is_quantized(model) else ()
    return ((name, parameter) for name, parameter in parameters if parameter.requires_grad)


def _restore_float32(model: nn.Module, given: dict[str, Tensor]) -> None:
    """trl rounds what is trained on a quantized base to bfloat16, whose eight bits lose most steps of an optimizer.

    Args:
        given: the values of an adapter that was there before. Of a fresh one, copies of modules (modules_to_save) have
            their original, and the random start of the rest may stay rounded.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in _trained_on_quantized(model):
        original = re.sub(r"\.modules_to_save\.\w+\.", ".original_module.", name)
        if name in given or original != name:
            parameter.data = given.get(name, parameters[original].detach()).clone()
        else:
            parameter.data = parameter.data.float()
