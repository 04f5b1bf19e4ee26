"""The numbers of a model that its memory depends on, read off a copy on the meta device: nothing is loaded."""

import copy
import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from stagewise.arguments import LoraArguments
from stagewise.errors import InputError
from stagewise.modeling.lora import (
    check_adapter,
    left_out,
    linear_names,
    lora_config,
    require_mergeable,
    train_language,
)
from stagewise.modeling.multimodal import generating_class
from stagewise.modeling.segments import obstacle
from stagewise.modeling.token_loss import hidden_states_reproduce_logits


@dataclass(frozen=True)
class ModelShape:
    """Counts are parameters, widths are numbers for each token; of all layers together unless it says otherwise.

    parameters: of the base, tied ones once; embedding: those of the input embedding.
    linear, linear_rows: weights and outputs of the linear layers that quantization packs: all but the head.
    largest_layer: the most parameters that one module holds itself.
    trainable: parameters with gradients; adapter: those of them that an adapter added, in float32 whatever the base.
    trainable_embedding: those of them in embeddings; trainable_head: those in the head's matrix.
    factored: numbers that Adafactor keeps for the trainable ones: a row and a column of each matrix.
    layers, hidden, heads, vocab: as the configuration says.
    query_width, key_value_width: of one layer, of all its heads (grouped-query attention has fewer for keys).
    mlp_width: of one layer, what a token passes through: of a mixture of experts, those that it is sent to.
    gated: the feed-forward part has a gate (three matrices).
    experts_per_token: 0 where there is no mixture of experts.
    norm_width: of all normalizations in a layer; layer_norm: they are torch's LayerNorm, otherwise RMSNorm.
    stream_inputs: inputs of linear layers that read the residual stream, one for each layer that reads it.
    adapted_inputs, adapted_ranks: inputs of the layers with an adapter, and the adapters' ranks.
    adapted_tensors: parameters that an adapter adds its product to before they are used (fused experts).
    attention: the kernel that transformers chooses where none is asked for; segments: it may run without masks,
        segment by segment.
    plain_head: logits are the head's output and nothing more, so that the loss takes them chunk by chunk.
    """

    parameters: int
    embedding: int
    linear: int
    linear_rows: int
    largest_layer: int
    trainable: int
    adapter: int
    trainable_embedding: int
    trainable_head: int
    factored: int
    layers: int
    hidden: int
    heads: int
    vocab: int
    query_width: int
    key_value_width: int
    mlp_width: int
    gated: bool
    experts_per_token: int
    norm_width: int
    layer_norm: bool
    stream_inputs: int
    adapted_inputs: int = 0
    adapted_ranks: int = 0
    adapted_tensors: int = 0
    attention: str = "sdpa"
    segments: bool = False
    plain_head: bool = True


def read_shape(
    config: PretrainedConfig,
    lora_args: LoraArguments,
    vocab_size: int | None = None,
    scores: bool = False,
    trains_new_tokens: bool = False,
    trust_remote_code: bool = False,
) -> ModelShape:
    """The shape of the model that a stage would train.

    Args:
        lora_args: the adapter, or with use_peft False all weights trained.
        vocab_size: the embedding grows to this many rows where it has fewer.
        scores: one score for a row in place of a language-model head.
        trains_new_tokens: as attach_adapter.

    Raises:
        InputError: the adapter's targets are not in the model, or --peft_path is no adapter for this kind of model.
    """
    model = empty_model(config, vocab_size, scores, trust_remote_code)
    train_language(model)
    base = _base_shape(model)
    if not lora_args.use_peft:
        return base
    return _with_adapter(base, empty_adapter(model, lora_args, scores, trains_new_tokens))


