"""Put a LoRA adapter on a model: fresh, or from an old adapter's weights."""

import copy
import functools
import inspect
import logging
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stagewise.arguments import LoraArguments
from stagewise.errors import InputError
from stagewise.modeling.model_files import ADAPTER_CONFIG, SCORE_HEADS, check_adapter_files, read_json
from stagewise.modeling.multimodal import beside_language, is_beside
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
        frozen = train_language(model)
        if frozen:
            logger.info("not trained, as text does not come through them: %s", ", ".join(frozen))
        return model

    from peft import get_peft_model

    if args.peft_path:
        peft_model = _load_adapter(model, args.peft_path, task_type)
    else:
        config = lora_config(model, args, task_type, trains_new_tokens)
        if args.target_modules == "all":
            _report_left_out(model)
        try:
            peft_model = get_peft_model(model, config)
        except ValueError as error:
            raise InputError(f"--target_modules {args.target_modules}: {error}") from error
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


def train_language(model: PreTrainedModel) -> tuple[str, ...]:
    """Every parameter is trained but those of `beside_language`, whose paths are given."""
    beside = beside_language(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_beside(name, beside))
    return beside


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
    require_untied(f"--target_modules {args.target_modules}", model, modules)
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
    require_mergeable(path, model)
    trained, here = TrainedBase.of(path), quantization_of(model)
    if trained.differs_from(here):
        logger.warning("%s was trained on %s, and goes on with %s", path, trained, here or "no quantization")
    try:
        return PeftModel.from_pretrained(model, path, is_trainable=True)
    except RuntimeError as error:  # sizes differ
        raise InputError(f"--peft_path {path}: does not fit this base model: {error}") from error


def require_mergeable(path: str, model: nn.Module) -> None:
    """Raises InputError where the adapter in a folder is on one side of a matrix that embedding and head share."""
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(path)
    if not config.ensure_weight_tying:
        require_untied(f"--peft_path {path}", model, config.target_modules or ())


def require_untied(what: str, model: nn.Module, targets: str | Iterable[str]) -> None:
    """Embedding and head that are one matrix: an adapter on either changes that use of it alone.

    Args:
        targets: names or paths, or, as a string, peft's regular expression of paths.

    Raises:
        InputError: one of the two is among the targets.
    """
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if head is None or getattr(head, "weight", None) is not embedding.weight:
        return
    for path, module in model.named_modules():
        if module is not embedding and module is not head:
            continue
        name = path.rpartition(".")[-1]
        if isinstance(targets, str):
            found = re.fullmatch(targets, path) is not None
        else:
            found = any(path == target or path.endswith(f".{target}") for target in targets)
        if found:
            raise InputError(
                f"{what}: {name} shares its matrix with the {'head' if module is embedding else 'embedding'} of "
                f"{type(model).__name__}, so that an adapter on it could not be merged; leave it out, or train the "
                f"matrix itself in both places: --modules_to_save {embedding_names(model)[0]}"
            )


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


def target_modules(model: nn.Module, spec: str) -> tuple[list[str], list[str]]:
    """What --target_modules means in this model: (linear layers, parameters).

    `all` is every linear layer but the head and those of `left_out`, and every expert of a mixture; names are those of
    linear layers or of experts, each of which must exist. The experts of a layer are one parameter of three dimensions
    (gate_up_proj, down_proj), or both of them by the name of the module that holds them (experts).

    In a mixture all targets are full paths, and layers that peft would take for experts (see _renamed_by_peft) are
    named by their weights, as the experts are: the adapter is of the same kind and shape.

    Raises:
        InputError: a name that nothing has, or of a layer that cannot have an adapter.
    """
    experts = expert_parameters(model)
    linear = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    apart = left_out(model)
    if spec == "all":
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        scores = {name for name in SCORE_HEADS if hasattr(model, name)}
        linear = [
            path
            for path in linear
            if path not in apart and model.get_submodule(path) is not head and path.split(".")[0] not in scores
        ]
        return _as_peft_takes_them(model, linear, experts)
    names = [name.strip() for name in spec.split(",") if name.strip()]
    if not experts:
        _require_modules(model, names, "--target_modules", linear_only=True)
    missing = [name for name in names if experts and not any(_is_called(path, name) for path in linear + experts)]
    if missing:
        there = sorted({path.rpartition(".")[-1] for path in linear + experts if path not in apart})
        raise InputError(
            f"--target_modules {spec}: no linear layer and no experts named {', '.join(missing)}; there is: experts, "
            f"{', '.join(there)}"
        )
    refused = {path: why for path, why in apart.items() if any(_is_called(path, name) for name in names)}
    tolerated = [name for name in names if any(_is_called(path, name) for path in linear if path not in apart)]
    never = [name for name in names if name not in tolerated and any(_is_called(path, name) for path in refused)]
    if never:
        path = next(path for path in refused if _is_called(path, never[0]))
        raise InputError(f"--target_modules {spec}: {path} {refused[path]}; leave {', '.join(never)} out")
    if not experts and not refused:
        return names, []

    def chosen(paths: list[str]) -> list[str]:
        return [path for path in paths if path not in refused and any(_is_called(path, name) for name in names)]

    embeddings = [path for path, module in model.named_modules() if isinstance(module, nn.Embedding)]
    return _as_peft_takes_them(model, chosen(linear + embeddings), chosen(experts))


