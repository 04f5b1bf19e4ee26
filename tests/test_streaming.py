"""--streaming: the same rows as without, on any number of processes; a resumed run goes on at the right row without
reading what it passed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard

from stagewise.data.records import RecordOptions
from stagewise.data.sources import find_sources, mix, stream_records
from stagewise.data.streaming import POSITION, RowStream
from stagewise.errors import InputError
from tests.stages import LORA, assert_same_weights, losses, run_pt, run_sft, weights

ROOT = Path(__file__).resolve().parents[1]

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
    assert f"{data}:1" not in read[:3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max_steps", "-1"), "pass --max_steps"),
        (("--packing", "True"), "--packing: packing looks at the whole data set"),
        (("--dataloader_num_workers", "1", "--dataloader_in_order", "False"), "the place in the data would be lost"),
        (("--dataloader_num_workers", "1", "--dataloader_multiprocessing_context", "spawn"), "by being forked"),
        (("--save_strategy", "epoch"), "--save_strategy epoch: a stream has no epochs; pass steps, and --save_steps"),
        (("--accelerator_config", '{"dispatch_batches": true}'), "each process reads for itself"),
        (("--auto_find_batch_size", "True"), "--auto_find_batch_size: with --streaming"),
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


# --- what each process and each worker gets --------------------------------------------------------------------------

STEP_ROWS = 8


@pytest.fixture(scope="module")
def two_files(tmp_path_factory) -> str:
    """13 and 10 documents of one or two words."""
    folder = tmp_path_factory.mktemp("stream") / "documents"
    folder.mkdir()
    for name, count in (("a", 13), ("b", 10)):
        rows = [{"text": f"{name}{i}" + " and" * (i % 2)} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def open_stream(folder: str, processes: int = 1, rows: int = STEP_ROWS, block_size: int | None = None) -> RowStream:
    streams, _ = stream_records("document", find_sources(folder), RecordOptions())

    def encode(record: dict) -> list[dict]:
        origin = {name: record[name] for name in ("dataset", "location")}
        return [{"input_ids": [len(word) for word in json.loads(record["record"])["text"].split()], **origin}]

    return RowStream(mix(streams), encode, STEP_ROWS, rows * processes, block_size)


def taken(stream: RowStream, processes: int, rows: int, workers: int, steps: int) -> list[list[list[dict]]]:
    """[process][step] -> the rows that it trains on in this step."""
    found = []
    for process in range(processes):
        shard = IterableDatasetShard(stream, rows, num_processes=processes, process_index=process)
        loader = torch.utils.data.DataLoader(
            shard if processes > 1 else stream, batch_size=rows, num_workers=workers, collate_fn=list
        )
        rounds = STEP_ROWS // (processes * rows)
        batches = list(islice(loader, steps * rounds))
        found.append([sum(batches[step * rounds : (step + 1) * rounds], []) for step in range(steps)])
    return found


@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.parametrize(
    ("processes", "rows", "workers"), [(1, 2, 0), (2, 4, 0), (2, 2, 0), (4, 1, 0), (8, 1, 0), (1, 2, 1), (2, 1, 3)]
)
def test_a_step_takes_the_same_rows_on_any_number_of_processes(processes, rows, workers, block_size, two_files):
    """23 rows are read more than twice: steps 3 and 6 take the last rows of one reading and the first of the next."""
    whole = list(islice(open_stream(two_files, block_size=block_size), 7 * STEP_ROWS))
    steps = [whole[step * STEP_ROWS : (step + 1) * STEP_ROWS] for step in range(7)]
    by_process = taken(open_stream(two_files, processes, rows, block_size), processes, rows, workers, 7)
    for step, expected in enumerate(steps):
        found = [row for process in by_process for row in process[step]]
        assert sorted(map(repr, found)) == sorted(map(repr, expected))
        assert all(len(process[step]) == STEP_ROWS // processes for process in by_process)
    if block_size is None:
        first_reading = [row["location"] for row in whole[:23]]
        assert len(set(first_reading)) == 23
        assert [row["location"] for row in whole[23:46]] == first_reading


@pytest.mark.parametrize("block_size", [None, 3])
def test_going_on_after_any_step(block_size, two_files):
    """Also where a reading of the files ends with the step, and on another number of processes."""
    whole = list(islice(open_stream(two_files, block_size=block_size), 7 * STEP_ROWS))
    for step in range(1, 7):
        going_on = open_stream(two_files, 2, 1, block_size)
        going_on.load_state(json.loads(whole[step * STEP_ROWS - 1][POSITION]))
        assert [*islice(going_on, (7 - step) * STEP_ROWS)] == whole[step * STEP_ROWS :]


def test_going_on_at_the_end_of_the_files(tmp_path):
    """16 rows are two steps; a run that stops after them goes on with the first row, and not with the 17th."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"a{i}"}) + "\n" for i in range(16)))
    whole = [*islice(open_stream(str(tmp_path)), 5 * STEP_ROWS)]
    for step in (2, 4):
        going_on = open_stream(str(tmp_path))
        going_on.load_state(json.loads(whole[step * STEP_ROWS - 1][POSITION]))
        assert [*islice(going_on, STEP_ROWS)] == whole[step * STEP_ROWS :][:STEP_ROWS]


