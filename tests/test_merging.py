"""Merging shard by shard: every kind of adapter, what is written, what is in memory, and what a failure leaves."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import merge_peft_adapter
from stagewise.errors import InputError, SaveFailed
from stagewise.run import merging
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


def test_a_mixture_with_adapters_of_its_experts_is_written_expert_by_expert(tokenizer, tmp_path):
    """As mixtral's files have them: w1, w2 and w3 of each expert, which are two parameters in the model."""
    base = make_base(tmp_path / "base", tokenizer, tiny_model("mixtral", vocab_size=VOCABULARY))
    adapter = make_adapter(tmp_path / "adapter", base, **LORA, target_parameters=["experts.gate_up_proj"])
    merge(base, adapter, tmp_path / "merged")
    one, other = tensors(base), tensors(tmp_path / "merged")
    changed = {key.rpartition("experts.")[2] for key in one if not torch.equal(one[key], other[key])}
    assert changed == {f"{expert}.{name}.weight" for expert in range(4) for name in ("w1", "w3")}


def test_what_the_adapter_leaves_be_is_copied_byte_for_byte(tokenizer, tmp_path):
    """A bf16 base whose buffers are float32, and one weight as well: each stays in its data type."""
    model = tiny_model("deepseek_v3", vocab_size=VOCABULARY, **DEEPSEEK).to(torch.bfloat16)
    base = make_base(tmp_path / "base", tokenizer, model, dtype=torch.bfloat16)
    path = sorted(base.glob("*.safetensors"))[-1]
    found = load_file(path)
    wide = [key for key in found if key.endswith(("norm.weight", "e_score_correction_bias"))]
    save_file({key: t.float() + 1e-6 if key in wide else t for key, t in found.items()}, path, {"format": "pt"})
    adapter = make_adapter(tmp_path / "adapter", base, **LORA, target_modules=["o_proj"])
    report = merge(base, adapter, tmp_path / "merged")
    assert report["dtype"] == "bfloat16"
    one, other = tensors(base), tensors(tmp_path / "merged")
    assert wide
    assert {key for key in one if not torch.equal(one[key], other[key])} == {key for key in one if "o_proj" in key}
    assert {key: tensor.dtype for key, tensor in one.items()} == {key: tensor.dtype for key, tensor in other.items()}


def test_a_dtype_that_is_asked_for_is_for_weights_and_not_for_buffers(tokenizer, tmp_path):
    model = tiny_model("deepseek_v3", vocab_size=VOCABULARY, **DEEPSEEK)
    base = make_base(tmp_path / "base", tokenizer, model)
    adapter = make_adapter(tmp_path / "adapter", base, **LINEAR)
    report = merge(base, adapter, tmp_path / "merged", "--dtype", "bfloat16")
    assert report["saved"]["max_logit_difference"] > report["max_logit_difference"]
    dtypes = {key: tensor.dtype for key, tensor in tensors(tmp_path / "merged").items()}
    assert {key for key, dtype in dtypes.items() if dtype != torch.bfloat16} == {
        key for key in dtypes if "e_score_correction_bias" in key
    }
    assert AutoConfig.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "lost"), [("bfloat16", 0.47), ("float16", 0.07), ("float32", 0.0)])
def test_what_a_cast_loses_is_what_was_measured_apart(dtype, lost, tokenizer, tmp_path):
    """An update whose rms is 0.3% of the weights': bf16 loses 47% of it, fp16 7%."""
    model = tiny_model("llama", vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=1)
    torch.manual_seed(0)
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = torch.randn_like(weight).to(torch.bfloat16).float()
    base = make_base(tmp_path / "base", tokenizer, model)
    settings = {"target_modules": ["q_proj"], "r": 64, "lora_alpha": 64, "task_type": "CAUSAL_LM"}
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    saved = load_file(adapter / "adapter_model.safetensors")
    scales = {"lora_A": 1.0, "lora_B": 0.003 / 8}
    save_file(
        {key: torch.randn_like(t) * scales[key.split(".")[-2]] for key, t in saved.items()},
        adapter / "adapter_model.safetensors",
    )
    report = merge(base, adapter, tmp_path / "merged", "--dtype", dtype)
    assert report["update_lost"] == pytest.approx(lost, rel=0.2)


