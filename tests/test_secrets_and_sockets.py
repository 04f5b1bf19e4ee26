"""Tokens are written nowhere, and a run on local files opens no connection, whatever libraries would like to tell."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stages import LORA, run_sft

ROOT = Path(__file__).resolve().parents[1]


def test_tokens_are_written_nowhere(tiny_model_dir, sft_file, tmp_path, capfd, monkeypatch):
    """Not in logs, run_config.yaml, model cards, TensorBoard, nor in the pickled arguments beside each checkpoint."""
    monkeypatch.setenv("HF_TOKEN", "")  # the run sets it, and the test takes it back
    tokens = {"--hf_hub_token": "hf_FORREADING0123456789", "--hub_token": "hf_FORWRITING0123456789"}
    flags = [word for pair in tokens.items() for word in pair]
    run_sft(tiny_model_dir, sft_file, tmp_path / "out", *LORA, "--max_steps", "3", *flags)
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert {"run_config.yaml", "README.md", "training_args.bin", "stage.json", "optimizer.pt"} <= names
    assert any(name.startswith("events.out") for name in names)
    said = capfd.readouterr()
    for token in tokens.values():
        assert [path for path in written if token.encode() in path.read_bytes()] == []
        assert token not in said.out + said.err
    assert os.environ["HF_TOKEN"] == tokens["--hub_token"]  # where a push finds it


def test_dpo_called_from_python_reports_nothing(tiny_model_dir, preference_file, tmp_path, monkeypatch):
    """Where huggingface_hub was imported before, as in a notebook; and nothing else keeps trl quiet."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _telemetry

    import dpo_training

    begun = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(_telemetry, "_start_telemetry_thread", lambda: begun.append(True))
    dpo_training.main(
        ["--model_name_or_path", tiny_model_dir, "--train_file_dir", preference_file, "--output_dir",
         str(tmp_path / "out"), "--template_name", "chatml", "--max_length", "128", "--max_steps", "1",
         "--per_device_train_batch_size", "2", "--save_strategy", "no", "--report_to", "none"]
    )  # fmt: skip
    assert not begun


# Scripts run as a user runs them, in one process, with every address it connects to or looks up.
WATCHED = """
import json, runpy, sys

asked = []
def watch(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple):
        asked.append(args[1][0])
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        asked.append(args[0])
    elif event == "socket.sendto":
        asked.append(args[1][0])
sys.addaudithook(watch)

for script, argv in json.loads(open(sys.argv[1]).read()):
    sys.argv = [f"{script}.py", *argv]
    runpy.run_path(sys.argv[0], run_name="__main__")
print("asked:", json.dumps([str(name) for name in asked]))
"""


def can_unshare() -> bool:
    command = ["unshare", "--user", "--map-root-user", "--net", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def jobs(tiny_model_dir, sft_file, preference_file, text_file, tmp_path) -> list[tuple[str, list[str]]]:
    """The whole chain: PT, its merge, SFT on that, RM, PPO with that, DPO, an answer."""
    shared = ["--max_steps", "2", "--save_steps", "1", "--per_device_train_batch_size", "2", "--lora_rank", "4"]
    chat = [*shared, "--template_name", "chatml", "--model_max_length", "128"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"question": f"{i}?"}) + "\n" for i in range(8)))
    merged = str(tmp_path / "pt-merged")

    def job(script: str, data: str, *flags: str, model: str = merged, name: str = "") -> tuple[str, list[str]]:
        output = str(tmp_path / (name or script))
        return script, ["--model_name_or_path", model, "--train_file_dir", data, "--output_dir", output, *flags]

    ppo = ["--reward_model_path", str(tmp_path / "reward_modeling"), "--max_new_tokens", "4", "--rollout_batch_size",
           "4"]  # fmt: skip
    pt, sft = str(tmp_path / "pretraining"), str(tmp_path / "supervised_finetuning")
    return [
        job("pretraining", text_file, *shared, "--block_size", "64", model=tiny_model_dir),
        ("merge_peft_adapter", ["--base_model", tiny_model_dir, "--lora_model", pt, "--output_dir", merged]),
        job("supervised_finetuning", sft_file, *chat),
        job("reward_modeling", preference_file, *chat),
        job("ppo_training", str(tmp_path / "prompts.jsonl"), *chat, *ppo),
        job("dpo_training", preference_file, *chat),
        (
            "inference",
            ["--model_name_or_path", merged, "--lora_model", sft, "--prompt", "hi", "--max_new_tokens", "4"],
        ),
    ]


def test_a_run_opens_no_connection(jobs, tmp_path):
    """Under a network of its own without even a loopback where the system allows it, so that nothing can get out."""
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    apart = ["unshare", "--user", "--map-root-user", "--net"] if can_unshare() else []
    # nothing that would keep a library quiet: trl says nothing where CI is set
    quiet = ("HF_HUB", "TRANSFORMERS", "CI", "DISABLE_TELEMETRY", "DO_NOT_TRACK")
    online = {name: value for name, value in os.environ.items() if not name.startswith(quiet)}
    done = subprocess.run(
        [*apart, sys.executable, "-c", WATCHED, str(tmp_path / "jobs.json")],
        cwd=ROOT, env={**online, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.split("asked: ")[1]) == []
