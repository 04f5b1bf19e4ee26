"""Weights on the disk, a tensor or some of its rows at a time: read without mapping files, written to their places."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from queue import SimpleQueue

import torch
from torch import Tensor

from stagewise.errors import InputError
from stagewise.modeling.untrusted import unpickling_failed

# The names that safetensors has for data types.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What is compared, copied or cast at once: small enough that memory is used again, and not asked for anew.
BLOCK_BYTES = 4 * 2**20
# So many blocks may wait to be written.
_WAITING = 16


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: `size` bytes from `start` on in `file`. dtype: as safetensors names it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class Checkpoint:
    """The tensors of a model's .safetensors files, each read when it is asked for.

    Reading does not map files: what is in memory is what was asked for.

    tensors: by name, in the order of the files.
    """

    def __init__(self, files: Iterable[Path]):
        self.files = list(files)
        self.tensors: dict[str, Stored] = {}
        self._free: dict[int, list[Tensor]] = {}  # by their bytes
        for path in self.files:
            self.tensors.update(self._look_into(path))

    def _look_into(self, path: Path) -> dict[str, Stored]:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {
            name: Stored(
                path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }  # fmt: skip
        return dict(sorted(found.items(), key=lambda item: item[1].start))

    def dtype(self, name: str) -> torch.dtype:
        stored = self.tensors[name]
        if stored.dtype not in DTYPES:
            raise InputError(f"{stored.file}: {name} is of the data type {stored.dtype}, which cannot be merged")
        return DTYPES[stored.dtype]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor on the CPU, or its rows from `start` to before `stop`."""
        stored, dtype = self.tensors[name], self.dtype(name)
        rows = stored.shape[0] if stored.shape else 1
        stop = rows if stop is None else min(stop, rows)
        row_bytes = stored.size // max(rows, 1)
        size = (stop - start) * row_bytes
        buffer = self._free[size].pop() if self._free.get(size) else torch.empty(size, dtype=torch.uint8)
        with stored.file.open("rb", buffering=0) as file:
            _read_into(file, buffer, stored.start + start * row_bytes)
        shape = (stop - start, *stored.shape[1:]) if stored.shape else ()
        return buffer.view(dtype).reshape(shape)

    def give_back(self, tensor: Tensor) -> None:
        """Let a tensor that read gave be overwritten by a later one of its size: fresh memory costs more than that."""
        data = tensor.reshape(-1).view(torch.uint8)
        self._free.setdefault(data.numel(), []).append(data)


