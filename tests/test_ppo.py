"""PPO: it learns, it resumes exactly, many processes are one, and every option does something."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stagewise.errors import InputError, TrainingDiverged
from tests.stages import assert_same_weights, run_rm, run_sft, weights

ROOT = Path(__file__).resolve().parents[1]
LORA = ("--lora_rank", "4", "--lora_alpha", "8", "--lora_dropout", "0.1")
FULL = ("--use_peft", "False")
SMALL = ("--max_new_tokens", "8", "--temperature", "1.0", "--per_device_train_batch_size", "4", "--logging_steps", "1",
         "--num_ppo_epochs", "2", "--num_mini_batches", "2", "--max_steps", "4", "--save_steps", "2",
         "--learning_rate", "5e-3", "--completions_steps", "2")  # fmt: skip
REWARDS = '''
def length(prompts, completions):
    """Longer is better, up to 10 characters."""
    assert all(prompt.endswith("assistant\\n") for prompt in prompts)
    return [min(len(completion), 10) / 10 for completion in completions]


def share(prompts, completions):
    """The share of the letter a."""
    return [completion.count("a") / max(1, len(completion.replace(" ", ""))) for completion in completions]


def not_a_number(prompts, completions):
    return [float("nan")] * len(completions)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """rewards.py and prompts.jsonl, 24 questions, every third with a round before it; short.jsonl."""
    folder = tmp_path_factory.mktemp("ppo")
    (folder / "rewards.py").write_text(REWARDS)
    rows = []
    for i in range(24):
        turns = [("human", "Why " * (i % 5) + f"is {i} odd?"), ("gpt", "?")]
        if i % 3 == 0:
            turns = [("human", "Hello"), ("gpt", "Hello, what would you like to know about numbers?"), *turns]
        rows.append({"conversations": [{"from": role, "value": text} for role, text in turns]})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "short.jsonl").write_text("".join(json.dumps({"question": f"{i}?"}) + "\n" for i in range(8)))
    return folder


def command(model_dir: str, folder: Path, output_dir: Path, *flags: str, function: str = "length") -> list[str]:
    return [
        "--model_name_or_path", model_dir, "--train_file_dir", str(folder / "prompts.jsonl"), "--template_name",
        "chatml", "--output_dir", str(output_dir), *SMALL,
        *(("--reward_function", f"{folder / 'rewards.py'}:{function}") if function else ()), *flags,
    ]  # fmt: skip


def run_ppo(*args, **kwargs) -> dict:
    import ppo_training

    return ppo_training.main(command(*args, **kwargs))


def history(output_dir: Path, figure: str) -> list[float]:
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry[figure] for entry in log if figure in entry]


TIMED = ("per_second", "time_share", "generate_share", "runtime")


def figures(output_dir: Path) -> list[dict]:
    """All that was logged, but for what the clock says."""
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in entry.items() if not any(t in k for t in TIMED)} for entry in log if "loss" in entry]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_toy_task_is_learnt_from_noise(seed, tiny_model_dir, folder, tmp_path):
    """The share of one letter, 2% at the start, nears its maximum of 1 within 60 steps."""
    run_ppo(
        tiny_model_dir, folder, tmp_path, "--train_file_dir", str(folder / "short.jsonl"),
        "--lora_rank", "8", "--lora_dropout", "0", "--modules_to_save",
        "lm_head,embed_tokens", "--max_steps", "60", "--per_device_train_batch_size", "32", "--num_mini_batches", "1",
        "--num_ppo_epochs", "4", "--learning_rate", "4e-3", "--lr_scheduler_type", "constant", "--kl_coef", "0",
        "--max_kl", "0", "--seed", str(seed), "--do_train", "True", "--save_strategy", "no", "--report_to", "none",
        "--completions_steps", "0", function="share",
    )  # fmt: skip
    scores = history(tmp_path, "objective/scores")
    assert scores[0] < 0.1
    assert sum(scores[-5:]) / 5 >= 0.8


@pytest.fixture(scope="module")
def whole(tiny_model_dir, folder, tmp_path_factory):
    """Uninterrupted runs by mode, made when first asked for."""
    made: dict[str, Path] = {}

    def run(mode: str) -> Path:
        if mode not in made:
            made[mode] = tmp_path_factory.mktemp("whole") / mode
            run_ppo(tiny_model_dir, folder, made[mode], *MODES[mode])
        return made[mode]

    return run


EVALUATED = ("--eval_strategy", "steps", "--eval_steps", "1")
MODES = {
    "adapter": (*LORA, *EVALUATED, "--target_kl", "0.5", "--kl_horizon", "20"),
    "all weights": (*FULL, *EVALUATED, "--learning_rate", "1e-3"),
    "gradient checkpointing": (*LORA, "--gradient_checkpointing", "True", "--gradient_accumulation_steps", "2"),
}


@pytest.mark.parametrize("mode", MODES)
def test_resume_equals_no_interruption(mode, whole, tiny_model_dir, folder, tmp_path):
    shutil.copytree(whole(mode) / "checkpoint-2", tmp_path / "checkpoint-2")
    run_ppo(tiny_model_dir, folder, tmp_path, *MODES[mode], "--resume_from_checkpoint", "True")
    assert figures(tmp_path) == figures(whole(mode))
    assert_same_weights(whole(mode), tmp_path, rtol=0, atol=0)


def test_a_finished_run_is_not_trained_further(whole, tiny_model_dir, folder, tmp_path):
    shutil.copytree(whole("adapter"), tmp_path, dirs_exist_ok=True)
    run_ppo(tiny_model_dir, folder, tmp_path, *MODES["adapter"], "--resume_from_checkpoint", "True")
    assert_same_weights(whole("adapter"), tmp_path, rtol=0, atol=0)


def test_killed_in_the_middle_of_a_step_and_resumed(whole, tiny_model_dir, folder, tmp_path):
    """SIGKILL while step 4 samples its answers, after the checkpoint of step 2 and the update of step 3."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal, sys\n"
        "from stagewise.trainers import ppo\n"
        "original = ppo.PPOTrainer._scores\n"
        "def scores(self, rollouts):\n"
        "    if self.state.global_step == 3 and self.model.training: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(self, rollouts)\n"
        "ppo.PPOTrainer._scores = scores\n"
        "import ppo_training\n"
        "ppo_training.main(sys.argv[1:])\n"
    )
    flags = MODES["gradient checkpointing"]
    output = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(script), *command(tiny_model_dir, folder, output, *flags)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    run_ppo(tiny_model_dir, folder, output, *flags, "--resume_from_checkpoint", "True")
    assert figures(output) == figures(whole("gradient checkpointing"))
    assert_same_weights(whole("gradient checkpointing"), output, rtol=0, atol=0)


