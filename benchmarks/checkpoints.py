"""What it costs that a checkpoint is whole or not there: hashes, flushes and a rename beside the Trainer's own saving.

    python -m benchmarks.checkpoints
    python -m benchmarks.checkpoints --hidden_size 2048    # larger files

SFT of all weights of a random Llama, so that a checkpoint holds weights and both moments of AdamW. After a step its
checkpoint is saved in turn by the Trainer alone and by ours; the disk is told to finish before each. `saving` are the
medians in seconds; `plain_flushed` is the Trainer alone with the same wait for the disk at its end, without which a
power cut may leave nothing; `resume_check` is how long a resume takes to find that all files are what was written.
Prints JSON.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from transformers import Trainer, TrainerCallback


def seconds(work: Callable[[], object]) -> float:
    os.sync()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Measure(TrainerCallback):
    """After the first step: the same checkpoint by each way, in turn."""

    def __init__(self, trainer: Trainer, repeats: int):
        self.trainer, self.repeats = trainer, repeats
        self.figures: dict = {}

    def on_step_end(self, args, state, control, **kwargs):
        from stagewise.checkpoint_files import manifest_problem

        trainer, folder = self.trainer, Path(args.output_dir, f"checkpoint-{state.global_step}")
        timed: dict[str, list[float]] = {"plain": [], "plain_flushed": [], "ours": []}

        def plain() -> None:
            Trainer._save_checkpoint(trainer, trainer.model_wrapped, None)

        def plain_flushed() -> None:
            plain()
            os.sync()

        ways = {"plain": plain, "plain_flushed": plain_flushed,
                "ours": lambda: trainer._save_checkpoint(trainer.model_wrapped, None)}  # fmt: skip
        for turn in range(self.repeats * len(ways)):
            name = sorted(ways)[(turn + turn // len(ways)) % len(ways)]  # each way after each other one
            shutil.rmtree(folder, ignore_errors=True)
            timed[name].append(seconds(ways[name]))
        ways["ours"]()
        files = [path for path in folder.rglob("*") if path.is_file()]
        medians = {name: statistics.median(found) for name, found in timed.items()}
        self.figures = {
            "checkpoint_gib": round(sum(path.stat().st_size for path in files) / 2**30, 3),
            "saving": {name: round(value, 3) for name, value in medians.items()},
            "ours_to_plain": round(medians["ours"] / medians["plain"], 2),
            "ours_to_plain_flushed": round(medians["ours"] / medians["plain_flushed"], 2),
            "resume_check": round(seconds(lambda: manifest_problem(folder)), 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--num_hidden_layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", help="where to save; unset: the temporary folder")
    args = parser.parse_args()

    import supervised_finetuning
    from examples.build_tiny_model import main as build_model
    from stagewise.run import lifecycle

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        sizes = ["--hidden_size", str(args.hidden_size), "--num_hidden_layers", str(args.num_hidden_layers)]
        build_model(["--output_dir", str(folder / "model"), *sizes])
        row = {"conversations": [{"from": "human", "value": "How are you?"}, {"from": "gpt", "value": "Well."}]}
        (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
        build, measures = lifecycle.build_trainer, []

        def build_measured(*positional, **keywords):
            trainer = build(*positional, **keywords)
            measures.append(Measure(trainer, args.repeats))
            trainer.add_callback(measures[-1])
            return trainer

        lifecycle.build_trainer = build_measured
        supervised_finetuning.main(
            ["--model_name_or_path", str(folder / "model"), "--train_file_dir", str(folder / "rows.jsonl"),
             "--template_name", "chatml", "--use_peft", "False", "--do_train", "True", "--max_steps", "1",
             "--save_strategy", "no", "--report_to", "none", "--plot_loss", "False", "--audit_rows", "0",
             "--output_dir", str(folder / "out")]
        )  # fmt: skip
        print(json.dumps(measures[0].figures, indent=2))


if __name__ == "__main__":
    main()
