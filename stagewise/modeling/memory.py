"""What a training step needs of each device's memory and of the host's: arithmetic on plain values, nothing is loaded.

Model states under ZeRO follow DeepSpeed's estimators (estimate_zero2_model_states_mem_needs and
estimate_zero3_model_states_mem_needs), and are equal to them where all weights are trained. Activations follow
Korthikanti et al. 2022 (arXiv 2205.05198), see `saved_by_layers`.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from stagewise.losses.logprobs import GRADIENT_COLUMNS, rows_of_a_chunk
from stagewise.modeling.model_shape import ModelShape

GIB = 2**30
# What of the memory found may be planned with: allocators leave gaps, kernels want workspaces.
USABLE = 0.9
# DeepSpeed's estimators take half as much again on the host, for buffers.
HOST_BUFFERS = 1.5
# Numbers of the size of its parameter that an optimizer keeps; AdamW's two where it is not listed.
OPTIMIZER_STATES = {"sgd": 0, "adagrad": 1, "rmsprop": 1, "lion": 1, "lomo": 0, "ademamix": 3}
# Of by_engine's table.
WORLD_SIZES = (1, 2, 4, 8, 16)
# bitsandbytes: a scale in float32 for so many numbers of an 8-bit optimizer state, or of 4-bit weights.
STATE_BLOCK, WEIGHT_BLOCK, SCALE_BLOCK = 256, 64, 256


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained, as far as memory knows.

    rows, length: of one forward pass on one device; a preference pair is two rows.
    padded: rows have a padding mask, for which sdpa repeats keys and values for each query head.
    weight_bytes: of a number in the base's weights as loaded: 4 (float32) or 2.
    autocast: matrix products are in 16 bits whatever the weights are (--bf16, --fp16).
    bits, double_quant: of quantized linear layers: 4, 8 or None; the scales of 4-bit blocks are quantized themselves.
    optimizer: a value of --optim.
    lora_dropout: there is dropout in front of the adapters.
    attention: the kernel: eager keeps an L x L matrix for each head, sdpa a mask of that size where rows are padded,
        others ("segments": sdpa without masks) neither.
    accumulation: forward and backward passes of an optimizer step.
    forwards: passes whose activations are kept together: PPO's policy and value model.
    engine: what shares out the work; stage: what of the states it shards, as ZeRO's 0 to 3 (FSDP: 3 where gathered
        weights are let go after the forward pass, else 2).
    half: DeepSpeed keeps weights and gradients in 16 bits, and a master copy in float32.
    processes, local_processes: of the run, and of each machine.
    logits: what the loss keeps of them: "chunk" (a few rows of the vocabulary), "whole", or "none" (a score head).
    frozen_bytes: weights of other models: a reference, a reward model.
    rollout_rows, rollout_length: of generation with a cache, 0 where none is.
    process_bytes: what the process holds beside the run; on a CPU libraries count too.
    on_cpu: the device is the host (the mask of a dropout then takes four bytes, elsewhere one).
    """

    rows: int
    length: int
    padded: bool = False
    weight_bytes: int = 4
    autocast: bool = False
    bits: Literal[4, 8] | None = None
    double_quant: bool = True
    optimizer: str = "adamw_torch"
    checkpointing: bool = False
    lora_dropout: bool = False
    attention: str = "sdpa"
    accumulation: int = 1
    forwards: int = 1
    engine: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    stage: Literal[0, 1, 2, 3] = 0
    half: bool = True
    offload_optimizer: bool = False
    offload_parameters: bool = False
    processes: int = 1
    local_processes: int = 1
    logits: Literal["chunk", "whole", "none"] = "chunk"
    frozen_bytes: int = 0
    rollout_rows: int = 0
    rollout_length: int = 0
    process_bytes: int = 0
    on_cpu: bool = False

    @property
    def nodes(self) -> int:
        return math.ceil(self.processes / self.local_processes)

    @property
    def stream_bytes(self) -> int:
        """Of a number in the residual stream, which has the data type of the weights as they are used."""
        if (self.engine == "deepspeed" and self.half) or (self.engine == "fsdp" and self.autocast):
            return 2
        return self.weight_bytes

    @property
    def product_bytes(self) -> int:
        """Of a number in matrix products."""
        return 2 if self.autocast else self.stream_bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, of one device and of one host.

    weights, gradients, master_weights, optimizer: the model states. casts: 16-bit copies of float32 weights.
    activations_kept, activations_checkpointed: what backward needs, without and with checkpointing; one_layer: of the
    second, what is computed again at a time. logits: of the loss. rollouts: cache and logits of generation.
    host_states: states that were offloaded; host_buffers: what DeepSpeed adds to them; host_loading: the weights on
    their way to the devices.
    """

    weights: int
    gradients: int
    master_weights: int
    optimizer: int
    casts: int
    activations_kept: int
    activations_checkpointed: int
    one_layer: int
    logits: int
    rollouts: int
    process: int
    host_states: int
    host_buffers: int
    host_loading: int
    checkpointing: bool
    gradients_stay: bool
    on_cpu: bool

    @property
    def activations(self) -> int:
        return self.activations_checkpointed if self.checkpointing else self.activations_kept

    @property
    def device(self) -> int:
        """The peak. Rollouts and updates take turns; the gradients of a single backward pass arrive as its activations
        go, so that the larger counts, unless they wait for those of other passes or processes.
        """
        passing = self.casts + self.activations + self.logits
        if self.checkpointing:  # layers are computed again when the loss is done with its logits
            passing -= min(self.one_layer, self.logits)
        step = self.gradients + passing if self.gradients_stay else max(self.gradients, passing)
        return self.weights + self.master_weights + self.optimizer + self.process + max(step, self.rollouts)

    @property
    def host(self) -> int:
        """Loading is over before states are made."""
        return max(self.host_states + self.host_buffers, self.host_loading)

    @property
    def model_states(self) -> int:
        """Weights, gradients, master weights and optimizer on the device, what DeepSpeed's estimators speak of."""
        return self.weights + self.gradients + self.master_weights + self.optimizer


