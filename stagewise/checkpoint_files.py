"""A folder that is complete or not there: written beside, proved by a manifest, and renamed into place.

    checkpoint.partial/checkpoint-30/      while it is written
    checkpoint-30/manifest.json            what is in it: sizes and hashes; written last

Everything reaches the disk before the rename, so that a power cut leaves either no checkpoint or a whole one.
"""

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash
from safetensors import SafetensorError

from stagewise.errors import SaveFailed

MANIFEST = "manifest.json"
PARTIAL = "checkpoint.partial"
_CHUNK_BYTES = 1 << 20
# How late a network file system may show a file of another machine (NFS keeps a folder's entries for up to 60 s).
_SHOWN_SECONDS = 90
_NEXT_TO_NOTHING = 16 << 20  # bytes: what a writer that failed may have left of a disk


def seal(folder: Path, written: Iterable[str] = ()) -> None:
    """Write the manifest of all files below `folder`, and see everything to the disk.

    Args:
        written: names of files that other machines have written, which a network file system may show late.
    """
    expected = {folder / name for name in written}
    _wait_for(expected)
    files = sorted(expected | {path for path in folder.rglob("*") if path.is_file()})
    entries = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "xxh3_128": found}
        for path, found in zip(files, _hashes(files), strict=True)
    }
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1) + "\n", encoding="utf-8")
    for path in [*files, folder / MANIFEST, *{path.parent for path in files}, folder]:
        _sync(path)


def _wait_for(files: Iterable[Path]) -> None:
    deadline = time.monotonic() + _SHOWN_SECONDS
    for path in files:
        while not path.is_file():
            if time.monotonic() > deadline:
                raise OSError(errno.ENOENT, "another machine has written it, and it cannot be seen here", str(path))
            time.sleep(0.2)


def publish(partial: Path, final: Path) -> None:
    """Rename a sealed folder into its place; one that is there already, of an earlier start, gives way."""
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync(final.parent)


def move_into(partial: Path, folder: Path) -> None:
    """The files of a finished folder, into one that holds others too: each is the old one or the new one, whole."""
    for path in sorted(partial.iterdir()):
        _sync(path)
        path.replace(folder / path.name)
    _sync(folder)
    shutil.rmtree(partial)


@contextlib.contextmanager
def saving(what: str, output_dir: Path) -> Iterator[Path]:
    """A folder beside to write in, gone afterwards; what a full or broken disk raises in it becomes SaveFailed."""
    partial = output_dir / PARTIAL
    try:
        yield partial
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = _disk_error(error)
        if reason is None:
            raise
        free = shutil.disk_usage(output_dir).free
        shutil.rmtree(partial, ignore_errors=True)
        full = _is_full(reason, free)
        room = f" ({free / 2**20:,.1f} MiB were free in {output_dir})" if full else ""
        raise SaveFailed(
            f"{what} could not be saved: {reason}{room}; the checkpoints before are as they were. "
            f"{'Make room' if full else 'Mend that'}, and go on with --resume_from_checkpoint True"
        ) from error


def _is_full(reason: BaseException, free: int) -> bool:
    """Whether a disk or a quota was full; where a writer hides the number of the error, what is left tells."""
    number = getattr(reason, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or (number is None and free < _NEXT_TO_NOTHING)


def _disk_error(error: BaseException) -> BaseException | None:
    """What a disk made fail, if it was one. torch.save hides it: its writer, closed by the error, raises another."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    if found is None and (isinstance(error, SafetensorError) or "inline_container" in str(error)):
        return error
    return found


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
    for name, found in zip(entries, _hashes([folder / name for name in entries]), strict=True):
        if found != entries[name]["xxh3_128"]:
            return f"{name} is not what was written (its hash differs)"
    return None


def _hashes(files: Sequence[Path]) -> Iterator[str]:
    """Of each file; several at once, which reading and xxhash allow."""
    with ThreadPoolExecutor() as pool:
        yield from pool.map(_hash, files)


def _hash(path: Path) -> str:
    """Against a damaged disk, not against an attacker: gigabytes a second."""
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