def test_sigterm_saves_a_checkpoint(tiny_model_dir, folder, tmp_path):
    log = tmp_path / "log"
    flags = (*LORA, "--max_steps", "500", "--save_steps", "1000")
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "ppo_training.py", *command(tiny_model_dir, folder, tmp_path / "out", *flags)], cwd=ROOT,
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        while "step 2/" not in log.read_text() and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143, log.read_text()[-2000:]
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert {"adapter_model.safetensors", "value_model.safetensors", "ppo_state.json", "optimizer.pt"} <= {
        path.name for path in checkpoint.iterdir()
    }


TORCHRUN = """
import sys
import torch
from stagewise.trainers import rollouts
def fixed(actor, prompts, config, batch_size, device):
    # what a prompt is answered depends on the prompt alone, not on the process that asks
    def answer(ids):
        length = 2 + sum(ids) % 6
        tail = [config.eos_token_id[0]] if sum(ids) % 2 else []
        return [20 + (7 * i + sum(ids)) % 500 for i in range(length)] + tail
    return [answer(prompt) for prompt in prompts]
rollouts.sample_completions = fixed
import ppo_training
from stagewise.run.exit_codes import run_script
run_script(ppo_training.main)
"""


def test_two_processes_are_one_with_the_same_batch(tiny_model_dir, folder, tmp_path):
    """On the same answers: figures, adapters and evaluations of 1 x 8 rows and of 2 x 4 rows."""
    script = tmp_path / "run.py"
    script.write_text(TORCHRUN)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    validation = ("--validation_file_dir", str(folder / "prompts.jsonl"), "--max_eval_samples", "7")
    same = ("--lora_rank", "4", "--lora_dropout", "0", *validation, *EVALUATED)
    for name, launch, rows in (
        ("one", [sys.executable], "8"),
        (
            "two",
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
            "4",
        ),
    ):
        flags = (*same, "--per_device_train_batch_size", rows)
        done = subprocess.run(
            [*launch, str(script), *command(tiny_model_dir, folder, tmp_path / name, *flags)],
            env=env, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for one, two in zip(figures(tmp_path / "one"), figures(tmp_path / "two"), strict=True):
        one.pop("grad_norm"), two.pop("grad_norm")
        assert one == pytest.approx(two, rel=1e-4, abs=1e-5, nan_ok=True)
    for name in ("eval_scores", "eval_kl"):
        one, two = (history(tmp_path / run, name) for run in ("one", "two"))
        assert one == pytest.approx(two, rel=1e-4, abs=1e-5)
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((first[key] - second[key]).abs().max().item() for key in first) < 1e-4


@pytest.fixture(scope="module")
def reward_dir(tiny_model_dir, preference_file, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("rm-for-ppo") / "out"
    run_rm(tiny_model_dir, preference_file, folder, *LORA, "--max_steps", "20", "--learning_rate", "1e-2")
    return str(folder)


def test_the_reward_model_of_the_rm_stage_scores_the_answers(
    tiny_model_dir, reward_dir, folder, tmp_path, monkeypatch
):
    """On the policy's base, while the policy changes, it scores as by itself: prompt, answer, and what follows."""
    from stagewise.modeling.generation import load_for_inference
    from stagewise.modeling.reward import RewardModel

    scored = []
    call = RewardModel.__call__

    def recorded(self, samples):
        scores = call(self, samples)
        scored.extend(zip(samples, scores, strict=True))
        return scores

    monkeypatch.setattr(RewardModel, "__call__", recorded)
    metrics = run_ppo(
        tiny_model_dir, folder, tmp_path, *LORA, "--reward_model_path", reward_dir, "--do_eval", "True", "--do_train",
        "True", "--max_new_tokens", "40", function="",
    )  # fmt: skip
    assert {"eval_scores", "eval_kl", "eval_response_length", "eval_without_eos"} <= metrics.keys()
    model, tokenizer = load_for_inference(reward_dir, scores=True)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for sample, score in scored:
        ends = sample.completion_ids[-1] in (stop, tokenizer.eos_token_id)
        assert sample.finished == ends
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids + (newline if ends else [])])
        assert score == pytest.approx(model(ids).logits.item(), abs=1e-4)
    assert {sample.finished for sample, _ in scored} == {True, False}
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {2, 4}
    stage = json.loads((tmp_path / "stage.json").read_text())
    assert (stage["stage"], stage["reward"]) == ("ppo", reward_dir)
    assert (tmp_path / "ppo.png").stat().st_size > 5000
    assert not (tmp_path / "value_model.safetensors").exists()


