"""A run of each stage is killed at 20 random points and gone on with: the weights of an undisturbed one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stages import assert_same_weights, losses

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def commands(tiny_model_dir, sft_file, preference_file, text_file, tmp_path) -> dict[str, list[str]]:
    (tmp_path / "rewards.py").write_text(
        "def letters(prompts, answers): return [len(answer) / 10 for answer in answers]"
    )
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"question": f"{i}?"}) + "\n" for i in range(16)))
    shared = ["--model_name_or_path", tiny_model_dir, "--do_train", "True", "--learning_rate", "1e-3"]
    shared += ["--logging_steps", "1", "--report_to", "none", "--plot_loss", "False", "--lora_rank", "4"]
    chat = ["--template_name", "chatml"]
    return {
        "pretraining": [*shared, "--train_file_dir", text_file, "--block_size", "64", "--packing", "True"],
        "supervised_finetuning": [
            *shared, *chat, "--train_file_dir", sft_file, "--model_max_length", "128", "--packing", "True",
        ],
        "reward_modeling": [*shared, *chat, "--train_file_dir", preference_file, "--max_length", "128"],
        "dpo_training": [*shared, *chat, "--train_file_dir", preference_file, "--max_length", "128"],
        "ppo_training": [
            *shared, *chat, "--train_file_dir", str(tmp_path / "prompts.jsonl"), "--max_new_tokens", "4",
            "--reward_function", f"{tmp_path / 'rewards.py'}:letters", "--rollout_batch_size", "4",
        ],
    }  # fmt: skip


STAGES = ("pretraining", "supervised_finetuning", "reward_modeling", "dpo_training", "ppo_training")


@pytest.mark.parametrize("number", range(len(STAGES)), ids=STAGES)
def test_twenty_kills(number, commands, tmp_path):
    stage = STAGES[number]
    sizes = ["--per_device_train_batch_size", "2", "--max_steps", "12", "--save_steps", "1", "--save_total_limit", "3"]
    job = {
        "script": stage, "argv": [*commands[stage], *sizes], "folder": str(tmp_path), "kills": 20, "seed": number,
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, "tests/faults/kill_at_random.py", str(tmp_path / "job.json")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    points = json.loads(done.stdout.splitlines()[-1])["points"]
    assert len(points) == 20
    assert len({str(found) for found in points}) > 3  # they fell at different places
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "whole", tmp_path / "killed", rtol=0, atol=0)
