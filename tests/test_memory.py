"""The memory estimate against DeepSpeed's estimators, real models and measured steps; advice when memory runs out."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomConfig,
    GemmaConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    Qwen2Config,
)

from stagewise.arguments import LoraArguments, ModelArguments
from stagewise.modeling.lora import attach_adapter
from stagewise.modeling.memory import (
    GIB,
    WORLD_SIZES,
    Memory,
    TrainingSetup,
    by_engine,
    describe,
    describe_engines,
    estimate,
    fits,
    optimizer_bytes,
    saved_by_layers,
    shortages,
    weight_bytes,
)
from stagewise.modeling.model_shape import ModelShape, read_shape
from stagewise.modeling.quantization import asked_for
from stagewise.modeling.token_loss import install_token_loss
from stagewise.run import memory as run_memory
from stagewise.run.exit_codes import is_out_of_memory, run_script
from stagewise.run.memory import MemoryPlan, longest_row
from stagewise.run.out_of_memory import advice, explain
from tests.stages import run_pt, run_rm, run_sft

SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, **HEADS),
    "qwen2": Qwen2Config(**SIZES, **HEADS, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**SIZES, **HEADS, num_local_experts=4),
    "bloom": BloomConfig(vocab_size=300, hidden_size=64, n_layer=2, n_head=4),
    "gemma": GemmaConfig(**SIZES, **HEADS, head_dim=16),
}
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
FULL = LoraArguments(use_peft=False)
LORA = LoraArguments(lora_dropout=0.0)


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_real_model(name):
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    shape = read_shape(CONFIGS[name], FULL)
    assert shape.parameters == shape.trainable == model.num_parameters()
    assert shape.embedding == model.get_input_embeddings().weight.numel()
    linear = [module for module in model.modules() if type(module) is torch.nn.Linear]
    assert shape.linear == sum(m.weight.numel() for m in linear if m is not model.get_output_embeddings())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "options",
    [{}, {"lora_rank": 4, "use_dora": True}, {"modules_to_save": "embed"}, {"target_modules": "attention"}],
    ids=["all", "dora", "embedding", "attention"],
)
def test_the_adapter_is_that_of_peft(name, options):
    names = {"embed": "embed_tokens", "attention": "q_proj,v_proj"}
    if name == "bloom":
        names = {"embed": "word_embeddings", "attention": "query_key_value"}
    if name == "mixtral" and options.get("use_dora"):
        options = {"lora_rank": 4}  # peft has no DoRA for fused experts
    args = replace(LORA, **{key: names.get(value, value) for key, value in options.items()})
    trained, total = attach_adapter(
        AutoModelForCausalLM.from_config(CONFIGS[name]), args
    ).get_nb_trainable_parameters()
    shape = read_shape(CONFIGS[name], args)
    assert shape.trainable == trained
    copies = shape.trainable - shape.adapter
    assert copies == (shape.embedding if "modules_to_save" in options else 0)
    assert shape.parameters + shape.trainable == total


def test_a_reward_model_has_a_score_in_place_of_the_head():
    config = LlamaConfig(**SIZES, **HEADS, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config)
    assert read_shape(config, FULL, scores=True).parameters == model.num_parameters()
    trained, _ = attach_adapter(model, LORA, "SEQ_CLS").get_nb_trainable_parameters()
    assert read_shape(config, LORA, scores=True).trainable == trained


def test_the_embedding_grows_with_the_vocabulary():
    grown = read_shape(CONFIGS["llama"], FULL, vocab_size=310)
    # ten rows of 64, in the embedding and in the head
    assert grown.parameters == read_shape(CONFIGS["llama"], FULL).parameters + 2 * 10 * 64
    assert CONFIGS["llama"].vocab_size == 300


def test_zero_3_does_not_shard_the_copy_that_is_looked_at():
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
    alive = HfDeepSpeedConfig(config)
    try:
        assert is_deepspeed_zero3_enabled()
        assert read_shape(CONFIGS["llama"], LORA).parameters > 0
        assert is_deepspeed_zero3_enabled()
    finally:
        del alive


# --- model states ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_8b() -> ModelShape:
    return read_shape(LLAMA_8B, FULL)


@pytest.fixture(scope="module")
def llama_8b_lora() -> ModelShape:
    return read_shape(LLAMA_8B, LoraArguments())


def test_the_states_of_8b_by_hand(llama_8b, llama_8b_lora):
    # 2 x 128256 x 4096 embedding and head; a layer: 2 x 4096^2 + 2 x 4096 x 1024 + 3 x 4096 x 14336 + 2 x 4096
    layer = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert llama_8b.parameters == 2 * 128256 * 4096 + 32 * (layer + 8192) + 4096 == 8_030_261_248
    bf16 = TrainingSetup(rows=1, length=1, weight_bytes=2)
    assert estimate(llama_8b_lora, bf16).weights / GIB == pytest.approx(14.96 + 4 * 20_971_520 / GIB, abs=0.005)
    # rank 8 on seven layers: 8 x (inputs + outputs)
    assert llama_8b_lora.trainable == 32 * 8 * (2 * 8192 + 2 * 5120 + 3 * 18432) == 20_971_520
    lora = estimate(llama_8b_lora, bf16)
    assert (lora.gradients, lora.optimizer, lora.master_weights) == (4 * 20_971_520, 8 * 20_971_520, 0)
    full = estimate(llama_8b, TrainingSetup(rows=1, length=1))
    assert full.model_states == 16 * 8_030_261_248
    # nf4: half a byte, a byte for each 64 and 4 bytes for 256 of those; the rest in bf16
    rest = 2 * (8_030_261_248 - 32 * layer)
    assert weight_bytes(llama_8b, replace(bf16, bits=4)) == 16 * layer + 32 * layer // 64 * 260 // 256 + rest
    assert weight_bytes(llama_8b, replace(bf16, bits=4, double_quant=False)) == 16 * layer + 2 * layer + rest
    rows = 32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)
    assert weight_bytes(llama_8b, replace(bf16, bits=8)) == 32 * layer + 4 * rows + rest


@pytest.mark.parametrize(
    ("optimizer", "bytes_each"),
    [
        ("adamw_torch", 8),
        ("adamw_torch_fused", 8),
        ("paged_adamw_32bit", 8),
        ("lion_32bit", 4),
        ("sgd", 0),
        ("adagrad", 4),
        ("ademamix", 12),
    ],
)
def test_optimizer_states(llama_8b, optimizer, bytes_each):
    found = optimizer_bytes(llama_8b, optimizer, 4 * llama_8b.trainable)
    assert found == bytes_each * llama_8b.trainable


def test_optimizers_with_small_states(llama_8b):
    found = optimizer_bytes(llama_8b, "adamw_bnb_8bit", 4 * llama_8b.trainable)
    embedding = 128256 * 4096
    # two bytes, and two float32 scales for each 256; the embedding stays in float32
    assert found == pytest.approx((8_030_261_248 - embedding) * (2 + 8 / 256) + 8 * embedding, rel=1e-6)
    assert optimizer_bytes(llama_8b, "adafactor", 0) < 0.001 * 8 * 8_030_261_248
    matrix = read_shape(CONFIGS["llama"], LORA)
    # adapters of 64 -> 64, 64 -> 32 twice, 64 -> 64, 64 -> 160 twice, 160 -> 64, twice; A: 8 + in, B: out + 8
    widths = (64 + 64) * 2 + (64 + 32) * 2 + (64 + 160) * 3
    assert optimizer_bytes(matrix, "adafactor", 0) == 4 * 2 * (widths + 7 * 16)


def test_torch_optimizers_keep_states_in_the_weights_data_type(llama_8b):
    bf16 = estimate(llama_8b, TrainingSetup(rows=1, length=1, weight_bytes=2))
    assert bf16.model_states == 8 * 8_030_261_248
    paged = estimate(llama_8b, TrainingSetup(rows=1, length=1, optimizer="paged_adamw_32bit"))
    assert (paged.optimizer, paged.host_states) == (0, 8 * 8_030_261_248)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("offload", ["none", "optimizer", "optimizer and parameters"])
@pytest.mark.parametrize(("processes", "local"), [(1, 1), (8, 8), (16, 8), (2, 1)])
def test_zero_is_what_deepspeed_estimates(llama_8b, stage, offload, processes, local):
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    machine = {"num_gpus_per_node": local, "num_nodes": processes // local}
    if stage == 2:
        if "parameters" in offload:
            pytest.skip("ZeRO-2 keeps parameters on the device")
        host, device = estimate_zero2_model_states_mem_needs(
            llama_8b.parameters, cpu_offload=offload != "none", **machine
        )
    else:
        host, device, _ = estimate_zero3_model_states_mem_needs(
            llama_8b.parameters,
            llama_8b.largest_layer,
            cpu_offload=offload != "none",
            cpu_offload_params="parameters" in offload,
            zero_init=True,
            **machine,
        )
    found = estimate(
        llama_8b,
        TrainingSetup(
            rows=1,
            length=1,
            engine="deepspeed",
            stage=stage,
            offload_optimizer=offload != "none",
            offload_parameters="parameters" in offload,
            processes=processes,
            local_processes=local,
        ),
    )
    assert found.model_states == pytest.approx(device, rel=0.01)
    assert found.host == pytest.approx(host, rel=0.01)


def test_phi_1_5_with_its_optimizer_offloaded_wants_31_70_gib_of_the_host():
    config = PhiConfig(
        vocab_size=51200, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32
    )
    phi = read_shape(config, FULL)
    assert phi.parameters == 1_418_270_720
    setup = TrainingSetup(rows=1, length=1, engine="deepspeed", stage=2, offload_optimizer=True)
    assert estimate(phi, setup).host / GIB == pytest.approx(31.70, abs=0.005)
    assert estimate(phi, replace(setup, stage=3)).host / GIB == pytest.approx(31.70, abs=0.005)


def test_an_adapter_under_zero_leaves_the_base_without_states(llama_8b_lora):
    setup = TrainingSetup(rows=1, length=1, weight_bytes=2, engine="deepspeed", processes=4, local_processes=4)
    base, adapter = 2 * llama_8b_lora.parameters, llama_8b_lora.trainable
    third = estimate(llama_8b_lora, replace(setup, stage=3))
    assert third.weights == (base + 2 * adapter) // 4 + 4 * llama_8b_lora.largest_layer
    assert third.model_states - third.weights == 16 * adapter // 4
    second = estimate(llama_8b_lora, replace(setup, stage=2))
    assert second.model_states == base + 2 * adapter + 18 * adapter // 4
    first = estimate(llama_8b_lora, replace(setup, stage=1))
    assert first.model_states == base + 4 * adapter + 16 * adapter // 4


def test_data_parallelism_and_fsdp(llama_8b):
    one = estimate(llama_8b, TrainingSetup(rows=1, length=1))
    two = estimate(llama_8b, TrainingSetup(rows=1, length=1, processes=2, local_processes=2))
    assert (two.weights, two.optimizer) == (one.weights, one.optimizer)
    assert two.gradients == 2 * one.gradients  # the buckets that are reduced


def test_fsdp_by_hand(llama_8b, llama_8b_lora):
    """Llama 8B on 8 devices. A layer is counted as 1/32 of all parameters, the head is 128256 x 4096."""
    setup = TrainingSetup(rows=1, length=1, processes=8, local_processes=8, engine="fsdp", stage=3, autocast=True)
    parameters, layer, head = 8_030_261_248, 250_945_664, 525_336_576
    full = estimate(llama_8b, setup)
    # float32 shards; gathered in bf16: two layers and the head; two layers' gradients in bf16 until they are reduced
    assert full.weights == 4 * parameters // 8 + 2 * (2 * layer + head)
    assert full.gradients == 4 * parameters // 8 + 2 * 2 * layer
    assert full.optimizer == 8 * parameters // 8
    assert full.casts == 0  # the gathered weights are the 16-bit copies
    assert full.model_states / GIB == pytest.approx(17.80, abs=0.01)
    # trained weights are made float32 whatever they were; nothing is gathered in another type without --bf16
    assert estimate(llama_8b, replace(setup, weight_bytes=2)).model_states == full.model_states
    plain = estimate(llama_8b, replace(setup, autocast=False))
    assert plain.weights == 4 * parameters // 8 + 4 * (2 * layer + head)
    # all of it stays gathered where it is not let go after the forward pass
    assert estimate(llama_8b, replace(setup, stage=2)).weights == 4 * parameters // 8 + 2 * parameters
    # an adapter of 20,971,520 float32 numbers on a base in bf16
    lora = estimate(llama_8b_lora, replace(setup, weight_bytes=2))
    assert lora.weights == (2 * parameters + 4 * 20_971_520) // 8 + 2 * (2 * layer + head)
    assert lora.gradients == 4 * 20_971_520 // 8 + 2 * 2 * (20_971_520 // 32)


def test_activations_under_fsdp_are_those_of_16_bit_weights(llama_8b):
    half = TrainingSetup(rows=2, length=1024, weight_bytes=2)
    fsdp = replace(half, weight_bytes=4, autocast=True, engine="fsdp", stage=3, processes=8, local_processes=8)
    assert saved_by_layers(llama_8b, fsdp) == saved_by_layers(llama_8b, half)


# --- activations -----------------------------------------------------------------------------------------------------


def test_activations_of_8b_by_hand(llama_8b):
    """Full training in bf16, a token and a layer: norms 2 x 4096 x (4 + 2); queries and output 2 x 4096, keys and
    values 2 x 1024, in 2 bytes, 32 log-sum-exps in 4; 3 x 14336 and the inputs 2 x 4096 + 14336 in 2 bytes.
    """
    token = 12 * 4096 + 2 * (8192 + 2048) + 4 * 32 + 2 * 3 * 14336 + 2 * (8192 + 14336)
    setup = TrainingSetup(rows=2, length=1024, weight_bytes=2)
    assert saved_by_layers(llama_8b, setup) == 2048 * 32 * token
    last = 2048 * 4096 * (4 + 2)
    found = estimate(llama_8b, setup)
    assert found.activations == 2048 * 32 * token + last
    checkpointed = estimate(llama_8b, replace(setup, checkpointing=True))
    assert checkpointed.activations == found.activations_checkpointed == 2048 * (32 * 2 * 4096 + token) + last
    # a mask has keys and values repeated for 32 heads in place of 8, and is itself copied in each layer
    padded = saved_by_layers(llama_8b, replace(setup, padded=True)) - saved_by_layers(llama_8b, setup)
    assert padded == 2048 * 32 * 2 * 2 * (4096 - 1024) + 32 * 2 * 1024**2 * 2
    eager = saved_by_layers(llama_8b, replace(setup, attention="eager"))
    assert eager > 32 * 32 * 2 * 1024**2 * (4 + 2)
    assert saved_by_layers(llama_8b, replace(setup, forwards=2)) == 2 * 2048 * 32 * token


def test_activations_grow_with_tokens_and_not_with_the_square_of_the_length(llama_8b_lora):
    def activations(rows, length):
        return estimate(llama_8b_lora, TrainingSetup(rows=rows, length=length, weight_bytes=2)).activations

    assert activations(4, 1024) == 2 * activations(2, 1024) == activations(1, 4096)


def saved_bytes(model, ids: torch.Tensor, **inputs) -> int:
    """Bytes of the distinct storages that autograd keeps for backward, parameters not counted."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # or an address would be given out twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    base = model.get_base_model() if hasattr(model, "peft_config") else model
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        base.get_decoder()(input_ids=ids, use_cache=False, **inputs)
    return sum(kept.values())


