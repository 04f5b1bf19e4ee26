"""The command line: flags, files, old spellings, help, and what is refused."""

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise import arguments
from stagewise.arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    RunArguments,
    StageTrainingArguments,
    flag_names,
    parse_arguments,
)
from stagewise.errors import InputError
from stagewise.old_spellings import rename, summed_lengths

SHARED = (ModelArguments, LoraArguments, DataArguments, RunArguments)
NEEDED = ["--model_name_or_path", "base", "--train_file_dir", "data", "--output_dir", "out"]
FROZEN = Path(__file__).parent / "frozen_flags"


@dataclass
class PretrainingOptions:
    block_size: int = field(default=1024, metadata={"help": "Tokens of a block."})
    packing: bool = field(default=True, metadata={"help": "Join documents."})


@dataclass
class TuningOptions:
    _argument_group_name = "tuning"

    train_on_prompt: bool = field(default=False, metadata={"help": "Train every token."})


@dataclass
class RequiredOption:
    reward_model_path: str = field(metadata={"help": "The reward model."})
    loss_weights: list[float] | None = field(default=None, metadata={"help": "One for each loss."})


def training(*flags: str) -> StageTrainingArguments:
    return parse_arguments(StageTrainingArguments, argv=["--output_dir", "out", *flags])[0]


def tuning(*flags: str) -> tuple[ModelArguments, TuningOptions]:
    return parse_arguments(ModelArguments, TuningOptions, argv=["--model_name_or_path", "base", *flags])


def help_of(capsys: pytest.CaptureFixture, *dtypes: type) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(*dtypes, argv=["--help"], prog="stage.py", description="What the stage does.")
    assert stopped.value.code == 0
    return capsys.readouterr().out


def assert_frozen(stage: str, *dtypes: type) -> None:
    """The flags of `dtypes` are those of tests/frozen_flags/<stage>.txt: scripts of users depend on every one."""
    assert flag_names(*dtypes) == (FROZEN / f"{stage}.txt").read_text().split()


@pytest.fixture(autouse=True)
def _old_spellings_are_heard(caplog):
    caplog.set_level(logging.WARNING, logger="stagewise")


@pytest.fixture
def accelerator(monkeypatch):
    """A machine that has an accelerator. Returns the precisions that float32 products were set to."""
    set_to: list[str] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    return set_to


@pytest.fixture
def gpu(accelerator, monkeypatch):
    """A machine with a GPU: gpu(bf16=True)."""

    def pretend(bf16: bool) -> None:
        monkeypatch.setattr(arguments, "multiplies_bf16", lambda: bf16)
        monkeypatch.setattr(arguments, "_emulates_bf16", lambda use_cpu: not use_cpu and not bf16)
        monkeypatch.setattr(arguments, "device_name", lambda: "Tesla T4")
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)

    return pretend


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture
def config(tmp_path):
    """Writes a file and returns its path: config("run.yaml", "seed: 1")."""

    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


# Flags and defaults


def test_shared_flags_are_frozen():
    assert_frozen("shared", *SHARED)


def test_flag_names_holds_aliases_and_no_switch_off_forms():
    flags = flag_names(ModelArguments)
    assert {"--max_length", "--model_max_length", "--trust_remote_code"} < set(flags)
    assert "--no_use_fast_tokenizer" not in flags


def test_defaults():
    model, lora, data, run, args = parse_arguments(*SHARED, StageTrainingArguments, argv=NEEDED)
    assert (model.dtype, model.use_fast_tokenizer, model.trust_remote_code) == ("auto", True, False)
    assert (lora.use_peft, lora.target_modules, lora.lora_rank) == (True, "all", 8)
    assert (lora.lora_alpha, lora.lora_dropout) == (32.0, 0.05)
    assert (data.max_train_samples, data.max_eval_samples, data.max_samples_per_dataset) == (-1, -1, -1)
    assert (data.validation_split_percentage, data.mix_strategy, data.on_bad_row) == (5.0, "concat", "error")
    assert (run.overwrite_output_dir, run.dry_run, run.plot_loss, run.logging_dir) == (False, False, True, None)
    assert (args.report_to, args.logging_steps, args.average_tokens_across_devices) == (["tensorboard"], 10, True)


def test_instances_come_in_the_order_asked_for():
    made = parse_arguments(StageTrainingArguments, RunArguments, LoraArguments, argv=["--output_dir", "out"])
    assert [type(instance) for instance in made] == [StageTrainingArguments, RunArguments, LoraArguments]


def test_command_line_of_the_process_is_read_by_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage.py", "--lora_rank", "4"])
    assert parse_arguments(LoraArguments)[0].lora_rank == 4


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--use_dora"], True),
        (["--use_dora", "True"], True),
        (["--use-dora", "yes"], True),
        (["--use_dora=1"], True),
        (["--use_dora", "False"], False),
        (["--use_dora", "--lora_rank", "4"], True),
        (["--use_dora", "--use_dora", "False"], False),
    ],
)
def test_forms_of_a_switch(flags, expected):
    assert parse_arguments(LoraArguments, argv=flags)[0].use_dora is expected


@pytest.mark.parametrize("flags", [["--no_use_peft"], ["--no-use-peft"], ["--use_peft", "False"], ["--use-peft=no"]])
def test_switch_that_is_on_is_turned_off(flags):
    assert parse_arguments(LoraArguments, argv=flags)[0].use_peft is False


@pytest.mark.parametrize("name", ["gradient_checkpointing", "ddp_find_unused_parameters", "do_train"])
@pytest.mark.parametrize(("value", "expected"), [([], True), (["True"], True), (["False"], False)])
def test_switch_without_a_default_may_stand_alone(name, value, expected):
    assert getattr(training("--do_eval", f"--{name}", *value), name) is expected


@pytest.mark.parametrize(
    ("value", "expected"), [([], "True"), (["True"], "True"), (["out/checkpoint-5"], "out/checkpoint-5")]
)
def test_resume_from_checkpoint_is_a_switch_or_a_path(value, expected):
    assert training("--resume_from_checkpoint", *value).resume_from_checkpoint == expected


