"""The memory a run will want: its arguments as a TrainingSetup, and the memory that is there."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import PretrainedConfig

from stagewise.arguments import LoraArguments, ModelArguments, StageTrainingArguments
from stagewise.devices import peak_flops
from stagewise.distributed import deepspeed_settings, uses_fsdp, zero_stage
from stagewise.errors import InputError
from stagewise.modeling.loading import load_config
from stagewise.modeling.memory import (
    GIB,
    Memory,
    MemoryEstimate,
    TrainingSetup,
    describe,
    describe_engines,
    estimate,
    gib,
    shortages,
)
from stagewise.modeling.model_shape import ModelShape, adapter_base, adapter_file_bytes, read_shape
from stagewise.modeling.quantization import Quantization, asked_for
from stagewise.modeling.utilization import flops_per_token

logger = logging.getLogger(__name__)

# Which flag limits the length of a row.
LENGTH_FLAGS = {
    "pt": "block_size",
    "sft": "model_max_length",
    "rm": "max_length",
    "dpo": "max_length",
    "ppo": "max_prompt_length",
}
# What an out-of-memory error is explained with: the plan of the run that is under way.
current_plan: ContextVar["MemoryPlan | None"] = ContextVar("current_plan", default=None)


@dataclass(frozen=True)
class MemoryPlan:
    """What the estimate was made of, so that it can be made again for other settings.

    stage: "pt", "sft", "rm", "dpo" or "ppo". memory: what was found. with_adapter: model and setup with other settings
    of the adapter.
    """

    stage: str
    model: ModelShape
    setup: TrainingSetup
    memory: Memory
    with_adapter: Callable[[LoraArguments], tuple[ModelShape, TrainingSetup]]
    model_args: ModelArguments
    lora_args: LoraArguments
    stage_args: Any
    args: StageTrainingArguments

    @property
    def estimate(self) -> MemoryEstimate:
        return estimate(self.model, self.setup)

    @property
    def gib(self) -> float:
        """The peak on a device, to be held against the measured one."""
        return round(self.estimate.device / GIB, 3)

    @property
    def full_speed(self) -> float | None:
        """Tokens a second of one device if it did nothing but what it multiplies fastest; None where its peak or the
        operations of a token are not known, in PPO (a step is rollouts and updates), and unless products are in 16
        bits.
        """
        peak = peak_flops(self.memory.device_name) if self.memory.device is not None else None
        reference = self.stage == "dpo" and not self.stage_args.reference_free
        flops = flops_per_token(self.model, scores=self.stage == "rm", reference=reference)
        if peak is None or flops is None or self.stage == "ppo" or self.setup.product_bytes != 2:
            return None
        return peak / flops

    def describe(self) -> str:
        """The table of the parts, the memory found, and whether it is enough."""
        trained = f"{self.model.trainable:,} of {self.model.parameters:,} parameters trained"
        if self.model.adapter:
            trained = f"{self.model.parameters:,} parameters, {self.model.trainable:,} trained beside them"
        setup = self.setup
        head = f"memory for {trained}; {setup.rows} rows of {setup.length} tokens in a forward pass"
        half = bool(self.args.bf16 or self.args.fp16)
        table = describe(self.estimate, self.memory, setup.local_processes)
        return f"{head}\n{table}\n{describe_engines(self.model, setup, half)}"


def plan_memory(
    stage: str, arguments: Sequence[Any], tokenizer, rows: Any, limit: int, trains_new_tokens: bool = False
) -> MemoryPlan | None:
    """The plan of a run, from its arguments and the configuration alone; the log says whether it fits.

    None, with a warning, where the architecture's own code cannot be built without weights.

    Args:
        arguments: the stage's groups in their order: model, LoRA, data, run, stage, training.
        rows: the training rows, whose longest counts; limit: tokens that a row may have at most.
        trains_new_tokens: as attach_adapter.

    Raises:
        InputError: whatever is wrong with the model or the adapter.
    """
    model_args, lora_args, data_args, run_args, stage_args, args = arguments
    config = load_config(model_args)
    longest = longest_row(rows, limit)

    def with_adapter(adapter: LoraArguments) -> tuple[ModelShape, TrainingSetup]:
        shape = read_shape(
            config, adapter, len(tokenizer), stage == "rm", trains_new_tokens, model_args.trust_remote_code
        )
        if stage == "ppo":
            shape = _with_value_model(shape, config)
        groups = (model_args, adapter, data_args, run_args, stage_args, args)
        return shape, _setup(stage, shape, config, groups, longest)

    try:
        shape, setup = with_adapter(lora_args)
    except InputError:
        raise
    except Exception as error:  # remote code and unusual configurations fail in ways of their own
        logger.warning("memory: no estimate for this model (%s: %s)", type(error).__name__, error)
        current_plan.set(None)
        return None
    memory = find_memory(args.device, setup.local_processes)
    plan = MemoryPlan(stage, shape, setup, memory, with_adapter, model_args, lora_args, stage_args, args)
    current_plan.set(plan)
    missing = shortages(plan.estimate, memory, setup.local_processes)
    if missing and args.should_log:
        logger.warning("memory by estimate: it does not fit: %s", "; ".join(missing))
    elif not missing:
        logger.info("memory by estimate: %s GiB on each device, which fits", gib(plan.estimate.device))
    return plan


def longest_row(rows: Any, limit: int) -> int:
    """Tokens of the longest row, `limit` where the rows do not say (packed, streamed)."""
    columns = getattr(rows, "column_names", None) or ()
    if "length" in columns:
        longest = int(np.max(rows.with_format("numpy")["length"][:], initial=0))
    elif {"prompt_length", "chosen_length", "rejected_length"} <= set(columns):
        table = rows.with_format("numpy")
        answers = np.maximum(table["chosen_length"][:], table["rejected_length"][:])
        longest = int(np.max(table["prompt_length"][:] + answers, initial=0))
    else:
        return limit
    return min(limit, longest) or limit


def _setup(
    stage: str, shape: ModelShape, config: PretrainedConfig, arguments: Sequence[Any], length: int
) -> TrainingSetup:
    model_args, lora_args, _, _, stage_args, args = arguments
    if stage == "ppo":
        length += stage_args.max_new_tokens
    pairs = 2 if stage in ("rm", "dpo") else 1
    quantization = Quantization.of_config(getattr(config, "quantization_config", None)) or asked_for(model_args)
    setup = TrainingSetup(
        rows=pairs * args.per_device_train_batch_size,
        length=math.ceil(length / args.sp_size),  # of this process
        padded=not getattr(stage_args, "packing", False),
        weight_bytes=weight_itemsize(model_args, config, trains_all=not lora_args.use_peft),
        autocast=(args.bf16 or args.fp16) and not args.deepspeed,
        bits=quantization.bits if quantization else None,
        double_quant=bool(quantization and quantization.double_quant),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        checkpointing=bool(args.gradient_checkpointing),
        lora_dropout=lora_args.use_peft and lora_args.lora_dropout > 0,
        attention=_attention(stage, model_args, shape, args.torch_compile),
        accumulation=args.gradient_accumulation_steps,
        forwards=2 if stage == "ppo" else 1,
        processes=args.world_size,
        local_processes=min(int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)), args.world_size),
        logits="none" if stage == "rm" else "chunk" if shape.plain_head else "whole",
        frozen_bytes=_frozen_bytes(stage, shape, arguments),
        on_cpu=args.device.type == "cpu",
        **_sharding(args),
    )
    if stage == "ppo":
        setup = replace(setup, rollout_rows=stage_args.rollout_batch_size, rollout_length=length)
    if setup.on_cpu:
        setup = replace(setup, process_bytes=psutil.Process().memory_info().rss)
    return setup


def weight_itemsize(args: ModelArguments, config: PretrainedConfig, trains_all: bool) -> int:
    """Bytes of a weight as load_causal_lm loads it."""
    if args.dtype != "auto":
        return getattr(torch, args.dtype).itemsize
    if trains_all or not args.model_name_or_path:
        return 4
    found = config.dtype or config.get_text_config().dtype or torch.float32
    return (getattr(torch, found) if isinstance(found, str) else found).itemsize


def _attention(stage: str, args: ModelArguments, shape: ModelShape, compiled: bool) -> str:
    """The kernel, as stagewise.modeling.attention.settle_attention chooses it."""
    kernel = args.kernel or shape.attention
    if stage in ("pt", "sft") and kernel == "sdpa" and shape.segments and (args.shift_attn or not compiled):
        return "segments"
    return kernel


def _sharding(args: StageTrainingArguments) -> dict[str, Any]:
    """What DeepSpeed's or FSDP's settings say about who holds what."""
    if args.deepspeed:
        zero = deepspeed_settings(args).get("zero_optimization", {})
        offloads = {
            name: (zero.get(f"offload_{key}") or {}).get("device", "none") not in (None, "none")
            for name, key in (("offload_optimizer", "optimizer"), ("offload_parameters", "param"))
        }
        return {"engine": "deepspeed", "stage": zero_stage(args), "half": args.bf16 or args.fp16} | offloads
    if uses_fsdp(args):
        shards_all = (args.fsdp_config or {}).get("reshard_after_forward", True)
        return {"engine": "fsdp", "stage": 3 if str(shards_all).lower() in ("true", "full_shard") else 2}
    return {}


def _with_value_model(shape: ModelShape, config: PretrainedConfig) -> ModelShape:
    """PPO's policy and value model: two adapters on one base, or two models, the second without the head."""
    value_head = config.get_text_config().hidden_size + 1
    if shape.adapter:
        return replace(
            shape,
            trainable=shape.trainable + shape.adapter + value_head,
            adapter=2 * shape.adapter + value_head,
            factored=2 * shape.factored,
        )
    tied = config.get_text_config().tie_word_embeddings
    second = shape.parameters - (0 if tied else shape.trainable_head) + value_head
    return replace(
        shape,
        parameters=shape.parameters + second,
        trainable=shape.trainable + second,
        factored=2 * shape.factored,
        linear=2 * shape.linear,
        trainable_embedding=shape.trainable_embedding + shape.embedding,
    )


