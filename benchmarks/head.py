"""What the language-model head costs in a step with all weights trained: its share of the time, and an evaluation's.

    python -m benchmarks.head
    python -m benchmarks.head --dtype bfloat16 --against /path/to/another/checkout

A random Llama, one row, every token trained. The same step is taken with the loss of the vocabulary and with a loss
of the hidden states alone, in turn; head_share is the part of the step that the first one adds. With --against the
other checkout is measured too, in turn with this one, each round in processes of their own. Prints JSON, medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step, of a step without the head, and of an evaluation, after one step to warm up."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from stagewise.modeling.token_loss import install_token_loss

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.hidden_size, intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.num_hidden_layers, num_attention_heads=8, num_key_value_heads=8,
        max_position_embeddings=args.length, tie_word_embeddings=False,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).train()
        install_token_loss(model)
        ids = torch.randint(0, args.vocab_size, (1, args.length))

    def seconds(loss) -> float:
        model.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        value = loss()
        if value.requires_grad:
            value.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def evaluation() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, labels=ids).loss

    def whole() -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    def without_head() -> torch.Tensor:
        return model.model(input_ids=ids, use_cache=False).last_hidden_state.float().square().mean()

    seconds(whole)
    taken = [(seconds(whole), seconds(without_head), seconds(evaluation)) for _ in range(args.steps)]
    step, body, evaluated = (statistics.median(column) for column in zip(*taken, strict=True))
    return {"step_s": step, "without_head_s": body, "head_share": 1 - body / step, "evaluation_s": evaluated}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--vocab_size", type=int, default=128_256)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_hidden_layers", type=int, default=40)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--against", help="the root of another checkout")
    parser.add_argument("--here", action="store_true", help="measure in this process, with the package on its path")
    args = parser.parse_args(argv)
    if args.here:
        found = measure(args)
        print(json.dumps(found))
        return found
    roots = {"here": str(ROOT)} | ({"against": args.against} if args.against else {})
    rounds: dict[str, list[dict]] = {name: [] for name in roots}
    names = ("vocab_size", "length", "hidden_size", "num_hidden_layers", "dtype", "steps")
    flags = [f"--{name}={getattr(args, name)}" for name in names]
    for _ in range(args.rounds):
        for name, root in roots.items():
            done = subprocess.run(
                [sys.executable, str(Path(__file__).resolve()), "--here", *flags],
                env={**os.environ, "PYTHONPATH": root}, cwd=root, capture_output=True, text=True, check=True,
            )  # fmt: skip
            rounds[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    report = {
        name: {key: round(statistics.median(one[key] for one in found), 3) for key in found[0]}
        for name, found in rounds.items()
    }
    print(json.dumps({**{name: getattr(args, name) for name in names}, **report}, indent=2))
    return report


if __name__ == "__main__":
    main()