@pytest.mark.parametrize(("value", "expected"), [("True", "all"), ("no", "no"), ("non_padding", "non_padding")])
def test_field_that_is_text_or_a_switch(value, expected):
    assert training("--include_num_input_tokens_seen", value).include_num_input_tokens_seen == expected


def test_dictionaries_are_json():
    args = training("--lr_scheduler_kwargs", '{"num_cycles": 2}', "--liger_kernel_config", '{"rope": true}')
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert args.liger_kernel_config == {"rope": True}


@pytest.mark.parametrize("text", ["2", "{broken", '["a"]'])
def test_dictionary_that_is_not_json(text):
    with pytest.raises(InputError, match="^--lr_scheduler_kwargs: found .*, expected a JSON object"):
        training("--lr_scheduler_kwargs", text)


def test_required_option_of_a_stage(config):
    with pytest.raises(InputError, match="^--reward_model_path: missing"):
        parse_arguments(RequiredOption, argv=[])
    assert parse_arguments(RequiredOption, argv=["--reward_model_path", "rm"])[0].reward_model_path == "rm"
    made = parse_arguments(
        RequiredOption, argv=[config("run.yaml", "reward_model_path: rm\nloss_weights: [1, '5e-1']")]
    )
    assert made[0] == RequiredOption("rm", [1.0, 0.5])


# What is refused


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--modle_name_or_path", "--model_name_or_path"),
        ("--learning-rat=1", "--learning_rate"),
        ("--lora_r", "--lora_rank"),
        ("--block_sizes", "--block_size"),
    ],
)
def test_unknown_flag_names_the_nearest(typed, meant):
    with pytest.raises(InputError) as refused:
        parse_arguments(*SHARED, PretrainingOptions, StageTrainingArguments, argv=[*NEEDED, typed, "8"])
    assert str(refused.value) == f"{typed.split('=')[0]}: did you mean {meant}?"


def test_unknown_flag_that_resembles_nothing():
    with pytest.raises(InputError, match="^--zzzzqqq: unknown; --help"):
        training("--zzzzqqq")


def test_every_unknown_flag_is_named():
    with pytest.raises(InputError) as refused:
        training("--lerning_rate", "1", "--sede", "2")
    assert str(refused.value).splitlines() == [
        "--lerning_rate: did you mean --learning_rate?",
        "--sede: did you mean --seed?",
    ]


def test_shortened_flags_are_unknown():
    with pytest.raises(InputError, match="^--learning: "):
        training("--learning", "1e-4")


def test_value_without_a_flag():
    with pytest.raises(InputError, match="^9: neither a flag nor the value of one"):
        parse_arguments(LoraArguments, argv=["--lora_rank", "8", "9"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate", "fast"], "--learning_rate: found 'fast', expected float"),
        (["--seed", "1.5"], "--seed: found '1.5', expected int"),
        (["--seed"], "--seed: expected one argument"),
        (["--bf16", "perhaps"], "--bf16: Truthy value expected: got perhaps"),
        (["--eval_strategy", "weekly"], "--eval_strategy: found 'weekly', expected one of "),
        (["--warmup_steps", "-1.0"], "--warmup_steps: "),
        (["--deepspeed", "missing.json"], "--deepspeed missing.json: cannot be read"),
        (["--tf32", "True", "--use_cpu"], "--tf32: "),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size: found 0, expected 1 or more"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps: found 0"),
        (["--learning_rate", "nan"], "--learning_rate: found nan"),
        (["--num_train_epochs", "0"], "--num_train_epochs: found 0.0"),
        (["--max_steps", "0"], "--max_steps: found 0"),
        (["--neftune_noise_alpha", "-5"], "--neftune_noise_alpha: found -5.0"),
        (["--report_to", "tensorbord"], "--report_to: found 'tensorbord', expected all, none, or some of "),
        (["--report_to", "tensorboard,,wandb"], "--report_to: found 'tensorboard,,wandb'"),
        (["--do_predict"], "--do_predict: "),
        (["--do_train", "False"], "--do_train, --do_eval: both are off"),
    ],
)
def test_bad_value_of_a_training_argument(flags, message):
    with pytest.raises(InputError) as refused:
        training(*flags)
    assert str(refused.value).startswith(message)


def test_output_dir_is_required():
    with pytest.raises(InputError, match="^--output_dir: missing"):
        parse_arguments(StageTrainingArguments, argv=[])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--model_name_or_path: missing"),
        (["--model_name_or_path", ""], "--model_name_or_path: missing"),
        (["--model_name_or_path", "a", "--config_name", "b"], "--config_name: found 'b' beside --model_name_or_path"),
        (["--model_name_or_path", "a", "--dtype", "int8"], "--dtype: found 'int8', expected one of "),
    ],
)
def test_bad_model_arguments(flags, message):
    with pytest.raises(InputError) as refused:
        parse_arguments(ModelArguments, argv=flags)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_rank", "0"], "--lora_rank: found 0, expected 1 or more"),
        (["--lora_alpha", "0"], "--lora_alpha: found 0.0"),
        (["--lora_dropout", "1"], "--lora_dropout: found 1.0"),
        (["--target_modules", "all,lm_head"], "--target_modules: found 'all,lm_head'"),
        (["--target_modules", ""], "--target_modules: found ''"),
        (["--modules_to_save", "embed_tokens,"], "--modules_to_save: found 'embed_tokens,'"),
        (["--use_peft", "False", "--peft_path", "old"], "--peft_path: found 'old'"),
        (["--use_peft", "False", "--use_dora"], "--use_dora: found True"),
    ],
)
def test_bad_adapter_arguments(flags, message):
    with pytest.raises(InputError) as refused:
        parse_arguments(LoraArguments, argv=flags)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_train_samples", "0"], "--max_train_samples: found 0, expected a number of rows, or -1 for all"),
        (["--max_eval_samples", "-2"], "--max_eval_samples: found -2"),
        (["--validation_split_percentage", "100"], "--validation_split_percentage: found 100.0"),
        (["--validation_split_percentage", "0"], "--validation_split_percentage: found 0.0"),
        (["--preprocessing_num_workers", "0"], "--preprocessing_num_workers: found 0"),
        (["--on_bad_row", "ignore"], "--on_bad_row: found 'ignore', expected one of "),
        (["--tool_format", "chatml"], "--tool_format: found 'chatml', expected one of "),
        (["--train_file_dir", "a,,b"], "--train_file_dir: found 'a,,b'"),
        (["--dataset_name", "hub/set"], "--dataset_name: found 'hub/set' beside --train_file_dir"),
        (["--dataset_config_name", "zh"], "--dataset_config_name: found 'zh' without --dataset_name"),
        (["--mix_probs", "1"], "--mix_probs: found '1', expected --mix_strategy interleave"),
        (
            ["--mix_strategy", "interleave_over", "--mix_probs", "0.7,0.3"],
            "--mix_probs: found '0.7,0.3', expected one ",
        ),
    ],
)
def test_bad_data_arguments(flags, message):
    with pytest.raises(InputError) as refused:
        parse_arguments(DataArguments, argv=["--train_file_dir", "a", *flags])
    assert str(refused.value).startswith(message)