def test_a_step_never_has_a_row_twice(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"a{i}"}) + "\n" for i in range(7)))
    with pytest.raises(InputError, match="the files give 7 rows, and a step takes 8"):
        next(iter(open_stream(str(tmp_path))))


def test_workers_change_nothing_and_say_what_is_wrong(tiny_model_dir, uneven_rows, tmp_path, capfd):
    flags = (*LORA, *STREAM, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2")
    run_sft(tiny_model_dir, uneven_rows, tmp_path / "none", *flags)
    run_sft(tiny_model_dir, uneven_rows, tmp_path / "two", *flags, "--dataloader_num_workers", "2")
    assert losses(tmp_path / "none") == losses(tmp_path / "two")
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "two" / "checkpoint-3", part / "checkpoint-3")
    run_sft(
        tiny_model_dir, uneven_rows, part, *flags, "--dataloader_num_workers", "1", "--resume_from_checkpoint", "True"
    )
    assert losses(part) == losses(tmp_path / "two")
    bad = tmp_path / "bad.jsonl"
    lines = Path(uneven_rows).read_text().splitlines(keepends=True)
    bad.write_text("".join([*lines * 3, '{"conversations": 3}\n', *lines]))
    capfd.readouterr()
    with pytest.raises(InputError, match=rf"^{re.escape(str(bad))}:73.*expected") as error:
        run_sft(tiny_model_dir, str(bad), tmp_path / "o", *flags, "--max_steps", "30", "--dataloader_num_workers", "2")
    assert "Traceback" not in str(error.value)
    run_sft(
        tiny_model_dir, str(bad), tmp_path / "p", *flags, "--max_steps", "20", "--dataloader_num_workers", "2",
        "--on_bad_row", "skip",
    )  # fmt: skip
    assert capfd.readouterr().out.count(f"bad row dropped: {bad}:73") == 1


@pytest.fixture(scope="module")
def uneven_rows(tmp_path_factory) -> str:
    """24 conversations, in turns of one word and of some hundred tokens; line 10 has a longer number than line 9."""
    rows = [
        {"conversations": [{"from": "human", "value": f"Count to {i}."}, {"from": "gpt", "value": f"{i} " * words}]}
        for i, words in enumerate([1, 30] * 12)
    ]
    path = tmp_path_factory.mktemp("uneven") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- two processes ---------------------------------------------------------------------------------------------------

# The stage, whose processes write down the rows that they train on.
RECORDING = """
import importlib, json, os
from stagewise.data.collators import LOCATION, read_locations
from stagewise.trainers.stage import StageTrainerMixin

train = StageTrainerMixin.training_step


def training_step(self, model, inputs, *args, **kwargs):
    with open(f"{self.args.output_dir}/rows_{os.environ.get('RANK', '0')}.jsonl", "a") as file:
        print(json.dumps(read_locations(inputs[LOCATION])), file=file)
    return train(self, model, inputs, *args, **kwargs)


def main(argv):
    StageTrainerMixin.training_step = training_step
    importlib.import_module(argv[0]).main(argv[1:])
"""
ENGINES = {"ddp": (), "zero2": ("--deepspeed", "zero2.json"), "zero3": ("--deepspeed", "zero3.json")}
STAGES = {
    "pt": ("pretraining", "--block_size", "48"),
    "pt-apart": ("pretraining", "--block_size", "48", "--packing", "False"),
    "sft": ("supervised_finetuning", "--template_name", "chatml", "--model_max_length", "128"),
}


