"""Models whose files lack something: one rule in every stage, before loading, in inference and in the merge."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import dpo_training
import inference
import merge_peft_adapter
import ppo_training
import pretraining
import reward_modeling
import supervised_finetuning
from stagewise.errors import InputError
from stagewise.modeling.model_files import check_model_files
from stagewise.modeling.weight_check import check_weights
from tests.zoo.models import save_model

DOWN = "model.layers.1.mlp.down_proj.weight"
STATE = f"{DOWN}.quant_state.bitsandbytes__nf4"
SHORT = ("--max_steps", "1", "--do_train", "True", "--report_to", "none", "--save_strategy", "no")


def damaged(base, folder: Path, change) -> str:
    """A copy of a model's folder, its tensors changed."""
    shutil.copytree(base, folder)
    tensors = change(load_file(Path(base, "model.safetensors")))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def without(*names: str):
    return lambda tensors: {key: value for key, value in tensors.items() if key not in names}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, str]:
    """Files of rows, by stage; and a reward function."""
    folder = tmp_path_factory.mktemp("rows")
    chat = {"conversations": [{"from": "human", "value": "What is 2?"}, {"from": "gpt", "value": "It is 2."}]}
    pair = {"system": "", "history": [], "question": "What?", "response_chosen": "Two.", "response_rejected": "Three!"}
    for name, row in {"chats": chat, "pairs": pair, "texts": {"text": "It is two. " * 20}}.items():
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    reward = folder / "reward.py"
    reward.write_text("def score(prompts, completions):\n    return [float(len(c)) for c in completions]\n")
    files = {"pt": "texts", "sft": "chats", "rm": "pairs", "dpo": "pairs", "ppo": "chats"}
    return {**{stage: str(folder / f"{name}.jsonl") for stage, name in files.items()}, "reward": f"{reward}:score"}


