"""Each engine on two processes under what users have: a vocabulary of 65,536, so that the loss comes in chunks; rows
of 60 and 560 tokens beside each other, so that processes train other numbers of tokens, or none; and --bf16.

tests/test_distributed.py has the same stages and engines on a small model, with weights, resumed runs and offloading.
"""

import functools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.stages import losses
from tests.test_distributed import ENGINES, ROOT, SCRIPTS, check, torchrun

VOCABULARY = 65_536
CASES = [f"{stage}-{how}" for stage in SCRIPTS for how in ("lora", "full")]
# Short rows train nothing: micro-batches, and processes in a whole step, without a trained token.
UNTRAINED = ("untrained-lora", "untrained-full")
# Of losses against those of one process in float32.
PRECISIONS = {"float32": ((), 1e-4), "bf16": (("--bf16", "True"), 2e-2)}
TOLERANCES = {name: tolerance for name, (_, tolerance) in PRECISIONS.items()}


@pytest.fixture(scope="module")
def command(tiny_model_dir, tmp_path_factory):
    """(case, output folder, rows of a micro-batch, flags) -> a job for run_in_group.py: three steps of four rows."""
    folder = tmp_path_factory.mktemp("real")
    model, data = folder / "model", folder / "rows.jsonl"
    make_model(tiny_model_dir, model)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_pairs()))
    data.write_text("".join(json.dumps(row) + "\n" for row in make_conversations()))
    (folder / "corpus.txt").write_text("\n\n".join(sentence(length) for length in (20, 260) * 8))
    chat = ["--template_name", "chatml"]
    own = {
        "pt": ["--train_file_dir", str(folder / "corpus.txt"), "--block_size", "400", "--packing", "False"],
        "sft": [*chat, "--train_file_dir", str(data), "--model_max_length", "1024"],
        "rm": [*chat, "--train_file_dir", str(folder / "pairs.jsonl"), "--max_length", "1024"],
        "dpo": [*chat, "--train_file_dir", str(folder / "pairs.jsonl"), "--max_length", "1024"],
    }

    def job(case: str, output: Path, rows: int, *flags: str) -> dict:
        stage, how = case.split("-")
        adapter = ["--use_peft", "False"] if how == "full" else ["--lora_rank", "4", "--lora_dropout", "0"]
        untrained = stage == "untrained"
        stage = "sft" if untrained else stage
        argv = [
            "--model_name_or_path", str(model), "--do_train", "True", "--output_dir", str(output), "--max_steps", "3",
            "--logging_steps", "1", "--learning_rate", "1e-3", "--save_strategy", "no", "--report_to", "none",
            "--plot_loss", "False", "--ddp_timeout", "300", *own[stage], *adapter,
            "--per_device_train_batch_size", str(rows), *flags,
        ]  # fmt: skip
        return {"script": SCRIPTS[stage], "argv": argv, "trains_from": 100 if untrained else 0}

    return job


def make_model(tiny: str, folder: Path) -> None:
    """The tiny tokenizer, and a random Llama with the vocabulary of a real one."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sentence(words: int) -> str:
    known = ("the", "heart", "pumps", "blood", "through", "body", "and", "lungs", "every", "day", "while", "a")
    return " ".join(random.Random(words).choices(known, k=words))


def make_conversations() -> list[dict]:
    answers = [sentence(260 if row % 2 else 20) for row in range(16)]
    return [{"conversations": [{"from": "human", "value": "Go."}, {"from": "gpt", "value": a}]} for a in answers]


def make_pairs() -> list[dict]:
    return [
        {
            "question": "Go.",
            "response_chosen": sentence(140 if row % 2 else 20),
            "response_rejected": sentence(25 if row % 3 else 150),
        }
        for row in range(16)
    ]


def run(jobs: list[dict], folder: Path, processes: int, env: dict) -> None:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = ["tests/run_in_group.py", str(folder / "jobs.json")]
    if processes > 1:
        check(torchrun(*script, env=env, timeout=1500))
        return
    alone = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    check(subprocess.run([sys.executable, *script], cwd=ROOT, capture_output=True, text=True, env=alone, timeout=1500))


@pytest.fixture(scope="module")
def one_process(command, tmp_path_factory) -> Path:
    """A folder for each case, in float32, on batches of four rows."""
    folder = tmp_path_factory.mktemp("alone")
    run([command(case, folder / case, 4) for case in (*CASES, *UNTRAINED)], folder, 1, {})
    return folder


@pytest.fixture(scope="module")
def group(command, tmp_path_factory):
    """(engine) -> a folder with runs of two processes for each precision and case, two micro-batches of a row each."""

    @functools.cache
    def trained(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        jobs = [
            command(case, folder / precision / case, 1, "--gradient_accumulation_steps", "2", *ENGINES[name], *flags)
            for precision, (flags, _) in PRECISIONS.items()
            for case in (*CASES, *UNTRAINED)
        ]
        run(jobs, folder, 2, {"FSDP_ON_CPU": "1"} if name == "fsdp" else {})
        return folder

    return trained


@pytest.mark.parametrize("case", [*CASES, *UNTRAINED])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp"])
def test_two_processes_are_one(engine, precision, case, group, one_process):
    one, two = losses(one_process / case), losses(group(engine) / precision / case)
    assert len(one) == 3
    assert two == pytest.approx(one, rel=TOLERANCES[precision])


def test_rows_that_train_nothing_are_left_out_of_the_mean(one_process):
    """The short half of the rows trains nothing, and so other losses come out than with it."""
    for how in ("lora", "full"):
        assert losses(one_process / f"untrained-{how}") != losses(one_process / f"sft-{how}")
