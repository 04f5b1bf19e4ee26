"""What bitsandbytes saves of a linear layer, held against itself: found from headers and a few bytes of each layer.

A 4-bit weight is a column of bytes; `weight.absmax` has a scale for each block of it, `weight.quant_map` the values
that its numbers stand for, and `weight.quant_state.bitsandbytes__nf4` (or fp4) says in JSON how it was packed; with
double quantization the scales are packed themselves (`nested_absmax`, `nested_quant_map`). An 8-bit weight has a scale
for each row in `SCB`.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from stagewise.errors import InputError

STATE = ".quant_state.bitsandbytes__"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)
_ADVICE = (
    "copy or download the model again, or quantize the one that it was made from (--load_in_4bit, --load_in_8bit)"
)
# What the JSON must say, and of which kind it is.
_FIELDS = {"blocksize": int, "dtype": str, "shape": list}
_NESTED_FIELDS = {"nested_blocksize": int, "nested_dtype": str, "nested_offset": float}


def check_packed(flag: str, files: Iterable[Path]) -> None:
    """Look through the files of a model that is saved in 4 or 8 bits.

    Raises:
        InputError: a tensor that a packed weight needs is missing, is of another size, or cannot be read.
    """
    found: dict[str, tuple[Path, Any]] = {}
    for path in files:
        tensors = safe_open(path, "pt")
        found.update(dict.fromkeys(tensors.keys(), (path, tensors)))  # noqa: SIM118
    layers = _Layers(flag, found)
    weights = [name for name in found if name.endswith(".weight")]
    packed = {name.partition(part)[0] for name in found for part in _PARTS if f".weight{part}" in name}
    for name in sorted({*weights, *packed}):
        if name in packed or layers.dtype(name) == "U8":
            layers.check_4_bits(name)
        elif layers.dtype(name) == "I8":
            layers.check_8_bits(name)


class _Layers:
    """found: by the name of each tensor, its file and a reader of it."""

    def __init__(self, flag: str, found: dict[str, tuple[Path, Any]]):
        self.flag, self.found = flag, found

    def dtype(self, name: str) -> str | None:
        return self.found[name][1].get_slice(name).get_dtype() if name in self.found else None

    def shape(self, name: str) -> list[int]:
        return list(self.found[name][1].get_slice(name).get_shape())

    def bytes_of(self, name: str) -> int:
        width = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}.get(self.dtype(name) or "", 1)
        return math.prod(self.shape(name)) * width

    def refuse(self, weight: str, tensor: str, problem: str) -> InputError:
        path = self.found[weight if weight in self.found else tensor][0]
        unpacked = weight.partition(".weight")[0]
        return InputError(f"{self.flag} {path}: {tensor} {problem}, so that {unpacked} cannot be unpacked; {_ADVICE}")

    def require(self, weight: str, tensor: str, numbers: int | None = None) -> None:
        if tensor not in self.found:
            raise self.refuse(weight, tensor, "is missing")
        if numbers is not None and math.prod(self.shape(tensor)) != numbers:
            size = " x ".join(map(str, self.shape(tensor))) or "one number"
            raise self.refuse(weight, tensor, f"is {size}, and {numbers:,} numbers are needed")

    def check_8_bits(self, weight: str) -> None:
        self.require(weight, f"{weight.removesuffix('weight')}SCB", (self.shape(weight) or [1])[0])

    def check_4_bits(self, weight: str) -> None:
        state_name = next((name for kind in ("nf4", "fp4") if (name := f"{weight}{STATE}{kind}") in self.found), None)
        if state_name is None:
            part = next((f"{weight}{part}" for part in _PARTS if f"{weight}{part}" in self.found), weight)
            raise self.refuse(part, f"{weight}.quant_state", "is missing")
        state = self._state(weight, state_name)
        numbers = math.prod(state["shape"])
        if weight not in self.found:
            raise self.refuse(state_name, weight, "is missing")
        if self.bytes_of(weight) != (numbers + 1) // 2:
            size = " x ".join(map(str, state["shape"]))
            raise self.refuse(weight, weight, f"has {self.bytes_of(weight):,} bytes, and {size} numbers make "
                              f"{(numbers + 1) // 2:,}")  # fmt: skip
        blocks = -(-numbers // state["blocksize"])
        self.require(weight, f"{weight}.quant_map", 16)
        self.require(weight, f"{weight}.absmax", blocks)
        if "nested_blocksize" in state or self.dtype(f"{weight}.absmax") == "U8":
            self.require(weight, f"{weight}.nested_absmax", -(-blocks // state["nested_blocksize"]))
            self.require(weight, f"{weight}.nested_quant_map", 256)

    def _state(self, weight: str, name: str) -> dict:
        try:
            state = json.loads(bytes(self.found[name][1].get_tensor(name).tolist()))
            is_nested = self.dtype(f"{weight}.absmax") == "U8" or f"{weight}.nested_absmax" in self.found
            for field, kind in {**_FIELDS, **(_NESTED_FIELDS if is_nested else {})}.items():
                if not isinstance(state[field], kind):
                    raise ValueError(f"{field} is {state[field]!r}")
            if not all(isinstance(size, int) and size > 0 for size in (*state["shape"], state["blocksize"])):
                raise ValueError(f"shape {state['shape']}, blocksize {state['blocksize']}")
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise self.refuse(weight, name, f"cannot be read ({error!r})") from None
        return state
