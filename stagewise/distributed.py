"""What has to be settled before TrainingArguments joins a process group."""

import os
import socket

from stagewise.errors import InputError

# What a launcher says to each process; plain python has none of it.
RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def settle_engine(deepspeed: object, fsdp: object, use_cpu: bool) -> None:
    """Make the engine that a run asks for possible, or say why it is not.

    DeepSpeed wants a process group even for one process, and on CPUs to be told its back end before a model is loaded
    under ZeRO-3.

    Args:
        deepspeed, fsdp: as in TrainingArguments; accelerate launch asks for them by environment variables.

    Raises:
        InputError: FSDP on CPUs, where accelerate would silently train with plain data parallelism; DeepSpeed is not
            installed; both are asked for.
    """
    sharded = bool(fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    sped = bool(deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    if sharded and sped:
        raise InputError("--fsdp: found beside --deepspeed; give one of them")
    if sharded and use_cpu:
        raise InputError(
            "--fsdp: the run is on CPU, where accelerate does not know it and would train with plain data parallelism; "
            "use --deepspeed zero3.json, which shards on CPUs too, or leave it out"
        )
    if sped:
        _start_deepspeed(use_cpu)


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


def _be_a_world_of_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = ("0", "0", "1", "127.0.0.1", str(port))
    os.environ.update(dict(zip(RENDEZVOUS, values, strict=True)))
