"""Start a run, train and save, evaluate, write down what was done."""

import dataclasses
import enum
import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer, TrainerState, set_seed

from stagewise.checkpoint_files import move_into, saving
from stagewise.distributed import groups_of_rows, uses_fsdp
from stagewise.errors import InputError, TrainingDiverged, first_line
from stagewise.machines import agree, look
from stagewise.modeling.attention import check_kernel
from stagewise.modeling.experts import every_pass_trains_all
from stagewise.modeling.generation import generating_base, save_end
from stagewise.modeling.liger import liger_config
from stagewise.modeling.model_files import copy_companions
from stagewise.modeling.quantization import Quantization
from stagewise.modeling.rope_scaling import rope_setting
from stagewise.run import lineage
from stagewise.run.callbacks import (
    EvaluationGuard,
    SaveOnSignal,
    figures_not_finite,
    resume_stream,
    stream_position_writer,
)
from stagewise.run.checkpoints import (
    check_saved,
    checkpoint_step,
    find_resume_checkpoint,
    last_good_checkpoint,
    newest_checkpoint,
    was_restarted,
)
from stagewise.run.cost import describe_cost
from stagewise.run.logging import LogLine, peak_memory_gib, setup_logging
from stagewise.run.memory import MemoryPlan
from stagewise.run.own_files import CARD, RESULTS, add_to_list, begin_list, check_replaceable, clear, is_own
from stagewise.run.plots import plot_curves, plot_loss, plot_scores
from stagewise.run.preflight import check_writable

logger = logging.getLogger(__name__)

# What run_config.yaml leaves out: secrets, and what is about one start of a run and not about the run.
NOT_REPEATED = ("hf_hub_token", "hub_token", "resume_from_checkpoint", "overwrite_output_dir", "dry_run")


def start_run(args, run_args) -> str | None:
    """Logging, seeds, and the output folder's state; nothing is written or deleted yet.

    Args:
        args: the TrainingArguments.
        run_args: overwrite_output_dir, dry_run, logging_dir.

    Returns:
        The checkpoint to resume from, or None; each machine names its own copy where they share no folder, of the
        newest step that all have. A group that torchrun has restarted goes on from there, whatever the flags said at
        its first start.

    Raises:
        InputError: output_dir is in use and neither --resume_from_checkpoint nor --overwrite_output_dir is given; the
            checkpoint is not whole, or of steps of another size or engine; output_dir cannot be written; several GPUs
            are visible to one plain process.
    """
    setup_logging()
    if args.precision_note is not None:
        logger.info("precision: %s", args.precision_note)
    set_seed(args.seed)
    if args.n_gpu > 1:
        raise InputError(
            f"{args.n_gpu} GPUs are visible to one process: start with "
            f"`torchrun --nproc_per_node {args.n_gpu} {Path(sys.argv[0]).name} ...`, "
            "or set CUDA_VISIBLE_DEVICES to one of them"
        )
    os.environ["TENSORBOARD_LOGGING_DIR"] = run_args.logging_dir or str(Path(args.output_dir) / "logs")
    args.machines = look(Path(args.output_dir), args.local_process_index)
    if len(args.machines.writers) > 1 and _shards_checkpoints(args):
        raise InputError(
            f"--output_dir {args.output_dir}: is another folder on each machine, and FSDP would cut its checkpoints "
            "over them; share the folder, or set state_dict_type to FULL_STATE_DICT, as fsdp.json does"
        )
    checkpoint = _agree_on_checkpoint(args, run_args)
    lineage.check_layout(checkpoint, args)
    agree(lineage.missing_random_state(checkpoint, args))
    return checkpoint


def _shards_checkpoints(args) -> bool:
    found = (args.fsdp_plugin_args or {}).get("state_dict_type") or os.environ.get("FSDP_STATE_DICT_TYPE", "")
    return uses_fsdp(args) and "SHARDED" in str(found).upper()


def _agree_on_checkpoint(args, run_args) -> str | None:
    """The checkpoint of the newest step that every output_dir holds whole, as this process calls it."""

    def settled() -> tuple[int, str, bool] | None:
        folder = _settle_output_dir(args, run_args, until)
        if folder is None:
            return None
        return checkpoint_step(folder), Path(folder).name, folder == str(args.resume_from_checkpoint)

    until = None
    while len(set(found := args.machines.ask(settled))) > 1:
        if any(folder and folder[2] for folder in found):
            steps = ", ".join(str(folder[0]) if folder else "none" for folder in found)
            raise InputError(f"--resume_from_checkpoint: the machines name checkpoints of different steps: {steps}")
        until = min(folder[0] if folder else 0 for folder in found)
    if found[0] is None:
        return None
    _, name, is_named = found[0]
    return str(args.resume_from_checkpoint) if is_named else str(Path(args.output_dir) / name)