MEASURED = {
    "full": {},
    "full, bf16": {"dtype": torch.bfloat16},
    "full, padded": {"padded": True},
    "full, eager": {"attention": "eager"},
    "adapter": {"lora_args": LORA},
    "adapter, bf16": {"lora_args": LORA, "dtype": torch.bfloat16},
    "adapter with dropout": {"lora_args": LoraArguments()},
    "adapter on two layers": {"lora_args": replace(LORA, target_modules="q_proj,v_proj")},
}


def measured_config(hidden: int, layers: int = 4, **options) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=500,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        **options,
    )


def training_model(config, lora_args=FULL, dtype=torch.float32, attention=None, checkpointing=False):
    options = {"attn_implementation": attention} if attention else {}
    model = attach_adapter(AutoModelForCausalLM.from_config(config, dtype=dtype, **options), lora_args).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if lora_args.use_peft:
            model.enable_input_require_grads()
    return model


def setup_of(rows, length, lora_args=FULL, dtype=torch.float32, attention="sdpa", padded=False, **options):
    return TrainingSetup(
        rows=rows,
        length=length,
        padded=padded,
        weight_bytes=dtype.itemsize,
        attention=attention,
        lora_dropout=lora_args.use_peft and lora_args.lora_dropout > 0,
        on_cpu=True,
        **options,
    )


