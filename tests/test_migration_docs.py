"""docs/from-llama-factory.md and docs/from-mftcoder.md: each flag they name is one, no flag of the commands is missing
there, every translated command is read by its script's own parser, and those of the tutorial train."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stagewise.arguments import StageTrainingArguments, flag_names
from stagewise.run.exit_codes import ScriptParser
from tests.stages import losses, weights
from tests.test_frozen_flags import FOLDER as FROZEN

ROOT = Path(__file__).resolve().parents[1]
LLAMA_FACTORY = ROOT / "docs" / "from-llama-factory.md"
MFTCODER = ROOT / "docs" / "from-mftcoder.md"
DOCS = [LLAMA_FACTORY, MFTCODER]
STAGES = ("pretraining", "supervised_finetuning", "reward_modeling", "ppo_training", "dpo_training")

# Read off the commands and configurations of the two guides by hand.
LLAMA_FACTORY_NAMES = """
    --num_gpus --master_port --deepspeed --stage --model_name_or_path --do_train --finetuning_type --template
    --flash_attn --shift_attn --dataset_dir --dataset --cutoff_len --learning_rate --num_train_epochs --max_samples
    --per_device_train_batch_size --per_device_eval_batch_size --gradient_accumulation_steps --lr_scheduler_type
    --max_grad_norm --logging_steps --save_steps --warmup_steps --neft_alpha --train_on_prompt --upcast_layernorm
    --lora_rank --lora_dropout --lora_target --resume_lora_training --output_dir --fp16 --plot_loss
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping
    zero_allow_untested_optimizer fp16 enabled loss_scale initial_scale_power loss_scale_window hysteresis
    min_loss_scale zero_optimization stage offload_optimizer device pin_memory allgather_partitions
    allgather_bucket_size reduce_scatter reduce_bucket_size overlap_comm contiguous_gradients sub_group_size
    stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_max_live_parameters
    stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save
"""
MFTCODER_NAMES = """
    --config_file --train_config --distributed_type
    --base_model_or_path --adaptor_path --model_type --merged_output_path
    load_raw_dataset data_paths output_dir tb_dir model_type attn_implementation peft_type lora_rank lora_alpha
    lora_dropout target_modules quantization pretrained_model_path weighted_loss_mode padding_mode num_train_epochs
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps learning_rate min_lr seq_length
    log_interval checkpointing_steps evaluation_steps early_stopping early_stopping_stall_num lr_scheduler_type
    warmup_steps seed saving_limit role_markers
    max_new_tokens top_p temperature repetition_penalty do_sample beam_num
"""

# The values of the tutorial's three commands, under our names.
COMMON = {
    "model_name_or_path": "microsoft/phi-1_5",
    "do_train": True,
    "do_eval": False,
    "template_name": "vanilla",
    "flash_attn": False,
    "shift_attn": False,
    "learning_rate": 2e-4,
    "max_samples_per_dataset": 1000,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "logging_steps": 5,
    "warmup_steps": 0,
    "neftune_noise_alpha": None,
    "train_on_prompt": False,
    "fp16": True,
    "plot_loss": True,
}
LORA = {"use_peft": True, "lora_rank": 8, "lora_dropout": 0.1, "target_modules": "q_proj,k_proj,v_proj"}
FULL = {"use_peft": False, "deepspeed": "zero2_offload.json", "model_max_length": 1024, "num_train_epochs": 10}
ONE_ROW = {"per_device_train_batch_size": 1, "save_steps": 1000, "_data": ["self_cognition", "law_sft_triplet"]}
JOBS = [
    COMMON
    | LORA
    | {"deepspeed": None, "model_max_length": 1024, "num_train_epochs": 20, "per_device_train_batch_size": 6}
    | {"per_device_eval_batch_size": 6, "save_steps": 100, "_data": ["self_cognition"]}
    | {"output_dir": "saves/Phi1.5-1.3B/lora/my", "_processes": 1},
    COMMON
    | LORA
    | ONE_ROW
    | {"deepspeed": "zero2_offload.json", "model_max_length": 1792, "num_train_epochs": 5}
    | {"per_device_eval_batch_size": 1, "output_dir": "saves/Phi1.5-1.3B/lora/law", "_processes": 1},
    COMMON
    | FULL
    | ONE_ROW
    | {"per_device_eval_batch_size": 1, "output_dir": "saves/Phi1.5-1.3B/lora/law_full", "_processes": 1},
    COMMON | FULL | ONE_ROW | {"deepspeed": "zero3.json", "_processes": 2},
]


# --- the tables ------------------------------------------------------------------------------------------------------


def tables(path: Path) -> list[tuple[str, str, str]]:
    """(theirs, ours, what differs) of every row of every table."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [tuple(cell.strip() for cell in line[1:-1].split("|")) for line in lines if line.startswith("|")]
    assert {len(row) for row in rows} == {3}, "a table of three columns, and no | inside a cell"
    headings = {index - 1 for index, row in enumerate(rows) if row[0] == "---"}
    return [row for index, row in enumerate(rows) if index not in headings and row[0] != "---"]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def flags(cell: str) -> set[str]:
    return {flag for text in code(cell) for flag in re.findall(r"(?<!\S)--\w+", text)}