@pytest.mark.parametrize("kind", ["embedding in full", "head in full", "adapter on the head"])
def test_a_head_that_is_its_own_now_is_not_tied_when_the_model_is_loaded(kind, tokenizer, tmp_path):
    model = tiny_model("qwen2", vocab_size=VOCABULARY, tie_word_embeddings=True)
    base = make_base(tmp_path / "base", tokenizer, model)
    adapter = make_adapter(tmp_path / "adapter", base, **KINDS[kind])
    merge(base, adapter, tmp_path / "merged")
    assert AutoConfig.from_pretrained(tmp_path / "merged").tie_word_embeddings is False
    assert "lm_head.weight" in tensors(tmp_path / "merged")
    assert "lm_head.weight" not in tensors(base)


def test_embedding_and_head_that_are_trained_as_one_stay_tied(tokenizer, tmp_path):
    model = tiny_model("qwen2", vocab_size=VOCABULARY, tie_word_embeddings=True)
    base = make_base(tmp_path / "base", tokenizer, model)
    settings = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    adapter = make_adapter(tmp_path / "adapter", base, **LINEAR, **settings)
    merge(base, adapter, tmp_path / "merged")
    assert AutoConfig.from_pretrained(tmp_path / "merged").tie_word_embeddings is True
    assert tensors(base).keys() == tensors(tmp_path / "merged").keys()
    assert difference_to_adapter(base, adapter, tmp_path / "merged") < 1e-3


def test_new_tokens_grow_the_embedding_and_keep_the_old_rows(tokenizer, tmp_path):
    """Rows that nothing trained begin as the mean of the others."""
    model = tiny_model("qwen2", vocab_size=VOCABULARY)
    base = make_base(tmp_path / "base", tokenizer, model)
    adapter = make_adapter(tmp_path / "adapter", base, **LINEAR)
    grown = AutoTokenizer.from_pretrained(base)
    grown.add_tokens([f"<new {number}>" for number in range(VOCABULARY + 3 - len(grown))])
    grown.save_pretrained(adapter)
    merge(base, adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == VOCABULARY + 3
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, new = tensors(base)[name], merged.get_parameter(name)
        assert torch.equal(new[:VOCABULARY], old)
        torch.testing.assert_close(new[VOCABULARY:], old.mean(0).expand(3, -1))


def test_files_of_another_size_are_made_where_they_are_asked_for(tokenizer, tmp_path):
    base = make_base(tmp_path / "base", tokenizer, tiny_model("llama", vocab_size=VOCABULARY))
    adapter = make_adapter(tmp_path / "adapter", base, **LINEAR)
    merge(base, adapter, tmp_path / "one", "--max_shard_size", "5GB")
    merge(base, adapter, tmp_path / "many", "--max_shard_size", "10KB")
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert index["weight_map"].keys() == many.keys() == one.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in many.values())
    for key, file in index["weight_map"].items():
        with safe_open(tmp_path / "many" / file, "pt") as found:
            assert torch.equal(found.get_tensor(key), one[key])


