"""The command line: what all stages share, and parse_arguments(), which reads flags, a .json/.yaml file, or both.

Whatever is wrong with the arguments is an InputError from here, before a tokenizer, a model or a data set is touched.
"""

import argparse
import copy
import dataclasses
import difflib
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.utils import is_torch_tf32_available

from stagewise.columns import parse_columns
from stagewise.devices import device_name, multiplies_bf16
from stagewise.distributed import deepspeed_settings, settle_engine, uses_fsdp, zero_stage
from stagewise.errors import InputError
from stagewise.machines import Machines
from stagewise.old_spellings import OLD_SPELLINGS, OldSpelling


def _option(default: Any, text: str, group: str | None = None) -> Any:
    """A dataclass field with its help; `group` is the heading of --help it stands under, if not its class's own."""
    return field(default=default, metadata={"help": text} | ({"group": group} if group else {}))


def _require(condition: bool, flag: str, found: Any, expected: str) -> None:
    if not condition:
        raise InputError(f"--{flag}: found {found!r}, expected {expected}")


def _require_choices(arguments: Any) -> None:
    """Literal fields hold one of their choices, however the dataclass was made."""
    for name, hint in get_type_hints(type(arguments)).items():
        for member in _members(hint):
            value = getattr(arguments, name)
            if get_origin(member) is Literal and value is not None:
                choices = get_args(member)
                _require(value in choices, name, value, "one of " + ", ".join(map(str, choices)))


def _names(flag: str, text: str | None) -> tuple[str, ...]:
    """Comma-separated names: "a, b" is ("a", "b"). An empty one ("a,,b") is a slip, never meant, and an error."""
    if text is None:
        return ()
    names = tuple(part.strip() for part in text.split(","))
    _require(all(names), flag, text, "names separated by commas, none of them empty")
    return names


@dataclass
class ModelArguments:
    """Which model and tokenizer, and how the weights are loaded."""

    _argument_group_name = "model"

    model_name_or_path: str | None = _option(None, "Folder or hub name of the model to start from.")
    config_name: str | None = _option(
        None, "Folder or file of a model configuration: start from random weights, in place of --model_name_or_path."
    )
    tokenizer_name_or_path: str | None = _option(None, "Folder or hub name of the tokenizer, if not the model's own.")
    model_revision: str | None = _option(None, "Branch, tag or commit on the hub.")
    cache_dir: str | None = _option(None, "Where downloads from the hub are kept.")
    hf_hub_token: str | None = _option(
        None, "Token for private models; the environment variable HF_TOKEN does it too."
    )
    use_fast_tokenizer: bool = _option(True, "Use the tokenizer written in Rust; label masks need its offsets.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _option(
        "auto", "Data type of the weights; auto is the checkpoint's own."
    )
    upcast_layernorm: bool = _option(False, "Normalise in float32 where the weights are in 16 bits.")
    device_map: str | None = _option(None, "Where the weights go: auto, cpu, or unset (the Trainer places the model).")
    trust_remote_code: bool = _option(False, "Run Python code that comes with the model. Read it first.")
    allow_pickle: bool = _option(False, "Read weights that are not safetensors, by torch's restricted unpickler.")
    model_type: str | None = _option(
        None, "Family of the model (llama, bloom, chatglm, baichuan, auto); only checked against its configuration."
    )
    add_template_tokens: bool = _option(False, "Add control tokens of the template that the vocabulary lacks.")
    attn_implementation: str | None = _option(
        None, "Attention kernel: eager, sdpa, flash_attention_2 and others.", group="attention and context"
    )
    flash_attn: bool = _option(
        False, "FlashAttention-2; an error where it cannot run, never another kernel.", group="attention and context"
    )
    shift_attn: bool = _option(
        False, "S2-Attn: train with attention in groups of tokens, half of the heads shifted.", "attention and context"
    )
    shift_attn_group: int | None = _option(
        None, "Tokens of such a group, even; unset: a quarter of the batch's row length.", "attention and context"
    )
    model_max_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a row at most, prompt and answer together; unset: 1024, or what the model was made for "
            "if less.",
            "aliases": "--max_length",
            "group": "attention and context",
        },
    )
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None = _option(
        None,
        "Stretch rotary positions so that they reach --model_max_length, by ceil(that / what the model was made for).",
        group="attention and context",
    )
    load_in_4bit: bool = _option(False, "Frozen weights in 4 bits (nf4), an adapter on them.", group="quantization")
    load_in_8bit: bool = _option(False, "Frozen weights in 8 bits (int8), an adapter on them.", group="quantization")
    qlora: bool = _option(False, "--load_in_4bit with double quantization, as in QLoRA.", group="quantization")

    router_aux_loss_coef: float | None = _option(
        None,
        "Mixtures of experts: coefficient of the loss that balances their routers; unset: as the model's config says.",
        group="optimisation",
    )

    def __post_init__(self) -> None:
        _require_choices(self)
        if not self.model_name_or_path and not self.config_name:
            raise InputError(
                "--model_name_or_path: missing; give a folder or a hub name, or --config_name for random weights"
            )
        if self.model_name_or_path and self.config_name:
            raise InputError(
                f"--config_name: found {self.config_name!r} beside --model_name_or_path; "
                "give one: the first starts from random weights, the second from trained ones"
            )
        coefficient = self.router_aux_loss_coef
        _require(coefficient is None or coefficient >= 0, "router_aux_loss_coef", coefficient, "0 (none) or more")
        self._check_attention()
        self._check_quantization()

    @property
    def kernel(self) -> str | None:
        """The attention kernel that is asked for; None is transformers' choice."""
        return "flash_attention_2" if self.flash_attn else self.attn_implementation

    @property
    def kernel_flag(self) -> str:
        """The flag that asks for it."""
        return "--flash_attn" if self.flash_attn else f"--attn_implementation {self.attn_implementation}"

    def _check_attention(self) -> None:
        if self.flash_attn and self.attn_implementation not in (None, self.kernel):
            raise InputError(
                f"--flash_attn: found beside --attn_implementation {self.attn_implementation}; give one of the two"
            )
        group, kernel = self.shift_attn_group, self.kernel
        _require(group is None or self.shift_attn, "shift_attn_group", group, "no group without --shift_attn True")
        even = group is None or (group >= 2 and group % 2 == 0)
        _require(even, "shift_attn_group", group, "an even number of tokens, 2 or more")
        if self.shift_attn and kernel not in (None, "sdpa"):
            raise InputError(
                f"--shift_attn: found --attn_implementation {kernel}, but S2-Attn runs on sdpa; leave one of them out"
            )

    def _check_quantization(self) -> None:
        four = "qlora" if self.qlora else "load_in_4bit"
        if self.load_in_8bit and getattr(self, four):
            raise InputError(f"--load_in_8bit: found beside --{four}, which asks for 4 bits; give one of the two")
        flag = "load_in_8bit" if self.load_in_8bit else four
        if getattr(self, flag) and not self.model_name_or_path:
            raise InputError(
                f"--{flag}: there is nothing to quantize in random weights; give --model_name_or_path in place of "
                "--config_name"
            )

    def with_length(self, tokens: int | None) -> "ModelArguments":
        """These arguments with a length that a stage's own flags ask for, where --model_max_length is not given."""
        if tokens is None or self.model_max_length is not None:
            return self
        return dataclasses.replace(self, model_max_length=tokens)


