"""benchmarks/gpu_check.sh where there is no GPU: the lines it prints, and what of its items runs anywhere."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    gpu_check.build_model(folder / "model", gpu_check.CPU_MODEL)
    return folder


def test_packed_conversations_have_the_loss_of_single_ones(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    status, text = gpu_check.run_item("packing", folder)
    assert status == "PASS", text
    assert "calls of varlen_attn" in text


@pytest.mark.parametrize("item", ["fp16_gradients", "flash_attn", "vocabulary", "mfu", "two_gpus"])
def test_what_needs_a_gpu_says_so(item, folder, monkeypatch):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check.torch.cuda, "device_count", lambda: 0)
    status, text = gpu_check.run_item(item, folder)
    assert status == "SKIPPED"
    assert "GPU" in text


def test_an_item_that_fails_says_with_what_figures(folder, monkeypatch):
    def wrong(folder):
        gpu_check.expect(False, "the estimate is off", {"GiB": [1.23456, 2.0], "runs": 3})

    monkeypatch.setitem(gpu_check.ITEMS, "memory", wrong)
    status, text = gpu_check.run_item("memory", folder)
    assert (status, text) == ("FAIL", "AssertionError: the estimate is off; GiB 1.235 2, runs 3")
    monkeypatch.setattr(gpu_check, "stage", lambda *args: sys.exit(2))
    assert gpu_check.run_item("rm_zero2", folder) == ("FAIL", "SystemExit: 2")


def test_the_script_prints_a_line_for_each_item(tmp_path):
    path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "benchmarks" / "gpu_check.sh"), "--cpu", "--only", "two_gpus"]
    done = subprocess.run(command, capture_output=True, text=True, env=path, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[-2].startswith("SKIPPED two_gpus")
    assert lines[-1] == "1 items: 0 PASS, 0 FAIL, 1 SKIPPED"


def test_the_time_of_all_items_is_limited(folder, monkeypatch, capsys):
    def over(*args, **kwargs):
        raise subprocess.TimeoutExpired(args[0], kwargs["timeout"])

    monkeypatch.setattr(gpu_check.subprocess, "run", over)
    assert gpu_check.check("zero3", folder, deadline=0.0) == "FAIL"
    assert "600 seconds of all items are over" in capsys.readouterr().out