def test_the_policy_merges_like_any_other_adapter(tiny_model_dir, folder, whole, tmp_path):
    import merge_peft_adapter

    report = merge_peft_adapter.main(
        ["--base_model", tiny_model_dir, "--lora_model", str(whole("adapter")), "--output_dir", str(tmp_path / "m")]
    )
    assert report["max_logit_difference"] < 1e-4
    assert json.loads((tmp_path / "m" / "stage.json").read_text())["stage"] == "ppo"


def test_an_old_adapter_is_the_reference(tiny_model_dir, sft_file, folder, tmp_path):
    """With a learning rate of 0 the policy stays where it started: no KL, although the adapter is not the base."""
    run_sft(tiny_model_dir, sft_file, tmp_path / "sft", *LORA, "--max_steps", "12", "--learning_rate", "2e-2")
    old = ("--peft_path", str(tmp_path / "sft"), "--learning_rate", "0.0", "--max_steps", "1")
    run_ppo(tiny_model_dir, folder, tmp_path / "ppo", *old)
    assert history(tmp_path / "ppo", "objective/kl") == pytest.approx([0.0], abs=1e-5)
    run_ppo(tiny_model_dir, folder, tmp_path / "fresh", *LORA, "--max_steps", "1")
    # other answers than those of the bare base, drawn with the same random numbers
    assert history(tmp_path / "ppo", "objective/entropy") != history(tmp_path / "fresh", "objective/entropy")