@pytest.mark.parametrize("case", MEASURED)
@pytest.mark.parametrize(("hidden", "rows", "length"), [(128, 2, 96), (192, 1, 256)])
def test_activations_are_what_autograd_keeps(case, hidden, rows, length):
    options = dict(MEASURED[case])
    padded = options.pop("padded", False)
    ids = torch.randint(0, 500, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    inputs = {"attention_mask": mask} if padded else {}
    config = measured_config(hidden)
    setup = setup_of(rows, length, padded=padded, **options)
    found = estimate(read_shape(config, options.get("lora_args", FULL)), setup)

    kept = saved_bytes(training_model(config, **options), ids, **inputs)
    assert found.activations_kept == pytest.approx(kept, rel=0.25)

    # with checkpointing: what is kept through the forward pass, and a layer's share, measured as the difference of two
    # models, when it is computed again
    shorter = saved_bytes(training_model(measured_config(hidden, layers=3), **options), ids, **inputs)
    inputs_only = saved_bytes(training_model(config, checkpointing=True, **options), ids, **inputs)
    assert found.activations_checkpointed == pytest.approx(inputs_only + kept - shorter, rel=0.25)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_other_architectures(name, dtype):
    ids = torch.randint(0, 300, (2, 96), generator=torch.Generator().manual_seed(0))
    shape = read_shape(CONFIGS[name], FULL)
    setup = setup_of(2, 96, dtype=dtype, attention=shape.attention)
    kept = saved_bytes(training_model(CONFIGS[name], dtype=dtype), ids)
    assert estimate(shape, setup).activations == pytest.approx(kept, rel=0.25)


class LiveBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes of tensors that were alive at a time, those of before not counted."""

    def __init__(self, known):
        super().__init__()
        self.alive = {id(tensor.untyped_storage()): 0 for tensor in known}
        self.keep = [tensor.untyped_storage() for tensor in known]
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        import weakref

        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in self.alive:
                self.alive[id(storage)] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, id(storage))
        return result

    def _free(self, key: int) -> None:
        self.now -= self.alive.pop(key)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulation": 2},
        {"checkpointing": True},
        {"autocast": True},
        {"lora_args": LoraArguments()},
        {"lora_args": LoraArguments(), "dtype": torch.bfloat16, "checkpointing": True},
    ],
    ids=["full", "accumulation", "checkpointing", "autocast", "adapter", "adapter, bf16, checkpointing"],
)
def test_the_peak_of_a_step_is_what_lives_at_a_time(options):
    """Weights, gradients, activations and loss of a whole step; AdamW's states are exact anyway."""
    setup_options = {key: options[key] for key in ("accumulation", "checkpointing", "autocast") if key in options}
    model_options = {key: options[key] for key in ("lora_args", "dtype", "checkpointing") if key in options}
    config = measured_config(128)
    model = AutoModelForCausalLM.from_config(config, dtype=options.get("dtype", torch.float32))
    install_token_loss(model)
    model = attach_adapter(model, options.get("lora_args", FULL)).train()
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if "lora_args" in options:
            model.enable_input_require_grads()
    ids = torch.randint(0, 500, (2, 192), generator=torch.Generator().manual_seed(0))
    with LiveBytes(list(model.parameters())) as live:
        for _ in range(options.get("accumulation", 1)):
            with torch.autocast("cpu", torch.bfloat16, enabled=options.get("autocast", False)):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            del loss
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    model_options.pop("checkpointing", None)
    setup = setup_of(2, 192, optimizer="sgd", **model_options, **setup_options)
    found = estimate(read_shape(config, options.get("lora_args", FULL)), setup)
    assert found.weights == weights
    assert found.device == pytest.approx(weights + live.peak, rel=0.25)


def test_the_loss_holds_a_chunk_and_others_the_whole(llama_8b, llama_8b_lora):
    setup = TrainingSetup(rows=4, length=2048, weight_bytes=2)
    # 256 rows of logits in float32 and their gradient in bf16, and the gradient of 8192 hidden states; a head that is
    # trained has its gradient beside
    chunk = 256 * 128256 * (4 + 2) + 8192 * 4096 * 2
    assert estimate(llama_8b_lora, setup).logits == chunk
    # multiplied in bf16, 2**14 tokens of the vocabulary at a time
    assert estimate(llama_8b, setup).logits == chunk + 4 * 128256 * 4096 + 4 * 2**14 * 4096
    whole = estimate(llama_8b_lora, replace(setup, logits="whole")).logits
    assert whole >= 8192 * 128256 * 4
    assert estimate(llama_8b_lora, replace(setup, logits="none")).logits == 8192 * 4096 * 4


def test_rollouts_hold_the_cache_of_all_rows(llama_8b_lora):
    setup = TrainingSetup(rows=1, length=1, weight_bytes=2, rollout_rows=1, rollout_length=8192)
    # 2 x 32 layers x 1024 in bf16: 128 KiB a token, and the logits of the next token twice
    assert estimate(llama_8b_lora, setup).rollouts == 8192 * 128 * 1024 + 2 * 4 * 128256
    many = estimate(llama_8b_lora, replace(setup, rollout_rows=64, rollout_length=1024))
    # updates and rollouts take turns
    assert many.device == many.weights + many.optimizer + many.rollouts


# --- in words --------------------------------------------------------------------------------------------------------


def test_the_table_says_what_there_is_and_whether_it_fits(llama_8b):
    found = estimate(llama_8b, TrainingSetup(rows=1, length=1024))
    text = describe(found, Memory(64 * GIB, 80 * GIB, "H100"))
    # 16 bytes a parameter: 29.92 GiB each for weights and gradients, 59.83 for AdamW's two moments
    assert text.count("29.92") == 4  # the host holds the weights while they load, which is its peak as well
    assert "59.83" in text
    assert "found (H100)" in text
    assert "80.00" in text
    assert "memory: does not fit: the device would need 1" in text
    assert "activations with --gradient_checkpointing True: " in text
    small = describe(replace(found, optimizer=0, gradients=0), Memory(64 * GIB, 80 * GIB, "H100"))
    assert "memory: fits (an estimate; 10% are left free" in small


def test_what_fits():
    assert fits(90, 100)
    assert not fits(91, 100)
    found = estimate(read_shape(CONFIGS["llama"], FULL), TrainingSetup(rows=1, length=64, on_cpu=True))
    assert not shortages(found, Memory(2 * found.device), local_processes=1)
    # on a CPU every process has its part of the same memory
    (missing,) = shortages(found, Memory(2 * found.device), local_processes=2)
    assert missing.startswith("the host would need")


# --- the plan of a run -----------------------------------------------------------------------------------------------


class Rows:
    """As much of a data set as longest_row looks at."""

    def __init__(self, **columns):
        self.columns, self.column_names = columns, list(columns)

    def with_format(self, _):
        return {name: torch.tensor(values).numpy() for name, values in self.columns.items()}


def test_the_longest_row_counts():
    assert longest_row(Rows(length=[3, 70, 5]), 128) == 70
    assert longest_row(Rows(length=[3, 700]), 128) == 128
    pairs = Rows(prompt_length=[10, 20], chosen_length=[5, 5], rejected_length=[4, 9])
    assert longest_row(pairs, 128) == 29
    assert longest_row(Rows(seq_lengths=[[3, 4]]), 128) == 128
    assert longest_row(object(), 128) == 128


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), (None, False)),
        (("--qlora", "True"), (4, True)),
        (("--load_in_4bit", "True"), (4, False)),
        (("--load_in_8bit", "True"), (8, False)),
    ],
)
def test_quantization_counts_whether_flags_or_the_checkpoint_ask_for_it(
    flags, expected, tiny_model_dir, sft_file, tmp_path
):
    run_sft(tiny_model_dir, sft_file, tmp_path / "out", "--dry_run", "True", *flags)
    plan = run_memory.current_plan.get()
    assert (plan.setup.bits, plan.setup.double_quant) == expected
    if flags:  # saved in such weights, no flag is needed
        quantization = asked_for(plan.model_args)
        settings = quantization.config(AutoModelForCausalLM.from_pretrained(tiny_model_dir))
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=settings)
        model.save_pretrained(tmp_path / "saved")
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "saved")
        run_sft(str(tmp_path / "saved"), sft_file, tmp_path / "out", "--dry_run", "True")
        again = run_memory.current_plan.get()
        assert (again.setup.bits, again.setup.double_quant) == expected
        assert again.estimate.weights == plan.estimate.weights


