"""DPO through trl's DPOTrainer, fed with ids of ours, and checked at its first step."""

import dataclasses
import functools
import math
import re
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments

from stagewise.errors import InputError
from stagewise.modeling.quantization import is_quantized
from stagewise.modeling.token_loss import forward_of
from stagewise.trainers.stage import StageTrainerMixin

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
        config = DPOConfig(**{**values, "max_length": None, "disable_dropout": True, **options})
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
            _call_the_head(self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model)
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
            result = super()._compute_loss(model, inputs, return_outputs)
            if self._check_first_loss and self.model.training:
                self._check_first_loss = False
                if self.state.global_step == 0:
                    _require_ln2((result[0] if return_outputs else result).item(), self.args)
            return result

    return PreferenceTrainer


def _call_the_head(model: nn.Module) -> None:
    """Let trl's forward pass of log-probabilities run inside of one call of the head.

    It multiplies with lm_head.weight and never calls the head, around whose call FSDP makes the weight whole and takes
    up its gradient. The decoder has run before, so that the head is whole for no longer than it is needed.
    """
    of_trl = model.forward

    @functools.wraps(of_trl)
    def forward(self, *args, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs):
        if not fused_lm_head:
            return of_trl(*args, labels=labels, **kwargs)
        head, decoder = self.get_output_embeddings(), self.base_model
        outputs = decoder(*args, **kwargs)

        def log_probabilities(hidden: Tensor):
            def decoded(*_, **__):
                return dataclasses.replace(outputs, last_hidden_state=hidden)

            with forward_of(decoder, decoded):
                return of_trl(*args, fused_lm_head=True, labels=labels, **kwargs)

        with forward_of(head, log_probabilities):
            return head(outputs.last_hidden_state)

    model.forward = types.MethodType(forward, model)


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


def _require_ln2(loss: float, args: TrainingArguments) -> None:
    low = args.bf16 or args.fp16
    tolerance = FIRST_LOSS_TOLERANCE_LOW_PRECISION if low else FIRST_LOSS_TOLERANCE
    if not abs(loss - math.log(2)) <= tolerance:
        raise InputError(
            f"DPO loss at step 0 is {loss:.4f}, not ln 2 = 0.6931: policy and reference differ before training; "
            "check --peft_path and --model_name_or_path"
        )