def _frozen_bytes(stage: str, shape: ModelShape, arguments: Sequence[Any]) -> int:
    """Weights beside those that are trained and their base: references and reward models."""
    model_args, lora_args, _, _, stage_args, _ = arguments
    total = 4 * shape.adapter if stage in ("dpo", "ppo") and lora_args.peft_path else 0  # the adapter as it was
    other = getattr(stage_args, "ref_model_name_or_path", None)
    has_reference = stage == "ppo" or (stage == "dpo" and not stage_args.reference_free)
    if has_reference and (other or not lora_args.use_peft):
        total += _model_bytes(other, model_args, trains_all=not lora_args.use_peft)
    if stage == "ppo" and stage_args.reward_model_path:
        total += _reward_bytes(stage_args.reward_model_path, model_args)
    return total


def _reward_bytes(path: str, model_args: ModelArguments) -> int:
    """A reward model: an adapter on the policy's base, or one with a base of its own, or a whole model."""
    base = adapter_base(path)
    own = model_args.model_name_or_path
    if base is not None and own and (base == own or Path(base).resolve() == Path(own).resolve()):
        return adapter_file_bytes(path)
    return adapter_file_bytes(path) + _model_bytes(base or path, model_args, False)


def _model_bytes(name: str | None, model_args: ModelArguments, trains_all: bool) -> int:
    """The weights of another model, or with None of the run's own, once more."""
    if name is not None:
        model_args = replace(model_args, model_name_or_path=name, config_name=None, model_type=None)
    config = load_config(model_args)
    shape = read_shape(config, LoraArguments(use_peft=False), trust_remote_code=model_args.trust_remote_code)
    return shape.parameters * weight_itemsize(model_args, config, trains_all)


def find_memory(device: torch.device, local_processes: int = 1) -> Memory:
    """What the run can have: memory that is free, and what its processes hold already."""
    left = int(min(psutil.virtual_memory().available, _left_to_container()))
    host = left + psutil.Process().memory_info().rss * local_processes
    if device.type != "cuda":
        return Memory(host)
    free, _ = torch.cuda.mem_get_info(device)
    return Memory(host, free + torch.cuda.memory_reserved(device), torch.cuda.get_device_name(device))


def _left_to_container() -> float:
    """What a container's limit (cgroup 2) leaves; the page cache in it gives way."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return math.inf
    return math.inf if limit == "max" else int(limit) - int(used["anon"])
