"""Multi-task losses in the real Trainer and in the scripts: worked numbers however a batch is cut, weights that follow
validation losses, resuming, and what is refused. The pure functions are in test_multitask.py."""

import inspect
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.trainer_callback import TrainerState

from stagewise import multitask_arguments
from stagewise.arguments import StageTrainingArguments
from stagewise.data.collators import CausalLMCollator
from stagewise.data.records import Conversation
from stagewise.data.tasks import TaskPlan
from stagewise.data.tokenization import EncodingOptions, TemplateRenderer, encode_conversations
from stagewise.errors import InputError, TrainingDiverged
from stagewise.losses.multitask import AVERAGES, CoBaWeights, SelfPacedWeights
from stagewise.modeling.token_loss import install_token_loss
from stagewise.trainers.causal_lm import CausalLMTrainer
from stagewise.trainers.task_weights import FollowValidation
from template import get_template
from tests.architectures import tiny_model
from tests.stages import FULL, LORA, assert_same_weights, losses, run_pt, run_sft

ROOT = Path(__file__).resolve().parents[1]
EVERY_STEP = ("--eval_strategy", "steps", "--eval_steps", "1")
COBA = ("--weighted_loss_mode", "coba", "--coba_warmup_steps", "3", "--coba_history_length", "4")
SELF_PACED = ("--weighted_loss_mode", "selfpaced", "--selfpaced_history_length", "3")


def history(output_dir: Path) -> list[dict]:
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"]


def figures(output_dir: Path, prefix: str) -> list[dict[str, float]]:
    """What each line of the training log has under names that begin so, without that beginning."""
    lines = [entry for entry in history(output_dir) if "loss" in entry]
    return [{key[len(prefix) :]: value for key, value in e.items() if key.startswith(prefix)} for e in lines]