def estimate(model: ModelShape, setup: TrainingSetup) -> MemoryEstimate:
    """The peak of a training step, from the second one on (the optimizer's states are made in the first)."""
    states = _deepspeed_states(model, setup) if setup.engine == "deepspeed" else _plain_states(model, setup)
    tokens = setup.forwards * setup.rows * setup.length
    kept = saved_by_layers(model, setup)
    inputs = tokens * model.layers * model.hidden * setup.stream_bytes
    last_norm = tokens * model.hidden * (4 + setup.stream_bytes)
    one_layer = kept // (model.layers * setup.forwards)
    return MemoryEstimate(
        **states,
        casts=_casts(model, setup),
        activations_kept=kept + last_norm,
        activations_checkpointed=inputs + one_layer + last_norm,
        one_layer=one_layer,
        logits=_loss(model, setup),
        rollouts=_rollouts(model, setup),
        process=setup.process_bytes,
        checkpointing=setup.checkpointing,
        gradients_stay=setup.accumulation > 1 or setup.processes > 1 or setup.engine == "deepspeed",
        on_cpu=setup.on_cpu,
    )


def weight_bytes(model: ModelShape, setup: TrainingSetup) -> int:
    """The base's weights as they are used, quantized where they are.

    4 bits: half a byte, and for each block of 64 a scale, in float32 or (double quantization, arXiv 2305.14314) in a
    byte with a second float32 scale for 256 of them. 8 bits: a byte, and a float32 scale for each row.
    """
    if setup.bits is None:
        return model.parameters * setup.weight_bytes
    if setup.bits == 8:
        packed = model.linear + 4 * model.linear_rows
    else:
        scales = model.linear / WEIGHT_BLOCK
        packed = model.linear // 2 + int(scales * (1 + 4 / SCALE_BLOCK) if setup.double_quant else 4 * scales)
    return packed + (model.parameters - model.linear) * setup.weight_bytes


