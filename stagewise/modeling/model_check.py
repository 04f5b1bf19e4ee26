"""Whether a run's settings fit its model, found on an empty copy of it: before data is read or weights are loaded."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase, Trainer, TrainingArguments

from stagewise.arguments import LoraArguments, ModelArguments
from stagewise.errors import InputError, first_line
from stagewise.modeling.attention import is_flash, require_16_bits, require_flash_attention, require_position_ids
from stagewise.modeling.experts import find_router_loss
from stagewise.modeling.liger import require_liger
from stagewise.modeling.loading import check_single_score, is_reward_model, load_config, weights_dtype
from stagewise.modeling.lora import embedding_names, expert_parameters
from stagewise.modeling.model_files import (
    ADAPTER_WEIGHTS,
    SCORE_HEADS,
    Shapes,
    same_weights,
    tensor_shapes,
    weight_shapes,
)
from stagewise.modeling.model_shape import adapter_base, empty_adapter, empty_model, saved_adapter
from stagewise.modeling.rope_scaling import check_peft_path, check_rope
from stagewise.modeling.s2_attention import enable_s2_attention
from stagewise.modeling.sequence_parallel import check_shards
from stagewise.modeling.weight_check import check_weights

logger = logging.getLogger(__name__)

# What --device_map may say beside the name of a device.
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_model(
    model_args: ModelArguments,
    lora_args: LoraArguments,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: str | None = None,
    scores: bool = False,
    trains_new_tokens: bool = False,
    packs: bool = False,
    adapts_head: bool = True,
) -> None:
    """What would otherwise fail when the model is loaded, or later, or not at all.

    Args:
        checkpoint: what the run goes on from.
        scores, trains_new_tokens: as read_shape.
        packs: rows hold several documents, told apart by their positions.
        adapts_head: the head over the vocabulary may have an adapter.

    Raises:
        InputError: a device, kernel or package that is not there; a vocabulary larger than the embedding, whose new
            rows nothing would train; targets that match nothing; an adapter, or a checkpoint, of another model.
    """
    config = load_config(model_args)
    _check_machine(model_args, config, args)
    _check_precision(model_args, config, args, trains_all=not lora_args.use_peft)
    if scores:
        check_single_score(model_args, config)
    if lora_args.peft_path:
        check_peft_path(lora_args.peft_path, config)
    model = _empty_model(model_args, config, tokenizer, scores)
    if model is None:
        return
    _check_precision(model_args, config, args, trains_all=not lora_args.use_peft)  # of a kernel from the hub
    if packs:
        require_position_ids(model)
    _check_sizes(model_args, config, model, scores)
    _check_options(model_args, model, scores)
    if args.sp_size > 1:
        check_shards(model, args.sp_size, model_args)
    matrices, trained = embedding_names(model), embedding_names(model)
    tied = getattr(model.get_output_embeddings(), "weight", None) is model.get_input_embeddings().weight
    if lora_args.use_peft:
        model = empty_adapter(model, lora_args, scores, trains_new_tokens)
        _check_head(model, adapts_head)
        trained = model.peft_config["default"].modules_to_save or []
    covered = [name for name in matrices if name in trained]
    if not covered or (not tied and len(covered) < len(matrices)):
        _check_vocabulary(model_args, config, tokenizer, matrices, covered, trains_new_tokens)
    if lora_args.peft_path:
        check_fits(f"--peft_path {lora_args.peft_path}", lora_args.peft_path, model)
        _check_base(lora_args.peft_path, model_args)
    if checkpoint is not None:
        _check_checkpoint(checkpoint, model, trains_all=not lora_args.use_peft)
    _check_optimizer(args, model)


def _check_optimizer(args: TrainingArguments, model: Any) -> None:
    """Some come in packages of their own, and all have ranges and --optim_args of their own: torch's are made once."""
    try:
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if optimizer.__module__.startswith("torch."):
            optimizer([torch.nn.Parameter(torch.zeros(1))], **options)
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        name = getattr(args.optim, "value", args.optim)
        raise InputError(
            f"--optim {name}: {first_line(error)}; mend --optim_args and the flags that begin with --adam, or choose "
            "another"
        ) from error


