"""Two processes under each engine are one process with the same global batch, and what they save is a whole model.

In float32 and with --bf16, on a vocabulary of 65,536 (the head's loss comes in several chunks) and rows of very
different lengths, some of which train nothing: processes have other numbers of trained tokens in a step, or none.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from stagewise.errors import InputError
from stagewise.run.lineage import check_layout
from tests.stages import losses, weights

ROOT = Path(__file__).resolve().parents[1]
ENGINES = {
    "ddp": (),
    "zero2": ("--deepspeed", "zero2.json"),
    "zero3": ("--deepspeed", "zero3.json"),
    "fsdp": ("--fsdp", "True", "--fsdp_config", "fsdp.json"),
}
SCRIPTS = {"pt": "pretraining", "sft": "supervised_finetuning", "rm": "reward_modeling", "dpo": "dpo_training"}
# What accelerate calls them, and the ZeRO stage.
USED = {"ddp": "MULTI_CPU", "zero2": "DEEPSPEED 2", "zero3": "DEEPSPEED 3", "fsdp": "FSDP"}
RESUMED = ("sft-lora", "sft-full")
CASES = [f"{stage}-{how}" for stage in SCRIPTS for how in ("lora", "full")]


def torchrun(*command: str, launch: tuple[str, ...] = (), env: dict | None = None, timeout: int = 500):
    """Two processes on this machine, a thread for each."""
    flags = ["--standalone", "--nproc_per_node", "2", *launch]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *flags, *command],
        cwd=ROOT, capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})},
    )  # fmt: skip


def check(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-9000:]
    return done


@pytest.fixture(scope="module")
def command(tiny_model_dir, sft_file, preference_file, text_file):
    """(case, output folder, rows of a process's batch) -> arguments of the stage's script."""
    data = {"pt": text_file, "sft": sft_file, "rm": preference_file, "dpo": preference_file}
    shared = ["--do_train", "True", "--max_steps", "4", "--logging_steps", "1", "--learning_rate", "1e-3"]
    shared += ["--save_strategy", "no", "--report_to", "none", "--dataloader_drop_last", "True"]
    own = {
        "pt": ["--block_size", "64", "--max_train_samples", "12"],
        "sft": ["--template_name", "chatml", "--model_max_length", "128"],
        "rm": ["--template_name", "chatml", "--max_length", "128"],
        "dpo": ["--template_name", "chatml", "--max_length", "128"],
    }

    def arguments(case: str, output: Path, rows: int, *flags: str) -> list[str]:
        stage, how = case.split("-")
        adapter = ["--use_peft", "False"] if how == "full" else ["--lora_rank", "4", "--lora_dropout", "0"]
        return [
            "--model_name_or_path", tiny_model_dir, "--train_file_dir", data[stage], "--output_dir", str(output),
            "--validation_file_dir", data[stage], "--per_device_train_batch_size", str(rows), *shared, *own[stage],
            *adapter, *flags,
        ]  # fmt: skip

    return arguments


@pytest.fixture(scope="module")
def one_process(command, tmp_path_factory) -> Path:
    """A folder for each case, trained by one process on batches of 4."""
    import importlib

    folder = tmp_path_factory.mktemp("one")
    for case in CASES:
        importlib.import_module(SCRIPTS[case.split("-")[0]]).main(command(case, folder / case, 4))
    return folder


@pytest.fixture(scope="module")
def ppo_command(tiny_model_dir, tmp_path_factory):
    """(output folder, flags) -> arguments of ppo_training.py, with a reward that counts letters."""
    folder = tmp_path_factory.mktemp("ppo")
    (folder / "rewards.py").write_text(
        "def letters(prompts, answers): return [len(answer) / 10 for answer in answers]"
    )
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"question": f"{i}?"}) + "\n" for i in range(16)))

    def arguments(output: Path, *flags: str) -> list[str]:
        return [
            "--model_name_or_path", tiny_model_dir, "--train_file_dir", str(folder / "prompts.jsonl"),
            "--template_name", "chatml", "--output_dir", str(output), "--do_train", "True", "--save_strategy", "no",
            "--reward_function", f"{folder / 'rewards.py'}:letters", "--max_new_tokens", "4", "--lora_rank", "4",
            "--rollout_batch_size", "4", "--per_device_train_batch_size", "2", "--max_steps", "2",
            "--learning_rate", "1e-3", "--report_to", "none", *flags,
        ]  # fmt: skip

    return arguments


@pytest.fixture(scope="module")
def group(command, ppo_command, tmp_path_factory):
    """(engine) -> a folder with what two processes on batches of 2 made: every case, runs that were resumed, PPO."""

    @functools.cache
    def trained(name: str) -> Path:
        return train_group(name, command, ppo_command, tmp_path_factory.mktemp(name))

    return trained


@pytest.fixture(scope="module", params=ENGINES)
def two_processes(request, group) -> Path:
    return group(request.param)


def train_group(name: str, command, ppo_command, folder: Path) -> Path:
    engine = ENGINES[name]

    def job(case: str, name: str, *flags: str) -> dict:
        return {"script": SCRIPTS[case.split("-")[0]], "argv": command(case, folder / name, 2, *engine, *flags)}

    jobs = [job(case, case) for case in CASES]
    for case in RESUMED:
        jobs += [
            job(case, f"{case}-begun", "--save_strategy", "steps", "--save_steps", "2"),
            job(case, f"{case}-resumed", "--resume_from_checkpoint", str(folder / f"{case}-begun" / "checkpoint-2")),
        ]
    if name == "ddp":  # begun by one process
        import supervised_finetuning

        begun, saved = folder / "alone", ("--save_strategy", "steps", "--save_steps", "2")
        supervised_finetuning.main(command("sft-full", begun, 4, *saved))
        jobs.append(job("sft-full", "joined", "--resume_from_checkpoint", str(begun / "checkpoint-2")))
    if name in ("ddp", "zero2"):
        jobs.append({"script": "ppo_training", "argv": ppo_command(folder / "ppo", *engine)})
        jobs.append({"script": "ppo_training", "argv": ppo_command(folder / "ppo-bf16", *engine, "--bf16", "True")})
    if name.startswith("zero"):
        jobs.append(job("sft-full", "offloaded", "--deepspeed", str(offload_without_compiler(name, folder))))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    env = {"FSDP_ON_CPU": "1"} if name == "fsdp" else {}
    done = check(torchrun("tests/run_in_group.py", str(folder / "jobs.json"), env=env))
    found = re.findall(r"engine of (\w+): (.*)", done.stdout)
    assert found.count(("supervised_finetuning", USED[name])) == 2 * (2 + 2 * len(RESUMED) + (name != "fsdp"))
    assert {engine for _, engine in found} == {USED[name]}
    return folder


def offload_without_compiler(name: str, folder: Path) -> Path:
    """The shipped settings but for DeepSpeed's optimizer, which is compiled for minutes when first used."""
    settings = json.loads((ROOT / f"{name}_offload.json").read_text())
    del settings["optimizer"]
    settings["zero_force_ds_cpu_optimizer"] = False
    (folder / "offload.json").write_text(json.dumps(settings))
    return folder / "offload.json"


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(case, one_process, two_processes):
    one, two = losses(one_process / case), losses(two_processes / case)
    assert len(one) == 4
    assert one == pytest.approx(two, rel=1e-4)
    first, second = weights(one_process / case), weights(two_processes / case)
    if second.keys() - first.keys() == {"lm_head.weight"}:  # DeepSpeed's copy is not seen to be the embedding
        assert torch.equal(second.pop("lm_head.weight"), second["model.embed_tokens.weight"])
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_saved_model_is_whole(case, two_processes, tiny_model_dir):
    """Plain from_pretrained and peft find every tensor in it."""
    stage, how = case.split("-")
    auto = AutoModelForSequenceClassification if stage == "rm" else AutoModelForCausalLM
    extra = {"num_labels": 1} if stage == "rm" else {}
    if how == "full":
        _, info = auto.from_pretrained(two_processes / case, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
    else:
        base = auto.from_pretrained(tiny_model_dir, **extra)
        PeftModel.from_pretrained(base, two_processes / case)
    assert all(tensor.numel() and torch.isfinite(tensor).all() for tensor in weights(two_processes / case).values())


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_offloading_changes_nothing(engine, group, one_process):
    run = group(engine) / "offloaded"
    assert losses(one_process / "sft-full") == pytest.approx(losses(run), rel=1e-4)
    first, second = weights(one_process / "sft-full"), weights(run)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_is_an_uninterrupted_one(case, two_processes):
    whole, resumed = losses(two_processes / f"{case}-begun"), losses(two_processes / f"{case}-resumed")
    assert whole == resumed
    first, second = weights(two_processes / f"{case}-begun"), weights(two_processes / f"{case}-resumed")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gone_on_with_by_another_number_of_processes(group, one_process, command, tmp_path, capfd):
    """Without dropout the same steps up to rounding, and the log says what is not the same."""
    import supervised_finetuning

    left = tmp_path / "left"
    checkpoint = group("ddp") / "sft-full-begun" / "checkpoint-2"
    supervised_finetuning.main(command("sft-full", left, 4, "--resume_from_checkpoint", str(checkpoint)))
    assert "begun by 2 processes, gone on by 1" in capfd.readouterr().out
    for run in (left, group("ddp") / "joined"):
        assert losses(run) == pytest.approx(losses(one_process / "sft-full"), rel=1e-4)
        for name, tensor in weights(one_process / "sft-full").items():
            torch.testing.assert_close(weights(run)[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("engine", "rows", "deepspeed", "refused"),
    [
        ("zero2", 4, "zero2.json", "DeepSpeed cut it for 2 processes, and there are 1"),
        ("zero2", 4, None, "was written by zero2, and plain cannot read its optimizer"),
        ("ddp", 4, "zero2.json", "was written by plain, and zero2 cannot read its optimizer"),
        ("ddp", 2, None, "took 4 rows each, and these would take 2 .*; pass --gradient_accumulation_steps 2"),
        ("ddp", 3, None, "took 4 rows each, and these would take 3 .*; pass 4 rows a step again"),
    ],
)
def test_what_is_not_gone_on_with(engine, rows, deepspeed, refused, group):
    checkpoint = str(group(engine) / "sft-full-begun" / "checkpoint-2")
    args = SimpleNamespace(
        per_device_train_batch_size=rows, gradient_accumulation_steps=1, world_size=1, deepspeed=deepspeed, fsdp=False,
        bf16=False, fp16=False,
    )  # fmt: skip
    with pytest.raises(InputError, match=refused):
        check_layout(checkpoint, args)


def test_ppo_under_zero2_is_ppo_under_ddp(group):
    """Each process samples answers of its own, the same ones under both."""
    figures = ("loss", "objective/scores", "objective/kl", "policy/loss", "value/loss")
    runs = [
        [{name: entry[name] for name in figures} for entry in log_history(group(engine) / "ppo") if "loss" in entry]
        for engine in ("ddp", "zero2")
    ]
    assert len(runs[0]) == 2
    for plain, sped in zip(*runs, strict=True):
        assert plain == pytest.approx(sped, rel=1e-4, abs=1e-6)
    first, second = (weights(group(engine) / "ppo") for engine in ("ddp", "zero2"))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_ppo_in_bf16_is_near_ppo_in_float32(engine, group, ppo_command, tmp_path):
    """Near: other answers are sampled where two tokens are almost as likely. A process alone samples others anyway."""
    import ppo_training

    ppo_training.main(ppo_command(tmp_path, "--per_device_train_batch_size", "4"))
    exact = [entry for entry in log_history(tmp_path) if "objective/entropy" in entry]
    found = [entry for entry in log_history(group(engine) / "ppo-bf16") if "objective/entropy" in entry]
    assert len(found) == len(exact) == 2
    for one, other in zip(found, exact, strict=True):
        assert one["objective/entropy"] == pytest.approx(other["objective/entropy"], rel=0.03)
        assert abs(one["objective/kl"] - other["objective/kl"]) < 0.1
        assert one["objective/response_length"] == pytest.approx(other["objective/response_length"], rel=0.1)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_a_checkpoint_becomes_a_plain_model_by_one_command(engine, group, tmp_path):
    run = group(engine) / "sft-full-begun"
    checkpoint = run / "checkpoint-4"
    command = f"python {checkpoint}/zero_to_fp32.py {checkpoint} {tmp_path} && cp {checkpoint}/*.json {tmp_path}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    found, saved = model.state_dict(), AutoModelForCausalLM.from_pretrained(run).state_dict()
    assert all(torch.equal(found[name], saved[name]) for name in saved)


def log_history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]