def test_every_figure_of_the_method_is_logged(whole):
    (last,) = figures(whole("adapter"))[-1:]
    expected = {
        "objective/scores", "objective/scores_std", "objective/rlhf_reward", "objective/kl", "objective/entropy",
        "objective/non_score_reward", "objective/kl_coef", "objective/response_length", "objective/without_eos",
        "policy/loss", "policy/approx_kl", "policy/clipfrac", "policy/ratio", "policy/entropy", "value/loss",
        "value/clipfrac", "value/explained_variance", "episodes",
    }  # fmt: skip
    assert expected <= last.keys()
    for name in ("rollout/time_share", "rollout/tokens_per_second", "update/tokens_per_second"):
        assert all(value > 0 for value in history(whole("adapter"), name))
    assert last["episodes"] == 4 * 8
    assert last["objective/rlhf_reward"] == pytest.approx(
        last["objective/scores"] + last["objective/non_score_reward"], abs=1e-6
    )


def test_the_kl_coefficient_nears_its_target(whole):
    """It falls by at most a fifth of 8 answers in 20 a step while the KL is below 0.5, and rises above."""
    coefficients, kl = (history(whole("adapter"), f"objective/{name}") for name in ("kl_coef", "kl"))
    assert coefficients[0] == 0.05
    for before, found, after in zip(coefficients, kl, coefficients[1:], strict=False):
        error = min(max(found / 0.5 - 1, -0.2), 0.2)
        assert after == pytest.approx(before * (1 + error * 8 / 20))


@pytest.mark.parametrize(
    "flags",
    [
        ("--kl_coef", "5"),
        ("--kl_estimator", "k3", "--kl_coef", "5"),
        ("--cliprange", "0.001"),
        ("--cliprange_value", "0.001"),
        ("--vf_coef", "10"),
        ("--gamma", "0.5"),
        ("--lam", "0.1"),
        ("--whiten_rewards", "True"),
        ("--score_clip", "0.2"),
        ("--reward_baseline", "0.7"),
        ("--missing_eos_penalty", "3"),
        ("--temperature", "0.5"),
        ("--top_p", "0.3"),
        ("--max_new_tokens", "5"),
        ("--max_prompt_length", "35"),
        ("--num_ppo_epochs", "1"),
        ("--num_mini_batches", "1"),
        ("--max_approx_kl", "1e-9", "--num_ppo_epochs", "4"),
        ("--train_sampling_strategy", "sequential"),
        ("--seed", "7"),
        ("--lora_dropout", "0.5"),
    ],
    ids=lambda flags: " ".join(flags),
)
def test_every_option_changes_the_figures(flags, plain_figures, tiny_model_dir, folder, tmp_path):
    if "k3" in flags:
        plain = plain_figures("--kl_coef", "5")
    elif "--max_approx_kl" in flags:
        plain = plain_figures("--num_ppo_epochs", "4")
    else:
        plain = plain_figures()
    run_ppo(tiny_model_dir, folder, tmp_path, *BRIEF, *flags)
    assert plain != figures(tmp_path)


