"""Load a tokenizer and a model, causal LM or reward model, or build the model from a configuration alone."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from stagewise.arguments import ModelArguments
from stagewise.errors import InputError, first_line
from stagewise.modeling.attention import is_flash, require_flash_attention
from stagewise.modeling.experts import find_router_loss, gather_experts_together
from stagewise.modeling.model_files import (
    SCORE_HEADS,
    check_config_file,
    check_tokenizer_files,
    local_path,
    name_passed_over,
    read_json,
    require_all_weights,
)
from stagewise.modeling.multimodal import generating_class
from stagewise.modeling.precision import keep_padding_off_zero, multiply_in_float32, upcast_norms
from stagewise.modeling.quantization import Quantization, loading_options, settle_quantized
from stagewise.modeling.rope_scaling import (
    check_rope,
    describe,
    hold_frequencies,
    max_positions,
    rope_setting,
    scale_rope,
)
from stagewise.modeling.sharded import is_sharded, shape_of, whole
from stagewise.modeling.token_loss import install_token_loss
from stagewise.modeling.untrusted import read_config, unpickling_failed
from stagewise.modeling.weight_check import check_weights

logger = logging.getLogger(__name__)


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of --tokenizer_name_or_path, or of the model; fast, with a pad token, padding on the right.

    Without a pad token the EOS token pads: labels come from spans, so a real EOS keeps its label and padding has none.

    Raises:
        InputError: nothing to load, no fast tokenizer, or neither pad nor EOS token.
    """
    name = args.tokenizer_name_or_path or args.model_name_or_path
    if not name:
        raise InputError("--tokenizer_name_or_path: needed when the model is built from --config_name alone")
    if not args.use_fast_tokenizer:
        raise InputError("--use_fast_tokenizer False: labels need the offsets of a fast tokenizer; leave the flag out")
    flag = "--tokenizer_name_or_path" if args.tokenizer_name_or_path else "--model_name_or_path"
    check_tokenizer_files(flag, name)
    tokenizer = _from_pretrained(AutoTokenizer.from_pretrained, name, args, flag=flag)
    if not tokenizer.is_fast:
        raise InputError(
            f"--tokenizer_name_or_path {name}: this tokenizer is not a fast one, and labels follow the character "
            "offsets that only fast tokenizers give; convert it (it needs a tokenizer.json) or pass another"
        )
    if tokenizer.eos_token is None:
        raise InputError(
            f"{flag} {name}: the tokenizer has no eos_token, so the model could not learn to stop and nothing could "
            'pad; name one of its tokens in its tokenizer_config.json: "eos_token": "</s>"'
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if args.rope_scaling and args.model_max_length:  # it warns beyond, and whoever truncates by it would cut there
        tokenizer.model_max_length = max(tokenizer.model_max_length, args.model_max_length)
    return tokenizer


def load_config(args: ModelArguments):
    """The model's configuration, checked against --model_type, and scaled by --rope_scaling."""
    name = args.model_name_or_path or args.config_name
    if not name:
        raise InputError("--model_name_or_path: required (or --config_name to train from scratch)")
    flag = "--model_name_or_path" if args.model_name_or_path else "--config_name"
    if args.config_name:
        _check_config_name(args.config_name)
    config = _from_pretrained(partial(read_config, f"{flag} {name}"), name, args, flag=flag)
    # MedicalGPT's scripts pass --model_type auto|bloom|chatglm|llama|baichuan
    if args.model_type not in (None, "auto", config.model_type):
        raise InputError(
            f"--model_type {args.model_type}: {name} is of type {config.model_type}; leave the flag out or correct it"
        )
    if args.rope_scaling is None:
        return config
    if args.model_max_length is None:
        raise InputError(
            f"--rope_scaling {args.rope_scaling}: needs --model_max_length, the tokens that it is to reach"
        )
    return scale_rope(config, args.rope_scaling, args.model_max_length)


def _check_config_name(name: str) -> None:
    path = local_path("--config_name", name)
    if path is not None:
        check_config_file("--config_name", path / "config.json" if path.is_dir() else path)


def load_causal_lm(
    args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    trains_all: bool,
    label_smoothing: float = 0.0,
    token_loss: bool = True,
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """The model to train: an embedding that holds the vocabulary, a loss that never holds all logits (token_loss;
    off for trainers with a loss of their own).

    dtype: --dtype; `auto` is the checkpoint's own for frozen weights under an adapter, and float32 when every
    parameter is trained, because an optimizer step of 1e-5 is lost in bf16's eight bits (--bf16 then multiplies in
    bf16 all the same). Without --model_name_or_path the weights are random, from --config_name.

    quantization: as plan_quantization found it.

    Raises:
        InputError: the model cannot be loaded, or float16 weights are to be trained.
    """
    dtype = weights_dtype(args, trains_all)
    config = load_config(args)
    model = _build_model(generating_class(config), args, config, dtype, quantization)
    if trains_all and args.model_name_or_path:
        name_passed_over("--model_name_or_path", args.model_name_or_path, model)
    _settle_positions(model, args)
    fit_embedding(model, tokenizer)
    keep_padding_off_zero(model)
    router_loss = find_router_loss(model, args.router_aux_loss_coef)
    if token_loss and not install_token_loss(model, label_smoothing, router_loss):
        logger.warning(
            "%s does more than head(decoder(x)): its own logits are used, whole in memory", type(model).__name__
        )
    return model


def load_reference(
    args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    other: str | None,
    trains_all: bool,
    quantization: Quantization | None = None,
) -> PreTrainedModel | None:
    """The frozen reference where it needs a model of its own: --ref_model_name_or_path, or, when all weights of the
    policy are trained, the policy's start once more. None where the policy without its adapter is the reference.

    Raises:
        InputError: the other model cannot be loaded, or as check_reference.
    """
    if not other and not trains_all:
        return None
    if other:
        check_reference(args, tokenizer, other)
        args = replace(args, model_name_or_path=other, config_name=None)
    logger.info("the reference is a second model in memory: %s", args.model_name_or_path)
    reference = load_causal_lm(args, tokenizer, trains_all, token_loss=False, quantization=quantization)
    return reference.requires_grad_(False).eval()


def check_reference(args: ModelArguments, tokenizer: PreTrainedTokenizerBase, other: str | None) -> None:
    """Hold --ref_model_name_or_path against the policy, going by its configuration and the headers of its files.

    Raises:
        InputError: it does not know all tokens of the policy, its positions do not hold the policy's rows, or weights
            are missing.
    """
    if other is None:
        return
    rows = row_limit(args, args.model_max_length)
    config = load_config(replace(args, model_name_or_path=other, config_name=None))
    positions, vocabulary = max_positions(config), config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise InputError(
            f"--ref_model_name_or_path {other}: knows {vocabulary} tokens, and the policy's tokenizer has "
            f"{len(tokenizer)}; give a model with the same tokenizer"
        )
    if positions and rows > positions:
        raise InputError(
            f"--ref_model_name_or_path {other}: was made for {positions} positions, and rows have up to {rows} "
            "tokens; lower --model_max_length"
        )
    check_weights(f"--ref_model_name_or_path {other}", other, config, trust_remote_code=args.trust_remote_code)


def load_reward_model(
    args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    trains_all: bool,
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """The model to train with one score for a row, read at its last token that is no padding.

    The head is new (drawn with the run's seed) unless the model is a reward model already. It is always in float32,
    because it is always trained, and never quantized; for the other weights see load_causal_lm.

    Raises:
        InputError: the architecture has no such head (see check_score_head), or the model cannot be loaded.
    """
    check_score_head(args)
    config = load_config(args)
    goes_on = check_single_score(args, config)
    config.num_labels = 1
    if not goes_on:
        logger.info("the score head is new, its weights are drawn with --seed")
    dtype = weights_dtype(args, trains_all)
    model = _build_model(AutoModelForSequenceClassification, args, config, dtype, quantization)
    _settle_positions(model, args)
    fit_embedding(model, tokenizer)
    if not goes_on and args.model_name_or_path:
        _draw_head(model)
    prepare_scoring(model, tokenizer)
    return model


def check_single_score(args: ModelArguments, config: PretrainedConfig) -> bool:
    """Whether the model is a reward model already. Raises InputError where it is a classifier instead."""
    goes_on = bool(args.model_name_or_path) and is_reward_model(str(args.model_name_or_path))
    if goes_on and config.num_labels != 1:
        raise InputError(
            f"--model_name_or_path {args.model_name_or_path}: sorts texts into {config.num_labels} classes, and a "
            "reward model gives one score; start from a language model or from a reward model"
        )
    return goes_on


def _draw_head(model: PreTrainedModel) -> None:
    """As the model's own code draws it, but after the seed was set again, see _build_model."""
    head = next(
        (getattr(model, name) for name in SCORE_HEADS if isinstance(getattr(model, name, None), nn.Linear)), None
    )
    if head is None:
        return
    with whole(head.parameters(), changes=True), torch.no_grad():
        config = model.config.get_text_config()
        head.weight.normal_(std=getattr(config, "initializer_range", None) or getattr(config, "init_std", 0.02))


def check_score_head(args: ModelArguments) -> None:
    """Read the configuration file alone: an architecture without a sequence-classification head is an error.

    Raises:
        InputError: neither transformers nor the model's own code has AutoModelForSequenceClassification for it.
    """
    name = args.model_name_or_path or args.config_name or ""
    try:
        found, _ = PretrainedConfig.get_config_dict(
            name, revision=args.model_revision, cache_dir=args.cache_dir, token=args.hf_hub_token
        )
    except OSError as error:
        flag = "--model_name_or_path" if args.model_name_or_path else "--config_name"
        raise InputError(f"{flag} {name}: {_reason(error, from_hub=True)}") from error
    model_type = found.get("model_type")
    own_code = "AutoModelForSequenceClassification" in found.get("auto_map", {})
    if own_code or model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return
    raise InputError(
        f"--model_name_or_path {name}: {model_type} has no AutoModelForSequenceClassification, so there is nothing to "
        "read a score from; choose a base of another architecture (llama, qwen2, qwen3, mistral, gemma, glm4, bloom "
        "and most others have one), or learn from the same pairs without a reward model, by DPO"
    )


def is_reward_model(name: str) -> bool:
    """Whether a model (a folder, or on the hub) or an adapter (a folder) gives scores, by its own configuration."""
    adapter = Path(name, "adapter_config.json")
    if adapter.is_file():
        return read_json("adapter", adapter).get("task_type") == "SEQ_CLS"
    try:
        config, _ = PretrainedConfig.get_config_dict(name)
    except OSError:
        return False
    return any("ForSequenceClassification" in name for name in config.get("architectures") or [])


def prepare_scoring(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell the model which token is padding, and keep its head in float32, weights and
    products, whatever the rest of the model is in.

    Raises:
        InputError: the head is none that an adapter would train and save.
    """
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    head = next((getattr(model, name) for name in SCORE_HEADS if hasattr(model, name)), None)
    if head is None:
        raise InputError(f"{type(model).__name__}: has no head called {' or '.join(SCORE_HEADS)}; choose another base")
    multiply_in_float32(head)
    if any(parameter.dtype != torch.float32 for parameter in head.parameters()):
        # a learning rate of 1e-5 would be lost in bf16's eight bits
        if is_sharded(model):
            _require_master_weights(head)
        else:
            head.float()


def _require_master_weights(head: nn.Module) -> None:
    """ZeRO-3 has one data type for all; with --bf16 or --fp16 it keeps float32 copies of what is trained.

    Raises:
        InputError: it would not.
    """
    from transformers.integrations.deepspeed import deepspeed_config

    settings = deepspeed_config() or {}
    halves = [settings.get(name, {}).get("enabled") for name in ("bf16", "fp16")]
    if not any(half is True for half in halves):
        found = next(head.parameters()).dtype
        raise InputError(
            f"--deepspeed: ZeRO-3 would train the score head in {found}, which loses small steps; add --bf16 True "
            "(float32 copies are kept then), or --dtype float32"
        )


def reserve_padding(tokenizer: PreTrainedTokenizerBase, stop_tokens: tuple[str, ...]) -> None:
    """A padding token that no row ends with, or its last token would pass for padding when its score is read.

    Where the tokenizer pads with a stop token another special token takes its place; a tokenizer with no other one
    keeps it, and scores are then read one token earlier, in training as in use.
    """
    used = {tokenizer.eos_token, tokenizer.bos_token, *stop_tokens}
    if tokenizer.pad_token not in used:
        return
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    free = [token for token in (tokenizer.unk_token, *special) if token and token not in used]
    if free:
        logger.info("padding: %s in place of %s, which ends rows", free[0], tokenizer.pad_token)
        tokenizer.pad_token = free[0]


def weights_dtype(args: ModelArguments, trains_all: bool) -> torch.dtype | Literal["auto"]:
    """What the weights are loaded in, see load_causal_lm; "auto" is the checkpoint's own."""
    dtype: torch.dtype | Literal["auto"] = "auto" if args.dtype in (None, "auto") else getattr(torch, args.dtype)
    if trains_all and dtype == torch.float16:
        raise InputError(
            "--dtype float16: weights that are trained cannot be float16 (their gradients cannot be unscaled); "
            "use --dtype float32 --fp16 True, or an adapter (--use_peft True)"
        )
    return torch.float32 if trains_all and dtype == "auto" else dtype


def _build_model(
    auto_class, args: ModelArguments, config, dtype, quantization: Quantization | None
) -> PreTrainedModel:
    attention = {"attn_implementation": args.kernel} if args.kernel else {}
    if args.kernel and is_flash(args.kernel):
        require_flash_attention(args.kernel, args.kernel_flag)
    if not args.model_name_or_path:
        return auto_class.from_config(config, dtype=torch.float32 if dtype == "auto" else dtype, **attention)
    device_map = _device_map(args.device_map)
    quantized = loading_options(auto_class, config, quantization, device_map, args.trust_remote_code)
    model, found = _from_pretrained(
        auto_class.from_pretrained,
        args.model_name_or_path,
        args,
        flag="--model_name_or_path",
        config=config,
        dtype=dtype,
        use_safetensors=None if args.allow_pickle else True,
        output_loading_info=True,
        **{"device_map": device_map, **quantized},
        **attention,
    )
    draws_head = auto_class is AutoModelForSequenceClassification and not is_reward_model(args.model_name_or_path)
    require_all_weights(f"--model_name_or_path {args.model_name_or_path}", model, found, draws_head)
    settle_quantized(model, quantization.compute_dtype if quantization else None)
    if is_deepspeed_zero3_enabled():
        gather_experts_together(model)
    if args.upcast_layernorm:
        upcast_norms(model)
    # an adapter and a score head are drawn next: the same ones under every engine, and ZeRO-3 draws while it loads
    torch.manual_seed(torch.initial_seed())
    return model


def _device_map(device_map: str | None) -> str | None:
    """--device_map auto is for one process; under torchrun the Trainer puts a whole model on each device."""
    if device_map and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        logger.info("--device_map %s: not used under torchrun, each process has its own device", device_map)
        return None
    return device_map


def fit_embedding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Grow the embedding (never shrink it) to hold every token id."""
    rows = shape_of(model.get_input_embeddings().weight)[0]
    if len(tokenizer) > rows:
        logger.info("embedding: %d rows grow to %d for the vocabulary", rows, len(tokenizer))
        model.resize_token_embeddings(len(tokenizer))


def _from_pretrained(load: Callable, name: str, args: ModelArguments, flag: str, **kwargs):
    local = local_path(flag, name)
    try:
        return load(
            name if local is None else str(local),
            revision=args.model_revision,
            cache_dir=args.cache_dir,
            token=args.hf_hub_token,
            trust_remote_code=args.trust_remote_code,
            **{key: value for key, value in kwargs.items() if value is not None},
        )
    except InputError:
        raise
    except UnpicklingError as error:
        raise unpickling_failed(f"{flag} {name}", error) from error
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise InputError(f"{flag} {name}: {_reason(error, local is None)}") from error


def _reason(error: Exception, from_hub: bool) -> str:
    """What a library says, without its advice for programmers, and what to do."""
    said = first_line(error)
    if "trust_remote_code" in str(error):
        return f"{said}\n  It brings its own Python code: read it, then pass --trust_remote_code True to run it."
    if from_hub and isinstance(error, OSError):
        return f"no such folder here, and not to be had from the hub ({said}); correct the path or the name"
    return said


def _settle_positions(model: PreTrainedModel, args: ModelArguments) -> None:
    if args.rope_scaling:
        check_rope(model, args.rope_scaling)
        logger.info("%s, up to %d", describe(rope_setting(model.config)), max_positions(model.config))
    hold_frequencies(model)


def prompt_limit(args: ModelArguments, requested: int | None, max_new_tokens: int, default: int = 1024) -> int:
    """How many tokens a prompt may have: what was asked for, or what an answer leaves of --model_max_length, or
    `default`, or what it leaves of the model's positions if less.

    Raises:
        InputError: prompt and answer are more than --model_max_length, or than the positions that the model was made
            for.
    """
    limits = [(max_positions(load_config(args)), "positions that the model was made for")]
    limits += [(args.model_max_length, "tokens of --model_max_length")]
    for limit, what in limits:
        if limit and max(requested or 1, 1) + max_new_tokens > limit:
            raise InputError(
                f"--max_new_tokens {max_new_tokens}: with --max_prompt_length {requested or 1} it is more than the "
                f"{limit} {what}; ask for less"
            )
    if requested is not None:
        return requested
    left = min((limit - max_new_tokens for limit, _ in limits if limit), default=default)
    return left if args.model_max_length else min(default, left)


def row_limit(
    args: ModelArguments, requested: int | None, flag: str = "--model_max_length", default: int = 1024
) -> int:
    """How many tokens a row may have: what was asked for, or `default`, or what the model was made for if less.

    Raises:
        InputError: more than the positions that the model was made for.
    """
    positions = max_positions(load_config(args))
    if requested is None:
        return min(default, positions) if positions else default
    if requested < 2:
        raise InputError(f"{flag} {requested}: expected 2 or more tokens")
    if positions and requested > positions:
        raise InputError(
            f"{flag} {requested}: the model was made for {positions} positions; ask for at most as many "
            "(--rope_scaling stretches rotary ones)"
        )
    if args.model_max_length and requested > args.model_max_length:
        raise InputError(f"{flag} {requested}: more than --model_max_length {args.model_max_length}")
    return requested
