"""What an accelerator is said to do, and what comes of it: MFU in the log, exact positions under TF32."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from stagewise import devices
from stagewise.arguments import LoraArguments
from stagewise.modeling.experts import every_pass_trains_all
from stagewise.modeling.lora import attach_adapter
from stagewise.modeling.model_shape import read_shape
from stagewise.modeling.rope_scaling import hold_frequencies
from stagewise.modeling.utilization import flops_per_token
from stagewise.run import memory
from stagewise.run.lineage import check_layout
from tests.architectures import tiny_model
from tests.stages import LORA, run_sft

SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
LLAMA = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)
# queries and output 64 x 64, keys and values 64 x 32, three of 64 x 160, in two layers; the head is 300 x 64
LINEAR, HEAD = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160), 300 * 64


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("Tesla T4", 65),
        ("NVIDIA A10G", 70),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("cpu", None),
    ],
)
def test_peaks_are_those_of_whole_devices(name, teraflops):
    assert devices.peak_flops(name) == (None if teraflops is None else teraflops * 1e12)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_emulated_bfloat16_does_not_count(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(major=capability[0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert devices.multiplies_bf16() is expected


def test_operations_of_a_token_by_hand():
    full = read_shape(LLAMA, LoraArguments(use_peft=False))
    assert flops_per_token(full) == 6 * (LINEAR + HEAD)
    assert flops_per_token(full, reference=True) == 8 * (LINEAR + HEAD)
    reward = read_shape(LLAMA, LoraArguments(use_peft=False), scores=True)
    assert flops_per_token(reward, scores=True) == 6 * LINEAR
    # rank 8 on seven layers of each of two blocks: 8 x (inputs + outputs)
    adapter = 2 * 8 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 160))
    assert flops_per_token(read_shape(LLAMA, LoraArguments())) == 4 * (LINEAR + HEAD) + 6 * adapter
    trained_head = read_shape(LLAMA, LoraArguments(modules_to_save="lm_head"))
    assert flops_per_token(trained_head) == 4 * LINEAR + 6 * HEAD + 6 * adapter


def test_a_mixture_of_experts_has_no_figure():
    from stagewise.modeling.model_shape import _base_shape

    assert flops_per_token(_base_shape(tiny_model("mixtral"))) is None


def test_the_log_has_the_share_of_the_peak(tiny_model_dir, sft_file, tmp_path, monkeypatch, capsys):
    """A device is made up that does 10^9 operations a second."""
    found = memory.find_memory
    monkeypatch.setattr(
        memory, "find_memory", lambda *args: memory.Memory(found(*args).host, 10**12, "NVIDIA H100 PCIe")
    )
    monkeypatch.setattr(memory, "peak_flops", lambda name: 1e9 if name == "NVIDIA H100 PCIe" else None)
    run_sft(tiny_model_dir, sft_file, tmp_path, *LORA, "--bf16", "True", "--max_steps", "2")
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "mfu" in entry]
    assert len(logged) == 2
    flops = flops_per_token(memory.current_plan.get().model)
    for entry in logged:
        assert entry["mfu"] == pytest.approx(entry["tokens_per_second"] * flops / 1e9, rel=1e-2)
    assert "  mfu " in capsys.readouterr().out


def test_no_share_without_a_known_peak_or_16_bits(tiny_model_dir, sft_file, tmp_path):
    run_sft(tiny_model_dir, sft_file, tmp_path, *LORA, "--max_steps", "1")
    assert '"mfu"' not in (tmp_path / "trainer_state.json").read_text()
    plan = memory.current_plan.get()
    on_gpu = memory.replace(plan, memory=memory.Memory(10**12, 10**12, "NVIDIA H200"))
    assert on_gpu.full_speed is None  # products in float32
    half = memory.replace(on_gpu, setup=memory.replace(plan.setup, autocast=True))
    assert half.full_speed == 989e12 / flops_per_token(plan.model)
    assert memory.replace(half, stage="ppo").full_speed is None
    assert memory.replace(half, memory=memory.Memory(10**12, 10**12, "a GPU of tomorrow")).full_speed is None


def test_positions_are_exact_under_tf32(monkeypatch):
    """Rotary angles are made with TF32 off, and what comes after them has it on again."""
    model, precision = tiny_model("llama"), ["high"]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision[0])
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda value: precision.insert(0, value))
    hold_frequencies(model)
    seen = []
    model.model.rotary_emb.forward = lambda *args, **kwargs: (
        seen.append(precision[0]) or (torch.ones(1), torch.ones(1))
    )
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert seen == ["highest"]
    assert precision[0] == "high"

    def broken(*args, **kwargs):
        raise ValueError("broken")

    model.model.rotary_emb.forward = broken
    with pytest.raises(ValueError, match="broken"):
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert precision[0] == "high"


def test_what_a_backward_pass_may_leave_out():
    assert every_pass_trains_all(tiny_model("llama"))
    assert every_pass_trains_all(attach_adapter(tiny_model("llama"), LoraArguments()))
    assert not every_pass_trains_all(tiny_model("mixtral"))
    dropping = tiny_model("llama")
    dropping.config.layerdrop = 0.1
    assert not every_pass_trains_all(dropping)
    reads_images = tiny_model("llama")
    text = copy.deepcopy(reads_images.config)
    reads_images.config.get_text_config = lambda *args, **kwargs: text
    assert not every_pass_trains_all(reads_images)


def test_going_on_in_another_precision_is_refused(tmp_path):
    (tmp_path / "stage.json").write_text(
        json.dumps({"layout": {"engine": "plain", "processes": 1, "rows_per_step": 4, "precision": "float32"}})
    )
    args = SimpleNamespace(
        per_device_train_batch_size=4, gradient_accumulation_steps=1, world_size=1, deepspeed=None, fsdp=False,
        bf16=False, fp16=False,
    )  # fmt: skip
    check_layout(str(tmp_path), args)
    args.bf16 = True
    with pytest.raises(Exception, match="was trained in float32, and this run would go on in bf16; pass --bf16 False"):
        check_layout(str(tmp_path), args)
