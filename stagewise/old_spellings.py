"""Flags of 2023 under the names they had then: each is translated before the arguments are checked.

Two families arrive in old shell scripts: fields that transformers 5 removed from TrainingArguments, and flags of
MedicalGPT that have another name here. A translation keeps the old meaning or raises InputError; none is ignored.
"""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stagewise.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OldSpelling:
    """How one setting was written in 2023 and what it is today.

    names: the old flags, without dashes; two where only both together make one setting.
    targets: the fields of today that it may set. A parser that lacks one of them does not know the old flags either.
    translate: called with the raw values (str from the command line, anything from a file; None where one of several
        names was not given), returns today's fields with raw values. Raises InputError where the old meaning is gone.
    note: what to tell the user when there is nothing left to set.
    announce: False for a name that today's scripts use as well.
    """

    names: tuple[str, ...]
    targets: tuple[str, ...]
    translate: Callable[..., dict[str, Any]]
    note: str = ""
    announce: bool = True

    def apply(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Today's fields for the old ones in `given` (raw values); {} when none of them is there."""
        found = {name: given[name] for name in self.names if name in given}
        if not found:
            return {}
        today = self.translate(*(found.get(name) for name in self.names))
        # Every process of a run parses the same command line; one line each is enough.
        if self.announce and today != found and os.environ.get("RANK", "0") == "0":
            old = " ".join(f"--{name} {value}" for name, value in found.items())
            new = " ".join(f"--{name} {value}" for name, value in today.items())
            logger.warning("%s is an old spelling: %s", old, f"now {new}" if today else f"dropped, {self.note}")
        return today


def rename(old: str, new: str, announce: bool = True) -> OldSpelling:
    """The same setting under another name."""
    return OldSpelling((old,), (new,), lambda raw: {new: raw}, announce=announce)


def summed_lengths(target: str) -> OldSpelling:
    """--max_source_length + --max_target_length as `target`, the field that limits a whole row in tokens."""

    def translate(source: Any, answer: Any) -> dict[str, Any]:
        if source is None or answer is None:
            one, other = ("source", "target") if answer is None else ("target", "source")
            raise InputError(
                f"--max_{one}_length: found without --max_{other}_length; "
                f"give --{target} instead, the limit of the whole row in tokens"
            )
        return {target: _whole_number("max_source_length", source) + _whole_number("max_target_length", answer)}

    return OldSpelling(("max_source_length", "max_target_length"), (target,), translate)


def prompt_and_answer_lengths(prompt: str, row: str) -> OldSpelling:
    """--max_source_length as `prompt`, the prompt's own limit, and its sum with --max_target_length as `row`."""

    def translate(source: Any, answer: Any) -> dict[str, Any]:
        if source is None:
            raise InputError(
                f"--max_target_length: found without --max_source_length; "
                f"give --{row} instead, the limit of prompt and answer together in tokens"
            )
        limit = _whole_number("max_source_length", source)
        if answer is None:
            return {prompt: limit}
        return {prompt: limit, row: limit + _whole_number("max_target_length", answer)}

    return OldSpelling(("max_source_length", "max_target_length"), (prompt, row), translate)


def _number(flag: str, raw: Any) -> float:
    try:
        return float(raw)
    except (TypeError, ValueError):
        raise InputError(f"--{flag}: found {raw!r}, expected a number") from None


def _whole_number(flag: str, raw: Any) -> int:
    number = _number(flag, raw)
    if not number.is_integer() or number < 1:
        raise InputError(f"--{flag}: found {raw!r}, expected a number of tokens, 1 or more")
    return int(number)


def _truth(flag: str, raw: Any) -> bool:
    word = str(raw).lower()
    if word not in ("true", "yes", "1", "false", "no", "0"):
        raise InputError(f"--{flag}: found {raw!r}, expected True or False")
    return word in ("true", "yes", "1")


def _switch(flag: str, field: str, on: Any, off: Any) -> OldSpelling:
    """A switch that is one value of a wider field today. Its False is set as well: it may override a file's True."""
    return OldSpelling((flag,), (field,), lambda raw: {field: on if _truth(flag, raw) else off})


def _only(flag: str, kept: tuple[str, ...], note: str, remedy: str) -> OldSpelling:
    """A flag of which some values are what happens today anyway, and the others cannot be had any more."""

    def translate(raw: Any) -> dict[str, Any]:
        if str(raw).lower() not in kept:
            raise InputError(f"--{flag}: found {raw!r}, which is not supported any more; {remedy}")
        return {}

    return OldSpelling((flag,), (), translate, note)


def _warmup_ratio(raw: Any) -> dict[str, Any]:
    ratio = _number("warmup_ratio", raw)
    if not 0 <= ratio < 1:
        raise InputError(
            f"--warmup_ratio: found {raw!r}, expected a share of the run from 0 to below 1; "
            "for a number of steps use --warmup_steps"
        )
    return {"warmup_steps": ratio}


def _neft_alpha(raw: Any) -> dict[str, Any]:
    alpha = _number("neft_alpha", raw)
    return {"neftune_noise_alpha": None if alpha == 0 else alpha}


def _use_mps_device(raw: Any) -> dict[str, Any]:
    import torch

    if _truth("use_mps_device", raw) and not torch.backends.mps.is_available():
        raise InputError("--use_mps_device: no MPS device here; leave the flag out, or use --use_cpu to say CPU")
    return {}


def _old_adapter(flag: str, goes_on: bool) -> OldSpelling:
    """Whether training goes on with the adapter that is there, as --peft_path does, or puts a new one on top of it."""

    def translate(raw: Any) -> dict[str, Any]:
        if _truth(flag, raw) != goes_on:
            raise InputError(
                f"--{flag} {raw}: a new adapter would belong to a base that exists in memory alone; merge the old one "
                "first (python merge_peft_adapter.py --base_model BASE --lora_model OLD --output_dir MERGED), then "
                "train with --model_name_or_path MERGED"
            )
        return {}

    return OldSpelling((flag,), ("peft_path",), translate, "--peft_path goes on with the adapter that it names")


_AUTOMATIC_MIXED_PRECISION = "mixed precision is torch's own, chosen by --bf16 or --fp16"
_USE_BF16_OR_FP16 = "use --bf16 or --fp16 alone (torch's own mixed precision)"

OLD_SPELLINGS: tuple[OldSpelling, ...] = (
    rename("evaluation_strategy", "eval_strategy"),
    OldSpelling(("warmup_ratio",), ("warmup_steps",), _warmup_ratio),
    rename("no_cuda", "use_cpu"),
    OldSpelling(
        ("use_mps_device",), (), _use_mps_device, "an MPS device is used when there is one; --use_cpu keeps off it"
    ),
    _only("save_safetensors", ("true", "yes", "1"), "safetensors is the only format", "leave it out"),
    _switch("group_by_length", "train_sampling_strategy", on="group_by_length", off="random"),
    rename("torch_dtype", "dtype"),
    OldSpelling(("neft_alpha",), ("neftune_noise_alpha",), _neft_alpha),
    _switch("include_inputs_for_metrics", "include_for_metrics", on=["inputs"], off=[]),
    _only("half_precision_backend", ("auto", "cuda_amp"), _AUTOMATIC_MIXED_PRECISION, _USE_BF16_OR_FP16),
    _only("fp16_backend", ("auto", "cuda_amp"), _AUTOMATIC_MIXED_PRECISION, _USE_BF16_OR_FP16),
    _only("fp16_opt_level", ("auto", "o1"), _AUTOMATIC_MIXED_PRECISION, _USE_BF16_OR_FP16),
    rename("per_gpu_train_batch_size", "per_device_train_batch_size"),
    rename("per_gpu_eval_batch_size", "per_device_eval_batch_size"),
    rename("train_on_inputs", "train_on_prompt"),
    _old_adapter("resume_lora_training", goes_on=True),
    _old_adapter("create_new_adapter", goes_on=False),
    summed_lengths("model_max_length"),
    # Fields of today's TrainingArguments too, where the new name wins without a word when both are set: with one name
    # left, a flag can override what a file says under the other.
    rename("gradient_checkpointing", "activation_checkpointing", announce=False),
    rename("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", announce=False),
)


def _sft_model_path(sft: Any, model: Any) -> dict[str, Any]:
    """The ancestor trained --sft_model_path, and took --model_name_or_path along without a use of its own."""
    if sft is not None and model is not None and sft != model:
        raise InputError(
            f"--sft_model_path: found {sft!r}, and --model_name_or_path {model!r}; both name the model that is "
            "trained: give one of them"
        )
    return {"model_name_or_path": sft if model is None else model}


def _ppo_batches(batch: Any, mini_batch: Any, accumulation: Any) -> dict[str, Any]:
    """Rows of an iteration and of a forward pass, as trl's first PPOConfig counted them."""
    if batch is None and mini_batch is None:
        return {"gradient_accumulation_steps": accumulation}
    rows = _whole_number("batch_size", 8 if batch is None else batch)
    size = _whole_number("mini_batch_size", 1 if mini_batch is None else mini_batch)
    steps = _whole_number("gradient_accumulation_steps", 1 if accumulation is None else accumulation)
    if rows % (size * steps):
        raise InputError(
            f"--batch_size: found {rows}, expected a multiple of --mini_batch_size * --gradient_accumulation_steps "
            f"({size} * {steps})"
        )
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": steps,
        "num_mini_batches": rows // (size * steps),
    }


