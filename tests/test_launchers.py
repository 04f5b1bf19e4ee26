"""The ways to start several processes: deepspeed, accelerate launch, run_*.sh on two nodes; a process that dies."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from stagewise.arguments import StageTrainingArguments
from stagewise.distributed import _meet_anew
from stagewise.errors import InputError
from stagewise.modeling.loading import prepare_scoring
from stagewise.run.checkpoints import check_saved, was_restarted
from tests.architectures import tiny_config
from tests.endings import free_port
from tests.stages import losses, weights

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def start(*command: str, **env: str) -> subprocess.Popen:
    environment = {
        **os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env,
    }  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def output(process: subprocess.Popen, timeout: int = 300) -> str:
    text, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, text[-4000:]
    return text


@pytest.fixture(scope="module")
def flags(tiny_model_dir, sft_file):
    """(output folder, rows of a process's batch) -> arguments of supervised_finetuning.py."""

    def arguments(folder: Path, rows: int, steps: int = 3) -> list[str]:
        return [
            "--model_name_or_path", tiny_model_dir, "--train_file_dir", sft_file, "--validation_file_dir", sft_file,
            "--template_name", "chatml", "--model_max_length", "128", "--output_dir", str(folder), "--lora_dropout",
            "0", "--do_train", "True", "--max_steps", str(steps), "--logging_steps", "1", "--learning_rate", "1e-3",
            "--save_strategy", "no", "--report_to", "none", "--per_device_train_batch_size", str(rows),
        ]  # fmt: skip

    return arguments


@pytest.fixture(scope="module")
def one_process(flags, tmp_path_factory) -> Path:
    import supervised_finetuning

    folder = tmp_path_factory.mktemp("one") / "out"
    supervised_finetuning.main(flags(folder, 4))
    return folder


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == pytest.approx(losses(other), rel=1e-4)
    first, second = weights(one), weights(other)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-4)


