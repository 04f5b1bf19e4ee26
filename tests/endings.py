"""How runs of two processes end, again and again, beside a process that keeps a core busy:

    python -m tests.endings --repeats 50 --engines ddp zero2 zero3

Each repeat is two steps of SFT and an evaluation in two fresh processes (forked, so that libraries are loaded once).
Prints how many repeats ended with anything but 0 in one of them, and with what; exit code 1 where there were some.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from stagewise.run.exit_codes import run_script

ENGINES = {"ddp": (), "zero2": ("--deepspeed", "zero2.json"), "zero3": ("--deepspeed", "zero3.json")}
PROCESSES = 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--busy", type=int, default=1, help="processes that do nothing but take time")
    args, mine = parser.parse_args(argv), os.getpid()
    folder = Path(tempfile.mkdtemp())  # not a context, which the processes would leave too
    loads = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    bad = 0
    try:
        command = prepare(folder)
        for engine in args.engines:
            ends = Counter(repeat([*command, *ENGINES[engine]], folder / "log") for _ in range(args.repeats))
            failed = {codes: number for codes, number in ends.items() if any(codes)}
            bad += sum(failed.values())
            print(f"{engine}: {args.repeats} repeats, {sum(failed.values())} ended with anything but 0 {failed or ''}")
            sys.stdout.flush()
    finally:
        if os.getpid() == mine:
            for load in loads:
                load.kill()
            shutil.rmtree(folder)
    return int(bad > 0)


def prepare(folder: Path) -> list[str]:
    """A model and a command line; everything that a run imports is imported."""
    import deepspeed  # noqa: F401 (a repeat has it from here)
    import trl  # noqa: F401

    import supervised_finetuning  # noqa: F401
    from examples.build_tiny_model import main as build
    from stagewise.run import lifecycle  # noqa: F401
    from stagewise.trainers import causal_lm  # noqa: F401

    size = ("--vocab_size", "600", "--hidden_size", "64", "--num_hidden_layers", "2")
    build(["--output_dir", str(folder / "model"), *size])
    data = "examples/sft/train/medical_qa.jsonl"
    return [
        "--model_name_or_path", str(folder / "model"), "--template_name", "chatml", "--train_file_dir", data,
        "--validation_file_dir", data, "--max_train_samples", "8", "--max_eval_samples", "4", "--max_steps", "2",
        "--per_device_train_batch_size", "2", "--model_max_length", "256", "--use_peft", "False",
        "--output_dir", str(folder / "out"), "--overwrite_output_dir", "True", "--save_strategy", "no",
        "--use_cpu", "True",
    ]  # fmt: skip


def repeat(command: list[str], log: Path) -> tuple[int, ...]:
    """The exit codes of the processes of one run; those of a signal are negative."""
    port = free_port()
    pids = [fork(rank, port, command, log) for rank in range(PROCESSES)]
    codes = tuple(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
    if any(codes):
        print(log.read_text(encoding="utf-8", errors="replace")[-3000:], file=sys.stderr)
    return codes


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fork(rank: int, port: int, command: list[str], log: Path) -> int:
    """A process that ends as a script does: through the end of its interpreter."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    where = (rank, rank, PROCESSES, PROCESSES, "127.0.0.1", port)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update(zip(names, map(str, where), strict=True))
    signal.alarm(120)  # a run that hangs is not well either
    file = os.open(log, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if rank == 0 else 0))
    os.dup2(file, 1)
    os.dup2(file, 2)
    import supervised_finetuning

    run_script(lambda: supervised_finetuning.main(command))
    raise SystemExit(0)


if __name__ == "__main__":
    raise SystemExit(main())
