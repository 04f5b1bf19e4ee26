"""The engine of a run of several processes, settled before TrainingArguments joins a process group."""

import json
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from stagewise.errors import InputError

# What a launcher says to each process; plain python has none of it.
RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_Decided = TypeVar("_Decided")


def settle_engine(args: Any) -> None:
    """Make the engine that a run asks for possible, or say why it is not.

    DeepSpeed wants a process group even for one process, and on CPUs to be told its back end before a model is loaded
    under ZeRO-3. What accelerate launch asks for by environment variables becomes what the flags would have said, so
    that there is one way on from here.

    Args:
        args: TrainingArguments before their __post_init__; deepspeed and fsdp may be changed.

    Raises:
        InputError: a configuration that cannot be read, or whose saved model would be empty; FSDP on CPUs, where
            accelerate would silently train with plain data parallelism; both engines; DeepSpeed is not installed.
    """
    if str(args.fsdp).lower() in ("true", "false"):
        args.fsdp = str(args.fsdp).lower() == "true"
    if _asked_by_accelerate("DEEPSPEED") and not args.deepspeed:
        args.deepspeed = _file_of_accelerate()
    if uses_fsdp(args) and args.deepspeed:
        raise InputError("--fsdp: found beside --deepspeed; give one of them")
    if args.fsdp_config and not uses_fsdp(args):
        raise InputError("--fsdp_config: has no meaning without --fsdp True; add it")
    if uses_fsdp(args):
        _check_fsdp(args)
    _meet_anew(args)
    if args.deepspeed:
        if zero_stage(args) == 3 and not _gathers_when_saving(args):
            raise InputError(
                f"--deepspeed {args.deepspeed}: ZeRO-3 without stage3_gather_16bit_weights_on_model_save writes no "
                "model at all; set it to true in zero_optimization, as zero3.json does"
            )
        _start_deepspeed(args.use_cpu)


def uses_fsdp(args: Any) -> bool:
    """Whether parameters are sharded by FSDP, by --fsdp or by accelerate launch."""
    return bool(args.fsdp) or _asked_by_accelerate("FSDP")


def zero_stage(args: Any) -> int:
    """DeepSpeed's ZeRO stage, 0 without DeepSpeed."""
    return int(deepspeed_settings(args).get("zero_optimization", {}).get("stage", 0))


def deepspeed_settings(args: Any) -> dict:
    """--deepspeed as a dict, {} without it.

    Raises:
        InputError: the file cannot be read.
    """
    if not args.deepspeed:
        return {}
    return _read_json("--deepspeed", args.deepspeed)


def decide_on_first(decide: Callable[[], _Decided]) -> _Decided:
    """What the first process decides, on all of them: they may see other folders, or the same at another time.

    Raises:
        InputError: on all processes, what the first one raised.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return decide()
    found: list = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = decide()
        except InputError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise InputError(found[1])
    return found[0]


def _asked_by_accelerate(engine: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true"


def _file_of_accelerate() -> str:
    name = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if name.lower() == "none":
        raise InputError(
            "accelerate launch: asks for DeepSpeed without a file of its settings; name one in the YAML, under "
            "deepspeed_config: deepspeed_config_file: zero2.json (as accelerate_deepspeed.yaml does)"
        )
    return name


def _check_fsdp(args: Any) -> None:
    if args.use_cpu:
        raise InputError(
            "--fsdp: the run is on CPU, where accelerate does not know it and would train with plain data "
            "parallelism; use --deepspeed zero3.json, which shards on CPUs too, or leave it out"
        )
    if isinstance(args.fsdp_config, str):
        args.fsdp_config = _read_json("--fsdp_config", args.fsdp_config)


def _gathers_when_saving(args: Any) -> bool:
    settings = deepspeed_settings(args)["zero_optimization"]
    return bool(settings.get("stage3_gather_16bit_weights_on_model_save"))


def _read_json(flag: str, value: Any) -> dict:
    if isinstance(value, dict):
        return value
    text = str(value)
    try:
        if not text.lstrip().startswith("{"):
            text = Path(text).read_text(encoding="utf-8")
        found = json.loads(text)
    except OSError as error:
        raise InputError(f"{flag} {value}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{flag} {value}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{flag} {value}: found {type(found).__name__}, expected an object")
    return found


def _start_deepspeed(use_cpu: bool) -> None:
    try:
        import deepspeed
    except ImportError as error:
        raise InputError(
            f"--deepspeed: cannot be imported ({error}); pip install -r requirements.txt, or leave the flag out"
        ) from error
    if not any(name in os.environ for name in RENDEZVOUS[:3]):
        _be_a_world_of_one()
    if use_cpu and not deepspeed.comm.is_initialized():
        # its shared-memory kernel is compiled when first used; gloo does the same work without a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def _meet_anew(args: Any) -> None:
    """Form the group of a restart under keys of its own.

    torchrun's store outlives a restart, and torch takes it for a new one (torch.distributed.rendezvous): processes
    would find the addresses of those that have died, and wait for them until --ddp_timeout.
    """
    import torch
    import torch.distributed as dist

    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    device = "cpu" if args.use_cpu else torch.accelerator.current_accelerator()
    if not args.use_cpu:
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=args.ddp_timeout)
    agent = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, False, timeout)
    dist.init_process_group(
        args.ddp_backend or dist.get_default_backend_for_device(device),
        store=dist.PrefixStore(f"restart/{restart}", agent),
        rank=rank,
        world_size=size,
        timeout=timeout,
    )


def _be_a_world_of_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = ("0", "0", "1", "127.0.0.1", str(port))
    os.environ.update(dict(zip(RENDEZVOUS, values, strict=True)))