@pytest.fixture(scope="module")
def adapters(llama, rows, tmp_path_factory) -> dict[str, Path]:
    """Adapters on the sound model: a policy and a reward model."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, stage in (("sft", supervised_finetuning), ("rm", reward_modeling)):
        flags = ("--train_file_dir", rows[name], "--output_dir", str(folder / name), *SHORT)
        stage.main(["--model_name_or_path", str(llama), "--lora_rank", "2", "--lora_dropout", "0", *flags])
    return {name: folder / name for name in ("sft", "rm")}


def dry_run(stage, rows: str, output: Path, *flags: str) -> None:
    stage.main(["--train_file_dir", rows, "--output_dir", str(output), "--dry_run", "True", *SHORT, *flags])


# Weights that are missing.

MISSING = r"{}: 1 of 21 weights are missing, and would be random: " + DOWN + "; the files are not whole; copy or"


def test_a_dry_run_of_every_stage_names_what_the_base_lacks(llama, rows, tmp_path, caplog):
    base = damaged(llama, tmp_path / "base", without(DOWN))
    stages = {
        "pt": (pretraining, ()),
        "sft": (supervised_finetuning, ()),
        "rm": (reward_modeling, ()),
        "dpo": (dpo_training, ()),
        "ppo": (ppo_training, ("--reward_function", rows["reward"], "--max_new_tokens", "8")),
    }
    for name, (stage, flags) in stages.items():
        with pytest.raises(InputError, match=MISSING.format("^--model_name_or_path \\S+base")):
            dry_run(stage, rows[name], tmp_path / "out", "--model_name_or_path", base, *flags)
        dry_run(stage, rows[name], tmp_path / "out", "--model_name_or_path", str(llama), *flags)  # the sound one
    assert not (tmp_path / "out").exists()


def test_references_and_reward_models_are_looked_through_as_well(llama, rows, adapters, tmp_path):
    base = damaged(llama, tmp_path / "base", without(DOWN))
    policy = ("--model_name_or_path", str(llama))
    with pytest.raises(InputError, match=MISSING.format("^--ref_model_name_or_path \\S+base")):
        dry_run(dpo_training, rows["dpo"], tmp_path / "out", *policy, "--ref_model_name_or_path", base)
    adapter = tmp_path / "rm"
    shutil.copytree(adapters["rm"], adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
    message = r"^--reward_model_path \S+rm: its base \S+base: 1 of 21 weights are missing"
    flags = ("--reward_model_path", str(adapter), "--max_new_tokens", "8")
    with pytest.raises(InputError, match=message):
        dry_run(ppo_training, rows["ppo"], tmp_path / "out", *policy, *flags)
    scored = ("--input_file", rows["sft"], "--output_file", str(tmp_path / "scores.jsonl"))
    with pytest.raises(InputError, match=MISSING.format("base")):
        inference.main(["--model_name_or_path", str(adapter), "--score", *scored])


@pytest.mark.parametrize("adapter", ["sft", "rm"])
def test_the_merge_has_the_same_rule(adapter, llama, adapters, tmp_path):
    def merge(base: str) -> None:
        lora = ("--lora_model", str(adapters[adapter]), "--output_dir", str(tmp_path / "merged"))
        merge_peft_adapter.main(["--base_model", base, *lora])

    with pytest.raises(InputError, match=MISSING.format("^--base_model \\S+layer")):
        merge(damaged(llama, tmp_path / "layer", without(DOWN)))
    with pytest.raises(InputError, match=r"weights are missing.* the names in the files begin with module\.; Distrib"):
        merge(damaged(llama, tmp_path / "prefix", lambda t: {f"module.{key}": value for key, value in t.items()}))


def test_inference_has_the_same_rule_with_and_without_an_adapter(llama, adapters, tmp_path):
    base = damaged(llama, tmp_path / "base", without(DOWN))
    for flags in ((), ("--lora_model", str(adapters["sft"]))):
        with pytest.raises(InputError, match=MISSING.format("base")):
            inference.main(["--model_name_or_path", base, "--prompt", "hi", *flags])


def test_an_expert_that_is_not_whole_is_no_traceback(rows, tmp_path):
    """The experts of a mixture lie in the files one by one, and are one tensor in the model."""
    base = save_model("mixtral", tmp_path)
    experts = "model.layers.1.block_sparse_moe.experts.2."
    one = damaged(base, tmp_path / "one", without(f"{experts}w1.weight"))
    message = r"one: model\.layers\.1\.mlp\.experts\.gate_up_proj cannot be made .*3 like \S+w1\.\S+, 4 like \S+w3"
    with pytest.raises(InputError, match=message):
        dry_run(supervised_finetuning, rows["sft"], tmp_path / "out", "--model_name_or_path", one)
    all_of_it = damaged(base, tmp_path / "all", without(*(f"{experts}w{i}.weight" for i in (1, 2, 3))))
    with pytest.raises(InputError, match=r"experts\.\S+ is \(3, .*, and config\.json makes it \(4, "):
        dry_run(supervised_finetuning, rows["sft"], tmp_path / "out", "--model_name_or_path", all_of_it)


@pytest.mark.parametrize(
    "name",
    ["llama tied", "gpt2", "opt projected", "bloom", "gemma3n_text", "mixtral", "phimoe", "gpt_oss", "deepseek_v3",
     "dbrx", "falcon_h1", "zamba2", "mamba", "rwkv", "qwen3_next", "xglm"],
)  # fmt: skip
def test_sound_files_lack_nothing_whatever_their_tensors_are_called(name, tmp_path, caplog):
    folder = save_model(name, tmp_path)
    with caplog.at_level(logging.WARNING, "stagewise"):
        check_weights("model", folder, AutoConfig.from_pretrained(folder))
    assert not [record for record in caplog.records if "not checked" in record.message]


# Weights that are saved in 4 or 8 bits.


@pytest.fixture(scope="module")
def packed(tmp_path_factory, tiny_model_dir, tokenizer) -> dict[str, Path]:
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("packed")
    kinds = {
        "double": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "bf16 storage": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16"),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }
    for name, config in kinds.items():
        model = AutoModelForCausalLM.from_pretrained(
            tiny_model_dir, quantization_config=config, device_map={"": "cpu"}
        )
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in kinds}


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_that_are_stored_the_other_way_round_pass(bits, tmp_path):
    """GPT-2's linear layers are turned before they are packed."""
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    base = save_model("gpt2", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(tmp_path / "packed")
    check_model_files("--flag", str(tmp_path / "packed"))
    check_weights("model", tmp_path / "packed", AutoConfig.from_pretrained(tmp_path / "packed"))


def cut(name: str):
    return lambda tensors: {k: v.flatten()[:-1].clone() if k == name else v for k, v in tensors.items()}


def with_state(change):
    """The JSON of how a weight was packed, changed."""

    def changed(tensors: dict) -> dict:
        state = change(json.loads(bytes(tensors[STATE].tolist())))
        return {**tensors, STATE: torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8)}

    return changed