def _settle_output_dir(args, run_args, until: int | None) -> str | None:
    """The checkpoint to go on from, of step `until` or before; see start_run."""
    output = Path(args.output_dir)
    if was_restarted(output):
        newest = newest_checkpoint(args.output_dir, until)
        if newest is not None:
            logger.warning("restarted after a process died: going on from %s", newest)
            return newest
        if args.resume_from_checkpoint is None:
            logger.warning("restarted after a process died, before the first checkpoint: starting over")
            return None
    check_writable("--output_dir", output)
    checkpoint = find_resume_checkpoint(args.resume_from_checkpoint, args.output_dir, until)
    if not any(output.glob("*")) or _holds(output, checkpoint):
        return checkpoint
    if not run_args.overwrite_output_dir:
        raise InputError(
            f"--output_dir {output}: not empty; pass --resume_from_checkpoint True to go on, "
            "--overwrite_output_dir True to replace the run that is there, or choose another folder"
        )
    check_replaceable("--overwrite_output_dir", output)
    return checkpoint


def _holds(output: Path, checkpoint: str | None) -> bool:
    return checkpoint is not None and Path(checkpoint).resolve().parent == output.resolve()


def open_output_dir(args, run_args, checkpoint: str | None, arguments: Sequence[object], data_report: dict) -> None:
    """Create output_dir (cleared of a run that is to be overwritten) and write run_config.yaml and data_report.json.

    Each machine does it for the output_dir that it sees. Called when arguments, data and model have been found good:
    what fails before leaves output_dir as it was.
    """
    if args.machines.keeps:
        output = Path(args.output_dir)
        if run_args.overwrite_output_dir and not _holds(output, checkpoint):
            clear(output)
        output.mkdir(parents=True, exist_ok=True)
        begin_list(output)
        (output / "run_config.yaml").write_text(
            yaml.safe_dump(resolved_arguments(arguments), sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
        _write_json(output / "data_report.json", data_report)


def resolved_arguments(arguments: Sequence[Any]) -> dict:
    """Fields that differ from their default, as plain values, but for NOT_REPEATED: a command line as a file."""
    values: dict = {}
    for group in arguments:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if not field.init or field.name in NOT_REPEATED or value == default or value is None:
                continue
            plain = _plain(value)
            if plain is not None:
                values[field.name] = plain
    if not torch.accelerator.is_available():
        for derived in ("use_cpu", "dataloader_pin_memory"):  # of this machine, not of the command
            values.pop(derived, None)
    return values


def _plain(value: object):
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (str, int, float, bool, dict)):
        return value
    return None


def report_dry_run(args, data_report: dict, train_dataset, memory: MemoryPlan | None, rounds: int = 1) -> dict:
    """Print what would be trained and what memory it would want, load and write nothing; returns the report.

    Args:
        memory: None where it could not be estimated.
        rounds: accumulated batches of a step, where a step takes several.
    """
    if args.should_log:
        print(json.dumps(data_report, indent=2, ensure_ascii=False))
        if memory is not None:
            print(memory.describe())
        size = "a stream of rows"
        if hasattr(train_dataset, "__len__"):
            batch = args.per_device_train_batch_size * groups_of_rows(args) * args.gradient_accumulation_steps * rounds
            size = f"{len(train_dataset)} rows, {math.ceil(len(train_dataset) / batch)} steps an epoch"
        print(f"dry run: {size}; nothing was written")
    return {"data_report": data_report, "estimated_memory_gib": memory.gib if memory else None}


def build_trainer(trainer_class: type[Trainer], args, run_args, **kwargs) -> Trainer:
    """The Trainer with our log line, the signal handler, and early stopping where it is asked for.

    Liger patches the model with a language model's forward pass, unless it is told not to: a reward model too.
    """
    check_kernel(kwargs["model"], args.bf16 or args.fp16)
    if args.ddp_find_unused_parameters is None and every_pass_trains_all(kwargs["model"]):
        args.ddp_find_unused_parameters = False  # transformers looks for them in every step of an adapter
    if args.use_liger_kernel:
        args.liger_kernel_config = liger_config(args.liger_kernel_config)
    _hide_token(args)
    callbacks = [LogLine(), SaveOnSignal(), EvaluationGuard()]
    if run_args.early_stopping_stall_num:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=run_args.early_stopping_stall_num))
    steps = {"min_lr": run_args.min_lr, "on_nan": run_args.on_nan, "max_loss": run_args.max_loss}
    trainer = trainer_class(args=args, callbacks=callbacks, **steps, **kwargs)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.checkpoint_writers.append(stream_position_writer(trainer))
    return trainer


