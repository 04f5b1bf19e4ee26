"""Models that also read images or sounds: what loads them whole, and which of their parameters are the language model.

All stages train on text. Such a model is loaded as the architecture that its folder says, so that an adapter has the
names of that architecture and what is saved is all of it; towers and projectors are frozen, and run nowhere.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from stagewise.modeling.model_files import ADAPTER_WEIGHTS, SCORE_HEADS, tensor_shapes


def generating_class(config: PretrainedConfig) -> Any:
    """transformers' auto class for a configuration's model with a language-model head, whole.

    AutoModelForCausalLM knows few models that read images as well, and of some of these the language model alone.
    """
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if remote or config.get_text_config() is config or config.is_encoder_decoder:
        return AutoModelForCausalLM
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if known is not None and known.config_class is type(config):
        return AutoModelForCausalLM
    return AutoModelForMultimodalLM if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING else AutoModelForCausalLM


def adapted_config(config: PretrainedConfig, adapter: str) -> PretrainedConfig:
    """The configuration of what the adapter in a folder is for: where it was trained on the language model alone, as
    AutoModelForCausalLM loads it of some, its layers have other names than in the whole model.
    """
    path = Path(adapter, ADAPTER_WEIGHTS)
    if generating_class(config) is not AutoModelForMultimodalLM or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config
    names = tensor_shapes("--lora_model", path) if path.is_file() else ()
    layers = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names if ".lora_" in name}
    with torch.device("meta"):
        modules = {path for path, _ in AutoModelForCausalLM.from_config(config).named_modules()}
    return config.get_text_config() if layers and layers <= modules else config


def beside_language(model: nn.Module) -> tuple[str, ...]:
    """Paths of what text alone does not come through: towers, projectors, their parameters, layers of the language
    model that attend to images. () for a model that reads text alone.
    """
    config = getattr(model, "config", None)
    if config is None or config.get_text_config() is config:
        return ()
    embedding, text = model.get_input_embeddings(), type(config.get_text_config())
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    language = next(
        (
            path
            for path, module in model.named_modules()
            if path and isinstance(getattr(module, "config", None), text) and embedding in module.modules()
        ),
        None,
    )
    # layers that attend to images alone, among the language model's own: without an image they are passed by
    found = [path for path, module in model.named_modules() if hasattr(module, "cross_attn")]
    steps = language.split(".") if language else []
    for depth, step in enumerate(steps):
        holder = model.get_submodule(".".join(steps[:depth]))
        own = [*holder.named_children(), *holder.named_parameters(recurse=False)]
        beside = [name for name, part in own if name != step and part is not head and name not in SCORE_HEADS]
        found += [".".join([*steps[:depth], name]) for name in beside]
    return tuple(found)


def is_beside(path: str, beside: tuple[str, ...]) -> bool:
    """Whether a module or parameter is one of `beside_language`, or inside of one."""
    return any(path == other or path.startswith(f"{other}.") for other in beside)