CASES = [("ddp", "pt"), ("ddp", "pt-apart"), ("ddp", "sft"), ("zero2", "sft"), ("zero3", "pt"), ("zero3", "sft")]
RESUMED = [("ddp", "pt"), ("ddp", "sft"), ("zero3", "sft")]


@pytest.fixture(scope="module")
def streamed(tiny_model_dir, uneven_rows, text_file, tmp_path_factory) -> Path:
    """A folder with runs of one process (STAGE) and of two (ENGINE-STAGE, and resumed ENGINE-STAGE-on)."""
    folder = tmp_path_factory.mktemp("streamed")
    (folder / "recording.py").write_text(RECORDING)

    def command(stage: str, output: Path, rows: int, *flags: str) -> list[str]:
        script, *own = STAGES[stage]
        return [
            script, "--model_name_or_path", tiny_model_dir, "--output_dir", str(output), *own, *STREAM, *flags,
            "--train_file_dir", uneven_rows if stage == "sft" else text_file, "--max_steps", "8",
            "--per_device_train_batch_size", str(rows), "--logging_steps", "1", "--learning_rate", "1e-3",
            "--save_steps", "7", "--lora_rank", "4", "--lora_dropout", "0", "--report_to", "none",
        ]  # fmt: skip

    def launch(processes: int, jobs: list[list[str]]) -> str:
        path = folder / f"jobs{processes}.json"
        path.write_text(json.dumps([{"script": "recording", "argv": argv} for argv in jobs]))
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
             "tests/run_in_group.py", str(path)],
            cwd=ROOT, capture_output=True, text=True, timeout=400,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-9000:]
        return done.stdout

    launch(1, [command(stage, folder / stage, 4) for stage in STAGES])
    jobs = []
    for engine, stage in CASES:  # DDP before DeepSpeed, which leaves its marks on the process
        run, flags = folder / f"{engine}-{stage}", ENGINES[engine]
        jobs.append(command(stage, run, 2, *flags))
        if (engine, stage) in RESUMED:
            checkpoint = ("--resume_from_checkpoint", str(run / "checkpoint-7"))
            jobs.append(command(stage, Path(f"{run}-on"), 2, *flags, *checkpoint))
    (folder / "log").write_text(launch(2, jobs))
    return folder


def rows_of(run: Path, process: int) -> list[list[str]]:
    return [json.loads(line) for line in (run / f"rows_{process}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("engine", "stage"), CASES)
def test_two_processes_are_one(engine, stage, streamed):
    alone, together = streamed / stage, streamed / f"{engine}-{stage}"
    assert len(losses(alone)) == 8
    assert losses(alone) == pytest.approx(losses(together), rel=1e-4)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(together)[name], tensor, rtol=1e-4, atol=1e-4)
    steps = rows_of(alone, 0)
    for process in (0, 1):  # the first process has the first half of each step's rows
        assert rows_of(together, process) == [step[2 * process : 2 * process + 2] for step in steps]


def test_each_row_is_read_once(streamed, uneven_rows):
    """24 rows in steps of 4: the first 6 steps have each row once, in the order of the file; then it is read again."""
    pairs = zip(rows_of(streamed / "ddp-sft", 0), rows_of(streamed / "ddp-sft", 1), strict=True)
    read = [row for first, second in pairs for row in first + second]
    assert read == [f"{uneven_rows}:{line}" for line in [*range(1, 25), *range(1, 9)]]
    assert (streamed / "log").read_text().count("read through; from here on they are read again") > 0


@pytest.mark.parametrize(("engine", "stage"), RESUMED)
def test_two_processes_go_on(engine, stage, streamed):
    """After step 7, which is past the end of the file."""
    whole, resumed = streamed / f"{engine}-{stage}", streamed / f"{engine}-{stage}-on"
    assert losses(whole) == losses(resumed)
    assert_same_weights(whole, resumed, rtol=0, atol=0)
    for process in (0, 1):
        assert rows_of(resumed, process) == rows_of(whole, process)[7:]
