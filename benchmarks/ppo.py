"""PPO on one base model: memory of the weights, where the time of ppo_training.py goes, what the cache saves.

    python -m benchmarks.ppo
    python -m benchmarks.ppo --memory_only --dtype bfloat16

Random Llamas, on the GPU where there is one. Prints JSON in three parts:

- memory: one model alone; one base with adapters for policy, value model and reward model; policy, value model,
  reference and reward model as four models. Each is loaded in a process of its own. `weights_gib` is counted over all
  parameters, each once. `memory_gib` is measured: the allocator's peak on the GPU; on CPU the growth of the resident
  memory after every weight was read, because until then float32 weights are only mapped from their file.
- throughput: ppo_training.py on a smaller model; means over all steps but the first. Tokens/s of a rollout count the
  sampled tokens, those of an update prompts and answers in every round; shares are of the iteration's time.
- generation: the policy samples exactly N tokens for each row behind a short prompt, with the cache and without it
  (the whole row is encoded again for every token). Seconds per token of one row.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, harmonic_mean

from benchmarks.generate import write_conversations

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ("one_model", "one_base", "four_models")
PROMPT_TOKENS = 16  # of a row in the third part
REWARD_FUNCTION = '''
def length(prompts, completions):
    """Longer is better, up to 500 characters."""
    return [min(len(completion), 500) / 500 for completion in completions]
'''


def run_script(script: str, folder: Path, *flags: object) -> None:
    """One of the repository's scripts, with a cache of its own."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    env = {**os.environ, "HF_HOME": str(folder / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def build_model(folder: Path, hidden_size: int, num_hidden_layers: int, vocab_size: int) -> int:
    """A random Llama with its tokenizer at `folder`; its number of parameters. The vocabulary may come out smaller
    than asked for, since the sample text that the tokenizer learns from has only so many words."""
    from examples.build_tiny_model import main as build

    shape = {"hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers, "vocab_size": vocab_size}
    return build(["--output_dir", str(folder), *(f"--{key}={value}" for key, value in shape.items())])["parameters"]


def write_without_stop(model_dir: Path, output: Path) -> None:
    """The same model, but stop tokens are never sampled: every answer has max_new_tokens tokens, in every run.

    Input and output embedding are one matrix. A coordinate that is large for every token stays so in the hidden
    states, and gives the tokens for which it is negative logits far below all others.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    embedding = model.get_input_embeddings().weight.data
    embedding[:, 0] = 4.0
    embedding[tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"]), 0] = -4.0
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def train_reward_adapter(model: Path, output: Path, folder: Path, dtype: str) -> None:
    """A rank-8 adapter after one step: its size counts here, not what it has learnt."""
    run_script(
        "reward_modeling.py", folder, "--model_name_or_path", model, "--dtype", dtype, "--lora_rank", 8,
        "--train_file_dir", ROOT / "examples/reward/train", "--template_name", "chatml", "--output_dir", output,
        "--do_train", True, "--max_train_samples", 8, "--per_device_train_batch_size", 2, "--max_steps", 1,
        "--learning_rate", "1e-3", "--audit_rows", 0, "--save_strategy", "no", "--report_to", "none",
    )  # fmt: skip


# ---- memory


def load_setting(setting: str, model: str, reward_model: str, dtype: str, device: str) -> list:
    """Its modules, on the device. They may share parameters."""
    from stagewise.arguments import LoraArguments, ModelArguments
    from stagewise.modeling.actor_critic import load_actor_critic
    from stagewise.modeling.loading import load_causal_lm, load_tokenizer
    from stagewise.modeling.reward import load_scorer

    args = ModelArguments(model_name_or_path=model, dtype=dtype)
    tokenizer = load_tokenizer(args)
    if setting == "one_model":
        return [load_causal_lm(args, tokenizer, False, token_loss=False).to(device)]
    lora_args = LoraArguments(use_peft=setting == "one_base", lora_rank=8)
    actor = load_actor_critic(args, lora_args, tokenizer, 1.0).to(device)
    scorer = load_scorer(reward_model, None, actor, tokenizer, (), 8)
    return [actor, scorer.model]


def resident_bytes() -> int:
    """Of this process, pages of memory-mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def weigh(setting: str, model: str, reward_model: str, dtype: str) -> dict:
    """What the weights of a setting take; to be called in a process of its own."""
    import torch

    for module in ("peft", "stagewise.modeling.reward", "transformers.models.llama.modeling_llama"):
        importlib.import_module(module)  # code is not what is measured
    on_gpu = torch.cuda.is_available()
    before = 0 if on_gpu else resident_bytes()
    modules = load_setting(setting, model, reward_model, dtype, "cuda" if on_gpu else "cpu")
    parameters = {id(parameter): parameter for module in modules for parameter in module.parameters()}.values()
    for parameter in parameters:
        parameter.detach().sum()
    memory = torch.cuda.max_memory_allocated() if on_gpu else resident_bytes() - before
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return {"weights_gib": round(weights / 2**30, 4), "memory_gib": round(memory / 2**30, 4)}


def measure_memory(args: argparse.Namespace, folder: Path) -> dict:
    model, adapter, merged = folder / "model", folder / "reward_adapter", folder / "reward_model"
    report: dict = {"parameters": build_model(model, args.hidden_size, args.num_hidden_layers, args.vocab_size)}
    train_reward_adapter(model, adapter, folder, args.dtype)
    run_script(
        "merge_peft_adapter.py", folder, "--base_model", model, "--lora_model", adapter, "--output_dir", merged,
        "--dtype", args.dtype,
    )  # fmt: skip
    for setting in SETTINGS:
        reward_model = merged if setting == "four_models" else adapter
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            report[setting] = process.submit(weigh, setting, str(model), str(reward_model), args.dtype).result()
    for setting in SETTINGS[1:]:
        report[f"{setting}_over_one_model"] = {
            figure: round(report[setting][f"{figure}_gib"] / report["one_model"][f"{figure}_gib"], 3)
            for figure in ("weights", "memory")
        }
    return report


# ---- throughput


def reward_flags(args: argparse.Namespace, model: Path, folder: Path) -> list[object]:
    if args.reward == "function":
        path = folder / "rewards.py"
        path.write_text(REWARD_FUNCTION)
        return ["--reward_function", f"{path}:length"]
    train_reward_adapter(model, folder / "small_reward_adapter", folder, args.dtype)
    return ["--reward_model_path", folder / "small_reward_adapter"]


def measure_throughput(args: argparse.Namespace, model: Path, folder: Path) -> dict:
    """One run of ppo_training.py; its figures."""
    prompts, output = folder / "prompts.jsonl", folder / "ppo"
    # a quarter of a conversation is its question
    write_conversations(prompts, args.prompts, 4 * args.prompt_words, 12 * args.prompt_words)
    batches = ("per_device_train_batch_size", "gradient_accumulation_steps", "rollout_batch_size", "max_new_tokens")
    run_script(
        "ppo_training.py", folder, "--model_name_or_path", model, "--dtype", args.dtype, "--train_file_dir", prompts,
        "--template_name", "chatml", "--output_dir", output, *reward_flags(args, model, folder), "--do_train", True,
        "--max_steps", args.steps, "--logging_steps", 1, "--temperature", 1.0, "--completions_steps", 0,
        "--save_strategy", "no", "--report_to", "none", "--gradient_checkpointing", args.gradient_checkpointing,
        *(part for name in batches for part in (f"--{name}", getattr(args, name))), *args.flags.split(),
    )  # fmt: skip
    state = json.loads((output / "trainer_state.json").read_text())
    results = json.loads((output / "train_results.json").read_text())
    steps = [entry for entry in state["log_history"] if "rollout/tokens_per_second" in entry][1:]
    generate_share = fmean(entry["rollout/generate_share"] for entry in steps)
    rollout_share = fmean(entry["rollout/time_share"] for entry in steps)
    return {
        "reward": args.reward,
        "gradient_checkpointing": args.gradient_checkpointing,
        "steps": len(steps),
        "episodes_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps,
        "response_length": round(fmean(entry["objective/response_length"] for entry in steps), 1),
        "rollout_tokens_per_second": round(harmonic_mean(entry["rollout/tokens_per_second"] for entry in steps), 1),
        "update_tokens_per_second": round(harmonic_mean(entry["update/tokens_per_second"] for entry in steps), 1),
        "generate_share": round(generate_share, 3),
        "evaluate_share": round(rollout_share - generate_share, 3),
        "update_share": round(1 - rollout_share, 3),
        "peak_memory_gib": results["peak_memory_gib"],
    }


# ---- generation


def seconds_per_token(actor, tokenizer, length: int, rows: int, use_cache: bool) -> float:
    """Of one row, where every row gets exactly `length` tokens."""
    import torch

    from stagewise.modeling.generation import sampling_config

    config = sampling_config(tokenizer, [tokenizer.eos_token_id], length, temperature=1.0, top_p=1.0)
    config.min_new_tokens, config.use_cache = length, use_cache
    device = actor.value_head.weight.device
    torch.manual_seed(0)
    prompts = torch.randint(len(tokenizer), (rows, PROMPT_TOKENS)).to(device)
    started = time.perf_counter()
    output = actor.generate(prompts, torch.ones_like(prompts), config).cpu()
    seconds = time.perf_counter() - started
    assert output.shape == (rows, length)
    return seconds / output.numel()


def measure_generation(args: argparse.Namespace, model: Path) -> dict:
    import torch

    from stagewise.arguments import LoraArguments, ModelArguments
    from stagewise.modeling.actor_critic import load_actor_critic
    from stagewise.modeling.loading import load_tokenizer

    model_args = ModelArguments(model_name_or_path=str(model), dtype=args.dtype)
    tokenizer = load_tokenizer(model_args)
    actor = load_actor_critic(model_args, LoraArguments(), tokenizer, 1.0).eval()
    actor.to("cuda" if torch.cuda.is_available() else "cpu")
    report: dict = {"rows": args.rows, "prompt_tokens": PROMPT_TOKENS, "lengths": {}}
    for use_cache in (True, False):  # what happens only once is not measured
        seconds_per_token(actor, tokenizer, 4, args.rows, use_cache)
    for length in args.lengths:
        cached = seconds_per_token(actor, tokenizer, length, args.rows, True)
        figures = {"cached_seconds_per_token": float(f"{cached:.3g}")}
        if length in args.uncached_lengths:
            uncached = seconds_per_token(actor, tokenizer, length, args.rows, False)
            figures["uncached_seconds_per_token"] = float(f"{uncached:.3g}")
            figures["uncached_over_cached"] = round(uncached / cached, 2)
        report["lengths"][length] = figures
    return report


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory_only", action="store_true")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of all weights")
    memory = parser.add_argument_group("memory")
    memory.add_argument("--hidden_size", type=int, default=768, help="a multiple of 64")
    memory.add_argument("--num_hidden_layers", type=int, default=12)
    memory.add_argument("--vocab_size", type=int, default=16384)
    small = parser.add_argument_group("throughput and generation")
    small.add_argument("--small_hidden_size", type=int, default=256, help="a multiple of 64")
    small.add_argument("--small_num_hidden_layers", type=int, default=6)
    small.add_argument("--small_vocab_size", type=int, default=4096)
    throughput = parser.add_argument_group("throughput")
    throughput.add_argument("--reward", default="model", choices=["model", "function"])
    throughput.add_argument("--steps", type=int, default=4, help="2 or more; the first one is left out")
    throughput.add_argument("--prompts", type=int, default=64)
    throughput.add_argument("--prompt_words", type=int, default=48, help="of a prompt, about, in the mean")
    throughput.add_argument("--max_new_tokens", type=int, default=128)
    throughput.add_argument("--rollout_batch_size", type=int, default=16)
    throughput.add_argument("--per_device_train_batch_size", type=int, default=8)
    throughput.add_argument("--gradient_accumulation_steps", type=int, default=2)
    throughput.add_argument("--gradient_checkpointing", default="False", choices=["True", "False"])
    throughput.add_argument("--flags", default="", help="more flags of ppo_training.py, such as '--bf16 True'")
    generation = parser.add_argument_group("generation")
    generation.add_argument("--rows", type=int, default=8)
    generation.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
    generation.add_argument(
        "--uncached_lengths", type=int, nargs="*", default=[64, 128],
        help="those of --lengths that are also measured without the cache; the time grows with their square",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error("--steps: the first one is left out; expected 2 or more")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_arguments(argv)

    import torch

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        report: dict = {"device": device, "dtype": args.dtype, "memory": measure_memory(args, folder)}
        if not args.memory_only:
            shape = (args.small_hidden_size, args.small_num_hidden_layers, args.small_vocab_size)
            parameters, model = build_model(folder / "random", *shape), folder / "small_model"
            write_without_stop(folder / "random", model)
            throughput = measure_throughput(args, model, folder)
            report["throughput"] = {"parameters": parameters, **throughput}
            report["generation"] = {"parameters": parameters, **measure_generation(args, model)}
    print(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    main()