def empty_model(
    config: PretrainedConfig,
    vocab_size: int | None = None,
    scores: bool = False,
    trust_remote_code: bool = False,
    kernel: str | None = None,
    on_meta: bool = True,
) -> Any:
    """The model of a configuration without its weights; see read_shape.

    kernel: of attention, as it is asked for. on_meta: off for a caller that sees to it that weights are not made.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, vocab_size or 0)
    auto_class = AutoModelForSequenceClassification if scores else generating_class(config)
    if scores:
        config.num_labels = 1
    if hasattr(config, "quantization_config"):  # a saved quantized checkpoint: its layers are counted as they are used
        del config.quantization_config
    attention = {"attn_implementation": kernel} if kernel else {}
    with torch.device("meta") if on_meta else nullcontext(), _without_zero_init():
        return auto_class.from_config(config, trust_remote_code=trust_remote_code, **attention)


def empty_adapter(model: Any, lora_args: LoraArguments, scores: bool = False, trains_new_tokens: bool = False) -> Any:
    """A PeftModel of an empty_model, with the adapter that a run would train.

    Raises:
        InputError: the adapter's targets are not in the model, or --peft_path is no adapter for this kind of model.
    """
    task = "SEQ_CLS" if scores else "CAUSAL_LM"
    if lora_args.peft_path:
        check_adapter(lora_args.peft_path, task)
        require_mergeable(lora_args.peft_path, model)
        return saved_adapter(model, "--peft_path", lora_args.peft_path)
    adapter = lora_config(model, lora_args, task, trains_new_tokens)
    return _put_on(model, adapter, f"--target_modules {lora_args.target_modules}: peft cannot adapt them all")


def saved_adapter(model: Any, flag: str, path: str) -> Any:
    """A PeftModel of an empty_model, with the adapter of a folder. Raises InputError where it has other targets."""
    from peft import LoraConfig

    adapter = LoraConfig.from_pretrained(path)
    adapter.inference_mode = False
    named = adapter.target_modules
    names = [named] if isinstance(named, str) else sorted({name.rpartition(".")[-1] for name in named or ()})
    return _put_on(model, adapter, f"{flag} {path}: is for another base: it adapts {', '.join(names)}")


def _put_on(model: Any, adapter: Any, what: str) -> Any:
    from peft import get_peft_model

    there = ", ".join(linear_names(model, but=left_out(model)))  # before peft has put anything on some of them
    with torch.device("meta"), _without_zero_init(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, which says it again when the model itself is made
        try:
            return get_peft_model(model, adapter)
        except ValueError as error:
            # peft's own words may name every layer of a large model
            raise InputError(f"{what}; the linear layers of {type(model).__name__} are {there}") from error


@contextmanager
def _without_zero_init() -> Iterator[None]:
    """Under ZeRO-3 transformers shards every model that is made; this one is only looked at."""
    from transformers.integrations import deepspeed as integration

    found = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = found


def _base_shape(model: Any) -> ModelShape:
    """Without an adapter: what requires gradients is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = model.config.get_text_config()
    stack = _layers(model, config.num_hidden_layers)
    head = model.get_output_embeddings()
    linears = [module for module in stack.modules() if isinstance(module, (nn.Linear, Conv1D))]
    norms = [module for module in stack.modules() if "norm" in type(module).__name__.lower()]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query = config.num_attention_heads * head_dim
    key_value = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_dim
    experts = _experts_per_token(config) if any("expert" in name for name, _ in stack.named_parameters()) else 0
    mlp = _mlp_width(config, experts)
    matrices = sum(p.numel() for p in stack.parameters() if p.dim() > 1) // len(stack)
    attention = 2 * config.hidden_size * (query + key_value)
    readers = sum(_sizes(module)[0] for module in linears) - len(stack) * (query + (0 if experts else mlp))
    return ModelShape(
        parameters=_count(model.parameters()),
        embedding=_count(model.get_input_embeddings().parameters()),
        linear=sum(module.weight.numel() for module in linears),
        linear_rows=sum(_sizes(module)[1] for module in linears),
        largest_layer=max(_count(module.parameters(recurse=False)) for module in model.modules()),
        trainable=_count(trained),
        adapter=0,
        trainable_embedding=_count(weight for weight in _embeddings(model) if weight.requires_grad),
        trainable_head=head.weight.numel() if head is not None else 0,
        factored=_factored(trained),
        layers=len(stack),
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        vocab=config.vocab_size,
        query_width=query,
        key_value_width=key_value,
        mlp_width=mlp,
        # a mixture of experts has always been gated, and its matrices say nothing of what one token passes through
        gated=bool(experts) or matrices - attention > 2.5 * config.hidden_size * mlp,
        experts_per_token=experts,
        norm_width=sum(_norm_width(name, module, config, head_dim) for name, module in _named(stack, norms)),
        layer_norm=any(isinstance(module, nn.LayerNorm) for module in norms),
        stream_inputs=max(readers, 0),
        attention=getattr(model.config, "_attn_implementation", None) or "eager",
        segments=obstacle(model) is None,
        plain_head=hidden_states_reproduce_logits(model),
    )