@dataclass
class LoraArguments:
    """The adapter; with --use_peft False all weights are trained and the sizes below are not used."""

    _argument_group_name = "adapter"

    use_peft: bool = _option(True, "Train a LoRA adapter; False trains all weights.")
    peft_path: str | None = _option(
        None, "Start from this adapter's weights with a fresh optimizer (--resume_from_checkpoint continues a run)."
    )
    target_modules: str = _option(
        "all", "Layers that get an adapter: all (every linear layer) or names such as q_proj,v_proj."
    )
    lora_rank: int = _option(8, "Rank of the adapter.")
    lora_alpha: float = _option(32.0, "Scale of the adapter: its update is multiplied by alpha / rank.")
    lora_dropout: float = _option(0.05, "Dropout in front of the adapter.")
    modules_to_save: str | None = _option(
        None, "Modules trained in full and saved beside the adapter, such as embed_tokens,lm_head for new tokens."
    )
    trainable_params: str | None = _option(
        None, "The same by parts of their names: embed,norm trains embeddings and norms (LongLoRA's LoRA+)."
    )
    use_dora: bool = _option(False, "DoRA: magnitude and direction of each weight are learned apart.")
    use_rslora: bool = _option(False, "Rank-stabilised LoRA: the scale is alpha / sqrt(rank).")

    def __post_init__(self) -> None:
        _require(self.lora_rank >= 1, "lora_rank", self.lora_rank, "1 or more")
        _require(0 < self.lora_alpha < math.inf, "lora_alpha", self.lora_alpha, "a number above 0")
        _require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "a share from 0 to below 1")
        targets = _names("target_modules", self.target_modules)
        alone = "all" not in targets or len(targets) == 1
        _require(alone, "target_modules", self.target_modules, "all, or names without all")
        _names("modules_to_save", self.modules_to_save)
        _names("trainable_params", self.trainable_params)
        for flag in ("peft_path", "use_dora", "use_rslora", "trainable_params"):
            value = getattr(self, flag)
            _require(self.use_peft or not value, flag, value, "no adapter option beside --use_peft False")
        if self.trainable_params and self.peft_path:
            raise InputError(
                f"--trainable_params: found {self.trainable_params!r} beside --peft_path, whose adapter says itself "
                "what is trained; leave it out"
            )


