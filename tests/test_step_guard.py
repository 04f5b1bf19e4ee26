"""--on_nan and --max_loss: a step without a finite loss changes nothing, and its rows are named."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stagewise.arguments import RunArguments, StageTrainingArguments, parse_arguments
from stagewise.data.collators import WithLocations, encode_locations, read_locations
from stagewise.errors import InputError, TrainingDiverged
from stagewise.run.callbacks import figures_not_finite
from stagewise.run.checkpoints import checkpoint_problem
from stagewise.run.exit_codes import run_script
from tests.stages import FULL, LORA, losses, run_pt, run_rm, run_sft, weights

ROOT = Path(__file__).resolve().parents[1]
POISON = "ǂ"  # in one row of the data, and the embedding of its first byte is not a number


@pytest.fixture(scope="module")
def poisoned_model(tiny_model_dir, tmp_path_factory) -> str:
    """The tiny model with a row of NaN in its embedding, which only texts with POISON read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("poisoned")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, tie_word_embeddings=False)
    (poison, *_) = tokenizer(POISON, add_special_tokens=False).input_ids
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.get_input_embeddings().weight.data[poison] = torch.nan
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def poisoned_file(sft_file, tmp_path_factory) -> str:
    """24 conversations, of which the 17th has POISON in its question."""
    rows = [json.loads(line) for line in Path(sft_file).read_text(encoding="utf-8").splitlines()]
    rows[16]["conversations"][0]["value"] += POISON
    path = tmp_path_factory.mktemp("poisoned_rows") / "sums.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


EPOCH = ("--do_train", "True", "--num_train_epochs", "1", "--save_steps", "1", "--report_to", "none")


@pytest.mark.parametrize("how", [LORA, FULL], ids=["lora", "full"])
def test_stop_names_the_rows_and_keeps_what_is_good(how, poisoned_model, poisoned_file, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: run_sft(poisoned_model, poisoned_file, tmp_path / "out", *how, *EPOCH))
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert "the loss is nan" in error
    assert f"{poisoned_file}:17" in error
    assert "--on_nan skip" in error
    assert "Traceback" not in error
    checkpoints = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    for folder in checkpoints:
        assert checkpoint_problem(folder) is None
        assert f"--resume_from_checkpoint {folder}" in error or folder != checkpoints[-1]


