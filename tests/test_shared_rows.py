"""Two processes that share each row are one process: losses, evaluation and weights, under every engine."""

import functools
import importlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tests.stages import losses, weights
from tests.test_distributed import ENGINES, SCRIPTS, USED, check, torchrun

SHARED = ("--parallelism_config", '{"sp_size": 2}')
CASES = ("sft-lora", "sft-full", "packed-lora", "packed-full", "pt-full")
CHOSEN = {
    "ddp": ("sft-lora", "packed-full"),
    "zero2": ("sft-full", "packed-lora"),
    "zero3": ("sft-lora", "sft-full", "packed-full", "pt-full"),
    "fsdp": ("sft-full", "packed-lora"),
}
# What changes no figure, and enters the attention of a row twice.
CHECKPOINTING = ("--gradient_checkpointing", "True")


@pytest.fixture(scope="module")
def command(tiny_model_dir, tmp_path_factory):
    """(case, output folder, flags) -> a job for run_in_group.py: rows of 20 and 300 tokens, in batches of three, the
    last of an epoch smaller; a step is two of them."""
    folder = tmp_path_factory.mktemp("rows")
    answers = ["heart " * (150 if row % 3 == 1 else 5 + row) for row in range(14)]
    turns = [[{"from": "human", "value": "Go. " * 9}, {"from": "gpt", "value": answer}] for answer in answers]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"conversations": each}) + "\n" for each in turns))
    make_models(tiny_model_dir, folder)
    (folder / "corpus.txt").write_text("\n\n".join(answers))
    chat = ["--template_name", "chatml", "--model_max_length", "512"]
    own = {
        "sft": ["--train_file_dir", str(folder / "rows.jsonl"), *chat],
        "packed": ["--train_file_dir", str(folder / "rows.jsonl"), *chat, "--packing", "True"],
        "pt": ["--train_file_dir", str(folder / "corpus.txt"), "--block_size", "101"],
    }

    def job(case: str, output: Path, *flags: str) -> dict:
        stage, how = case.split("-")
        adapter = ["--use_peft", "False"] if how == "full" else ["--lora_rank", "4", "--lora_dropout", "0"]
        argv = [
            "--model_name_or_path", str(folder / ("windows" if stage == "packed" else "plain")),
            "--do_train", "True", "--do_eval", "True", "--output_dir", str(output), "--max_steps", "4",
            "--logging_steps", "1", "--learning_rate", "1e-3", "--report_to", "none", "--save_strategy", "no",
            "--plot_loss", "False", "--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "2",
            "--per_device_eval_batch_size", "2", "--validation_file_dir", own[stage][1], *own[stage], *adapter, *flags,
        ]  # fmt: skip
        return {"script": SCRIPTS["sft" if stage == "packed" else stage], "argv": argv}

    return job


def make_models(tiny: str, folder: Path) -> None:
    """A Llama whose pairs of heads share a key head, and a Mistral with windows and a key head for all."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 1024, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    models = {
        "plain": LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes)),
        "windows": MistralForCausalLM(MistralConfig(num_key_value_heads=1, sliding_window=24, **sizes)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for case in CASES:
        job = command(case, folder / case)
        importlib.import_module(job["script"]).main(job["argv"])
    return folder


@pytest.fixture(scope="module")
def shared(command, tmp_path_factory):
    """(engine) -> a folder with what two processes made of its cases, and what they printed."""

    @functools.cache
    def trained(engines: tuple[str, ...]) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp("shared")
        jobs = [
            command(case, folder / engine / case, *SHARED, *ENGINES[engine], *CHECKPOINTING)
            for engine in engines
            for case in CHOSEN[engine]
        ]
        (folder / "jobs.json").write_text(json.dumps(jobs))
        env = {"FSDP_ON_CPU": "1"} if engines == ("fsdp",) else {}
        return folder, check(torchrun("tests/run_in_group.py", str(folder / "jobs.json"), env=env)).stdout

    return lambda engine: trained(("fsdp",) if engine == "fsdp" else ("zero3", "zero2", "ddp"))


@pytest.mark.parametrize(("engine", "case"), [(engine, case) for engine in CHOSEN for case in CHOSEN[engine]])
def test_two_processes_that_share_rows_are_one(engine, case, alone, shared):
    folder, printed = shared(engine)
    one, two = alone / case, folder / engine / case
    assert f"engine of {SCRIPTS['sft']}: {USED[engine]}" in printed
    assert len(losses(one)) == 4
    same_figures(one, two)


def same_figures(one: Path, two: Path) -> None:
    """Losses, evaluations and weights; and what was counted: tokens, epochs."""
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    figures = [json.loads((each / "all_results.json").read_text()) for each in (one, two)]
    assert figures[1]["eval_loss"] == pytest.approx(figures[0]["eval_loss"], rel=1e-4)
    for name in ("eval_tokens", "epoch"):
        assert figures[1][name] == figures[0][name]
    states = [json.loads((each / "trainer_state.json").read_text()) for each in (one, two)]
    seen, wanted = ([log.get("num_tokens") for log in state["log_history"]] for state in states)
    assert seen == wanted
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-4, atol=1e-4)


def test_two_pairs_of_processes_have_rows_of_their_own(command, tmp_path):
    """Four processes, two to a row, are one with twice the batches."""
    less = ("--max_train_samples", "12")  # epochs of whole batches
    job = command("sft-full", tmp_path / "one", *less)
    importlib.import_module(job["script"]).main(job["argv"])
    four = command("sft-full", tmp_path / "four", *less, *SHARED, "--gradient_accumulation_steps", "1")
    check(torchrun(f"{four['script']}.py", *four["argv"], launch=("--nproc_per_node", "4")))
    same_figures(tmp_path / "one", tmp_path / "four")
