"""Merge an adapter module by module, with the weights of one block of layers in memory at a time.

The model is empty (on the meta device) and has its adapter on. While it runs, each block gets its weights from the
base's files when it is called, runs for each variant of them, writes what it has become, and lets go of it. A row of
the input goes through once for each variant: all in one batch, which a block takes apart and puts together again. So
one pass over the base gives the outputs of base, base + adapter, sum and what was saved.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stagewise.errors import InputError
from stagewise.modeling.base_tensors import BaseTensors, Group, owners, row_blocks
from stagewise.modeling.model_files import refuse_missing
from stagewise.modeling.quantization import QuantizedTwin
from stagewise.modeling.tensor_files import Layout, Writer

logger = logging.getLogger(__name__)

# What the rows of the proof's batch run with: the base as the adapter was trained on it, with the adapter on, where it
# is not merged onto the same; the base; base + adapter; their sum in float32; what is saved of it.
TRAINED, BASE, ADAPTER, SUM, SAVED = "trained", "base", "adapter", "sum", "saved"


# Blocks of so many bytes in float32 are run whatever the files of the base are like.
SMALL_BLOCK = 4 * 2**30
# The update and what a cast loses of it are measured in one of so many blocks of rows of a tensor.
MEASURED = 4


@dataclass
class Part:
    """A module of the base with parameters (or saved buffers) of its own.

    names: of its tensors, in the module: in the model.
    layers: peft's, that are around it, the inner ones first.
    trained: what the adapter has in its place (modules_to_save); None where it keeps it.
    given: tensors that the adapter's files have for it: biases, embeddings that have grown.
    before, kept, lent: while its weights are there, by their names in the module: the base's as they were read, what
        the adapter has where the saved ones are in its place, and those that wait to be written.
    """

    module: nn.Module
    names: dict[str, str]
    path: str
    layers: list[nn.Module] = field(default_factory=list)
    wrapper: nn.Module | None = None
    trained: nn.Module | None = None
    given: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    lent: set[str] = field(default_factory=set)

    def changes(self, attribute: str) -> bool:
        """Whether the adapter has anything to do with one of the tensors."""
        return bool(self.layers) or self.trained is not None or attribute in self.given

    @property
    def is_adapted(self) -> bool:
        return any(self.changes(attribute) for attribute in self.names)

    @property
    def target(self) -> nn.Module:
        """The module that is what remains."""
        return self.trained if self.trained is not None else self.module


class StreamedMerge:
    """An adapter and its base, to be added up.

    Args:
        model: the base, on the meta device, with the adapter on; its buffers and the adapter are not.
        parts: the modules of the base, see parts_of.
        tensors: the base's values.
        device: of the arithmetic.
        onto_trained: the adapter is merged onto the values that training saw, where those are not the files'.
        dtype: of the saved weights; None is the one that each has in the files.

    Attributes:
        update, rounding: squares of the adapter's update, and of the errors of the cast, summed up.
        changed: something differs from the base.
    """

    def __init__(self, model: PreTrainedModel, parts: list[Part], tensors: BaseTensors, device: torch.device,
                 onto_trained: bool = True, dtype: torch.dtype | None = None):  # fmt: skip
        self.model, self.parts, self.tensors, self.device = model, parts, tensors, device
        self.onto_trained, self.dtype = onto_trained, dtype
        self.adapters = getattr(model, "peft_config", {})
        self.update = self.rounding = 0.0
        self.changed = False
        self._writer: Writer | None = None
        self._part_of = {name: (part, attribute) for part in parts for attribute, name in part.names.items()}
        self._halves: dict[int, dict[str, Tensor]] = {}
        self._blind = False  # no logits are going to tell what a weight has become
        self._scratch: Tensor | None = None
        self._used: dict[torch.Size, list[Tensor]] = {}  # float32 tensors that nothing needs any more
        self._check_complete()
        self.untied = self._find_untied()
        casts = any(self._casts(name) for name in self._part_of)
        rounds_inputs = self.twin is not None and self.twin.bits == 8
        self.variants = [BASE, ADAPTER, SUM] + ([SAVED] if casts else [])
        if self.twin is not None and (rounds_inputs or not onto_trained):
            self.variants.insert(0, TRAINED)

    @property
    def writer(self) -> Writer:
        assert self._writer is not None
        return self._writer

    @property
    def twin(self) -> QuantizedTwin | None:
        return self.tensors.twin

    def _check_complete(self) -> None:
        folder = self.tensors.checkpoint.files[0].parent
        missing = [
            name
            for name, (part, attribute) in self._part_of.items()
            if not (self.tensors.holds(name) or attribute in part.given or part.trained is not None)
        ]
        parameters = {
            name for name, (part, attribute) in self._part_of.items() if attribute in part.module._parameters
        }
        body = self.model.base_model_prefix if self.model.get_output_embeddings() is None else None
        refuse_missing(f"--base_model {folder}", parameters, missing, self.tensors.unknown, body)
        if missing:  # buffers
            raise InputError(
                f"--base_model {folder}: lacks {missing[0]}; give the base that the adapter was trained on"
            )

    def _find_untied(self) -> set[str]:
        """Parameters that were the same as another one, and are no more."""
        return {
            name
            for name, other in self.tensors.aliases.items()
            if name in self._part_of and other in self._part_of and not self._stays_tied(name, other)
        }

    def _stays_tied(self, name: str, other: str) -> bool:
        (part, attribute), (source, source_attribute) = self._part_of[name], self._part_of[other]
        if not part.changes(attribute) and not source.changes(source_attribute):
            return True
        if part.trained is not None and source.trained is not None:
            return _same(getattr(part.trained, attribute), getattr(source.trained, source_attribute))
        if part.layers or source.layers:
            layers = {id(layer) for layer in source.layers}
            return any(id(getattr(layer, "tied_adapter", None)) in layers for layer in part.layers)
        given = part.given.get(attribute), source.given.get(source_attribute)
        return given[0] is not None and given[1] is not None and _same(given[0], given[1])

    # What is written.

    def _saved_dtype(self, name: str) -> torch.dtype:
        if not self.tensors.holds(name):
            return self.dtype or self.tensors.main_dtype()
        found = self.tensors.dtype_of(name)
        if self.dtype is None or not found.is_floating_point or not self._is_weight(name):
            return found
        return self.dtype

    def _casts(self, name: str) -> bool:
        dtype = self._saved_dtype(name)
        return dtype.is_floating_point and dtype != torch.float32

    def _is_weight(self, name: str) -> bool:
        """Neither a buffer nor one that the architecture keeps in float32: those stay what they are."""
        held = {*(self.model._keep_in_fp32_modules or ()), *(self.model._keep_in_fp32_modules_strict or ())}
        part, attribute = self._part_of[name]
        return attribute in part.module._parameters and held.isdisjoint(name.split("."))

    def layout(self, keeps_unknown: bool = True) -> list[Layout]:
        """The files to write: those of the base, without what nothing reads; what is new comes last.

        keeps_unknown: tensors that are nothing to the model travel all the same, as they are.
        """
        checkpoint = self.tensors.checkpoint
        files: dict[Any, Layout] = {path: {} for path in checkpoint.files}
        names = {key: (name, group) for name, group in self.tensors.groups.items() for key in group.keys}
        for key, stored in checkpoint.tensors.items():
            if key in names:
                name, group = names[key]
                if group.stored_quantized and key != group.keys[0]:
                    continue
                shape = stored.shape if group.converter else self._shape(name)
                files[stored.file][key] = (self._saved_dtype(name) if name in self._part_of else stored.dtype, shape)
            elif keeps_unknown and key in self.tensors.unknown:
                files[stored.file][key] = (stored.dtype, stored.shape)
        last = files[checkpoint.files[-1]]
        for name in self._part_of:
            if name not in self.tensors.groups and (name in self.untied or not self.tensors.holds(name)):
                last[name] = (self._saved_dtype(name), self._shape(name))
        return [layout for layout in files.values() if layout]

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.shapes[name]

    # Running.

    def run(self, ids: Tensor, writer: Writer) -> dict[str, Tensor]:
        """Write all tensors, and prove it.

        Args:
            ids: (R, T); T is less than R, so that what a block gets for each row can be told by its first size.

        Returns:
            By variant the logits (R, T, V), or the scores (R, 1) of a reward model, in float32 on the CPU; of the
            base those of the first row alone, which show how much the adapter changes. Where nothing but the cast of
            float32 to float32 lies between them, the saved ones are those of the sum. {} where the model does not let
            itself be run block by block; all is written then as well.
        """
        self._writer = writer
        self.rows = {variant: 1 if variant == BASE else len(ids) for variant in self.variants}
        stages, loose = self._stages()
        originals = [(module, module.__dict__.get("forward")) for module in stages]
        outputs: dict[str, Tensor] = {}
        self._move()
        for part in loose:
            self._load(part)
        try:
            self._check_room(stages)
            for module, parts in stages.items():
                run = self._run_whole if self._is_lean(module, parts) else self._run_block
                module.forward = partial(run, module, parts, module.forward)  # type: ignore[method-assign]
            with torch.no_grad():
                batch = torch.cat([ids[:count] for count in self.rows.values()]).to(self.device)
                logits = self.model(input_ids=batch, use_cache=False).logits.float().cpu()
            outputs = dict(zip(self.variants, logits.split(list(self.rows.values())), strict=True))
            outputs.setdefault(SAVED, outputs[SUM])
        except (InputError, OSError):
            raise
        except Exception as error:  # code of the model's own, which looks at weights in ways of its own
            logger.warning("%s cannot be run block by block (%s: %s): the proof is on weights alone",
                           type(self.model).__name__, type(error).__name__, error)  # fmt: skip
        finally:
            for module, forward in originals:
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.forward = forward
        self._blind = True
        for part in self.parts:
            self._finish(part)
        self._copy_unknown()
        writer.finish()
        return outputs

    def _move(self) -> None:
        """The adapter, and what the model has made itself, to where the arithmetic is."""
        for module in self.model.modules():
            for parameter in module._parameters.values():
                if parameter is not None and not parameter.is_meta:
                    parameter.data = parameter.data.to(self.device)
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)

    def _check_room(self, stages: dict[nn.Module, list[Part]]) -> None:
        """Raises ValueError where a block in float32 is more than two files of the base, and not small either."""
        numbers = {
            module: sum(torch.Size(self._shape(name)).numel() for part in parts for name in part.names.values())
            for module, parts in stages.items()
            if not self._is_lean(module, parts)
        }
        sizes: dict[Any, int] = {}
        for stored in self.tensors.checkpoint.tensors.values():
            sizes[stored.file] = sizes.get(stored.file, 0) + stored.size
        needed, room = 4 * max(numbers.values(), default=0), max(2 * max(sizes.values()), SMALL_BLOCK)
        if needed > room:
            raise ValueError(
                f"a block has {needed / 2**30:.1f} GiB in float32, two files of the base {room / 2**30:.1f}"
            )

    def _stages(self) -> tuple[dict[nn.Module, list[Part]], list[Part]]:
        """The modules that are called with all their weights in memory, and parts that always are."""
        parts = {part.module: part for part in self.parts}
        stages: dict[nn.Module, list[Part]] = {}
        loose: list[Part] = []

        def inside(module: nn.Module) -> list[Part]:
            return [parts[each] for each in module.modules() if each in parts]

        def visit(module: nn.Module) -> None:
            lists = any(isinstance(each, nn.ModuleList) for each in module.modules())
            if (module in parts or _is_peft_layer(module)) and not lists:
                stages[module] = inside(module)
                return
            if module in parts:
                loose.append(parts[module])
            for child in module.children():
                if isinstance(module, nn.ModuleList):
                    stages[child] = inside(child)
                else:
                    visit(child)

        visit(self.model)
        return {module: found for module, found in stages.items() if found}, loose

    def _run_block(self, module: nn.Module, parts: list[Part], forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """Called in place of a block's forward: each variant of its weights with the rows that are its."""
        inputs = [self._take(variant, (args, kwargs)) for variant in self.variants]
        whole = _tensors((args, kwargs))
        is_split = any(one is not other for one, other in zip(_tensors(inputs[0]), whole, strict=True))
        outputs = []
        try:
            for variant, (own_args, own_kwargs) in zip(self.variants, inputs, strict=True):
                for part in parts:
                    self._enter(part, variant)
                outputs.append(forward(*own_args, **own_kwargs))
            for part in parts:
                self._settle(part)
        finally:
            for part in parts:
                self._release(part)
        return _join(outputs) if is_split else _spread(outputs, list(self.rows.values()))

    def _take(self, variant: str, inputs: Any) -> Any:
        """The rows of one variant. What has another first size (a mask for all, positions) belongs to all of them."""
        if isinstance(inputs, Tensor):
            size, rows = inputs.shape[0] if inputs.dim() else 0, list(self.rows.values())
            if not size or size % sum(rows):
                return inputs
            return inputs.split([size // sum(rows) * count for count in rows])[self.variants.index(variant)]
        if isinstance(inputs, Mapping):
            return {key: self._take(variant, value) for key, value in inputs.items()}
        if isinstance(inputs, (tuple, list)):
            return type(inputs)([self._take(variant, value) for value in inputs])
        return inputs

    def _enter(self, part: Part, variant: str) -> None:
        if variant == self.variants[0]:
            self._load(part, original=False if variant == TRAINED else not self.onto_trained)
            self._use_quantized(part, variant == TRAINED)
        elif self.variants[0] == TRAINED and variant == BASE:
            self._use_quantized(part, False)
            if not self.onto_trained:
                self._load(part, original=True)
        if variant in (TRAINED, BASE):
            _enable(part, variant == TRAINED)
            self._give(part, variant == TRAINED)
        elif variant == ADAPTER:
            _enable(part, True)
            self._give(part, True)
        elif variant == SUM:
            self._merge(part)
        else:
            self._settle(part, keep=True)

    def _load(self, part: Part, original: bool = False) -> None:
        """The base's values in float32."""
        part.before.clear()
        for attribute, name in part.names.items():
            holds = self.tensors.holds(name)
            value = self.tensors.load(name, original) if holds else torch.zeros(self._shape(name))
            _put(part.module, attribute, self._computed(value))
            if part.changes(attribute) and holds:
                part.before[attribute] = value

    def _computed(self, value: Tensor) -> Tensor:
        """A copy in float32, on the device, in memory that was used before: to be given fresh pages costs more."""
        if not value.is_floating_point():
            return value.to(self.device)
        used = self._used.get(value.shape)
        return (used.pop() if used else torch.empty(value.shape, device=self.device)).copy_(value)

    def _give(self, part: Part, given: bool) -> None:
        for attribute, tensor in part.given.items():
            before = part.before.get(attribute)
            value = tensor if given else before if before is not None else torch.zeros(tensor.shape)
            _put(part.module, attribute, self._computed(value))
        for layer in part.layers if given else ():
            _take_start(layer, self.adapters)

    def _use_quantized(self, part: Part, use: bool) -> None:
        layer = self.twin.layer(part.path) if self.twin is not None else None
        if layer is None:
            return
        part.module.__dict__.pop("forward", None)
        if use:
            layer.bias = getattr(part.module, "bias", None)
            part.module.forward = layer.forward  # type: ignore[method-assign]
        else:
            assert self.twin is not None
            self.twin.forget(part.path)

    @torch.no_grad()
    def _merge(self, part: Part) -> None:
        for layer in part.layers:
            _merge_layer(layer)

    @torch.no_grad()
    def _settle(self, part: Part, keep: bool = False) -> None:
        """Write what the module has become, once; keep: let it go on with what was written."""
        for attribute, name in part.names.items():
            key = self._written_as(name)
            if key is not None and self.writer_has(name, key):
                key = None
            keeps = keep and not self._is_exact(part, attribute)
            if key is not None or keeps:
                self._settle_one(part, attribute, key, keeps)

    def _settle_one(self, part: Part, attribute: str, key: str | None, keep: bool) -> None:
        """A block of rows at a time, which writing needs no more memory for, whatever else is waiting."""
        name, value = part.names[attribute], getattr(part.target, attribute).detach()
        dtype, kept = self._saved_dtype(name), value
        casts = dtype != value.dtype
        if keep and casts and part.trained is not None:
            part.kept[attribute] = value
            kept = value.clone()
            _put(part.target, attribute, kept)
        group = self.tensors.groups.get(name)
        whole = group is not None and group.converter is not None
        saved = torch.empty_like(value, dtype=dtype) if whole and casts else value
        # LoRA changes all rows, what is trained in another way may change few
        every = MEASURED if part.layers and all(hasattr(layer, "lora_A") for layer in part.layers) else 1
        for number, (start, stop) in enumerate(row_blocks(value.shape)):
            rows = (slice(start, stop) if value.dim() else ...,)
            new = value[rows]
            sends = key is not None and not whole
            block = self.writer.block(str(key), new.shape).copy_(new) if sends else new.to(dtype)
            if key is not None and part.changes(attribute):
                self._measure(part, attribute, rows, new, block, number % every == 0)
            if keep and casts:
                kept[rows] = block
            if sends:
                self.writer.send(str(key), block, start)
            elif casts:
                saved[rows] = block
        if key is not None and group is not None and whole:
            self._write_group(group, name, saved)
        if key is not None and whole and not casts:
            part.lent.add(attribute)

    def _measure(self, part: Part, attribute: str, rows: tuple, new: Tensor, saved: Tensor, fully: bool) -> None:
        """What the adapter has made of some rows, and what the cast has; not fully: that they are numbers, where no
        logits would tell.
        """
        fully = fully or (self._blind and not self.changed)
        if not (fully or self._blind):
            return
        if not torch.linalg.vector_norm(saved, dtype=torch.float32).isfinite():
            raise InputError(f"{part.names[attribute]}: is not finite once merged; is the adapter broken?")
        if not fully:
            return
        before = part.before.get(attribute)
        update = self._distance(new, before[rows] if before is not None else None)
        self.changed = self.changed or update > 0
        if part.layers:
            self.update += update
            self.rounding += self._distance(new, saved) if saved.dtype != new.dtype else 0.0

    def _is_exact(self, part: Part, attribute: str) -> bool:
        """Whether a tensor is saved as the file has it."""
        name = part.names[attribute]
        if part.changes(attribute) or not self._is_unchanged(name):
            return False
        return self._saved_dtype(name) == self.tensors.dtype_of(name)

    def _is_unchanged(self, name: str) -> bool:
        return not self.onto_trained or self.tensors.is_as_stored(name)

    def _distance(self, one: Tensor, other: Tensor | None) -> float:
        """The sum of squares of one - other; None is zero. `one` is in float32."""
        if other is None:
            return torch.linalg.vector_norm(one).item() ** 2
        if self._scratch is None or self._scratch.numel() < one.numel():
            self._scratch = torch.empty(one.numel(), device=self.device)
        difference = self._scratch[: one.numel()].view(one.shape).copy_(other).sub_(one)
        return torch.linalg.vector_norm(difference).item() ** 2

    def _written_as(self, name: str) -> str | None:
        """The name in the files; None where it is not written, being tied."""
        group = self.tensors.groups.get(name)
        if group is not None:
            return group.keys[0]
        return name if name in self.untied or not self.tensors.holds(name) else None

    def writer_has(self, name: str, key: str | None) -> bool:
        if key is None:
            return True
        group = self.tensors.groups.get(name)
        return self.writer.is_whole(key) or (group is not None and name in self._halves.get(id(group), {}))

    def _write_group(self, group: Group, name: str, value: Tensor) -> None:
        """Parameters that the files have in another shape wait until those are there that belong to them."""
        halves = self._halves.setdefault(id(group), {})
        halves[name] = value
        if halves.keys() == group.shapes.keys():
            for key, tensor in self.tensors.to_files(halves).items():
                self.writer.put(key, tensor)
            halves.clear()

    def _release(self, part: Part) -> None:
        self._use_quantized(part, False)
        lent, part.lent = part.lent, set()
        for attribute, value in part.kept.items():
            _put(part.target, attribute, value)
        part.kept.clear()
        for attribute, value in part.before.items():
            self.tensors.give_back(part.names[attribute], value)
        part.before.clear()
        for layer in part.layers:
            _forget_merge(layer)
        for attribute, name in part.names.items():
            value = getattr(part.module, attribute).detach()
            if value.dtype == torch.float32 and not value.is_meta and attribute not in lent:
                self._used.setdefault(value.shape, []).append(value)
            _put(part.module, attribute, torch.empty(self._shape(name), device="meta"))

    def _finish(self, part: Part) -> None:
        """Write what the proof has not come to."""
        waiting = {name for name in part.names.values() if not self.writer_has(name, self._written_as(name))}
        if not waiting:
            self._release(part)
            return
        if not part.is_adapted and all(self._copies(name) for name in waiting):
            for name in waiting:
                group = self.tensors.groups[name]
                for key in group.keys:
                    if not self.writer.is_whole(key):
                        plain = name if self.tensors.is_plain(name) else None
                        original = not self.onto_trained
                        self.tensors.copy(key, self.writer, self._saved_dtype(name), plain, original)
        else:
            self._load(part, original=not self.onto_trained)
            _enable(part, True)
            self._give(part, True)
            self._merge(part)
            self._settle(part)
        self._release(part)

    def _copies(self, name: str) -> bool:
        """Whether a parameter goes from file to file without being made."""
        group = self.tensors.groups.get(name)
        if group is None:
            return False
        if self.tensors.is_plain(name):
            return True
        return self._is_unchanged(name) and not group.stored_quantized and not self._is_touched(group)

    def _is_touched(self, group: Group) -> bool:
        found = [self._part_of[name] for name in group.shapes if name in self._part_of]
        return any(part.changes(attribute) for part, attribute in found) or bool(self._halves.get(id(group)))

    def _copy_unknown(self) -> None:
        for key in self.writer.places:
            if not self.writer.is_whole(key) and key in self.tensors.unknown:
                self.tensors.copy(key, self.writer, self.tensors.checkpoint.dtype(key))

    # Embedding and head, which have a block's weights alone: never whole, where the adapter leaves them be.

    def _is_lean(self, module: nn.Module, parts: list[Part]) -> bool:
        if len(parts) != 1 or parts[0].module is not module or parts[0].is_adapted:
            return False
        if not self.onto_trained or not self.tensors.is_plain(parts[0].names.get("weight", "")):
            return False
        return module is self.model.get_input_embeddings() or type(module) is nn.Linear

    def _run_whole(self, module: Any, parts: list[Part], forward: Callable, inputs: Tensor, *args: Any) -> Tensor:
        name = parts[0].names["weight"]
        dtype = self._saved_dtype(name)
        cast = SAVED in self.variants and dtype != self.tensors.dtype_of(name)
        last = len(inputs) // sum(self.rows.values()) * self.rows[SAVED] if cast else 0
        pieces = [inputs[:-last], inputs[-last:]] if cast else [inputs]
        bias = self.tensors.load(parts[0].names["bias"]).float() if "bias" in parts[0].names else None
        made = []
        for number, piece in enumerate(pieces):
            read = partial(self._read, name, dtype if number else None)
            if isinstance(module, nn.Embedding):
                made.append(_look_up(module, forward, piece, read))
            else:
                out = torch.empty(*piece.shape[:-1], self._shape(name)[0], device=piece.device)
                for start, stop in row_blocks(self._shape(name)):
                    out[..., start:stop] = nn.functional.linear(piece, read(start, stop))
                made.append(out if bias is None else out + bias.to(out))
        return torch.cat(made) if cast else made[0]

    def _read(self, name: str, cast: torch.dtype | None, start: int, stop: int) -> Tensor:
        rows = self.tensors.rows(name, start, stop)
        return (rows if cast is None else rows.to(cast)).to(self.device).float()


def _look_up(module: nn.Embedding, forward: Callable, ids: Tensor, read: Callable[[int, int], Tensor]) -> Tensor:
    """The embedding's own forward, on a table of the rows that are looked up."""
    used, places = ids.unique(return_inverse=True)
    whole, padding = module.weight, module.padding_idx
    module.weight = nn.Parameter(torch.cat([read(row, row + 1) for row in used.tolist()]), requires_grad=False)
    module.padding_idx = None
    try:
        return forward(places)
    finally:
        module.weight, module.padding_idx = whole, padding


def parts_of(model: PreTrainedModel) -> list[Part]:
    """The modules of an empty base; to be called before its adapter is put on."""
    paths = {module: path for path, module in model.named_modules()}
    return [Part(module, names, paths[module]) for module, names in owners(model).items()]


def read_adapter(peft_model: Any, parts: Iterable[Part], folder: str) -> None:
    """Give a PeftModel on the meta device its adapter's weights, and each part what of the adapter is about it.

    Raises:
        InputError: the adapter's files lack some of its weights.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    shared = _sharing(peft_model)
    for module in peft_model.modules():
        if hasattr(module, "_move_adapter_to_device_of_base_layer"):  # to meta, where its weights would be lost
            module._move_adapter_to_device_of_base_layer = lambda *args, **kwargs: None
    set_peft_model_state_dict(peft_model, load_peft_weights(folder, device="cpu"), low_cpu_mem_usage=True)
    for places in shared:
        real = [module._parameters[name] for module, name in places if not module._parameters[name].is_meta]
        for module, name in places:
            if real and module._parameters[name].is_meta:
                module._parameters[name] = real[0]
    for parameter in peft_model.parameters():
        if not parameter.is_meta and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    _tell_parts(peft_model, {part.module: part for part in parts}, folder)


def _tell_parts(peft_model: Any, parts: dict[nn.Module, Part], folder: str) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for module in peft_model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            _read_trained(module, parts, folder)
        elif isinstance(module, BaseTunerLayer):
            if module.get_base_layer() in parts:
                parts[module.get_base_layer()].layers.insert(0, module)
            _require_whole(module, folder)
    for part in parts.values():
        for attribute, parameter in part.module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                part.given[attribute] = parameter.detach()
                _put(part.module, attribute, torch.empty_like(parameter, device="meta"))


def _sharing(model: nn.Module) -> list[list[tuple[Any, str]]]:
    """Where each parameter is that has several places: to be tied again after peft has set them one by one."""
    places: dict[int, list[tuple[Any, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return [found for found in places.values() if len(found) > 1]


def _read_trained(wrapper: Any, parts: dict[nn.Module, Part], folder: str) -> None:
    (trained,) = wrapper.modules_to_save.values()
    for original, copied in zip(wrapper.original_module.modules(), trained.modules(), strict=True):
        if original not in parts:
            continue
        parts[original].trained, parts[original].wrapper = copied, wrapper
        for attribute in parts[original].names:
            if getattr(copied, attribute).is_meta:
                raise InputError(
                    f"--lora_model {folder}: lacks {parts[original].names[attribute]}, which its settings say it "
                    "trained; copy the adapter anew"
                )


def _require_whole(layer: Any, folder: str) -> None:
    for kind in layer.adapter_layer_names:
        held = getattr(layer, kind, None)
        for name, parameter in held.named_parameters() if isinstance(held, nn.Module) else ():
            if parameter.is_meta:
                raise InputError(f"--lora_model {folder}: lacks {kind} ({name}) of a layer; copy the adapter anew")


def _is_peft_layer(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def _enable(part: Part, on: bool) -> None:
    for layer in part.layers:
        layer.enable_adapters(on)
    if part.wrapper is not None:
        part.wrapper.enable_adapters(on)


@torch.no_grad()
def _take_start(layer: Any, configs: Mapping[str, Any]) -> None:
    """Let peft change the base where an adapter did not begin at zero: by what it began with (PiSSA, OLoRA, LoftQ)."""
    for adapter in getattr(layer, "lora_A", ()):
        start = configs[adapter].init_lora_weights
        kind = start.partition("_")[0].lower() if isinstance(start, str) else None
        if kind not in ("pissa", "olora", "loftq"):
            continue
        trained = layer.lora_A[adapter].weight.data, layer.lora_B[adapter].weight.data
        if kind == "pissa":
            layer.pissa_init(adapter, start)
        elif kind == "olora":
            layer.olora_init(adapter)
        else:
            layer.loftq_init(adapter, configs[adapter])
        layer.lora_A[adapter].weight.data, layer.lora_B[adapter].weight.data = trained


def _merge_layer(layer: Any) -> None:
    """peft's merge into the base's weight; of plain LoRA a block of rows at a time, as if each were a layer.

    What peft adds is then made in memory that is used again, which takes half the time of fresh memory.
    """
    from peft.tuners.lora import Linear

    if type(layer) is not Linear or layer.lora_variant or layer.fan_in_fan_out or any(layer.lora_bias.values()):
        layer.merge(safe_merge=False)
        return
    ((adapter, lora_b),) = layer.lora_B.items()
    base = layer.get_base_layer()
    weight, up = base.weight, lora_b.weight
    for start, stop in row_blocks(weight.shape):
        base.weight = nn.Parameter(weight.detach()[start:stop], requires_grad=False)
        lora_b.weight = nn.Parameter(up.detach()[start:stop], requires_grad=False)
        layer.merge(safe_merge=False)
        layer.merged_adapters.clear()
    base.weight, lora_b.weight = weight, up
    layer.merged_adapters.append(adapter)


def _forget_merge(layer: Any) -> None:
    """Tell a peft layer that its base has a fresh weight."""
    layer.merged_adapters.clear()
    if hasattr(layer, "_caches"):
        layer._caches.clear()


def _put(module: nn.Module, attribute: str, value: Tensor) -> None:
    if attribute in module._buffers:
        module._buffers[attribute] = value
    else:
        module._parameters[attribute] = nn.Parameter(value, requires_grad=False)


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one, other))


def _tensors(inputs: Any) -> list[Tensor]:
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    return [tensor for each in inputs for tensor in _tensors(each)] if isinstance(inputs, (tuple, list)) else []


def _spread(outputs: Sequence[Any], rows: Sequence[int]) -> Tensor:
    """What a module makes of an input that all rows share (positions): one output, or one for each row."""
    first = outputs[0]
    if all(torch.equal(output, first) for output in outputs):
        return first
    if first.shape[0] != 1:
        raise ValueError(f"an output of the shape {tuple(first.shape)} belongs to no rows")
    return torch.cat([output.expand(count, *output.shape[1:]) for output, count in zip(outputs, rows, strict=True)])


def _join(outputs: Sequence[Any]) -> Any:
    """What the variants of a block gave, as one batch again."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(list(outputs)) if first.dim() else first
    if isinstance(first, Mapping):
        return type(first)({key: _join([output[key] for output in outputs]) for key in first})  # type: ignore[call-arg]
    if isinstance(first, (tuple, list)):
        return type(first)([_join(each) for each in zip(*outputs, strict=True)])
    return first
