"""--streaming: the same rows as without, and a resumed run goes on at the right row without reading what it passed."""

import json
import shutil
from pathlib import Path

import pytest

from stagewise.errors import InputError
from tests.stages import LORA, assert_same_weights, losses, run_pt, run_sft

STREAM = ("--streaming", "True", "--max_steps", "9", "--do_train", "True", "--train_sampling_strategy", "sequential")


@pytest.mark.parametrize("stage", ["pt", "sft"])
def test_a_stream_trains_on_the_rows_of_the_file_in_order(stage, tiny_model_dir, text_file, sft_file, tmp_path):
    """Streamed = read first and taken in order, over one epoch and the start of a second."""
    run, data = (run_pt, text_file) if stage == "pt" else (run_sft, sft_file)
    flags = (*LORA, *STREAM, "--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "2")
    run(tiny_model_dir, data, tmp_path / "stream", *flags)
    run(tiny_model_dir, data, tmp_path / "read", *flags, "--streaming", "False", "--dataloader_drop_last", "True")
    streamed, read = losses(tmp_path / "stream"), losses(tmp_path / "read")
    report = json.loads((tmp_path / "read" / "data_report.json").read_text())
    in_first_epoch = report["train"]["rows"] // 4
    assert in_first_epoch >= 4
    assert len(streamed) == 9
    for step in range(1, min(9, in_first_epoch) + 1):
        assert streamed[step] == read[step], step


@pytest.mark.parametrize("stage", ["pt", "sft"])
def test_resume_equals_no_interruption_and_reads_nothing_twice(
    stage, tiny_model_dir, text_file, sft_file, tmp_path, monkeypatch
):
    run, data = (run_pt, text_file) if stage == "pt" else (run_sft, sft_file)
    data = Path(shutil.copy(data, tmp_path))
    flags = (*LORA, *STREAM, "--per_device_train_batch_size", "2")
    run(tiny_model_dir, str(data), tmp_path / "whole", *flags)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", resumed / "checkpoint-3")

    from stagewise.data import streaming

    read = []
    original = streaming.RowStream._encoded

    def encoded(self, record, carry):
        read.append(record["location"])
        return original(self, record, carry)

    monkeypatch.setattr(streaming.RowStream, "_encoded", encoded)
    run(tiny_model_dir, str(data), resumed, *flags, "--resume_from_checkpoint", "True")
    assert losses(resumed) == losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "whole", resumed, rtol=0, atol=0)
    position = json.loads((resumed / "checkpoint-3" / "stream_position.json").read_text())
    assert position["batches"] == 3
    assert f"{data}:1" not in read[:3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max_steps", "-1"), "pass --max_steps"),
        (("--packing", "True"), "--packing: packing looks at the whole data set"),
        (("--dataloader_num_workers", "1"), "leave it at 0"),
        (("--do_eval", "True"), "nothing can be split off a stream"),
        (("--max_train_samples", "5"), "use --max_steps"),
    ],
)
def test_what_a_stream_cannot_do(flags, message, tiny_model_dir, sft_file, tmp_path):
    with pytest.raises(InputError, match=message):
        run_sft(tiny_model_dir, sft_file, tmp_path / "o", *LORA, *STREAM, *flags)
    assert not (tmp_path / "o").exists()


def test_a_checkpoint_without_a_position_is_refused(tiny_model_dir, text_file, tmp_path):
    run_pt(tiny_model_dir, text_file, tmp_path, *LORA, "--max_steps", "3", "--do_train", "True")
    with pytest.raises(InputError, match="not written by a run with --streaming"):
        run_pt(tiny_model_dir, text_file, tmp_path, *LORA, *STREAM, "--resume_from_checkpoint", "True")
