"""The first seconds of a run: folders and settings that would stop it later, before anything heavy is loaded."""

import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_available_reporting_integrations

from stagewise.data.sources import source_names, source_paths
from stagewise.errors import InputError, first_line
from stagewise.modeling.model_check import check_device
from stagewise.modeling.model_files import (
    ADAPTER_CONFIG,
    check_adapter_files,
    check_model_files,
    check_tokenizer_files,
)
from stagewise.modeling.model_shape import adapter_base
from stagewise.modeling.untrusted import check_links, check_named_base
from stagewise.run.lineage import read_stage
from stagewise.run.settings import check_settings


def check_start(stage: str, arguments: Sequence[Any], models: Mapping[str, str | None] | None = None) -> None:
    """Every folder that the run will read, and the settings of its training loop.

    Args:
        stage: "pt", "sft", "rm", "ppo" or "dpo".
        arguments: the stage's groups in their order: model, LoRA, data, run, stage, training.
        models: further models of the stage, by flag; None where the flag is not given.

    Raises:
        InputError: what is missing, cut off, or does not go together.
    """
    model_args, lora_args, data_args, run_args, _, args = arguments
    for flag, name in {"--model_name_or_path": model_args.model_name_or_path, **(models or {})}.items():
        if name:
            takes_adapter = flag in ("--model_name_or_path", "--reward_model_path")
            check_model_files(flag, name, takes_adapter, model_args.allow_pickle)
    if model_args.tokenizer_name_or_path:
        check_tokenizer_files("--tokenizer_name_or_path", model_args.tokenizer_name_or_path)
    if lora_args.peft_path:
        check_adapter_files("--peft_path", lora_args.peft_path, model_args.allow_pickle)
    for flag in ("train_file_dir", "validation_file_dir"):
        _check_data(f"--{flag}", getattr(data_args, flag))
    check_apart(
        args.output_dir,
        {
            "--model_name_or_path": model_args.model_name_or_path,
            **(models or {}),
            "--tokenizer_name_or_path": model_args.tokenizer_name_or_path,
            "--peft_path": lora_args.peft_path,
        },
        {"--train_file_dir": data_args.train_file_dir, "--validation_file_dir": data_args.validation_file_dir},
    )
    _check_reports(args)
    _check_schedule(args, run_args.min_lr)
    if run_args.early_stopping_stall_num and args.eval_strategy == "no":
        raise InputError(
            "--early_stopping_stall_num: needs evaluations; pass --eval_strategy steps (and --eval_steps)"
        )
    spec = data_args.validation_file_dir or data_args.train_file_dir
    check_settings(stage, args, source_names(spec) if spec else (), run_args.early_stopping_stall_num is not None)


def check_writable(flag: str, output: Path) -> None:
    """Raises InputError where a folder of this name could not be made or written to."""
    there = next(path for path in [output, *output.absolute().parents] if path.exists())
    if not there.is_dir():
        where = "is a file" if there == output else f"{there} is a file"
        raise InputError(f"{flag} {output}: {where}; choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {output}: {there} cannot be written; choose another folder")


def check_apart(output_dir: str, models: Mapping[str, str | None], data: Mapping[str, str | None]) -> None:
    """What is written must not lie in, or around, what is read.

    Args:
        models: by flag, the folders that are read; what they were made of (an adapter's base, the model that a
            stage.json names) is not written over either.
        data: by flag, paths separated by commas.

    Raises:
        InputError: output_dir is, holds, or lies in one of them; or is a model that one of them was made of.
    """
    output = Path(output_dir).resolve()
    read = [(flag, Path(name)) for flag, name in models.items() if name and Path(name).exists()]
    for flag, source in [*read, *((flag, path) for flag, spec in data.items() if spec for path in source_paths(spec))]:
        for place in {source.resolve(), source.absolute()}:
            if place.is_relative_to(output) or output.is_relative_to(place):
                how = "is" if place == output else "holds" if place.is_relative_to(output) else "lies in"
                raise InputError(
                    f"--output_dir {output_dir}: {how} what {flag} reads ({source}), which a run must not write over; "
                    "choose another folder"
                )
    for flag, source in read:
        if any(Path(name).resolve() == output for name in _made_of(source)):
            raise InputError(
                f"--output_dir {output_dir}: {flag} {source} was made of it, and it would be gone; choose another "
                "folder"
            )


def _made_of(folder: Path) -> Iterator[str]:
    """The models that the model in `folder` says it was made of: its adapter's base, and those before it."""
    if not folder.is_dir():
        return
    base = adapter_base(str(folder))
    if base:
        yield base
    stage = read_stage(folder) or (read_stage(base) if base else None)
    while stage:
        yield from (stage[key] for key in ("base_model", "merged_from") if isinstance(stage.get(key), str))
        stage = stage.get("parent")


