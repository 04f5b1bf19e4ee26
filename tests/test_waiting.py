"""Processes that wait for each other: no time limit, and no waiting for one that has failed or died."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.stages import losses

ROOT = Path(__file__).resolve().parents[1]
# The process group's own limit is LIMIT seconds; rank 0 keeps the store, and is the first process of its machine.
PROCESS = """
import os, sys, time
from datetime import timedelta
from types import SimpleNamespace

import torch.distributed as dist

from stagewise import distributed
from stagewise.distributed import decide_on_first, first_process_first
from stagewise.errors import InputError
from stagewise.run.exit_codes import run_script
from stagewise.run.logging import setup_logging

distributed.BEAT_S, distributed.DEAD_S, distributed.SAY_S = 0.2, 4.0, 1.0
rank, case = int(os.environ["RANK"]), sys.argv[1]
setup_logging()
store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 2, rank == 0, timedelta(seconds=120))
store.set(f"here/{rank}", "")
store.wait(["here/0", "here/1"])  # the limit is for what comes after
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=LIMIT))


def decide():
    time.sleep(LIMIT + 1)
    return "decided"


def main():
    if case in ("decides badly", "decides slowly"):
        if case == "decides badly":
            decide_on_first(lambda: (_ for _ in ()).throw(InputError("rows.jsonl:3: no answer")))
        print(rank, decide_on_first(decide), flush=True)
        return
    with first_process_first(SimpleNamespace(local_process_index=rank), "data"):
        if case == "works slowly":
            time.sleep(LIMIT + 1)  # each after the other
        if rank == 0 and case == "fails":
            raise InputError("rows.jsonl:3: no answer")
        if rank == 0 and case == "breaks":
            raise ZeroDivisionError
        if rank == 0 and case == "dies" or rank == 1 and case == "the other dies":
            os._exit(9)
        if rank == 1 and case == "stops":
            distributed.time.sleep(0.5)
            import signal
            os.kill(os.getpid(), signal.SIGSTOP)
        print(rank, "at work", time.monotonic(), flush=True)
    dist.barrier()
    print(rank, "done", flush=True)


run_script(main)
""".replace("LIMIT", "2")


def run_two(case: str, tmp_path: Path, timeout: int = 90) -> list[tuple[int | None, str]]:
    """(exit code, output) of both processes; without a launcher, so that nobody ends one for the other."""
    (tmp_path / "process.py").write_text(PROCESS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in (0, 1):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), "MASTER_PORT": str(port)}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(tmp_path / "process.py"), case],
                env=env | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )  # fmt: skip
        )
    if case == "stops":
        first = processes[0].communicate(timeout=timeout)[0]
        processes[1].kill()
        return [(processes[0].returncode, first), (None, processes[1].communicate()[0])]
    return [(process.returncode, out) for process in processes for out in [process.communicate(timeout=timeout)[0]]]


def test_waiting_has_no_time_limit(tmp_path):
    """Each of the two works for 3 seconds, the second after the first, in a group whose limit is 2."""
    (first, out), (second, other) = run_two("works slowly", tmp_path)
    assert (first, second) == (0, 0), out + other
    began = [float(re.search(r"at work ([\d.]+)", text)[1]) for text in (out, other)]
    assert began[1] - began[0] >= 3
    assert "data: at work, while the others wait for" in out


def test_a_decision_has_no_time_limit(tmp_path):
    for rank, (code, out) in enumerate(run_two("decides slowly", tmp_path)):
        assert code == 0, out
        assert f"{rank} decided" in out


@pytest.mark.parametrize("case", ["fails", "decides badly"])
def test_what_the_first_process_refuses_all_refuse(case, tmp_path):
    began = time.monotonic()
    for code, out in run_two(case, tmp_path):
        assert code == 2, out
        assert "error: rows.jsonl:3: no answer" in out
        assert "Traceback" not in out
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("case", "left", "message"),
    [
        ("breaks", 1, r"error: waiting for data: process 0 has ended with ZeroDivisionError\(\)"),
        ("dies", 1, "error: waiting for data: the first process has ended"),  # and the store with it
        ("the other dies", 0, r"error: waiting for data: process 1 has given no sign of life for \d s"),
        ("stops", 0, r"error: waiting for data: process 1 has given no sign of life for \d s"),
    ],
)
def test_nobody_waits_for_a_process_that_has_ended(case, left, message, tmp_path):
    code, out = run_two(case, tmp_path)[left]
    assert code == 1, out
    assert re.search(message, out), out
    assert "Traceback" not in out


# A script whose data take their time on the first process.
SLOW = """
import os, sys, time
from stagewise.data import loading, packing

load, assign = loading.load_conversations, packing._bins


def slowly(function):
    def called(*args):
        if os.environ["RANK"] == "0":
            time.sleep(12)
        return function(*args)
    return called


loading.load_conversations, packing._bins = slowly(load), slowly(assign)
import supervised_finetuning
from stagewise.run.exit_codes import run_script
run_script(supervised_finetuning.main)
"""


def test_tokenizing_and_packing_longer_than_ddp_timeout(tiny_model_dir, sft_file, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            str(tmp_path / "slow.py"), "--model_name_or_path", tiny_model_dir, "--train_file_dir", sft_file,
            "--template_name", "chatml", "--model_max_length", "128", "--packing", "True", "--max_steps", "2",
            "--output_dir", str(tmp_path / "out"), "--do_train", "True", "--logging_steps", "1", "--ddp_timeout", "10",
            "--report_to", "none", "--per_device_train_batch_size", "1",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    assert len(losses(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    "script", ["pretraining", "supervised_finetuning", "reward_modeling", "ppo_training", "dpo_training"]
)
def test_every_stage_waits_so(script):
    text = (ROOT / f"{script}.py").read_text()
    assert text.count('with first_process_first(args, "data"):') == 1
    assert "main_process_first" not in text.replace("first_process_first", "")


def test_the_store_of_the_group_is_found():
    """torch's private name for it, without which nobody could wait."""
    from torch.distributed import distributed_c10d

    assert callable(distributed_c10d._get_default_store)