def _with_adapter(base: ModelShape, model: Any) -> ModelShape:
    """The shape with the adapter of a PeftModel: what it adds, and only that, is trained."""
    from peft.tuners.lora import LoraLayer, ParamWrapper

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    wrappers = [module for module in layers if isinstance(module, ParamWrapper)]
    plain = [module for module in layers if module not in wrappers]
    head = model.get_base_model().get_output_embeddings()
    return replace(
        base,
        trainable=_count(trained.values()),
        adapter=_count(parameter for name, parameter in trained.items() if "lora_" in name),
        trainable_embedding=_count(p for p in _embeddings(model) if p.requires_grad),
        trainable_head=_count(p for p in head.parameters() if p.requires_grad and p.dim() > 1) if head else 0,
        factored=_factored(trained.values()),
        adapted_inputs=sum(module.in_features for module in plain),
        adapted_ranks=sum(rank for module in layers for rank in module.r.values()),
        adapted_tensors=sum(module.get_param().numel() for module in wrappers),
    )


def adapter_file_bytes(folder: str) -> int:
    """Size of an adapter's weights as saved; 0 where the folder holds none."""
    return sum(path.stat().st_size for path in Path(folder).glob("adapter_model.*") if path.suffix != ".json")


def adapter_base(folder: str) -> str | None:
    """What the adapter in `folder` was trained on; None where it holds no adapter."""
    path = Path(folder, "adapter_config.json")
    return json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"] if path.is_file() else None


def _layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The stack of decoder layers."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return max(lists, key=lambda stack: _count(stack.parameters()))


def _count(parameters: Iterable[nn.Parameter]) -> int:
    """Tied parameters once."""
    return sum({id(parameter): parameter.numel() for parameter in parameters}.values())


def _factored(parameters: Iterable[nn.Parameter]) -> int:
    shapes = {id(parameter): parameter.shape for parameter in parameters}.values()
    return sum(
        shape.numel() if len(shape) < 2 else shape[:-1].numel() + (shape[:-2] + shape[-1:]).numel() for shape in shapes
    )


def _embeddings(model: nn.Module) -> list[nn.Parameter]:
    return [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]


def _sizes(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """(inputs, outputs)"""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def _named(stack: nn.ModuleList, modules: list[nn.Module]) -> list[tuple[str, nn.Module]]:
    wanted = {id(module) for module in modules}
    return [(name, module) for name, module in stack.named_modules() if id(module) in wanted]


def _norm_width(name: str, module: nn.Module, config: PretrainedConfig, head_dim: int) -> int:
    """Numbers that a normalization sees of a token: those of queries and keys work on each head."""
    width = _count(module.parameters(recurse=False)) // (2 if getattr(module, "bias", None) is not None else 1)
    if width != head_dim or width == config.hidden_size:
        return width
    heads = config.num_attention_heads
    return width * (heads if "q" in name.rsplit(".", 1)[-1] else getattr(config, "num_key_value_heads", heads))


def _experts_per_token(config: PretrainedConfig) -> int:
    names = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
    return next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 1)


def _mlp_width(config: PretrainedConfig, experts: int) -> int:
    names = ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim")
    width = next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 4 * config.hidden_size)
    if not experts:
        return width
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    return experts * int(getattr(config, "moe_intermediate_size", None) or width) + int(shared)