def launcher_flags() -> set[str]:
    from torch.distributed.run import get_args_parser

    return {flag for action in get_args_parser()._actions for flag in action.option_strings}


def stage_flags() -> set[str]:
    """The frozen flags of the stages, those of TrainingArguments, and the old spellings."""
    from stagewise.old_spellings import OLD_SPELLINGS

    frozen = {flag for path in FROZEN.glob("*.txt") for flag in path.read_text().split()}
    old = {f"--{name}" for spelling in OLD_SPELLINGS for name in spelling.names}
    return frozen | set(flag_names(StageTrainingArguments)) | old


def plain_flags(monkeypatch) -> set[str]:
    """The flags of the scripts without frozen lists, from the parsers that they make."""
    found: set[str] = set()

    def note(parser, argv=None, namespace=None):
        found.update(flag for action in parser._actions for flag in action.option_strings)
        raise Parsed(parser)

    with monkeypatch.context() as patch:
        patch.setattr(ScriptParser, "parse_args", note)
        for name in ("merge_peft_adapter", "inference", "convert_dataset"):
            with pytest.raises(Parsed):
                importlib.import_module(name).main([])
    return found


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_every_flag_of_ours_that_a_table_names_exists(path, monkeypatch):
    known = stage_flags() | plain_flags(monkeypatch) | launcher_flags()
    named = {flag for _, ours, differs in tables(path) for flag in flags(ours) | flags(differs)}
    assert len(named) > 20
    assert named - known == set()


@pytest.mark.parametrize(
    ("path", "names"), [(LLAMA_FACTORY, LLAMA_FACTORY_NAMES), (MFTCODER, MFTCODER_NAMES)], ids=["llama", "mft"]
)
def test_every_flag_and_key_of_theirs_is_in_a_table(path, names):
    in_tables = [text.split()[0] for theirs, _, _ in tables(path) for text in code(theirs)]
    assert [name for name in names.split() if name not in in_tables] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_every_row_says_what_is_ours(path):
    for theirs, ours, _ in tables(path):
        assert code(theirs), theirs
        assert ours, theirs


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_what_is_not_there_yet_is_not_there(path):
    """Who adds one of these flags mends its row."""
    missing = [text.split() for theirs, ours, _ in tables(path) for text in code(theirs) if ours == "not there yet"]
    names = {f"--{words[0].lstrip('-')}" for words in missing if words[0] != "padding_mode"}
    assert names & stage_flags() == set(), "there now: say so in the document"


def test_the_old_tables_are_gone_and_the_new_ones_are_linked():
    text = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")
    assert "| LLaMA-Factory |" not in text
    assert "| MFTCoder |" not in text
    for path in DOCS:
        assert f"({path.name})" in text


# --- the commands ----------------------------------------------------------------------------------------------------


class Parsed(Exception):
    """Raised in place of going on after the arguments were read."""


def configurations() -> dict[str, str]:
    """File name -> content of the JSON blocks that follow a line beginning with their name."""
    texts = [path.read_text(encoding="utf-8") for path in DOCS]
    return {
        name: content
        for text in texts
        for name, content in re.findall(r"^`(\w+\.json)`[^\n]*\n\n```json\n(.*?)^```", text, flags=re.M | re.S)
    }


def commands(path: Path) -> list[str]:
    blocks = re.findall(r"^```console\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    joined = [block.replace("\\\n", " ") for block in blocks]
    lines = [line for block in joined for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines), lines
    return [line[2:] for line in lines]


def launch(command: str) -> tuple[str, list[str], int]:
    """(script, its words, number of processes); torchrun's own parser reads what stands before the script."""
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0] == "python":
        return words[1], words[2:], 1
    from torch.distributed.run import get_args_parser

    assert words[0] == "torchrun", command
    args = get_args_parser().parse_args(words[1:])
    return args.training_script, args.training_script_args, int(args.nproc_per_node)