@pytest.fixture(scope="session")
def tasks(tmp_path_factory) -> dict[str, Path]:
    """Conversations of two tasks, 12 of the first and 4 of the second, with answers of different length."""
    folder = tmp_path_factory.mktemp("tasks")
    files = {}
    for name, count, words in (("sums", 12, 1), ("poems", 4, 6)):
        turns = [(f"{name}: what is {i}?", f"It is {2 * i}." + " la" * (words + 3 * (i % 2))) for i in range(count)]
        rows = [
            {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
            for question, answer in turns
        ]
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


@pytest.fixture
def both(tasks) -> str:
    return f"{tasks['sums']},{tasks['poems']}"


# --- worked numbers, in the Trainer ----------------------------------------------------------------------------------

# Token `second` behind token `first` has the probability exp(-loss).
BIGRAMS = {(0, 1): 1.0, (1, 2): 2.0, (6, 3): 3.0, (3, 3): 3.0, (5, 4): 0.5}
VOCABULARY = 7


def bigram_model() -> LlamaForCausalLM:
    """A Llama whose logits depend on the last token alone: its layers add nothing, its head is the table."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, rms_norm_eps=0.0, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    probabilities = torch.full((VOCABULARY, VOCABULARY), 1 / VOCABULARY)
    for (first, second), loss in BIGRAMS.items():
        probabilities[first] = (1 - math.exp(-loss)) / (VOCABULARY - 1)
        probabilities[first, second] = math.exp(-loss)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY, 8))
        # a row of the unit matrix, normalised over 8 coordinates, is sqrt(8) times as long
        model.lm_head.weight.copy_(F.pad(probabilities.log().T / math.sqrt(8), (0, 1)))
    return model


def sample(task: str, *ids: int) -> dict:
    return {"input_ids": list(ids), "labels": [-100, *ids[1:]], "dataset": task}


# A: l = [1, 2]; B: [3, 3, 3, 3]; A: [.5]
SAMPLES = [sample("A", 0, 1, 2), sample("B", 6, 3, 3, 3, 3), sample("A", 5, 4)]
PACKED = [
    {"input_ids": [0, 1, 2, 5, 4], "labels": [-100, 1, 2, -100, 4], "seq_lengths": [3, 2], "dataset": "A"},
    SAMPLES[1] | {"seq_lengths": [5]},
]
# rows of a micro-batch, micro-batches of a step
CUTS = {"whole": (SAMPLES, 3, 1), "rows": (SAMPLES, 1, 3), "uneven": (SAMPLES, 2, 2), "packed": (PACKED, 2, 1)}
WORKED = [
    ("case1", None, 2.2142857),
    ("case2", None, 1.6666667),
    ("case3", None, 2.0833333),
    ("case4", None, 2.0),
    ("case3", (3.0, 1.0), 1.625),
    ("case4", (3.0, 1.0), 1.5),
    ("token", None, 2.2142857),
    ("sample", None, 1.6666667),
    ("task_token", (3.0, 1.0), 1.625),
    ("task_sample", (3.0, 1.0), 1.5),
]


def one_step(plan: TaskPlan, cut: str, folder: Path, **arguments) -> tuple[float, float]:
    """(loss, norm of the gradient) that the Trainer logs for a step on SAMPLES."""
    rows, size, accumulation = CUTS[cut]
    model = bigram_model()
    install_token_loss(model, arguments.get("label_smoothing_factor", 0.0))
    args = StageTrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        max_steps=1, logging_steps=1, report_to="none", save_strategy="no", train_sampling_strategy="sequential",
        disable_tqdm=True, **arguments,
    )  # fmt: skip
    collator = CausalLMCollator(0, plan.names, sample_ids=plan.weighs_tokens)
    trainer = CausalLMTrainer(
        model=model, args=args, train_dataset=rows, data_collator=collator, dataset_names=plan.names, tasks=plan
    )
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    return logged["loss"], logged["grad_norm"]


@pytest.mark.parametrize(("mode", "weights", "expected"), WORKED)
def test_worked_numbers_however_a_batch_is_cut(mode, weights, expected, tmp_path):
    plan = TaskPlan(("A", "B"), mode, weights=weights)
    found = {cut: one_step(plan, cut, tmp_path) for cut in CUTS}
    for cut in CUTS:
        assert found[cut][0] == pytest.approx(expected, abs=1e-5), cut
        assert found[cut][1] == pytest.approx(found["whole"][1], rel=1e-5), cut


@pytest.mark.parametrize(
    # micro-batches of {A: [1, 2], B: [3, 3, 3, 3]} and {A: [.5]}; case4: ((1.5 + 3) / 2 + .5) / 2
    ("mode", "expected"), [("case1", 1.5), ("case2", 1.375), ("case3", 1.375), ("case4", 1.375)],
)  # fmt: skip
def test_worked_numbers_of_each_micro_batch_by_itself(mode, expected, tmp_path):
    plan = TaskPlan(("A", "B"), mode, "micro")
    assert one_step(plan, "uneven", tmp_path)[0] == pytest.approx(expected, abs=1e-5)


def test_label_smoothing_is_weighted_as_the_rest(tmp_path):
    def smoothed(loss: float) -> float:
        rest = -math.log((1 - math.exp(-loss)) / (VOCABULARY - 1))
        return 0.8 * loss + 0.2 * (loss + (VOCABULARY - 1) * rest) / VOCABULARY

    a, b = [smoothed(loss) for loss in (1.0, 2.0, 0.5)], smoothed(3.0)
    plan = TaskPlan(("A", "B"), "case3")
    for cut in ("whole", "rows"):
        loss, _ = one_step(plan, cut, tmp_path, label_smoothing_factor=0.2)
        assert loss == pytest.approx((sum(a) / 3 + b) / 2, rel=1e-5)


def test_a_collator_numbers_the_documents_of_a_row():
    batch = CausalLMCollator(0, ("A", "B"), sample_ids=True)([PACKED[0], {**PACKED[1], "seq_lengths": [1, 4]}])
    assert batch["sample_ids"].tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]
    padded = CausalLMCollator(0, ("A", "B"), sample_ids=True)(SAMPLES)
    assert padded["sample_ids"].tolist() == [[0] * 5] * 3
    seen_as_one = CausalLMCollator(0, ("A", "B"), attend_across_documents=True, sample_ids=True)(PACKED)
    assert seen_as_one["sample_ids"][0].tolist() == [0, 0, 0, 1, 1]


# --- in the scripts --------------------------------------------------------------------------------------------------


def expected_means(model_dir: str, tasks: dict[str, Path]) -> dict[str, list[list[float]]]:
    """Cross-entropies of each sample's trained tokens, one sample at a time, from the model's own logits."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    renderer = TemplateRenderer(get_template("chatml"), tokenizer)
    found = {}
    for name, path in tasks.items():
        conversations = [Conversation.from_row(json.loads(line)) for line in path.read_text().splitlines()]
        found[name] = []
        for row in encode_conversations(conversations, renderer, tokenizer, EncodingOptions(128)):
            with torch.no_grad():
                logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
            token_losses = F.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="none")
            found[name].append([x for x, y in zip(token_losses.tolist(), row.labels[1:], strict=True) if y != -100])
    return found


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize("packing", ["True", "False"])
def test_the_loss_of_a_script_is_the_mean_that_was_asked_for(packing, tiny_model_dir, tasks, both, tmp_path):
    by_task = expected_means(tiny_model_dir, tasks)
    tokens = {name: mean(x for each in samples for x in each) for name, samples in by_task.items()}
    samples = {name: mean(mean(each) for each in samples) for name, samples in by_task.items()}
    # a task_weights that names one leaves the other at 1
    for number, (flags, expected) in enumerate(
        [
            (("case2",), mean(mean(each) for rows in by_task.values() for each in rows)),
            (("case3", "--task_weights", "[3, 1]"), (3 * tokens["sums"] + tokens["poems"]) / 4),
            (("case4", "--task_weights", "poems=0.5"), (samples["sums"] + 0.5 * samples["poems"]) / 1.5),
        ]
    ):
        run_sft(
            tiny_model_dir, both, tmp_path / str(number), *LORA, "--packing", packing, "--do_train", "True",
            "--learning_rate", "0", "--num_train_epochs", "1", "--gradient_accumulation_steps", "4",
            "--save_strategy", "no", "--weighted_loss_mode", *flags,
        )  # fmt: skip
        assert losses(tmp_path / str(number)) == {1: pytest.approx(expected, rel=1e-5)}
        assert figures(tmp_path / str(number), "task_loss/") == [pytest.approx(tokens, rel=1e-5)]