def test_the_deepspeed_launcher(flags, one_process, tmp_path):
    """As the tutorials of 2023 start it; it puts --local_rank in front of the flags."""
    command = ("deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "supervised_finetuning.py")
    text = output(start(*command, *flags(tmp_path / "two", 2), "--deepspeed", "zero2.json"))
    assert "--local_rank=1" in text
    assert_same_run(one_process, tmp_path / "two")


def test_plain_python_under_deepspeed(flags, one_process, tmp_path):
    output(start("python", "supervised_finetuning.py", *flags(tmp_path / "sped", 4), "--deepspeed", "zero3.json"))
    assert_same_run(one_process, tmp_path / "sped")


def test_accelerate_launch_with_deepspeed(flags, one_process, tmp_path):
    command = (
        "accelerate",
        "launch",
        "--config_file",
        "accelerate_deepspeed.yaml",
        "--main_process_port",
        str(free_port()),
    )
    output(start(*command, "supervised_finetuning.py", *flags(tmp_path / "two", 2)))
    assert_same_run(one_process, tmp_path / "two")


def test_accelerate_launch_with_fsdp(flags, one_process, tmp_path):
    """With what its YAML says, all but the machine: accelerate's own FSDP is for accelerators, see run_in_group."""
    job = {"script": "supervised_finetuning", "argv": flags(tmp_path / "two", 2)}
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    command = (
        "accelerate",
        "launch",
        "--config_file",
        "accelerate_fsdp.yaml",
        "--main_process_port",
        str(free_port()),
    )
    text = output(start(*command, "tests/run_in_group.py", str(tmp_path / "jobs.json"), FSDP_ON_CPU="1"))
    assert "engine of supervised_finetuning: FSDP" in text
    assert_same_run(one_process, tmp_path / "two")


def shell(flags: list[str], **env: str) -> subprocess.Popen:
    """run_sft.sh with its presets overridden."""
    plain = ["--packing", "False", "--lora_alpha", "32", "--warmup_steps", "0", "--lr_scheduler_type", "linear"]
    plain += ["--gradient_accumulation_steps", "1", "--eval_strategy", "no", "--gradient_checkpointing", "False"]
    values = dict(zip(flags[::2], flags[1::2], strict=True))
    found = {"MODEL": values["--model_name_or_path"], "TRAIN": values["--train_file_dir"], "TEMPLATE": "chatml"}
    return start("bash", "run_sft.sh", *flags, *plain, **found, **env)


def test_two_nodes_train_together(flags, one_process, tmp_path):
    """Two torchrun groups that meet at the loopback address."""
    node = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    nodes = [
        shell(flags(tmp_path / "two", 2), NODE_RANK=str(rank), GLOO_SOCKET_IFNAME="lo", **node) for rank in range(2)
    ]
    for process in nodes:
        output(process)
    assert_same_run(one_process, tmp_path / "two")


def test_a_killed_process_costs_nothing_but_time(flags, tmp_path):
    """One of two is killed after the second checkpoint; the run ends by itself where an undisturbed one does."""
    saved = ["--save_strategy", "steps", "--save_steps", "4", "--ddp_timeout", "60"]
    group = {"NPROC_PER_NODE": "2", "MAX_RESTARTS": "1"}
    whole = shell([*flags(tmp_path / "whole", 2, 24), *saved], **group)  # at once, and neither is told a port
    killed = tmp_path / "killed"
    run = shell([*flags(killed, 2, 24), *saved], **group)
    text = kill_second(killed / "checkpoint-8" / "trainer_state.json", run)
    assert run.returncode == 0, text[-4000:]
    output(whole)
    assert "restarted after a process died: going on from" in text
    assert len(losses(killed)) == 24
    assert losses(tmp_path / "whole") == losses(killed)
    first, other = weights(tmp_path / "whole"), weights(killed)
    assert all(torch.equal(first[name], other[name]) for name in first)


# What SLURM says to the second of two nodes with four GPUs each.
SLURM = {
    "SLURM_JOB_ID": "1234567", "SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2", "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "node[01-04,07],gpu1", "SLURM_GPUS_ON_NODE": "4", "SLURM_LOCALID": "0",
}  # fmt: skip
ON_ONE = {**SLURM, "SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"NPROC_PER_NODE": "2"}, "--nproc_per_node 2 --standalone --local_addr 127.0.0.1 "),
        (
            {"NPROC_PER_NODE": "2", "MASTER_PORT": "29555"},
            "--nproc_per_node 2 --nnodes 1 --node_rank 0 --master_addr 127.0.0.1 --master_port 29555 ",
        ),
        # 10000 + 1234567 mod 20000
        (SLURM, "--nproc_per_node 4 --nnodes 2 --node_rank 1 --master_addr node01 --master_port 24567 "),
        (
            {**SLURM, "SCONTROL": "first-host"},
            "--nproc_per_node 4 --nnodes 2 --node_rank 1 --master_addr first-host --master_port 24567 ",
        ),
        (
            {**SLURM, "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NODELIST": "rack2-n[7,9-10]"},  # srun on some of them
            "--nproc_per_node 4 --nnodes 3 --node_rank 1 --master_addr rack2-n7 --master_port 24567 ",
        ),
        (
            {
                **SLURM,
                "NNODES": "4",
                "NODE_RANK": "3",
                "MASTER_ADDR": "here",
                "MASTER_PORT": "1",
                "NPROC_PER_NODE": "8",
            },
            "--nproc_per_node 8 --nnodes 4 --node_rank 3 --master_addr here --master_port 1 ",
        ),
        ({"NPROC_PER_NODE": "auto"}, "--nproc_per_node auto --standalone --local_addr 127.0.0.1 "),
        (ON_ONE, "--nproc_per_node 4 --standalone --local_addr 127.0.0.1 "),
        ({**ON_ONE, "SLURM_GPUS_ON_NODE": "0", "MAX_RESTARTS": "1"}, "--nproc_per_node 1 --standalone "),
    ],
)
def test_what_the_launcher_is_told(told, expected, tmp_path):
    done = pretended_launch(tmp_path, **told)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"torchrun {expected}"), done.stdout
    assert "supervised_finetuning.py --model_name_or_path somewhere" in done.stdout


def test_several_tasks_on_a_node(tmp_path):
    for told in ({}, {"NNODES": "1"}):
        done = pretended_launch(tmp_path, **{**SLURM, "SLURM_LOCALID": "1"}, **told)
        assert done.returncode == 2
        assert "pass --ntasks-per-node 1 to srun" in done.stderr


def test_a_number_of_processes_that_is_none(tmp_path):
    done = pretended_launch(tmp_path, NPROC_PER_NODE="two")
    assert (done.returncode, done.stdout) == (2, "")
    assert "NPROC_PER_NODE: found 'two', expected 1 or more, or auto" in done.stderr


