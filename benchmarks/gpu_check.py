"""What only a GPU shows, item by item: python -m benchmarks.gpu_check, or benchmarks/gpu_check.sh, which see.

Each item is a process of its own on a random Llama that is built here. It prints one line: PASS, FAIL or SKIPPED, the
item, the seconds it took, and its figures or why it was left out. The exit code is 1 where an item failed.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 600  # of all items together
# vocabulary, hidden size, feed-forward size, layers
GPU_MODEL, CPU_MODEL = (65_536, 1024, 2816, 8), (4096, 64, 160, 2)
SFT = ("--template_name", "chatml", "--train_file_dir", "examples/sft/train/medical_qa.jsonl")
PAIRS = ("--template_name", "chatml", "--train_file_dir", "examples/reward/train", "--max_length", "512")
REWARD = "def length(prompts, completions):\n    return [len(c) / 100 for c in completions]\n"

Figures = dict[str, object]


class Skipped(Exception):
    """The item cannot run here; its text says why."""


def expect(condition: bool, what: str, figures: Figures) -> None:
    if not condition:
        raise AssertionError(f"{what}; {text_of(figures)}")


def text_of(figures: Figures) -> str:
    """{"loss": 1.23456} is "loss 1.235"."""

    def text(value: object) -> str:
        if isinstance(value, list):
            return " ".join(map(text, value))
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {text(value)}" for name, value in figures.items())


def need_gpu() -> None:
    if not torch.cuda.is_available():
        raise Skipped("needs a GPU")


def build_model(folder: Path, sizes: tuple[int, int, int, int]) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    from examples.build_tiny_model import main as build

    build(["--output_dir", str(folder), "--hidden_size=64", "--num_hidden_layers=1"])
    vocabulary, hidden, feed_forward, layers = sizes
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=feed_forward, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), max_position_embeddings=2048,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def stage(script: str, folder: Path, name: str, *flags: str, launch: tuple[str, ...] = ()) -> str:
    """Run a stage for a few steps; returns what it printed. Its output folder is folder / name."""
    command = [
        sys.executable, *launch, script, "--model_name_or_path", str(folder / "model"), "--output_dir",
        str(folder / name), "--do_train", "True", "--logging_steps", "1", "--save_strategy", "no", "--report_to",
        "none", "--lora_dropout", "0", "--per_device_train_batch_size", "4", "--overwrite_output_dir", "True", *flags,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        said = [line for line in lines if "rror:" in line] or lines
        raise AssertionError(f"{script} ended with {done.returncode}: {said[-1][:300]}")
    return done.stdout


def losses(folder: Path, name: str) -> list[float]:
    history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    found = [entry["loss"] for entry in history if "loss" in entry]
    assert all(math.isfinite(loss) for loss in found), f"losses {found}"
    return found


def fp16_gradients(folder: Path) -> Figures:
    """LoRA's gradients in float16 under a loss scale of 2^15, against float32, for 8,192 tokens a step."""
    need_gpu()
    from transformers import AutoModelForCausalLM

    from stagewise.arguments import LoraArguments
    from stagewise.modeling.lora import attach_adapter
    from stagewise.modeling.token_loss import install_token_loss

    scale, gradients = 2.0**15, {}
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float16).to("cuda", dtype)
        install_token_loss(model)
        model = attach_adapter(model, LoraArguments(lora_dropout=0.0)).train()
        generator = torch.Generator("cuda").manual_seed(2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, device="cuda", generator=generator) * 0.02
        ids = torch.randint(0, GPU_MODEL[0], (4, 512), device="cuda", generator=generator)
        with torch.autocast("cuda", torch.float16, enabled=dtype == torch.float16):
            loss = model(input_ids=ids, labels=ids, use_cache=False, num_items_in_batch=torch.tensor(8192)).loss
        (loss * scale).backward()
        found = [p.grad.double().flatten() / scale for p in model.parameters() if p.requires_grad]
        gradients[dtype] = torch.cat(found).cpu()
        del model
    exact, half = gradients[torch.float32], gradients[torch.float16]
    figures: Figures = {
        "cosine": torch.cosine_similarity(exact, half, dim=0).item(),
        "relative error": ((half - exact).norm() / exact.norm()).item(),
    }
    expect(figures["cosine"] > 0.999, "gradients in float16 are not those of float32", figures)  # type: ignore[operator]
    return figures


def precision(folder: Path) -> Figures:
    """What a command line without a word about precision computes in, and what the log says of it."""
    from stagewise.devices import multiplies_bf16

    said = stage("supervised_finetuning.py", folder, "default", *SFT, "--max_steps", "2", "--use_peft", "False")
    line = next((line for line in said.splitlines() if "precision: " in line), "no word in the log")
    config = (folder / "default" / "run_config.yaml").read_text()
    used = "bfloat16" if "bf16: true\n" in config else "float32"
    wanted = "bfloat16" if torch.cuda.is_available() and multiplies_bf16() else "float32"
    figures: Figures = {"computes in": used, "log": repr(line.partition("precision: ")[2] or line)}
    expect(used == wanted and ("precision: " in said) == torch.cuda.is_available(), f"not {wanted}", figures)
    return figures