def test_training_data_is_required():
    with pytest.raises(InputError, match="^--train_file_dir: missing"):
        parse_arguments(DataArguments, argv=[])


def test_mixing_shares():
    flags = ["--train_file_dir", "a,b", "--mix_strategy", "interleave_under", "--mix_probs"]
    assert parse_arguments(DataArguments, argv=[*flags, "0.7, 0.3"])[0].mix_probabilities == (0.7, 0.3)
    for shares in ("0.7,0.4", "1.5,-0.5", "0.7,much"):
        with pytest.raises(InputError, match="^--mix_probs: found "):
            parse_arguments(DataArguments, argv=[*flags, shares])


def test_choices_hold_for_instances_made_in_code():
    with pytest.raises(InputError, match="^--dtype: found 'bf16', expected one of auto, bfloat16, float16, float32"):
        ModelArguments(model_name_or_path="base", dtype="bf16")


def test_no_limit_has_one_spelling():
    assert DataArguments(train_file_dir="a", max_train_samples=None).max_train_samples == -1


@pytest.mark.parametrize("flags", [["--min_lr", "-1e-5"], ["--early_stopping_stall_num", "0"]])
def test_bad_run_arguments(flags):
    with pytest.raises(InputError, match=f"^{flags[0]}: found "):
        parse_arguments(RunArguments, argv=[f"{flags[0]}={flags[1]}"])


def test_own_arguments_are_checked_before_transformers_sets_up_devices(monkeypatch):
    monkeypatch.setattr(StageTrainingArguments, "__post_init__", lambda self: pytest.fail("was made"))
    with pytest.raises(InputError, match="^--lora_rank"):
        parse_arguments(StageTrainingArguments, LoraArguments, argv=["--output_dir", "out", "--lora_rank", "0"])


def test_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parse_arguments(*SHARED, StageTrainingArguments, argv=NEEDED)
    assert list(tmp_path.iterdir()) == []


# The machine


@pytest.mark.usefixtures("no_accelerator")
def test_cpu_is_said_where_there_is_nothing_else():
    assert training().use_cpu is True
    assert training("--use_cpu", "False").use_cpu is True
    assert training("--bf16").bf16 is True


@pytest.mark.usefixtures("accelerator")
def test_accelerator_is_used_unless_cpu_is_asked_for():
    assert training().use_cpu is False
    assert training("--fp16").fp16 is True
    assert training("--use_cpu").use_cpu is True


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("flag", ["fp16", "fp16_full_eval"])
def test_float16_on_cpu_is_refused(flag):
    with pytest.raises(InputError, match=f"^--{flag}: the run is on CPU.*--bf16"):
        training(f"--{flag}", "--use_cpu")


@pytest.mark.parametrize(
    ("bf16", "flags", "expected", "note"),
    [
        (True, [], (True, False), r"bfloat16 \(--bf16 False"),
        (True, ["--bf16", "False"], (False, False), None),
        (True, ["--bf16"], (True, False), None),
        (True, ["--fp16"], (False, True), None),
        (True, ["--use_cpu"], (False, False), None),
        (False, [], (False, False), r"float32: Tesla T4 has no bfloat16 .*--fp16 True"),
        (False, ["--fp16"], (False, True), None),
        (False, ["--bf16", "--use_cpu"], (True, False), None),
    ],
)
def test_an_accelerator_multiplies_in_bfloat16_unless_told_otherwise(bf16, flags, expected, note, gpu):
    gpu(bf16)
    args = training(*flags)
    assert (args.bf16, args.fp16) == expected
    assert args.mixed_precision == ("bf16" if args.bf16 else "fp16" if args.fp16 else "no")
    assert (args.precision_note is None) if note is None else re.search(note, args.precision_note)


@pytest.mark.usefixtures("no_accelerator")
def test_a_cpu_multiplies_in_float32(monkeypatch):
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: pytest.fail("TF32 on a CPU"))
    args = training()
    assert (args.bf16, args.fp16, args.precision_note) == (False, False, None)


@pytest.mark.parametrize("flag", ["bf16", "bf16_full_eval"])
def test_emulated_bfloat16_is_refused(flag, gpu):
    gpu(False)
    with pytest.raises(
        InputError, match=f"^--{flag}: Tesla T4 only emulates .*use --{flag.replace('bf16', 'fp16')} True"
    ):
        training(f"--{flag}")


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"bf16": "auto", "fp16": "auto"}, (True, False)),
        ({"bf16": False}, (False, False)),
        ({"fp16": "auto"}, (False, False)),
        ({}, (False, False)),
        ({"fp16": True}, (False, True)),
        ({"bf16": True}, (True, False)),
    ],
)
def test_a_deepspeed_file_says_more(sections, expected, gpu, config):
    gpu(True)
    text = json.dumps({name: {"enabled": enabled} for name, enabled in sections.items()})
    args = StageTrainingArguments.__new__(StageTrainingArguments)
    args.bf16, args.fp16, args.use_cpu, args.deepspeed = None, False, False, config("ds.json", text)
    args.bf16_full_eval = args.fp16_full_eval = False
    args._settle_precision()
    assert (args.bf16, args.fp16) == expected
    if expected == (False, False):
        assert "ds.json does not ask for bfloat16" in args.precision_note


