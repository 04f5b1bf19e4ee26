"""run_files.json: what runs have written into output_dir, and so what another run may replace.

A name in it was not there, or was a run's own, when that run began. Everything else in the folder is somebody's, and
is neither deleted nor overwritten. Checkpoints are not listed: their manifest tells whose they are.
"""

import json
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from stagewise.checkpoint_files import MANIFEST, PARTIAL
from stagewise.errors import InputError
from stagewise.machines import PROBE

LIST = "run_files.json"
CARD = "README.md"
# What the main process writes beside the model, and other machines get a copy of.
RESULTS = (
    "train_results.json", "eval_results.json", "all_results.json", "trainer_state.json", "training_loss.png",
    "scores.png", "tasks.png", "ppo.png", CARD, "completions.jsonl",
)  # fmt: skip
_REPORTS = ("run_config.yaml", "data_report.json", LIST, *RESULTS)
_LOGS = "logs"
# What a trained model may be made of.
_MODEL = (
    "adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json", "model.safetensors",
    "model-*-of-*.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json", "vocab.json",
    "merges.txt", "training_args.bin", "stage.json",
)  # fmt: skip


def begin_list(output: Path) -> None:
    """Claim the names that a run writes beside its model, but for those that are somebody's already."""
    add_to_list(output, [name for name in (*_REPORTS, _LOGS) if not (output / name).exists()])


def add_to_list(output: Path, names: Iterable[str]) -> None:
    files = sorted(_listed(output).union(names))
    (output / LIST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def is_own(path: Path) -> bool:
    """Whether a run has written what lies at `path`, or nothing lies there."""
    if not path.exists():
        return True
    if path.name.startswith("checkpoint-"):
        return (path / MANIFEST).is_file()
    return path.name == PARTIAL or path.name.startswith(PROBE) or path.name in _listed(path.parent)


def check_replaceable(flag: str, output: Path) -> None:
    """Raises InputError where a run would write over what no run has written."""
    foreign = [
        path.name
        for path in sorted(output.glob("*"))
        if any(fnmatch(path.name, name) for name in (*_REPORTS, *_MODEL, "checkpoint-*"))
        and path.name != CARD
        and not is_own(path)
    ]
    if foreign:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise InputError(
            f"{flag}: {output} holds {', '.join(foreign[:5])}{more}, which no run has written "
            f"({LIST} does not list them), and this one would write over them; choose another --output_dir, "
            "or move them away"
        )


def clear(output: Path) -> None:
    """Delete what runs have written; what is somebody's stays."""
    for path in [path for path in output.glob("*") if path.name != LIST and is_own(path)]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (output / LIST).unlink(missing_ok=True)


def _listed(output: Path) -> set[str]:
    path = output / LIST
    if not path.is_file():
        return set()
    try:
        return set(json.loads(path.read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read: {error}; empty the folder yourself, or choose another") from error