def test_what_a_base_has_beside_its_weights_comes_along(tokenizer, tmp_path):
    """Files for images, its own generation settings, and tensors that this class of model does not know."""
    base = make_base(tmp_path / "base", tokenizer, tiny_model("llama", vocab_size=VOCABULARY))
    (base / "preprocessor_config.json").write_text('{"size": 7}')
    (base / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": true}')
    path = sorted(base.glob("*.safetensors"))[0]
    extra = torch.arange(6, dtype=torch.float16).view(2, 3)
    save_file({**load_file(path), "mtp.layers.0.weight": extra}, path, {"format": "pt"})
    adapter = make_adapter(tmp_path / "adapter", base, **LINEAR)
    merge(base, adapter, tmp_path / "merged")
    for name in ("preprocessor_config.json", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_text() == (base / name).read_text()
    assert torch.equal(tensors(tmp_path / "merged")["mtp.layers.0.weight"], extra)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), Exception("No space left on device (os error 28)")]
)
def test_a_full_disk_leaves_nothing_behind(error, tokenizer, tmp_path, monkeypatch):
    """Whether the weights or the tokenizer no longer fit; the second is how the tokenizers library says it."""
    base = make_base(tmp_path / "base", tokenizer, tiny_model("llama", vocab_size=VOCABULARY))
    adapter = make_adapter(tmp_path / "adapter", base, **LINEAR)

    def full(*_, **__):
        raise error

    before = sorted(tmp_path.iterdir())
    if isinstance(error, OSError):
        monkeypatch.setattr(merging.Writer, "close", full)
    else:
        monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    with pytest.raises(SaveFailed, match="--output_dir .*No space left.*MiB are free.*nothing was written"):
        merge(base, adapter, tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == before


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside have held at once."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {key: found for key, found in self.storages.items() if not found[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


def test_memory_does_not_grow_with_the_number_of_files(tokenizer, tmp_path, monkeypatch):
    """Two and eight layers, each of about 4 MB: beside what both need, no two layers more."""
    monkeypatch.setattr("stagewise.modeling.tensor_files._WAITING", 1)
    peaks = {}
    for layers in (2, 8):
        folder = tmp_path / str(layers)
        sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": layers}
        base = make_base(folder / "base", tokenizer, tiny_model("llama", vocab_size=VOCABULARY, **sizes), "4MB")
        adapter = make_adapter(folder / "adapter", base, **LORA, target_modules=["gate_proj"])
        with LiveBytes() as live:
            merge(base, adapter, folder / "merged")
        peaks[layers] = live.peak
    one_layer = 4 * (3 * 256 * 1024 + 2 * 256**2 + 2 * 256 * 128)
    assert peaks[2] > one_layer  # what is counted is there
    assert peaks[8] - peaks[2] < 0.5 * one_layer


def test_a_model_that_looks_at_its_weights_in_ways_of_its_own_is_proven_by_them(
    tokenizer, tmp_path, monkeypatch, capsys, caplog
):
    base = make_base(tmp_path / "base", tokenizer, tiny_model("llama", vocab_size=VOCABULARY))
    adapter = make_adapter(tmp_path / "adapter", base, **LINEAR)
    wanted = merge(base, adapter, tmp_path / "wanted")
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def looks(self, *args, **kwargs):
        forward(self, *args, **kwargs)
        return self.layers[1].mlp.up_proj.weight.sum().item()  # which has none outside of its block

    monkeypatch.setattr(LlamaModel, "forward", looks)
    report = merge(base, adapter, tmp_path / "merged")
    assert report["proof"] == "weights"
    assert "saved" not in report
    assert "top1_agreement" not in report
    assert report["update_lost"] == wanted["update_lost"]
    assert "proven on weights alone" in capsys.readouterr().out
    assert "the proof is on weights alone" in caplog.text
    one, other = tensors(tmp_path / "wanted"), tensors(tmp_path / "merged")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_blocks_that_are_large_beside_the_files_are_not_run(tokenizer, tmp_path, monkeypatch, caplog):
    base = make_base(tmp_path / "base", tokenizer, tiny_model("llama", vocab_size=VOCABULARY), "5KB")
    adapter = make_adapter(tmp_path / "adapter", base, **LINEAR)
    monkeypatch.setattr("stagewise.modeling.streamed_merge.SMALL_BLOCK", 0)
    report = merge(base, adapter, tmp_path / "merged")
    assert report["proof"] == "logits"  # the embedding is 80 KB, and a file of its own
    wide = {"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 512}
    base = make_base(tmp_path / "wide", tokenizer, tiny_model("llama", **wide), "5KB")
    adapter = make_adapter(tmp_path / "wide adapter", base, **LINEAR)
    assert merge(base, adapter, tmp_path / "wide merged")["proof"] == "weights"
    assert "a block has" in caplog.text
    assert difference_to_adapter(base, adapter, tmp_path / "wide merged") < 1e-3


def test_a_disk_that_does_not_keep_what_it_takes_is_found_and_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    from stagewise.modeling import tensor_files

    base = make_base(tmp_path / "base", tokenizer, tiny_model("llama", vocab_size=VOCABULARY))
    adapter = make_adapter(tmp_path / "adapter", base, **LORA, target_modules=["q_proj"])
    read = tensor_files._read_into

    def forgets(file, buffer, start):
        read(file, buffer, start)
        if file.mode == "rb+":
            buffer[len(buffer) // 2] ^= 1

    monkeypatch.setattr(tensor_files, "_read_into", forgets)
    with pytest.raises(SaveFailed, match="--output_dir .*is not read back as it was written"):
        merge(base, adapter, tmp_path / "out" / "merged")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_adapter_with_numbers_that_are_none_is_refused(tokenizer, tmp_path):
    base = make_base(tmp_path / "base", tokenizer, tiny_model("llama", vocab_size=VOCABULARY))
    adapter = make_adapter(tmp_path / "adapter", base, **LINEAR)
    saved = load_file(adapter / "adapter_model.safetensors")
    key = next(key for key in saved if "lora_A" in key)
    saved[key][0, 0] = float("nan")
    save_file(saved, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="not finite"):
        merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_lacks_a_tensor_is_refused(tokenizer, tmp_path):
    base = make_base(tmp_path / "base", tokenizer, tiny_model("llama", vocab_size=VOCABULARY))
    adapter = make_adapter(tmp_path / "adapter", base, **LINEAR, modules_to_save=["norm"])
    saved = load_file(adapter / "adapter_model.safetensors")
    save_file({key: t for key, t in saved.items() if "norm" not in key}, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"--lora_model .*lacks"):
        merge(base, adapter, tmp_path / "merged")


def test_a_base_that_lacks_a_tensor_is_refused(tokenizer, tmp_path):
    """transformers would draw it at random."""
    base = make_base(tmp_path / "base", tokenizer, tiny_model("llama", vocab_size=VOCABULARY), "5GB")
    adapter = make_adapter(tmp_path / "adapter", base, **LINEAR)
    saved = load_file(base / "model.safetensors")
    del saved["model.layers.1.mlp.up_proj.weight"]
    save_file(saved, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"are missing, and would be random: model\.layers\.1\.mlp\.up_proj\.weight"):
        merge(base, adapter, tmp_path / "merged")


def test_a_pickled_base_becomes_safetensors(tokenizer, tmp_path):
    base = make_base(tmp_path / "base", tokenizer, tiny_model("qwen2", vocab_size=VOCABULARY, **TIED), "5GB")
    adapter = make_adapter(tmp_path / "adapter", base, **LINEAR)
    merge(base, adapter, tmp_path / "wanted")
    pickled = tmp_path / "pickled"
    shutil.copytree(base, pickled)
    (pickled / "model.safetensors").unlink()
    state = load_file(base / "model.safetensors")
    torch.save({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, pickled / "pytorch_model.bin")
    merge(pickled, adapter, tmp_path / "merged", "--allow_pickle")
    one, other = tensors(tmp_path / "wanted"), tensors(tmp_path / "merged")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_gpt2_quantized_by_training_merges_onto_what_it_saw(tokenizer, tmp_path):
    """Its layers hold their weights the other way round, and bitsandbytes turns them."""
    from transformers import BitsAndBytesConfig

    model = tiny_model("gpt2", vocab_size=VOCABULARY, n_embd=64, n_layer=1, n_head=4)
    base = make_base(tmp_path / "base", tokenizer, model)
    adapter = make_adapter(tmp_path / "adapter", base, **LINEAR, fan_in_fan_out=True)
    (adapter / "stage.json").write_text(
        json.dumps(
            {
                "stage": "sft",
                "dtype": "float32",
                "quantization": {"bits": 4, "quant_type": "nf4", "double_quant": True},
            }
        )
    )
    report = merge(base, adapter, tmp_path / "merged")
    assert report["max_logit_difference"] < 1e-3 * report["adapter_effect"]
    name = "transformer.h.0.mlp.c_fc.weight"
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    quantized = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.float32)
    import bitsandbytes

    layer = quantized.transformer.h[0].mlp.c_fc
    seen = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().T
    saved = load_file(adapter / "adapter_model.safetensors")
    stem = "base_model.model.transformer.h.0.mlp.c_fc.lora_"
    update = 2 * (saved[stem + "B.weight"] @ saved[stem + "A.weight"]).T
    torch.testing.assert_close(tensors(tmp_path / "merged")[name], seen + update, rtol=1e-5, atol=1e-6)


def test_names_of_libraries_that_merging_leans_on():
    """Private: without them an adapter is moved to the meta device, or files are written as modules have them."""
    from peft.tuners.lora import LoraLayer
    from transformers.core_model_loading import revert_weight_conversion

    assert callable(LoraLayer._move_adapter_to_device_of_base_layer)
    assert "_caches" in LoraLayer.__init__.__code__.co_names
    assert "_weight_conversions" in revert_weight_conversion.__code__.co_consts


def test_the_device_is_the_cpu_unless_another_is_named():
    from stagewise.run.merging import named_device

    assert named_device("auto") == torch.device("cpu")
    assert named_device("cuda:1") == torch.device("cuda:1")
