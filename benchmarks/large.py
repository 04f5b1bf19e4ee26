"""An 8B-shaped Llama on one GPU (or a small one on a CPU): LoRA, QLoRA, kernels, long rows.

    python -m benchmarks.large                       on a GPU: 8B, bf16, packed rows of 4096 tokens, S2-Attn at 32768
    python -m benchmarks.large --size small          what the same settings do on a CPU, in a few minutes
    python -m benchmarks.large --only lora,qlora

Random weights are saved once, then each setting is a run of pretraining.py with LoRA of rank 8 on every linear layer:

- lora, lora checkpointing: packed rows of documents, without and with gradient checkpointing;
- flash: as lora, with --flash_attn; qlora checkpointing: 4-bit weights;
- long, long s2: one document a row, full attention and --shift_attn, both with checkpointing.

Prints JSON and a table. tokens_per_second leaves out the first two steps. matrix_share is the share of the rate that
this machine multiplies large matrices with (measured first, in the same data type) which the run's own products reach:

    tokens/s * (4 P + 2 A) / rate      P: parameters of the linear layers and the head; A: 4 h L / 2 a layer, the
                                       score products of causal attention over rows of L tokens, width h

4 P, not 6 P: weights are frozen, so that backward multiplies once. What is computed again for checkpointing, and the
other half of scores that a kernel may compute, do not count as work. Settings that cannot run here say why.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.generate import WORDS

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    # Llama 3 8B, but for the vocabulary of the tokenizer that is built here
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "row": 4096, "long_row": 32768, "dtype": "bfloat16",
        "documents": 4000,
    },
    "small": {
        "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 8192, "row": 512, "long_row": 4096, "dtype": "float32",
        "documents": 600,
    },
}  # fmt: skip
CHECKPOINTING = ("--gradient_checkpointing", "True")
SETTINGS = {
    "lora": (),
    "lora checkpointing": CHECKPOINTING,
    "flash": ("--flash_attn", "True"),
    "qlora checkpointing": ("--qlora", "True", *CHECKPOINTING),
    "long": CHECKPOINTING,
    "long s2": ("--shift_attn", "True", *CHECKPOINTING),
}


def matrix_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations per second of square matrix products, the best of several."""
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        _wait(device)
        started = time.perf_counter()
        for _ in range(8):
            one @ other
        _wait(device)
        best = max(best, 8 * 2 * size**3 / (time.perf_counter() - started))
    return best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def build_model(folder: Path, size: dict, device: str) -> dict:
    """Random weights with a tokenizer of ours; the numbers that the work is counted with."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from examples.build_tiny_model import main as build

    build(["--output_dir", str(folder), "--hidden_size=64", "--num_hidden_layers=1", "--vocab_size=8192"])
    shape = {key: size[key] for key in list(size)[:6]}
    config = LlamaConfig(**shape, max_position_embeddings=size["long_row"], tie_word_embeddings=False)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, size["dtype"]))
    model.save_pretrained(folder)
    embedding = size["vocab_size"] * size["hidden_size"]
    return {"parameters": model.num_parameters(), "matrices": model.num_parameters() - embedding}


def write_texts(path: Path, documents: int, mean_words: int) -> None:
    rng = np.random.default_rng(0)
    words = WORDS.split()
    with path.open("w") as out:
        for _ in range(documents):
            length = max(8, int(rng.lognormal(np.log(mean_words), 0.6)))
            out.write(json.dumps({"text": " ".join(rng.choice(words, length))}) + "\n")


def train(model: Path, texts: Path, output: Path, row: int, size: dict, flags: list[str], steps: int) -> dict:
    """One run of pretraining.py."""
    command = [
        sys.executable, str(ROOT / "pretraining.py"), "--model_name_or_path", str(model),
        "--train_file_dir", str(texts), "--output_dir", str(output),
        "--do_train", "True", "--block_size", str(row), "--max_steps", str(steps),
        "--per_device_train_batch_size", "1", "--lora_rank", "8", "--lora_dropout", "0", "--learning_rate", "1e-4",
        "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none", "--validation_split_percentage", "1",
        *(("--bf16", "True") if size["dtype"] == "bfloat16" else ()), *flags,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        said = [line for line in lines if "error:" in line.lower() or "Error" in line] or lines
        return {"cannot": said[-1][:200]}
    entries = json.loads((output / "trainer_state.json").read_text())["log_history"]
    entries = [entry for entry in entries if "tokens_per_second" in entry]
    tokens = [b["num_tokens"] - a["num_tokens"] for a, b in zip(entries[1:-1], entries[2:], strict=True)]
    seconds = [n / entry["tokens_per_second"] for n, entry in zip(tokens, entries[2:], strict=True)]
    results = json.loads((output / "train_results.json").read_text())
    return {
        "tokens_per_second": round(sum(tokens) / sum(seconds), 1),
        "peak_memory_gib": results["peak_memory_gib"],
        "estimated_memory_gib": results.get("estimated_memory_gib"),
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--size", choices=SIZES, default="8b" if torch.cuda.is_available() else "small")
    parser.add_argument("--only", help="settings, separated by commas")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output_file", help="where the JSON goes beside the screen")
    args = parser.parse_args(argv)
    size = SIZES[args.size]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, size["dtype"])
    rate = matrix_rate(device, dtype, 8192 if device == "cuda" else 2048)
    report: dict = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPUs",
        "torch": torch.__version__,
        "size": args.size,
        "dtype": size["dtype"],
        "matrix_tflops": round(rate / 1e12, 3),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report |= build_model(folder / "model", size, device)
        _free(device)
        write_texts(folder / "texts.jsonl", size["documents"], size["row"] // 8)
        write_texts(folder / "long.jsonl", args.steps + 2, 2 * size["long_row"])
        for setting in args.only.split(",") if args.only else SETTINGS:
            long = setting.startswith("long")
            row = size["long_row"] if long else size["row"]
            texts = folder / ("long.jsonl" if long else "texts.jsonl")
            output = folder / setting.replace(" ", "-")
            found = train(folder / "model", texts, output, row, size, list(SETTINGS[setting]), args.steps)
            if "tokens_per_second" in found:
                scores = size["num_hidden_layers"] * 4 * size["hidden_size"] * row / 2 if long else 0.0
                work = 4 * report["matrices"] + 2 * scores
                found["matrix_share"] = round(found["tokens_per_second"] * work / rate, 3)
            report[setting] = found
            print(setting, found, file=sys.stderr)
    text = json.dumps(report, indent=2)
    print(text)
    print(table(report))
    if args.output_file:
        Path(args.output_file).write_text(text + "\n")
    return report


def _free(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()


def table(report: dict) -> str:
    lines = ["| | tokens/s | peak memory (GiB) | share of the matrix rate |", "|---|---|---|---|"]
    for setting in SETTINGS:
        found = report.get(setting, {})
        if "tokens_per_second" in found:
            figures = (found["tokens_per_second"], found["peak_memory_gib"], f"{found['matrix_share']:.0%}")
            lines.append(f"| {setting} | " + " | ".join(map(str, figures)) + " |")
        elif found:
            lines.append(f"| {setting} | {found['cannot']} | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