def read_arguments(script: str, argv: list[str], monkeypatch) -> dict:
    """What `script` makes of `argv`: its main() is called and stopped when the arguments are read."""
    name = script.removesuffix(".py")
    if name in STAGES:
        import stagewise.arguments as holder
    else:
        holder = importlib.import_module(name)
    real = holder.parse_arguments

    def stop(*args, **kwargs):
        raise Parsed(real(*args, **kwargs))

    with monkeypatch.context() as patch:
        patch.setattr(holder, "parse_arguments", stop)
        if "--fp16" in argv:  # refused where there is no accelerator, and the commands are for one
            patch.setattr(torch.accelerator, "is_available", lambda: True)
        with pytest.raises(Parsed) as stopped:
            importlib.import_module(name).main(argv)
    (found,) = stopped.value.args
    parts = found if isinstance(found, tuple) else (found,)
    return {key: value for part in parts for key, value in vars(part).items()}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder with the documents' configurations; what TrainingArguments leaves in the process is undone."""
    from accelerate.state import PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    for name, content in configurations().items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("_start_deepspeed", "_check_fsdp"):  # only read here; tests/test_distributed.py trains with them
        monkeypatch.setattr(f"stagewise.distributed.{name}", lambda args: None)
    environment, state = dict(os.environ), dict(PartialState._shared_state)
    yield tmp_path
    os.environ.clear()
    os.environ.update(environment)
    PartialState._shared_state.clear()
    PartialState._shared_state.update(state)
    unset_hf_deepspeed_config()


@pytest.mark.parametrize("command", [command for path in DOCS for command in commands(path)])
def test_translated_commands_are_read_by_their_scripts(command, workplace, monkeypatch):
    script, argv, _ = launch(command)
    assert (ROOT / script).is_file()
    found = read_arguments(script, argv, monkeypatch)
    for text in (found.get("train_file_dir") or "").strip("[]").split(","):
        assert (ROOT / text).exists()
    assert list(workplace.glob("outputs*")) == []


@pytest.mark.parametrize("number", range(len(JOBS)))
def test_the_jobs_of_the_tutorial_keep_their_values(number, workplace, monkeypatch):
    script, argv, processes = launch(commands(LLAMA_FACTORY)[number])
    found = read_arguments(script, argv, monkeypatch)
    expected = dict(JOBS[number])
    assert script == "supervised_finetuning.py"
    assert processes == expected.pop("_processes")
    assert [Path(text).stem for text in found["train_file_dir"].split(",")] == expected.pop("_data")
    assert {key: found[key] for key in expected} == expected
    assert len(commands(LLAMA_FACTORY)) == len(JOBS)


@pytest.mark.parametrize("number", range(len(JOBS)))
def test_the_jobs_of_the_tutorial_train(number, tiny_model_dir, tmp_path):
    """As printed, but for the model, two steps, bfloat16 (as the page says for CPUs), and offloading uncompiled."""
    for name, content in configurations().items():
        settings = json.loads(content)
        if "zero_optimization" in settings:
            settings["zero_force_ds_cpu_optimizer"] = False
        (tmp_path / name).write_text(json.dumps(settings))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    command = commands(LLAMA_FACTORY)[number].replace("microsoft/phi-1_5", tiny_model_dir)
    command = command.replace("--fp16", "--bf16").replace("--master_port 9901", f"--master_port {29_820 + number}")
    command = re.sub(r"(\w+\.py)", rf"{ROOT}/\1", command) + " --max_steps 2 --model_max_length 256 --logging_steps 1"
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (output,) = re.findall(r"--output_dir (\S+)", command)
    assert len(losses(tmp_path / output)) == 2
    assert all(tensor.numel() for tensor in weights(tmp_path / output).values())


def keys(value) -> set[str]:
    return value.keys() | {key for each in value.values() for key in keys(each)} if isinstance(value, dict) else set()


def test_the_deepspeed_configurations_are_those_of_the_tutorial():
    """Their keys are the list above, and the figures that matter are the tutorial's."""
    found = {name: json.loads(configurations()[name]) for name in ("zero2_offload.json", "zero3.json")}
    assert set().union(*map(keys, found.values())) == {name for name in LLAMA_FACTORY_NAMES.split() if name[0] != "-"}
    two, three = (found[name]["zero_optimization"] for name in ("zero2_offload.json", "zero3.json"))
    assert (two["stage"], two["offload_optimizer"]) == (2, {"device": "cpu", "pin_memory": True})
    assert (two["allgather_bucket_size"], two["reduce_bucket_size"]) == (2e8, 2e8)
    assert (three["stage"], three["sub_group_size"], three["stage3_max_live_parameters"]) == (3, 5e7, 5e7)
    assert three["stage3_gather_16bit_weights_on_model_save"] is True


def test_flags_behind_a_configuration_override_it(workplace, monkeypatch):
    plain, changed = (
        read_arguments("supervised_finetuning.py", ["mft_qlora.json", *flags], monkeypatch)
        for flags in ([], ["--learning_rate", "2e-4"])
    )
    assert (plain["learning_rate"], changed["learning_rate"]) == (1e-4, 2e-4)
    assert plain["train_file_dir"].startswith("[")
    assert (plain["qlora"], plain["target_modules"], plain["min_lr"]) == (True, "all", 1e-5)
