"""Peak memory of a training step with a large vocabulary: our loss against transformers' own, which holds all logits.

    python -m benchmarks.vocabulary
    python -m benchmarks.vocabulary --vocab_size 151936 --length 4096

A random Llama with LoRA on every linear layer, one row, every token trained, forward, backward and an AdamW step, two
times; each kind is a process of its own. memory_gib is the process's peak resident memory less that before the first
step (GPU: the allocator's peak), `of_plain` its share. Prints JSON.
"""

import argparse
import json
import resource
import subprocess
import sys

import torch

KINDS = ("plain", "ours")


def peak_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def step(kind: str, vocab_size: int, length: int, hidden_size: int, layers: int) -> dict:
    from transformers import AutoModelForCausalLM, LlamaConfig

    from stagewise.arguments import LoraArguments
    from stagewise.modeling.lora import attach_adapter
    from stagewise.modeling.token_loss import install_token_loss

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=length,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    if kind == "ours":
        install_token_loss(model)
    model = attach_adapter(model, LoraArguments()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(0, vocab_size, (1, length), device=device)
    before = peak_gib()
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = peak_gib()
    return {"memory_gib": round(after - before, 3), "process_gib": round(after, 3), "loss": round(loss.item(), 4)}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--vocab_size", type=int, default=128_256)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--kind", choices=KINDS, help="this one alone, in this process")
    args = parser.parse_args(argv)
    if args.kind:
        found = step(args.kind, args.vocab_size, args.length, args.hidden_size, args.num_hidden_layers)
        print(json.dumps(found))
        return found
    report: dict = {"vocab_size": args.vocab_size, "length": args.length}
    for kind in KINDS:
        flags = [f"--{name}={value}" for name, value in vars(args).items() if name != "kind"]
        command = [sys.executable, "-m", "benchmarks.vocabulary", *flags, "--kind", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        report[kind] = json.loads(done.stdout.strip().splitlines()[-1])
    report["of_plain"] = round(report["ours"]["memory_gib"] / report["plain"]["memory_gib"], 3)
    report["process_of_plain"] = round(report["ours"]["process_gib"] / report["plain"]["process_gib"], 3)
    print(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    main()
