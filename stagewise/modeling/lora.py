"""Put a LoRA adapter on a model: fresh, or from an old adapter's weights."""

import logging
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stagewise.arguments import LoraArguments
from stagewise.errors import InputError
from stagewise.modeling.model_files import ADAPTER_CONFIG, check_adapter_files, read_json
from stagewise.modeling.precision import hold_in_float32
from stagewise.modeling.quantization import TrainedBase, quantization_of, quantized_inside
from stagewise.modeling.rope_scaling import check_peft_path
from stagewise.modeling.sharded import gather_in_one_call, shape_of

logger = logging.getLogger(__name__)

_TASKS = {"CAUSAL_LM": "a language model (CAUSAL_LM)", "SEQ_CLS": "a reward model (SEQ_CLS)"}


def attach_adapter(
    model: PreTrainedModel, args: LoraArguments, task_type: str = "CAUSAL_LM", trains_new_tokens: bool = False
):
    """A PeftModel whose adapter is trained, or the model itself with every parameter trained (--use_peft False).

    `--peft_path` starts from an old adapter's weights with a fresh optimizer: its rank and targets win over the flags.
    Adapter weights are fp32 whatever the base is. With `trains_new_tokens` the embedding and the head are trained in
    full beside the adapter, or tokens that were added would stay random.

    Raises:
        InputError: --target_modules or --modules_to_save match nothing; --peft_path is no adapter or is for another
            base.
    """
    if not args.use_peft:
        if args.peft_path:
            raise InputError(
                "--peft_path: needs --use_peft True; to continue full training use --resume_from_checkpoint"
            )
        model.requires_grad_(True)
        return model

    from peft import get_peft_model

    if args.peft_path:
        peft_model = _load_adapter(model, args.peft_path, task_type)
    else:
        config = lora_config(model, args, task_type, trains_new_tokens)
        wanted = set(config.target_modules or ()) if config.target_parameters else set()
        try:
            peft_model = get_peft_model(model, config)
        except ValueError as error:
            raise InputError(f"--target_modules {args.target_modules}: {error}") from error
        _report_left_out(peft_model, wanted)
    if args.trainable_params:
        _train_in_float32(peft_model)
    head = peft_model.get_base_model().get_output_embeddings()
    if head is not None:
        gather_in_one_call(head)  # with an adapter on it, it is several modules
    trainable, total = peft_model.get_nb_trainable_parameters()
    logger.info(
        "LoRA: %s of %s parameters are trained (%.2f%%)", f"{trainable:,}", f"{total:,}", 100 * trainable / total
    )
    return peft_model


def policy_adapter(model: PreTrainedModel, args: LoraArguments):
    """(model, configuration of the adapter still to be put on it or None): what trl's trainers want.

    A fresh adapter is left to them: the reference is then the model with the adapter off. With --peft_path the old
    adapter is on the model, and they freeze a copy of it as the reference.

    Raises:
        InputError: as attach_adapter.
    """
    if args.use_peft and not args.peft_path:
        return model, lora_config(model, args, "CAUSAL_LM")
    return attach_adapter(model, args), None


def lora_config(model: PreTrainedModel, args: LoraArguments, task_type: str, trains_new_tokens: bool = False):
    """peft's LoraConfig for a fresh adapter, its targets found in the model."""
    from peft import LoraConfig

    saved = modules_to_save(model, args.modules_to_save) or (embedding_names(model) if trains_new_tokens else None)
    parts = trainable_params(model, args.trainable_params)
    saved = [*dict.fromkeys((saved or []) + parts)] or None
    has_head = model.get_output_embeddings() is not None  # of a vocabulary; a reward model has none
    tied = getattr(model.config, "tie_word_embeddings", False) and has_head and _holds_embedding(model, saved)
    modules, experts = target_modules(model, args.target_modules)
    if experts:
        _check_experts(model, args, experts)
    return LoraConfig(
        task_type=task_type,
        target_modules=modules,
        target_parameters=experts or None,
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        modules_to_save=saved,
        use_dora=args.use_dora,
        use_rslora=args.use_rslora,
        **({"ensure_weight_tying": True} if tied else {}),
    )


