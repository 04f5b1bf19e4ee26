"""Merging shard by shard: every kind of adapter, what is written, what is in memory, and what a failure leaves."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import merge_peft_adapter
from tests.architectures import tiny_model

VOCABULARY = 640
LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
LINEAR = {**LORA, "target_modules": "all-linear"}
TIED = {"tie_word_embeddings": True}
DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "num_key_value_heads": 4, "head_dim": 4,
}  # fmt: skip


def make_base(folder: Path, tokenizer, model, shards: str = "40KB", dtype: torch.dtype = torch.float32) -> Path:
    """A base saved in several files; every tensor of it is random (norms and biases too)."""
    torch.manual_seed(1)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and (tensor.dim() < 2 or "bias" in name):
            tensor += 0.1 * torch.randn_like(tensor)
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(folder: Path, base: Path, **settings) -> Path:
    """A trained adapter: whatever it could train is off its start, but for magnitudes, which stay near it."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**settings))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def merge(base: Path, adapter: Path, output: Path, *flags: str) -> dict:
    return merge_peft_adapter.main(
        ["--base_model", str(base), "--lora_model", str(adapter), "--output_dir", str(output), *flags]
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids = torch.randint(5, VOCABULARY - 50, (3, 20), generator=torch.Generator().manual_seed(0))
    return model.eval()(input_ids=ids, use_cache=False).logits


def difference_to_adapter(base: Path, adapter: Path, merged: Path) -> float:
    """Against peft alone; as a share of what the adapter changes."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits(plain).clone()
    wanted = logits(PeftModel.from_pretrained(plain, adapter))
    found = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
    assert (wanted - before).abs().max() > 1e-3
    return ((found - wanted).abs().max() / (wanted - before).abs().max()).item()


MODELS = {
    "llama": {}, "qwen2": TIED, "gemma2": {}, "gemma3_text": {}, "phi": {}, "bloom": {}, "glm4": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}, "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "mixtral": {}, "qwen2_moe": {}, "qwen3_moe": {},
    "deepseek_v3": DEEPSEEK, "mamba": {"state_size": 4, "num_hidden_layers": 2}, "falcon": {"alibi": True},
    "starcoder2": {}, "cohere": {}, "olmo2": {}, "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
}  # fmt: skip
EXPERTS = {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.mark.parametrize("name", MODELS)
def test_the_merged_model_is_base_and_adapter(name, tokenizer, tmp_path):
    model = tiny_model(name, vocab_size=VOCABULARY, **MODELS[name])
    base = make_base(tmp_path / "base", tokenizer, model)
    settings = {**LORA, **EXPERTS} if name in ("mixtral", "qwen2_moe", "qwen3_moe") else LINEAR
    if name == "mamba":  # peft takes no other
        settings = {**LORA, "target_modules": ["in_proj", "x_proj"]}
    adapter = make_adapter(tmp_path / "adapter", base, **settings, fan_in_fan_out=name == "gpt2")
    report = merge(base, adapter, tmp_path / "merged")
    assert report["proof"] == "logits"
    assert report["max_logit_difference"] < 1e-3 * report["adapter_effect"]
    assert difference_to_adapter(base, adapter, tmp_path / "merged") < 1e-3
    one, other = tensors(base), tensors(tmp_path / "merged")
    assert {key: tensor.shape for key, tensor in one.items()} == {key: tensor.shape for key, tensor in other.items()}
    files = [sorted(path.name for path in folder.glob("model*")) for folder in (base, tmp_path / "merged")]
    assert files[0] == files[1]
    assert len(files[0]) > 2


KINDS = {
    "rslora": {**LINEAR, "use_rslora": True},
    "dora": {**LINEAR, "use_dora": True},
    "all biases": {**LINEAR, "bias": "all"},
    "its layers' biases": {**LINEAR, "bias": "lora_only"},
    "bias of its own": {**LORA, "target_modules": ["q_proj", "k_proj"], "lora_bias": True},
    "norms in full": {**LINEAR, "modules_to_save": ["norm", "input_layernorm"]},
    "embedding in full": {**LINEAR, "modules_to_save": ["embed_tokens"]},
    "embedding and head in full": {**LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]},
    "head in full": {**LINEAR, "modules_to_save": ["lm_head"]},
    "adapter on the embedding": {**LORA, "target_modules": ["embed_tokens", "q_proj"]},
    "adapter on the head": {**LORA, "target_modules": ["lm_head", "q_proj"]},
    "some tokens": {**LINEAR, "trainable_token_indices": [7, 11, 200]},
    "pissa": {**LINEAR, "init_lora_weights": "pissa"},
    "olora": {**LINEAR, "init_lora_weights": "olora"},
    "one rank for each": {**LINEAR, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_merges(kind, tied, tokenizer, tmp_path):
    """qwen2: some of its layers have biases."""
    model = tiny_model("qwen2", vocab_size=VOCABULARY, tie_word_embeddings=tied)
    base = make_base(tmp_path / "base", tokenizer, model)
    settings = dict(KINDS[kind])
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    report = merge(base, adapter, tmp_path / "merged")
    assert report["proof"] == "logits"
    assert report["max_logit_difference"] < 1e-3 * report["adapter_effect"]
    assert difference_to_adapter(base, adapter, tmp_path / "merged") < 1e-3
