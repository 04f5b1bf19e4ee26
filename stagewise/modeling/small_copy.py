"""A small model of the same architecture, for proofs: the model itself is not run before it is in its place.

What an architecture does between the decoder and the logits, or with positions, is written in its code, and does not
depend on its size. So a proof needs no weights, no memory worth speaking of, and, where an engine shares the weights
out, no other process. On the accelerator the same copy shows what a kernel does.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

T = TypeVar("T")

VOCABULARY = 128
# What a copy has at most of sizes that nothing else depends on: its vocabulary, the widths of feed-forward parts.
# A window is shorter than the rows of a proof.
LIMITS = {
    "sliding_window": 8,
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "pad_token_id": VOCABULARY - 1,
    **dict.fromkeys(
        (
            "intermediate_size", "intermediate_size_mlp", "moe_intermediate_size", "shared_expert_intermediate_size",
            "ffn_hidden_size", "ffn_dim", "n_inner",
        ),
        32,
    ),
    "num_kv_shared_layers": 0,  # which would be more than there are layers
}  # fmt: skip
# What configurations call the number of experts, and of those that a token is sent to.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")


def on_small_copy(model: PreTrainedModel, kernel: str, prove: Callable[[PreTrainedModel], T]) -> T:
    """What `prove` finds on a copy, in eval mode, on the CPU, in float32, with random weights.

    First on one with few narrow layers, few heads and few experts; if that cannot be made or run (configurations
    demand many things), on one whose layers are narrow in their feed-forward parts alone.

    Args:
        model: any instance of the architecture; its parameters are not looked at.
        kernel: of attention.

    Raises:
        Exception: whatever the second copy failed with.
    """
    try:
        return prove(_build(type(model), _small_config(model.config, kernel, narrow=True)))
    except Exception:  # of any kind: it is the architecture's own code, that of a remote one as well
        return prove(_build(type(model), _small_config(model.config, kernel, narrow=False)))


def _small_config(config: PretrainedConfig, kernel: str, narrow: bool) -> PretrainedConfig:
    config = copy.deepcopy(config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    config._attn_implementation = kernel
    text = config.get_text_config()
    for part in _parts(config):
        _keep_few_layers(part)
    for part in (config, text):
        for name, most in LIMITS.items():
            if isinstance(value := getattr(part, name, None), int):
                setattr(part, name, min(value, most))
    if narrow:
        _keep_few_heads(text)
        _keep_few_experts(text)
    return config


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A configuration, and those of encoders and the like inside it."""
    yield config
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PretrainedConfig):
            yield from _parts(part)


def _keep_few_layers(config: PretrainedConfig) -> None:
    """The first layer of each kind, two at least: what is listed layer by layer says which kinds there are."""
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int) or count < 2:
        return
    lists: dict[str, Any] = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple, str)) and len(value) == count
    }
    kinds = list(zip(*lists.values(), strict=True)) or [()] * count
    first = {repr(kind): place for place, kind in reversed(list(enumerate(kinds)))}
    kept = sorted({*first.values()} if len(first) > 1 else {0, 1})
    config.num_hidden_layers = len(kept)
    for name, value in lists.items():
        found = [value[place] for place in kept]
        setattr(config, name, "".join(found) if isinstance(value, str) else type(value)(found))


def _keep_few_heads(config: PretrainedConfig) -> None:
    """As wide as they were, because positions and kernels depend on that; grouped ones stay grouped."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    few, few_groups = (2, min(groups, 2)) if groups in (1, heads) else (4, 2)
    if few * width >= config.hidden_size:
        return
    if getattr(config, "word_embed_proj_dim", None) == config.hidden_size:  # of OPT; else it is projected
        config.word_embed_proj_dim = few * width
    config.hidden_size, config.num_attention_heads = few * width, few
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = few_groups


def _keep_few_experts(config: PretrainedConfig) -> None:
    """As many as a token is sent to, so that no rounding sends it elsewhere."""
    chosen = next((n for name in CHOSEN if isinstance(n := getattr(config, name, None), int) and n), None)
    for name in EXPERTS if chosen else ():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, chosen)
    for name in ("n_group", "topk_group"):
        if getattr(config, name, None):
            setattr(config, name, 1)


def _build(architecture: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """With weights that make every layer matter: as they are drawn for training, attention is all but uniform."""
    # not by from_config, which under ZeRO-3 would share the weights out
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = architecture(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
                else:
                    parameter += 0.1 * torch.randn_like(parameter)
    return model
