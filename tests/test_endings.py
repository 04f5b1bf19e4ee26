"""A run that is done ends with 0, whatever the threads of its process group are doing; tests/endings.py repeats it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.endings import free_port

ROOT = Path(__file__).resolve().parents[1]
# Process 0 ends while a collective of its is in flight. Process 1 joins it when the interpreter of process 0 is about
# to be taken down, and holds its lock until then: a call from atexit that was registered before all others, and is the
# last. The thread that frees the collective's tensor is then refused the lock.
LATE = """
import atexit, os, sys, time
if os.environ["RANK"] == "0":
    atexit.register(sum, range(5 * 10**7))
import torch, torch.distributed as dist
from stagewise.errors import InputError
from stagewise.run.exit_codes import run_script

def main():
    global group
    dist.init_process_group("gloo")
    group = dist.group.WORLD  # as DDP and DeepSpeed hold it
    tensor = torch.ones(4)
    dist.barrier()
    if os.environ["RANK"] == "1":
        time.sleep(0.5)
        dist.all_reduce(tensor)
        time.sleep(4)
        return
    work = dist.all_reduce(tensor, async_op=True)
    del work, tensor
    print("last word of", sys.argv[1], end="")
    if sys.argv[1] == "error":
        raise InputError("found out late")
    if sys.argv[1] == "signal":
        raise SystemExit(143)

run_script(main)
"""


@pytest.mark.parametrize(("how", "code"), [("success", 0), ("error", 2), ("signal", 143)])
def test_a_thread_of_the_group_that_outlives_it(how, code):
    port = str(free_port())
    group = [
        subprocess.Popen(
            [sys.executable, "-c", LATE, how], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={
                **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "PYTHONPATH": str(ROOT),
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    said, complained = group[0].communicate(timeout=60)
    group[1].kill()
    group[1].communicate()
    assert group[0].returncode == code, complained
    assert said == f"last word of {how}"
    assert ("error: found out late" in complained) == (how == "error")