def _load_adapter(model: PreTrainedModel, path: str, task_type: str):
    from peft import PeftModel

    check_adapter(path, task_type)
    check_peft_path(path, model.config)
    trained, here = TrainedBase.of(path), quantization_of(model)
    if trained.differs_from(here):
        logger.warning("%s was trained on %s, and goes on with %s", path, trained, here or "no quantization")
    try:
        return PeftModel.from_pretrained(model, path, is_trainable=True)
    except RuntimeError as error:  # sizes differ
        raise InputError(f"--peft_path {path}: does not fit this base model: {error}") from error


def check_adapter(path: str, task_type: str) -> None:
    """Raise InputError unless `path` is a folder with a LoRA adapter that was trained for `task_type`."""
    check_adapter_files("--peft_path", path, allow_pickle=True)  # refused at the start, where it is not allowed
    config = read_json("--peft_path", Path(path, ADAPTER_CONFIG))
    if config.get("peft_type", "LORA") != "LORA":
        raise InputError(f"--peft_path {path}: is of peft's type {config['peft_type']}; give an adapter of type LORA")
    found = config.get("task_type") or task_type
    if found != task_type:
        raise InputError(
            f"--peft_path {path}: was trained for {_TASKS.get(found, found)}, and this stage trains "
            f"{_TASKS.get(task_type, task_type)}; merge it into its base and start from the merged model"
        )


def target_modules(model: nn.Module, spec: str) -> tuple[str | list[str], list[str]]:
    """What --target_modules means in this model: (linear layers, experts).

    `all` is every linear layer but the head, and every expert of a mixture; names are those of linear layers or of
    experts, each of which must exist. The experts of a layer are one parameter of three dimensions (gate_up_proj,
    down_proj), or both of them by the name of the module that holds them (experts). Routers have no adapter: an update
    of theirs changes which experts see a token, and not what they make of it.

    In a mixture all targets are full paths: of some names (gate_proj) peft makes others, and adapts the routers.
    """
    experts = expert_parameters(model)
    if not experts:
        if spec == "all":
            return "all-linear", []
        names = [name.strip() for name in spec.split(",") if name.strip()]
        _require_modules(model, names, "--target_modules", linear_only=True)
        return names, []
    head = model.get_output_embeddings()
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    if spec == "all":
        return linear, experts
    names = [name.strip() for name in spec.split(",") if name.strip()]
    missing = [name for name in names if not any(_is_called(path, name) for path in linear + experts)]
    if missing:
        there = sorted({path.rpartition(".")[-1] for path in linear + experts})
        raise InputError(
            f"--target_modules {spec}: no linear layer and no experts named {', '.join(missing)}; there is: experts, "
            f"{', '.join(there)}"
        )

    def chosen(paths: list[str]) -> list[str]:
        return [path for path in paths if any(_is_called(path, name) for name in names)]

    return chosen(linear), chosen(experts)


def expert_parameters(model: nn.Module) -> list[str]:
    """Paths of the parameters that hold all experts of a layer, (experts, ., .) each; [] without a mixture."""
    return [path for path, parameter in model.named_parameters() if "expert" in path and len(shape_of(parameter)) == 3]


def _is_called(path: str, name: str) -> bool:
    """Whether a module's or parameter's path ends with this name, or its holder's does."""
    return f".{path}".endswith(f".{name}") or f".{path.rpartition('.')[0]}".endswith(f".{name}")


