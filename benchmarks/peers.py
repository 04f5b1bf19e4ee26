"""Supervised fine-tuning here and with its peers, on the same rows, model and number of processes.

    python -m benchmarks.peers
    python -m benchmarks.peers --llamafactory /path/to/its/venv/bin/python
    python -m benchmarks.peers --flags "--bf16 True" --trl '{"bf16": true, "use_cpu": false}'

A random Llama (25 M parameters by default), conversations of log-normal lengths (mean 180, 99th percentile 900
tokens), all weights trained in float32 for one epoch, answers alone in the loss. Each setting is a process of its own:

- stagewise, stagewise packed: supervised_finetuning.py;
- trl, trl packed: trl's SFTTrainer as `trl sft` builds it, with packing best-fit (which is padding-free there), with
  what slows it down on this model turned off (checkpointing; bf16, unless asked for);
- llamafactory, llamafactory packed: where an environment with it is given.

Prints JSON and a table. tokens_per_second: real tokens (no padding) over the time from the end of the first step to
the end of the last one; start_s: from the start of the process to the end of the first step; peak_memory_gib: the
process's resident memory; loss: the mean of the epoch's steps.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks.generate import write_conversations

ROOT = Path(__file__).resolve().parents[1]
LEARNING_RATE = 1e-3


def measure(command: list[str], folder: Path, threads: int) -> tuple[float, list[tuple[float, int]], float]:
    """Run a process that writes "<seconds> <real tokens so far>" to folder/steps.txt after each step.

    Returns:
        (seconds when the process started, the lines, its peak resident memory in GiB).
    """
    folder.mkdir(parents=True)
    steps = folder / "steps.txt"
    env = {**os.environ, "HF_HOME": str(folder / "cache"), "STEPS_FILE": str(steps), "OMP_NUM_THREADS": str(threads)}
    env["PYTHONPATH"] = str(ROOT)
    started = time.time()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)}\n{(folder / 'log.txt').read_text()[-3000:]}")
    lines = [line.split() for line in steps.read_text().splitlines()]
    return started, [(float(at), int(tokens)) for at, tokens in lines], usage.ru_maxrss / 2**20


def figures(started: float, steps: list[tuple[float, int]], memory: float, loss: float | None) -> dict:
    (first, before), (last, after) = steps[0], steps[-1]
    return {
        "tokens_per_second": round((after - before) / (last - first), 1),
        "start_s": round(first - started, 1),
        "process_s": round(last - started, 1),
        "steps": len(steps),
        "tokens": after,
        "peak_memory_gib": round(memory, 2),
        "loss": None if loss is None else round(loss, 4),
    }


def recorder():
    """A Trainer callback that writes a line after each step; real tokens as the trainer's own logs count them."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        ended = 0.0

        def on_step_end(self, args, state, control, **kwargs):
            self.ended = time.time()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                tokens = logs.get("num_tokens", state.num_input_tokens_seen)
                with open(os.environ["STEPS_FILE"], "a") as out:
                    out.write(f"{self.ended} {int(tokens)}\n")

    return Recorder()


# What runs in the processes.


def child_stagewise(argv: list[str]) -> None:
    import supervised_finetuning
    from stagewise.run import lifecycle

    build = lifecycle.build_trainer

    def with_recorder(*args, **kwargs):
        trainer = build(*args, **kwargs)
        trainer.add_callback(recorder())
        return trainer

    lifecycle.build_trainer = with_recorder
    supervised_finetuning.main(argv)


