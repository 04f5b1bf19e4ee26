"""What a run may delete and write over: what runs have written, and nothing else, least of all what it reads."""

import json
import shutil
from pathlib import Path

import pytest

import dpo_training
import merge_peft_adapter
import ppo_training
import reward_modeling
import supervised_finetuning
from stagewise.errors import InputError
from tests.stages import LORA

FLAGS = (
    "--do_train", "True", "--max_steps", "1", "--report_to", "none", "--template_name", "chatml",
    "--overwrite_output_dir", "True", "--plot_loss", "True", "--logging_steps", "1", *LORA,
)  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(model, data, output, *flags: str) -> None:
    argv = ["--model_name_or_path", str(model), "--train_file_dir", str(data), "--output_dir", str(output)]
    supervised_finetuning.main([*argv, *FLAGS, *flags])


@pytest.fixture(scope="module")
def adapter_dir(tiny_model_dir, sft_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    run(tiny_model_dir, sft_file, folder, "--max_steps", "3", "--learning_rate", "1e-2")
    return folder


@pytest.fixture
def base(tiny_model_dir, tmp_path) -> Path:
    folder = tmp_path / "models" / "base"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "README.md").write_text("my notes")
    (folder / "plot.png").write_text("mine")
    return folder


def refused(folder: Path, said: str, start, *args) -> None:
    """`start` must end with an InputError that says it, and with every file below `folder` as it was."""
    before = content(folder)
    with pytest.raises(InputError, match=said):
        start(*args)
    assert content(folder) == before


@pytest.mark.parametrize(
    ("output", "how"), [("models/base", "is"), ("models", "holds"), (".", "holds"), ("models/base/out", "lies in")]
)
def test_a_base_is_not_written_over(base, sft_file, tmp_path, output, how):
    said = f"--output_dir .*: {how} what --model_name_or_path reads"
    refused(tmp_path, said, run, base, sft_file, tmp_path / output)


def test_nor_through_a_link(base, sft_file, tmp_path):
    (tmp_path / "link").symlink_to(base)
    refused(tmp_path, "is what --model_name_or_path reads", run, tmp_path / "link", sft_file, base)
    refused(tmp_path, "is what --model_name_or_path reads", run, base, sft_file, tmp_path / "link")


def test_nor_other_models_and_data(base, adapter_dir, sft_file, tiny_model_dir, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(sft_file, data / "rows.jsonl")
    adapter, other = tmp_path / "adapter", tmp_path / "other"
    shutil.copytree(adapter_dir, adapter)
    shutil.copytree(tiny_model_dir, other)
    for flag, folder, flags in (
        ("--train_file_dir", data, ()),
        ("--peft_path", adapter, ("--peft_path", str(adapter))),
        ("--tokenizer_name_or_path", other, ("--tokenizer_name_or_path", str(other))),
        ("--validation_file_dir", other, ("--validation_file_dir", str(other / "config.json"))),
    ):
        refused(tmp_path, f"what {flag} reads", run, base, data, folder, *flags)
    argv = ["--model_name_or_path", str(base), "--train_file_dir", str(data), "--output_dir", str(other), *FLAGS]
    for main, flag in (
        (dpo_training.main, "--ref_model_name_or_path"),
        (ppo_training.main, "--reward_model_path"),
        (reward_modeling.main, "--peft_path"),
    ):
        value = other if main is not reward_modeling.main else adapter
        where = argv if value is other else [*argv[:5], str(adapter), *argv[6:]]
        refused(tmp_path, f"what {flag} reads", main, [*where, flag, str(value)])


def test_nor_what_the_base_was_made_of(base, sft_file, tmp_path):
    """The adapter that a merged base came from, and the base of that, as stage.json tells."""
    parent = {"base_model": str(tmp_path / "first"), "stage": "pt", "merged_from": str(tmp_path / "pt")}
    stage = {"base_model": str(tmp_path / "second"), "merged_from": str(tmp_path / "adapter"), "parent": parent}
    (base / "stage.json").write_text(json.dumps(stage))
    for name in ("first", "second", "pt", "adapter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").write_text("it")
        refused(tmp_path, "was made of it", run, base, sft_file, tmp_path / name)


def test_a_run_replaces_its_own_files_alone(base, sft_file, tmp_path):
    output = tmp_path / "out"
    run(base, sft_file, output, "--save_steps", "1")
    first = set(content(output))
    assert {"adapter_model.safetensors", "README.md", "training_loss.png", "run_files.json"} <= first
    theirs = {"plot.png": "mine", "tokenizer_notes.txt": "mine", "notes/README.md": "mine", "model_a.safetensors": "x"}
    for name, text in theirs.items():
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text(text)
    run(base, sft_file, output, "--save_strategy", "no")
    after = content(output)
    assert {name: after[name].decode() for name in theirs} == theirs
    assert set(after) == {name for name in first if not name.startswith("checkpoint-1")} | set(theirs)
    run(base, sft_file, output, "--save_strategy", "no")  # and what the second wrote is a run's too
    assert set(content(output)) == set(after)


def test_what_nobody_listed_is_not_written_over(base, sft_file, tmp_path):
    """A folder that another program has filled."""
    output = tmp_path / "out"
    output.mkdir()
    for name in ("adapter_config.json", "checkpoint-7/model.safetensors", "run_config.yaml"):
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("theirs")
        refused(output, f"{Path(name).parts[0]}.*no run has written", run, base, sft_file, output)
        shutil.rmtree(output)
        output.mkdir()


def test_somebodys_readme_and_logs_stay(base, sft_file, tmp_path, capsys):
    output = tmp_path / "out"
    (output / "logs").mkdir(parents=True)
    (output / "README.md").write_text("my notes")
    (output / "logs" / "old").write_text("mine")
    for _ in range(2):
        run(base, sft_file, output)
        assert (output / "README.md").read_text() == "my notes"
        assert (output / "logs" / "old").read_text() == "mine"
        assert "no model card was written" in "".join(capsys.readouterr())
        assert (output / "adapter_model.safetensors").is_file()


def test_a_merge_replaces_a_merge_alone(tiny_model_dir, adapter_dir, tmp_path):
    def merge(output: Path, *flags: str) -> None:
        argv = ["--base_model", tiny_model_dir, "--lora_model", str(adapter_dir), "--output_dir", str(output)]
        merge_peft_adapter.main([*argv, *flags])

    merge(tmp_path / "merged")
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    before = content(tmp_path / "merged")
    merge(tmp_path / "merged", "--overwrite")
    after = content(tmp_path / "merged")
    assert set(after) == set(before)
    assert after["notes.txt"] == b"mine"
    shutil.copytree(tiny_model_dir, tmp_path / "theirs")
    refused(tmp_path, "no run has written", merge, tmp_path / "theirs", "--overwrite")
    refused(tmp_path, "holds what --lora_model reads", merge, Path(adapter_dir).parent, "--overwrite")
