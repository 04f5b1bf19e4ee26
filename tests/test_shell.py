"""The outside: run_*.sh, the pipeline in miniature, every command of the README, the command lines of 2023."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stages import losses, weights

ROOT = Path(__file__).resolve().parents[1]
KEPT = ("*.py", "*.sh", "*.txt", "*.md", "*.json", "*.yaml", "pyproject.toml")


def run(command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """bash -c `command` in `cwd` with this interpreter first on the PATH."""
    environment = {
        **os.environ,
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HOME": str(cwd / ".cache"),
        **env,
    }
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail\n{command}"],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def check(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A copy of the repository in which the pipeline ran with a few steps for each stage."""
    folder = tmp_path_factory.mktemp("clone") / "stagewise"
    folder.mkdir()
    for pattern in KEPT:
        for path in ROOT.glob(pattern):
            shutil.copy(path, folder)
    for name in ("stagewise", "examples", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    check(
        run(
            "python examples/build_tiny_model.py --hidden_size 64 --num_hidden_layers 2 && bash run_pipeline.sh",
            folder,
            PT_FLAGS="--max_steps 3 --eval_strategy no",
            SFT_FLAGS="--max_steps 3 --eval_strategy no",
            RM_FLAGS="--max_steps 2 --eval_strategy no",
            PPO_FLAGS="--max_steps 1 --gradient_accumulation_steps 1 --max_new_tokens 16",
            DPO_FLAGS="--max_steps 2 --eval_strategy no",
        )
    )
    return folder


def test_the_pipeline_leaves_its_report(workspace):
    root = workspace / "outputs" / "pipeline"
    report = json.loads((root / "report.json").read_text())
    before, after = report["pt"]["eval_perplexity"]
    assert after < before
    assert {"eval_accuracy", "eval_margin", "seconds"} <= report["rm"].keys()
    assert report["dpo"]["eval_rewards/margins"][0] == 0.0
    assert report["ppo"]["eval_kl"][0] == pytest.approx(0.0, abs=1e-4)
    assert (root / "ppo" / "ppo.png").stat().st_size > 5000
    for stage in ("sft", "rm", "ppo", "dpo"):
        assert (root / f"{stage}-merged" / "merge_report.json").is_file()
    assert (root / "pt" / "training_loss.png").stat().st_size > 5000


def pretend(folder: Path, commands: dict[str, str]) -> None:
    """`folder` with run_sft.sh, and commands in its bin that stand in for others."""
    for name in ("run_common.sh", "run_sft.sh"):
        shutil.copy(ROOT / name, folder)
    (folder / "setup_environment.sh").write_text('install_requirements() { echo "install $1"; }\n')
    (folder / "bin").mkdir()
    for name, body in commands.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / "bin" / name).chmod(0o755)