@dataclass
class DataArguments:
    """Which rows, and how they become text. Counts of rows: -1 is all."""

    _argument_group_name = "data"

    train_file_dir: str | None = _option(
        None, "Training data: folder or file; several, separated by commas, are mixed."
    )
    validation_file_dir: str | None = _option(None, "Evaluation data: folders or files, likewise.")
    dataset_name: str | None = _option(None, "Data set on the hub, in place of --train_file_dir.")
    dataset_config_name: str | None = _option(None, "Configuration of that data set.")
    columns: str | None = _option(
        None, "Columns under other names: question=Question,answer=Response; the key first, then the file's column."
    )
    max_train_samples: int | None = _option(-1, "Train on this many rows of the mixture; -1 is all.")
    max_eval_samples: int | None = _option(-1, "Evaluate on this many rows; -1 is all.")
    max_samples_per_dataset: int | None = _option(
        -1, "Take the first N rows of each data set before mixing; -1 is all."
    )
    validation_split_percentage: float = _option(
        5.0,
        "Share of the training rows held out when there is no --validation_file_dir: a percentage; values below 1 are "
        "read as a fraction (5 and 0.05 are both 5%%).",
    )
    mix_strategy: Literal["concat", "interleave_under", "interleave_over"] = _option(
        "concat", "How several data sets are joined: interleaved until the first (under) or the last (over) runs out."
    )
    mix_probs: str | None = _option(None, "Share of each interleaved data set, in the same order: 0.7,0.3.")
    preprocessing_num_workers: int | None = _option(None, "Processes that tokenize.")
    overwrite_cache: bool = _option(False, "Tokenize again although a cached result is there.")
    streaming: bool = _option(False, "Read the data while training, without a copy on disk.")
    template_name: str | None = _option(None, "Chat template; unset uses the tokenizer's own.")
    role_markers: dict[str, str] | None = _option(
        None, 'Other texts before the turns of the template: {"system": ..., "user": ..., "assistant": ...}.'
    )
    tool_format: Literal["default", "qwen", "llama3", "glm4", "mistral"] | None = _option(
        None, "How tools and tool calls are written; unset is the template's way."
    )
    on_bad_row: Literal["error", "skip"] = _option("error", "Rows that cannot be used stop the run, or are left out.")
    allow_mixed: bool = _option(False, "Allow rows of several formats in one file.")
    keep_control_tokens: bool = _option(False, "Allow special tokens in the text of a row; they become the real ones.")
    assistant_name: str | None = _option(None, "Fills <NAME> and {{name}} in self-cognition data.")
    assistant_author: str | None = _option(None, "Fills <AUTHOR> and {{author}} in self-cognition data.")
    use_reference: bool = _option(False, "Put the field `reference` of law triplets in front of the question.")

    def __post_init__(self) -> None:
        _require_choices(self)
        for flag in ("max_train_samples", "max_eval_samples", "max_samples_per_dataset"):
            value = -1 if getattr(self, flag) is None else getattr(self, flag)
            _require(value == -1 or value >= 1, flag, value, "a number of rows, or -1 for all")
            setattr(self, flag, value)
        percentage = self.validation_split_percentage
        _require(0 < percentage < 100, "validation_split_percentage", percentage, "a percentage between 0 and 100")
        workers = self.preprocessing_num_workers
        _require(workers is None or workers >= 1, "preprocessing_num_workers", workers, "1 or more")
        self._check_sources()
        self._check_mixing()

    def _check_sources(self) -> None:
        if not self.train_file_dir and not self.dataset_name:
            raise InputError("--train_file_dir: missing; give a folder or a file, or --dataset_name for the hub")
        if self.train_file_dir and self.dataset_name:
            raise InputError(f"--dataset_name: found {self.dataset_name!r} beside --train_file_dir; give one of them")
        if self.dataset_config_name and not self.dataset_name:
            raise InputError(
                f"--dataset_config_name: found {self.dataset_config_name!r} without --dataset_name; add it"
            )
        _names("train_file_dir", self.train_file_dir)
        _names("validation_file_dir", self.validation_file_dir)
        parse_columns(self.columns)

    def _check_mixing(self) -> None:
        shares = self.mix_probabilities
        if shares is None:
            return
        _require(
            self.mix_strategy != "concat", "mix_probs", self.mix_probs, "--mix_strategy interleave_under or _over"
        )
        sets = len(_names("train_file_dir", self.train_file_dir))
        expected = f"one share for each of the {sets} data sets of --train_file_dir"
        _require(len(shares) == sets, "mix_probs", self.mix_probs, expected)
        summed = math.isclose(sum(shares), 1, abs_tol=1e-6) and min(shares) > 0
        _require(summed, "mix_probs", self.mix_probs, "shares above 0 that add up to 1")

    @property
    def mix_probabilities(self) -> tuple[float, ...] | None:
        """--mix_probs as numbers; None when it is not given."""
        if self.mix_probs is None:
            return None
        try:
            return tuple(float(share) for share in _names("mix_probs", self.mix_probs))
        except ValueError:
            raise InputError(f"--mix_probs: found {self.mix_probs!r}, expected numbers such as 0.7,0.3") from None


@dataclass
class RunArguments:
    """What a run does around the training loop."""

    _argument_group_name = "run"

    overwrite_output_dir: bool = _option(False, "Start anew in an output_dir that is not empty.")
    dry_run: bool = _option(False, "Do everything up to step 0, print a report, and stop.")
    print_cost: str | None = _option(
        None, "At the end say how long TOKENS would take, or TOKENS,MACHINES, such as 1e9,4, going by this run."
    )
    plot_loss: bool = _option(True, "Draw the curves of the run as .png files into output_dir.")
    early_stopping_stall_num: int | None = _option(
        None, "Stop after this many evaluations in a row without a better loss."
    )
    min_lr: float | None = _option(None, "Floor of the learning rate.")
    on_nan: Literal["stop", "skip"] = _option(
        "stop", "What a step does whose loss or gradient is not finite: end the run, or leave the weights as they are."
    )
    max_loss: float | None = _option(None, "A step with a mean loss above it counts as one that is not finite.")
    logging_dir: str | None = _option(None, "TensorBoard folder; unset is output_dir/logs.", group="logging")

    def __post_init__(self) -> None:
        stall = self.early_stopping_stall_num
        _require(stall is None or stall >= 1, "early_stopping_stall_num", stall, "1 or more")
        floor = self.min_lr
        _require(floor is None or 0 <= floor < math.inf, "min_lr", floor, "a learning rate, 0 or more")
        _require_choices(self)
        worst = self.max_loss
        _require(worst is None or 0 < worst < math.inf, "max_loss", worst, "a loss, more than 0")
        if self.cost is not None:
            _require(not self.dry_run, "print_cost", self.print_cost, "a run that trains, without --dry_run True")

    @property
    def cost(self) -> tuple[int, int] | None:
        """(tokens, machines) of --print_cost: "1e9" is (1000000000, 1), "1e9,4" is (1000000000, 4)."""
        if self.print_cost is None:
            return None
        try:
            numbers = [float(part) for part in _names("print_cost", self.print_cost)]
        except ValueError:
            numbers = []
        whole = len(numbers) in (1, 2) and all(1 <= number < math.inf and number % 1 == 0 for number in numbers)
        _require(whole, "print_cost", self.print_cost, "tokens, or tokens,machines, such as 1e9,4")
        return int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else 1