START = """
import sys
from pathlib import Path
from tests.stages import run_sft
flags, (model, data, out) = sys.argv[4:], sys.argv[1:4]
for number, run in enumerate(" ".join(flags).split(" , ")):
    run_sft(model, data, Path(out) / str(number), *run.split())
"""


def test_two_processes_equal_one(tiny_model_dir, both, tmp_path):
    """Steps of 8 rows: one batch, or two micro-batches of two rows on each of two processes."""
    shared = (*FULL, "--max_steps", "5", "--save_strategy", "no", "--validation_file_dir", both, "--report_to", "none")
    runs = [
        (*shared, "--weighted_loss_mode", "case4", "--task_weights", "poems=3"),
        (*shared, *COBA, "--task_update_interval", "1"),
    ]
    for number, flags in enumerate(runs):
        run_sft(tiny_model_dir, both, tmp_path / f"one{number}", *flags, "--per_device_train_batch_size", "8")
    start = tmp_path / "start.py"
    start.write_text(START)
    cut = ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        + [str(start), tiny_model_dir, both, str(tmp_path / "two"), *runs[0], *cut, ",", *runs[1], *cut],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for number in range(2):
        one, two = tmp_path / f"one{number}", tmp_path / "two" / str(number)
        assert len(losses(one)) == 5
        assert losses(two) == pytest.approx(losses(one), rel=1e-4)
        for prefix in ("task_loss/", "task_weight/"):
            for mine, theirs in zip(figures(one, prefix), figures(two, prefix), strict=True):
                assert theirs == pytest.approx(mine, rel=1e-3)
        assert_same_weights(one, two, rtol=1e-3, atol=1e-4)
    assert figures(tmp_path / "one1", "task_weight/")[-1]["poems"] != pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    "flags", [("--packing", "True"), ("--attend_across_documents", "True"), ("--packing", "False")]
)
def test_pretraining_weighs_tasks(flags, tiny_model_dir, text_file, tmp_path):
    """With one token mean for each task in the log, case3 is their mean, whatever the step had of each."""
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"A short text, number {i}." for i in range(60)))
    out = tmp_path / "out"
    case3 = ("--weighted_loss_mode", "case3", "--task_weights", "other=4", "--max_steps", "4")
    run_pt(tiny_model_dir, f"{text_file},{other}", out, *FULL, *case3, *flags)
    parts, weights = figures(out, "task_loss/"), {"corpus": 1, "other": 4}
    assert any(len(part) == 2 for part in parts)
    for loss, part in zip(losses(out).values(), parts, strict=True):
        total = sum(weights[name] for name in part)
        assert loss == pytest.approx(sum(weights[name] * part[name] for name in part) / total, rel=1e-4)


