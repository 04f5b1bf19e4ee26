"""Multi-task losses: what a mean over tokens, one over tasks and CoBa make of tasks of very different size.

    python -m benchmarks.multitask
    python -m benchmarks.multitask --modes case1 case3 coba selfpaced --steps 600

Three generated tasks of 2,000, 200 and 20 rows are trained together by supervised_finetuning.py, from the same random
Llama, for the same steps in the same order, once for each mode. A task asks for the answer that belongs to a word,
of 4, 2 and 1 words; it has 40, 8 and 4 such pairs, each in questions of eight forms, and its validation rows are new
questions.

Then once more with CoBa, for twice the steps, where the training rows of the task of 200 contradict its validation
rows: each word has the answer of another. Once the pairs are learnt, and not only what answers look like, that raises
the validation loss, and CoBa should turn away from the task.

Prints JSON:

- validation: loss per token of each task at the end, for each mode (mean of the last five validations and the seeds)
- lowest: the lowest that it was on the way
- weights: of each task in the CoBa runs, mean over the second half of their steps
- claims: what the figures should show, and whether they do in each seed

and writes it to --output_dir, with a plot for each seed: validation losses over the steps, and the weights of CoBa.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from statistics import fmean

from benchmarks.ppo import build_model, run_script

ROWS = {"large": 2000, "middle": 200, "small": 20}
WORDS = {"large": 40, "middle": 8, "small": 4}
ANSWER_WORDS = {"large": 4, "middle": 2, "small": 1}
# of the syllables: with other words in each task, little of what one teaches is of use for another
CONSONANTS = {"large": "bdfg", "middle": "klmn", "small": "prst"}
VALIDATION_ROWS = 40
LAST = 5  # validations whose mean is "at the end": those of small tasks go up and down
CLEAN, CONTRADICTED = "clean", "contradicted"
FORMS = (
    "What goes with {}?",
    "Tell me what goes with {}.",
    "Please find the word for {}.",
    "Which word belongs to {}?",
    "I am looking for the partner of {}.",
    "Do you know the other half of {}?",
    "Complete the pair: {} and",
    "Give me the match of {}.",
)


def made_up(generator: random.Random, count: int, consonants: str) -> list[str]:
    """So many different words of three syllables."""
    syllables = [a + b for a in consonants for b in "aeiou"]
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(generator.choices(syllables, k=3))] = None
    return list(words)


def write_tasks(folder: Path, seed: int, contradicted: str | None = None) -> None:
    """train/<task>.jsonl and validation/<task>.jsonl; in the training rows of the task `contradicted` each word has
    the answer of the next."""
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
    for name, rows in ROWS.items():
        generator = random.Random(f"{seed} {name}")
        each = 1 + ANSWER_WORDS[name]
        words = made_up(generator, each * WORDS[name], CONSONANTS[name])
        pairs = [(words[at], " ".join(words[at + 1 : at + each])) for at in range(0, len(words), each)]
        for split, count in (("train", rows), ("validation", VALIDATION_ROWS)):
            lines = []
            for number in range(count):
                word, answer = pairs[number % len(pairs)]
                if split == "train" and name == contradicted:
                    answer = pairs[(number + 1) % len(pairs)][1]
                turns = [
                    {"from": "human", "value": f"{name}: {generator.choice(FORMS).format(word)}"},
                    {"from": "gpt", "value": f"It is {answer}."},
                ]
                lines.append(json.dumps({"conversations": turns}) + "\n")
            (folder / split / f"{name}.jsonl").write_text("".join(lines))


def train(mode: str, model: Path, data: Path, output: Path, args: argparse.Namespace, seed: int) -> list[dict]:
    """The log of a run of `args.steps` steps, or twice as many on `contradicted` data."""
    steps = args.steps * (2 if data.name == CONTRADICTED else 1)
    settings: tuple = ()
    if mode == "coba":
        settings = ("--coba_warmup_steps", args.warmup, "--coba_history_length", args.history)
    elif mode == "selfpaced":
        settings = ("--selfpaced_history_length", args.warmup)
    run_script(
        "supervised_finetuning.py", output.parent, "--model_name_or_path", model, "--template_name", "chatml",
        "--train_file_dir", ",".join(str(data / "train" / f"{name}.jsonl") for name in ROWS),
        "--validation_file_dir", ",".join(str(data / "validation" / f"{name}.jsonl") for name in ROWS),
        "--output_dir", output, "--use_peft", False, "--weighted_loss_mode", mode, *settings,
        "--per_device_train_batch_size", args.batch_size, "--per_device_eval_batch_size", 60,
        "--learning_rate", args.learning_rate, "--lr_scheduler_type", "constant", "--max_steps", steps,
        "--eval_strategy", "steps", "--eval_steps", args.eval_steps, "--logging_steps", args.eval_steps,
        "--save_strategy", "no", "--report_to", "none", "--audit_rows", 0, "--seed", seed,
    )  # fmt: skip
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def curve(log: list[dict], name: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[name]) for entry in log if name in entry]


def validation(log: list[dict]) -> dict[str, list[float]]:
    return {name: [loss for _, loss in curve(log, f"eval_{name}_loss")] for name in ROWS}


def late_weights(log: list[dict]) -> dict[str, float]:
    weights = {name: [weight for _, weight in curve(log, f"task_weight/{name}")] for name in ROWS}
    return {name: fmean(each[len(each) // 2 :]) for name, each in weights.items()}


def check_claims(logs: dict[str, list[dict]]) -> dict[str, bool]:
    """Of one seed: by the losses at the end, and by the weights of CoBa."""
    last = {mode: {name: fmean(each[-LAST:]) for name, each in validation(log).items()} for mode, log in logs.items()}
    claims = {
        f"{mode} below case1 on {name}": last[mode][name] < last["case1"][name]
        for mode in ("case3", "coba")
        if mode in last and "case1" in last
        for name in ("middle", "small")
    }
    if CONTRADICTED in logs:
        clean, contradicted = (late_weights(logs[mode])["middle"] for mode in ("coba", CONTRADICTED))
        claims["coba turns away from the task that diverges"] = contradicted < min(clean, 1 / len(ROWS))
    return claims


def plot(logs: dict[str, list[dict]], path: Path) -> None:
    """Validation losses of each task with a line for each mode, and the weights of the CoBa runs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    weighed = [mode for mode in ("coba", CONTRADICTED) if mode in logs]
    figure = Figure(figsize=(15, 9 if weighed else 4.5))
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 if weighed else 1, 3, squeeze=False)
    for axis, name in zip(axes[0], ROWS, strict=True):
        for mode, log in logs.items():
            axis.plot(*zip(*curve(log, f"eval_{name}_loss"), strict=True), label=mode)
        axis.set(title=f"{name}: {ROWS[name]} rows", xlabel="step", ylabel="validation loss")
        axis.legend()
    for axis, mode in zip(axes[1] if weighed else [], weighed, strict=False):
        for name in ROWS:
            axis.plot(*zip(*curve(logs[mode], f"task_weight/{name}"), strict=True), label=name)
        axis.set(title=f"weights, {mode}", xlabel="step", ylim=(0, 1))
        axis.legend()
    for axis in axes[1][len(weighed) :] if weighed else []:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=["case1", "case3", "coba"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--eval_steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=5, help="Validations before the weights begin to follow.")
    parser.add_argument("--history", type=int, default=10, help="Validations that CoBa looks back on.")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--hidden_size", type=int, default=96)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark-multitask"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    found: dict[int, dict[str, list[dict]]] = {}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            build_model(folder / "model", args.hidden_size, 2, 600)
            write_tasks(folder / "data" / CLEAN, seed)
            write_tasks(folder / "data" / CONTRADICTED, seed, contradicted="middle")
            runs = [(mode, mode, CLEAN) for mode in args.modes]
            if "coba" in args.modes:
                runs.append((CONTRADICTED, "coba", CONTRADICTED))
            found[seed] = {
                name: train(mode, folder / "model", folder / "data" / data, folder / name, args, seed)
                for name, mode, data in runs
            }
        plot(found[seed], args.output_dir / f"multitask-{seed}.png")
    modes = list(found[args.seeds[0]])
    of_mode = {mode: [validation(found[seed][mode]) for seed in args.seeds] for mode in modes}
    report = {
        "steps": args.steps,
        "seeds": args.seeds,
        "rows": ROWS,
        "validation": {
            mode: rounded({name: fmean(fmean(run[name][-LAST:]) for run in runs) for name in ROWS})
            for mode, runs in of_mode.items()
        },
        "lowest": {
            mode: rounded({name: fmean(min(run[name]) for run in runs) for name in ROWS})
            for mode, runs in of_mode.items()
        },
        "weights": {
            f"{mode}, seed {seed}": rounded(late_weights(found[seed][mode]))
            for seed in args.seeds
            for mode in ("coba", "selfpaced", CONTRADICTED)
            if mode in modes
        },
        "claims": {seed: check_claims(found[seed]) for seed in args.seeds},
    }
    (args.output_dir / "multitask.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