def pretended_launch(folder: Path, **env: str) -> subprocess.CompletedProcess:
    """run_sft.sh with a torchrun that says how it was called, and a scontrol that knows $SCONTROL."""
    programs = {"torchrun": 'echo torchrun "$@"'}
    if "SCONTROL" in env:
        programs["scontrol"] = (
            f'[ "$*" = "show hostnames {env["SLURM_JOB_NODELIST"]}" ] && echo $SCONTROL && echo other'
        )
    for name, does in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "MASTER_", "NPROC_")) and name not in ("NNODES", "NODE_RANK", "MAX_RESTARTS")
    }
    path = os.pathsep.join([str(folder), str(BIN), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "run_sft.sh"], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={**inherited, "VIRTUAL_ENV": sys.prefix, "PATH": path, "MODEL": "somewhere", **env},
    )  # fmt: skip


def kill_second(after: Path, run: subprocess.Popen) -> str:
    """SIGKILL for the second process of the group once the file is there; all that the group said until its end."""
    wait_for(after, run)
    second = next(
        process
        for process in psutil.Process(run.pid).children(recursive=True)
        if process.environ().get("RANK") == "1" and process.environ().get("LOCAL_RANK") == "1"
    )
    second.send_signal(signal.SIGKILL)
    text, _ = run.communicate(timeout=200)
    return text


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def test_one_process_of_a_machine_prepares_the_data(flags, tmp_path):
    """With an empty cache each row is tokenized, and each packed row put together, once."""
    command = [*flags(tmp_path / "out", 2, 1), "--packing", "True", "--do_eval", "False"]
    launch = (str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "benchmarks/processes.py")
    text = output(start(*launch, "--child", *command, HF_DATASETS_CACHE=str(tmp_path / "cache")))
    prepared = {found["rank"]: found for found in map(json.loads, re.findall(r'^{"rank".*}$', text, re.M))}
    assert prepared[1] == {"rank": 1, "tokenized": 0, "packed": 0}
    assert prepared[0]["tokenized"] == prepared[0]["packed"] == 24


# supervised_finetuning.py that writes down what each of its processes trains on, batch by batch.
RECORDED = """
import json, os, sys
from pathlib import Path
from stagewise.run.exit_codes import run_script
from tests.test_launchers import recorded_run

def main():
    argv = sys.argv[1:]
    seen = recorded_run(argv)
    folder = Path(argv[argv.index("--output_dir") + 1])
    (folder / ("seen%s.json" % os.environ["RANK"])).write_text(json.dumps(seen))

run_script(main)
"""


def recorded_run(argv: list[str]) -> list[list]:
    """The rows of each batch that this process trains on."""
    import supervised_finetuning
    from stagewise.data.collators import CausalLMCollator

    collate, seen = CausalLMCollator.__call__, []

    def recorded(self, rows):
        seen.append([row["input_ids"] for row in rows])
        return collate(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalLMCollator, "__call__", recorded)
        supervised_finetuning.main(argv)
    return seen