BRIEF = (*LORA, "--max_steps", "2", "--save_strategy", "no", "--report_to", "none", "--do_train", "True",
         "--completions_steps", "0", "--plot_loss", "False")  # fmt: skip


@pytest.fixture(scope="module")
def plain_figures(tiny_model_dir, folder, tmp_path_factory):
    made: dict[tuple, list[dict]] = {}

    def run(*flags: str) -> list[dict]:
        if flags not in made:
            output = tmp_path_factory.mktemp("plain") / "out"
            run_ppo(tiny_model_dir, folder, output, *BRIEF, *flags)
            made[flags] = figures(output)
        return made[flags]

    return run


def test_how_answers_are_batched_changes_no_figure(plain_figures, tiny_model_dir, folder, tmp_path):
    """Other rows of random numbers, so other answers, when they are sampled; with greedy sampling, none."""
    greedy = ("--top_p", "1e-6")
    run_ppo(tiny_model_dir, folder, tmp_path, *BRIEF, *greedy, "--rollout_batch_size", "3")
    for one, other in zip(figures(tmp_path), plain_figures(*greedy), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4, nan_ok=True)


def test_total_episodes_and_epochs_count_answers(tiny_model_dir, folder, tmp_path):
    run_ppo(tiny_model_dir, folder, tmp_path / "e", *BRIEF, "--max_steps", "-1", "--total_episodes", "20")
    assert len(figures(tmp_path / "e")) == 3  # 8 answers a step
    run_ppo(tiny_model_dir, folder, tmp_path / "n", *BRIEF, "--max_steps", "-1", "--num_train_epochs", "2")
    assert len(figures(tmp_path / "n")) == 6  # 24 prompts, twice
    with pytest.raises(InputError, match="--total_episodes"):
        run_ppo(tiny_model_dir, folder, tmp_path / "b", *BRIEF, "--total_episodes", "20")


def test_too_much_kl_stops_the_run_and_names_the_last_good_checkpoint(tiny_model_dir, folder, tmp_path):
    flags = ("--modules_to_save", "lm_head,embed_tokens", "--lora_dropout", "0", "--max_kl", "1", "--kl_coef", "0",
             "--max_steps", "60", "--save_steps", "1", "--learning_rate", "2e-3")  # fmt: skip
    with pytest.raises(TrainingDiverged, match="above --max_kl 1") as caught:
        run_ppo(tiny_model_dir, folder, tmp_path, *flags, function="share")
    assert caught.value.good_until > 1
    good = tmp_path / f"checkpoint-{caught.value.good_until}"
    assert good.is_dir()
    assert (tmp_path / f"checkpoint-{caught.value.good_until + 1}").is_dir()
    assert f"--resume_from_checkpoint {good}" in str(caught.value)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_a_loss_that_is_no_number_stops_the_run_before_it_does_harm(tiny_model_dir, folder, tmp_path, monkeypatch):
    from stagewise.losses import policy_gradient as pg
    from stagewise.trainers.ppo import PPOTrainer

    value_loss, steps = pg.value_loss, []

    def broken(*args, **kwargs):
        loss, statistics = value_loss(*args, **kwargs)
        return (loss * float("nan") if steps[-1] == 3 else loss), statistics

    begin = PPOTrainer.begin_iteration
    monkeypatch.setattr(
        PPOTrainer, "begin_iteration", lambda self: (steps.append(self.state.global_step), begin(self))
    )
    monkeypatch.setattr(pg, "value_loss", broken)
    with pytest.raises(TrainingDiverged, match="step 4: the loss is nan; its rows: .*prompts.jsonl:") as caught:
        run_ppo(tiny_model_dir, folder, tmp_path, *LORA)
    assert f"--resume_from_checkpoint {tmp_path / 'checkpoint-2'}" in str(caught.value)
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "checkpoint-2").values())


