"""What the folder of a model or an adapter holds, found out in seconds: its JSON and the headers of its weights."""

import json
import logging
import re
import shutil
from collections.abc import Collection, Mapping, Set
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stagewise.errors import InputError
from stagewise.modeling.packed_files import check_packed
from stagewise.modeling.untrusted import check_adapter_settings, check_links, check_shard_names, refuse_pickle

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Where transformers looks for weights, in its order: one file, or the index of several.
_WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"
)  # fmt: skip
# What travels with the weights beside configuration and tokenizer: code that auto_map names, how images and sounds are
# read, and the terms.
_COMPANIONS = ("*.py", "*processor_config.json", "chat_template.json", "LICENSE*", "NOTICE*")
# Files that a tokenizer is made of, of any kind.
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "merges.txt")
# What two files of weights are compared by: so many pieces, spread over the whole file.
_PIECES, _PIECE_BYTES = 64, 4096


def local_path(flag: str, name: str) -> Path | None:
    """Where `name` is on this machine; None for a name on the hub (owner/model).

    Raises:
        InputError: it can only be a path, and nothing is there.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"{flag} {name}: no such folder; correct the path (a name on the hub is owner/model)")
    return None


def copy_companions(flag: str, name: str, folder: Path) -> None:
    """Copy what a model has beside weights, configuration and tokenizer, where `folder` has no file of that name.

    name: a folder, or a name on the hub.
    """
    source = local_path(flag, name)
    if source is None:
        from huggingface_hub import snapshot_download

        source = Path(snapshot_download(name, allow_patterns=list(_COMPANIONS), ignore_patterns=["*/*"]))
    for pattern in _COMPANIONS:
        check_links(f"{flag} {name}", source, pattern)
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copy2(path, folder)


def check_model_files(flag: str, name: str, takes_adapter: bool = False, allow_pickle: bool = False) -> None:
    """Look through a model's folder; of a name on the hub nothing is known yet.

    Args:
        takes_adapter: the caller knows what to make of an adapter, which is not looked into.
        allow_pickle: weights need not be safetensors.

    Raises:
        InputError: no folder, no configuration that can be read, or weights that are missing, cut off, or pickled.
    """
    folder = local_path(flag, name)
    if folder is None:
        return
    if folder.is_file():
        raise InputError(f"{flag} {name}: is a file; give the folder of the model that it belongs to")
    if (folder / ADAPTER_CONFIG).is_file():
        if takes_adapter:
            return
        raise InputError(
            f"{flag} {name}: is an adapter, not a model; merge it first and give the result: "
            f"python merge_peft_adapter.py --base_model BASE --lora_model {name} --output_dir {name}-merged"
        )
    if not (folder / CONFIG).is_file():
        runs = sorted(path.name for path in folder.glob("checkpoint-*"))
        inside = f" (inside there is {runs[-1]}, of a run that has not ended)" if runs else ""
        raise InputError(f"{flag} {name}: no {CONFIG} there, so it is no model{inside}; give the folder of one")
    quantized = check_config_file(flag, folder / CONFIG).get("quantization_config")
    files = _check_weights(flag, folder, allow_pickle)
    if isinstance(quantized, dict) and (quantized.get("load_in_4bit") or quantized.get("load_in_8bit")):
        check_packed(flag, files)


def check_config_file(flag: str, path: Path) -> dict:
    """What it says. Raises InputError unless `path` is a configuration that says which architecture it is of."""
    config = read_json(flag, path)
    if not config.get("model_type"):
        raise InputError(f"{flag} {path}: names no model_type, so its architecture is unknown; restore the file")
    return config


def check_tokenizer_files(flag: str, name: str) -> None:
    """Raises InputError for a folder that is not there, or that no tokenizer could be made of."""
    folder = local_path(flag, name)
    if folder is not None and not any(any(folder.glob(pattern)) for pattern in _VOCABULARIES):
        raise InputError(f"{flag} {name}: no tokenizer there (tokenizer.json); give the folder of one")


def check_adapter_files(flag: str, path: str, allow_pickle: bool = False) -> None:
    """Raises InputError unless `path` is a folder with an adapter whose files can be read and stay within it."""
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{flag} {path}: no such folder; give the folder of an adapter")
    if not (folder / ADAPTER_CONFIG).is_file():
        raise InputError(f"{flag} {path}: no {ADAPTER_CONFIG} there; give the folder of an adapter")
    check_links(f"{flag} {path}", folder)
    check_adapter_settings(f"{flag} {path}", read_json(flag, folder / ADAPTER_CONFIG))
    if (folder / ADAPTER_WEIGHTS).is_file():
        tensor_shapes(flag, folder / ADAPTER_WEIGHTS)
    elif (folder / "adapter_model.bin").is_file():
        refuse_pickle(f"{flag} {path}", ["adapter_model.bin"], allow_pickle)
    else:
        raise InputError(f"{flag} {path}: {ADAPTER_CONFIG} is there, but no {ADAPTER_WEIGHTS}; copy it there")


def read_json(flag: str, path: Path) -> dict:
    """The object in a .json file. Raises InputError where it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {path}: cannot be read as JSON ({error}); copy it anew") from None
    if not isinstance(found, dict):
        raise InputError(f"{flag} {path}: found {type(found).__name__}, expected an object; copy it anew")
    return found