SCB = DOWN.replace("weight", "SCB")
DAMAGES = {
    "no state": ("double", without(STATE), f"{DOWN}.quant_state is missing"),
    "no scales": ("double", without(f"{DOWN}.absmax"), f"{DOWN}.absmax is missing"),
    "no map": ("nf4", without(f"{DOWN}.quant_map"), f"{DOWN}.quant_map is missing"),
    "no nested scales": ("double", without(f"{DOWN}.nested_absmax"), f"{DOWN}.nested_absmax is missing"),
    "no nested map": ("double", without(f"{DOWN}.nested_quant_map"), f"{DOWN}.nested_quant_map is missing"),
    "no weight": ("nf4", without(DOWN), f"{DOWN} is missing"),
    "nothing beside it": (
        "nf4", without(STATE, f"{DOWN}.absmax", f"{DOWN}.quant_map"), f"{DOWN}.quant_state is missing"
    ),
    "a short weight": ("nf4", cut(DOWN), f"{DOWN} has .* bytes, and .* numbers make"),
    "a short state": ("nf4", cut(STATE), f"{STATE} cannot be read"),
    "short scales": ("nf4", cut(f"{DOWN}.absmax"), rf"{DOWN}.absmax is \d+, and \d+ numbers are needed"),
    "a short map": ("double", cut(f"{DOWN}.quant_map"), f"{DOWN}.quant_map is 15, and 16 numbers are needed"),
    "short nested scales": ("double", cut(f"{DOWN}.nested_absmax"), f"{DOWN}.nested_absmax is 0, and 1 numbers"),
    "a state without a size": ("nf4", with_state(lambda s: {"blocksize": 64}), f"{STATE} cannot be read"),
    "blocks of nothing": ("nf4", with_state(lambda s: {**s, "blocksize": 0}), f"{STATE} cannot be read"),
    "no row scales": ("int8", without(SCB), f"{SCB} is missing"),
    "short row scales": ("int8", cut(SCB), rf"{SCB} is \d+, and \d+ numbers are needed"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_packed_weight_that_is_not_whole_is_named_with_its_file(damage, packed, tmp_path):
    kind, change, message = DAMAGES[damage]
    folder = damaged(packed[kind], tmp_path / "base", change)
    expected = rf"^--flag {folder}/model\.safetensors: {message}.*, so that \S+ cannot be unpacked; copy or download"
    with pytest.raises(InputError, match=expected):
        check_model_files("--flag", folder)


@pytest.mark.parametrize("kind", ["double", "nf4", "bf16 storage", "int8"])
def test_sound_packed_files_pass(kind, packed):
    check_model_files("--flag", str(packed[kind]))
    check_weights("model", packed[kind], AutoConfig.from_pretrained(packed[kind]))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("int8", without(DOWN), f"1 of 20 weights are missing, and would be random: {DOWN}"),
        ("nf4", lambda t: {**without(STATE, f"{DOWN}.absmax", f"{DOWN}.quant_map")(t), DOWN: torch.zeros(64, 160)},
         f"{DOWN} is not packed in the files, and config.json makes it 64 x 160 in 4 bits"),
        ("nf4", with_state(lambda s: {**s, "shape": s["shape"][::-1]}),
         f"{DOWN} is 160 x 64 in the files, and config.json makes it 64 x 160 in 4 bits"),
    ],
    ids=["gone", "plain", "transposed"],
)  # fmt: skip
def test_packed_weights_are_those_of_the_configuration(kind, change, message, packed, tmp_path):
    folder = damaged(packed[kind], tmp_path / "base", change)
    check_model_files("--flag", folder)  # which knows nothing of the architecture
    with pytest.raises(InputError, match=f"^model: {message}"):
        check_weights("model", folder, AutoConfig.from_pretrained(folder))


def test_training_inference_and_merge_say_it(packed, rows, tmp_path):
    adapter = tmp_path / "adapter"
    flags = ("--train_file_dir", rows["sft"], "--template_name", "chatml", *SHORT)
    supervised_finetuning.main(["--model_name_or_path", str(packed["nf4"]), "--output_dir", str(adapter), *flags])
    bad = damaged(packed["nf4"], tmp_path / "bad", without(STATE))
    turned = damaged(packed["nf4"], tmp_path / "turned", with_state(lambda s: {**s, "shape": s["shape"][::-1]}))
    out = ("--output_dir", str(tmp_path / "out"))
    for base, message in ((bad, f"{DOWN}.quant_state is missing"), (turned, f"{DOWN} is 160 x 64 in the files")):
        with pytest.raises(InputError, match=message):
            supervised_finetuning.main(["--model_name_or_path", base, *out, *flags])
        with pytest.raises(InputError, match=message):
            inference.main(["--model_name_or_path", base, "--prompt", "hi", "--template_name", "chatml"])
        with pytest.raises(InputError, match=message):
            merge_peft_adapter.main(["--base_model", base, "--lora_model", str(adapter), *out])
    assert not (tmp_path / "out").exists()
