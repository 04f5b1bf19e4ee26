"""Rows per second from a JSON Lines file to cached token ids with labels, and the memory of the process.

    python -m benchmarks.tokenizing --rows 100000

Prints JSON. `read` parses, checks and writes the Arrow cache; `tokenize` renders, tokenizes and labels.
`memory_mib` is the process's own memory at the end, `growth_mib` what of it came after the first 1% of the rows:
little, because records and ids are in memory-mapped files.
"""

import argparse
import json
import re
import tempfile
import time
from pathlib import Path

from benchmarks.generate import write_conversations


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
    encoded = tokenize_conversations(dataset, renderer, tokenizer, EncodingOptions(2048), workers)
    done = time.perf_counter()
    return {
        "rows": rows,
        "tokens": sum(encoded.with_format("numpy")["length"][:].tolist()),
        "read_rows_per_second": round(rows / (read - started)),
        "tokenize_rows_per_second": round(rows / (done - read)),
        "memory_mib": round(anonymous_mib()),
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    args = parser.parse_args(argv)

    from datasets import disable_progress_bars

    from examples.build_tiny_model import main as build

    disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(["--output_dir", str(folder / "model"), "--hidden_size", "64", "--num_hidden_layers", "1"])
        first = measure(max(1000, args.rows // 100), str(folder / "model"), folder, args.workers)
        whole = measure(args.rows, str(folder / "model"), folder, args.workers)
    report = {**whole, "workers": args.workers, "growth_mib": whole["memory_mib"] - first["memory_mib"]}
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    main()
