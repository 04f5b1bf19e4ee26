"""Two processes that share each row are one process: losses, evaluation and weights, under every engine.

DDP is that of the four processes.
"""

import functools
import importlib
import json
import os
import shlex
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
)

from stagewise.arguments import ModelArguments, StageTrainingArguments
from stagewise.errors import InputError
from stagewise.modeling.sequence_parallel import RowShards, check_shards
from tests.stages import losses, weights
from tests.test_distributed import ENGINES, SCRIPTS, USED, check, torchrun

SHARED = ("--parallelism_config", '{"sp_size": 2}')
CASES = ("sft-lora", "sft-full", "packed-lora", "packed-full", "pt-full")
CHOSEN = {
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

    return lambda engine: trained(("fsdp",) if engine == "fsdp" else ("zero3", "zero2"))


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


# What was never shown right, or is wrong, where processes share rows: what engines and the Trainer would do with it,
# and what other groups of flags say.
EARLY = [
    ("--neftune_noise_alpha 5", "--neftune_noise_alpha", "leave it out"),
    ("--torch_compile True", "--torch_compile", "leave it out"),
    ("--use_liger_kernel True", "--use_liger_kernel", "leave it out"),
    ("--average_tokens_across_devices False", "--average_tokens_across_devices", "leave it out"),
    ("--train_sampling_strategy batch_rebalance", "batch_rebalance", "group_by_length"),
    ("""--accelerator_config '{"split_batches": true}'""", "split_batches", "leave that out"),
    ("""--accelerator_config '{"dispatch_batches": true}'""", "dispatch_batches", "leave that out"),
]
LATE = [
    ("reward_modeling", "", "reward_modeling.py", "supervised_finetuning.py"),
    ("dpo_training", "", "dpo_training.py", "supervised_finetuning.py"),
    ("ppo_training", "--reward_function r.py:r", "ppo_training.py", "supervised_finetuning.py"),
    ("pretraining", "--streaming True --max_steps 3", "--streaming", "leave one of them out"),
    ("supervised_finetuning", "--weighted_loss_mode case2", "--weighted_loss_mode", "case1"),
    ("supervised_finetuning", "--loss_scope micro", "--loss_scope", "global"),
]


def refusal(script: str, flags: str, output: Path) -> str:
    argv = ["--model_name_or_path", "m", "--train_file_dir", "d", "--output_dir", str(output), *SHARED]
    with pytest.raises(InputError) as caught:
        importlib.import_module(script).main([*argv, *shlex.split(flags)])
    assert not output.exists()
    return str(caught.value)


@pytest.mark.parametrize(("flags", "found", "remedy"), EARLY)
def test_settings_that_take_a_part_for_the_row_are_refused(flags, found, remedy, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("stagewise.distributed._meet_anew", lambda args: pytest.fail("let through"))
    message = refusal("supervised_finetuning", flags, tmp_path / "out")
    assert message.startswith("--parallelism_config: ")
    assert found in message
    assert remedy in message


@pytest.mark.parametrize(("script", "flags", "found", "remedy"), LATE)
def test_stages_and_data_that_share_no_rows_are_refused(script, flags, found, remedy, monkeypatch, tmp_path):
    def two(args) -> int:
        args.parallelism_config = None
        return 2

    monkeypatch.setattr("stagewise.distributed._settle_rows", two)  # without a second process
    message = refusal(script, flags, tmp_path / "out")
    assert "--parallelism_config" in message
    assert found in message
    assert remedy in message


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
MODELS = {
    "heads": (LlamaConfig(**SIZES), 3, {}, "4 attention heads", "one of 2, 4"),
    "kernel": (LlamaConfig(**SIZES, attn_implementation="eager"), 2, {}, "kernel eager", "sdpa"),
    "rope": (LlamaConfig(**SIZES, rope_parameters=DYNAMIC), 2, {}, "RoPE dynamic", "--rope_scaling yarn"),
    "S2-Attn": (LlamaConfig(**SIZES), 2, {"shift_attn": True}, "--shift_attn", "one of the two"),
    "no interface": (BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4), 2, {}, "Bloom", "leave it out"),
    "experts": (MixtralConfig(**SIZES, output_router_logits=True), 2, {}, "experts", "--router_aux_loss_coef 0"),
    "no attention": (Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]), 2, {}, "conv", "leave it out"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_whose_rows_cannot_be_shared_are_refused(name):
    config, size, flags, found, remedy = MODELS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError) as caught:
        check_shards(model, size, ModelArguments(model_name_or_path="m", **flags))
    message = str(caught.value)
    assert message.startswith("--parallelism_config: ")
    assert found in message
    assert remedy in message


def test_accelerate_launch_says_it_by_variables(monkeypatch):
    """As accelerate launch passes a YAML's parallelism_config; accelerate itself must not read them afterwards."""
    from stagewise.distributed import _settle_rows

    said = {"USE_PARALLELISM_CONFIG": "true", "DP_SHARD_SIZE": "2", "SP_SIZE": "2", "CP_SIZE": "1", "TP_SIZE": "1"}
    for name, value in said.items():
        monkeypatch.setenv(f"{'ACCELERATE' if name.startswith('USE') else 'PARALLELISM_CONFIG'}_{name}", value)
    monkeypatch.setenv("WORLD_SIZE", "4")
    args = StageTrainingArguments.__new__(StageTrainingArguments)
    vars(args).update(
        parallelism_config=None, accelerator_config=None, neftune_noise_alpha=None, torch_compile=False,
        use_liger_kernel=False, average_tokens_across_devices=True, train_sampling_strategy="random",
    )  # fmt: skip
    assert _settle_rows(args) == 2
    assert os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] == "false"


@pytest.mark.parametrize("positions", [None, [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]])
def test_parts_laid_end_to_end_are_the_rows(positions, monkeypatch):
    """Five tokens on two processes: three each, the last of them padding, which is a document of its own."""
    batch = {"input_ids": torch.arange(10).reshape(2, 5), "other": 1}
    batch |= {"attention_mask": torch.ones(2, 5)} if positions is None else {"position_ids": torch.tensor(positions)}
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 2)
        monkeypatch.setattr("torch.distributed.get_rank", lambda group, rank=rank: rank)
        shards = RowShards(None)
        parts.append(shards.cut(batch, batch["input_ids"] + 1, -100))
        starts = shards.layout(None).starts
        expected = None if positions is None else [[1, 0, 0, 1, 0, 1], [1, 0, 0, 0, 0, 1]]
        assert (starts if starts is None else starts.int().tolist()) == expected
        assert "attention_mask" not in parts[-1][0]
    whole = {name: torch.cat([part[0][name] for part in parts], 1).tolist() for name in ("input_ids", "position_ids")}
    assert whole["input_ids"] == [[0, 1, 2, 3, 4, 0], [5, 6, 7, 8, 9, 0]]
    assert [row[:5] for row in whole["position_ids"]] == (positions or [[0, 1, 2, 3, 4]] * 2)
    assert torch.cat([part[1] for part in parts], 1).tolist() == [[1, 2, 3, 4, 5, -100], [6, 7, 8, 9, 10, -100]]