def test_deepspeed_configurations(tmp_path):
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    expected = {
        "engine": "deepspeed",
        "stage": 3,
        "half": True,
        "offload_optimizer": True,
        "offload_parameters": False,
    }
    for deepspeed in (str(path), {"zero_optimization": zero}):
        args = SimpleNamespace(deepspeed=deepspeed, bf16=True, fp16=False, fsdp=None)
        assert run_memory._sharding(args) == expected
    for keeps_parameters, stage in (
        ({}, 3),
        ({"reshard_after_forward": True}, 3),
        ({"reshard_after_forward": False}, 2),
    ):
        sharded = SimpleNamespace(deepspeed=None, fsdp=True, fsdp_config=keeps_parameters)
        assert run_memory._sharding(sharded)["stage"] == stage
    assert run_memory._sharding(SimpleNamespace(deepspeed=None, fsdp="")) == {}


def run_dpo(model_dir, preference_file, output_dir, *flags):
    import dpo_training

    return dpo_training.main(
        ["--model_name_or_path", model_dir, "--train_file_dir", preference_file, "--output_dir", str(output_dir)]
        + ["--template_name", "chatml", "--max_length", "128", "--per_device_train_batch_size", "4", *flags]
    )


def run_ppo(model_dir, sft_file, output_dir, *flags):
    import ppo_training

    return ppo_training.main(
        ["--model_name_or_path", model_dir, "--train_file_dir", sft_file, "--output_dir", str(output_dir)]
        + ["--template_name", "chatml", "--max_new_tokens", "16", "--reward_function", "builtins:len", *flags]
    )


