"""Thousands of steps with a checkpoint after every few: memory stays flat, and a SIGKILL leaves all of it readable."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stagewise.run.checkpoints import checkpoint_problem, newest_checkpoint

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 3000, 20
# The script, with the resident memory of the process beside each logged step; the last step never ends.
WATCHED = """
import json, os, sys, time
import psutil
from transformers import TrainerCallback
import stagewise.run.lifecycle as lifecycle
import supervised_finetuning

class Watch(TrainerCallback):
    def on_log(self, args, state, control, **kwargs):
        with open(os.environ["MEMORY"], "a") as file:
            print(json.dumps([state.global_step, psutil.Process().memory_info().rss]), file=file)
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps - 1:
            print("last step", flush=True)
            time.sleep(600)

build = lifecycle.build_trainer
def build_watched(*args, **kwargs):
    trainer = build(*args, **kwargs)
    trainer.add_callback(Watch())
    return trainer
lifecycle.build_trainer = build_watched
supervised_finetuning.main()
"""


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory, sft_file) -> Path:
    """A folder with a run of 3,000 steps of a minute model, killed in its last one, and memory.jsonl."""
    from examples.build_tiny_model import main

    folder = tmp_path_factory.mktemp("soak")
    main(["--output_dir", str(folder / "model"), "--vocab_size", "400", "--hidden_size", "64",
          "--num_hidden_layers", "1"])  # fmt: skip
    command = [
        sys.executable, "-c", WATCHED, "--model_name_or_path", str(folder / "model"), "--train_file_dir", sft_file,
        "--template_name", "chatml", "--model_max_length", "64", "--output_dir", str(folder / "out"),
        "--do_train", "True", "--use_peft", "False", "--max_steps", str(STEPS), "--save_steps", str(EVERY),
        "--save_total_limit", "2", "--logging_steps", str(EVERY), "--per_device_train_batch_size", "2",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MEMORY": str(folder / "memory.jsonl")}
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=log)
        for line in process.stdout:
            if "last step" in line:
                break
        else:
            log.seek(0)
            pytest.fail(log.read()[-3000:])
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    return folder


def test_memory_is_flat(killed_run):
    """The last third of the run holds no more than the middle third; the first one fills caches."""
    memory = [json.loads(line) for line in (killed_run / "memory.jsonl").read_text().splitlines()]
    middle = max(rss for step, rss in memory if STEPS / 3 < step <= STEPS * 2 / 3)
    late = max(rss for step, rss in memory if step > STEPS * 2 / 3)
    assert len(memory) == STEPS // EVERY - 1
    assert late - middle < 4 * 2**20, f"{(late - middle) / 2**20:.1f} MiB in {STEPS // 3} steps"


def test_the_newest_checkpoints_are_whole(killed_run):
    found = sorted((killed_run / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert [path.name for path in found] == [f"checkpoint-{STEPS - 2 * EVERY}", f"checkpoint-{STEPS - EVERY}"]
    assert all(checkpoint_problem(path) is None for path in found)
    assert newest_checkpoint(str(killed_run / "out")) == str(found[-1])


def test_tensorboard_reads_every_logged_step(killed_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(killed_run / "out" / "logs"), size_guidance={"scalars": 0})
    events.Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == list(range(EVERY, STEPS, EVERY))