def _hide_token(args) -> None:
    """--hub_token into the environment, where huggingface_hub looks: the Trainer pickles its arguments beside the
    weights, and pushes both.
    """
    if args.hub_token is not None:
        os.environ["HF_TOKEN"], args.hub_token = args.hub_token, None


def total_steps(trainer: Trainer) -> int:
    """Optimizer steps of the whole run, counted as the Trainer counts them."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    updates = max(1, math.ceil(len(trainer.get_train_dataloader()) / trainer.args.gradient_accumulation_steps))
    return math.ceil(trainer.args.num_train_epochs * updates)


def train_and_save(
    trainer: Trainer, checkpoint: str | None, memory: MemoryPlan | None, **stage_fields: object
) -> dict:
    """Train (or go on), save weights, tokenizer and state; every rank takes part in saving.

    A run that had already finished is not trained any further (the Trainer alone would add a step each time).

    Raises:
        SystemExit: 130 or 143, when a signal ended training; a checkpoint has been written then.
        TrainingDiverged: nothing is saved then; the message names the last checkpoint that is sound.
    """
    stage_fields |= {"rope": rope_setting(trainer.model.config), "layout": lineage.layout_of(trainer.args)}
    trainer.full_speed = memory.full_speed if memory is not None else None
    trainer.checkpoint_writers.append(lambda folder: _describe(trainer, stage_fields, folder))
    if checkpoint is not None and checkpoint_step(checkpoint) >= total_steps(trainer):
        logger.info("%s is at the end of the run: nothing left to train", checkpoint)
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        metrics = {}
    else:
        if checkpoint is not None:
            resume_stream(trainer, checkpoint)
        try:
            metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        except TrainingDiverged as error:
            raise _with_way_back(error, trainer.args.output_dir) from error
    stopper = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, SaveOnSignal))
    if stopper.received is not None:
        logger.warning(
            "stopped by signal %d after step %d; go on with --resume_from_checkpoint True",
            stopper.received,
            trainer.state.global_step,
        )
        raise SystemExit(128 + stopper.received)
    if trainer.is_fsdp_enabled:  # checkpoints may be in shards; the result is a whole model
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    metrics["peak_memory_gib"] = round(peak_memory_gib(), 3)
    if memory is not None:
        metrics["estimated_memory_gib"] = memory.gib
    output = Path(trainer.args.output_dir)
    with saving("the trained model", output) as partial:
        trainer.save_model(str(partial), _internal_call=True)  # which does not push: report_run does
        if trainer.args.should_save:
            check_saved(partial)
            (partial / CARD).unlink(missing_ok=True)  # peft's; ours comes with the figures of the run
            _describe(trainer, stage_fields, partial)
            if not stage_fields["adapter"]:
                _copy_companions(str(stage_fields["base_model"]), partial)
        trainer.args.machines.mirror(partial, trainer.args.device)
        if trainer.args.machines.keeps:
            add_to_list(output, [path.name for path in partial.iterdir()])
            move_into(partial, output)
        trainer.save_state()
        trainer.save_metrics("train", metrics)
    return metrics


def _describe(trainer: Trainer, stage_fields: Mapping[str, object], folder: Path) -> None:
    lineage.write_stage(folder, **stage_fields)
    base = generating_base(trainer.model)
    if stage_fields["adapter"] and base is not None:
        save_end(base, folder)


def _copy_companions(base_model: str, folder: Path) -> None:
    """What reads images for a model, say; its weights are worth more than that, whatever is wrong with these files."""
    try:
        copy_companions("--model_name_or_path", base_model, folder)
    except (InputError, OSError) as error:
        logger.warning("what %s has beside its weights is not copied: %s", base_model, first_line(error))


def _with_way_back(error: TrainingDiverged, output_dir: str) -> TrainingDiverged:
    good = last_good_checkpoint(output_dir, error.good_until)
    advice = (
        f"go on from before: --resume_from_checkpoint {good}" if good else "there is no sound checkpoint before it"
    )
    return TrainingDiverged(f"{error}; {advice}", error.good_until)


def evaluate_run(trainer: Trainer, metric_key_prefix: str = "eval") -> dict:
    """Evaluate on the whole validation set and save eval_results.json.

    Raises:
        TrainingDiverged: see EvaluationGuard; what was trained lies in output_dir all the same.
    """
    try:
        metrics = trainer.evaluate(metric_key_prefix=metric_key_prefix)
    except TrainingDiverged as error:
        raise _with_way_back(error, trainer.args.output_dir) from error
    trainer.save_metrics("eval", metrics)
    return metrics


def report_scores(trainer, run_args) -> None:
    """The histogram of the last evaluation's chosen_scores and rejected_scores, on the main process."""
    if trainer.args.should_save and run_args.plot_loss:
        output = Path(trainer.args.output_dir)
        title = f"{output.name}: scores of {len(trainer.chosen_scores)} held-out pairs"
        plot_scores(trainer.chosen_scores, trainer.rejected_scores, output / "scores.png", title)