@pytest.mark.parametrize("stage", ["pt", "sft", "rm", "dpo", "ppo"])
def test_a_dry_run_prints_the_estimate_and_writes_nothing(stage, request, tiny_model_dir, tmp_path, capsys):
    run = {"pt": run_pt, "sft": run_sft, "rm": run_rm, "dpo": run_dpo, "ppo": run_ppo}[stage]
    name = {"pt": "text_file", "sft": "sft_file", "ppo": "sft_file"}.get(stage, "preference_file")
    report = run(tiny_model_dir, request.getfixturevalue(name), tmp_path / "o", "--dry_run", "True")
    text = capsys.readouterr().out
    assert "Memory by estimate, GiB" in text
    assert "memory: fits" in text
    assert "nothing was written" in text
    assert ("rollouts: cache" in text) == (stage == "ppo")
    assert report["estimated_memory_gib"] > 0
    assert not (tmp_path / "o").exists()
    plan = run_memory.current_plan.get()
    assert plan.stage == stage
    assert plan.setup.rows == {"pt": 4, "sft": 4, "rm": 8, "dpo": 8, "ppo": 8}[stage]
    assert plan.model.parameters == AutoModelForCausalLM.from_pretrained(tiny_model_dir).num_parameters() - (
        0 if stage != "rm" else -64  # the score head; the language-model head of the tiny model is its embedding
    )