@pytest.mark.parametrize("asked", ["bf16", "fp16", "no"])
def test_what_accelerate_launch_asks_for(asked, gpu, monkeypatch):
    gpu(True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    args = training()
    assert (args.bf16, args.fp16) == (asked != "fp16", asked == "fp16")
    assert training("--bf16", "False").fp16 is False


def test_float32_products_are_in_tf32_unless_told_otherwise(accelerator, gpu, monkeypatch):
    gpu(True)
    monkeypatch.setattr(arguments, "is_torch_tf32_available", lambda: True)
    assert re.fullmatch(r".*bfloat16 .*; what stays float32 .* TF32 \(--tf32 False.*", training().precision_note)
    assert re.match("what stays float32 .* TF32", training("--bf16", "False").precision_note)
    assert accelerator == ["high", "high"]
    assert "TF32" not in training("--tf32", "False").precision_note
    assert training("--use_cpu").precision_note is None
    assert accelerator == ["high", "high"]


def test_a_run_keeps_its_precision_on_another_machine(gpu, config, monkeypatch):
    """What run_config.yaml says of it, replayed: bfloat16 of a GPU on a CPU, float32 of a CPU on a GPU."""
    from stagewise.run.lifecycle import resolved_arguments

    gpu(True)
    on_gpu = config("gpu.yaml", yaml.safe_dump(resolved_arguments([training()])))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert parse_arguments(StageTrainingArguments, argv=[on_gpu, "--output_dir", "o"])[0].bf16 is True
    on_cpu = config("cpu.yaml", yaml.safe_dump(resolved_arguments([training()])))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert parse_arguments(StageTrainingArguments, argv=[on_cpu, "--output_dir", "o"])[0].bf16 is False


@pytest.mark.parametrize(
    ("engine", "named"), [(["--deepspeed", "zero3.json"], "--deepspeed zero3.json"), (["--fsdp", "True"], "--fsdp")]
)
def test_a_device_map_beside_shared_weights_is_named(engine, named, monkeypatch):
    monkeypatch.setattr(arguments, "settle_engine", lambda args: None)
    monkeypatch.setattr(StageTrainingArguments, "__post_init__", lambda self: None)
    argv = ["--model_name_or_path", "m", "--output_dir", "o", "--device_map", "auto", *engine]
    with pytest.raises(InputError, match=f"^--device_map auto: found beside {named}, .*leave --device_map out"):
        parse_arguments(ModelArguments, StageTrainingArguments, argv=argv)
    parse_arguments(ModelArguments, StageTrainingArguments, argv=[*argv[:-4], "--deepspeed", "zero2.json"])


@pytest.mark.parametrize(
    ("in_file", "flags", "said"),
    [
        ({"bf16": {"enabled": True}}, ["--bf16", "False"], "says bf16 enabled true, and this run has it off"),
        ({"bf16": {"enabled": False}}, ["--bf16", "True"], "says bf16 enabled false, and this run has it on"),
        ({"fp16": {"enabled": True}}, ["--use_cpu", "True"], "says fp16 enabled true.*it off"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_flags(in_file, flags, said, tmp_path, monkeypatch):
    """transformers finds it when the model is loaded, on every process."""
    monkeypatch.setattr(
        "stagewise.distributed._start_deepspeed", lambda use_cpu: None
    )  # nor its group in this process
    path = tmp_path / "engine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **in_file}))
    argv = ["--output_dir", "o", "--deepspeed", str(path), *flags]
    with pytest.raises(InputError, match=f'--deepspeed .*engine.json: {said}.*write "auto" there'):
        parse_arguments(StageTrainingArguments, argv=argv)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], (True, True)),
        (["--do_train"], (True, False)),
        (["--do_eval"], (False, True)),
        (["--do_eval", "False"], None),
        (["--do_train", "--do_eval"], (True, True)),
        (["--do_train", "--eval_strategy", "epoch"], (True, True)),
    ],
)
def test_what_is_done(flags, expected):
    if expected is None:
        with pytest.raises(InputError, match="nothing is left to do"):
            training(*flags)
    else:
        assert (training(*flags).do_train, training(*flags).do_eval) == expected


@pytest.mark.parametrize(("value", "expected"), [("none", []), ("tensorboard, wandb", ["tensorboard", "wandb"])])
def test_report_to(value, expected):
    assert training("--report_to", value).report_to == expected


# Files


def test_json_file(config):
    path = config(
        "run.json", json.dumps({"lora_rank": 16, "use_dora": True, "lora_alpha": 64, "modules_to_save": None})
    )
    assert parse_arguments(LoraArguments, argv=[path])[0] == LoraArguments(
        lora_rank=16, use_dora=True, lora_alpha=64.0
    )


@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_yaml_text_is_read_as_the_fields_type(config, suffix):
    text = "learning_rate: 1e-4\nbf16: 'True'\nseed: '7'\nmax-grad-norm: 2\noutput_dir: out\nlogging_steps: 5\n"
    args = parse_arguments(StageTrainingArguments, argv=[config(f"run.{suffix}", text)])[0]
    assert (args.learning_rate, args.bf16, args.seed, args.max_grad_norm) == (1e-4, True, 7, 2.0)
    assert isinstance(args.max_grad_norm, float)


def test_structures_in_a_file(config):
    text = (
        "output_dir: out\nreport_to: [tensorboard, wandb]\ninclude_for_metrics: inputs\nlabel_names: [labels]\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\nresume_from_checkpoint: true\neval_strategy: no\n"
    )
    args = parse_arguments(StageTrainingArguments, argv=[config("run.yaml", text)])[0]
    assert args.report_to == ["tensorboard", "wandb"]
    assert (args.include_for_metrics, args.label_names) == (["inputs"], ["labels"])
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert args.resume_from_checkpoint == "True"
    assert args.eval_strategy == "no"


