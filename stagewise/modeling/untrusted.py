"""What somebody else's model or adapter may not do when it is read: run code, or reach out of its folder."""

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from stagewise.errors import InputError

# Settings of an adapter that make peft import a module, or read a file, that the setting names.
_REACHING_OUT = {
    "auto_mapping": "names Python modules to import",
    "megatron_config": "has Python modules imported",
    "corda_config": "names files to unpickle",
    "lora_ga_config": "names files to unpickle",
}
# Settings of a model whose value may be the name of a kernel on the hub, which is downloaded and run.
_KERNELS = ("_attn_implementation", "_experts_implementation")


def refuse_pickle(what: str, files: Iterable[str], allow_pickle: bool) -> None:
    """Raises InputError where weights are in files that Python unpickles, unless the user has said that they may."""
    pickled = [name for name in files if not name.endswith(".safetensors")]
    if pickled and not allow_pickle:
        raise InputError(
            f"{what}: the weights are pickled ({pickled[0]}), and unpickling can run code; save them anew as "
            "safetensors, or pass --allow_pickle True to have torch's restricted unpickler read them"
        )


def unpickling_failed(what: str, error: UnpicklingError) -> InputError:
    """What to raise where torch's restricted unpickler has found more than tensors."""
    found = next((line for line in str(error).splitlines() if "global" in line.lower()), "unknown contents")
    return InputError(f"{what}: its pickle holds more than weights, and was not read ({found.strip()}); do not use it")


def check_adapter_settings(what: str, settings: Mapping[str, Any]) -> None:
    """The entries of an adapter_config.json.

    Args:
        what: flag and folder, for the message.

    Raises:
        InputError: an entry that would have a library import a module or read another file.
    """
    for name, does in _REACHING_OUT.items():
        # peft writes transformers' own class there, of an adapter without a task_type
        if settings.get(name) and not (name == "auto_mapping" and _is_transformers(settings[name])):
            raise InputError(f"{what}: {name} in adapter_config.json {does}; remove it if you know the adapter")


def _is_transformers(mapping: Any) -> bool:
    module = mapping.get("parent_library") if isinstance(mapping, dict) else None
    return isinstance(module, str) and module.startswith("transformers.models.")


def check_named_base(what: str, base: Any, trust_remote_code: bool = False) -> None:
    """A base that the adapter names, and not the user.

    Raises:
        InputError: it is no name, a path that climbs (..), or code that comes with it would be run.
    """
    if not isinstance(base, str) or not base:
        raise InputError(f"{what}: adapter_config.json names no base model (found {base!r}); give the base yourself")
    if ".." in PurePosixPath(base.replace("\\", "/")).parts:
        raise InputError(f"{what}: adapter_config.json names its base by a path with .. ({base}); give it yourself")
    if trust_remote_code:
        raise InputError(f"{what}: --trust_remote_code would run the code of {base}, which the adapter names; give it "
                         "yourself")  # fmt: skip


def check_links(what: str, folder: Path, pattern: str = "*") -> None:
    """Links within the folder are fine, and those of the hub's cache (snapshots/commit/file -> ../../blobs/hash).

    Raises:
        InputError: a file is a link to somewhere else, whose content would be read, copied or uploaded.
    """
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in sorted(folder.glob(pattern)):
        target = path.resolve()
        if path.is_symlink() and not any(target.is_relative_to(each) for each in homes):
            raise InputError(f"{what}: {path.name} is a link to {target}, outside of it; put the file itself there")


def check_shard_names(what: str, shards: Iterable[Any]) -> None:
    """Raises InputError where an index names a shard that would not lie beside it."""
    for shard in shards:
        if not isinstance(shard, str) or shard in ("", "..") or shard != PurePosixPath(shard.replace("\\", "/")).name:
            raise InputError(f"{what}: names the shard {shard!r}, which is no file beside it; take the index anew")


def read_config(what: str, name: str, **options: Any) -> PretrainedConfig:
    """The configuration of a model, by AutoConfig, which takes the `options`.

    Raises:
        InputError: code would have to be run; it, or one within it, asks for a kernel from the hub (owner/name).
        OSError, ValueError: AutoConfig's.
    """
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise InputError(
            f"{what}: brings its own Python code: read it, then pass --trust_remote_code True to run it"
        ) from error
    for each in (config, *(getattr(config, part, None) for part in config.sub_configs)):
        for setting in _KERNELS:
            kernel = getattr(each, setting, None)
            if isinstance(kernel, str) and "/" in kernel:
                raise InputError(
                    f"{what}: its configuration asks for the kernel {kernel}, which would be downloaded and run; "
                    f"remove {setting.removeprefix('_')} from config.json"
                )
    return config