def check_merge(args: Namespace) -> None:
    """What merge_peft_adapter.py will read, write and run on. Raises InputError for what is not there."""
    check_model_files("--base_model", args.base_model, allow_pickle=args.allow_pickle)
    check_adapter_files("--lora_model", args.lora_model, args.allow_pickle)
    check_links(f"--base_model {args.base_model}", Path(args.base_model), "*.py")  # they are copied
    if args.tokenizer_path:
        check_tokenizer_files("--tokenizer_path", args.tokenizer_path)
    models = {
        "--base_model": args.base_model,
        "--lora_model": args.lora_model,
        "--tokenizer_path": args.tokenizer_path,
    }
    check_apart(args.output_dir, models, {})
    check_writable("--output_dir", Path(args.output_dir))
    if args.device != "auto":
        check_device("--device", args.device)


def check_inference(args: Namespace) -> None:
    """What inference.py will read, write and run on.

    Raises:
        InputError: what is missing, cut off, or would be overwritten.
    """
    adapter, model = args.lora_model, args.model_name_or_path
    check_model_files("--model_name_or_path", model, adapter is None, args.allow_pickle)
    if adapter is not None:
        check_adapter_files("--lora_model", adapter, args.allow_pickle)
    elif Path(model, ADAPTER_CONFIG).is_file():
        check_adapter_files("--model_name_or_path", model, args.allow_pickle)
        base = adapter_base(model) or ""
        check_named_base(f"--model_name_or_path {model}", base, args.trust_remote_code)
        check_model_files(f"--model_name_or_path {model}: its base", base, allow_pickle=args.allow_pickle)
    if args.tokenizer_path:
        check_tokenizer_files("--tokenizer_path", args.tokenizer_path)
    if args.device != "auto":
        check_device("--device", args.device)
    if args.input_file:
        _check_files(Path(args.input_file), Path(args.output_file))
        read = {"--model_name_or_path": model, "--lora_model": adapter, "--tokenizer_path": args.tokenizer_path}
        target = Path(args.output_file).resolve()
        for flag, name in read.items():
            # answers may lie beside a model, whose own files have other endings
            if name and target.suffix != ".jsonl" and target.is_relative_to(Path(name).resolve()):
                raise InputError(
                    f"--output_file {args.output_file}: may be a file of what {flag} reads ({name}); choose another "
                    "folder, or a name that ends with .jsonl"
                )


def _check_files(source: Path, target: Path) -> None:
    if not source.is_file():
        raise InputError(f"--input_file {source}: no such file; correct the path")
    if target.is_dir():
        raise InputError(f"--output_file {target}: is a folder; give the name of a .jsonl file")
    if target.exists() and target.samefile(source):
        raise InputError(f"--output_file {target}: is also --input_file; give another name")
    check_writable("--output_file", target.parent)


def _check_data(flag: str, spec: str | None) -> None:
    if spec is None:
        return
    try:
        source_names(spec)
    except InputError as error:
        raise InputError(f"{flag} {str(error).removeprefix('--train_file_dir: ')}; correct the path") from None


def _check_reports(args: TrainingArguments) -> None:
    missing = [name for name in args.report_to if name not in get_available_reporting_integrations()]
    if missing:
        raise InputError(
            f"--report_to {missing[0]}: the package is not installed: pip install {missing[0]}, or leave it out"
        )


def _check_schedule(args: TrainingArguments, min_lr: float | None) -> None:
    """Make the learning rate's schedule once, for a parameter that nobody trains."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    options = dict(args.lr_scheduler_kwargs or {})
    name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)

    def schedule_with(warmup: int):
        return get_scheduler(
            name, optimizer, num_warmup_steps=warmup, num_training_steps=100, scheduler_specific_kwargs=options
        )

    try:
        schedule = schedule_with(1)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"--lr_scheduler_kwargs: found {options} for --lr_scheduler_type {name}: {first_line(error)}"
        ) from error
    if args.warmup_steps and schedule_with(50).get_last_lr() == schedule_with(0).get_last_lr():
        raise InputError(
            f"--warmup_steps: --lr_scheduler_type {name} has no warm-up and would begin with the whole learning rate; "
            "choose another, such as constant_with_warmup, or leave the flag out"
        )
    if min_lr is not None and not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        raise InputError(f"--min_lr: --lr_scheduler_type {name} takes no floor; leave one of them out")