def tensor_shapes(flag: str, path: Path) -> Shapes:
    """The tensors of a .safetensors file, from its header; safetensors holds the header against the file's size.

    Raises:
        InputError: cut off, damaged, or something else.
    """
    try:
        with safe_open(path, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        with path.open("rb") as file:
            is_pointer = file.read(40).startswith(b"version https://git-lfs")
        advice = "fetch what it stands for: git lfs pull" if is_pointer else "copy or download it again"
        raise InputError(f"{flag} {path}: is cut off or damaged ({error}); {advice}") from None


def _check_weights(flag: str, folder: Path, allow_pickle: bool) -> list[Path]:
    """The files that are .safetensors."""
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise InputError(
            f"{flag} {folder}: no weights there, neither {_WEIGHTS[0]} nor {_WEIGHTS[1]}; copy them there (random "
            "weights are trained with --config_name)"
        )
    if found.suffix == ".json":
        return _check_shards(flag, found, allow_pickle)
    refuse_pickle(f"{flag} {folder}", [found.name], allow_pickle)
    if found.suffix != ".safetensors":
        return []
    tensor_shapes(flag, found)
    return [found]


def _check_shards(flag: str, index: Path, allow_pickle: bool) -> list[Path]:
    shards = read_json(flag, index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{flag} {index}: has no weight_map, so no shard is known; copy it anew")
    check_shard_names(f"{flag} {index}", shards.values())
    refuse_pickle(f"{flag} {index.parent}", shards.values(), allow_pickle)
    for shard in sorted(set(shards.values())):
        path = index.parent / shard
        if not path.is_file():
            raise InputError(f"{flag} {path}: is missing, and {index.name} names it; copy or download it")
        if path.suffix != ".safetensors":
            continue
        there = tensor_shapes(flag, path)
        missing = [name for name, place in shards.items() if place == shard and name not in there]
        if missing:
            raise InputError(
                f"{flag} {path}: lacks {missing[0]}, which {index.name} says is there; copy both anew from one place"
            )
    return [index.parent / shard for shard in sorted(set(shards.values())) if shard.endswith(".safetensors")]


# What programs write in front of the names of weights, and how the model itself is saved there.
_WRAPPERS = {
    "_orig_mod.": "torch.compile puts it there: save model._orig_mod",
    "module.": "DistributedDataParallel and DeepSpeed put it there: save model.module",
    "base_model.model.": "peft puts it there: save model.merge_and_unload()",
}


# What architectures call the layer that makes a score of a hidden state; peft trains and saves modules of these names.
SCORE_HEADS = ("score", "classifier")
# Heads over the vocabulary, which a reward model leaves behind.
_HEADS = ("lm_head", "embed_out", "output_projection", "head", "decoder", "cls", "logits")


def require_all_weights(what: str, model: Any, found: Mapping[str, Any], draws_head: bool = False) -> None:
    """Hold what transformers found in a model's files against what the architecture is made of.

    Args:
        model: as from_pretrained gave it.
        found: its output_loading_info; tied weights, and what the architecture lets be absent, are not missing there.
        draws_head: the score head is new on purpose, or an adapter brings it.

    Raises:
        InputError: parameters are missing; they would be random.
    """
    parameters = {name for name, _ in model.named_parameters()}
    body = model.base_model_prefix if draws_head else None
    missing, unexpected = refuse_missing(what, parameters, found["missing_keys"], found["unexpected_keys"], body)
    buffers = missing - parameters
    for problem, names in (("has no place for", unexpected), ("should find there, and starts anew", buffers)):
        if names:
            logger.warning("%s: %d tensors that the model %s: %s", what, len(names), problem, _few(names))


def refuse_missing(
    what: str, parameters: Set[str], missing: Collection[str], unexpected: Collection[str], body: str | None = None
) -> tuple[set[str], set[str]]:
    """The same rule on names alone, wherever they come from.

    Args:
        parameters: all of the model.
        missing: its tensors that no file has. unexpected: those of the files that it has no place for.
        body: what the modules below the score head are in, where that head is new on purpose.

    Returns:
        What is left of both: neither a head that is to be drawn, nor the one that it takes the place of.

    Raises:
        InputError: as require_all_weights.
    """
    new, old = (SCORE_HEADS, _HEADS) if body is not None else ((), ())
    missing = {name for name in missing if name.split(".")[0] not in new}
    unexpected = {name for name in unexpected if name.split(".")[0] not in old}
    lost = missing & parameters
    if not lost:
        return missing, unexpected
    prefix = next((p for p in _WRAPPERS if any(name.startswith(p) or f".{p}" in name for name in unexpected)), None)
    if body is not None and not any(name.startswith(f"{body}.") for name in lost):
        advice = (
            "a reward model of this architecture has new layers beside its score, which an adapter would not hold; "
        )
        advice += "choose a base of another architecture"
    elif prefix is not None:
        advice = f"the names in the files begin with {prefix}; {_WRAPPERS[prefix]}, or take {prefix} off the names"
    elif unexpected:
        advice = f"the files have {len(unexpected)} tensors that it has no place for ({_few(unexpected)}); take "
        advice += "configuration and weights from the same model"
    else:
        advice = "the files are not whole; copy or download the model again"
    raise InputError(
        f"{what}: {len(lost)} of {len(parameters)} weights are missing, and would be random: {_few(lost)}; " + advice
    )


def name_passed_over(flag: str, name: str, model: Any) -> None:
    """Say which tensors of a model's folder the architecture passes over in silence, such as layers that predict
    several tokens at once (mtp): what is saved of a model that is trained whole lacks them.
    """
    folder = local_path(flag, name)
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    stored = weight_shapes(flag, folder) if folder is not None and patterns else ()
    own = {*model.state_dict()}
    passed = [name for name in stored if name not in own and any(re.search(pattern, name) for pattern in patterns)]
    if passed:
        logger.warning(
            "%s %s: %d tensors that %s has no use for are not trained, and will not be in what is saved: %s",
            flag, name, len(passed), type(model).__name__, _few(passed),
        )  # fmt: skip


def _few(names: Collection[str], most: int = 4) -> str:
    listed = sorted(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def weight_shapes(flag: str, folder: Path) -> Shapes:
    """The tensors of a model's .safetensors files, from their headers; {} where it has none."""
    single = folder / _WEIGHTS[0]
    files = [single] if single.is_file() else sorted(folder.glob("model-*.safetensors"))
    return {name: shape for path in files for name, shape in tensor_shapes(flag, path).items()}


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold the same weights, going by names, sizes and samples of their files.

    A merge or a training of all weights changes nearly every number, so that samples tell.
    """
    files, others = (sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin")) for path in (one, other))
    if [(path.name, path.stat().st_size) for path in files] != [(path.name, path.stat().st_size) for path in others]:
        return False
    return all(_samples(first) == _samples(second) for first, second in zip(files, others, strict=True))


def _samples(path: Path) -> list[bytes]:
    size = path.stat().st_size
    pieces = []
    with path.open("rb") as file:
        for piece in range(_PIECES):
            file.seek(max(0, size - _PIECE_BYTES) * piece // (_PIECES - 1))
            pieces.append(file.read(_PIECE_BYTES))
    return pieces
