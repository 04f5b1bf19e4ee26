"""Rows per second from a JSON Lines file to cached token ids with labels, and the memory of the process.

    python -m benchmarks.tokenizing --rows 100000
    python -m benchmarks.tokenizing --rows 100000 --trl --llamafactory /path/to/its/venv/bin/python

Prints JSON. `read` parses, checks and writes the Arrow cache; `tokenize` renders, tokenizes and labels.
`memory_mib` is the process's own memory at the end, `growth_mib` what of it came after the first 1% of the rows:
little, because records and ids are in memory-mapped files. Peers go from the same file to token ids and labels too,
each in a process of its own: trl as its SFTTrainer prepares a data set, LLaMA-Factory by its get_dataset;
`rows_per_second` compares the whole way.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks.generate import write_conversations
from benchmarks.peers import add_chat_template, write_prompts

ROOT = Path(__file__).resolve().parents[1]
MAX_LENGTH = 2048


def anonymous_mib() -> float:
    """The process's own memory; pages of memory-mapped Arrow files, which the kernel may drop, are not counted."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


def measure(rows: int, model_dir: str, folder: Path, workers: int) -> dict:
    """Time both passes over `rows` rows; each call uses a file and a cache of its own."""
    from transformers import AutoTokenizer

    from stagewise.data.records import RecordOptions
    from stagewise.data.sources import find_sources, load_records
    from stagewise.data.tokenization import EncodingOptions, TemplateRenderer, tokenize_conversations
    from template import get_template

    path = folder / f"rows{rows}.jsonl"
    write_conversations(path, rows)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    renderer = TemplateRenderer(get_template("chatml"), tokenizer)
    started = time.perf_counter()
    records, _ = load_records(
        "conversation", find_sources(str(path)), RecordOptions(), cache_dir=str(folder / "cache")
    )
    read = time.perf_counter()
    (dataset,) = records.values()
    encoded = tokenize_conversations(dataset, renderer, tokenizer, EncodingOptions(MAX_LENGTH), workers)
    done = time.perf_counter()
    return {
        "rows": rows,
        "tokens": sum(encoded.with_format("numpy")["length"][:].tolist()),
        "read_rows_per_second": round(rows / (read - started)),
        "tokenize_rows_per_second": round(rows / (done - read)),
        "rows_per_second": round(rows / (done - started)),
        "memory_mib": round(anonymous_mib()),
    }


def prepare_with_trl(rows: str, model_dir: str, workers: int) -> None:
    """Prints rows and seconds, from the file on."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    options = SFTConfig(
        output_dir=str(Path(rows).parent / "trl"), max_length=MAX_LENGTH, completion_only_loss=True, bf16=False,
        dataset_num_proc=workers if workers > 1 else None, report_to="none",
    )  # fmt: skip
    started = time.perf_counter()
    data = load_dataset("json", data_files=rows, split="train")
    trainer = SFTTrainer(model=model, args=options, train_dataset=data, processing_class=tokenizer)
    print(json.dumps({"rows": len(trainer.train_dataset), "seconds": time.perf_counter() - started}))


def run(command: list[str], folder: Path) -> int:
    """Rows per second that the process prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "home"), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-1000:] + done.stderr[-2000:])
    found = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    return round(found["rows"] / found["seconds"])


def measure_peers(args: argparse.Namespace, folder: Path) -> dict[str, int]:
    rows, model_dir = folder / f"rows{args.rows}.jsonl", str(folder / "model")
    found = {}
    if args.trl:
        write_prompts(rows, folder / "prompts.jsonl")
        flags = ["--child_trl", str(folder / "prompts.jsonl"), model_dir, "--workers", str(args.workers)]
        found["trl_rows_per_second"] = run([sys.executable, "-m", "benchmarks.tokenizing", *flags], folder)
    if args.llamafactory:
        entry = {"formatting": "sharegpt", "file_name": str(rows), "columns": {"messages": "conversations"}}
        (folder / "dataset_info.json").write_text(json.dumps({"rows": entry}))
        config = {
            "stage": "sft", "do_train": True, "model_name_or_path": model_dir, "dataset": "rows",
            "dataset_dir": str(folder), "template": "chatml", "cutoff_len": MAX_LENGTH, "overwrite_cache": True,
            "output_dir": str(folder / "lf"), "preprocessing_num_workers": args.workers,
        }  # fmt: skip
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        command = [args.llamafactory, "benchmarks/llamafactory_run.py", str(folder / "run.yaml"), "tokenize"]
        found["llamafactory_rows_per_second"] = run(command, folder)
    return found


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    parser.add_argument("--trl", action="store_true", help="measure trl as well")
    parser.add_argument(
        "--llamafactory", help="the Python of an environment with LLaMA-Factory, to measure it as well"
    )
    parser.add_argument("--child_trl", nargs=2, metavar=("ROWS", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child_trl:
        prepare_with_trl(*args.child_trl, args.workers)
        return {}

    from datasets import disable_progress_bars

    from examples.build_tiny_model import main as build

    disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(["--output_dir", str(folder / "model"), "--hidden_size", "64", "--num_hidden_layers", "1"])
        add_chat_template(folder / "model")
        first = measure(max(1000, args.rows // 100), str(folder / "model"), folder, args.workers)
        whole = measure(args.rows, str(folder / "model"), folder, args.workers)
        peers = measure_peers(args, folder)
    report = {**whole, "workers": args.workers, "growth_mib": whole["memory_mib"] - first["memory_mib"], **peers}
    if peers:
        report["over_best_peer"] = round(whole["rows_per_second"] / max(peers.values()), 2)
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    main()
