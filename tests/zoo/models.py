"""Tiny random models of the architectures of transformers that people train, from its configurations."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel

from tests.zoo.tokenizers import tiny_tokenizer

# What nearly every configuration takes: sizes that are unlike each other, as far as attention allows.
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
_MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": 4, "head_dim": 4,
}  # fmt: skip
_SHARED = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 8,
}  # fmt: skip
_WINDOW = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
# What each needs beside the sizes; a name's second word says what is special about it.
ARCHITECTURES: dict[str, dict] = {
    # dense
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {},
    "mistral window": {"sliding_window": 12},
    "ministral": {"head_dim": 8, **_WINDOW},
    "phi": {},
    "phi3": {},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, **_WINDOW},
    "olmo2": {},
    "olmo3": _WINDOW,
    "smollm3": {},
    "starcoder2": {},
    "stablelm": {},
    "nemotron": {"head_dim": 8},
    "helium": {"head_dim": 8},
    "exaone4": {"head_dim": 8, "sliding_window": 12, "sliding_window_pattern": 2},
    "seed_oss": {"head_dim": 8},
    "ernie4_5": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "arcee": {},
    "apertus": {},
    "minicpm3": {**_MLA},
    "nanochat": {},
    "persimmon": {},
    "modernbert-decoder": {"local_attention": 12, "num_key_value_heads": 4},
    # soft caps
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 12},
    "gemma3_text": {"head_dim": 8, **_WINDOW},
    "gemma3n_text": {
        "head_dim": 8, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 600, "hidden_size_per_layer_input": 8,
        "laurel_rank": 8, "activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [48, 48], **_WINDOW,
    },
    "gemma4_text": {
        "head_dim": 8, "global_head_dim": 8, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, **_WINDOW
    },
    # the era of GPT-2
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_heads": 4, "num_layers": 2},
    "gptj": {**_GPT2, "rotary_dim": 4},
    "codegen": {**_GPT2, "rotary_dim": 4},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "opt projected": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "biogpt": {},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "bloom": {"n_head": 4, "n_layer": 2},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "falcon alibi": {"alibi": True, "new_decoder_architecture": False, "multi_query": False},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    # mixtures of experts
    "mixtral": _LOCAL,
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**_EXPERTS, "head_dim": 8},
    "olmoe": _EXPERTS,
    "phimoe": _LOCAL,
    "granitemoe": {**_LOCAL, "logits_scaling": 4.0},
    "granitemoeshared": {**_LOCAL, "shared_intermediate_size": 24},
    "llama4_text": {
        **_LOCAL, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 64,
        "interleave_moe_layer_step": 1,
    },
    "gpt_oss": {**_LOCAL, "head_dim": 8, **_WINDOW},
    "deepseek_v2": {**_MLA, **_SHARED, "topk_method": "greedy"},
    "deepseek_v3": {**_MLA, **_SHARED},
    "glm4_moe": {**_SHARED, "head_dim": 8},
    "glm4_moe_lite": {**_MLA, **_SHARED, "mlp_layer_types": ["dense", "sparse"]},
    "dots1": {**_SHARED, "head_dim": 8},
    "ernie4_5_moe": {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1, "moe_layer_end_index": 1, "head_dim": 8,
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "minimax_m2": {**_LOCAL, "head_dim": 8, "rotary_dim": 4},
    "jetmoe": {**_LOCAL, "kv_channels": 8},
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    # state spaces, recurrences, and hybrids
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "falcon_mamba": {"state_size": 8},
    "falcon_h1": {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
        "head_dim": 8, "lm_head_multiplier": 0.5,
    },
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "zamba": {
        "mamba_d_state": 8, "n_mamba_heads": 2, "mamba_dt_rank": 4, "attention_hidden_size": 64,
        "num_key_value_heads": 4, "attention_head_dim": 16,
        "layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3,
    },
    "zamba2": {
        "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1, "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3,
        "hybrid_layer_ids": [1, 2], "num_mem_blocks": 1, "adapter_rank": 4,
    },
    "jamba": {
        "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1,
        "ssm_state_size": 8, "head_dim": 8,
    },
    "granitemoehybrid": {
        **_LOCAL, **_MAMBA, "shared_intermediate_size": 24, "layer_types": ["mamba", "attention"],
        "logits_scaling": 4.0, "position_embedding_type": "rope",
    },
    "qwen3_next": {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": _DELTA,
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "recurrent_gemma": {"attention_window_size": 12, "block_types": ["recurrent", "attention"], "head_dim": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": 256},
}  # fmt: skip
_VIT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_SIGLIP = {"model_type": "siglip_vision_model", **_VIT}
_QWEN_VIT = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32, "patch_size": 8
}  # fmt: skip
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
# Language models with towers for images or sounds: what the text model is of ARCHITECTURES, or needs beside the sizes,
# and the rest of the configuration.
SHELLS: dict[str, tuple[str | dict, dict]] = {
    "gemma3": ("gemma3_text", {"vision_config": _VIT, "mm_tokens_per_image": 4}),
    "gemma4": ("gemma4_text", {
        "vision_config": {**_VIT, "head_dim": 8, "global_head_dim": 8, "num_key_value_heads": 4}, "audio_config": None
    }),
    "qwen2_vl": (_MROPE, {"vision_config": {
        "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8
    }}),
    "qwen2_5_vl": (_MROPE, {"vision_config": {**_QWEN_VIT, "fullatt_block_indexes": [1]}}),
    "qwen3_vl": ({"head_dim": 8, **_MROPE}, {"vision_config": {**_QWEN_VIT, "deepstack_visual_indexes": [0]}}),
    "qwen3_vl_moe": (
        {"head_dim": 8, **_MROPE, **_EXPERTS}, {"vision_config": {**_QWEN_VIT, "deepstack_visual_indexes": [0]}}
    ),
    "qwen3_5": ("qwen3_5_text", {"vision_config": _QWEN_VIT}),
    "llava": ("llama", {"vision_config": {"model_type": "clip_vision_model", **_VIT}}),
    "llava_onevision": ("qwen2", {"vision_config": _SIGLIP}),
    "mistral3": ("mistral", {"vision_config": {"model_type": "pixtral", **_VIT}}),
    "internvl": ("qwen2", {"vision_config": {**_VIT, "image_size": [32, 32], "patch_size": [8, 8]}}),
    "llama4": ("llama4_text", {"vision_config": {
        **_VIT, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32
    }}),
    "mllama": ({"cross_attention_layers": [1], "num_hidden_layers": 3}, {"vision_config": {
        **_VIT, "num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 64,
        "attention_heads": 4,
    }}),
    "smolvlm": ("llama", {"vision_config": _VIT}),
    "paligemma": ("gemma", {"vision_config": {**_SIGLIP, "projection_dim": 32}, "projection_dim": 32}),
    "glm4v": (_MROPE, {"vision_config": {**_QWEN_VIT, "num_hidden_layers": 2}}),
    "aya_vision": ("cohere2", {"vision_config": _SIGLIP}),
    "lfm2_vl": ("lfm2", {"vision_config": {**_VIT, "model_type": "siglip2_vision_model"}}),
    "qwen2_audio": ("qwen2", {"audio_config": {
        "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48
    }}),
}  # fmt: skip

# The habits of their tokenizers, see tests/zoo/tokenizers.py; of the others, byte-level without any.
_HABITS = {
    "unk is eos": ("gpt2", "gpt_bigcode", "gpt_neo", "gptj", "codegen", "gpt_neox", "opt", "phi", "starcoder2", "mpt",
                   "falcon", "stablelm", "mamba", "rwkv"),
    "pad is eos": ("llama", "olmo2", "olmo3", "smollm3", "dbrx", "granite", "granitemoe", "nemotron_h"),
    "no BOS": ("bloom", "xglm", "biogpt", "modernbert-decoder", "persimmon", "bamba", "falcon_h1"),
    "sentencepiece": ("mistral", "ministral", "mixtral", "phi3", "phimoe", "jamba", "zamba", "zamba2", "minicpm3",
                      "jetmoe", "deepseek_v2", "ernie4_5", "ernie4_5_moe"),
    "sentencepiece, <bos>": ("gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "recurrent_gemma",
                             "cohere", "cohere2"),
}  # fmt: skip


def habit_of(name: str) -> str:
    """Of the tokenizer that models of this architecture come with."""
    text = SHELLS[name][0] if name in SHELLS else name.split()[0]
    return next((habit for habit, names in _HABITS.items() if text in names), "byte-level")


def save_model(name: str, folder: Path) -> Path:
    """Write a tiny model of the table with its tokenizer to folder / name."""
    path = folder / name.replace(" ", "-")
    tokenizer = tiny_tokenizer(habit_of(name))
    found = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    # some configurations take numbers alone, and have others by themselves, beyond the vocabulary
    ids = {name: tokenizer.eos_token_id if value is None else value for name, value in found.items()}
    model = tiny_model(name, vocab_size=len(tokenizer), **ids)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def tiny_config(name: str, **changes):
    """The configuration of a name of ARCHITECTURES or SHELLS, and of no other model's sizes."""
    if name in ARCHITECTURES:
        return AutoConfig.for_model(name.split()[0], **{**SIZES, **ARCHITECTURES[name], **changes})
    text, rest = SHELLS[name]
    own = {"model_type": text, **ARCHITECTURES[text]} if isinstance(text, str) else text
    ids = {key: value for key, value in changes.items() if key.endswith("_token_id")}
    return AutoConfig.for_model(name, text_config={**SIZES, **own, **changes}, **rest, **ids)


def tiny_model(name: str, **changes) -> PreTrainedModel:
    """A random model of a name of ARCHITECTURES or SHELLS, always the same."""
    torch.manual_seed(0)
    config = tiny_config(name, **changes)
    auto_class = AutoModelForMultimodalLM if name in SHELLS else AutoModelForCausalLM
    return auto_class.from_config(config)
