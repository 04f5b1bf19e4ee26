"""Several processes: their engine, settled before TrainingArguments joins a process group; waiting for each other."""

import functools
import itertools
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from stagewise.errors import InputError, ProcessLost

logger = logging.getLogger(__name__)

# What a launcher says to each process; plain python has none of it.
RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Of processes that wait for each other, in seconds: between two looks; between two signs of life; without one, until a
# process counts as dead (work in one long call of C may hold its thread back); between two lines in the log; for the
# others to hear of a failure, before the process that failed ends and may take the store with it.
LOOK_S, BEAT_S, DEAD_S, SAY_S, HEAR_S = 0.5, 10.0, 300.0, 300.0, 20.0

_Decided = TypeVar("_Decided")
_numbers = itertools.count()  # of meetings, which all processes hold in the same order


def settle_engine(args: Any) -> None:
    """Make the engine that a run asks for possible, or say why it is not.

    DeepSpeed wants a process group even for one process, and on CPUs to be told its back end before a model is loaded
    under ZeRO-3. What accelerate launch asks for by environment variables becomes what the flags would have said, so
    that there is one way on from here.

    Args:
        args: TrainingArguments before their __post_init__; deepspeed and fsdp may be changed, parallelism_config is
            read into sp_size.

    Raises:
        InputError: a configuration that cannot be read, or whose saved model would be empty; FSDP on CPUs, where
            accelerate would silently train with plain data parallelism; both engines; a kind of parallelism that was
            never shown right; DeepSpeed is not installed.
    """
    if str(args.fsdp).lower() in ("true", "false"):
        args.fsdp = str(args.fsdp).lower() == "true"
    if _asked_by_accelerate("DEEPSPEED") and not args.deepspeed:
        args.deepspeed = _file_of_accelerate()
    args.sp_size = _settle_rows(args)
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