def test_every_row_once_an_epoch_in_one_order(flags, sft_file, tmp_path):
    """On one process and on two, of two interleaved data sets; a resumed run goes on with the next row."""
    (tmp_path / "run.py").write_text(RECORDED)
    lines = Path(sft_file).read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("a", lines[:16]), ("b", lines[16:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")

    def command(name: str, rows: int, *more: str) -> list[str]:
        return [
            *flags(tmp_path / name, rows, -1), "--train_file_dir", f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl",
            "--mix_strategy", "interleave_over", "--do_eval", "False", "--num_train_epochs", "2", "--data_seed", "7",
            *more,
        ]  # fmt: skip

    one = recorded_run(command("one", 4, "--save_strategy", "steps", "--save_steps", "3"))
    rows = [tuple(row) for batch in one for row in batch]
    assert len(one) == 2 * 8  # b's 8 rows come twice beside a's 16, so that an epoch has 32
    first, second = rows[:32], rows[32:]
    assert sorted(first) == sorted(second)
    assert first != second
    assert len(set(first)) == 24
    for step in (3, 12):  # in the first and in the second epoch
        checkpoint = str(tmp_path / "one" / f"checkpoint-{step}")
        assert recorded_run(command(f"from{step}", 4, "--resume_from_checkpoint", checkpoint)) == one[step:]
    torchrun = (str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", str(tmp_path / "run.py"))
    output(start(*torchrun, *command("two", 2)))
    ranks = [json.loads((tmp_path / "two" / f"seen{rank}.json").read_text()) for rank in range(2)]
    assert [sum(batches, []) for batches in zip(*ranks, strict=True)] == one


# --- what cannot be honoured -----------------------------------------------------------------------------------------


def refusal(**settings: object) -> str:
    with pytest.raises(InputError) as caught:
        StageTrainingArguments(output_dir="never-written", use_cpu=True, **settings)
    return str(caught.value)


def test_settings_that_cannot_be_honoured(tmp_path, monkeypatch):
    assert "--fsdp: the run is on CPU" in refusal(fsdp="True")
    assert "give one of them" in refusal(fsdp="True", deepspeed="zero2.json")
    assert "has no meaning without --fsdp" in refusal(fsdp_config="fsdp.json")
    assert "none.json: cannot be read" in refusal(deepspeed=str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{")
    assert "bad.json: not valid JSON" in refusal(deepspeed=str(tmp_path / "bad.json"))
    settings = json.loads((ROOT / "zero3.json").read_text())
    settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False
    (tmp_path / "ungathered.json").write_text(json.dumps(settings))
    assert "writes no model at all" in refusal(deepspeed=str(tmp_path / "ungathered.json"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "--fsdp: the run is on CPU" in refusal()
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert "without a file of its settings" in refusal()
    assert not Path("never-written").exists()


def test_several_gpus_and_one_plain_process(monkeypatch):
    """transformers would wrap the model in nn.DataParallel; here the torchrun line is printed."""
    from stagewise.run.lifecycle import start_run

    args = SimpleNamespace(seed=1, n_gpu=4, output_dir="never-written", precision_note=None)
    with pytest.raises(InputError, match="torchrun --nproc_per_node 4"):
        start_run(args, SimpleNamespace())


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_shipped_settings_are_auto_where_flags_say_it(name):
    """So that no flag and file can contradict each other."""
    settings = json.loads((ROOT / f"{name}.json").read_text())
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert settings[key] == "auto"
    assert settings["fp16"]["enabled"] == settings["bf16"]["enabled"] == settings["gradient_clipping"] == "auto"
    zero = settings["zero_optimization"]
    assert zero["stage"] == int(name[4])
    assert zero.get("stage3_gather_16bit_weights_on_model_save", zero["stage"] < 3)
    assert ("offload_optimizer" in zero) == name.endswith("offload")


def test_a_folder_of_another_run_is_not_gone_on_with(tmp_path, monkeypatch):
    """A bad flag ends all processes too, and torchrun starts them again; the folder is then nobody's of this group."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not was_restarted(tmp_path)
    config = tmp_path / "run_config.yaml"
    config.write_text("{}")
    assert was_restarted(tmp_path)
    before = psutil.Process(os.getppid()).create_time() - 60
    os.utime(config, (before, before))
    assert not was_restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    os.utime(config)
    assert not was_restarted(tmp_path)


def test_a_restarted_group_does_not_look_where_the_dead_one_left_its_addresses(monkeypatch):
    """What it says and asks for lies beside the rest of torchrun's store."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent.set("address", "of a process that has died")
    values = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": agent.port}
    values |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    asked = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: asked.update(how, backend=backend))
    args = SimpleNamespace(use_cpu=True, ddp_backend=None, ddp_timeout=60)
    _meet_anew(args)
    assert (asked["backend"], asked["rank"], asked["world_size"]) == ("gloo", 1, 2)
    assert not asked["store"].check(["address"])
    asked["store"].set("address", "new")
    assert agent.get("address") == b"of a process that has died"
    asked.clear()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")  # the first start is torch's own business
    _meet_anew(args)
    assert not asked


def test_a_model_without_values_is_found_out(tmp_path):
    with pytest.raises(RuntimeError, match="no weights were written"):
        check_saved(tmp_path)
    save_file({"a": torch.ones(2), "b": torch.empty(0)}, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="without values: b"):
        check_saved(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    check_saved(tmp_path)


def test_a_score_head_in_16_bits_needs_master_weights_under_zero3(tokenizer):
    config = tiny_config("llama", num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    model.score.weight.ds_id = 1  # what ZeRO-3 puts on its parameters
    with pytest.raises(InputError, match="add --bf16 True"):
        prepare_scoring(model, tokenizer)
