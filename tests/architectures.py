"""Tiny random models of the architectures that a feature is tested on."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# What each needs beside the sizes; a name's second word says what is special about it.
ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {},
    "mistral window": {"sliding_window": 12},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "phi": {},
    "glm4": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]},
    "bloom": {"n_head": 4, "n_layer": 2},
}  # fmt: skip
# Those whose attention goes through transformers' interface, and can be computed in segments.
SEGMENTED = (
    "llama", "qwen2", "qwen3", "mistral", "mistral window", "mixtral", "qwen3_moe", "phi", "glm4", "gemma",
    "gemma3_text",
)  # fmt: skip


def tiny_config(name: str, **changes):
    return AutoConfig.for_model(name.split()[0], **{**SIZES, **ARCHITECTURES.get(name, {}), **changes})


def tiny_model(name: str, kernel: str | None = None, **changes) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(name, **changes), attn_implementation=kernel)


def sharp_model(name: str, **changes) -> PreTrainedModel:
    """One whose attention is far from uniform, or a leak would hardly show."""
    model = tiny_model(name, **changes)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "q_proj" in path or "k_proj" in path:
                weight *= 20
    return model