def _settle_rows(args: Any) -> int:
    """How many processes share each row, from --parallelism_config or accelerate launch.

    accelerate is not told: it would have DeepSpeed do it, see stagewise.modeling.sequence_parallel.
    """
    flag, asked = "--parallelism_config", {}
    if args.parallelism_config:
        asked = _read_json(flag, args.parallelism_config)
    elif _asked_by_accelerate("PARALLELISM_CONFIG"):
        flag = "accelerate launch: parallelism_config"
        variables = {f"{kind}_size": f"PARALLELISM_CONFIG_{kind.upper()}_SIZE" for kind in _CUTS}
        asked = {name: os.environ[variable] for name, variable in variables.items() if variable in os.environ}
        os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "false"
    args.parallelism_config = None
    sizes = _sizes(flag, asked)
    size, world = sizes["sp"], int(os.environ.get("WORLD_SIZE", 1))
    if world % size:
        raise InputError(f"{flag}: sp_size {size} does not divide the {world} processes; start a multiple of it")
    copies = sizes["dp_replicate"] * sizes["dp_shard"]
    if copies not in (1, world // size):
        raise InputError(
            f"{flag}: dp_replicate_size x dp_shard_size is {copies}, and {world} processes are {world // size} times "
            f"sp_size {size}; leave them out, --fsdp and --deepspeed say what is shared out"
        )
    if size > 1:
        _check_shared_rows(flag, args)
    return size


_CUTS = ("dp_replicate", "dp_shard", "cp", "tp", "sp")
_NEVER_SHOWN = {
    "cp": "torch's context parallelism has attention for CUDA alone, so that it could not be shown on two processes "
    'to be right; give {"sp_size": N}, which shares out the heads, under DDP, --deepspeed or --fsdp',
    "tp": "tensor parallelism was never shown on two processes to be right; use --deepspeed zero3.json or --fsdp True "
    'for a model that does not fit, and {"sp_size": N} for long rows',
}


def _sizes(flag: str, asked: dict) -> dict[str, int]:
    """Processes by what they cut; 1 where it is not asked for."""
    known = {f"{kind}_size": kind for kind in _CUTS}
    sizes = dict.fromkeys(_CUTS, 1)
    for name, value in asked.items():
        if name == "sp_backend" and value == "deepspeed":
            continue  # accelerate's only one, whose way with heads this is
        if name not in known:
            raise InputError(f'{flag}: found {name!r}; give {{"sp_size": N}}, N processes for each row, and no more')
        if not str(value).isdecimal() or int(value) < 1:
            raise InputError(f"{flag}: found {value!r} for {name}, expected a number of processes")
        sizes[known[name]] = int(value)
    for kind, why in _NEVER_SHOWN.items():
        if sizes[kind] > 1:
            raise InputError(f"{flag}: {kind}_size {sizes[kind]}: {why}")
    return sizes


def _check_shared_rows(flag: str, args: Any) -> None:
    """What takes a process's part of a row for the row; see also stagewise.modeling.sequence_parallel.check_shards."""
    sharing = _read_json("--accelerator_config", args.accelerator_config or {})
    averages = args.average_tokens_across_devices
    dealt, rebalances = "deals rows out to single processes", args.train_sampling_strategy == "batch_rebalance"
    refused = {
        "--neftune_noise_alpha goes by the length of a whole text; leave it out": args.neftune_noise_alpha,
        "--torch_compile was never shown there to be right; leave it out": args.torch_compile,
        "--use_liger_kernel was never shown there to be right; leave it out": args.use_liger_kernel,
        "--average_tokens_across_devices False has a mean of each; leave it out": not averages,
        f"--train_sampling_strategy batch_rebalance {dealt}; use group_by_length": rebalances,
        f"--accelerator_config with dispatch_batches {dealt}; leave that out": sharing.get("dispatch_batches"),
        f"--accelerator_config with split_batches {dealt}; leave that out": sharing.get("split_batches"),
    }
    for why, found in refused.items():
        if found:
            raise InputError(f"{flag}: several processes share a row, and {why}")


def groups_of_rows(args: Any) -> int:
    """How many batches are computed at once: processes, or where several share each row, groups of them.

    args: TrainingArguments, also another library's, which share no rows.
    """
    return args.world_size // getattr(args, "sp_size", 1)


@functools.cache
def sequence_group(size: int) -> Any:
    """The group of `size` neighbouring processes that this one shares rows with."""
    import torch.distributed as dist

    ranks = range(dist.get_world_size())
    groups = [dist.new_group(list(ranks[first : first + size])) for first in ranks[::size]]
    return groups[dist.get_rank() // size]


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

    It may take as long as it wants.

    Raises:
        InputError: on all processes, what the first one raised.
        ProcessLost: the first process has ended.
    """
    import torch.distributed as dist

    if not _is_group():
        return decide()
    found: list = [None]
    with _Meeting("a decision") as meeting:
        if dist.get_rank() == 0:
            found[0] = decide()
        meeting.wait_for_all("decided")
    dist.broadcast_object_list(found)
    return found[0]


@contextmanager
def first_process_first(args: Any, what: str) -> Iterator[None]:
    """The body on the first process of each machine, then on the others; nobody goes on before all have been through.

    The others wait as long as it takes. TrainingArguments.main_process_first has them wait in a collective, which
    ends the run after --ddp_timeout; and so would the first collective behind the body.

    Args:
        args: the TrainingArguments.
        what: the work, for the log.

    Raises:
        InputError: on all processes, what one of them raised in the body.
        ProcessLost: another process has ended, or has failed in another way.
    """
    if not _is_group():
        yield
        return
    first = args.local_process_index == 0
    with _Meeting(what) as meeting:
        if not first:
            meeting.wait_for_all("firsts")
        yield
        if first:
            meeting.wait_for_all("firsts")
        meeting.wait_for_all("others")


def _is_group() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _group_store() -> Any:
    """The key-value store in which the group has met; torch has no public way to it."""
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()


class _Meeting:
    """What the processes of a group tell each other through its store while some of them work for long.

    A thread of each process gives a sign of life, and looks for that of the next process: a launcher ends a group of
    which one has died, but not on other machines.
    """

    def __init__(self, what: str):
        import torch.distributed as dist

        self.what, self.rank, self.world = what, dist.get_rank(), dist.get_world_size()
        self.store = dist.PrefixStore(f"stagewise/meeting/{next(_numbers)}", _group_store())
        self.waits = self.told = False
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._live, name="signs of life", daemon=True)

    def __enter__(self) -> "_Meeting":
        self._thread.start()
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        self._left.set()
        if error is not None and not self.told:
            self._tell(error)
        self._thread.join()

    def wait_for_all(self, point: str) -> None:
        """Until every process has come to this point.

        Raises:
            InputError, ProcessLost: see first_process_first.
        """
        import torch.distributed as dist

        self.waits, pause = True, 0.01
        try:
            if self.store.add(f"{point}/came", 1) == self.world:
                self.store.set(f"{point}/all", "")
            while not self.store.check([f"{point}/all"]):
                if self.store.check(["failed"]):
                    self.told = True
                    self.store.add("heard", 1)
                    self._raise(json.loads(self.store.get("failed")))
                time.sleep(pause)
                pause = min(2 * pause, LOOK_S)
        except dist.DistError as error:  # the process that keeps the store, usually the first one, has ended
            self.told = True
            raise ProcessLost(f"waiting for {self.what}: the first process has ended ({error})") from None
        self.waits = False

    def _raise(self, failure: dict) -> None:
        if failure["input"]:
            raise InputError(failure["message"])
        raise ProcessLost(f"waiting for {self.what}: {failure['message']}")

    def _tell(self, error: BaseException) -> None:
        import torch.distributed as dist

        message = str(error) if isinstance(error, InputError) else f"process {self.rank} has ended with {error!r}"
        try:
            self._fail(message, isinstance(error, InputError))
            patience = time.monotonic() + HEAR_S
            while self.store.add("heard", 0) < self.world - 1 and time.monotonic() < patience:
                time.sleep(0.05)
        except dist.DistError:
            pass  # nobody is left to be told

    def _fail(self, message: str, of_input: bool) -> None:
        self.store.set("failed", json.dumps({"message": message, "input": of_input}))

    def _live(self) -> None:
        import torch.distributed as dist

        next_one, seen = (self.rank + 1) % self.world, -1
        started = last_sign = said = time.monotonic()
        patience = max(DEAD_S, self.store.timeout.total_seconds())  # for one that has not come yet
        while not self._left.is_set():
            now = time.monotonic()
            try:
                self.store.add(f"alive/{self.rank}", 1)
                found = self.store.add(f"alive/{next_one}", 0)
                if found != seen:
                    seen, last_sign = found, now
                if now - last_sign > (DEAD_S if found else patience):
                    self._fail(f"process {next_one} has given no sign of life for {now - last_sign:.0f} s", False)
            except dist.DistError:
                return  # wait_for_all finds the same
            if now - said > SAY_S:
                said = now
                doing = "waiting for the other processes" if self.waits else "at work, while the others wait"
                logger.info("%s: %s for %d minutes", self.what, doing, (now - started) // 60)
            self._left.wait(BEAT_S)


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