def test_flags_override_the_file(config):
    path = config("run.yaml", "lora_rank: 16\nlora_alpha: 64\nuse_dora: true\n")
    made = parse_arguments(LoraArguments, argv=[path, "--lora_rank", "4", "--use_dora", "False"])[0]
    assert (made.lora_rank, made.lora_alpha, made.use_dora) == (4, 64.0, False)


def test_flag_with_the_default_overrides_the_file(config):
    assert (
        parse_arguments(LoraArguments, argv=[config("a.yaml", "lora_rank: 16"), "--lora_rank", "8"])[0].lora_rank == 8
    )


def test_file_behind_what_a_launcher_puts_in_front(config):
    path = config("run.yaml", "output_dir: out\nseed: 7")
    args = parse_arguments(StageTrainingArguments, argv=["--local_rank=0", path, "--max_steps", "3"])[0]
    assert (args.local_rank, args.seed, args.max_steps) == (0, 7, 3)


def test_first_flag_that_ends_like_a_file_is_a_flag():
    with pytest.raises(InputError, match="^--deepspeed missing.json: cannot be read"):
        parse_arguments(StageTrainingArguments, argv=["--deepspeed=missing.json", "--output_dir", "out"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rate: fast", "learning_rate: found 'fast', expected float"),
        ("learning_rate: true", "learning_rate: found 'True', expected float"),
        ("learning_rate: [1, 2]", "learning_rate: found [1, 2], expected float"),
        ("learning_rate: null", "learning_rate: found None, expected float"),
        ("seed: 8.0", "seed: found '8.0', expected int"),
        ("run_name: 2024", "run_name: found 2024, expected str or None"),
        ("run_name: {a: b}", "run_name: found {'a': 'b'}, expected str or None"),
        ("label_names: [labels, null]", "label_names: found None, expected list"),
        ("bf16: 2", "bf16: Truthy value expected: got 2"),
        ("eval_strategy: weekly", "eval_strategy: found 'weekly', expected one of "),
        ("lr_scheduler_kwargs: 5", "lr_scheduler_kwargs: found '5', expected a JSON object"),
        ("learning_rat: 1", "learning_rat: did you mean learning_rate?"),
        ("zzzzqqq: 1", "zzzzqqq: unknown"),
        ("7: 1", "7: unknown"),
        ("seed: 1\nsee-d: 1", "see-d: did you mean seed?"),
        ("max_steps: 1\nmax-steps: 2", "max-steps: found twice"),
        ("warmup_ratio: 2", "warmup_ratio: found 2, expected a share of the run"),
    ],
)
def test_bad_line_of_a_file(config, line, message):
    path = config("run.yaml", line)
    with pytest.raises(InputError) as refused:
        parse_arguments(StageTrainingArguments, argv=[path])
    assert str(refused.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", '{"seed": ', "not valid JSON"),
        ("run.yaml", "seed: [1", "not valid YAML"),
        ("run.yaml", "- seed", "found list, expected keys"),
        ("run.yaml", "", "found NoneType, expected keys"),
    ],
)
def test_file_that_cannot_be_used(config, name, text, message):
    path = config(name, text)
    with pytest.raises(InputError) as refused:
        parse_arguments(LoraArguments, argv=[path])
    assert str(refused.value).startswith(f"{path}: {message}")


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"run\.yaml: cannot be read: No such file"):
        parse_arguments(LoraArguments, argv=[str(tmp_path / "run.yaml")])


def test_file_that_does_not_stand_first(config):
    with pytest.raises(InputError, match="file stands first"):
        parse_arguments(LoraArguments, argv=["--lora_rank", "4", config("run.yaml", "lora_rank: 8")])


def test_resolved_arguments_read_back_are_the_same_run(config):
    flags = ["--learning_rate", "1e-4", "--gradient_checkpointing", "--warmup_ratio", "0.05", "--lr_scheduler_type"]
    flags += [
        "cosine",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "5",
        "--lr_scheduler_kwargs",
        '{"num_cycles": 0.5}',
    ]
    first = training(*flags)
    path = config("run_config.yaml", yaml.safe_dump({k: v for k, v in first.to_dict().items() if k != "hub_token"}))
    again = parse_arguments(StageTrainingArguments, argv=[path])[0]
    assert again.to_dict() == first.to_dict()
    # The old name of a setting that the file holds under both names still overrides it.
    off = parse_arguments(StageTrainingArguments, argv=[path, "--gradient_checkpointing", "False"])[0]
    assert first.gradient_checkpointing is True
    assert off.gradient_checkpointing is False


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "lora_rank": st.integers(1, 512),
            "lora_alpha": st.floats(1e-3, 1e3),
            "lora_dropout": st.floats(0, 0.9),
            "use_rslora": st.booleans(),
            "modules_to_save": st.sampled_from(["lm_head", "embed_tokens,lm_head", "-odd"]),
        },
    )
)
def test_flags_and_files_mean_the_same(values):
    flags = parse_arguments(LoraArguments, argv=[f"--{name}={value}" for name, value in values.items()])
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("a.json", json.dumps(values)), ("a.yaml", yaml.safe_dump(values))):
            (Path(folder) / name).write_text(text)
            assert (
                parse_arguments(LoraArguments, argv=[str(Path(folder) / name)]) == flags == (LoraArguments(**values),)
            )


# Old spellings