def _early_stopping(early_stopping: Any, target_kl: Any) -> dict[str, Any]:
    """trl's first PPOTrainer read --target_kl only to end the updates of an iteration, at 1.5 times its value."""
    if early_stopping is None:
        return {"target_kl": target_kl}
    if not _truth("early_stopping", early_stopping):
        return {}
    return {"max_approx_kl": 1.5 * _number("target_kl", 0.1 if target_kl is None else target_kl)}


PPO_SPELLINGS: tuple[OldSpelling, ...] = (
    OldSpelling(("sft_model_path", "model_name_or_path"), ("model_name_or_path",), _sft_model_path),
    rename("reward_model_name_or_path", "reward_model_path"),
    OldSpelling(
        ("reward_model_device",), (), lambda raw: {}, "the reward model is where the policy is, mostly a part of it"
    ),
    rename("max_source_length", "max_prompt_length"),
    rename("max_target_length", "max_new_tokens"),
    rename("max_completion_length", "max_new_tokens"),
    rename("response_length", "max_new_tokens"),
    _only("stop_token", ("eos",), "answers end at the EOS and at the template's stop token", "leave it out"),
    rename("local_rollout_forward_batch_size", "rollout_batch_size"),
    rename("ppo_epochs", "num_ppo_epochs"),
    rename("init_kl_coef", "kl_coef"),
    OldSpelling(("early_stopping", "target_kl"), ("target_kl", "max_approx_kl"), _early_stopping),
    OldSpelling(
        ("batch_size", "mini_batch_size", "gradient_accumulation_steps"),
        ("per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches"),
        _ppo_batches,
    ),
)
