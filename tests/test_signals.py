"""The first SIGINT or SIGTERM saves and exits with 130 or 143; a second one, of either kind, exits at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stagewise.checkpoint_files import PARTIAL
from stagewise.run.checkpoints import checkpoint_problem
from tests.stages import LORA

ROOT = Path(__file__).resolve().parents[1]
# The script with a third step that takes half a minute, said on stdout when it begins.
SLOW = """
import os, time
from stagewise.trainers.causal_lm import CausalLMTrainer
from stagewise.run.exit_codes import run_script
import supervised_finetuning

plain = CausalLMTrainer.training_step
def slow(self, *args, **kwargs):
    if self.state.global_step == 2:
        print("third step", flush=True)
        time.sleep(float(os.environ["THIRD_STEP_SECONDS"]))
    return plain(self, *args, **kwargs)
CausalLMTrainer.training_step = slow
run_script(supervised_finetuning.main)
"""
SIGNALS = {"twice": (signal.SIGINT, signal.SIGINT), "of two kinds": (signal.SIGTERM, signal.SIGINT)}


@pytest.fixture
def start(tiny_model_dir, sft_file, tmp_path):
    """(seconds of the third step) -> a run of four steps, in its third."""
    begun = []

    def run(seconds: float) -> tuple[subprocess.Popen, Path]:
        output = tmp_path / f"out{len(begun)}"
        command = [
            sys.executable, "-c", SLOW, "--model_name_or_path", tiny_model_dir, "--train_file_dir", sft_file,
            "--template_name", "chatml", "--model_max_length", "128", "--output_dir", str(output), "--max_steps", "4",
            "--save_steps", "2", "--do_train", "True", "--per_device_train_batch_size", "4", "--report_to", "none",
            *LORA,
        ]  # fmt: skip
        process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "THIRD_STEP_SECONDS": str(seconds)},
        )  # fmt: skip
        begun.append(process)
        for line in process.stdout:
            if "third step" in line:
                return process, output
        pytest.fail(f"ended with {process.wait()} before its third step")

    yield run
    for process in begun:
        process.kill()
        process.stdout.close()


def test_a_first_signal_saves(start):
    process, output = start(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert checkpoint_problem(output / "checkpoint-3") is None
    assert not (output / PARTIAL).exists()


@pytest.mark.parametrize(("first", "second"), SIGNALS.values(), ids=SIGNALS)
def test_a_second_signal_exits_at_once(first, second, start):
    process, output = start(30)
    process.send_signal(first)
    time.sleep(0.5)
    assert process.poll() is None  # the step in hand is waited for
    began = time.monotonic()
    process.send_signal(second)
    # killed by the signal itself, which a shell shows as 128 + its number
    assert process.wait(timeout=20) == -second
    assert time.monotonic() - began < 5
    assert checkpoint_problem(output / "checkpoint-2") is None
    assert not (output / "checkpoint-3").exists()