@pytest.mark.parametrize(
    ("flags", "name", "expected"),
    [
        (["--evaluation_strategy", "epoch"], "eval_strategy", "epoch"),
        (["--evaluation-strategy=epoch"], "eval_strategy", "epoch"),
        (["--warmup_ratio", "0.05"], "warmup_steps", 0.05),
        (["--no_cuda"], "use_cpu", True),
        (["--group_by_length"], "train_sampling_strategy", "group_by_length"),
        (["--group_by_length", "False"], "train_sampling_strategy", "random"),
        (["--neft_alpha", "5"], "neftune_noise_alpha", 5.0),
        (["--neft_alpha", "0"], "neftune_noise_alpha", None),
        (["--include_inputs_for_metrics", "True"], "include_for_metrics", ["inputs"]),
        (["--include_inputs_for_metrics", "False"], "include_for_metrics", []),
        (["--per_gpu_train_batch_size", "3"], "per_device_train_batch_size", 3),
        (["--per_gpu_eval_batch_size", "3"], "per_device_eval_batch_size", 3),
    ],
)
def test_old_spelling_of_a_training_argument(flags, name, expected, caplog):
    args = training(*flags)
    assert getattr(args, name) == expected
    (record,) = caplog.records
    assert record.name == "stagewise.old_spellings"
    assert f"now --{name} " in record.getMessage()


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        (["--save_safetensors"], "safetensors is the only format"),
        (["--save_safetensors", "True"], "safetensors is the only format"),
        (["--half_precision_backend", "auto"], "--bf16"),
        (["--fp16_backend", "cuda_amp"], "--bf16"),
        (["--fp16_opt_level", "O1"], "--bf16"),
        (["--use_mps_device", "False"], "--use_cpu"),
    ],
)
def test_old_spelling_of_what_happens_anyway_is_dropped(flags, note, caplog):
    assert training(*flags).to_dict() == training().to_dict()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{flags[0]} ")
    assert "dropped" in record.getMessage()
    assert note in record.getMessage()


@pytest.mark.parametrize("flags", [["--resume_lora_training", "True"], ["--create_new_adapter", "False"]])
def test_going_on_with_an_adapter_is_what_peft_path_does(flags, caplog):
    (lora,) = parse_arguments(LoraArguments, argv=["--peft_path", "old", *flags])
    assert lora == LoraArguments(peft_path="old")
    assert "--peft_path goes on with the adapter" in caplog.text


@pytest.mark.parametrize("flags", [["--resume_lora_training", "False"], ["--create_new_adapter"]])
def test_a_new_adapter_on_an_old_one_is_a_merge_first(flags):
    with pytest.raises(InputError, match=f"^{flags[0]} .*merge_peft_adapter.py --base_model BASE"):
        parse_arguments(LoraArguments, argv=["--peft_path", "old", *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--save_safetensors", "False"],
            "--save_safetensors: found 'False', which is not supported any more; leave it",
        ),
        (["--half_precision_backend", "apex"], "--half_precision_backend: found 'apex'"),
        (["--fp16_backend", "cpu_amp"], "--fp16_backend: found 'cpu_amp'"),
        (["--fp16_opt_level", "O2"], "--fp16_opt_level: found 'O2'"),
        (["--warmup_ratio", "1.5"], "--warmup_ratio: found '1.5', expected a share of the run from 0 to below 1"),
        (["--warmup_ratio", "some"], "--warmup_ratio: found 'some', expected a number"),
        (["--group_by_length", "maybe"], "--group_by_length: found 'maybe', expected True or False"),
        (["--neft_alpha", "much"], "--neft_alpha: found 'much', expected a number"),
        (["--neft_alpha=-1"], "--neftune_noise_alpha: found -1.0"),
        (["--evaluation_strategy", "weekly"], "--eval_strategy: found 'weekly', expected one of "),
        (["--warmup_ratio", "0.05", "--warmup_steps", "100"], "--warmup_steps: found 100.0, and 0.05 from its old"),
        (["--no_cuda", "--use_cpu", "False"], "--use_cpu: found False, and True from its old spelling no_cuda"),
    ],
)
def test_old_spelling_whose_meaning_cannot_be_kept(flags, message):
    with pytest.raises(InputError) as refused:
        training(*flags)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("there", [True, False])
def test_use_mps_device(there, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there)
    monkeypatch.setattr(StageTrainingArguments, "__post_init__", lambda self: None)
    if there:
        assert training("--use_mps_device").use_cpu is False
    else:
        with pytest.raises(InputError, match="^--use_mps_device: no MPS device here.*--use_cpu"):
            training("--use_mps_device")


def test_old_spellings_of_the_ancestor(caplog):
    flags = ["--model_name_or_path", "m", "--torch_dtype", "bfloat16", "--overwrite_output_dir", "--logging_dir", "tb"]
    flags += ["--max_source_length", "256", "--max_target_length", "512", "--train_on_inputs"]
    model, run, sft = parse_arguments(ModelArguments, RunArguments, TuningOptions, argv=flags)
    assert model.dtype == "bfloat16"
    assert (run.overwrite_output_dir, run.logging_dir) == (True, "tb")
    assert (model.model_max_length, sft.train_on_prompt) == (768, True)
    assert [record.getMessage() for record in caplog.records] == [
        "--torch_dtype bfloat16 is an old spelling: now --dtype bfloat16",
        "--train_on_inputs True is an old spelling: now --train_on_prompt True",
        "--max_source_length 256 --max_target_length 512 is an old spelling: now --model_max_length 768",
    ]


@pytest.mark.parametrize(("one", "other"), [("source", "target"), ("target", "source")])
def test_half_of_a_length(one, other):
    with pytest.raises(InputError, match=f"^--max_{one}_length: found without --max_{other}_length.*model_max_length"):
        tuning(f"--max_{one}_length", "256")


def test_length_that_is_no_count():
    with pytest.raises(InputError, match="^--max_source_length: found '0'"):
        tuning("--max_source_length", "0", "--max_target_length", "5")


def test_old_spelling_needs_its_field():
    with pytest.raises(InputError, match="^--train_on_inputs: "):
        training("--train_on_inputs", "True")


def test_stage_replaces_a_shared_old_spelling():
    @dataclass
    class Lengths:
        model_max_length: int = field(default=1024, metadata={"help": "Row."})
        max_prompt_length: int = field(default=512, metadata={"help": "Prompt."})

    flags = ["--max_source_length", "256", "--max_target_length", "128"]
    own = (rename("max_source_length", "max_prompt_length"), rename("max_target_length", "model_max_length"))
    assert parse_arguments(Lengths, argv=flags, old_spellings=own)[0] == Lengths(128, 256)
    own = (summed_lengths("max_prompt_length"),)
    assert parse_arguments(Lengths, argv=flags, old_spellings=own)[0] == Lengths(1024, 384)