def child_trl(argv: list[str]) -> None:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    options = json.loads(argv[0])
    model, data = options.pop("model"), options.pop("data")
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        args=SFTConfig(**options),
        train_dataset=load_dataset("json", data_files=data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.add_callback(recorder())
    loss = trainer.train().training_loss
    Path("loss.json").write_text(json.dumps(loss))


CHILDREN = {"stagewise": child_stagewise, "trl": child_trl}


# The settings.


def run_stagewise(model: Path, data: Path, folder: Path, args, packed: bool) -> dict:
    flags = [
        "--model_name_or_path", str(model), "--train_file_dir", str(data), "--template_name", "chatml",
        "--output_dir", str(folder / "out"), "--do_train", "True", "--use_peft", "False", "--num_train_epochs", "1",
        "--learning_rate", str(LEARNING_RATE), "--logging_steps", "1", "--save_strategy", "no", "--audit_rows", "0",
        "--report_to", "none", "--model_max_length", str(args.max_length), *args.flags.split(),
    ]  # fmt: skip
    rows = args.packed_rows if packed else args.batch_rows
    flags += ["--packing", str(packed), "--per_device_train_batch_size", str(rows)]
    started, steps, memory = measure(child_command("stagewise", flags), folder, args.threads)
    results = json.loads((folder / "out" / "train_results.json").read_text())
    return figures(started, steps, memory, results["train_loss"])


def run_trl(model: Path, data: Path, folder: Path, args, packed: bool) -> dict:
    options = {
        "model": str(model), "data": str(data), "output_dir": str(folder / "out"), "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "max_length": args.max_length, "packing": packed, "gradient_checkpointing": False, "bf16": False,
        "per_device_train_batch_size": args.packed_rows if packed else args.batch_rows, "disable_tqdm": True,
        "completion_only_loss": True, **json.loads(args.trl),
    }  # fmt: skip
    started, steps, memory = measure(child_command("trl", [json.dumps(options)]), folder, args.threads)
    return figures(started, steps, memory, json.loads((folder / "loss.json").read_text()))


def run_llamafactory(model: Path, data: Path, folder: Path, args, packed: bool) -> dict:
    """Its command line, with a callback that its own Trainer is given by sitecustomize."""
    site = folder.parent / f"{folder.name}-site"
    site.mkdir()
    entry = {"formatting": "sharegpt", "file_name": str(data), "columns": {"messages": "conversations"}}
    (site / "dataset_info.json").write_text(json.dumps({"rows": entry}))
    config = {
        "stage": "sft", "do_train": True, "finetuning_type": "full", "model_name_or_path": str(model),
        "dataset": "rows", "dataset_dir": str(site), "template": "chatml", "cutoff_len": args.max_length,
        "output_dir": str(folder / "out"), "num_train_epochs": 1, "learning_rate": LEARNING_RATE, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "per_device_train_batch_size": args.packed_rows
        if packed else args.batch_rows, "packing": packed, "neat_packing": packed, "overwrite_cache": True,
        "disable_gradient_checkpointing": True, "flash_attn": "sdpa",
        **json.loads(args.llamafactory_options),
    }  # fmt: skip
    (site / "run.yaml").write_text(yaml.safe_dump(config))
    command = [args.llamafactory, str(Path(__file__).with_name("llamafactory_run.py")), str(site / "run.yaml")]
    started, steps, memory = measure(command, folder, args.threads)
    results = json.loads((folder / "out" / "train_results.json").read_text())
    # of packed rows it counts the numbers of the documents; every row is seen once, so the sum is known
    even = count_tokens(model, data, args.max_length) / len(steps)
    steps = [(at, round(even * (i + 1))) for i, (at, _) in enumerate(steps)]
    return figures(started, steps, memory, results["train_loss"])


def count_tokens(model: Path, data: Path, max_length: int) -> int:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    roles = {"human": "user", "gpt": "assistant"}
    count = 0
    for row in map(json.loads, data.read_text().splitlines()):
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        count += min(len(ids), max_length)
    return count


def child_command(name: str, argv: list[str]) -> list[str]:
    return [sys.executable, "-m", "benchmarks.peers", "--child", name, *argv]


RUNS = {"stagewise": run_stagewise, "trl": run_trl, "llamafactory": run_llamafactory}


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        CHILDREN[argv[1]](argv[2:])
        return {}
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--batch_rows", type=int, default=8, help="rows of a batch without packing")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--num_hidden_layers", type=int, default=12)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=1, help="rounds through all settings; the best of each counts")
    parser.add_argument("--only", help="settings, separated by commas: stagewise,trl packed")
    parser.add_argument("--flags", default="", help="more flags for supervised_finetuning.py")
    parser.add_argument("--trl", default="{}", help="more options of SFTConfig, as JSON")
    parser.add_argument("--llamafactory", help="the Python of an environment with LLaMA-Factory")
    parser.add_argument("--llamafactory_options", default="{}", help="more of its options, as JSON")
    args = parser.parse_args(argv)
    # about batch_rows rows of the mean length fill this many packed rows
    args.packed_rows = max(1, args.batch_rows * 180 // args.max_length)

    from examples.build_tiny_model import main as build

    peers = [name for name in RUNS if name != "llamafactory" or args.llamafactory]
    settings = [f"{name}{packed}" for name in peers for packed in ("", " packed")]
    if args.only:
        settings = [setting.strip() for setting in args.only.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        shape = [f"--{key}={getattr(args, key)}" for key in ("hidden_size", "num_hidden_layers", "vocab_size")]
        parameters = build(["--output_dir", str(model), *shape])["parameters"]
        add_chat_template(model)
        conversations, prompts = folder / "chats.jsonl", folder / "prompts.jsonl"
        write_conversations(conversations, args.rows)
        write_prompts(conversations, prompts)
        report: dict = {"parameters": parameters, "rows": args.rows, "threads": args.threads}
        for repeat in range(args.repeats):
            for setting in settings:
                run, _, packed = setting.partition(" ")
                rows = prompts if run == "trl" else conversations
                place = folder / f"{setting.replace(' ', '-')}-{repeat}"
                found = RUNS[run](model, rows, place, args, bool(packed))
                best = report.get(setting, found)
                report[setting] = max(best, found, key=lambda figure: figure["tokens_per_second"])
    add_ratios(report, settings)
    print(json.dumps(report, indent=2))
    print(table(report, settings))
    return report


def add_chat_template(model: Path) -> None:
    """Peers render by the tokenizer's own template: it gets ours of chatml."""
    from transformers import AutoTokenizer

    from stagewise.data.loading import chat_template
    from template import get_template

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = chat_template(get_template("chatml"), tokenizer)
    tokenizer.save_pretrained(model)


def write_prompts(conversations: Path, path: Path) -> None:
    """The same rows as trl wants them where only answers are trained: prompt and completion, both as messages."""
    with conversations.open() as rows, path.open("w") as out:
        for row in map(json.loads, rows):
            question, answer = (turn["value"] for turn in row["conversations"])
            prompt = [{"role": "user", "content": question}]
            out.write(json.dumps({"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}) + "\n")


def add_ratios(report: dict, settings: list[str]) -> None:
    speed = {setting: report[setting]["tokens_per_second"] for setting in settings}
    if "stagewise" in speed and "stagewise packed" in speed:
        report["packed_over_unpacked"] = round(speed["stagewise packed"] / speed["stagewise"], 2)
    for ours, suffix in (("stagewise packed", None), ("stagewise", "")):
        others = [speed[s] for s in settings if not s.startswith("stagewise") and (suffix is None or " " not in s)]
        if ours in speed and others:
            name = "packed_over_best_peer" if suffix is None else "unpacked_over_best_unpacked_peer"
            report[name] = round(speed[ours] / max(others), 2)


def table(report: dict, settings: list[str]) -> str:
    columns = ("tokens_per_second", "start_s", "process_s", "peak_memory_gib", "loss")
    lines = ["| | real tokens/s | to the end of step 1 (s) | whole run (s) | peak memory (GiB) | mean loss |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [
        f"| {setting} | " + " | ".join(str(report[setting][key]) for key in columns) + " |" for setting in settings
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