def _emulates_bf16(use_cpu: bool) -> bool:
    import torch

    return not use_cpu and torch.cuda.is_available() and not multiplies_bf16()


@dataclass
class StageTrainingArguments(TrainingArguments):
    """transformers.TrainingArguments with the defaults of this project; what its Trainer would get wrong is refused.

    Four settings differ from the parent. Without an accelerator `use_cpu` is set: torchrun on CPUs is silently wrong
    without it (every process trains a world of its own). With neither do_train nor do_eval given, both are on.
    output_dir has no default, so that no run lands in a folder that nobody chose. And an accelerator with bfloat16
    multiplies in it unless another precision is asked for, and in TF32 what stays float32.

    sp_size: how many processes share a row, as --parallelism_config says.
    precision_note: in what precision products are that was not asked for, and how to choose another; else None.
    said_greater_is_better: whether --greater_is_better was given; the parent guesses by the figure's name.
    said_metric: whether --metric_for_best_model was given; the parent falls back on the loss.
    """

    sp_size: int = field(default=1, init=False)
    precision_note: str | None = field(default=None, init=False)
    said_greater_is_better: bool = field(default=False, init=False)
    said_metric: bool = field(default=False, init=False)

    # None until __post_init__, to tell "not given" from False; bool afterwards, as in the parent.
    do_train: bool | None = _option(None, "Train; with neither --do_train nor --do_eval given, both are on.")  # type: ignore[assignment]
    do_eval: bool | None = _option(None, "Evaluate at the end, and on the way as --eval_strategy says.")  # type: ignore[assignment]
    logging_steps: float = _option(10, "Log every N steps; below 1, every such share of the run.")
    bf16: bool | None = _option(  # type: ignore[assignment]
        None, "Mixed precision in bfloat16; unset: on where an accelerator has it and no other precision is asked for."
    )
    parallelism_config: None | str | dict = _option(  # type: ignore[assignment]
        None,
        'PT and SFT: {"sp_size": N}, or a file with it, has N processes share each row, for rows too long for one.',
    )
    report_to: None | str | list[str] = _option(
        "tensorboard", "Where metrics go: tensorboard, wandb and others, separated by commas; all; none."
    )
    machines = Machines()  # no flag: what one machine would find; start_run looks

    def __post_init__(self) -> None:
        import torch

        if not self.output_dir:
            raise InputError("--output_dir: missing; say which folder the run writes to")
        self._settle_tasks()
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # type: ignore[has-type]
        self._check_numbers()
        self._settle_reports()
        # Who writes is found out by looking (stagewise.machines); by this flag two machines would write one folder.
        self.save_on_each_node = False
        settle_engine(self)
        self._settle_precision()
        self._check_precision_of_deepspeed()
        self.said_greater_is_better = self.greater_is_better is not None  # type: ignore[has-type]
        self.said_metric = self.metric_for_best_model is not None  # type: ignore[has-type]
        super().__post_init__()
        if not self.use_cpu and self.tf32 is not False:
            # transformers' --tf32 uses a newer interface alone, and what compiles kernels still reads this one
            torch.set_float32_matmul_precision("high")
            if is_torch_tf32_available():
                tf32 = "what stays float32 is multiplied in TF32 (--tf32 False: exactly)"
                self.precision_note = "; ".join(filter(None, (self.precision_note, tf32)))

    def _settle_precision(self) -> None:
        """fp16 and bf16 as they were asked for, else bf16 where the device has it.

        A DeepSpeed file that says more than "auto" of a precision asks for it, and one that says nothing of bfloat16
        asks for float32: what it leaves out is off.
        """
        settings = deepspeed_settings(self)
        in_file = {name: settings.get(name, {}).get("enabled", False) for name in ("bf16", "fp16")}
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION")
        if self.bf16 is None and not self.fp16:  # type: ignore[has-type]
            self.bf16 = True if launcher == "bf16" or in_file["bf16"] is True else None
            self.fp16 = launcher == "fp16" or (in_file["fp16"] is True and not self.use_cpu)
        self._refuse_precision()
        if self.bf16 is not None or self.fp16 or self.use_cpu:
            self.bf16 = bool(self.bf16)
            return
        self.bf16 = multiplies_bf16() and (not self.deepspeed or in_file["bf16"] == "auto")
        if self.bf16:
            self.precision_note = "multiplies in bfloat16 (--bf16 False: in float32)"
        elif multiplies_bf16():
            self.precision_note = (
                f"multiplies in float32, since {self.deepspeed} does not ask for bfloat16; "
                '"bf16": {"enabled": "auto"} in it would'
            )
        else:
            self.precision_note = (
                f"multiplies in float32: {device_name()} has no bfloat16 of its own; --fp16 True is faster on most "
                "such devices, with a scaled loss"
            )

    def _check_precision_of_deepspeed(self) -> None:
        """transformers compares them after the model was loaded, on every process."""
        for name in ("bf16", "fp16"):
            in_file = deepspeed_settings(self).get(name, {}).get("enabled")
            here = bool(getattr(self, name) or getattr(self, f"{name}_full_eval"))
            if isinstance(in_file, bool) and in_file != here:
                place = " (on CPU, where float16 is none)" if name == "fp16" and self.use_cpu else ""
                raise InputError(
                    f"--deepspeed {self.deepspeed}: says {name} enabled {str(in_file).lower()}, and this run has it "
                    f'{"on" if here else "off"}{place}; write "auto" there, or pass --{name} {in_file}'
                )

    def _refuse_precision(self) -> None:
        """What the device would silently compute in another precision."""
        for flag in ("fp16", "fp16_full_eval"):
            if getattr(self, flag) and self.use_cpu:
                raise InputError(
                    f"--{flag}: the run is on CPU, where float16 is silently computed in float32; "
                    f"use --{flag.replace('fp16', 'bf16')}, or leave it out"
                )
        for flag in ("bf16", "bf16_full_eval"):
            if getattr(self, flag) and _emulates_bf16(self.use_cpu):
                raise InputError(
                    f"--{flag}: {device_name()} only emulates bfloat16, more slowly than float32; use "
                    f"--{flag.replace('bf16', 'fp16')} True, or leave it out"
                )

    def _settle_tasks(self) -> None:
        if self.do_predict:
            raise InputError("--do_predict: a stage trains and evaluates; to generate use inference.py")
        if self.batch_eval_metrics:
            raise InputError("--batch_eval_metrics: there are no logits to evaluate in batches; leave the flag out")
        if self.do_train is None and self.do_eval is None:
            self.do_train = self.do_eval = True
        self.do_train, self.do_eval = bool(self.do_train), bool(self.do_eval)
        if not self.do_train and not self.do_eval:
            raise InputError("--do_train, --do_eval: both are off, nothing is left to do; turn one on")

    def _check_numbers(self) -> None:
        for flag in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            _require(getattr(self, flag) >= 1, flag, getattr(self, flag), "1 or more")
        for flag in ("learning_rate", "weight_decay", "max_grad_norm"):
            _require(0 <= getattr(self, flag) < math.inf, flag, getattr(self, flag), "a number, 0 or more")
        _require(0 < self.num_train_epochs < math.inf, "num_train_epochs", self.num_train_epochs, "more than 0")
        steps = self.max_steps
        _require(steps == -1 or steps >= 1, "max_steps", steps, "1 or more, or -1 to go by --num_train_epochs")
        smoothing = self.label_smoothing_factor
        _require(0 <= smoothing < 1, "label_smoothing_factor", smoothing, "a share from 0 to below 1")
        alpha = self.neftune_noise_alpha
        _require(alpha is None or 0 < alpha < math.inf, "neftune_noise_alpha", alpha, "more than 0 (unset: no noise)")

    def _settle_reports(self) -> None:
        names = self.report_to if isinstance(self.report_to, list) else list(_names("report_to", self.report_to))
        if names not in ([], ["all"], ["none"], ["tensorboard"]):
            from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

            expected = "all, none, or some of " + ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            for name in names:
                _require(name in INTEGRATION_TO_CALLBACK, "report_to", name, expected)
        self.report_to = names