@pytest.mark.parametrize(
    ("env", "gpu", "settings"),
    [
        ({"MODEL": "m"}, True, "expandable_segments:True"),
        ({"MODEL": "m"}, False, ""),
        ({}, True, ""),
        ({"MODEL": "m", "PYTORCH_ALLOC_CONF": "backend:native"}, True, "backend:native"),
        ({"MODEL": "m", "PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, True, ""),
    ],
)
def test_what_a_real_model_is_started_with(env, gpu, settings, tmp_path):
    """Commands that stand in for python and the driver's tool say what run_sft.sh would have done."""
    pretend(tmp_path, {"python": 'echo "$PYTORCH_ALLOC_CONF | $*"', "nvidia-smi": f"exit {0 if gpu else 1}"})
    clean = {"PYTORCH_ALLOC_CONF": "", "PYTORCH_CUDA_ALLOC_CONF": "", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    said = check(run("bash run_sft.sh --packing False", tmp_path, **(clean | env))).splitlines()[-1]
    assert said.startswith(f"{settings} | supervised_finetuning.py")
    assert re.findall(r"--packing (\w+)", said) == ["True", "False"]  # the last one counts


def test_the_small_real_model_is_fetched_once(tmp_path):
    """Commands that stand in for python and the driver's tool; the second start finds the folder."""
    pretend(tmp_path, {"python": 'echo "$*"', "nvidia-smi": "exit 1"})
    env = {"MODEL": "smollm2", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    install, fetch, train = check(run("bash run_sft.sh | grep -v requirements.txt", tmp_path, **env)).splitlines()
    assert install == "install requirements-gguf.txt"
    assert fetch == "examples/get_real_model.py --output_dir outputs/smollm2"
    assert train.startswith("supervised_finetuning.py --model_name_or_path outputs/smollm2 --train_file_dir")
    (tmp_path / "outputs" / "smollm2").mkdir(parents=True)
    (tmp_path / "outputs" / "smollm2" / "config.json").write_text("{}")
    assert check(run("bash run_sft.sh | grep -v requirements.txt", tmp_path, **env)).splitlines() == [train]


def test_one_variable_starts_torchrun(workspace):
    """Two processes with half the batch each end where one process ends."""
    flags = "--max_steps 2 --eval_strategy no --use_peft False --packing False --save_strategy no --do_train True"
    flags += " --max_train_samples 40 --dataloader_drop_last True --per_device_train_batch_size"
    check(run(f"bash run_sft.sh {flags} 4", workspace, OUTPUT="outputs/one"))
    two = {"OUTPUT": "outputs/two", "NPROC_PER_NODE": "2"}
    check(run(f"bash run_sft.sh {flags} 2", workspace, **two))
    histories = [list(losses(workspace / "outputs" / name).values()) for name in ("one", "two")]
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)
    first, second = (weights(workspace / "outputs" / name) for name in ("one", "two"))
    assert max((first[key] - second[key]).abs().max().item() for key in first) < 1e-4


def test_a_model_learns_its_new_name(workspace):
    """The script fails unless the merged model answers with the name, in two languages."""
    command = "bash examples/run_self_cognition.sh --num_train_epochs 60 --learning_rate 1e-2"
    told = check(run(command, workspace, NAME="Lexi", OUTPUT="outputs/lexi"))
    assert re.search("你是谁？ .*Lexi", told)
    assert re.search("What is your name\\? .*Lexi", told)


def readme_blocks() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S)
    # the two commands themselves: one made the workspace, the other is running
    return [block for block in blocks if "bash run_tests.sh" not in block and block.strip() != "bash run_pipeline.sh"]


@pytest.mark.parametrize("index", range(len(readme_blocks())))
def test_readme_commands_run_as_printed(index, workspace):
    check(run(readme_blocks()[index], workspace))


def test_readme_zh_has_the_same_commands():
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md")]
    english, chinese = (re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S) for text in texts)
    strip = [re.sub(r"\s*#.*", "", block) for block in english], [re.sub(r"\s*#.*", "", block) for block in chinese]
    assert strip[0] == strip[1]


def test_errors_are_one_message_and_exit_code_2(workspace):
    for command, message in (
        ("supervised_finetuning.py --modle_name_or_path x", "did you mean --model_name_or_path?"),
        ("pretraining.py --model_name_or_path ./none --train_file_dir examples --output_dir o", "no such folder"),
        ("merge_peft_adapter.py --base_model ./b --lora_model none --output_dir o", "no adapter_config.json"),
        ("inference.py --model_name_or_path outputs/nowhere --prompt hi", "outputs/nowhere"),
    ):
        result = run(f"python {command}", workspace)
        assert result.returncode == 2, result.stderr[-2000:]
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert not (workspace / "o").exists()


# MedicalGPT's run_*.sh of 2023 and the seeds' flags; paths, model and (without a GPU) --fp16 replaced.
OLD_PT = """torchrun --nproc_per_node 1 pretraining.py --model_type auto --model_name_or_path outputs/tiny-model
    --train_file_dir examples/pretrain/train --validation_file_dir examples/pretrain/validation
    --per_device_train_batch_size 3 --per_device_eval_batch_size 3 --do_train --do_eval --use_peft True --seed 42
    --bf16 --max_train_samples 20 --max_eval_samples 10 --num_train_epochs 0.5 --learning_rate 2e-4 --warmup_ratio 0.05
    --weight_decay 0.01 --logging_strategy steps --logging_steps 10 --eval_steps 50 --evaluation_strategy steps
    --save_steps 500 --save_strategy steps --save_total_limit 3 --gradient_accumulation_steps 1
    --preprocessing_num_workers 1 --block_size 128 --output_dir outputs-pt-v1 --overwrite_output_dir
    --ddp_timeout 30000 --logging_first_step True --target_modules all --lora_rank 8 --lora_alpha 16
    --lora_dropout 0.05 --torch_dtype float32 --device_map auto --report_to tensorboard
    --ddp_find_unused_parameters False --gradient_checkpointing True --modules_to_save embed_tokens,lm_head"""
OLD_MERGE = """python merge_peft_adapter.py --base_model outputs/tiny-model --tokenizer_path outputs/tiny-model
    --lora_model outputs-pt-v1 --output_dir outputs-merged"""
OLD_SFT = """torchrun --nproc_per_node 1 supervised_finetuning.py --model_type auto --model_name_or_path outputs-merged
    --train_file_dir examples/sft/train --validation_file_dir examples/sft/validation --assistant_name A
    --assistant_author B --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --do_train --do_eval
    --use_peft True --bf16 --max_train_samples 20 --max_eval_samples 10 --num_train_epochs 1 --learning_rate 2e-5
    --warmup_ratio 0.05 --weight_decay 0.05 --logging_strategy steps --logging_steps 10 --eval_steps 50
    --evaluation_strategy steps --save_steps 500 --save_strategy steps --save_total_limit 3
    --gradient_accumulation_steps 1 --preprocessing_num_workers 1 --output_dir outputs-sft-v1 --overwrite_output_dir
    --ddp_timeout 30000 --logging_first_step True --target_modules all --lora_rank 8 --lora_alpha 16
    --lora_dropout 0.05 --torch_dtype float32 --device_map auto --report_to tensorboard
    --ddp_find_unused_parameters False --gradient_checkpointing True --template_name vicuna --neft_alpha 5"""


OLD_RM = """python reward_modeling.py --model_type auto --model_name_or_path outputs/pipeline/sft-merged
    --train_file_dir examples/reward/train --validation_file_dir examples/reward/validation
    --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --do_train --use_peft True --seed 42
    --max_train_samples 20 --max_eval_samples 10 --num_train_epochs 1 --learning_rate 2e-5 --warmup_ratio 0.05
    --weight_decay 0.001 --logging_strategy steps --logging_steps 10 --eval_steps 50 --evaluation_strategy steps
    --save_steps 500 --save_strategy steps --save_total_limit 3 --max_source_length 256 --max_target_length 256
    --output_dir outputs-rm-v1 --overwrite_output_dir --ddp_timeout 30000 --logging_first_step True
    --target_modules all --lora_rank 8 --lora_alpha 16 --lora_dropout 0.05 --bf16 --torch_dtype bfloat16
    --device_map auto --report_to tensorboard --ddp_find_unused_parameters False --remove_unused_columns False
    --gradient_checkpointing True"""
# The script of 2023 (trl's first PPOTrainer), and the one of 2024 (its second)
OLD_PPO = """torchrun --nproc_per_node 1 ppo_training.py --model_type auto
    --model_name_or_path outputs/pipeline/sft-merged --reward_model_name_or_path outputs/pipeline/rm-merged
    --template_name chatml --torch_dtype float32 --device_map auto --train_file_dir examples/sft/train
    --validation_file_dir examples/sft/validation --assistant_name A --assistant_author B --batch_size 8
    --max_source_length 256 --max_target_length 16 --max_train_samples 20 --use_peft True --lora_rank 8
    --lora_alpha 16 --lora_dropout 0.05 --do_train --max_steps 2 --learning_rate 1e-5 --save_steps 50
    --output_dir outputs-rl-v1 --early_stopping True --target_kl 0.1 --reward_baseline 0.0"""
OLD_PPO_2024 = """python ppo_training.py --sft_model_path outputs/pipeline/sft-merged
    --reward_model_path outputs/pipeline/rm --model_name_or_path outputs/pipeline/sft-merged --template_name chatml
    --torch_dtype bfloat16 --bf16 --train_file_dir examples/reward/train
    --validation_file_dir examples/reward/validation --max_source_length 256 --response_length 16
    --per_device_train_batch_size 1 --gradient_accumulation_steps 4 --gradient_checkpointing True --do_train
    --total_episodes 8 --output_dir outputs-ppo-v1 --missing_eos_penalty 1.0 --eval_strategy steps --eval_steps 100
    --num_train_epochs 3 --report_to tensorboard"""
OLD_DPO = """python dpo_training.py --model_type auto --model_name_or_path outputs/pipeline/sft-merged
    --train_file_dir examples/reward/train --validation_file_dir examples/reward/validation
    --per_device_train_batch_size 4 --per_device_eval_batch_size 1 --do_train --do_eval --use_peft True
    --max_train_samples 20 --max_eval_samples 10 --max_steps 2 --eval_steps 20 --save_steps 50
    --max_source_length 256 --max_target_length 256 --output_dir outputs-dpo-v1 --target_modules all --lora_rank 8
    --lora_alpha 16 --lora_dropout 0.05 --torch_dtype bfloat16 --bf16 True --device_map auto --report_to tensorboard
    --remove_unused_columns False --gradient_checkpointing True --cache_dir ./cache"""


def test_command_lines_of_2023_run(workspace):
    for command in (OLD_PT, OLD_MERGE, OLD_SFT, OLD_RM, OLD_PPO, OLD_PPO_2024, OLD_DPO):
        check(run(" ".join(command.split()), workspace))
    # the same folder again, as those scripts do on every start
    check(run(" ".join(OLD_PT.split()), workspace))


def test_sigterm_saves_and_exits_143(workspace):
    command = (
        "python pretraining.py --model_name_or_path outputs/tiny-model --train_file_dir examples/pretrain/train "
        "--output_dir outputs/killed --max_steps 2000 --block_size 64 --logging_steps 1 --save_steps 5000 "
        "--do_train True & pid=$!; while ! grep -q 'step 3/' log 2>/dev/null; do sleep 0.2; "
        "kill -0 $pid; done; kill -TERM $pid; wait $pid"
    )
    result = run(f"({command}) > log 2>&1", workspace)
    log = (workspace / "log").read_text()
    assert result.returncode == 143, log[-2000:]
    assert "go on with --resume_from_checkpoint True" in log
    (checkpoint,) = (workspace / "outputs" / "killed").glob("checkpoint-*")
    assert (checkpoint / "optimizer.pt").is_file()
    step = int(checkpoint.name.split("-")[1])
    resume = command.split("&")[0].replace("--max_steps 2000", f"--max_steps {step + 1}")
    assert f"step {step + 1}/{step + 1}" in check(run(resume + " --resume_from_checkpoint True", workspace))