def test_old_spellings_in_a_file_and_their_override(config):
    text = "output_dir: out\nevaluation_strategy: no\nwarmup_ratio: 0.03\ngroup_by_length: true\nneft_alpha: 5\n"
    path = config("run.yaml", text)
    args = parse_arguments(StageTrainingArguments, argv=[path])[0]
    assert (args.eval_strategy, args.warmup_steps, args.neftune_noise_alpha) == ("no", 0.03, 5.0)
    assert args.train_sampling_strategy == "group_by_length"
    flags = ["--warmup_steps", "100", "--group_by_length", "False", "--neft_alpha", "0"]
    args = parse_arguments(StageTrainingArguments, argv=[path, *flags])[0]
    assert (args.warmup_steps, args.train_sampling_strategy, args.neftune_noise_alpha) == (100.0, "random", None)


def test_equal_values_under_both_names_are_no_conflict():
    assert training("--evaluation_strategy", "epoch", "--eval_strategy", "epoch").eval_strategy == "epoch"


def test_only_the_first_process_says_so(monkeypatch, caplog):
    monkeypatch.setenv("RANK", "1")
    assert parse_arguments(ModelArguments, argv=["--model_name_or_path", "m", "--torch_dtype", "auto"])
    assert not caplog.records


def test_gradient_checkpointing_is_no_old_spelling(caplog):
    assert training("--gradient_checkpointing", "True").gradient_checkpointing is True
    assert not caplog.records


# Whole command lines of 2023

LINES_OF_2023 = {
    "pretraining": """
        --model_type llama --model_name_or_path base --train_file_dir data/pretrain --validation_file_dir data/pretrain
        --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --do_train --do_eval --use_peft True --seed 42
        --fp16 --max_train_samples 10000 --max_eval_samples 10 --num_train_epochs 0.5 --learning_rate 2e-4
        --warmup_ratio 0.05 --weight_decay 0.01 --logging_strategy steps --logging_steps 10 --eval_steps 50
        --evaluation_strategy steps --save_steps 500 --save_strategy steps --save_total_limit 3
        --gradient_accumulation_steps 1 --preprocessing_num_workers 1 --block_size 1024 --packing True
        --output_dir outputs-pt --overwrite_output_dir --ddp_timeout 30000 --logging_first_step True
        --target_modules all --lora_rank 8 --lora_alpha 16 --lora_dropout 0.05 --torch_dtype float16 --device_map auto
        --report_to tensorboard --ddp_find_unused_parameters False --gradient_checkpointing True
        --cache_dir ./cache""",
    "tuning": """
        --model_type bloom --model_name_or_path base --dataset_name hub/medical --dataset_config_name finetune
        --validation_split_percentage 0.001 --per_device_train_batch_size 12 --per_device_eval_batch_size 12 --do_train
        --seed 42 --fp16 --max_train_samples 1000 --max_eval_samples 10 --num_train_epochs 1 --learning_rate 2e-5
        --warmup_ratio 0.05 --weight_decay 0 --logging_strategy steps --logging_steps 10 --eval_steps 50
        --evaluation_strategy steps --save_steps 500 --save_strategy steps --save_total_limit 3
        --gradient_accumulation_steps 1 --preprocessing_num_workers 8 --max_source_length 256 --max_target_length 256
        --output_dir outputs-sft --overwrite_output_dir --ddp_timeout 30000 --logging_first_step True
        --target_modules all --lora_rank 8 --lora_alpha 16 --lora_dropout 0.05 --torch_dtype float16 --device_map auto
        --report_to tensorboard --ddp_find_unused_parameters False --gradient_checkpointing True""",
    "full tuning": """
        --model_name_or_path base --train_file_dir data/finetune --cache_dir ./model --use_peft False
        --per_device_train_batch_size 2 --do_train --num_train_epochs 3 --max_train_samples -1 --max_eval_samples 50
        --learning_rate 3e-5 --warmup_steps 10 --model_max_length 2048 --logging_steps 1 --save_steps 400
        --save_strategy steps --save_total_limit 3 --output_dir outputs-full --target_modules all
        --torch_dtype bfloat16 --report_to tensorboard --neft_alpha 8 --ddp_find_unused_parameters False
        --gradient_checkpointing True --template_name chatglm3""",
}


@pytest.mark.usefixtures("accelerator")
def test_pretraining_script_of_2023():
    model, lora, data, run, options, args = parse_arguments(
        *SHARED, PretrainingOptions, StageTrainingArguments, argv=LINES_OF_2023["pretraining"].split()
    )
    assert (model.model_type, model.dtype, model.device_map, model.cache_dir) == (
        "llama",
        "float16",
        "auto",
        "./cache",
    )
    assert (lora.use_peft, lora.lora_rank, lora.lora_alpha, lora.lora_dropout) == (True, 8, 16.0, 0.05)
    assert (data.max_train_samples, data.max_eval_samples, data.preprocessing_num_workers) == (10000, 10, 1)
    assert (run.overwrite_output_dir, options.block_size, options.packing) == (True, 1024, True)
    assert (args.fp16, args.warmup_steps, args.eval_strategy, args.eval_steps) == (True, 0.05, "steps", 50)
    assert (args.num_train_epochs, args.learning_rate, args.ddp_timeout) == (0.5, 2e-4, 30000)
    assert (args.gradient_checkpointing, args.ddp_find_unused_parameters) == (True, False)
    assert (args.do_train, args.do_eval, args.logging_first_step, args.output_dir) == (True, True, True, "outputs-pt")


@pytest.mark.usefixtures("accelerator")
def test_tuning_script_of_2023():
    model, _, data, _, options, args = parse_arguments(
        *SHARED, TuningOptions, StageTrainingArguments, argv=LINES_OF_2023["tuning"].split()
    )
    assert (model.model_type, data.dataset_name, data.dataset_config_name) == ("bloom", "hub/medical", "finetune")
    assert (data.validation_split_percentage, model.model_max_length) == (0.001, 512)
    assert (args.weight_decay, args.warmup_steps, args.save_total_limit) == (0.0, 0.05, 3)


