"""What a merge takes, of memory and of time, beside peft's merge_and_unload and save_pretrained.

    python -m benchmarks.merging                      # 1.5B parameters in bf16, four files; 10 GB of free disk
    python -m benchmarks.merging --size 60M           # a quick look

A random model of Qwen2.5's shape and a LoRA adapter (r = 8, on all linear layers) are made in a temporary folder. Then
each way merges them in turn, each time in a process of its own: merge_peft_adapter.py with its proof, and peft, which
loads the base in bf16, merges and saves it in files of the same size. Prints JSON: for each way the medians of

    seconds: from the end of the imports to the end; of peft `merge_and_save` is what is left without loading,
    process_seconds: of the whole process, imports and all,
    peak_gib: the largest resident memory of the process (VmHWM); imports_gib of it was there before the work began.

Merging reads files without mapping them, so that its figure holds no page cache; peft's holds what transformers has
mapped. `bound_gib` is 40% of the weights and 1 GiB more; `ratio` is our seconds over peft's, the median over pairs.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# hidden size, intermediate size, layers, heads, heads of keys and values, vocabulary, size of a file
SIZES = {
    "60M": (512, 1408, 8, 8, 2, 65536, "40MB"),
    "494M": (896, 4864, 24, 14, 2, 151936, "250MB"),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, "850MB"),
}


def make(folder: Path, size: str) -> int:
    """Base and adapter; returns the bytes of the base's weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from examples.build_tiny_model import main as build_tokenizer

    build_tokenizer(["--output_dir", str(folder / "tiny"), "--vocab_size", "600", "--hidden_size", "64"])
    hidden, intermediate, layers, heads, pairs, vocabulary, shard = SIZES[size]
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=pairs, vocab_size=vocabulary, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "base", max_shard_size=shard)
    AutoTokenizer.from_pretrained(folder / "tiny").save_pretrained(folder / "base")
    peft_model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    peft_model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))


def ours(folder: Path, output: Path, shard: str) -> dict:
    import merge_peft_adapter

    report = merge_peft_adapter.main(
        ["--base_model", str(folder / "base"), "--lora_model", str(folder / "adapter"), "--output_dir", str(output)]
    )
    assert report["proof"] == "logits"
    return {}


def peft(folder: Path, output: Path, shard: str) -> dict:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, folder / "adapter")
    loaded = time.perf_counter()
    model.merge_and_unload().save_pretrained(output, max_shard_size=shard)
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(output)
    return {"merge_and_save": time.perf_counter() - loaded}


def peak_gib() -> float:
    """The process's own; ru_maxrss begins with that of its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def child(way: str, folder: Path, shard: str) -> None:
    """One merge, in this process."""
    import peft as _peft  # noqa: F401
    import transformers  # noqa: F401

    from stagewise.run import merging, preflight  # noqa: F401

    before = peak_gib()
    started = time.perf_counter()
    figures = {"ours": ours, "peft": peft}[way](folder, folder / way, shard)
    figures["seconds"] = time.perf_counter() - started
    figures["peak_gib"] = peak_gib()
    figures["imports_gib"] = before
    (folder / f"{way}.json").write_text(json.dumps(figures))


def one(way: str, folder: Path, shard: str) -> dict:
    shutil.rmtree(folder / way, ignore_errors=True)
    os.sync()
    started = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.merging", "--child", way, "--folder", str(folder), "--shard", shard]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    figures = json.loads((folder / f"{way}.json").read_text())
    return {"process_seconds": time.perf_counter() - started, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.5B", choices=SIZES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=("ours", "peft"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.folder, args.shard)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shard = SIZES[args.size][-1]
        weights = make(folder, args.size)
        found: dict[str, list[dict]] = {"ours": [], "peft": []}
        for turn in range(args.repeats):
            for way in ("ours", "peft") if turn % 2 else ("peft", "ours"):
                found[way].append(one(way, folder, shard))
        pairs = zip(found["ours"], found["peft"], strict=True)
        result = {
            "size": args.size,
            "weights_gib": weights / 2**30,
            "files": len(list((folder / "base").glob("*.safetensors"))),
            "bound_gib": 0.4 * weights / 2**30 + 1,
            **{way: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
               for way, runs in found.items()},
            "ratio": statistics.median(a["seconds"] / b["seconds"] for a, b in pairs),
        }  # fmt: skip
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
