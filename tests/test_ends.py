"""Where answers end: in training, in generation, and for whoever runs what was saved without our code."""

import json
import re
import shutil
from pathlib import Path

import jinja2
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import dpo_training
import merge_peft_adapter
import supervised_finetuning
from stagewise.modeling.generation import stop_token_ids
from template import get_template, template_names
from tests.stages import LORA

WORDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", "a", "b")


def tokenizer_with(**special: str) -> PreTrainedTokenizerFast:
    unknown = special.get("unk_token")
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([word for word in WORDS if word.startswith("<")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_eos_that_is_also_unknown_ends_answers():
    """As GPT-2, OPT, Pythia, Phi and StarCoder have it."""
    gpt2 = tokenizer_with(unk_token="<|endoftext|>", eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    assert stop_token_ids(gpt2, ["<|endoftext|>"]) == [0]
    assert stop_token_ids(gpt2, ["<|im_end|>"]) == [0, 2]


def test_tokens_that_the_tokenizer_does_not_know_end_nothing():
    other = tokenizer_with(unk_token="<unk>", eos_token="<|endoftext|>")
    assert stop_token_ids(other, ["<|eot_id|>", "<|im_end|>"]) == [0, 2]
    assert stop_token_ids(tokenizer_with(eos_token="<|endoftext|>"), ["<|eot_id|>"]) == [0]


def test_a_models_own_ends_count_if_they_are_no_text():
    own = GenerationConfig(eos_token_id=[0, 4])
    assert stop_token_ids(tokenizer_with(eos_token="<|im_end|>"), ["<|im_end|>"], own) == [0, 2]


@pytest.fixture(scope="module")
def base(tiny_model_dir, tmp_path_factory) -> Path:
    """The tiny model, with an end token of its own beside the tokenizer's, and a setting that must stay."""
    folder = tmp_path_factory.mktemp("ends") / "base"
    shutil.copytree(tiny_model_dir, folder)
    own = json.loads((folder / "generation_config.json").read_text())
    eos = AutoTokenizer.from_pretrained(folder).eos_token_id
    own |= {"eos_token_id": [eos, 7], "repetition_penalty": 1.25}
    (folder / "generation_config.json").write_text(json.dumps(own))
    return folder


def train(main, base: Path, data: str, output: Path, *flags: str) -> Path:
    argv = [
        "--model_name_or_path",
        str(base),
        "--train_file_dir",
        data,
        "--output_dir",
        str(output),
        "--do_train",
        "True",
    ]
    main([*argv, "--max_steps", "1", "--report_to", "none", "--template_name", "chatml", *flags])
    return output


def check_ends(folder: Path, base: Path) -> None:
    tokenizer, of_base = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(base)
    assert tokenizer.eos_token == "<|im_end|>"
    assert of_base.eos_token != "<|im_end|>"
    found = json.loads((folder / "generation_config.json").read_text())
    assert set(found["eos_token_id"]) == {of_base.eos_token_id, 7, tokenizer.eos_token_id}
    assert found["repetition_penalty"] == 1.25
    assert not re.search(r"\{%-?\s*generation", (folder / "chat_template.jinja").read_text())


@pytest.fixture(scope="module")
def adapter(base, sft_file, tmp_path_factory) -> Path:
    flags = (*LORA, "--learning_rate", "1e-2", "--save_steps", "1")
    return train(supervised_finetuning.main, base, sft_file, tmp_path_factory.mktemp("ends") / "sft", *flags)


def test_all_weights_and_checkpoints(base, sft_file, tmp_path):
    output = train(
        supervised_finetuning.main, base, sft_file, tmp_path / "out", "--use_peft", "False", "--save_steps", "1"
    )
    check_ends(output, base)
    check_ends(output / "checkpoint-1", base)
    assert (
        json.loads((output / "config.json").read_text())["eos_token_id"]
        == AutoTokenizer.from_pretrained(output).eos_token_id
    )
    model = AutoModelForCausalLM.from_pretrained(output)
    stop = AutoTokenizer.from_pretrained(output).convert_tokens_to_ids("<|im_end|>")
    model.get_output_embeddings().weight.data[:] = 0
    bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    bias.data[stop] = 1
    model.get_output_embeddings().bias = bias  # a model that answers with the stop token at once
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=20, do_sample=False).tolist() == [[5, 6, stop]]


def test_an_adapter_and_its_merge(base, adapter, tmp_path):
    check_ends(adapter, base)
    check_ends(adapter / "checkpoint-1", base)
    argv = ["--base_model", str(base), "--lora_model", str(adapter), "--output_dir", str(tmp_path / "merged")]
    merge_peft_adapter.main(argv)
    check_ends(tmp_path / "merged", base)


def test_preference_training(base, preference_file, tmp_path):
    check_ends(train(dpo_training.main, base, preference_file, tmp_path / "out", *LORA), base)


def test_a_template_that_ends_with_the_tokenizers_own_eos(base, sft_file, tmp_path):
    output = train(supervised_finetuning.main, base, sft_file, tmp_path / "out", *LORA, "--template_name", "vicuna")
    assert AutoTokenizer.from_pretrained(output).eos_token == AutoTokenizer.from_pretrained(base).eos_token


def test_the_role_of_the_next_turn_is_no_eos(base, sft_file, tmp_path):
    flags = (*LORA, "--template_name", "glm4", "--add_template_tokens", "True")
    output = train(supervised_finetuning.main, base, sft_file, tmp_path / "out", *flags)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.eos_token == AutoTokenizer.from_pretrained(base).eos_token
    ends = json.loads((output / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|user|>") in ends


@pytest.mark.parametrize("name", template_names())
def test_plain_jinja_reads_what_is_saved(name):
    """Without transformers' extension and settings: what llama.cpp, minijinja and Go's engines have."""
    template = get_template(name)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "?"},
    ]

    def refuse(message: str):
        raise AssertionError(message)

    program = jinja2.Environment().from_string(template.to_jinja(marked=False))
    program.globals["raise_exception"] = refuse
    said = program.render(messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    wanted = template.render(messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    assert said == wanted.text