@dataclass
class PPOTrainingArguments(StageTrainingArguments):
    """The same with PPO's defaults; a step is an iteration of rollouts and updates."""

    learning_rate: float = _option(1e-5, "The initial learning rate.")
    logging_steps: float = _option(1, "Log every N iterations; below 1, every such share of the run.")

    def __post_init__(self) -> None:
        if self.use_liger_kernel:
            raise InputError("--use_liger_kernel: PPO's models are not given Liger's kernels; leave it out")
        super().__post_init__()


# Headings of --help in their order. Those of TrainingArguments list how the names of their fields begin, so that a
# field of a later transformers finds its place too; what matches nothing is "other".
_SHARED_GROUPS = ("model", "data", "adapter", "quantization", "attention and context", "run")
_STAGE_GROUP = "options of this stage"
_TRAINING_GROUPS = {
    "run": "output_dir do_ seed data_seed full_determinism",
    "attention and context": "neftune_",
    "optimisation": "learning_rate lr_ warmup_ optim weight_decay adam_ max_grad_norm label_smoothing_",
    "batch and length": "num_train_epochs max_steps per_device_ gradient_accumulation_ average_tokens_ "
    "auto_find_batch_ train_sampling_ length_column_ dataloader_ remove_unused_ label_names",
    "precision and memory": "bf16 fp16 tf32 activation_checkpointing gradient_checkpointing torch_ use_liger_ liger_ "
    "use_cache use_cpu",
    "evaluation": "eval_ prediction_loss_ include_for_metrics batch_eval_ metric_for_ greater_is_ load_best_",
    "checkpoints and resume": "save_ resume_ enable_jit_ ignore_data_skip restore_callback_",
    "logging": "logging_ log_ report_to run_name project trackio_ disable_tqdm include_num_",
    "distributed": "ddp_ fsdp deepspeed accelerator_config parallelism_config local_rank",
    "hub": "push_to_hub hub_",
    "other": "",
}


