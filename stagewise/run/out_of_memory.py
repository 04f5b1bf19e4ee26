"""What to say when memory runs out: what was asked for, the estimate, and the settings that would need less."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from stagewise.modeling.memory import MemoryEstimate, TrainingSetup, estimate, gib, shortages
from stagewise.modeling.model_shape import ModelShape
from stagewise.run.memory import LENGTH_FLAGS, MemoryPlan, current_plan

# A remedy that saves less than this share of the peak is not worth naming.
WORTH_NAMING = 0.02
ORDER = ("time", "devices", "training")
SHORTEST_ROW = 128
MOST_DEVICES = 8

State = tuple[ModelShape, TrainingSetup]


@dataclass(frozen=True)
class Remedy:
    """Flags that need less memory.

    costs: "time" (the result is the same), "devices" (it needs more of them, or their host's memory), or "training"
    (something else is trained). apply: the same change to what the estimate is made of.
    """

    flags: str
    costs: Literal["time", "devices", "training"]
    apply: Callable[[State], State]


def explain(error: BaseException) -> str:
    """What was asked for, the estimate of the run that is under way, and remedies, ranked."""
    on_host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
    asked = _asked(str(error))
    title = f"out of memory on the {'host' if on_host else 'device'}" + (
        f": {asked} more were asked for" if asked else ""
    )
    plan = current_plan.get()
    if plan is None:
        return f'{title}\nsee "Out of memory" in docs/faq.md'
    return "\n".join([title, plan.describe(), *advice(plan, on_host)])


def _asked(message: str) -> str | None:
    if found := re.search(r"Tried to allocate ([\d.]+ [KMGT]iB)", message):
        return found[1]
    found = re.search(r"tried to allocate (\d+) bytes", message)
    return f"{gib(int(found[1]))} GiB" if found else None


def advice(plan: MemoryPlan, on_host: bool = False) -> list[str]:
    """Lines: remedies that are not in use yet, with what each saves by itself, and how many together are enough.

    Args:
        on_host: memory ran out there, and not on an accelerator.
    """

    def needed(found: MemoryEstimate) -> int:
        return found.host if on_host and not found.on_cpu else found.device

    now = needed(plan.estimate)
    found = [(remedy, estimate(*remedy.apply((plan.model, plan.setup)))) for remedy in remedies(plan)]
    found = [(remedy, then) for remedy, then in found if now - needed(then) >= WORTH_NAMING * now]
    if not found:
        return ["no other setting of this run needs noticeably less: it takes a smaller model, or more memory"]
    found.sort(key=lambda entry: (ORDER.index(entry[0].costs), needed(entry[1])))
    lines = ["what would help, by the estimate: first what costs time alone, last what trains something else"]
    for number, (remedy, then) in enumerate(found, 1):
        enough = "" if _misses(plan, then) else ", fits"
        lines += [
            f"  {number}. {remedy.flags}",
            f"     saves {gib(now - needed(then))} GiB: {gib(needed(then))} GiB in all{enough}",
        ]
    return lines + _together(plan, [remedy for remedy, _ in found], needed)


def _together(plan: MemoryPlan, ranked: list[Remedy], needed: Callable[[MemoryEstimate], int]) -> list[str]:
    """How many of the remedies, from the first on, are enough together, where the first is not by itself."""
    state = (plan.model, plan.setup)
    for number, remedy in enumerate(ranked, 1):
        state = remedy.apply(state)
        found = estimate(*state)
        if not _misses(plan, found):
            return [] if number == 1 else [f"1 to {number} together: {gib(needed(found))} GiB in all, fits"]
    return [f"all of them together: {gib(needed(found))} GiB in all, which does not fit yet"]


def _misses(plan: MemoryPlan, found: MemoryEstimate) -> bool:
    return bool(shortages(found, plan.memory, plan.setup.local_processes))


def remedies(plan: MemoryPlan) -> Iterator[Remedy]:
    """Those that the run does not use yet; what they save is another question."""
    yield from _of_time(plan)
    yield from _of_devices(plan)
    yield from _of_training(plan)


def _of_time(plan: MemoryPlan) -> Iterator[Remedy]:
    args, setup = plan.args, plan.setup
    size = args.per_device_train_batch_size
    if size > 1:
        smaller = _batch_that_fits(plan)
        flags = (
            f"--per_device_train_batch_size {smaller} "
            f"--gradient_accumulation_steps {setup.accumulation * size // smaller}"
        )
        yield Remedy(flags, "time", _smaller_batch(plan, smaller))
    if not setup.checkpointing:
        yield Remedy("--gradient_checkpointing True", "time", _setting(checkpointing=True))
    if setup.attention == "eager" and plan.model.attention != "eager":
        yield Remedy("--attn_implementation sdpa", "time", _setting(attention="sdpa"))
    if setup.rollout_rows > 1:
        rows = setup.rollout_rows // 2
        yield Remedy(f"--rollout_batch_size {rows}", "time", _setting(rollout_rows=rows))


def _batch_that_fits(plan: MemoryPlan) -> int:
    """The largest proper divisor of the batch that fits by the estimate; 1 where none does."""
    size = plan.args.per_device_train_batch_size
    for smaller in (size // parts for parts in range(2, size) if size % parts == 0):
        if not _misses(plan, estimate(*_smaller_batch(plan, smaller)((plan.model, plan.setup)))):
            return smaller
    return 1


def _smaller_batch(plan: MemoryPlan, smaller: int) -> Callable[[State], State]:
    """As many rows in an optimizer step, in more passes."""
    size = plan.args.per_device_train_batch_size
    return _setting(rows=plan.setup.rows * smaller // size, accumulation=plan.setup.accumulation * size // smaller)


def _of_devices(plan: MemoryPlan) -> Iterator[Remedy]:
    setup = plan.setup
    if setup.on_cpu:
        return
    if setup.engine != "deepspeed" and "paged" not in setup.optimizer:
        yield Remedy("--optim paged_adamw_32bit", "devices", _setting(optimizer="paged_adamw_32bit"))
    stage: Literal[2, 3] = 2 if plan.stage == "ppo" or setup.bits else 3
    if setup.engine == "ddp" or (setup.engine == "deepspeed" and setup.stage < stage):
        yield _sharded(plan, stage)


def _sharded(plan: MemoryPlan, stage: Literal[2, 3]) -> Remedy:
    """ZeRO on the fewest devices that are enough."""

    def change(devices: int) -> Callable[[State], State]:
        return _setting(
            engine="deepspeed",
            stage=stage,
            half=plan.args.bf16 or plan.args.fp16,
            autocast=False,
            processes=devices,
            local_processes=min(devices, MOST_DEVICES),
        )

    counts = [plan.setup.processes] if plan.setup.processes > 1 else [2, 4, MOST_DEVICES]
    state = (plan.model, plan.setup)
    enough = (count for count in counts if not _misses(plan, estimate(*change(count)(state))))
    devices = next(enough, counts[-1])
    flags = f"--deepspeed zero{stage}.json, on {devices} devices"
    if plan.setup.processes == 1:
        flags = f"torchrun --nproc_per_node {devices} ... --deepspeed zero{stage}.json"
    return Remedy(flags, "devices", change(devices))


def _of_training(plan: MemoryPlan) -> Iterator[Remedy]:
    setup, lora_args = plan.setup, plan.lora_args
    if not lora_args.use_peft:
        yield _adapter(plan)
    elif setup.weight_bytes == 4:
        yield Remedy("--dtype bfloat16", "training", _setting(weight_bytes=2))
    if setup.bits is None and setup.stage < 3:
        if lora_args.use_peft:
            yield Remedy("--qlora True", "training", _setting(bits=4, double_quant=True))
        else:
            yield _adapter(plan, bits=4)
    yield from _shorter_rows(plan)
    if not lora_args.use_peft and "adafactor" not in setup.optimizer and setup.engine != "deepspeed":
        yield Remedy("--optim adafactor", "training", _setting(optimizer="adafactor"))


def _adapter(plan: MemoryPlan, bits: Literal[4] | None = None) -> Remedy:
    """An adapter in place of all weights, of the size that the flags say."""
    model, fresh = plan.with_adapter(replace(plan.lora_args, use_peft=True))
    changes = {name: getattr(fresh, name) for name in ("weight_bytes", "lora_dropout", "frozen_bytes")}
    flags = "--use_peft True" + (" --qlora True" if bits else "")
    return Remedy(flags, "training", lambda state: (model, replace(state[1], **changes, bits=bits)))


def _shorter_rows(plan: MemoryPlan) -> Iterator[Remedy]:
    flag = LENGTH_FLAGS[plan.stage]
    beside = plan.stage_args.max_new_tokens if plan.stage == "ppo" else 0
    length = (plan.setup.length - beside) // 2
    if length >= SHORTEST_ROW:
        rollouts = {"rollout_length": length + beside} if beside else {}
        yield Remedy(f"--{flag} {length}", "training", _setting(length=length + beside, **rollouts))


def _setting(**changes) -> Callable[[State], State]:
    return lambda state: (state[0], replace(state[1], **changes))
