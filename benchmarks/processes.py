"""From one process to two: how a training step grows, what of it is communication, and that data is prepared once.

    python -m benchmarks.processes
    python -m benchmarks.processes --processes 8 --steps 50 --hidden_size 1024    # on a machine with GPUs

SFT of all weights of a random Llama on generated conversations, packed rows of 1,024 tokens, the same batch for each
process (weak scaling), a CPU thread for each, under DDP, ZeRO-2 and ZeRO-3. `step_seconds` is the median of the steps
after the third. `apart` are so many runs at the same time that know nothing of each other: they share caches and
memory as the group does, so what the group takes longer is communication and waiting. `efficiency` is the group's
tokens per second over one process's times their number. `prepared` counts the rows that each process tokenized and
packed in a run with an empty cache. Prints JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENGINES = {"ddp": [], "zero2": ["--deepspeed", "zero2.json"], "zero3": ["--deepspeed", "zero3.json"]}
# Steps that hold compilation, first allocations, and what ZeRO-3 learns about the order of layers.
WARM_UP = 3


def arguments(folder: Path, name: str, steps: int) -> list[str]:
    return [
        "--model_name_or_path", str(folder / "model"), "--train_file_dir", str(folder / "rows.jsonl"),
        "--template_name", "chatml", "--packing", "True", "--model_max_length", "1024", "--use_peft", "False",
        "--per_device_train_batch_size", "1", "--do_train", "True", "--max_steps", str(steps), "--logging_steps", "1",
        "--save_strategy", "no", "--report_to", "none", "--plot_loss", "False", "--output_dir", str(folder / name),
    ]  # fmt: skip


def launch(folder: Path, name: str, steps: int, processes: int, engine: str, cache: str = "cache"):
    """Start a run; the first of its processes leaves trainer_state.json, each prints what it prepared."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 or ENGINES[engine] else []), "benchmarks/processes.py"]
    env = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / cache),
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    flags = [*arguments(folder, name, steps), *ENGINES[engine]]
    return subprocess.Popen(
        [*command, "--child", *flags], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(run: subprocess.Popen) -> str:
    out, err = run.communicate()
    if run.returncode:
        raise RuntimeError(out[-1000:] + err[-3000:])
    return out


def steps_of(folder: Path, name: str) -> dict:
    """Median seconds of a step, and tokens per second, after the warm-up."""
    log = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    seconds, tokens, seen = [], [], 0
    for entry in log:
        if "tokens_per_second" in entry:
            tokens.append(entry["num_tokens"] - seen)
            seconds.append(tokens[-1] / entry["tokens_per_second"])
            seen = entry["num_tokens"]
    seconds, tokens = seconds[WARM_UP:], tokens[WARM_UP:]
    return {
        "step_seconds": round(statistics.median(seconds), 3),
        "tokens_per_second": round(sum(tokens) / sum(seconds), 1),
    }


def prepared(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"rank"')]


def child(flags: list[str]) -> None:
    """supervised_finetuning.py, with its tokenizer and its packing counted."""
    import supervised_finetuning
    from stagewise.data import packing, tokenization
    from stagewise.run.exit_codes import run_script

    counted = {"rank": int(os.environ.get("RANK", 0)), "tokenized": 0, "packed": 0}
    encode, pack = tokenization.encode_conversations, packing.STRATEGIES["best_fit"]

    def count_encoded(rows, *args, **kwargs):
        counted["tokenized"] += len(rows)
        return encode(rows, *args, **kwargs)

    def count_packed(lengths, *args, **kwargs):
        counted["packed"] += len(lengths)
        return pack(lengths, *args, **kwargs)

    tokenization.encode_conversations, packing.STRATEGIES["best_fit"] = count_encoded, count_packed
    run_script(lambda: supervised_finetuning.main(flags))
    print(json.dumps(counted), flush=True)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args(argv)

    from benchmarks.generate import write_conversations
    from examples.build_tiny_model import main as build

    report: dict = {"processes": args.processes, "steps": args.steps}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = ["--hidden_size", str(args.hidden_size), "--num_hidden_layers", str(args.layers)]
        build(["--output_dir", str(folder / "model"), *size])
        write_conversations(folder / "rows.jsonl", args.rows)
        started = time.perf_counter()
        report["prepared"] = prepared(finish(launch(folder, "cold", 1, args.processes, "ddp")))
        report["cold_start_seconds"] = round(time.perf_counter() - started, 1)
        finish(launch(folder, "one", args.steps, 1, "ddp"))
        report["one"] = one = steps_of(folder, "one")
        runs = [launch(folder, f"apart{i}", args.steps, 1, "ddp") for i in range(args.processes)]
        for run in runs:
            finish(run)
        apart = [steps_of(folder, f"apart{i}")["step_seconds"] for i in range(args.processes)]
        report["apart"] = {"step_seconds": round(statistics.mean(apart), 3)}
        for engine in ENGINES:
            finish(launch(folder, engine, args.steps, args.processes, engine))
            found = steps_of(folder, engine)
            alone = report["apart"]["step_seconds"] / found["step_seconds"]
            found["communication_share"] = round(max(0.0, 1 - alone), 3)
            found["efficiency"] = round(found["tokens_per_second"] / (args.processes * one["tokens_per_second"]), 3)
            report[engine] = found
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
