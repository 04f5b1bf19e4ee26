"""The files of a base model under the names of its modules: which tensor belongs where, and its values.

Files may have other names than modules have, and other tensors: the experts of a mixture one by one, say. transformers
converts them when it loads a model; here its conversions are made for one parameter at a time, and back.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from stagewise.errors import InputError, first_line
from stagewise.modeling.quantization import QuantizedTwin
from stagewise.modeling.tensor_files import BLOCK_BYTES, Checkpoint, Writer


@dataclass
class Group:
    """Tensors of the files that become parameters together.

    keys: names in the files, in the order in which they are joined; patterns: those of the converter that they match.
    shapes: of the parameters, as the files have them; converter: None where a file's tensor is the parameter.
    stored_quantized: the first key holds packed weights, and the others what unpacks them.
    """

    keys: list[str] = field(default_factory=list)
    patterns: list[str | None] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    converter: WeightConverter | None = None
    stored_quantized: bool = False


class BaseTensors:
    """Values of a model's parameters and buffers, from files.

    Args:
        model: on the meta device, without an adapter; it knows what its parameters are called.
        twin: the same model with quantized layers, whose weights are the values that these stand for; None where the
            adapter was trained on plain weights.
        dtype: what all weights were cast to before training; None where they were not.
        config_dtype: what config.json says the weights are in.

    Attributes:
        groups: by name of parameter.
        aliases: parameters that no file has, by the name of the one that they are tied to.
        unknown: names in files that are nothing to this model.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, twin: QuantizedTwin | None = None,
                 dtype: torch.dtype | None = None, config_dtype: torch.dtype = torch.float32):  # fmt: skip
        self.config_dtype = config_dtype
        self.model, self.checkpoint, self.twin, self.dtype = model, checkpoint, twin, dtype
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.groups: dict[str, Group] = {}
        self.unknown: list[str] = []
        self._last: tuple[Group | None, dict[str, Tensor]] = (None, {})
        self._means: dict[str, Tensor] = {}
        ends = {model.get_input_embeddings(), model.get_output_embeddings()}
        own = (names.values() for module, names in owners(model).items() if module in ends)
        self._vocabularies = {name for names in own for name in names}
        self._sort_keys()
        self.aliases = self._find_aliases()

    def _sort_keys(self) -> None:
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix = self.model.base_model_prefix
        extras: dict[str, list[str]] = {}
        found: dict[str, Group] = {}
        for key in sorted(self.checkpoint.tensors, key=dot_natural_key):
            weight = self.twin.packed_weight(key) if self.twin else None
            if weight is not None:  # what unpacks a weight is not a tensor of the model
                extras.setdefault(weight, []).append(key)
                continue
            name, pattern = rename_source_key(key, renamings, converters, prefix, self.shapes)
            if name not in self.shapes and key in self.shapes:
                name, pattern = key, None
            if name not in self.shapes:
                self.unknown.append(key)
                continue
            group = found.setdefault(name, Group())
            group.keys.append(key)
            group.patterns.append(pattern)
            if pattern is not None and group.converter is None:
                group.converter = by_pattern[pattern]
        # how what was read is turned back, where it is written
        self.model._weight_conversions = [entry for entry in mapping if entry.was_used()]
        for name, group in found.items():
            if group.converter is None and len(group.keys) > 1:
                raise InputError(
                    f"{self.checkpoint.files[0].parent}: holds {name} twice, as {' and '.join(group.keys)}"
                )
            if group.keys[0] in extras:
                group.keys += extras[group.keys[0]]
                group.stored_quantized = True
                group.shapes = {name: self.shapes[name]}
            else:
                shapes = {key: self.checkpoint.tensors[key].shape for key in group.keys}
                empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
                group.shapes = {target: tuple(t.shape) for target, t in self._joined(name, group, empty).items()}
            for target, shape in group.shapes.items():
                self._check_shape(target, shape)
                self.groups[target] = group

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """A vocabulary may have grown, nothing else."""
        wanted = self.shapes.get(name)
        if wanted is None or shape == wanted:
            return
        if name not in self._vocabularies or shape[1:] != wanted[1:] or shape[:1] > wanted[:1]:
            raise InputError(
                f"{self.checkpoint.files[0].parent}: {name} is {shape}, and config.json makes it {wanted}; take "
                "configuration and weights from the same model"
            )

    def _convert(self, name: str, group: Group, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if group.converter is None:
            return {name: tensors[group.keys[0]]}
        converter = copy.deepcopy(group.converter)
        for key, pattern in zip(group.keys, group.patterns, strict=True):
            assert pattern is not None
            converter.add_tensor(name, key, pattern, tensors[key])
        made = converter.convert(name, model=_Shapes(self.model, self.shapes), config=self.model.config)
        return {target: value[0] if isinstance(value, list) else value for target, value in made.items()}

    def _joined(self, name: str, group: Group, empty: dict[str, Tensor]) -> dict[str, Tensor]:
        try:
            return self._convert(name, group, empty)
        except (RuntimeError, ValueError) as error:
            counts = Counter(pattern for pattern in group.patterns if pattern is not None)
            parts = ", ".join(f"{count} like {pattern}" for pattern, count in counts.items())
            raise InputError(
                f"{self.checkpoint.files[0].parent}: {name} cannot be made of the tensors there ({parts}; "
                f"{first_line(error)}); the files are not whole: copy or download the model again"
            ) from error

    def _find_aliases(self) -> dict[str, str]:
        tied = getattr(self.model, "all_tied_weights_keys", {})
        pairs = [*tied.items(), *((source, target) for target, source in tied.items())]
        return {name: other for name, other in pairs if name not in self.groups and other in self.groups}

    def holds(self, name: str) -> bool:
        return name in self.groups or name in self.aliases

    def dtype_of(self, name: str) -> torch.dtype:
        """The data type that the files have a parameter in; of packed weights that of what they are made into."""
        group = self.groups[self.aliases.get(name, name)]
        if group.stored_quantized:
            return self.main_dtype()
        return self.checkpoint.dtype(group.keys[0])

    def main_dtype(self) -> torch.dtype:
        """The one that most of the weights have. Of a checkpoint that is saved quantized: what config.json says."""
        if self.twin is not None and self.twin.is_stored:
            return self.config_dtype
        sizes: dict[torch.dtype, int] = {}
        for name, stored in self.checkpoint.tensors.items():
            dtype = self.checkpoint.dtype(name)
            if dtype.is_floating_point:
                sizes[dtype] = sizes.get(dtype, 0) + stored.size
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32

    def is_as_stored(self, name: str) -> bool:
        """Whether the values are those of the file, and not what training made of them before it began."""
        group = self.groups[self.aliases.get(name, name)]
        quantized = self.twin is not None and self.twin.quantizes(name)
        return not quantized and self.dtype in (None, self.checkpoint.dtype(group.keys[0]))

    def load(self, name: str, original: bool = False) -> Tensor:
        """A parameter's values on the CPU, in the data type of its file; dequantized ones in float32.

        original: the file's, where training saw others.
        """
        name = self.aliases.get(name, name)
        group = self.groups[name]
        if group.stored_quantized:
            assert self.twin is not None
            return self.twin.unpack(name, {key: self.checkpoint.read(key) for key in group.keys}, group.keys[0])
        if self._last[0] is not group:
            read = {key: self.checkpoint.read(key) for key in group.keys}
            self._last = (group if len(group.shapes) > 1 else None, self._convert(name, group, read))
        value = self._last[1][name]
        if len(group.shapes) == 1:
            self._last = (None, {})
        value = value if original else self._as_trained(name, value)
        return self._grown(name, value)

    def _as_trained(self, name: str, value: Tensor) -> Tensor:
        if self.dtype is not None and value.is_floating_point():
            value = value.to(self.dtype)
        if self.twin is not None and self.twin.quantizes(name):
            return self.twin.round(name, value)
        return value

    def give_back(self, name: str, value: Tensor) -> None:
        """Nobody needs what load gave any more: its memory is read into again."""
        group = self.groups.get(self.aliases.get(name, name))
        if group is not None and group.converter is None and self.is_as_stored(name):
            self.checkpoint.give_back(value)

    def rows(self, name: str, start: int, stop: int, original: bool = False) -> Tensor:
        """Some rows of a parameter that is one tensor of the files, as load has them, those that are new included."""
        name = self.aliases.get(name, name)
        stored = self.groups[name].shapes[name][0]
        value = self.checkpoint.read(self.groups[name].keys[0], min(start, stored), min(stop, stored))
        if not original and self.dtype is not None and value.is_floating_point():
            value = value.to(self.dtype)
        new = max(stop - max(start, stored), 0)
        return torch.cat([value, self._mean(name).to(value).expand(new, *value.shape[1:])]) if new else value

    def is_plain(self, name: str) -> bool:
        """Whether rows can be had of it."""
        group = self.groups.get(self.aliases.get(name, name))
        return (
            group is not None
            and group.converter is None
            and not group.stored_quantized
            and not (self.twin is not None and self.twin.quantizes(name))
            and len(group.shapes[self.aliases.get(name, name)]) > 0
        )

    def _grown(self, name: str, value: Tensor) -> Tensor:
        new = self.shapes[name][0] - value.shape[0] if value.dim() and name in self.shapes else 0
        return torch.cat([value, self._mean(name).to(value).expand(new, *value.shape[1:])]) if new > 0 else value

    def _mean(self, name: str) -> Tensor:
        """Of the rows that the files have: what new ones begin with."""
        if name not in self._means:
            total: Tensor | None = None
            stored = self.groups[name].shapes[name]
            for start, stop in row_blocks(stored):
                part = self.checkpoint.read(self.groups[name].keys[0], start, stop).double().sum(0)
                total = part if total is None else total + part
            assert total is not None
            self._means[name] = (total / stored[0]).float()
        return self._means[name]

    def to_files(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of one group, as its files have them."""
        group = self.groups[next(iter(values))]
        if group.converter is None:
            return {group.keys[0]: next(iter(values.values()))}
        stored = {key: self.checkpoint.tensors[key].shape for key in group.keys}
        made = revert_weight_conversion(_Shapes(self.model, {**self.shapes, **stored}), values)
        if {key: tuple(tensor.shape) for key, tensor in made.items()} != stored:
            raise InputError(
                f"{self.checkpoint.files[0].parent}: transformers cannot write {', '.join(values)} as they were read "
                f"({group.keys[0]} and so on); save the base anew with this version of transformers"
            )
        return made

    def copy(
        self, key: str, writer: Writer, dtype: torch.dtype, name: str | None = None, original: bool = False
    ) -> None:
        """A tensor from file to file, a block at a time; name: of a parameter, whose vocabulary may have grown."""
        shape = writer.places[key].shape
        for start, stop in row_blocks(shape):
            by_name = name is not None and shape
            part = self.rows(str(name), start, stop, original) if by_name else self.checkpoint.read(key, start, stop)
            writer.put(key, part.to(dtype), start)


class _Shapes:
    """Stands for the model where transformers' conversions ask it for the shape that a tensor is to have.

    The model itself has an adapter on, under whose layers its parameters have other names; and what is turned back is
    to have the shape of the files, which for some architectures is that of the model or its transpose.
    """

    def __init__(self, model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]):
        self._model, self._shapes = model, shapes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name], device="meta")


def row_blocks(shape: Sequence[int]) -> Iterable[tuple[int, int]]:
    """(start, stop) of rows that have about BLOCK_BYTES in float32."""
    if not shape:
        return [(0, 1)]
    row = max(4 * torch.Size(shape[1:]).numel(), 1)
    step = max(BLOCK_BYTES // row, 1)
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def owners(model: nn.Module) -> dict[nn.Module, dict[str, str]]:
    """The modules with parameters or saved buffers of their own: {their name in the module: in the model}."""
    saved = model.state_dict().keys()
    found: dict[nn.Module, dict[str, str]] = {}
    for path, module in model.named_modules():
        own: Iterable[str] = [*module._parameters, *module._buffers]
        names = {name: f"{path}.{name}".lstrip(".") for name in own}
        names = {name: full for name, full in names.items() if full in saved}
        if names:
            found[module] = names
    return found
