"""Where a run continues: the newest checkpoint that is whole."""

import json
import logging
import os
import re
from math import prod
from pathlib import Path

import psutil
from safetensors import safe_open

from stagewise.checkpoint_files import manifest_problem
from stagewise.errors import InputError

logger = logging.getLogger(__name__)

# Without one of these the Trainer resumes all the same, with a fresh optimizer or schedule: silently wrong.
NEEDED = ("trainer_state.json", "scheduler.pt", "optimizer.pt")


def find_resume_checkpoint(value: str | bool | None, output_dir: str, until: int | None = None) -> str | None:
    """The checkpoint that --resume_from_checkpoint means.

    Args:
        value: None or False for a fresh start, True (also as text) for the newest sound checkpoint in `output_dir`, or
            a path.
        until: with True, of this step or before.

    Raises:
        InputError: there is none, or the one named is not whole.
    """
    if value is None or str(value).lower() == "false":
        return None
    if str(value).lower() != "true":
        problem = checkpoint_problem(Path(str(value)))
        if problem:
            raise InputError(f"--resume_from_checkpoint {value}: {problem}")
        return str(value)
    newest = newest_checkpoint(output_dir, until)
    if newest is None:
        everywhere = "" if until is None else " that every machine has"
        instead = ", and pass --overwrite_output_dir True" if any(Path(output_dir).glob("*")) else ""
        raise InputError(
            f"--resume_from_checkpoint True: no whole checkpoint in {output_dir}{everywhere}; leave the flag out to "
            f"start{instead}"
        )
    return newest


def newest_checkpoint(output_dir: str, until: int | None = None) -> str | None:
    """The newest checkpoint (of step `until` or before) that is whole, or None; the log names those that are not."""
    for folder in sorted_checkpoints(output_dir):
        if until is not None and int(folder.name.split("-")[1]) > until:
            continue
        problem = checkpoint_problem(folder)
        if problem is None:
            return str(folder)
        logger.warning("resume: passing over %s: %s", folder, problem)
    return None


def was_restarted(output: Path) -> bool:
    """Whether torchrun has started this process again after one of its group had died, and the run in `output` is the
    one that died: its run_config.yaml was written since that torchrun began.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return False
    config = output / "run_config.yaml"
    return config.is_file() and config.stat().st_mtime >= psutil.Process(os.getppid()).create_time()


def sorted_checkpoints(output_dir: str) -> list[Path]:
    """checkpoint-N folders, the newest first."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(folders, key=lambda p: int(p.name.split("-")[1]), reverse=True)


def checkpoint_problem(folder: Path) -> str | None:
    """Why the Trainer could not continue exactly from `folder`, or None."""
    if not folder.is_dir():
        return "no such folder"
    problem = manifest_problem(folder)
    if problem is not None:
        return problem
    try:
        state = json.loads((folder / "trainer_state.json").read_text())
    except FileNotFoundError:
        return "trainer_state.json is missing"
    except ValueError as error:
        return f"trainer_state.json cannot be read: {error}"
    if "global_step" not in state:
        return "trainer_state.json names no global_step"
    deepspeed = any(folder.glob("global_step*"))
    sharded = any(folder.glob("pytorch_model_fsdp*")) or any(folder.glob("optimizer_0"))
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing and not (deepspeed or sharded):
        return f"{', '.join(missing)} is missing"
    if not any(folder.glob("rng_state*.pth")):
        return "rng_state.pth is missing"
    if not (deepspeed or sharded or any(folder.glob("*.safetensors"))):
        return "it holds no weights"
    return None


def last_good_checkpoint(output_dir: str, until: int) -> str | None:
    """The newest whole checkpoint of step `until` or before, or None."""
    for folder in sorted_checkpoints(output_dir):
        if checkpoint_problem(folder) is None and checkpoint_step(str(folder)) <= until:
            return str(folder)
    return None


def check_saved(output_dir: Path) -> None:
    """Make sure that a model was written: sharding engines save nothing, or empty tensors, without an error.

    Raises:
        RuntimeError: with what is missing.
    """
    files = sorted(output_dir.glob("*.safetensors"))
    if not files:
        raise RuntimeError(f"{output_dir}: no weights were written")
    for path in files:
        with safe_open(path, "pt") as tensors:
            names = tensors.keys()
            empty = [name for name in names if not prod(tensors.get_slice(name).get_shape())]
        if empty or not names:
            raise RuntimeError(f"{path}: was written without values: {', '.join(empty[:5]) or 'it holds no tensors'}")


def checkpoint_step(checkpoint: str) -> int:
    """The number of optimizer steps behind a checkpoint."""
    return int(json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"])