def packing(folder: Path) -> Figures:
    """The first loss of the same conversations, packed and each in a row of its own, and what computed attention."""
    from torch.nn.attention import varlen

    import supervised_finetuning
    from stagewise.modeling import document_attention

    flags = [
        *SFT, "--model_name_or_path", str(folder / "model"), "--max_train_samples", "16", "--lora_dropout", "0",
        "--per_device_train_batch_size", "16", "--max_steps", "1", "--logging_steps", "1", "--do_train", "True",
        "--save_strategy", "no", "--report_to", "none", "--model_max_length", "512",
    ]  # fmt: skip
    found, calls = {}, 0
    for packed in ("False", "True"):
        name = f"packing-{packed}"
        with mock.patch.object(varlen, "varlen_attn", wraps=varlen.varlen_attn) as attend:
            supervised_finetuning.main([*flags, "--packing", packed, "--output_dir", str(folder / name)])
        found[packed], calls = losses(folder, name)[0], attend.call_count
    figures: Figures = {"packed": found["True"], "alone": found["False"], "calls of varlen_attn": calls}
    expect(abs(found["True"] / found["False"] - 1) < 5e-3, "packed documents see each other", figures)
    if not hasattr(document_attention, "varlen_attention"):
        figures["note"] = "this tree computes packed attention without it"
    elif torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        expect(calls > 0, "packed attention was not computed by varlen_attn", figures)
    return figures


def flash_attn(folder: Path) -> Figures:
    need_gpu()
    from stagewise.errors import InputError
    from stagewise.modeling.attention import require_flash_attention

    try:
        require_flash_attention("flash_attention_2")
    except InputError as error:
        raise Skipped(str(error)) from None
    flags = (*SFT, "--max_steps", "2", "--packing", "True")
    stage("supervised_finetuning.py", folder, "sdpa", *flags)
    said = stage("supervised_finetuning.py", folder, "flash", *flags, "--flash_attn", "True")
    assert "attention kernel: flash_attention_2" in said
    figures: Figures = {"flash": losses(folder, "flash"), "sdpa": losses(folder, "sdpa")}
    expect(abs(losses(folder, "flash")[0] / losses(folder, "sdpa")[0] - 1) < 5e-3, "losses differ", figures)
    return figures


def zero(folder: Path, number: int) -> Figures:
    """All weights by one process, with and without ZeRO."""
    flags = (*SFT, "--max_steps", "3", "--use_peft", "False", "--model_max_length", "512")
    stage("supervised_finetuning.py", folder, "plain", *flags)
    stage("supervised_finetuning.py", folder, "sped", *flags, "--deepspeed", f"zero{number}.json")
    plain, sped = losses(folder, "plain"), losses(folder, "sped")
    worst = max(abs(a / b - 1) for a, b in zip(plain, sped, strict=True))
    figures: Figures = {"losses": sped, "largest difference": worst}
    expect(worst < 2e-2, "losses are not those without ZeRO", figures)
    return figures


def rm_zero2(folder: Path) -> Figures:
    flags = (*PAIRS, "--max_steps", "3", "--bf16", "True", "--deepspeed", "zero2.json")
    stage("reward_modeling.py", folder, "rm", *flags)
    return {"losses": losses(folder, "rm")}


def ppo_zero2(folder: Path) -> Figures:
    (folder / "reward.py").write_text(REWARD)
    stage(
        "ppo_training.py", folder, "ppo", *SFT, "--reward_function", f"{folder}/reward.py:length", "--max_steps", "2",
        "--max_new_tokens", "16", "--max_prompt_length", "128", "--rollout_batch_size", "8", "--max_train_samples",
        "32", "--bf16", "True", "--deepspeed", "zero2.json",
    )  # fmt: skip
    history = json.loads((folder / "ppo" / "trainer_state.json").read_text())["log_history"]
    kl = [entry["objective/kl"] for entry in history if "objective/kl" in entry]
    figures: Figures = {"losses": losses(folder, "ppo"), "KL": kl}
    expect(abs(kl[0]) < 0.05, "the policy does not begin at its reference", figures)
    return figures


def benchmark(name: str, *flags: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stderr.strip().splitlines() or ["no word"])[-1][:300]
    return json.loads(done.stdout[done.stdout.index("{") :])


def merging(folder: Path) -> Figures:
    if not (ROOT / "benchmarks" / "merging.py").is_file():
        raise Skipped("benchmarks/merging.py is not there")
    found = benchmark("merging", "--repeats", "1", "--size", "494M" if torch.cuda.is_available() else "60M")
    figures: Figures = {"GiB at the peak": found["ours"]["peak_gib"], "allowed": found["bound_gib"]}
    figures |= {"peft": found["peft"]["peak_gib"], "seconds over peft's": found["ratio"]}
    expect(found["ours"]["peak_gib"] <= found["bound_gib"], "too much memory", figures)
    return figures


def vocabulary(folder: Path) -> Figures:
    need_gpu()
    found = benchmark("vocabulary")
    figures: Figures = {"of the plain loss's memory": found["of_plain"], "GiB": found["ours"]["memory_gib"]}
    expect(found["of_plain"] <= 0.40, "more than 0.40", figures)
    return figures


