"""Every stage's forward and backward pass on a pretended accelerator: nothing of it is left on the CPU."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator as RealAccelerator
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stagewise.modeling import segments
from stagewise.modeling.actor_critic import CompletionBatch
from stagewise.modeling.memory import Memory
from stagewise.run import lifecycle, memory
from tests.architectures import tiny_model
from tests.pretended_accelerator import ACCELERATOR, Accelerator, MixedDevicesError, OnAccelerator
from tests.stages import FULL, run_pt, run_rm, run_sft
from tests.test_dpo import run_dpo


class Ready(Exception):
    """Raised with the Trainer of a run, in place of training."""


@pytest.fixture
def trainer_of(monkeypatch):
    """The Trainer that a script builds."""

    def stop(trainer, *args, **kwargs):
        raise Ready(trainer)

    monkeypatch.setattr(lifecycle, "train_and_save", stop)

    def build(run, *args) -> Trainer:
        with pytest.raises(Ready) as ready:
            run(*args)
        return ready.value.args[0]

    return build


@pytest.fixture
def there(monkeypatch):
    """A context in which trainers work on the accelerator; moves their models there."""

    def move(trainer: Trainer) -> Accelerator:
        for owner in (TrainingArguments, RealAccelerator):
            monkeypatch.setattr(owner, "device", property(lambda self: ACCELERATOR))
        with Accelerator():
            trainer.model.to(ACCELERATOR)
            for name, value in vars(trainer).items():
                if isinstance(value, torch.Tensor):  # made on args.device
                    setattr(trainer, name, value.to(ACCELERATOR))
            for module in trainer.model.modules():
                if isinstance(module, PreTrainedModel):
                    module.tie_weights()  # as on any device whose tensors are others
        return Accelerator()

    return move


def one_step(trainer: Trainer, batch: dict, count) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    count = count.to(trainer.args.device) if isinstance(count, torch.Tensor) else count
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(copy.copy(batch)), num_items_in_batch=count)
    loss.backward()
    return loss, {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def first_batch(trainer: Trainer) -> tuple[dict, object]:
    trainer.model.train()
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    batches[0].pop("location")
    return batches[0], count


def assert_same_there(trainer: Trainer, batch: dict, count, there) -> None:
    loss, gradients = one_step(trainer, batch, count)
    loss, gradients = loss.detach().clone(), {name: gradient.clone() for name, gradient in gradients.items()}
    with there(trainer):
        found, theirs = one_step(trainer, batch, count)
    assert isinstance(found, OnAccelerator)
    torch.testing.assert_close(found.numbers.detach(), loss)
    assert theirs.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name].numbers, gradient, msg=lambda text, name=name: f"{name}: {text}")


NO_DROPOUT = ("--lora_rank", "4", "--lora_dropout", "0")
PACKED = (*FULL, "--packing", "True")
SFT = {
    "padded": NO_DROPOUT,
    "packed": PACKED,
    "eager": (*PACKED, "--attn_implementation", "eager"),
    "S2": (*PACKED, "--shift_attn", "True", "--shift_attn_group", "8"),
    "weighted": (*PACKED, "--weighted_loss_mode", "case2"),
    "smoothed": (*NO_DROPOUT, "--label_smoothing_factor", "0.1"),
}


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir, tmp_path_factory) -> str:
    """A Llama with several heads, which S2-Attn needs."""
    folder = str(tmp_path_factory.mktemp("heads") / "model")
    tiny_model("llama", vocab_size=600).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", SFT)
def test_sft(kind, model_dir, sft_file, tmp_path, trainer_of, there):
    trainer = trainer_of(run_sft, model_dir, sft_file, tmp_path / "out", *SFT[kind])
    assert_same_there(trainer, *first_batch(trainer), there)


def test_rm(model_dir, preference_file, tmp_path, trainer_of, there):
    trainer = trainer_of(run_rm, model_dir, preference_file, tmp_path / "out", *NO_DROPOUT)
    assert_same_there(trainer, *first_batch(trainer), there)


@pytest.mark.parametrize("flags", [NO_DROPOUT, FULL])
def test_dpo(flags, model_dir, preference_file, tmp_path, trainer_of, there):
    trainer = trainer_of(run_dpo, model_dir, preference_file, tmp_path / "out", *flags)
    reference = trainer.ref_model
    if reference is not None:
        with Accelerator():
            trainer.ref_model = copy.deepcopy(reference).to(ACCELERATOR)
        trainer.ref_model, moved = reference, trainer.ref_model

        def after(trainer, move=there):
            trainer.ref_model = moved
            return move(trainer)

        there = after
    assert_same_there(trainer, *first_batch(trainer), there)


def run_ppo(model_dir: str, rows: str, folder: Path, *flags: str) -> None:
    import ppo_training

    folder.mkdir(exist_ok=True)
    (folder / "rewards.py").write_text("def length(prompts, completions):\n    return [len(x) for x in completions]\n")
    ppo_training.main(
        ["--model_name_or_path", model_dir, "--train_file_dir", rows, "--template_name", "chatml"]
        + ["--output_dir", str(folder / "out"), "--reward_function", f"{folder / 'rewards.py'}:length"]
        + ["--max_new_tokens", "8", "--per_device_train_batch_size", "4", "--max_steps", "2", *flags]
    )


def test_ppo(model_dir, preference_file, tmp_path, trainer_of, there):
    """Updates; and, there, what is said of completions: log-probabilities, the reference's, values."""
    trainer = trainer_of(run_ppo, model_dir, preference_file, tmp_path, *NO_DROPOUT)
    rollouts = trainer._collect(trainer.train_dataset, range(8), 0, 0, 8, True)[0]
    trainer._locations = [""] * 8
    batch = trainer._mini_batches(trainer.experience(rollouts), 0)[0][0]
    batch.pop("location")
    trainer.model.train()
    assert_same_there(trainer, batch, None, there)
    actor = trainer.model.eval()
    columns = {name: batch[name] for name in ("input_ids", "attention_mask", "prompt_length", "mask")}
    with there(trainer), torch.no_grad():
        completions = CompletionBatch(**columns).to(ACCELERATOR)
        found = [actor.policy_logprobs(completions), actor.reference_logprobs(completions)]
    torch.testing.assert_close(found[0].numbers, batch["logprobs"])
    torch.testing.assert_close(found[1].numbers, batch["logprobs"])  # before the first update