@pytest.mark.parametrize("how", [LORA, FULL], ids=["lora", "full"])
def test_skip_leaves_weights_and_optimizer_as_they_were(how, poisoned_model, poisoned_file, tmp_path, capsys):
    output = tmp_path / "out"
    run_sft(poisoned_model, poisoned_file, output, *how, *EPOCH, "--on_nan", "skip", "--seed", "3")
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    (bad,) = [entry["step"] for entry in history if entry.get("skipped_steps")]
    log = capsys.readouterr().out
    assert f"{poisoned_file}:17" in log
    assert f"left out: step {bad}: the loss is nan" in log
    found = losses(output)
    assert len(found) == 6  # the run went on to its end
    assert [step for step, loss in found.items() if math.isnan(loss)] == [bad]
    assert bad > 1, "choose another seed: there must be a checkpoint before"
    moved = {}
    for step in range(2, 7):
        before, after = weights(output / f"checkpoint-{step - 1}"), weights(output / f"checkpoint-{step}")
        moved[step] = any(not torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)
    assert moved == {step: step != bad for step in range(2, 7)}
    states = [
        torch.load(output / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)["state"]
        for step in (bad - 1, bad)
    ]
    for one, other in zip(*(state.values() for state in states), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_log_has_the_mean_of_the_steps_that_were_taken(poisoned_model, poisoned_file, tmp_path):
    def logged(name: str, every: str) -> dict[int, float]:
        flags = (*LORA, *EPOCH, "--on_nan", "skip", "--seed", "3", "--logging_steps", every)
        run_sft(poisoned_model, poisoned_file, tmp_path / name, *flags)
        return losses(tmp_path / name)

    taken = [loss for loss in logged("each", "1").values() if not math.isnan(loss)]
    assert logged("all", "6") == {6: pytest.approx(sum(taken) / 5, rel=1e-6)}


def test_two_processes_leave_out_the_same_step(poisoned_model, poisoned_file, tmp_path):
    """The loss of one process is not finite, the other's is: both leave the step out, and name that process's rows."""
    flags = [
        "--train_file_dir", poisoned_file, "--model_name_or_path", poisoned_model, "--template_name", "chatml",
        "--model_max_length", "128", "--logging_steps", "1", "--learning_rate", "5e-3", "--lora_rank", "4",
        "--lora_dropout", "0", *EPOCH, "--save_strategy", "no", "--on_nan", "skip", "--seed", "3",
    ]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, launch, rows in (("one", [sys.executable], "4"), ("two", torchrun, "2")):
        output = ["--output_dir", str(tmp_path / name), "--per_device_train_batch_size", rows]
        done = subprocess.run(
            [*launch, "supervised_finetuning.py", *flags, *output], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        (told,) = {line.split("WARNING")[1] for line in done.stdout.splitlines() if "left out: step" in line}
        assert f"{poisoned_file}:17" in told
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one == pytest.approx(two, rel=1e-4, nan_ok=True)
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-4)


def test_packed_rows_streamed_rows_and_blocks_are_named(poisoned_model, poisoned_file, tmp_path):
    for number, flags in enumerate((("--packing", "True"), ("--streaming", "True", "--max_steps", "6"))):
        with pytest.raises(TrainingDiverged, match=f"{poisoned_file}:17"):
            run_sft(poisoned_model, poisoned_file, tmp_path / str(number), *LORA, *EPOCH, *flags)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join([*(["A line of text. " * 20] * 30), POISON * 3, *(["More of it. " * 20] * 3)]))
    for number, flags in enumerate((("--packing", "True"), ("--packing", "False"))):
        with pytest.raises(TrainingDiverged, match=r"text\.txt:(\d+)") as error:
            run_pt(poisoned_model, str(text), tmp_path / f"pt{number}", *LORA, *EPOCH, *flags)
        spans = re.findall(r"text\.txt:(\d+)(?: to \S*text\.txt:(\d+))?", str(error.value))
        # the 31st paragraph, a blank line after each before it
        assert any(int(first) <= 61 <= int(last or first) for first, last in spans)


def test_pairs_are_named(poisoned_model, preference_file, tmp_path):
    rows = [json.loads(line) for line in Path(preference_file).read_text(encoding="utf-8").splitlines()]
    rows[4]["response_rejected"] += POISON
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(TrainingDiverged, match=f"{path}:5"):
        run_rm(poisoned_model, str(path), tmp_path / "rm", *LORA, *EPOCH)


def test_max_loss(tiny_model_dir, sft_file, tmp_path):
    """A vocabulary of 600 and random weights: the loss is some ln 600 = 6.4, which is above 2 and below 20."""
    run_sft(tiny_model_dir, sft_file, tmp_path / "good", *LORA, *EPOCH, "--max_loss", "20", "--max_steps", "2")
    with pytest.raises(TrainingDiverged, match=r"step 1: the loss is \d\.\d+, above --max_loss 2; its rows: .*:\d+"):
        run_sft(tiny_model_dir, sft_file, tmp_path / "bad", *LORA, *EPOCH, "--max_loss", "2")
    with pytest.raises(TrainingDiverged, match="10 steps in a row") as error:
        run_sft(
            tiny_model_dir, sft_file, tmp_path / "never", *LORA, *EPOCH, "--max_loss", "2", "--on_nan", "skip",
            "--num_train_epochs", "3", "--save_strategy", "no",
        )  # fmt: skip
    assert error.value.good_until == 0