def _group(dtype: type, spec: dataclasses.Field) -> str:
    if "group" in spec.metadata:
        return spec.metadata["group"]
    if issubclass(dtype, TrainingArguments):
        return next(
            (g for g, starts in _TRAINING_GROUPS.items() if spec.name.startswith(tuple(starts.split()))), "other"
        )
    return getattr(dtype, "_argument_group_name", _STAGE_GROUP)


def _members(hint: Any) -> tuple[Any, ...]:
    """The types that a field's annotation admits: int | None -> (int, NoneType)."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _admits(hint: Any, kind: type) -> bool:
    return any((get_origin(member) or member) is kind for member in _members(hint))


def _typename(hint: Any) -> str:
    return " or ".join("None" if m is NoneType else getattr(m, "__name__", str(m)) for m in _members(hint))


def _aliases(spec: dataclasses.Field) -> list[str]:
    aliases = spec.metadata.get("aliases", [])
    return [aliases] if isinstance(aliases, str) else list(aliases)


def _spellings(name: str) -> list[str]:
    """The flag with underscores, and with hyphens."""
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def flag_names(*dtypes: type) -> list[str]:
    """The flags these dataclasses declare, "--name" and aliases, sorted; for the frozen lists of the tests."""
    specs = [spec for dtype in dtypes for spec in dataclasses.fields(dtype) if spec.init]
    return sorted({flag for spec in specs for flag in (f"--{spec.name}", *_aliases(spec))})


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Each flag under one spelling; hyphens and --no_flag are explained once, at the top."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=40)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if "--help" in action.option_strings:
            return super()._format_action_invocation(action)
        return ", ".join(flag for flag in action.option_strings if "-" not in flag[2:]) + f" {action.metavar}"


_UNSET = object()
_HOW_TO = """\
Flags, or one .json/.yaml file, or such a file followed by flags that override it.
A switch is written --flag, --flag True or --flag False, and --no_flag where it is on
by default; hyphens may stand for underscores."""
_JSON_OR_PATH = ("accelerator_config", "deepspeed", "fsdp_config", "parallelism_config")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a JSON object")
    return value


def _json_object_or_path(text: str) -> dict[str, Any] | str:
    return _json_object(text) if text.lstrip().startswith("{") else text


def _switch_or_text(text: str) -> bool | str:
    try:
        return string_to_bool(text)
    except argparse.ArgumentTypeError:
        return text


class _Parser(HfArgumentParser):
    """HfArgumentParser with grouped help, InputError in place of exit, files read like flags, and old spellings."""

    def __init__(self, dtypes: Sequence[type], old_spellings: Sequence[OldSpelling], **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self.dtypes = tuple(dtypes)
        self.hints = {name: hint for dtype in dtypes for name, hint in get_type_hints(dtype).items()}
        self._add_fields()
        # By flag and by key of a file: the field's name, its hyphen form, its aliases; not --no_flag, not --help.
        self.actions = {
            flag[2:]: action for action in self._actions if action.nargs != 0 for flag in action.option_strings
        }
        self.known = sorted({name for name in self.actions if "-" not in name})
        for action in dict.fromkeys(self.actions.values()):
            self._mend(action)
        for action in self._actions:
            if action.nargs == 0 and "--help" not in action.option_strings:  # --no_flag
                action.help = argparse.SUPPRESS
        own = {name for old in old_spellings for name in old.names}
        offered = (*old_spellings, *(old for old in OLD_SPELLINGS if own.isdisjoint(old.names)))
        self.old_spellings = [old for old in offered if self.actions.keys() >= set(old.targets)]
        for name in {name for old in self.old_spellings for name in old.names} - self.actions.keys():
            action = self.add_argument(*_spellings(name), nargs="?", const="True", help=argparse.SUPPRESS)
            self.actions |= {flag[2:]: action for flag in action.option_strings}

    def _add_fields(self) -> None:
        specs = [(_group(t, spec), spec) for t in self.dtypes for spec in dataclasses.fields(t) if spec.init]
        headings = (
            *_SHARED_GROUPS,
            *(title for title, _ in specs if title not in _TRAINING_GROUPS),
            *_TRAINING_GROUPS,
        )
        groups = {title: self.add_argument_group(title) for title in dict.fromkeys(headings)}
        for title, spec in specs:
            # A copy: the parent wants the annotation resolved in place, and the field belongs to the class.
            spec = copy.copy(spec)
            spec.type = self.hints[spec.name]
            metadata = {key: value for key, value in spec.metadata.items() if key != "group"}
            metadata["aliases"] = [flag for alias in _aliases(spec) for flag in _spellings(alias[2:])]
            spec.metadata = MappingProxyType(metadata)
            self._parse_dataclass_field(groups[title], spec)  # type: ignore[arg-type]

    def _mend(self, action: argparse.Action) -> None:
        """Mend what HfArgumentParser makes of some types, and say in --help what is expected."""
        hint = self.hints[action.dest]
        action.required = False  # a required field may stand in a file: build() checks
        action.metavar = _typename(action.type).upper()
        if action.choices:
            choices = [str(choice) for choice in action.choices]
            action.metavar = "|".join(choices) if len(choices) <= 8 else "NAME"
        if _admits(hint, dict):
            path = action.dest in _JSON_OR_PATH
            action.type, action.metavar = (_json_object_or_path, "JSON|FILE") if path else (_json_object, "JSON")
        elif action.type is string_to_bool and _admits(hint, str):
            action.type, action.metavar = _switch_or_text, "TEXT"
        elif action.type is string_to_bool:  # for bool | None the bare flag would be an error
            action.nargs, action.const, action.metavar = "?", True, "TRUE|FALSE"
        elif action.dest == "resume_from_checkpoint":
            action.nargs, action.const = "?", "True"

    def error(self, message: str) -> NoReturn:
        """Called by argparse for a bad value; in place of its exit, its message in this project's form."""
        message = re.sub(r"^argument (--\w+)[^:]*: ", r"\1: ", message)
        message = re.sub(r"invalid choice: (.+) \(choose from (.+)\)$", r"found \1, expected one of \2", message)
        raise InputError(re.sub(r"invalid (\w+) value: (.+)$", r"found \2, expected \1", message))

    def read_flags(self, argv: Sequence[str]) -> dict[str, Any]:
        """The fields that `argv` sets, and only those."""
        unset = argparse.Namespace(**{action.dest: _UNSET for action in self.actions.values()})
        found, unknown = self.parse_known_args(list(argv), unset)
        flags = [token.split("=")[0] for token in unknown if token.startswith("-")]
        if flags:
            raise InputError("\n".join(f"{flag}: {self._advice(flag.lstrip('-'), '--')}" for flag in flags))
        if unknown:
            raise InputError(f"{unknown[0]}: neither a flag nor the value of one (a .json or .yaml file stands first)")
        return self._settle({name: value for name, value in vars(found).items() if value is not _UNSET})

    def read_file(self, path: Path) -> dict[str, Any]:
        """The fields that a .json or .yaml file sets, read as if they were flags."""
        given: dict[str, Any] = {}
        for key, value in _read_mapping(path).items():
            if key not in self.actions:
                raise InputError(f"{path}: {key}: {self._advice(str(key), '')}")
            name = self.actions[key].dest
            if name in given:
                raise InputError(f"{path}: {key}: found twice, under two spellings; give it once")
            given[name] = value
        try:
            return self._settle(given)
        except InputError as error:
            raise InputError(f"{path}: {str(error).removeprefix('--')}") from None

    def _advice(self, name: str, dashes: str) -> str:
        near = difflib.get_close_matches(name.replace("-", "_"), self.known, n=1)
        return f"did you mean {dashes}{near[0]}?" if near else "unknown; --help lists what there is"

    def _settle(self, given: dict[str, Any]) -> dict[str, Any]:
        """Every value in its field's type, and every old spelling as what it is today."""
        renamed = {name for old in self.old_spellings for name in old.names}
        settled = {name: self._typed(name, value) for name, value in given.items() if name not in renamed}
        for old in self.old_spellings:
            for name, raw in old.apply(given).items():
                value = self._typed(name, raw)
                if settled.setdefault(name, value) != value:
                    both = f"found {settled[name]!r}, and {value!r} from its old spelling {' + '.join(old.names)}"
                    raise InputError(f"--{name}: {both}; give one of them")
        return settled

    def _typed(self, name: str, value: Any) -> Any:
        """`value` in the type of its field."""
        hint, action = self.hints[name], self.actions[name]
        if isinstance(value, list) and action.nargs == "+":
            return [self._read(name, item)[0] for item in value]
        if isinstance(value, NoneType | list | dict) and _admits(hint, type(value)):
            return value
        if isinstance(value, bool) and action.nargs == "?":  # also text that may be True: --resume_from_checkpoint
            return action.const if value else (None if action.type is str else False)
        if value is False and "no" in (action.choices or ()):  # YAML reads a bare `no` as False
            value = "no"
        return self._read(name, value)

    def _read(self, name: str, value: Any) -> Any:
        """A scalar, read as if it stood on the command line: "1e-4" is a number where the field is one."""
        if isinstance(value, NoneType | list | dict) or (
            self.actions[name].type is str and not isinstance(value, str)
        ):
            raise InputError(f"--{name}: found {value!r}, expected {_typename(self.hints[name])}")
        return getattr(self.parse_args([f"--{name}={value}"]), name)

    def build(self, given: dict[str, Any]) -> tuple[Any, ...]:
        """The dataclasses; those of this project first, since TrainingArguments joins the process group."""
        made = {}
        for dtype in sorted(self.dtypes, key=lambda dtype: issubclass(dtype, TrainingArguments)):
            specs = [spec for spec in dataclasses.fields(dtype) if spec.init]
            for spec in specs:
                if spec.name not in given and spec.default is spec.default_factory is dataclasses.MISSING:
                    raise InputError(f"--{spec.name}: missing")
            made[dtype] = _construct(dtype, {spec.name: given[spec.name] for spec in specs if spec.name in given})
        return tuple(made[dtype] for dtype in self.dtypes)