def test_a_score_that_is_no_number_is_named(tiny_model_dir, folder, tmp_path):
    with pytest.raises(InputError, match="gave nan for the completion"):
        run_ppo(tiny_model_dir, folder, tmp_path, *LORA, function="not_a_number")


@pytest.mark.parametrize(
    ("flags", "function", "message"),
    [
        ((), "", "--reward_model_path, --reward_function: give one"),
        (("--reward_model_path", "x"), "length", "--reward_model_path, --reward_function: give one"),
        ((), "nothing", "has no function nothing"),
        (("--temperature", "0"), "length", "--temperature 0.0"),
        (("--top_p", "1.5"), "length", "--top_p"),
        (("--gamma", "2"), "length", "--gamma"),
        (("--cliprange", "0"), "length", "--cliprange"),
        (("--num_mini_batches", "0"), "length", "--num_mini_batches"),
        (("--kl_estimator", "k2"), "length", "--kl_estimator"),
        (("--max_new_tokens", "5000"), "length", "--max_new_tokens 5000"),
        (("--neft_alpha", "5"), "length", "--neftune_noise_alpha"),
        (("--label_smoothing_factor", "0.1"), "length", "--label_smoothing_factor"),
        (("--auto_find_batch_size", "True"), "length", "--auto_find_batch_size"),
        (("--train_sampling_strategy", "group_by_length"), "length", "--train_sampling_strategy"),
        (("--streaming", "True"), "length", "--streaming"),
        (("--sft_model_path", "other"), "length", "--sft_model_path"),
    ],
)
def test_what_cannot_work_is_an_error(flags, function, message, tiny_model_dir, folder, tmp_path):
    with pytest.raises(InputError, match=message):
        run_ppo(tiny_model_dir, folder, tmp_path / "o", *LORA, *flags, function=function)
    assert not (tmp_path / "o").exists()


def test_a_reward_model_of_another_template_or_tokenizer_is_refused(
    tiny_model_dir, preference_file, folder, reward_dir, tmp_path
):
    with pytest.raises(InputError, match="was trained on the template chatml, and the policy writes vicuna"):
        run_ppo(
            tiny_model_dir, folder, tmp_path / "o", *LORA, "--reward_model_path", reward_dir, "--template_name",
            "vicuna", function="",
        )  # fmt: skip
    from examples.build_tiny_model import main as build

    build(
        ["--output_dir", str(tmp_path / "m"), "--vocab_size", "500", "--hidden_size", "64", "--num_hidden_layers", "1"]
    )
    run_rm(str(tmp_path / "m"), preference_file, tmp_path / "rm", *LORA, "--max_steps", "1")
    with pytest.raises(InputError, match="its tokenizer is not the policy's"):
        run_ppo(
            tiny_model_dir, folder, tmp_path / "o", *LORA, "--reward_model_path", str(tmp_path / "rm"), function=""
        )
    assert not (tmp_path / "o").exists()


def test_early_stopping_follows_the_score(tiny_model_dir, folder, tmp_path):
    """A policy that does not learn has the same score in every evaluation: no better one, and the run ends."""
    run_ppo(
        tiny_model_dir, folder, tmp_path, *LORA, *EVALUATED, "--learning_rate", "0.0", "--max_steps", "10",
        "--early_stopping_stall_num", "2",
    )  # fmt: skip
    assert len(history(tmp_path, "objective/scores")) == 3
    assert len(set(history(tmp_path, "eval_scores"))) == 1


def test_the_best_checkpoint_can_be_loaded_at_the_end(tiny_model_dir, folder, tmp_path):
    best = ("--load_best_model_at_end", "True", "--save_steps", "1", *EVALUATED)
    run_ppo(tiny_model_dir, folder, tmp_path, *LORA, *best)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    scores = history(tmp_path, "eval_scores")[:4]
    assert state["best_metric"] == max(scores)
    assert_same_weights(Path(state["best_model_checkpoint"]), tmp_path, rtol=0, atol=0)
