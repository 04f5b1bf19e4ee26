"""The table at the end of run_pipeline.sh: each stage before and after, and what the merged model answers."""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

# stage, what is measured, the logged figure (of held-out data), how it is shown
STAGES = (
    ("pt", "perplexity of held-out text", "eval_perplexity"),
    ("sft", "loss of held-out answers", "eval_loss"),
    ("rm", "accuracy on held-out pairs", "eval_accuracy"),
    ("rm", "margin of scores", "eval_margin"),
    ("ppo", "score of answers to held-out prompts", "eval_scores"),
    ("ppo", "standard deviation of the scores", "eval_scores_std"),
    ("ppo", "share of answers cut off", "eval_without_eos"),
    ("ppo", "KL to the policy before", "eval_kl"),
    ("dpo", "accuracy on held-out pairs", "eval_rewards/accuracies"),
    ("dpo", "margin of implicit rewards", "eval_rewards/margins"),
)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def stage_row(root: Path, stage: str, figure: str) -> dict | None:
    """A figure before and after a stage, its seconds and its plot."""
    state = root / stage / "trainer_state.json"
    if not state.is_file():
        return None
    values = [entry[figure] for entry in json.loads(state.read_text())["log_history"] if figure in entry]
    seconds = dict(line.split() for line in (root / "seconds.txt").read_text().splitlines())
    results = json.loads((root / stage / "all_results.json").read_text())
    return {
        "before": values[0],
        "after": results[figure],
        "seconds": int(seconds.get(stage, 0)),
        "plot": f"{stage}/training_loss.png",
    }


def score_answers(answers: list[dict]) -> int:
    """How many responses contain one of their expected words (lower case)."""
    return sum(any(word in row["response"].lower() for word in row["expected"]) for row in answers)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--root", required=True, type=Path)
    parser.add_argument("--name", required=True, help="the name that self-cognition answers must contain")
    args = parser.parse_args(argv)
    console = Console()
    report: dict = {}

    table = Table(title=f"What the stages did (in {args.root})")
    for column in ("stage", "measure", "before", "after", "seconds", "plot"):
        # a path that is cut short cannot be opened: it is folded
        table.add_column(
            column, justify="right" if column in ("before", "after", "seconds") else "left", overflow="fold"
        )
    for stage, measure, figure in STAGES:
        row = stage_row(args.root, stage, figure)
        if row is None:
            continue
        table.add_row(
            stage, measure, f"{row['before']:,.3f}", f"{row['after']:,.3f}", str(row["seconds"]), row["plot"]
        )
        report.setdefault(stage, {"seconds": row["seconds"]})[figure] = [row["before"], row["after"]]

    answers = read_lines(args.root / "questions.answers.jsonl")
    identity = read_lines(args.root / "identity_questions.answers.jsonl")
    for row in [*answers, *identity]:
        console.print(f"[bold]{row['question']}[/bold]\n  {row['response']}")
    report["correct"] = score_answers(answers)
    report["named"] = sum(args.name in row["response"] for row in identity)
    console.print(table)
    console.print(f"questions seen in training: {report['correct']} of {len(answers)} answered correctly (greedy)")
    console.print(f"'who are you' questions: {report['named']} of {len(identity)} answered as {args.name}")
    (args.root / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