def optimizer_bytes(model: ModelShape, optimizer: str, number_bytes: int) -> int:
    """States of the trained parameters.

    Args:
        number_bytes: all trained parameters once, in the data type that torch's optimizers keep their states in, which
            is that of the parameters. bitsandbytes keeps them in float32, or in 8 bits (embeddings, which the Trainer
            exempts, in float32 all the same).
    """
    name = optimizer.removeprefix("paged_")
    if "adafactor" in name:
        return 4 * model.factored
    numbers = next((count for prefix, count in OPTIMIZER_STATES.items() if name.startswith(prefix)), 2)
    if "4bit" in name:
        return int(numbers * model.trainable * (0.5 + 4 / 128))
    if "8bit" in name:
        small = model.trainable - model.trainable_embedding
        return int(numbers * (small * (1 + 4 / STATE_BLOCK) + 4 * model.trainable_embedding))
    return numbers * (4 * model.trainable if name.endswith("32bit") else number_bytes)


def _plain_states(model: ModelShape, setup: TrainingSetup) -> dict[str, int]:
    """One process, or DistributedDataParallel (whose buckets are a second copy of the gradients)."""
    if setup.engine == "fsdp":
        return _fsdp_states(model, setup)
    own = weight_bytes(model, setup)
    trained = 4 * model.adapter + setup.weight_bytes * (model.trainable - model.adapter)
    optimizer = optimizer_bytes(model, setup.optimizer, trained)
    paged = setup.optimizer.startswith("paged_") and not setup.on_cpu
    return {
        "weights": own + (trained if model.adapter else 0) + setup.frozen_bytes,
        "gradients": trained * (2 if setup.processes > 1 else 1),
        "master_weights": 0,
        "optimizer": 0 if paged else optimizer,
        "host_states": optimizer * setup.local_processes if paged else 0,
        "host_buffers": 0,
        "host_loading": 0 if setup.on_cpu else own * setup.local_processes,
    }


def _fsdp_states(model: ModelShape, setup: TrainingSetup) -> dict[str, int]:
    """FSDP2 as accelerate sets it up: what lasts is shared out, and what is trained is float32 under --bf16.

    Units are the decoder layers, the embedding, and the head with the last norm. They are gathered in the data type
    of the products, so that autocast finds nothing to copy: a layer and the next one on its way, and the head, which
    stays; without reshard_after_forward (stage 2) all of them stay. In backward one layer's gradient is computed
    while that of another is reduced.
    """
    number, product = 4 if setup.autocast else setup.weight_bytes, setup.product_bytes
    trained = 4 * model.adapter + number * (model.trainable - model.adapter)
    lasting = trained + (model.parameters * setup.weight_bytes if model.adapter else 0)
    head, layer = model.vocab * model.hidden, model.parameters // model.layers
    gathered = head + 2 * layer if setup.stage == 3 else model.parameters
    optimizer = optimizer_bytes(model, setup.optimizer, trained)
    paged = setup.optimizer.startswith("paged_") and not setup.on_cpu
    return {
        "weights": lasting // setup.processes
        + product * gathered
        + setup.frozen_bytes // (setup.processes if setup.stage == 3 else 1),
        "gradients": trained // setup.processes + 2 * product * (model.trainable // model.layers),
        "master_weights": 0,
        "optimizer": 0 if paged else optimizer // setup.processes,
        "host_states": optimizer // setup.nodes if paged else 0,
        "host_buffers": 0,
        "host_loading": 0 if setup.on_cpu else model.parameters * setup.weight_bytes * setup.local_processes,
    }


