"""A folder that is complete or not there: written beside, proved by a manifest, and renamed into place.

    checkpoint.partial/checkpoint-30/      while it is written
    checkpoint-30/manifest.json            what is in it: sizes and hashes; written last

Everything reaches the disk before the rename, so that a power cut leaves either no checkpoint or a whole one.
"""

import json
import os
import shutil
from pathlib import Path

import xxhash

MANIFEST = "manifest.json"
PARTIAL = "checkpoint.partial"
_CHUNK_BYTES = 1 << 20


def seal(folder: Path) -> None:
    """Write the manifest of all files below `folder`, and see everything to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {str(path.relative_to(folder)): _entry(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1) + "\n", encoding="utf-8")
    for path in [*files, folder / MANIFEST]:
        _sync(path)
    for path in {path.parent for path in files} | {folder}:
        _sync(path)


def publish(partial: Path, final: Path) -> None:
    """Rename a sealed folder into its place; one that is there already, of an earlier start, gives way."""
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync(final.parent)


def manifest_problem(folder: Path) -> str | None:
    """Which file is not what the manifest says, in words; None where all are, or where there is no manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, entry in entries.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes, and {entry['bytes']:,} were written"
        if _hash(file) != entry["xxh3_128"]:
            return f"{name} is not what was written (its hash differs)"
    return None


def _entry(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "xxh3_128": _hash(path)}


def _hash(path: Path) -> str:
    """Of a damaged disk, not of an attacker: fast enough for hundreds of gigabytes."""
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