def _construct(dtype: type, values: dict[str, Any]) -> Any:
    try:
        return dtype(**values)
    except InputError:
        raise
    except (ValueError, OSError, ImportError) as error:
        # transformers words these; most, but not all, name the setting.
        named = [f"--{name}" for name in values if re.search(rf"\b{name}\b", str(error))]
        raise InputError(f"{', '.join(named) or 'training arguments'}: {' '.join(str(error).split())}") from error


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not valid {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: found {type(content).__name__}, expected keys with values, such as learning_rate: 2.0e-5"
        )
    return content


def _split_file(argv: list[str]) -> tuple[Path | None, list[str]]:
    """The file that stands first, if any, and the flags. Launchers put their --local_rank=N in front of both."""
    first = next((i for i, token in enumerate(argv) if not re.match(r"--local[_-]rank=", token)), len(argv))
    if first == len(argv) or argv[first].startswith("-") or not argv[first].endswith((".json", ".yaml", ".yml")):
        return None, argv
    return Path(argv[first]), argv[:first] + argv[first + 1 :]


def parse_arguments(
    *dtypes: type,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    description: str | None = None,
    old_spellings: Sequence[OldSpelling] = (),
) -> tuple[Any, ...]:
    """The command line as instances of `dtypes`, in their order.

    argv (sys.argv[1:] when None) is flags; or a .json/.yaml/.yml file; or such a file followed by flags that override
    it. --help prints the flags by subject and exits 0. `old_spellings` are a stage's own; one for a flag that a shared
    one reads replaces it. Nothing is written, and nothing heavier than transformers.TrainingArguments is loaded.

    Raises InputError for an unknown flag or key (it names the nearest known one), a value of the wrong type or out of
    range, settings that exclude each other, and a file that cannot be read.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(
        dtypes,
        old_spellings,
        prog=prog,
        usage="%(prog)s [file.json|file.yaml] [--flag value ...]",
        description="\n\n".join(text.strip() for text in (description, _HOW_TO) if text),
    )
    path, flags = _split_file(argv)
    overrides = parser.read_flags(flags)
    given = parser.read_file(path) if path else {}
    arguments = parser.build(given | overrides)
    _check_stage(arguments, parser.prog)
    return arguments


def _check_stage(arguments: Sequence[Any], prog: str) -> None:
    """Refuse what the stage or the engine cannot do.

    Stages that train on texts say `_trains_on_texts`, those that take new tokens of a template `_adds_tokens`.
    """
    for args in (each for each in arguments if isinstance(each, TrainingArguments)):
        _check_engine(args, {name: value for each in arguments for name, value in vars(each).items()})
    adds = any(getattr(each, "add_template_tokens", False) for each in arguments)
    if adds and not any(getattr(each, "_adds_tokens", False) for each in arguments):
        raise InputError(
            f"--add_template_tokens: not for {prog}; it is one of supervised_finetuning.py and reward_modeling.py"
        )
    if any(getattr(each, "_trains_on_texts", False) for each in arguments):
        return
    if any(getattr(each, "sp_size", 1) > 1 for each in arguments):
        raise InputError(
            f"--parallelism_config: rows are not shared by processes in {prog}, but in pretraining.py and "
            "supervised_finetuning.py; leave it out (--gradient_checkpointing True is for long rows)"
        )
    if any(getattr(each, "label_smoothing_factor", 0) for each in arguments):
        raise InputError(f"--label_smoothing_factor: {prog} has no labels to smooth; leave it at 0")
    for flag in ("shift_attn", "trainable_params", "router_aux_loss_coef"):
        if any(getattr(each, flag, None) for each in arguments):
            raise InputError(f"--{flag}: not for {prog}; it is one of pretraining.py and supervised_finetuning.py")


def _check_engine(args: TrainingArguments, values: dict[str, Any]) -> None:
    """Refuse what DeepSpeed or FSDP cannot do with these settings of all groups."""
    if values.get("upcast_layernorm") and (args.deepspeed or uses_fsdp(args)):
        engine = "--deepspeed" if args.deepspeed else "--fsdp"
        raise InputError(f"--upcast_layernorm: found beside {engine}, which has one data type for all; leave it out")
    shards = "--fsdp" if uses_fsdp(args) else f"--deepspeed {args.deepspeed}" if zero_stage(args) == 3 else None
    if values.get("device_map") and shards:
        raise InputError(
            f"--device_map {values['device_map']}: found beside {shards}, which shares out the weights itself; leave "
            "--device_map out"
        )
    if getattr(args, "sp_size", 1) > 1:
        _check_shared_rows(values)
    if args.deepspeed and values.get("on_nan") == "skip":
        raise InputError(
            "--on_nan skip: found beside --deepspeed, which changes the weights before the step can be looked at; "
            "leave it out, and the run stops there and goes on from the checkpoint before"
        )


def _check_shared_rows(values: dict[str, Any]) -> None:
    """Refuse, of all groups, what was never shown right where processes share rows."""
    if values.get("streaming"):
        raise InputError(
            "--streaming: found beside --parallelism_config, and each process reads rows of its own; leave one "
            "of them out"
        )
    if values.get("weighted_loss_mode", "case1") not in ("case1", "token") or values.get("loss_scope") == "micro":
        raise InputError(
            "--weighted_loss_mode, --loss_scope: found beside --parallelism_config, and the loss of rows that several "
            "processes share is a mean over all tokens of a step; leave them out (case1, global)"
        )