# The harness itself.


def test_an_index_left_on_the_cpu_is_found():
    with Accelerator():
        x = torch.arange(6.0, device=ACCELERATOR)
        torch.testing.assert_close(x[torch.arange(2, device=x.device)].cpu(), torch.tensor([0.0, 1.0]))
        assert x[x > 3].tolist() == [4.0, 5.0]
        assert x.sum().item() == 15
        torch.testing.assert_close((x * torch.tensor(2.0)).cpu(), 2 * torch.arange(6.0))  # a number, as with CUDA
        for mixed in (
            lambda: x[torch.arange(2)], lambda: x + torch.ones(6), lambda: x.index_select(0, torch.tensor([1])),
            lambda: x.new_zeros(6).scatter_add_(0, torch.arange(6), x), lambda: torch.cat([x, torch.ones(1)]),
        ):  # fmt: skip
            with pytest.raises(MixedDevicesError):
                mixed()


def test_a_fault_in_a_stage_is_found(model_dir, sft_file, tmp_path, trainer_of, there, monkeypatch):
    """Planted: the places of padded pieces are made on the CPU."""
    trainer = trainer_of(run_sft, model_dir, sft_file, tmp_path / "out", *SFT["packed"])
    cut = segments.cut_into_pieces
    monkeypatch.setattr(segments, "cut_into_pieces", lambda starts, group, shift, device: cut(
        starts, group, shift, torch.device("cpu")
    ))  # fmt: skip
    with pytest.raises(MixedDevicesError):
        assert_same_there(trainer, *first_batch(trainer), there)


# A kernel that knows no CPU.


class Placed(Exception):
    """The Trainer is about to place the model."""


def refuse_cpu(module, query, key, value, *args, **kwargs):
    assert isinstance(query, OnAccelerator), "a model was run before it was placed"
    ran.append(query.shape)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


ran: list = []


@pytest.mark.parametrize(("run", "flags", "proofs"), [
    (run_pt, (), True), (run_sft, ("--packing", "True"), True), (run_sft, (), False), (run_ppo, (), False),
])  # fmt: skip
def test_no_model_is_run_before_it_is_placed(run, flags, proofs, model_dir, request, tmp_path, monkeypatch):
    def place(*args, **kwargs):
        raise Placed

    monkeypatch.setitem(AttentionInterface._global_mapping, "refuses_cpu", refuse_cpu)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "refuses_cpu", sdpa_mask)
    monkeypatch.setattr(Trainer, "_move_model_to_device", place)
    monkeypatch.setattr(TrainingArguments, "device", property(lambda self: ACCELERATOR))
    monkeypatch.setattr(memory, "find_memory", lambda *args: Memory(2**40))
    ran.clear()
    rows = request.getfixturevalue({run_pt: "text_file", run_sft: "sft_file", run_ppo: "preference_file"}[run])
    with pytest.raises(Placed), Accelerator(loads=True):
        run(model_dir, rows, tmp_path / "out", *FULL, "--attn_implementation", "refuses_cpu", *flags)
    assert bool(ran) == proofs  # packing is proven there, by a small copy