def mfu(folder: Path) -> Figures:
    need_gpu()
    from stagewise.devices import device_name, multiplies_bf16, peak_flops

    if peak_flops(device_name()) is None:
        raise Skipped(f"the peak of {device_name()} is not known")
    half = ("--bf16", "True") if multiplies_bf16() else ("--fp16", "True")
    said = stage(
        "pretraining.py", folder, "mfu", "--train_file_dir", "examples/pretrain/train", "--block_size", "1024",
        "--max_steps", "10", *half,
    )  # fmt: skip
    history = json.loads((folder / "mfu" / "trainer_state.json").read_text())["log_history"]
    best = max(history, key=lambda entry: entry.get("mfu", 0.0))
    figures: Figures = {"mfu": best.get("mfu"), "tokens/s": best.get("tokens_per_second")}
    expect("  mfu " in said and 0 < best.get("mfu", 0.0) < 1, "no sensible figure", figures)
    return figures


def memory(folder: Path) -> Figures:
    """The estimate of --dry_run against the peak of the run."""
    flags = (*SFT, "--max_steps", "3", "--model_max_length", "512", "--use_peft", "False")
    said = stage("supervised_finetuning.py", folder, "dry", *flags, "--dry_run", "True")
    assert "Memory by estimate" in said
    assert not (folder / "dry").exists()
    stage("supervised_finetuning.py", folder, "memory", *flags)
    results = json.loads((folder / "memory" / "train_results.json").read_text())
    estimated, measured = results["estimated_memory_gib"], results["peak_memory_gib"]
    share = measured / estimated
    figures: Figures = {"estimated GiB": estimated, "measured GiB": measured, "measured / estimated": share}
    expect(0.5 < share < 1.1, "the estimate is off", figures)
    return figures


def two_gpus(folder: Path) -> Figures:
    if torch.cuda.device_count() < 2:
        raise Skipped(f"needs two GPUs, and there are {torch.cuda.device_count()}")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    found: Figures = {}
    for engine, flags in (("ddp", ()), ("zero3", ("--deepspeed", "zero3.json")), ("fsdp", ("--fsdp", "True"))):
        stage(
            "supervised_finetuning.py", folder, engine, *SFT, "--max_steps", "3", "--use_peft", "False", *flags,
            launch=launch,
        )  # fmt: skip
        found[engine] = losses(folder, engine)
    return found


ITEMS: dict[str, Callable[[Path], Figures]] = {
    "fp16_gradients": fp16_gradients,
    "precision": precision,
    "packing": packing,
    "flash_attn": flash_attn,
    "zero2": lambda folder: zero(folder, 2),
    "zero3": lambda folder: zero(folder, 3),
    "rm_zero2": rm_zero2,
    "ppo_zero2": ppo_zero2,
    "merging": merging,
    "vocabulary": vocabulary,
    "mfu": mfu,
    "memory": memory,
    "two_gpus": two_gpus,
}


def run_item(name: str, folder: Path) -> tuple[str, str]:
    """("PASS", figures), ("FAIL", why) or ("SKIPPED", why)."""
    try:
        return "PASS", text_of(ITEMS[name](folder))
    except Skipped as reason:
        return "SKIPPED", str(reason)
    except (Exception, SystemExit) as error:
        return "FAIL", f"{type(error).__name__}: {error}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--cpu", action="store_true", help="without the GPU, on a tiny model")
    parser.add_argument("--only", help="items, separated by commas: " + ", ".join(ITEMS))
    parser.add_argument("--item", choices=ITEMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.item:
        status, text = run_item(args.item, args.folder)
        (args.folder / "result.json").write_text(json.dumps([status, text]))
        return 0
    names = args.only.split(",") if args.only else list(ITEMS)
    unknown = [name for name in names if name not in ITEMS]
    if unknown:
        parser.error(f"--only: no item {unknown[0]}; there are {', '.join(ITEMS)}")
    if args.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        parser.error("no GPU is found; --cpu checks what runs anywhere")
    with tempfile.TemporaryDirectory() as name:
        build_model(Path(name) / "model", CPU_MODEL if args.cpu else GPU_MODEL)
        deadline = time.monotonic() + SECONDS
        statuses = [check(item, Path(name), deadline) for item in names]
    print(f"{len(names)} items: " + ", ".join(f"{statuses.count(s)} {s}" for s in ("PASS", "FAIL", "SKIPPED")))
    return int("FAIL" in statuses)


def check(item: str, folder: Path, deadline: float) -> str:
    """One item in a process of its own; its line is printed, its status returned."""
    started, result = time.monotonic(), folder / "result.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--item", item, "--folder", str(folder)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, deadline - started))
        status, text = json.loads(result.read_text()) if result.is_file() else ("FAIL", done.stderr[-300:])
    except subprocess.TimeoutExpired:
        status, text = "FAIL", f"the {SECONDS} seconds of all items are over"
    print(f"{status:<7} {item:<14} {time.monotonic() - started:5.1f} s  {' '.join(text.split())}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