def left_out(model: nn.Module) -> dict[str, str]:
    """The linear layers that never have an adapter, with the reason, as the end of a sentence that begins with them.

    Routers: an update of theirs changes which experts see a token, and not what they make of it. Layers whose weights
    the kernel of a state-space mixer reads, so that an adapter on them would be passed by. Layers that share their
    weight with others: an adapter on one of them could not be merged. Towers of other senses than text.
    """
    found: dict[str, str] = {}
    weights: dict[int, list[str]] = {}
    blocks = {path.rsplit(".", 2)[0] for path in expert_parameters(model)}
    beside = beside_language(model)
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        weights.setdefault(id(module.weight), []).append(path)
        holder, _, name = path.rpartition(".")
        if _is_router(model, path, module, blocks):
            found[path] = "is a router, and routers have no adapter"
        elif name in _weights_read(model.get_submodule(holder).__class__):
            found[path] = "is read by a kernel (of a state-space layer, say) that would pass by an adapter"
        elif is_beside(path, beside):
            found[path] = "is not of the language model"
    for paths in weights.values():
        for path in paths if len(paths) > 1 else ():
            found.setdefault(path, f"shares its weight with {', '.join(other for other in paths if other != path)}")
    return found


def _is_router(model: nn.Module, path: str, module: nn.Module, blocks: set[str]) -> bool:
    """Whether this linear layer chooses experts (one that weighs a shared expert does not).

    Going by names (mlp.router, mlp.gate.wg), and by what is made of it: something else than a
    tensor, or, in a block with experts, a number for each of them that no other layer of the block reads.

    Args:
        blocks: paths of the modules that hold experts.
    """
    names = path.lower().split(".")
    if any("router" in name for name in names) or not _makes_a_tensor(module):
        return True
    block = next((block for block in blocks if path.startswith(f"{block}.")), None)
    if block is None:
        return False
    inside = names[len(block.split(".")) :]
    if not {"gate", "gating"}.isdisjoint(inside):
        return True
    if any("attn" in name or "attention" in name for name in inside):
        return False
    experts = {shape_of(p)[0] for p in model.get_submodule(block).parameters() if len(shape_of(p)) == 3}
    beside = model.get_submodule(path.rpartition(".")[0]).children()
    widths = {_sizes(other)[0] for other in beside if isinstance(other, (nn.Linear, Conv1D))}
    outputs = _sizes(module)[1]
    return outputs in experts and outputs not in widths and outputs / 2 not in widths


def _makes_a_tensor(module: nn.Linear | Conv1D) -> bool:
    """Found without numbers, for linear layers with a forward pass of an architecture's own: Phi-MoE's and Llama 4's
    routers are such, and make tuples."""
    if not type(module).__module__.startswith(("transformers.models", "transformers_modules")):
        return True
    like = copy.copy(module)
    like._parameters = {
        name: None if p is None else nn.Parameter(torch.empty(shape_of(p), device="meta"), requires_grad=False)
        for name, p in module._parameters.items()
    }
    try:
        return isinstance(like(torch.empty(1, 2, _sizes(module)[0], device="meta")), torch.Tensor)
    except Exception:  # of any kind: it is the architecture's own code
        return False


@functools.cache
def _weights_read(architecture: type[nn.Module]) -> frozenset[str]:
    """Names of layers whose weight the code of a module reads by itself, in place of calling them: the kernels of
    state-space mixers do. (BLOOM does, only where pretraining_tp asks for it.)"""
    try:
        code = inspect.getsource(architecture)
    except (OSError, TypeError):  # made at run time
        return frozenset()
    if "pretraining_tp" in code:
        return frozenset()
    return frozenset(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape))", code))


