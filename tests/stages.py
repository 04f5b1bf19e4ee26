"""How tests call the stage scripts: in process, on the tiny model, for a few steps."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

TINY = ("--per_device_train_batch_size", "4", "--logging_steps", "1", "--save_steps", "3", "--learning_rate", "5e-3")
LORA = ("--lora_rank", "4", "--lora_alpha", "8", "--lora_dropout", "0.1")
FULL = ("--use_peft", "False")


def run_pt(model_dir: str, text_file: str, output_dir: Path, *flags: str) -> dict:
    import pretraining

    return pretraining.main(
        ["--model_name_or_path", model_dir, "--train_file_dir", text_file, "--output_dir", str(output_dir)]
        + ["--block_size", "64", *TINY, *flags]
    )


def run_sft(model_dir: str, sft_file: str, output_dir: Path, *flags: str) -> dict:
    import supervised_finetuning

    return supervised_finetuning.main(
        ["--model_name_or_path", model_dir, "--train_file_dir", sft_file, "--output_dir", str(output_dir)]
        + ["--template_name", "chatml", "--model_max_length", "128", *TINY, *flags]
    )


def run_rm(model_dir: str, preference_file: str, output_dir: Path, *flags: str) -> dict:
    import reward_modeling

    return reward_modeling.main(
        ["--model_name_or_path", model_dir, "--train_file_dir", preference_file, "--output_dir", str(output_dir)]
        + ["--template_name", "chatml", "--max_length", "128", *TINY, *flags]
    )


def losses(output_dir: Path) -> dict[int, float]:
    """Training loss of each logged step."""
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    """The saved tensors of an adapter or a full model."""
    name = "adapter_model.safetensors"
    return load_file(output_dir / (name if (output_dir / name).exists() else "model.safetensors"))


def assert_same_weights(one: Path, other: Path, **tolerance: float) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], **tolerance)