def _report_left_out(peft_model: nn.Module, wanted: set[str]) -> None:
    """Of a mixture with dense layers, whose names peft takes for those of experts."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = peft_model.get_base_model()
    left_out = wanted - {path for path, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    if left_out:
        logger.warning("peft puts no adapter on %d dense layers: %s", len(left_out), ", ".join(sorted(left_out)[:6]))


def _check_experts(model: nn.Module, args: LoraArguments, experts: list[str]) -> None:
    """Experts that share a parameter are adapted by adding to it, so that there is no input to drop out of."""
    for flag, used in (("lora_dropout", args.lora_dropout > 0), ("use_dora", args.use_dora)):
        if used:
            found = getattr(args, flag)
            raise InputError(
                f"--{flag} {found}: the experts of {type(model).__name__} ({experts[0]} and others) cannot have it; "
                f"pass --{flag} {type(found)(0)}, or name other layers: --target_modules q_proj,k_proj,v_proj,o_proj"
            )


def modules_to_save(model: nn.Module, spec: str | None) -> list[str] | None:
    """Modules trained in full beside the adapter, such as embed_tokens,lm_head after the vocabulary grew."""
    if not spec:
        return None
    names = [name.strip() for name in spec.split(",") if name.strip()]
    _require_modules(model, names, "--modules_to_save", linear_only=False)
    for path, module in model.named_modules():
        if any(path == name or path.endswith("." + name) for name in names) and quantized_inside(module):
            raise InputError(
                f"--modules_to_save {spec}: {path} has quantized weights, which cannot be trained; leave it out (an "
                "adapter is on every linear layer with --target_modules all), or use no quantization"
            )
    return names


def trainable_params(model: nn.Module, spec: str | None) -> list[str]:
    """Names of the modules with parameters that have a part of `spec` in them: norm -> input_layernorm, norm, ..."""
    parts = [part.strip() for part in spec.split(",")] if spec else []
    holders = (path for path, module in model.named_modules() if module._parameters)
    names = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in holders))
    missing = [part for part in parts if not any(part in name for name in names)]
    if missing:
        raise InputError(
            f"--trainable_params {spec}: no module has {', '.join(missing)} in its name; there is: {', '.join(names)}"
        )
    return [name for name in names if any(part in name for part in parts)]


def _train_in_float32(peft_model: nn.Module) -> None:
    """Hold what is trained in full in float32; around it the data type stays as it was.

    A step of 1e-5 on a norm's weight of 1 is lost in bf16's eight bits: the module would never change.
    """
    from peft.utils import ModulesToSaveWrapper

    for wrapper in [module for module in peft_model.modules() if isinstance(module, ModulesToSaveWrapper)]:
        dtype = next(wrapper.original_module.parameters()).dtype
        if dtype == torch.float32:
            continue
        for trained in wrapper.modules_to_save.values():
            hold_in_float32(trained, dtype)


def _holds_embedding(model: PreTrainedModel, saved: list[str] | None) -> bool:
    return not set(embedding_names(model)).isdisjoint(saved or ())


def embedding_names(model: PreTrainedModel) -> list[str]:
    """The names of the input embedding and, where it is a module of its own, the head: embed_tokens, lm_head."""
    wanted = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [path.rsplit(".", 1)[-1] for path, module in model.named_modules() if any(module is m for m in wanted)]


def linear_names(model: nn.Module) -> list[str]:
    """The names of the linear layers, each once: down_proj, gate_proj, ..."""
    layers = (path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)))
    return sorted({path.rpartition(".")[-1] for path in layers})


def _require_modules(model: nn.Module, names: list[str], flag: str, linear_only: bool) -> None:
    kinds = (nn.Linear, Conv1D, nn.Embedding) if linear_only else nn.Module
    paths = [path for path, module in model.named_modules() if isinstance(module, kinds)]
    missing = [name for name in names if not any(path == name or path.endswith("." + name) for path in paths)]
    if missing:
        there = linear_names(model)
        if not linear_only:
            there = sorted({*there, *embedding_names(model)})
        wanted = "linear layer" if linear_only else "module"
        raise InputError(
            f"{flag} {','.join(names)}: no {wanted} named {', '.join(missing)}; there is: {', '.join(there)}"
        )