def test_rows_of_a_stream_are_weighted(tiny_model_dir, tasks, both, tmp_path):
    flags = ("--streaming", "True", "--do_train", "True", "--weighted_loss_mode", "case3", "--max_steps", "1")
    run_sft(tiny_model_dir, both, tmp_path, *FULL, *flags, "--per_device_train_batch_size", "16")
    tokens = {
        name: mean(x for each in rows for x in each) for name, rows in expected_means(tiny_model_dir, tasks).items()
    }
    assert losses(tmp_path)[1] == pytest.approx((tokens["sums"] + tokens["poems"]) / 2, rel=1e-4)


def test_the_default_is_the_mean_over_tokens(tiny_model_dir, both, tmp_path):
    flags = (*FULL, "--do_train", "True", "--max_steps", "2", "--gradient_accumulation_steps", "2")
    for name, mode in (("default", ()), ("case1", ("--weighted_loss_mode", "case1", "--loss_scope", "global"))):
        run_sft(tiny_model_dir, both, tmp_path / name, *flags, *mode)
    assert losses(tmp_path / "default") == losses(tmp_path / "case1")
    run_sft(tiny_model_dir, both, tmp_path / "micro", *flags, "--loss_scope", "micro")
    assert losses(tmp_path / "micro")[1] != pytest.approx(losses(tmp_path / "default")[1], rel=1e-5)