def test_ppo_trains_two_adapters_or_two_models(tiny_model_dir, sft_file, tmp_path):
    run_ppo(tiny_model_dir, sft_file, tmp_path, "--dry_run", "True")
    plan = run_memory.current_plan.get()
    policy = read_shape(LlamaConfig.from_pretrained(tiny_model_dir), LoraArguments())
    assert plan.model.trainable == 2 * policy.trainable + 64 + 1  # and the value head
    assert (plan.setup.forwards, plan.setup.frozen_bytes) == (2, 0)
    assert plan.setup.length == plan.setup.rollout_length
    run_ppo(tiny_model_dir, sft_file, tmp_path, "--use_peft", "False", "--dry_run", "True")
    plan = run_memory.current_plan.get()
    assert plan.model.parameters == plan.model.trainable == 2 * policy.parameters + 65
    assert plan.setup.frozen_bytes == 4 * policy.parameters  # the reference


def test_dpo_has_a_second_model_where_all_weights_are_trained(tiny_model_dir, preference_file, tmp_path):
    for flags, copies in (((), 0), (("--use_peft", "False"), 1), (("--ref_model_name_or_path", tiny_model_dir), 1)):
        run_dpo(tiny_model_dir, preference_file, tmp_path, "--dry_run", "True", *flags)
        plan = run_memory.current_plan.get()
        assert plan.setup.frozen_bytes == copies * 4 * plan.model.parameters


