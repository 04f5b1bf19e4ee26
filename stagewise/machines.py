"""Which machines see the same output_dir: found out by looking, so that each folder has one process that keeps it.

The first process of all writes what is everybody's (weights, optimizer, state); each process writes what is its own
(random states, its shards) where it is. A folder is kept (sealed, renamed, cleared) by the lowest process that sees
it; machines with a folder of their own are sent what the first process has written.
"""

import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from stagewise.errors import InputError

PROBE = ".stagewise-probe-"
# What a process writes and reads for itself, and no other machine needs: random states, shards of ZeRO.
_OF_ONE_PROCESS = ("*rng_state_*.pth", "*zero_pp_rank_*", "*_optim_states.pt", "*offloaded_tensors/*")
_LOOK_SECONDS = 0.5
# Looks before machines that do not see each other are taken at their word, and before a contradiction (one sees the
# other, and is not seen) is an error: a network file system may show late what was written elsewhere.
_LOOKS, _LOOKS_AT_ODDS = 4, 120
_CHUNK_BYTES = 64 << 20

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Machines:
    """Who keeps which output_dir.

    Attributes:
        writer: the process that keeps the output_dir which this one sees.
        writers: those of all folders, ascending; the first is process 0.
        several: whether there is more than one machine.
    """

    writer: int = 0
    writers: tuple[int, ...] = (0,)
    several: bool = False

    @property
    def keeps(self) -> bool:
        """Whether this process seals, renames and clears in the output_dir that it sees; should_save is process 0."""
        import torch.distributed as dist

        return self.writer == (dist.get_rank() if _in_group() else 0)

    def ask(self, decide: Callable[[], _Found]) -> list[_Found]:
        """What each writer finds in its folder, in the order of `writers`, on all processes.

        Raises:
            InputError: on all processes, what the first that failed has raised.
        """
        if not _in_group():
            return [decide()]
        found, problem = None, None
        if self.keeps:
            try:
                found = decide()
            except InputError as error:
                problem = str(error)
        answers = _gather((found, problem))
        for rank in self.writers:
            if answers[rank][1] is not None:
                where = f" (process {rank} says so)" if len(self.writers) > 1 else ""
                raise InputError(answers[rank][1] + where)
        return [answers[rank][0] for rank in self.writers]

    def mirror(self, folder: Path, device: Any, patterns: Sequence[str] = ("**/*",)) -> None:
        """Send the files of the first process's `folder` to the machines that do not see it, into their own `folder`.

        Called on every process; does nothing where all see one. What a process writes for itself stays out.
        """
        import torch.distributed as dist

        if len(self.writers) == 1:
            return
        listed: list = [None]
        dist.barrier()  # the processes of the first machine have written their part
        if dist.get_rank() == 0:
            paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
            names = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths]
            listed[0] = [(n, size) for n, size in names if not any(fnmatch(n, own) for own in _OF_ONE_PROCESS)]
        dist.broadcast_object_list(listed, device=device)
        for name, size in listed[0]:
            self._send(folder / name, size, device)

    def _send(self, path: Path, size: int, device: Any) -> None:
        import torch
        import torch.distributed as dist

        rank, file = dist.get_rank(), None
        if rank in self.writers:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("wb" if rank else "rb")
        try:
            for start in range(0, size, _CHUNK_BYTES):
                chunk = torch.empty(min(_CHUNK_BYTES, size - start), dtype=torch.uint8)
                if file is not None and rank == 0:
                    file.readinto(memoryview(chunk.numpy()))  # type: ignore[attr-defined]
                chunk = chunk.to(device)
                dist.broadcast(chunk, 0)
                if file is not None and rank:
                    file.write(memoryview(chunk.cpu().numpy()))
        finally:
            if file is not None:
                file.close()

    def names_below(self, folder: Path) -> set[str]:
        """The files that processes with the same folder see in it, each at least those that it wrote; called on all.

        Empty on one machine, which sees all of them itself.
        """
        if not self.several:
            return set()
        paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".nfs")]  # its own
        mine = {path.relative_to(folder).as_posix() for path in paths}
        return set().union(*(names for writer, names in _gather((self.writer, mine)) if writer == self.writer))


def look(output_dir: Path, local_rank: int) -> Machines:
    """Let the first process of each machine put a file into output_dir, and see on all which of them are there.

    output_dir is made for it where it is not there, and is as before afterwards. One machine alone makes nothing.

    Raises:
        InputError: on all processes: a machine cannot write there; machines contradict each other.
    """
    import torch.distributed as dist

    if not _in_group():
        return Machines()
    rank = dist.get_rank()
    told = _gather((local_rank, uuid.uuid4().hex))
    first = [number for number, (local, _) in enumerate(told) if local == 0]
    if len(first) == 1:
        return Machines()
    probes = {number: output_dir / f"{PROBE}{told[0][1]}-{number}" for number in first}
    made: list[Path] = []
    try:
        agree(_put(probes[rank], made) if rank in probes else None)
        writers = _look_until_agreed(probes)
    finally:
        if rank in probes:
            probes[rank].unlink(missing_ok=True)
    dist.barrier()
    for folder in reversed(made):
        try:
            folder.rmdir()
        except OSError:  # another machine's mistake is not ours to tidy, and an empty folder is no harm
            break
    dist.barrier()  # whoever looks at output_dir next would else see a folder that is just being removed
    return Machines(writers[rank], tuple(sorted(set(writers))), several=True)


def agree(problem: str | None) -> None:
    """Raise the problem of the first process that has one as InputError on all, so that none waits for another."""
    found = next((text for text in _gather(problem) if text), None) if _in_group() else problem
    if found:
        raise InputError(found)


def writers_of(seen: Sequence[frozenset[int]]) -> list[int] | None:
    """For each process the lowest that sees the same folder; None where what they see does not go together.

    Args:
        seen: for each process, of which processes it sees the probe.
    """
    for mine in seen:
        if not mine or any(seen[other] != mine for other in mine):
            return None
    return [min(mine) for mine in seen]


def _put(probe: Path, made: list[Path]) -> str | None:
    folder = probe.parent.absolute()
    try:
        for path in [*reversed(folder.parents), folder]:
            if not path.is_dir():
                try:
                    path.mkdir()
                    made.append(path)
                except FileExistsError:  # by another machine, a moment ago
                    continue
        probe.touch()
    except OSError as error:
        return (
            f"--output_dir {probe.parent}: cannot be written on {socket.gethostname()}: {error.strerror}; choose "
            "another folder"
        )
    return None


def _look_until_agreed(probes: dict[int, Path]) -> list[int]:
    for number in range(_LOOKS_AT_ODDS):
        seen = [frozenset(found) for found in _gather(_seen(probes))]
        writers = writers_of(seen)
        if writers is not None and (len(set(writers)) == 1 or number + 1 >= _LOOKS):
            return writers
        time.sleep(_LOOK_SECONDS)
    odd = next(rank for rank, mine in enumerate(seen) if not mine or any(seen[other] != mine for other in mine))
    raise InputError(
        f"--output_dir: process {odd} sees the files of processes {sorted(seen[odd])} there, and others see it "
        "otherwise; mount the folder in the same way on every machine"
    )


def _seen(probes: dict[int, Path]) -> list[int]:
    """By name, which asks the server of a network file system, and by listing, which makes it forget what it knew."""
    folder = next(iter(probes.values())).parent
    listed = set(os.listdir(folder)) if folder.is_dir() else set()
    return [number for number, path in probes.items() if path.name in listed or path.exists()]


def _in_group() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gather(value: Any) -> list:
    """The values of all processes, on all of them."""
    import torch.distributed as dist

    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