def _sizes(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """(inputs, outputs)"""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def _as_peft_takes_them(model: nn.Module, linear: list[str], experts: list[str]) -> tuple[list[str], list[str]]:
    """Paths of layers and of parameters, such that peft adapts these and no others.

    Quantized weights cannot be added to, so that of what peft would rename those have no adapter.
    """
    renamed = _renamed_by_peft(model) & set(linear)
    packed = sorted(path for path in renamed if quantized_inside(model.get_submodule(path)))
    if packed:
        logger.warning("no adapter on %d quantized layers beside experts: %s", len(packed), ", ".join(packed[:6]))
    by_weight = [f"{path}.weight" for path in linear if path in renamed and path not in packed]
    return [path for path in linear if path not in renamed], experts + by_weight


def _renamed_by_peft(model: nn.Module) -> set[str]:
    """Layers that peft takes for the experts of an older transformers by their names (gate_proj of a shared expert, or
    of a dense layer between mixtures), whenever an adapter is made or loaded: these layers themselves get none."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    # some placeholders make the set one that peft does not refuse as a half
    names = {f"experts.{name}" for name in ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")}
    config = LoraConfig(target_modules=linear | names)
    convert_peft_config_for_transformers(config, model, None)
    return linear - set(config.target_modules or ())


def expert_parameters(model: nn.Module) -> list[str]:
    """Paths of the parameters that hold all experts of a layer, (experts, ., .) each; [] without a mixture."""
    return [
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if len(shape_of(parameter)) == 3 and "expert" in f"{path}.{name} {type(module).__name__}".lower()
    ]


def _is_called(path: str, name: str) -> bool:
    """Whether a module's or parameter's path ends with this name, or its holder's does."""
    return f".{path}".endswith(f".{name}") or f".{path.rpartition('.')[0]}".endswith(f".{name}")


def _report_left_out(model: nn.Module) -> None:
    """Say which linear layers `all` leaves out beside the head, and why."""
    reasons: dict[str, list[str]] = {}
    for path, why in left_out(model).items():
        reasons.setdefault(why, []).append(path)
    for why, paths in reasons.items():
        logger.info("no adapter on %d layers, each %s: %s", len(paths), why, ", ".join(paths[:6]))


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
    beside = beside_language(model)
    holders = [path for path, module in model.named_modules() if module._parameters and not is_beside(path, beside)]
    names = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in holders))
    missing = [part for part in parts if not any(part in name for name in names)]
    if missing:
        raise InputError(
            f"--trainable_params {spec}: no module has {', '.join(missing)} in its name; there is: {', '.join(names)}"
        )
    if beside:  # peft goes by the ends of paths, and towers have norms as well
        return [path for path in holders if any(part in path.rsplit(".", 1)[-1] for part in parts)]
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
    return not set(embedding_names(model)).isdisjoint(name.rpartition(".")[-1] for name in saved or ())


def embedding_names(model: PreTrainedModel) -> list[str]:
    """The names of the input embedding and, where it is a module of its own, the head: embed_tokens, lm_head."""
    wanted = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [path.rsplit(".", 1)[-1] for path, module in model.named_modules() if any(module is m for m in wanted)]


def linear_names(model: nn.Module, but: Iterable[str] = ()) -> list[str]:
    """The names of the linear layers, each once: down_proj, gate_proj, ...; `but` those with these paths alone."""
    layers = (path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)))
    return sorted({path.rpartition(".")[-1] for path in layers if path not in but})


def _require_modules(model: nn.Module, names: list[str], flag: str, linear_only: bool) -> None:
    kinds = (nn.Linear, Conv1D, nn.Embedding) if linear_only else nn.Module
    paths = [path for path, module in model.named_modules() if isinstance(module, kinds)]
    missing = [name for name in names if not any(path == name or path.endswith("." + name) for path in paths)]
    if missing:
        there = linear_names(model, but=left_out(model))
        if not linear_only:
            there = sorted({*there, *embedding_names(model)})
        wanted = "linear layer" if linear_only else "module"
        raise InputError(
            f"{flag} {','.join(names)}: no {wanted} named {', '.join(missing)}; there is: {', '.join(there)}"
        )