def test_the_model_card_has_the_estimate_beside_the_measured_peak(tiny_model_dir, sft_file, tmp_path):
    metrics = run_sft(tiny_model_dir, sft_file, tmp_path, "--max_steps", "2", "--do_train", "True")
    saved = json.loads((tmp_path / "all_results.json").read_text())
    assert saved["estimated_memory_gib"] == metrics["estimated_memory_gib"]
    assert 0.3 < saved["estimated_memory_gib"] / saved["peak_memory_gib"] < 3  # here nearly all is the libraries
    card = (tmp_path / "README.md").read_text()
    assert "| estimated_memory_gib |" in card
    assert "| peak_memory_gib |" in card


def test_a_model_that_cannot_be_looked_at_trains_all_the_same(tiny_model_dir, sft_file, tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no meta tensors here")

    monkeypatch.setattr(run_memory, "read_shape", broken)
    metrics = run_sft(tiny_model_dir, sft_file, tmp_path, "--max_steps", "1", "--do_train", "True")
    assert "estimated_memory_gib" not in metrics
    assert metrics["peak_memory_gib"] > 0
    assert "no estimate for this model (RuntimeError: no meta tensors here)" in capsys.readouterr().out


# --- when memory runs out --------------------------------------------------------------------------------------------

CUDA_MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which"
CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "8589934592 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(CUDA_MESSAGE), True),
        (RuntimeError(CPU_MESSAGE), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("size mismatch for lm_head.weight"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) == expected


def without_memory(monkeypatch, error):
    """Every forward pass of training fails; those that look at the model while it loads do not."""
    from transformers.models.llama.modeling_llama import LlamaModel

    original = LlamaModel.forward

    def forward(self, *args, **kwargs):
        if torch.is_grad_enabled():
            raise error
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", forward)


def fail(run, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        run_script(run)
    assert ended.value.code == 1
    return capsys.readouterr().err


def test_running_out_of_memory_is_explained(tiny_model_dir, sft_file, tmp_path, monkeypatch, capsys):
    without_memory(monkeypatch, torch.OutOfMemoryError(CUDA_MESSAGE))
    text = fail(lambda: run_sft(tiny_model_dir, sft_file, tmp_path, "--model_max_length", "1024"), capsys)
    assert text.index("Traceback") < text.index("error: out of memory")
    assert "2.00 GiB more were asked for" in text
    assert "Memory by estimate, GiB" in text
    assert "docs/faq.md" not in text


def test_memory_of_the_host(tiny_model_dir, text_file, tmp_path, monkeypatch, capsys):
    without_memory(monkeypatch, RuntimeError(CPU_MESSAGE))
    text = fail(lambda: run_pt(tiny_model_dir, text_file, tmp_path, "--use_peft", "False"), capsys)
    assert "error: out of memory on the host: 8.00 GiB more were asked for" in text
    assert "Memory by estimate, GiB" in text


def test_other_errors_are_raised_as_they_are(capsys):
    def main():
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        run_script(main)


def test_without_a_plan_the_documentation_is_named():
    token = run_memory.current_plan.set(None)
    try:
        assert explain(MemoryError()) == 'out of memory on the host\nsee "Out of memory" in docs/faq.md'
    finally:
        run_memory.current_plan.reset(token)


def plan_of(setup: TrainingSetup, lora_args=FULL, stage="sft", device_gib=80, **options) -> MemoryPlan:
    """The plan of an 8B model on a GPU."""

    def with_adapter(lora_args):
        return read_shape(LLAMA_8B, lora_args), replace(setup, weight_bytes=2, lora_dropout=True, frozen_bytes=0)

    args = {"per_device_train_batch_size": setup.rows, "bf16": setup.autocast, "fp16": False}
    return MemoryPlan(
        stage=stage,
        model=read_shape(LLAMA_8B, lora_args),
        setup=setup,
        memory=Memory(256 * GIB, device_gib * GIB, "H100"),
        with_adapter=with_adapter,
        model_args=ModelArguments(model_name_or_path="base"),
        lora_args=lora_args,
        stage_args=SimpleNamespace(max_new_tokens=256),
        args=SimpleNamespace(**(args | options)),
    )


def test_remedies_come_with_the_flags_and_what_they_save():
    setup = TrainingSetup(rows=8, length=2048, weight_bytes=2, lora_dropout=True, accumulation=2)
    plan = plan_of(setup, LoraArguments(), device_gib=48)
    text = "\n".join(advice(plan))
    # ranked: first what costs time alone, the larger saving first; the global batch stays 16
    assert text.index("1. --gradient_checkpointing True") < text.index("2. --per_device_train_batch_size 1 ")
    assert "--per_device_train_batch_size 1 --gradient_accumulation_steps 16" in text
    found = estimate(plan.model, replace(setup, checkpointing=True))
    saved = (plan.estimate.device - found.device) / GIB
    assert f"saves {saved:.2f} GiB: {found.device / GIB:.2f} GiB in all, fits" in text
    for flag in ("--model_max_length 1024", "--qlora True", "torchrun --nproc_per_node 8 ... --deepspeed zero3.json"):
        assert flag in text
    assert text.index("--deepspeed") < text.index("--qlora True")
    # an adapter's optimizer is too small to matter, its weights are in bf16, and it is one already
    for flag in ("--optim", "--dtype", "--use_peft"):
        assert flag not in text


def test_the_batch_is_no_smaller_than_it_must_be():
    setup = TrainingSetup(rows=8, length=1024, weight_bytes=2)
    plan = plan_of(setup, LORA, device_gib=60)
    half = estimate(plan.model, replace(setup, rows=4, accumulation=2)).device
    assert fits(half, 60 * GIB)
    assert not fits(plan.estimate.device, 60 * GIB)
    assert "--per_device_train_batch_size 4 --gradient_accumulation_steps 2" in "\n".join(advice(plan))


def test_full_training_is_offered_adapters_optimizers_and_zero():
    text = "\n".join(advice(plan_of(TrainingSetup(rows=1, length=1024, checkpointing=True, autocast=True))))
    for flag in (
        "--use_peft True\n",
        "--use_peft True --qlora True\n",
        "--optim adafactor\n",
        "--optim paged_adamw_32bit\n",
        "torchrun --nproc_per_node 2 ... --deepspeed zero3.json\n",
    ):
        assert flag in text
    for flag in ("--per_device_train_batch_size", "--gradient_checkpointing"):
        assert flag not in text


def test_what_is_in_use_is_not_offered():
    setup = TrainingSetup(
        rows=1,
        length=128,
        weight_bytes=2,
        bits=4,
        checkpointing=True,
        engine="deepspeed",
        stage=2,
        processes=2,
        local_processes=2,
    )
    (line,) = advice(plan_of(setup, LORA))
    assert line.startswith("no other setting of this run needs noticeably less")


def test_several_remedies_together():
    setup = TrainingSetup(rows=16, length=4096, weight_bytes=2, lora_dropout=True)
    lines = advice(plan_of(setup, LoraArguments(), device_gib=20))
    assert lines[-1].startswith("1 to 2 together: ")
    assert lines[-1].endswith("GiB in all, fits")
    lines = advice(plan_of(setup, LoraArguments(), device_gib=2))
    assert lines[-1].startswith("all of them together: ")
    assert lines[-1].endswith("which does not fit yet")


def test_rollouts_are_cut_into_smaller_batches():
    setup = TrainingSetup(
        rows=1, length=1280, weight_bytes=2, checkpointing=True, forwards=2, rollout_rows=64, rollout_length=1280
    )
    text = "\n".join(advice(plan_of(setup, LORA, stage="ppo")))
    assert "--rollout_batch_size 32\n" in text
    assert "--max_prompt_length 512\n" in text
    assert "zero3" not in text  # PPO runs with ZeRO-2


def test_eager_attention_is_given_up():
    setup = TrainingSetup(rows=1, length=4096, weight_bytes=2, attention="eager")
    text = "\n".join(advice(plan_of(setup, LORA)))
    assert "--attn_implementation sdpa\n" in text


def test_the_host_is_another_place_than_the_device():
    """Loading float32 weights in eight processes: the advice is about the host's memory."""
    setup = TrainingSetup(rows=1, length=512, processes=8, local_processes=8)
    plan = plan_of(setup, LORA)
    assert plan.estimate.host == 8 * 4 * 8_030_261_248
    text = "\n".join(advice(plan, on_host=True))
    assert "--dtype bfloat16\n     saves 119.66 GiB" in text
    assert "--gradient_checkpointing" not in text


def test_70b_is_looked_at_without_a_weight_in_memory():
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    shape = read_shape(config, LoraArguments(target_modules="q_proj,v_proj"))
    assert shape.parameters == 70_553_706_496
    found = estimate(shape, TrainingSetup(rows=1, length=4096, weight_bytes=2, bits=4, checkpointing=True))
    # half a byte and 1.0156 / 64 for 68.45e9 weights of linear layers, two bytes for embedding and head
    assert found.weights / GIB == pytest.approx(36.8, abs=0.1)


def test_engines_side_by_side():
    """Sharding divides what the devices hold; quantized weights are shared out by none."""
    model = plan_of(TrainingSetup(rows=1, length=512), FULL).model
    setup = TrainingSetup(rows=1, length=512)
    table = by_engine(model, setup, half=False)
    assert table["torchrun alone"][0] == estimate(model, setup).device
    for name in ("--deepspeed zero3.json", "--fsdp True"):
        sizes = table[name]
        assert sizes == sorted(sizes, reverse=True)
        # 16 bytes for each of 8 billion parameters: weights, gradients, AdamW
        assert sizes[1] - sizes[3] > 16 * 8e9 * (1 / 2 - 1 / 8) * 0.95
    zero2, ddp = table["--deepspeed zero2.json"][3], table["torchrun alone"][3]
    assert table["--deepspeed zero3.json"][3] < zero2 < ddp
    assert table["--deepspeed zero3_offload.json"][3] < table["--deepspeed zero3.json"][3]
    quantized = by_engine(plan_of(setup, LORA).model, replace(setup, bits=4), half=True)
    assert list(quantized) == ["torchrun alone", "--deepspeed zero2.json", "--deepspeed zero2_offload.json"]
    text = describe_engines(model, setup, half=False)
    for number in (*WORLD_SIZES, *table):
        assert str(number) in text
