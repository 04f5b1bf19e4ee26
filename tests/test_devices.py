"""Every stage's forward and backward pass on a pretended accelerator: nothing of it is left on the CPU."""

import copy

import pytest
import torch
from accelerate import Accelerator as RealAccelerator
from transformers import PreTrainedModel, Trainer, TrainingArguments

from stagewise.run import lifecycle
from tests.pretended_accelerator import ACCELERATOR, Accelerator, MixedDevicesError, OnAccelerator
from tests.stages import FULL, run_sft


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
SFT = {
    "padded": NO_DROPOUT,
    "packed": (*FULL, "--packing", "True"),
    "eager": (*FULL, "--packing", "True", "--attn_implementation", "eager"),
    "S2": (*FULL, "--packing", "True", "--shift_attn", "True", "--shift_attn_group", "8"),
    "weighted": (*FULL, "--packing", "True", "--weighted_loss_mode", "sample"),
    "smoothed": (*NO_DROPOUT, "--label_smoothing_factor", "0.1"),
}


@pytest.mark.parametrize("kind", SFT)
def test_sft(kind, tiny_model_dir, sft_file, tmp_path, trainer_of, there):
    trainer = trainer_of(run_sft, tiny_model_dir, sft_file, tmp_path / "out", *SFT[kind])
    assert_same_there(trainer, *first_batch(trainer), there)