class PickledCheckpoint(Checkpoint):
    """Weights that torch.save wrote. One file at a time is open, mapped where its format allows it."""

    def _look_into(self, path: Path) -> dict[str, Stored]:
        return {
            name: Stored(path, _NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.numel() * tensor.element_size())
            for name, tensor in self._open(path).items()
        }

    def _open(self, path: Path) -> Mapping[str, Tensor]:
        if getattr(self, "_current", None) != path:
            self._state: Mapping[str, Tensor] = {}
            try:
                self._state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
            except UnpicklingError as error:
                raise unpickling_failed(str(path.parent), error) from error
            self._current = path
        return self._state

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        tensor = self._open(self.tensors[name].file)[name].detach()
        return (tensor[start:stop] if tensor.dim() else tensor).clone(memory_format=torch.contiguous_format)

    def give_back(self, tensor: Tensor) -> None:
        pass


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def open_checkpoint(folder: Path) -> Checkpoint:
    """The weights of a model's folder, as transformers would choose them."""
    for name, kind in (("model.safetensors", Checkpoint), ("pytorch_model.bin", PickledCheckpoint)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return kind([folder / name])
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return kind([folder / shard for shard in sorted(set(shards))])
    raise InputError(f"{folder}: no weights there; copy model.safetensors, or its shards and their index, there")


# Shape and data type of tensors that are to be written, by name.
Layout = dict[str, tuple[torch.dtype | str, tuple[int, ...]]]


def bytes_of(dtype: torch.dtype | str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * (DTYPES[dtype] if isinstance(dtype, str) else dtype).itemsize


def split_layout(layout: Layout, max_bytes: int) -> list[Layout]:
    """Files of at most `max_bytes`, or of one tensor that is larger, in the order of `layout`."""
    files: list[Layout] = [{}]
    filled = 0
    for name, (dtype, shape) in layout.items():
        size = bytes_of(dtype, shape)
        if files[-1] and filled + size > max_bytes:
            files.append({})
            filled = 0
        files[-1][name] = (dtype, shape)
        filled += size
    return files


class Writer:
    """Writes tensors to their places in .safetensors files, in any order, beside the work that makes them.

    What is written is read back and held against what it was.
    """

    def __init__(self, folder: Path, files: list[Layout]):
        """The files begin with all tensors zero."""
        self.places: dict[str, Stored] = {}
        count = len(files)
        for number, layout in enumerate(files, start=1):
            name = f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
            self.places.update(_begin_file(folder / name, layout))
        if count > 1:
            index = {
                "metadata": {"total_size": sum(place.size for place in self.places.values())},
                "weight_map": {name: place.file.name for name, place in sorted(self.places.items())},
            }
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        self._written: Counter[str] = Counter()
        self._pool = ThreadPoolExecutor(1)
        # what waits is copied to memory that is used again and again: a thread's frees leave holes that grow and grow
        self._spare: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(_WAITING):
            self._spare.put(torch.empty(BLOCK_BYTES, dtype=torch.uint8))
        self._read_back = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
        self._lent: Tensor | None = None
        self._error: OSError | None = None

    def is_whole(self, name: str) -> bool:
        return self._written[name] == self.places[name].size

    def put(self, name: str, tensor: Tensor, start_row: int = 0) -> None:
        """Write a tensor, or rows of it from `start_row` on. Raises OSError where earlier ones could not be."""
        tensor = tensor.detach().to("cpu").contiguous()
        assert tensor.dtype == DTYPES[self.places[name].dtype], f"{name}: {tensor.dtype}"
        self._send(name, tensor, start_row, None)

    def block(self, name: str, shape: Sequence[int]) -> Tensor:
        """Memory for rows of a tensor, in its data type, to be filled and given to send."""
        dtype = DTYPES[self.places[name].dtype]
        size = bytes_of(dtype, tuple(shape))
        if size > BLOCK_BYTES:
            return torch.empty(shape, dtype=dtype)
        self._lent = self._spare.get()
        return self._lent[:size].view(dtype).view(shape)

    def send(self, name: str, block: Tensor, start_row: int) -> None:
        """Write what the last call of block gave. It must not be looked at afterwards."""
        lent, self._lent = self._lent, None
        self._send(name, block, start_row, lent)

    def _send(self, name: str, tensor: Tensor, start_row: int, lent: Tensor | None) -> None:
        self._raise()
        place = self.places[name]
        assert tensor.shape[1:] == place.shape[1:], name
        data = tensor.reshape(-1).view(torch.uint8)
        offset = start_row * (place.size // max(place.shape[0], 1)) if place.shape else 0
        assert offset + data.numel() <= place.size, name
        self._written[name] += data.numel()
        for start in range(0, data.numel(), BLOCK_BYTES):
            piece = data[start : start + BLOCK_BYTES]
            buffer = lent
            if buffer is None:
                buffer = self._spare.get()
                buffer[: len(piece)].copy_(piece)
            self._pool.submit(self._write, name, place.start + offset + start, buffer, len(piece))

    def _write(self, name: str, start: int, buffer: Tensor, size: int) -> None:
        place, block, found = self.places[name], buffer[:size], self._read_back[:size]
        try:
            with place.file.open("r+b", buffering=0) as file:
                file.seek(start)
                view, done = memoryview(block.numpy()), 0
                while done < len(view):
                    done += file.write(view[done:])
                _read_into(file, found, start)
            if not torch.equal(found, block):
                raise OSError(f"{place.file}: {name} is not read back as it was written; is the disk sound?")
        except OSError as error:
            self._error = self._error or error
        finally:
            self._spare.put(buffer)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait for the last bytes. Raises OSError where the disk has not taken them."""
        self._pool.shutdown()
        self._raise()
        left = [name for name in self.places if not self.is_whole(name)]
        assert not left, f"not written: {left}"

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _begin_file(path: Path, layout: Layout) -> dict[str, Stored]:
    header: dict = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in layout.items():
        size = bytes_of(dtype, shape)
        dtype_name = dtype if isinstance(dtype, str) else _NAMES[dtype]
        header[name] = {"dtype": dtype_name, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as safetensors has it
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return {
        name: Stored(path, header[name]["dtype"], tuple(shape), 8 + len(text) + header[name]["data_offsets"][0],
                     bytes_of(dtype, shape))
        for name, (dtype, shape) in layout.items()
    }  # fmt: skip


def _read_into(file, buffer: Tensor, start: int) -> None:
    """Fill the bytes of `buffer` from the position `start` of an unbuffered file."""
    file.seek(start)
    view, done = memoryview(buffer.numpy()), 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise OSError(f"{os.fspath(file.name)}: ends too early; copy it again")
        done += count