def test_full_tuning_script_of_2023():
    model, lora, data, _, options, args = parse_arguments(
        *SHARED, TuningOptions, StageTrainingArguments, argv=[*LINES_OF_2023["full tuning"].split(), "--bf16"]
    )
    assert (model.dtype, lora.use_peft, data.template_name) == ("bfloat16", False, "chatglm3")
    assert model.model_max_length == 2048
    assert (data.max_train_samples, data.max_eval_samples) == (-1, 50)
    assert (args.warmup_steps, args.neftune_noise_alpha, args.bf16, args.do_eval) == (10, 8.0, True, False)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("--template_name baichuan", {"template_name": "baichuan"}),
        ("--max_train_samples -1 --max_eval_samples 50", {"max_train_samples": -1, "max_eval_samples": 50}),
        ("--use_peft False", {"use_peft": False}),
        ("--peft_path old", {"peft_path": "old"}),
        ("--resume_from_checkpoint old", {"resume_from_checkpoint": "old"}),
        (
            "--qlora True --load_in_4bit True --torch_dtype bfloat16 --optim paged_adamw_32bit",
            {"qlora": True, "load_in_4bit": True, "dtype": "bfloat16", "optim": "paged_adamw_32bit"},
        ),
        ("--modules_to_save embed_tokens,lm_head", {"modules_to_save": "embed_tokens,lm_head"}),
        ("--rope_scaling linear", {"rope_scaling": "linear"}),
        ("--neft_alpha 5", {"neftune_noise_alpha": 5.0}),
        ("--target_modules q_proj,k_proj,v_proj,o_proj", {"target_modules": "q_proj,k_proj,v_proj,o_proj"}),
        ("--learning_rate 2e-04 --num_train_epochs 20.0", {"learning_rate": 2e-4, "num_train_epochs": 20.0}),
        ("--lr_scheduler_type cosine --warmup_steps 0", {"lr_scheduler_type": "cosine", "warmup_steps": 0}),
        ("--neft_alpha 0 --do_train True", {"neftune_noise_alpha": None, "do_train": True, "do_eval": False}),
        ("--plot_loss True --lora_dropout 0.1", {"plot_loss": True, "lora_dropout": 0.1}),
    ],
)
def test_flags_of_the_familys_manual(flags, found):
    made = parse_arguments(*SHARED, StageTrainingArguments, argv=[*NEEDED, *flags.split()])
    values = {name: value for instance in made for name, value in vars(instance).items()}
    assert {name: values[name] for name in found} == found


# Help


def test_help_is_grouped_by_subject(capsys):
    text = help_of(capsys, *SHARED, PretrainingOptions, TuningOptions, StageTrainingArguments)
    headings = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        *("options", "model", "data", "adapter", "quantization", "attention and context", "run"),
        *("options of this stage", "tuning"),
        *("optimisation", "batch and length", "precision and memory", "evaluation", "checkpoints and resume"),
        *("logging", "distributed", "hub", "other"),
    ]
    assert text.startswith("usage: stage.py [file.json|file.yaml] [--flag value ...]\n\nWhat the stage does.\n")


@pytest.mark.parametrize(
    ("group", "flags"),
    [
        ("model", ["--model_name_or_path", "--dtype", "--trust_remote_code"]),
        ("adapter", ["--lora_rank"]),
        ("attention and context", ["--attn_implementation", "--rope_scaling", "--neftune_noise_alpha"]),
        ("quantization", ["--load_in_4bit", "--qlora"]),
        ("run", ["--dry_run", "--output_dir", "--do_train", "--seed"]),
        ("optimisation", ["--learning_rate", "--warmup_steps", "--optim"]),
        ("batch and length", ["--per_device_train_batch_size", "--max_steps"]),
        ("evaluation", ["--eval_strategy", "--load_best_model_at_end"]),
        ("checkpoints and resume", ["--save_steps", "--resume_from_checkpoint"]),
        ("logging", ["--logging_dir", "--report_to"]),
        ("distributed", ["--deepspeed", "--fsdp", "--ddp_timeout"]),
        ("hub", ["--push_to_hub"]),
    ],
)
def test_where_a_flag_stands(group, flags, capsys):
    text = help_of(capsys, *SHARED, StageTrainingArguments)
    section = text.split(f"\n{group}:\n")[1].split("\n\n")[0]
    assert [flag for flag in flags if f"  {flag} " not in section] == []


def test_help_gives_every_flag_once_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    text = help_of(capsys, *SHARED, TuningOptions, StageTrainingArguments)
    lines = [line.split() for line in text.splitlines() if line.startswith("  --")]
    shown = [line[0].rstrip(",") for line in lines]
    assert sorted(shown + ["--max_length"]) == flag_names(*SHARED, TuningOptions, StageTrainingArguments)
    assert text.count("(default: ") == len(shown)
    for phrase in ("--lora_rank INT ", "--use_peft TRUE|FALSE ", "--model_max_length, --max_length INT "):
        assert phrase in text
    assert "(default: 0.05)" in next(line for line in text.splitlines() if "--lora_dropout" in line)


def test_parser_leaves_the_dataclasses_as_they_were():
    before = LoraArguments.__dataclass_fields__["modules_to_save"].type
    parse_arguments(LoraArguments, argv=[])
    assert LoraArguments.__dataclass_fields__["modules_to_save"].type == before


def test_help_loads_nothing_heavier_than_training_arguments():
    # transformers itself imports peft (and with it bitsandbytes) where it is installed: what counts is what is added.
    script = """
import sys
from transformers import HfArgumentParser, TrainingArguments
before = set(sys.modules)
from stagewise import arguments
try:
    arguments.parse_arguments(arguments.ModelArguments, arguments.DataArguments, arguments.StageTrainingArguments,
                              argv=["--help"])
except SystemExit:
    pass
roots = {"bitsandbytes", "datasets", "deepspeed", "flash_attn", "matplotlib", "pandas", "peft", "tensorboard", "trl"}
print("added:", sorted(roots & {name.split(".")[0] for name in set(sys.modules) - before}))
print("loaded:", sorted({"datasets", "deepspeed", "matplotlib", "trl"} & set(sys.modules)))
"""
    root = Path(arguments.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-2:] == ["added: []", "loaded: []"]