@pytest.mark.parametrize(("scope", "accumulation"), [("global", 1), ("micro", 1), ("micro", 2)])
def test_the_loss_of_routers_is_added_as_it_is(scope, accumulation, tiny_model_dir, both, tmp_path):
    """To a step of one micro-batch its router loss times the coefficient; to a mean of micro-batches the mean."""
    mixture = tmp_path / "mixture"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tiny_model("mixtral", vocab_size=len(tokenizer)).save_pretrained(mixture)
    tokenizer.save_pretrained(mixture)
    flags = (
        *FULL, "--do_train", "True", "--max_steps", "1", "--learning_rate", "0", "--save_strategy", "no",
        "--weighted_loss_mode", "case3", "--loss_scope", scope, "--gradient_accumulation_steps", str(accumulation),
        "--per_device_train_batch_size", str(16 // accumulation),
    )  # fmt: skip
    for coefficient in ("0", "0.5"):
        run_sft(str(mixture), both, tmp_path / coefficient, *flags, "--router_aux_loss_coef", coefficient)
    (balance,) = [entry["router_loss"] for entry in history(tmp_path / "0.5") if "router_loss" in entry]
    assert balance > 1.5
    assert losses(tmp_path / "0.5")[1] - losses(tmp_path / "0")[1] == pytest.approx(0.5 * balance, rel=1e-4)


# --- weights that follow validation losses ---------------------------------------------------------------------------


def scheme_of(flags: tuple[str, ...]) -> CoBaWeights | SelfPacedWeights:
    return CoBaWeights(2, 3, 4) if flags is COBA else SelfPacedWeights(2, 3)


@pytest.mark.parametrize("flags", [COBA, SELF_PACED], ids=["coba", "selfpaced"])
def test_weights_follow_the_reported_validation_losses(flags, tiny_model_dir, both, tmp_path):
    run_sft(tiny_model_dir, both, tmp_path, *LORA, *flags, *EVERY_STEP, "--max_steps", "7")
    scheme = scheme_of(flags)
    expected = [[0.5, 0.5]]
    evaluations = [entry for entry in history(tmp_path) if "eval_loss" in entry]
    for entry in evaluations[:6]:
        expected.append(scheme.update([entry["eval_sums_loss"], entry["eval_poems_loss"]]))
    weights = figures(tmp_path, "task_weight/")
    assert [[each["sums"], each["poems"]] for each in weights] == expected
    assert expected[-1][0] != pytest.approx(0.5, abs=1e-3)
    # the loss of a step is the mean of its tasks with the weights that are logged beside it
    for loss, weight, part in zip(losses(tmp_path).values(), weights, figures(tmp_path, "task_loss/"), strict=True):
        total = sum(weight[name] for name in part)
        assert loss == pytest.approx(sum(weight[name] * part[name] for name in part) / total, rel=1e-4)


def test_updates_between_evaluations_are_as_good(tiny_model_dir, both, tmp_path):
    """The same losses, whether the run's evaluations or updates of their own take them; the latter leave no trace."""
    flags = (*LORA, *COBA, "--max_steps", "7")
    run_sft(tiny_model_dir, both, tmp_path / "evaluations", *flags, *EVERY_STEP)
    run_sft(tiny_model_dir, both, tmp_path / "updates", *flags, "--task_update_interval", "1")
    assert losses(tmp_path / "updates") == losses(tmp_path / "evaluations")
    weights = figures(tmp_path / "updates", "task_weight/")
    assert weights == figures(tmp_path / "evaluations", "task_weight/")
    assert [entry["step"] for entry in history(tmp_path / "updates") if "eval_loss" in entry] == []
    run_sft(tiny_model_dir, both, tmp_path / "rarer", *flags, "--task_update_interval", "2")
    rarer = figures(tmp_path / "rarer", "task_weight/")
    assert rarer[5] == {"sums": 0.5, "poems": 0.5}  # steps 1 to 6: two validations
    assert rarer[6] != rarer[5]  # step 7: three


def test_updates_take_the_first_rows_of_each_task(tiny_model_dir, tasks, both, tmp_path):
    """On one row of each of two folders, as if the folders held nothing else."""
    for count in (1, 3):
        for name, path in tasks.items():
            folder = tmp_path / str(count) / name
            folder.mkdir(parents=True)
            (folder / "rows.jsonl").write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
    weights = {}
    for name, count, samples in (("all", 1, ()), ("first", 3, ("--task_update_samples", "1")), ("three", 3, ())):
        held_out = f"{tmp_path}/{count}/sums,{tmp_path}/{count}/poems"
        flags = (*COBA, "--task_update_interval", "1", *samples, "--validation_file_dir", held_out)
        run_sft(tiny_model_dir, both, tmp_path / name, *LORA, *flags, "--max_steps", "5")
        weights[name] = figures(tmp_path / name, "task_weight/")[-1]
    assert weights["first"] == pytest.approx(weights["all"], rel=1e-6)
    assert weights["first"] != pytest.approx(weights["three"], rel=1e-6)


@pytest.mark.parametrize("flags", [COBA, SELF_PACED], ids=["coba", "selfpaced"])
@pytest.mark.parametrize("updates", [EVERY_STEP, ("--task_update_interval", "1")], ids=["evaluations", "updates"])
def test_resume_equals_no_interruption(flags, updates, tiny_model_dir, both, tmp_path):
    """From the middle of the history: a checkpoint of step 3, where the weights begin to differ."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = (*LORA, *flags, *updates, "--max_steps", "8")
    run_sft(tiny_model_dir, both, whole, *flags)
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    run_sft(tiny_model_dir, both, resumed, *flags, "--resume_from_checkpoint", "True")
    assert len(losses(whole)) == 8
    assert losses(resumed) == losses(whole)
    assert figures(resumed, "task_weight/") == figures(whole, "task_weight/")
    assert_same_weights(whole, resumed, rtol=0, atol=0)


def test_resuming_before_the_first_validation(tiny_model_dir, both, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = (*LORA, *COBA, "--task_update_interval", "2", "--max_steps", "8", "--save_steps", "1")
    run_sft(tiny_model_dir, both, whole, *flags)
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-1", resumed / "checkpoint-1")
    run_sft(tiny_model_dir, both, resumed, *flags, "--resume_from_checkpoint", "True")
    assert losses(resumed) == losses(whole)
    assert figures(resumed, "task_weight/") == figures(whole, "task_weight/")


def test_a_checkpoint_without_these_weights_is_not_resumed(tiny_model_dir, both, tmp_path):
    flags = (*LORA, *EVERY_STEP, "--max_steps", "6")
    for name, mode in (("plain", ()), ("coba", COBA)):
        run_sft(tiny_model_dir, both, tmp_path / name, *flags, *mode)
        resume = (*flags, *SELF_PACED, "--resume_from_checkpoint", str(tmp_path / name / "checkpoint-3"))
        found = "no such weights" if name == "plain" else "coba of sums, poems"
        with pytest.raises(InputError, match=f"selfpaced of sums, poems: .* trained with {found}"):
            run_sft(tiny_model_dir, both, tmp_path / name, *resume)


def follow(scheme, **state) -> tuple[FollowValidation, TrainerState]:
    callback = FollowValidation("coba", ("a", "b"), scheme, None, dict)
    trainer_state = TrainerState(**state)
    callback.on_train_begin(None, trainer_state, None)
    return callback, trainer_state


def test_a_run_that_begins_anew_forgets():
    """The Trainer trains again from the start, in the same process, where it looks for a batch size that fits."""
    scheme = CoBaWeights(2, 3, 4)
    callback, state = follow(scheme)
    for losses_of_tasks in ((4.0, 4.0), (3.0, 4.0), (2.0, 4.0), (1.0, 4.0)):
        metrics = dict(zip(("eval_a_loss", "eval_b_loss"), losses_of_tasks, strict=True))
        callback.on_evaluate(None, state, None, metrics)
    assert scheme.weights[0] < 0.5
    trained = scheme.state_dict()
    callback.on_train_end(None, state, None)
    callback.on_evaluate(None, state, None, {"eval_a_loss": 5.0, "eval_b_loss": 5.0})
    assert scheme.state_dict() == trained, "nothing follows the evaluation of a trained model"
    callback.on_train_begin(None, TrainerState(), None)
    assert scheme.state_dict() == CoBaWeights(2, 3, 4).state_dict()


def test_losses_that_are_no_numbers_end_the_run_with_the_way_back():
    callback, state = follow(CoBaWeights(2, 3, 4))
    state.global_step = 5
    callback.on_evaluate(None, state, None, {"eval_a_loss": 1.0, "eval_b_loss": 2.0})
    state.global_step = 10
    with pytest.raises(TrainingDiverged, match="step 10: validation losses .*nan") as error:
        callback.on_evaluate(None, state, None, {"eval_a_loss": 1.0, "eval_b_loss": math.nan})
    assert error.value.good_until == 5


# --- reports ---------------------------------------------------------------------------------------------------------


def test_curves_of_tasks_are_drawn_and_in_tensorboard(tiny_model_dir, tasks, both, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "two"
    run_sft(tiny_model_dir, both, out, *LORA, *COBA, *EVERY_STEP, "--max_steps", "5")
    assert (out / "tasks.png").stat().st_size > 10_000
    events = EventAccumulator(str(out / "logs")).Reload()
    for name in tasks:
        logged = [event.value for event in events.Scalars(f"train/task_loss/{name}")]
        assert logged == pytest.approx([part[name] for part in figures(out, "task_loss/") if name in part], rel=1e-5)
        assert len(events.Scalars(f"train/task_weight/{name}")) == 5
        assert len(events.Scalars(f"eval/{name}_loss")) == 6
    run_sft(tiny_model_dir, str(tasks["sums"]), tmp_path / "one", *LORA, "--max_steps", "1")
    assert not (tmp_path / "one" / "tasks.png").exists()
    assert figures(tmp_path / "one", "task_") == [{}]


# --- the flags -------------------------------------------------------------------------------------------------------


def test_modes_and_defaults_are_those_of_the_losses():
    """The flags' module imports no torch, so it says them once more."""
    assert set(get_args(multitask_arguments.MODES)) == set(AVERAGES)
    for prefix, scheme in (("coba_", CoBaWeights), ("selfpaced_", SelfPacedWeights)):
        parameters = inspect.signature(scheme).parameters
        names = {"warmup_steps": "warmup", "scale_factor": "scale"}
        for flag, default in multitask_arguments.DEFAULTS.items():
            if flag.startswith(prefix):
                name = flag.removeprefix(prefix)
                assert parameters[names.get(name, name)].default == default, flag


# --- what cannot be honoured -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weighted_loss_mode", "case5"], "--weighted_loss_mode: found 'case5', expected one of 'case1', 'case2'"),
        (["--task_weights", "3,1"], "--weighted_loss_mode case1 is no mean over tasks; use case3 or case4"),
        (["--weighted_loss_mode", "coba", "--task_weights", "3,1"], "coba sets the weights itself"),
        (["--weighted_loss_mode", "case3", "--task_weights", "3,1,2"], "one weight for each of the 2 .*: sums, poems"),
        (["--weighted_loss_mode", "case3", "--task_weights", "odes=3"], "odes is no data set; there is sums, poems"),
        (["--weighted_loss_mode", "case3", "--task_weights", "sums=3,sums=1"], "a data set is named twice"),
        (["--weighted_loss_mode", "case3", "--task_weights", "sums=3,1"], "expected numbers, 0 or more, such as"),
        (["--weighted_loss_mode", "case3", "--task_weights", "sums=a lot"], "expected numbers, 0 or more, such as"),
        (["--weighted_loss_mode", "case3", "--task_weights=-1,2"], "expected numbers, 0 or more, such as"),
        (["--weighted_loss_mode", "case3", "--task_weights", "nan,1"], "expected numbers, 0 or more, such as"),
        (["--weighted_loss_mode", "case3", "--task_weights", "0,0"], "expected one above 0"),
        (["--task_update_interval", "5"], "case1 follows no validation losses"),
        ([*COBA, "--task_update_interval", "0"], "found 0, expected 1 or more"),
        ([*COBA, "--task_update_samples", "5"], "give --task_update_interval as well"),
        (["--coba_tau", "3"], "is of --weighted_loss_mode coba; give that as well"),
        ([*COBA, "--selfpaced_scale_factor", "3"], "is of --weighted_loss_mode selfpaced"),
        (["--weighted_loss_mode", "coba", "--coba_warmup_steps", "2"], "3 or more validations"),
        (["--weighted_loss_mode", "coba", "--coba_history_length", "50"], "no less than --coba_warmup_steps, .* 100"),
        (["--weighted_loss_mode", "coba", "--coba_tau", "0"], "--coba_tau: found 0.0, expected a number above 0"),
        (["--weighted_loss_mode", "selfpaced", "--selfpaced_history_length", "1"], "2 or more, for a slope"),
        (["--weighted_loss_mode", "selfpaced", "--selfpaced_scale_factor", "inf"], "a number above 0"),
        (COBA, "the run takes none; pass --eval_strategy steps and --eval_steps, or --task_update_interval"),
        ([*COBA, "--task_update_interval", "1", "--do_train", "True"], "--do_eval is off; turn it on"),
        ([*COBA, *EVERY_STEP, "--max_eval_samples", "1"], "(sums|poems) has no validation row; .*--max_eval_samples"),
        # validations of steps 1 and 2: the third is behind the last step
        ([*COBA, *EVERY_STEP, "--max_steps", "3"], "from validation 3 on, .* has 2 .*lower --coba_warmup_steps"),
        ([*SELF_PACED, "--task_update_interval", "4", "--max_steps", "12"], "has 2 .* --selfpaced_history_length"),
        ([*COBA, "--eval_strategy", "epoch", "--num_train_epochs", "3"], "has 2 before its last step"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_said_before_anything_is_written(flags, message, tiny_model_dir, both, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=message):
        run_sft(tiny_model_dir, both, out, *flags)
    assert not out.exists()


@pytest.mark.parametrize("flags", [COBA, ["--weighted_loss_mode", "case3", "--task_weights", "3"]])
def test_one_data_set_has_nothing_to_be_weighed_against(flags, tiny_model_dir, tasks, tmp_path):
    with pytest.raises(InputError, match="sums is the only one; give several data sets"):
        run_sft(tiny_model_dir, str(tasks["sums"]), tmp_path / "out", *flags, *EVERY_STEP)


def test_validation_data_must_have_the_tasks_names(tiny_model_dir, tasks, both, tmp_path):
    flags = (*COBA, *EVERY_STEP, "--validation_file_dir", str(tasks["sums"]))
    with pytest.raises(InputError, match="poems has no validation row; name a folder or file of the same name"):
        run_sft(tiny_model_dir, both, tmp_path / "out", *flags)


def test_evaluation_alone_asks_for_no_updates(tiny_model_dir, both, tmp_path):
    """A run_config.yaml of a training run is also what its model is evaluated with."""
    metrics = run_sft(tiny_model_dir, both, tmp_path, *COBA, "--do_eval", "True")
    assert metrics["eval_poems_loss"] > 0
