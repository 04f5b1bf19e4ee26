"""Real tokens per second of supervised_finetuning.py, packed and not, on the same generated conversations.

    python -m benchmarks.training

A random Llama (25 M parameters by default) and log-normal row lengths (mean 180, 99th percentile 900 tokens). Each
setting is a process of its own and sees every row once; the batch is the same number of rows on average. Prints JSON:
tokens/s over the steps without start-up, seconds from the start of the process to the end of the first step, peak
memory, final loss.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.generate import write_conversations

ROOT = Path(__file__).resolve().parents[1]


def train(name: str, model: Path, data: Path, folder: Path, flags: list[str]) -> dict:
    """One run of supervised_finetuning.py; its figures."""
    output = folder / name
    command = [sys.executable, str(ROOT / "supervised_finetuning.py"), "--model_name_or_path", str(model)]
    command += ["--train_file_dir", str(data), "--template_name", "chatml", "--output_dir", str(output)]
    command += ["--do_train", "True", "--use_peft", "False", "--num_train_epochs", "1", "--learning_rate", "1e-3"]
    command += ["--logging_steps", "1", "--save_strategy", "no", "--audit_rows", "0", "--report_to", "none", *flags]
    started = time.time()
    env = {**os.environ, "HF_HOME": str(folder / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    state = json.loads((output / "trainer_state.json").read_text())
    results = json.loads((output / "train_results.json").read_text())
    steps = [entry for entry in state["log_history"] if "tokens_per_second" in entry]
    tokens = [b["num_tokens"] - a["num_tokens"] for a, b in zip(steps[:-1], steps[1:], strict=True)]
    seconds = [n / entry["tokens_per_second"] for n, entry in zip(tokens, steps[1:], strict=True)]
    return {
        "tokens_per_second": round(sum(tokens) / sum(seconds), 1),
        "steps": len(steps),
        "tokens": steps[-1]["num_tokens"],
        "process_seconds": round(time.time() - started, 1),
        "training_seconds": round(results["train_runtime"], 1),
        "peak_memory_gib": results["peak_memory_gib"],
        "mean_loss": round(results["train_loss"], 4),
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--batch_rows", type=int, default=8, help="rows of a batch without packing")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--num_hidden_layers", type=int, default=12)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--flags", default="", help="more flags for every run, such as '--bf16 True'")
    args = parser.parse_args(argv)

    from examples.build_tiny_model import main as build

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = [f"--{key}={getattr(args, key)}" for key in ("hidden_size", "num_hidden_layers", "vocab_size")]
        model = build(["--output_dir", str(folder / "model"), *shape])
        write_conversations(folder / "chats.jsonl", args.rows)
        common = ["--model_max_length", str(args.max_length), *args.flags.split()]
        # about batch_rows rows of the mean length fill this many packed rows
        packed_rows = max(1, args.batch_rows * 180 // args.max_length)
        settings = {
            "unpacked": ["--per_device_train_batch_size", str(args.batch_rows)],
            "packed": ["--packing", "True", "--per_device_train_batch_size", str(packed_rows)],
        }
        report: dict = {"parameters": model["parameters"], "rows": args.rows}
        for setting, flags in settings.items():
            report[setting] = train(setting, folder / "model", folder / "chats.jsonl", folder, [*common, *flags])
    report["packed_over_unpacked"] = round(
        report["packed"]["tokens_per_second"] / report["unpacked"]["tokens_per_second"], 2
    )
    print(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    main()