def _check_precision(model_args: ModelArguments, config: PretrainedConfig, args: TrainingArguments, trains_all: bool):
    dtype = weights_dtype(model_args, trains_all)
    if is_flash(model_args.kernel):
        require_flash_attention(str(model_args.kernel), model_args.kernel_flag)
        resolved = config.dtype or torch.float32 if dtype == "auto" else dtype
        require_16_bits(str(model_args.kernel), resolved, args.bf16 or args.fp16)


def _check_options(model_args: ModelArguments, model: Any, scores: bool) -> None:
    if model_args.rope_scaling:
        check_rope(model, model_args.rope_scaling)
    if model_args.shift_attn:
        enable_s2_attention(model, model_args.shift_attn_group)
    if not scores:
        find_router_loss(model, model_args.router_aux_loss_coef)


def _check_machine(model_args: ModelArguments, config: PretrainedConfig, args: TrainingArguments) -> None:
    if args.use_liger_kernel:
        require_liger(args.liger_kernel_config, config.model_type)
    place = model_args.device_map
    if place is not None and place not in DEVICE_MAPS:
        check_device("--device_map", place, ", ".join(DEVICE_MAPS))


def check_device(flag: str, name: str, others: str = "auto") -> None:
    """Raises InputError unless `name` is a device of this machine; others: what else may be given."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"{flag} {name}: no such device; give {others}, cpu, or cuda:0 and the like") from None
    if device.type in ("cpu", "meta"):
        return
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if found else 0
    if found is None or found.type != device.type or (device.index or 0) >= count:
        there = f"cpu and {count} x {found.type}" if found else "cpu alone"
        raise InputError(f"{flag} {name}: this machine has no such device, it has {there}; leave the flag out")


def _empty_model(
    model_args: ModelArguments, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, scores: bool
) -> Any:
    """The model on the meta device; None, with a warning, where its own code cannot be built without weights."""
    build = partial(empty_model, config, len(tokenizer), scores=scores, trust_remote_code=model_args.trust_remote_code)
    try:
        model = build()
    except Exception as error:  # remote code and unusual configurations fail in ways of their own
        logger.warning("not checked before loading: this model (%s: %s)", type(error).__name__, error)
        return None
    if model_args.kernel is None:
        return model
    try:
        return build(kernel=model_args.kernel)
    except (ValueError, ImportError) as error:
        raise InputError(f"--attn_implementation {model_args.kernel}: {first_line(error)}; leave it out") from error


def _check_sizes(model_args: ModelArguments, config: PretrainedConfig, model: Any, scores: bool) -> None:
    """The headers of the weights against the configuration beside them."""
    folder = Path(model_args.model_name_or_path or "").expanduser()
    if not model_args.model_name_or_path or not folder.is_dir():
        return
    if not getattr(config, "quantization_config", None):
        _check_plain_sizes(folder, config, model)
    draws_head = scores and not is_reward_model(str(folder))
    check_weights(f"--model_name_or_path {folder}", folder, config, scores, draws_head, model_args.trust_remote_code)


def _check_plain_sizes(folder: Path, config: PretrainedConfig, model: Any) -> None:
    vocabulary = config.get_text_config().vocab_size
    saved = weight_shapes("--model_name_or_path", folder)
    for name, parameter in model.named_parameters():
        found, wanted = saved.get(name), tuple(parameter.shape)
        if (
            found is None or found == wanted or found == (vocabulary, *wanted[1:])
        ):  # the copy's vocabulary may have grown
            continue
        raise InputError(
            f"--model_name_or_path {folder}: {name} is {_size(found)}, and config.json makes it {_size(wanted)}; take "
            "configuration and weights from the same model"
        )


def _check_head(peft_model: Any, adapts_head: bool) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not adapts_head and isinstance(peft_model.get_base_model().get_output_embeddings(), BaseTunerLayer):
        raise InputError(
            "--target_modules: trl's DPO reads the weights of the head (lm_head) directly, so an adapter on it would "
            "never be trained; leave it out"
        )


def _check_vocabulary(
    model_args: ModelArguments,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    matrices: list[str],
    covered: list[str],
    trains_new_tokens: bool,
) -> None:
    """Ids beyond the embedding get new rows, whose random numbers make sense only where they are trained: in the
    embedding and, where it is a matrix of its own, in the head.

    Args:
        matrices: names of the two. covered: those that are trained, which are too few.
    """
    rows = config.get_text_config().vocab_size
    names = ",".join(matrices)
    random = ", ".join(name for name in matrices if name not in covered)
    alone = f" ({', '.join(covered)} alone would leave those of {random} random)" if covered else ""
    if len(tokenizer) > rows:
        name = model_args.tokenizer_name_or_path or model_args.model_name_or_path
        flag = "--tokenizer_name_or_path" if model_args.tokenizer_name_or_path else "--model_name_or_path"
        raise InputError(
            f"{flag} {name}: the tokenizer has {len(tokenizer)} tokens, and the embedding of the model {rows} rows; "
            f"give the model's own tokenizer, or train the new rows: --modules_to_save {names}" + alone
        )
    if trains_new_tokens and covered:
        raise InputError(
            f"--add_template_tokens: the rows of the new tokens have to be trained; pass --modules_to_save {names}"
            + alone
        )


def _check_base(adapter: str, model_args: ModelArguments) -> None:
    """Of the same sizes, an adapter says itself what it was trained on; a folder that has moved is the same base."""
    trained_on, name = adapter_base(adapter), model_args.model_name_or_path
    if not trained_on or not name or trained_on == name:
        return
    old, new = Path(trained_on), Path(name).expanduser()
    if not (old.is_dir() and new.is_dir()):
        logger.warning("--peft_path %s: was trained on %s; taken for the same weights as %s", adapter, old, name)
    elif old.resolve() != new.resolve() and not same_weights(old, new):
        raise InputError(
            f"--peft_path {adapter}: was trained on {trained_on}, and {name} has other weights; give that base as "
            "--model_name_or_path (once merged, an adapter is in the model already)"
        )


def check_adapter_on(
    flag: str, adapter: str, config: PretrainedConfig, vocab_size: int, trust_remote_code: bool = False
) -> None:
    """Hold a saved adapter against the configuration of the base that it is to be put on.

    Raises:
        InputError: it is for another base.
    """
    try:
        model = empty_model(config, vocab_size, is_reward_model(adapter), trust_remote_code)
    except Exception as error:  # as in _empty_model
        logger.warning("not checked before loading: this base (%s: %s)", type(error).__name__, error)
        return
    check_fits(f"{flag} {adapter}", adapter, saved_adapter(model, flag, adapter))


def check_fits(what: str, folder: str, peft_model: Any, advice: str = "give the base that it was trained on") -> None:
    """The saved adapter against the one that this base would have: names and sizes, from headers."""
    path = Path(folder, ADAPTER_WEIGHTS)
    if not path.is_file():
        return
    from peft import get_peft_model_state_dict

    saved = tensor_shapes(what.partition(" ")[0], path)
    tensors = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problem = misfit(saved, wanted, compares_names=not expert_parameters(peft_model.get_base_model()))
    if problem:
        name = type(peft_model.get_base_model()).__name__
        raise InputError(f"{what}: is not for this base ({name}): {problem}; {advice}")


def misfit(saved: Shapes, wanted: Shapes, compares_names: bool = True) -> str | None:
    """In words, the first of the adapter's tensors that has another size, or that only one side has.

    compares_names: off for mixtures, whose experts peft saves under several names.
    """
    for name in sorted(saved.keys() & wanted.keys()):
        if saved[name] != wanted[name]:
            return f"{_plain(name)} is {_size(saved[name])}, and here {_size(wanted[name])}"
    for name in sorted(saved.keys() ^ wanted.keys()) if compares_names else ():
        if "lora_" in name:
            return f"{_plain(name)} is only {'in the adapter' if name in saved else 'here'}"
    for name in sorted(wanted.keys() - saved.keys()):
        if not {*SCORE_HEADS}.isdisjoint(name.split(".")):
            return f"{_plain(name)} is not in the adapter, and would be random"
    return None


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _check_checkpoint(checkpoint: str, model: Any, trains_all: bool) -> None:
    """Refuse to go on with an adapter where all weights are trained, and the other way round."""
    folder = Path(checkpoint)
    holds_adapter = (folder / ADAPTER_WEIGHTS).is_file()
    what = f"--resume_from_checkpoint {checkpoint}"
    if holds_adapter and trains_all:
        raise InputError(f"{what}: holds an adapter, and --use_peft False trains all weights; leave that out")
    if not holds_adapter and not trains_all and any(folder.glob("model*.safetensors")):
        raise InputError(f"{what}: holds all weights, and this run trains an adapter; pass --use_peft False")
    if holds_adapter:
        check_fits(what, checkpoint, model, "pass --lora_rank, --target_modules and model of its run")