def report_curves(trainer: Trainer, run_args, curves: Mapping[str, Sequence[str]], name: str) -> None:
    """A plot for each entry of `curves`, of the logged figures that it lists, in one file; on the main process."""
    if curves and trainer.args.should_save and run_args.plot_loss:
        output = Path(trainer.args.output_dir)
        plot_curves(trainer.state.log_history, curves, output / name, output.name)


def report_run(trainer: Trainer, run_args, arguments: Sequence[object], data_report: dict, metrics: dict) -> None:
    """Plots, model card and, with --push_to_hub, the upload of it all; on the main process.

    Machines with an output_dir of their own get a copy before the upload, for which nobody waits.
    """
    output = Path(trainer.args.output_dir)
    if trainer.args.should_save:
        _write_report(trainer, run_args, arguments, data_report, metrics)
    trainer.args.machines.mirror(output, trainer.args.device, RESULTS)
    if trainer.args.should_save:
        if trainer.args.push_to_hub:
            _push(trainer)
        bad = figures_not_finite(metrics)
        if bad:
            logger.warning("done, but do not trust it: %s: %s not finite", output, ", ".join(bad))
        else:
            logger.info("done: %s", output)


def _write_report(trainer: Trainer, run_args, arguments: Sequence[object], data_report: dict, metrics: dict) -> None:
    if run_args.cost:
        world = trainer.args.world_size
        machines = max(1, world // int(os.environ.get("LOCAL_WORLD_SIZE", world)))
        print(describe_cost(trainer.state.log_history, run_args.cost, world, machines))
    output = Path(trainer.args.output_dir)
    stage = lineage.read_stage(output) or {}
    if run_args.plot_loss:
        plot_loss(trainer.state.log_history, output / "training_loss.png", f"{stage.get('stage', '')}: {output.name}")
    if is_own(output / CARD):
        (output / CARD).write_text(model_card(stage, arguments, data_report, metrics), encoding="utf-8")
    else:
        logger.warning("%s: is not a run's, so it stays, and no model card was written", output / CARD)


def _push(trainer: Trainer) -> None:
    """Upload what lies in output_dir, with our model card and without checkpoints, which are uploaded before."""
    from huggingface_hub import HfApi

    trainer._finish_current_push()
    HfApi().upload_folder(
        repo_id=trainer.hub_model_id,
        folder_path=trainer.args.output_dir,
        commit_message="Trained",
        ignore_patterns=["_*", "checkpoint*"],
        revision=trainer.args.hub_revision,
    )


def model_card(stage: dict, arguments: Sequence[object], data_report: dict, metrics: dict) -> str:
    """A README.md for the trained weights: command, data, figures, versions."""
    resolved = resolved_arguments(arguments)
    command = " ".join(f"--{key} {value}" for key, value in resolved.items())
    entry = stage.get("quantization")
    precision = f" in {Quantization(**entry)}" if entry else ""
    figures = "\n".join(
        f"| {key} | {value:.6g} |" for key, value in sorted(metrics.items()) if isinstance(value, (int, float))
    )
    return f"""---
base_model: {stage.get("base_model")}
library_name: {"peft" if stage.get("adapter") else "transformers"}
tags: [stagewise, {stage.get("stage")}]
---

# {Path(str(resolved.get("output_dir", "model"))).name}

Stage `{stage.get("stage")}`, {"an adapter for" if stage.get("adapter") else "all weights, from"} \
`{stage.get("base_model")}`{precision}; chat template `{stage.get("template")}`.

## Command

    {command}

## Data

```json
{json.dumps(data_report, indent=2, ensure_ascii=False)}
```

## Figures

| figure | value |
|---|---|
{figures}

Hardware: {hardware()}. Versions: {", ".join(f"{k} {v}" for k, v in stage.get("versions", {}).items())}.
"""


def hardware() -> str:
    """The devices of this process in words."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        return f"{world} x {torch.cuda.get_device_name()}"
    return f"{world} process(es) on CPU, {torch.get_num_threads()} threads"


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
