"""stage.json: where a model comes from, so that the next stage takes over what it must and refuses what is wrong."""

import hashlib
import json
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stagewise.errors import InputError

FILE = "stage.json"
PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "deepspeed", "bitsandbytes")


def read_stage(folder: str | Path | None) -> dict | None:
    """The stage.json of a model folder, or None where there is none (a model of somebody else's)."""
    path = Path(folder or ".") / FILE
    if folder is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: cannot be read: {error}; delete it to use the model without its history") from error


def write_stage(folder: str | Path, **fields: object) -> dict:
    """Write stage.json: the given fields, the versions, the time.

    Fields of a training run: stage, base_model, parent (the base model's own stage.json or None), template, head
    ("causal_lm", "sequence_classification"), adapter (bool), dtype, data_fingerprint.
    """
    stage = {
        **fields,
        "versions": {name: found for name in PACKAGES if (found := installed_version(name))},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    Path(folder, FILE).write_text(json.dumps(stage, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return stage


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def fingerprint(*parts: str) -> str:
    """A short stable name for what `parts` identify (data set fingerprints, for instance)."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