def _deepspeed_states(model: ModelShape, setup: TrainingSetup) -> dict[str, int]:
    """Bytes of a parameter as DeepSpeed's estimators count them: 2 for a weight, and of a trained one 4 + 4 + 8 for
    gradient, master weight and AdamW's states in float32, without ZeRO-3 another 2 for the 16-bit gradient.
    """
    number = 2 if setup.half else setup.weight_bytes
    sharded, stage = (setup.processes, setup.stage) if setup.stage else (1, 0)
    base = weight_bytes(model, setup) if setup.bits else model.parameters * number
    weights = base + (number * model.trainable if model.adapter else 0)
    gradients = 4 * model.trainable // sharded
    if stage != 3:
        gradients += number * model.trainable // (sharded if stage == 2 else 1)
    master = 4 * model.trainable
    optimizer = optimizer_bytes(model, setup.optimizer, 4 * model.trainable)
    states = {"gradients": gradients, "master_weights": master // sharded, "optimizer": optimizer // sharded}
    on_device, host = weights // (sharded if stage == 3 else 1), 0
    frozen = setup.frozen_bytes // (sharded if stage == 3 else 1)
    if setup.offload_optimizer and stage:
        states = dict.fromkeys(states, 0)
        # without ZeRO-3 the estimator counts all of it on every machine
        host = (4 * model.trainable + master + optimizer) // (setup.nodes if stage == 3 else 1)
    if setup.offload_parameters and stage == 3:
        on_device, host = 0, host + weights // setup.nodes
    return {
        **states,
        "weights": on_device + frozen + (4 * model.largest_layer if stage == 3 else 0),
        "host_states": host,
        "host_buffers": int(host * (HOST_BUFFERS - 1)),
        "host_loading": int(_loading(model, setup) * HOST_BUFFERS),
    }


def _loading(model: ModelShape, setup: TrainingSetup) -> int:
    """Each process loads the whole model, or with ZeRO-3 a layer at a time."""
    if setup.on_cpu or (setup.stage == 3 and setup.offload_optimizer):
        return 0
    if setup.stage == 3:
        return 4 * model.largest_layer * setup.local_processes
    # where the optimizer is offloaded the estimator of ZeRO-2 counts the processes of all machines
    copies = setup.processes if setup.offload_optimizer else setup.local_processes
    return model.parameters * setup.weight_bytes * copies


def saved_by_layers(model: ModelShape, setup: TrainingSetup) -> int:
    """Bytes that autograd keeps of one pass through the decoder layers, without checkpointing.

    Korthikanti et al. count s b h (34 + 5 a s / h) bytes for a GPT layer in 16 bits; the term in s^2 goes where a
    fused kernel does not keep the matrix. Here each part is counted by itself, because models differ: for a token and
    a layer, with c bytes of a number in products, r in the residual stream, and D, Q, K, F the widths of stream,
    queries, keys and feed-forward part,

        normalizations   2 D 4 their input in float32, and 2 D r the normalized one where their weights are trained
                         (LayerNorm: its input alone, 2 D r)
        attention        (2 Q + 2 K) c for queries, output, keys, values (K is Q where a mask has them repeated), and
                         4 a for the a heads' log-sum-exp; eager: a L (4 + c) for the matrix in place of these 4 a
        feed-forward     3 F c with a gate (its input, its output, what it gates), 1 F c without
        linear layers    their inputs where their weights are trained: D c twice, F c; under autocast a copy of D for
                         each layer that reads the stream
        adapters         the input of each adapted layer behind its dropout, 4 bytes or 2 under autocast, and the
                         mask of the dropout; without dropout no more than the layer itself would keep
        experts          the rows that are sent to them and come back, 2 D c for each expert of a token
    """
    tokens = setup.rows * setup.length
    stream, product = setup.stream_bytes, setup.product_bytes
    full = model.trainable > 0 and not model.adapter
    norms = model.norm_width * (stream if model.layer_norm else 4 + (stream if full else 0))
    repeated = setup.attention == "eager" or (setup.padded and setup.attention == "sdpa")
    keys = model.query_width if repeated else model.key_value_width
    attention = model.layers * ((2 * model.query_width + 2 * keys) * product + 4 * model.heads)
    mlp = model.layers * (3 if model.gated else 1) * model.mlp_width * product
    experts = model.layers * 2 * model.experts_per_token * model.hidden * product
    each_token = norms + attention + mlp + experts + _linear_inputs(model, setup, full)
    return setup.forwards * (tokens * each_token + _matrices(model, setup) + model.adapted_tensors * product)


def _matrices(model: ModelShape, setup: TrainingSetup) -> int:
    """What grows with the square of the length: the matrix of eager attention, or each layer's copy of the mask."""
    square = model.layers * setup.rows * setup.length**2
    if setup.attention == "eager":
        return square * model.heads * (4 if setup.product_bytes == 4 else 4 + setup.product_bytes)
    return square * setup.product_bytes if setup.padded and setup.attention == "sdpa" else 0


def _linear_inputs(model: ModelShape, setup: TrainingSetup, full: bool) -> int:
    """Bytes a token that linear layers and adapters keep of their inputs."""
    product, casts = setup.product_bytes, setup.product_bytes < setup.stream_bytes
    shared = model.layers * (2 * model.hidden + model.mlp_width)
    if full:
        inputs = model.stream_inputs + model.layers * model.mlp_width if casts else shared
        return inputs * product
    # adapters are in float32, and their inputs with them, unless something makes all products 16 bits wide
    kept = 2 if setup.autocast or (setup.engine == "deepspeed" and setup.half) else 4
    ranks = model.adapted_ranks * kept
    if setup.lora_dropout:
        return model.adapted_inputs * (kept + (4 if setup.on_cpu else 1)) + ranks
    inputs = min(shared, model.adapted_inputs) if kept == setup.stream_bytes else model.adapted_inputs
    return inputs * kept + ranks


def _casts(model: ModelShape, setup: TrainingSetup) -> int:
    """Under autocast backward needs 16-bit copies of the weights of all linear layers. With checkpointing those of
    trained weights are cached until the forward pass ends, those of frozen ones live for a layer.
    """
    if setup.product_bytes >= setup.stream_bytes or setup.bits is not None:
        return 0
    copies = model.linear * setup.product_bytes
    return copies // model.layers if setup.checkpointing and model.adapter else copies


def _loss(model: ModelShape, setup: TrainingSetup) -> int:
    """What the loss holds: a chunk of logits in float32, its gradient in the 16 bits of the products, the gradient of
    the hidden states, and of a head that is trained the gradient in float32 (with products in 16 bits, a part of it
    once more); or all logits with their log-softmax; or what a score head reads.
    """
    tokens = setup.rows * setup.length
    if setup.logits == "none":
        return 4 * tokens * model.hidden
    if setup.logits == "whole":
        return tokens * model.vocab * (setup.product_bytes + 4)
    rows = min(tokens, rows_of_a_chunk(model.vocab))
    kept = 4 * rows * model.vocab + tokens * model.hidden * setup.stream_bytes + 4 * model.trainable_head
    if setup.product_bytes == 4:
        return kept
    part = 4 * min(model.vocab, GRADIENT_COLUMNS) * model.hidden if model.trainable_head else 0
    return kept + setup.product_bytes * rows * model.vocab + part


def _rollouts(model: ModelShape, setup: TrainingSetup) -> int:
    """Generation: the cache of keys and values of all rows, and the logits and probabilities of the next token. Then
    the completions are evaluated at once, without autograd: what a layer holds on its way.
    """
    cache = 2 * model.layers * model.key_value_width * setup.rollout_length * setup.product_bytes
    on_the_way = 3 * model.mlp_width * setup.product_bytes + 2 * model.hidden * setup.stream_bytes
    return setup.rollout_rows * max(cache + 2 * 4 * model.vocab, setup.rollout_length * on_the_way)


def fits(needed: int, found: int) -> bool:
    return needed <= USABLE * found


@dataclass(frozen=True)
class Memory:
    """Memory that was found: what a process can have of its device, and what all processes can have of their host.

    device is None where there is no accelerator.
    """

    host: int
    device: int | None = None
    device_name: str = "host"


def shortages(found: MemoryEstimate, memory: Memory, local_processes: int = 1) -> list[str]:
    """What does not fit, in words; empty where everything does."""
    needs = [("the device", found.device, memory.device), ("the host", found.host, memory.host)]
    if memory.device is None:
        needs = [("the host", found.device * local_processes + found.host, memory.host)]
    return [
        f"{place} would need {gib(needed)} GiB, and {gib(there)} GiB are there"
        for place, needed, there in needs
        if there is not None and not fits(needed, there)
    ]


def describe(found: MemoryEstimate, memory: Memory, local_processes: int = 1) -> str:
    """The estimate as a table with the memory that was found, and whether the one fits into the other."""
    table = Table(title="Memory by estimate, GiB")
    table.add_column("part")
    table.add_column("each process" if memory.device is None else "each device", justify="right")
    table.add_column("host", justify="right")
    for part, on_device, on_host in _rows(found):
        if on_device or on_host:
            table.add_row(part, gib(on_device) if on_device else "", gib(on_host) if on_host else "")
    table.add_section()
    table.add_row("in all, at the peak", gib(found.device), gib(found.host))
    table.add_row(
        f"found ({memory.device_name})", "" if memory.device is None else gib(memory.device), gib(memory.host)
    )
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    without, other = (
        ("without", found.activations_kept) if found.checkpointing else ("with", found.activations_checkpointed)
    )
    missing = shortages(found, memory, local_processes)
    verdict = "does not fit: " + "; ".join(missing) if missing else "fits"
    return (
        f"{capture.get()}activations {without} --gradient_checkpointing True: {gib(other)} GiB\n"
        f"memory: {verdict} (an estimate; {1 - USABLE:.0%} are left free for the allocator's gaps)"
    )


def by_engine(model: ModelShape, setup: TrainingSetup, half: bool) -> dict[str, list[int]]:
    """Bytes of a device under each engine, with each of WORLD_SIZES processes of the same batch.

    Args:
        half: training multiplies in 16 bits, so that DeepSpeed keeps weights in them.
    """
    sped = {"engine": "deepspeed", "half": half, "autocast": False}
    offload = {"offload_optimizer": True, "offload_parameters": True}
    plain: dict[str, Any] = {"stage": 0, "autocast": half, "offload_optimizer": False, "offload_parameters": False}
    engines: dict[str, dict[str, Any]] = {
        "torchrun alone": {**plain, "engine": "ddp"},
        "--deepspeed zero2.json": {**plain, **sped, "stage": 2},
        "--deepspeed zero2_offload.json": {**plain, **sped, "stage": 2, "offload_optimizer": True},
        "--deepspeed zero3.json": {**plain, **sped, "stage": 3},
        "--deepspeed zero3_offload.json": {**plain, **sped, "stage": 3, **offload},
        "--fsdp True": {**plain, "engine": "fsdp", "stage": 3},
    }
    return {
        name: [
            estimate(model, replace(setup, processes=size, local_processes=min(size, 8), **changes)).device
            for size in WORLD_SIZES
        ]
        for name, changes in engines.items()
        if setup.bits is None or changes["stage"] < 3  # quantized weights are not shared out
    }


def describe_engines(model: ModelShape, setup: TrainingSetup, half: bool) -> str:
    """by_engine as a table."""
    table = Table(title="GiB of each device, by engine and number of processes")
    table.add_column("")
    for size in WORLD_SIZES:
        table.add_column(str(size), justify="right")
    for name, sizes in by_engine(model, setup, half).items():
        table.add_row(name, *map(gib, sizes))
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")


def _rows(found: MemoryEstimate) -> list[tuple[str, int, int]]:
    """(part, bytes on a device, bytes on the host)"""
    how = "recomputed" if found.checkpointing else "all kept"
    return [
        ("weights", found.weights, found.host_loading),
        ("gradients", found.gradients, 0),
        ("master weights, float32", found.master_weights, 0),
        ("optimizer states", found.optimizer, 0),
        ("offloaded states", 0, found.host_states),
        ("buffers of DeepSpeed", 0, found.host_buffers),
        ("16-bit copies of weights (autocast)", found.casts, 0),
        (f"activations, {how}", found.activations, 0),
        ("logits and loss", found.logits, 0),
        ("rollouts: cache, logits", found.rollouts, 0),
        ("in use already", found.process, 0),
    ]


def gib(size: int) -> str:
    """A number of bytes in GiB, with as many digits as tell something."""
    return f"{size / GIB:.2f}" if size >= GIB / 10 else f"{size / GIB:.4f}"
