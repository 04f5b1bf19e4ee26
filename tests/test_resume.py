"""A resumed run equals an uninterrupted one: the same losses at every step, the same final weights."""

import shutil
from pathlib import Path

import pytest

from stagewise.errors import InputError
from tests.stages import FULL, LORA, assert_same_weights, losses, run_pt, run_sft, weights

STEPS = ("--max_steps", "8", "--eval_strategy", "steps", "--eval_steps", "4")


@pytest.mark.parametrize("packing", ["True", "False"])
@pytest.mark.parametrize("mode", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("data", ["pt", "sft", "mixed"])
def test_resume_equals_no_interruption(data, mode, packing, tiny_model_dir, text_file, sft_file, tmp_path):
    run, source = (run_pt, text_file) if data == "pt" else (run_sft, sft_file)
    flags = (*mode, *STEPS, "--packing", packing)
    if data == "mixed":
        shutil.copy(sft_file, tmp_path / "more.jsonl")
        source += f",{tmp_path / 'more.jsonl'}"
        flags += ("--mix_strategy", "interleave_under", "--mix_probs", "0.7,0.3")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(tiny_model_dir, source, whole, *flags)
    # what a killed run leaves: its checkpoints up to step 3, and nothing that is written at the end
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    run(tiny_model_dir, source, resumed, *flags, "--resume_from_checkpoint", "True")
    assert len(losses(whole)) == 8
    assert losses(resumed) == losses(whole)
    assert_same_weights(whole, resumed, rtol=0, atol=0)


def test_resuming_a_finished_run_trains_no_further(tiny_model_dir, text_file, tmp_path):
    run_pt(tiny_model_dir, text_file, tmp_path, *LORA, "--max_steps", "4", "--save_steps", "2")
    before = weights(tmp_path)
    metrics = run_pt(
        tiny_model_dir, text_file, tmp_path, *LORA, "--max_steps", "4", "--resume_from_checkpoint", "True"
    )
    after = weights(tmp_path)
    assert all((before[key] == after[key]).all() for key in before)
    assert metrics["eval_loss"] > 0
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4]


def test_a_checkpoint_that_is_not_whole_is_passed_over(tiny_model_dir, text_file, tmp_path, caplog):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_pt(tiny_model_dir, text_file, whole, *LORA, "--max_steps", "8")
    broken.mkdir()
    for step in (3, 6):
        shutil.copytree(whole / f"checkpoint-{step}", broken / f"checkpoint-{step}")
    (broken / "checkpoint-6" / "optimizer.pt").unlink()
    run_pt(tiny_model_dir, text_file, broken, *LORA, "--max_steps", "8", "--resume_from_checkpoint", "True")
    assert losses(broken) == losses(whole)
    (broken / "checkpoint-6" / "optimizer.pt").unlink()
    path = str(broken / "checkpoint-6")
    with pytest.raises(InputError, match=r"checkpoint-6: optimizer\.pt is missing"):
        run_pt(tiny_model_dir, text_file, broken, *LORA, "--max_steps", "9", "--resume_from_checkpoint", path)


def test_nothing_to_resume_is_an_error_and_leaves_no_folder(tiny_model_dir, text_file, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="no whole checkpoint.*and pass --overwrite_output_dir True"):
        run_pt(tiny_model_dir, text_file, tmp_path / "used", "--resume_from_checkpoint", "True")
    with pytest.raises(InputError, match="no whole checkpoint.*leave the flag out to start$"):
        run_pt(tiny_model_dir, text_file, tmp_path / "new", "--resume_from_checkpoint", "True")
    assert not (tmp_path / "new").exists()


def test_a_used_output_dir_is_refused_or_replaced(tiny_model_dir, text_file, tmp_path):
    run_pt(tiny_model_dir, text_file, tmp_path, *LORA, "--max_steps", "3")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty; pass --resume_from_checkpoint True"):
        run_pt(tiny_model_dir, text_file, tmp_path, *LORA, "--max_steps", "2")
    flags = ("--max_steps", "2", "--save_steps", "1", "--overwrite_output_dir", "True")
    run_pt(tiny_model_dir, text_file, tmp_path, *LORA, *flags)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_other_rows_are_not_gone_on_with(tiny_model_dir, sft_file, tmp_path):
    """Nor fewer of them; the same rows in another place are the same rows."""
    flags = (*LORA, "--save_steps", "2", "--max_steps", "2")
    run_sft(tiny_model_dir, sft_file, tmp_path / "out", *flags)
    moved = tmp_path / "moved" / Path(sft_file).name
    moved.parent.mkdir()
    rows = Path(sft_file).read_text().splitlines(keepends=True)
    resumed = (*LORA, "--resume_from_checkpoint", "True", "--max_steps", "3")
    for changed in (rows[:-4], [*rows[1:], rows[0]], [rows[0].replace("plus", "and"), *rows[1:]]):
        moved.write_text("".join(changed))
        with pytest.raises(InputError, match="other training rows.*--peft_path"):
            run_sft(tiny_model_dir, str(moved), tmp_path / "out", *resumed)
    moved.write_text("".join(rows))
    run_sft(tiny_model_dir, str(moved), tmp_path / "out", *resumed)
    assert max(losses(tmp_path / "out")) == 3
