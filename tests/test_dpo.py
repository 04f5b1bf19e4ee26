"""DPO: the reference of each way to start, trl's own numbers, resume, and what the run refuses."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from stagewise.errors import InputError
from tests.stages import FULL, assert_same_weights, losses, run_sft, weights

LORA = ("--lora_rank", "4", "--lora_alpha", "8")
STEPS = ("--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "4")


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory) -> str:
    """24 pairs: the chosen answer is kind, the rejected one is not."""
    rows = [
        {
            "system": "",
            "history": [],
            "question": f"What is {i} plus {i}?",
            "response_chosen": f"It is {2 * i}. Well asked!",
            "response_rejected": f"Do it yourself {i}, I will not help.",
        }
        for i in range(24)
    ]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_dpo(model_dir: str, pairs: str, output_dir: Path, *flags: str) -> dict:
    import dpo_training

    return dpo_training.main(
        ["--model_name_or_path", model_dir, "--train_file_dir", pairs, "--output_dir", str(output_dir)]
        + ["--template_name", "chatml", "--max_length", "128", "--learning_rate", "5e-3", *STEPS, *flags]
    )


@pytest.fixture(scope="module")
def adapter_dir(tiny_model_dir, sft_file, tmp_path_factory):
    """An SFT adapter that differs from its base."""
    folder = tmp_path_factory.mktemp("sft-for-dpo") / "out"
    run_sft(tiny_model_dir, sft_file, folder, *LORA, "--max_steps", "12", "--learning_rate", "2e-2")
    return str(folder)


@pytest.mark.parametrize(
    "start",
    ["fresh adapter", "old adapter", "all weights"],
)
def test_the_first_loss_is_ln_2_whatever_the_start(start, tiny_model_dir, adapter_dir, pairs_file, tmp_path):
    flags = {"fresh adapter": LORA, "old adapter": ("--peft_path", adapter_dir), "all weights": FULL}[start]
    run_dpo(tiny_model_dir, pairs_file, tmp_path, *flags)
    curve = losses(tmp_path)
    assert curve[1] == pytest.approx(math.log(2), abs=1e-4)
    assert curve[4] < math.log(2) - 0.01


def test_dpo_raises_margin_and_accuracy(tiny_model_dir, pairs_file, tmp_path):
    metrics = run_dpo(
        tiny_model_dir, pairs_file, tmp_path, *LORA, "--max_steps", "20", "--validation_file_dir", pairs_file
    )
    assert metrics["eval_rewards/margins"] > 0.1
    assert metrics["eval_rewards/accuracies"] > 0.9


def test_the_old_adapter_is_the_reference_and_not_the_bare_base(tiny_model_dir, adapter_dir, pairs_file, tmp_path):
    """With a learning rate of 0 the policy stays its reference: margins are 0, although the adapter is not."""
    metrics = run_dpo(
        tiny_model_dir, pairs_file, tmp_path, "--peft_path", adapter_dir, "--learning_rate", "0.0",
        "--validation_file_dir", pairs_file,
    )  # fmt: skip
    assert metrics["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    old, new = weights(Path(adapter_dir)), weights(tmp_path)
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_losses_equal_trls_own_on_the_same_rows(tiny_model_dir, pairs_file, tmp_path):
    """trl on the conversations, through the tokenizer's chat template, without anything of ours."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from template import get_template

    run_dpo(tiny_model_dir, pairs_file, tmp_path / "ours", *LORA, "--do_train", "True")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = get_template("chatml").to_jinja()
    rows = [json.loads(line) for line in Path(pairs_file).read_text().splitlines()]
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["question"]}],
                "chosen": [{"role": "assistant", "content": row["response_chosen"]}],
                "rejected": [{"role": "assistant", "content": row["response_rejected"]}],
            }
            for row in rows
        ]
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        args=DPOConfig(
            str(tmp_path / "trl"), max_steps=4, logging_steps=1, per_device_train_batch_size=4, learning_rate=5e-3,
            bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", save_strategy="no",
            max_length=None,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, lora_alpha=8),
    )  # fmt: skip
    trainer.train()
    theirs = {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}
    assert losses(tmp_path / "ours") == pytest.approx(theirs, abs=2e-3)


@pytest.mark.parametrize("mode", [LORA, FULL], ids=["lora", "full"])
def test_resume_equals_no_interruption(mode, tiny_model_dir, pairs_file, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_dpo(tiny_model_dir, pairs_file, whole, *mode)
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    run_dpo(tiny_model_dir, pairs_file, resumed, *mode, "--resume_from_checkpoint", "True")
    assert losses(resumed) == losses(whole)
    assert_same_weights(whole, resumed, rtol=0, atol=0)


@pytest.mark.parametrize(
    "flags",
    [
        ("--loss_type", "hinge"),
        ("--loss_type", "ipo"),
        ("--loss_type", "sigmoid,sft", "--loss_weights", "1.0,0.5"),
        ("--loss_type", "robust", "--label_smoothing", "0.1"),
        ("--loss_type", "apo_zero"),
        ("--reference_free", "True"),
        ("--beta", "0.5"),
    ],
    ids=lambda flags: " ".join(flags),
)
def test_every_option_changes_the_losses(flags, tiny_model_dir, pairs_file, tmp_path):
    run_dpo(tiny_model_dir, pairs_file, tmp_path / "plain", *LORA, "--max_steps", "2")
    run_dpo(tiny_model_dir, pairs_file, tmp_path / "option", *LORA, "--max_steps", "2", *flags)
    plain, option = losses(tmp_path / "plain"), losses(tmp_path / "option")
    assert any(abs(plain[step] - option[step]) > 1e-4 for step in plain)


def test_another_reference_model(tiny_model_dir, adapter_dir, pairs_file, tmp_path):
    import merge_peft_adapter

    merged = tmp_path / "merged"
    merge_peft_adapter.main(["--base_model", tiny_model_dir, "--lora_model", adapter_dir, "--output_dir", str(merged)])
    run_dpo(tiny_model_dir, pairs_file, tmp_path / "o", *LORA, "--ref_model_name_or_path", str(merged))
    assert losses(tmp_path / "o")[1] != pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--loss_type", "sigmod"), "--loss_type"),
        (("--loss_type", "sigmoid,sft", "--loss_weights", "1"), "--loss_weights: found 1 for 2"),
        (("--beta", "0"), "--beta"),
        (("--label_smoothing", "0.1"), "--label_smoothing"),
        (("--reference_free", "True", "--ref_model_name_or_path", "x"), "give one of the two"),
        (("--max_prompt_length", "500"), "--max_prompt_length 500"),
    ],
)
def test_what_cannot_work_is_an_error(flags, message, tiny_model_dir, pairs_file, tmp_path):
    with pytest.raises(InputError, match=message):
        run_dpo(tiny_model_dir, pairs_file, tmp_path / "o", *LORA, *flags)
    assert not (tmp_path / "o").exists()


def test_a_dpo_adapter_merges_like_any_other(tiny_model_dir, pairs_file, tmp_path):
    import merge_peft_adapter

    run_dpo(tiny_model_dir, pairs_file, tmp_path / "dpo", *LORA)
    report = merge_peft_adapter.main(
        ["--base_model", tiny_model_dir, "--lora_model", str(tmp_path / "dpo"), "--output_dir", str(tmp_path / "m")]
    )
    assert report["max_logit_difference"] < 1e-4
    assert json.loads((tmp_path / "m" / "stage.json").read_text())["stage"] == "dpo"