@pytest.mark.parametrize(
    "when", [(), ("--eval_strategy", "steps", "--eval_steps", "2")], ids=["at the end", "between"]
)
def test_an_evaluation_that_is_not_a_number_ends_the_run_where_the_weights_are_not_finite(
    when, poisoned_model, poisoned_file, sft_file, tmp_path, capsys
):
    flags = (*LORA, *EPOCH, *when, "--do_eval", "True", "--validation_file_dir", poisoned_file, "--max_steps", "4")
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: run_sft(poisoned_model, sft_file, tmp_path / "out", *flags))
    assert stopped.value.code == 1
    told = capsys.readouterr()
    step = 2 if when else 4
    assert (
        f"error: evaluation after step {step}: eval_loss is nan, eval_perplexity is nan, and there are weights"
        in told.err
    )
    assert "embed_tokens" in told.err
    assert "Traceback" not in told.err
    assert f"evaluation: the loss of 1 of 24 rows is not finite: {poisoned_file}:17\n" in told.out
    assert "done" not in told.out


def test_pairs_without_a_finite_score_are_named(poisoned_model, preference_file, tmp_path, capsys):
    rows = [json.loads(line) for line in Path(preference_file).read_text(encoding="utf-8").splitlines()]
    rows[4]["response_rejected"] += POISON
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = (*LORA, *EPOCH, "--do_eval", "True", "--validation_file_dir", str(path), "--max_steps", "1")
    with pytest.raises(TrainingDiverged, match="eval_loss is nan"):
        run_rm(poisoned_model, preference_file, tmp_path / "rm", *flags)
    assert f"evaluation: the loss of 1 of 24 rows is not finite: {path}:5\n" in capsys.readouterr().out


def test_a_finished_run_whose_evaluation_is_not_a_number_says_so(
    tiny_model_dir, sft_file, tmp_path, capsys, monkeypatch
):
    """Finite weights: the figures are what they are, and nobody reads "done"."""
    from stagewise.trainers.causal_lm import CausalLMTrainer

    predict = CausalLMTrainer.prediction_step

    def overflow(self, *args, **kwargs):
        nothing, stats, ids = predict(self, *args, **kwargs)
        stats[0][1] = torch.inf
        return nothing, stats, ids

    monkeypatch.setattr(CausalLMTrainer, "prediction_step", overflow)
    flags = (
        *LORA,
        *EPOCH,
        "--do_eval",
        "True",
        "--validation_file_dir",
        sft_file,
        "--per_device_eval_batch_size",
        "8",
    )
    metrics = run_sft(tiny_model_dir, sft_file, tmp_path / "out", *flags, "--max_steps", "1")
    assert metrics["eval_loss"] == math.inf
    told = capsys.readouterr().out
    assert f"the loss of 3 of 24 rows is not finite: {sft_file}:2, {sft_file}:10, {sft_file}:18\n" in told
    assert "evaluation after step 1: eval_loss is inf, although all weights are finite" in told
    assert "done, but do not trust it" in told
    assert "INFO stagewise.run.lifecycle: done" not in told


def test_a_perplexity_may_be_infinite():
    """exp(800) is no float."""
    assert not figures_not_finite({"eval_loss": 800.0, "eval_perplexity": math.inf, "eval_tokens": 3})
    assert figures_not_finite({"eval_loss": math.nan, "eval_perplexity": math.nan}) == ["eval_loss", "eval_perplexity"]


def test_skip_is_refused_where_the_engine_takes_the_step(monkeypatch):
    monkeypatch.setattr("stagewise.arguments.settle_engine", lambda args: None)
    monkeypatch.setattr(StageTrainingArguments, "__post_init__", lambda self: None)
    argv = ["--output_dir", "o", "--on_nan", "skip", "--deepspeed", "zero2.json"]
    with pytest.raises(InputError, match="^--on_nan skip: found beside --deepspeed"):
        parse_arguments(RunArguments, StageTrainingArguments, argv=argv)


def test_locations_travel_as_bytes():
    places = ["/data/数据.jsonl:3", "", "hub[train] row 7"]
    assert read_locations(encode_locations(places)) == [places[0], places[2]]
    batch = WithLocations(lambda rows: {"count": len(rows)})([{"location": "a:1"}, {}])
    assert batch["count"] == 2
    assert read_locations(batch["location"]) == ["a:1"]
