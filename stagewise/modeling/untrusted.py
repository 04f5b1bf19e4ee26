"""What somebody else's model or adapter may not do when it is read: run code, or reach out of its folder."""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from stagewise.errors import InputError

# Settings of an adapter that make peft import a module, or unpickle a file, that the setting names.
_REACHING_OUT = {
    "auto_mapping": "names Python modules to import",
    "megatron_config": "names Python modules to import",
    "corda_config": "names files to unpickle",
    "lora_ga_config": "names files to unpickle",
}
# Settings of a model whose value may be the name of a kernel on the hub, which is downloaded and run.
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_PICKLE_REMEDY = (
    "unpickling can run code that somebody put there; save them anew as safetensors where you trust them, or pass "
    "--allow_pickle True to read them with torch's restricted unpickler"
)


def refuse_pickle(what: str, names: Iterator[str] | list[str], allow_pickle: bool) -> None:
    """Raises InputError where weights are pickled and the user has not said that they may be."""
    names = list(names)
    if names and not allow_pickle:
        raise InputError(f"{what}: the weights are pickled ({names[0]}): {_PICKLE_REMEDY}")


def check_adapter_settings(what: str, settings: Mapping[str, Any], trust_remote_code: bool = False) -> None:
    """The entries of an adapter_config.json.

    Args:
        what: flag and folder, for the message.
        trust_remote_code: code of the base would be run, wherever the adapter says the base is.

    Raises:
        InputError: an entry that would have a library import something or read another file; a base outside of the
            folders below, or one whose code would be run.
    """
    for name, does in _REACHING_OUT.items():
        if settings.get(name):
            raise InputError(f"{what}: {name} in adapter_config.json {does}; remove the entry if you know the adapter")
    base = settings.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise InputError(f"{what}: base_model_name_or_path in adapter_config.json is {base!r}, expected a name")


def check_named_base(what: str, base: str, trust_remote_code: bool) -> None:
    """A base that the adapter names, and not the user.

    Raises:
        InputError: it is a path that climbs (..), or the base's code would be run.
    """
    if ".." in PurePosixPath(base.replace("\\", "/")).parts:
        raise InputError(f"{what}: names a base by a path with .. ({base}); give the base yourself")
    if trust_remote_code:
        raise InputError(
            f"{what}: with --trust_remote_code give the base yourself, not as the adapter names it: {base}"
        )


def check_links(what: str, folder: Path) -> None:
    """Raises InputError where a file of the folder is a link to somewhere else; the hub's cache links within itself."""
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":  # models--owner--name/snapshots/commit/file -> ../../blobs/hash
        homes.append(home.parent.parent / "blobs")
    for path in sorted(folder.iterdir()):
        target = path.resolve()
        if path.is_symlink() and not any(target.is_relative_to(each) for each in homes):
            raise InputError(f"{what}: {path.name} is a link to {target}, outside of it; put the file itself there")


def check_shard_names(what: str, shards: Mapping[str, Any]) -> None:
    """Raises InputError where an index names a shard that would not lie beside it."""
    for shard in shards.values():
        if not isinstance(shard, str) or shard != PurePosixPath(shard.replace("\\", "/")).name or shard in ("", ".."):
            raise InputError(f"{what}: names the shard {shard!r}, which is no file beside it; take the index anew")


def check_kernels(what: str, config: Mapping[str, Any]) -> None:
    """Raises InputError where a configuration, or one within it, asks for a kernel from the hub (owner/name)."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_kernels(what, value)
        elif name in _KERNELS and isinstance(value, str) and "/" in value:
            raise InputError(
                f"{what}: {name} asks for the kernel {value}, which would be downloaded and run; remove the entry, or "
                f"pass --attn_implementation {value} if you know it"
            )
