"""Every field of TrainingArguments is honoured, refused, or has no effect that anybody could want: in every stage."""

import dataclasses

import pytest
from transformers import TrainingArguments

import dpo_training
import ppo_training
import pretraining
import reward_modeling
import supervised_finetuning
from stagewise.errors import InputError
from stagewise.run import lifecycle
from stagewise.run.settings import FIGURES
from tests.stages import LORA

MAINS = {
    "pt": pretraining.main,
    "sft": supervised_finetuning.main,
    "rm": reward_modeling.main,
    "ppo": ppo_training.main,
    "dpo": dpo_training.main,
}
ALL = tuple(MAINS)

# Of the Trainer, which every stage runs in.
HONOURED = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    torch_compile_backend torch_compile_mode liger_kernel_config logging_strategy logging_steps logging_first_step
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps
    eval_delay per_device_eval_batch_size eval_on_start eval_use_gather_object eval_accumulation_steps save_only_model
    save_strategy save_steps save_total_limit push_to_hub hub_token hub_private_repo hub_model_id hub_strategy
    hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order length_column_name
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    fsdp_config deepspeed debug skip_memory_metrics do_train do_eval resume_from_checkpoint log_level log_level_replica
    log_on_each_node
""".split()  # noqa: SIM905
# Nothing anybody could miss: why.
HARMLESS = {
    "logging_nan_inf_filter": "off: a loss that is no number ends the run or is skipped (--on_nan)",
    "remove_unused_columns": "off: the collators pick what the model gets",
    "save_on_each_node": "off: who writes is found out by looking",
    "use_cache": "training reads no cache",
    "disable_tqdm": "there are no bars, there are lines",
    "prediction_loss_only": "figures are made of losses, whose cost is that of the loss",
    "local_rank": "of the launcher",
}
# By field: (the stages that refuse, the flag's value, what the message says beside the flag).
REFUSED = {
    "do_predict": (ALL, "True", "inference.py"),
    "batch_eval_metrics": (ALL, "True", "leave"),
    "parallelism_config": (ALL, '{"tp_size": 2}', ""),
    "include_for_metrics": (ALL, "inputs", "leave it out"),
    "label_names": (ALL, "labels", "leave it out"),
    "eval_do_concat_batches": (ALL, "False", "leave it out"),
    "average_tokens_across_devices": (ALL, "False", "leave it out"),
    "enable_jit_checkpoint": (ALL, "True", "a signal writes a checkpoint"),
    "push_to_hub": (ALL, "True", "HF_TOKEN"),
    "label_smoothing_factor": (("rm", "dpo", "ppo"), "0.1", "no labels to smooth"),
    "torch_empty_cache_steps": (("ppo",), "3", "leave it out"),
    "bf16_full_eval": (("ppo",), "True", "as it trains"),
    "fp16_full_eval": (("ppo",), "True", ""),
    "include_num_input_tokens_seen": (("ppo",), "all", "leave it out"),
    "neftune_noise_alpha": (("ppo",), "5", "leave it out"),
    "auto_find_batch_size": (("ppo",), "True", "set it"),
    "train_sampling_strategy": (("ppo",), "group_by_length", "random"),
    "use_liger_kernel": (("ppo",), "True", "leave it out"),
    "fsdp": (("ppo",), "True", ""),
}


@pytest.fixture
def start(tiny_model_dir, text_file, sft_file, preference_file, tmp_path, monkeypatch):
    """(stage, flags) -> what main returns, of a run of two steps."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no token"))
    chat = ["--template_name", "chatml"]
    own = {
        "pt": ["--train_file_dir", text_file, "--block_size", "32"],
        "sft": ["--train_file_dir", sft_file, *chat],
        "rm": ["--train_file_dir", preference_file, *chat],
        "dpo": ["--train_file_dir", preference_file, *chat],
        "ppo": ["--train_file_dir", sft_file, *chat, "--reward_function", f"{__file__}:length"]
        + ["--max_new_tokens", "4", "--num_ppo_epochs", "1", "--num_mini_batches", "1"],
    }

    def main(stage: str, *flags: str) -> dict:
        argv = ["--model_name_or_path", tiny_model_dir, "--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
        return MAINS[stage]([*argv, *own[stage], "--report_to", "none", "--plot_loss", "False", *LORA, *flags])

    return main


def length(prompts: list[str], completions: list[str], **_) -> list[float]:
    return [float(len(completion)) for completion in completions]


def test_every_field_is_somewhere():
    known = {*HONOURED, *HARMLESS, *REFUSED}
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert fields - known == set(), "new in transformers: honour, refuse or explain it"
    assert known - fields == set()


@pytest.mark.parametrize(("stage", "field"), [(s, name) for name, (stages, _, _) in REFUSED.items() for s in stages])
def test_what_would_change_nothing_is_refused(stage, field, start, tmp_path):
    _, value, said = REFUSED[field]
    with pytest.raises((InputError, SystemExit)) as error:
        start(stage, f"--{field}", value)
    if isinstance(error.value, SystemExit):
        assert error.value.code == 2
    else:
        assert f"--{field}" in str(error.value)
        assert said in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_token_of_the_command_line_is_one(start):
    start("sft", "--push_to_hub", "True", "--hub_token", "hf_of_nobody", "--dry_run", "True")


@pytest.mark.parametrize("stage", ALL)
def test_early_stopping_and_the_best_go_by_the_first_figure(stage, start, monkeypatch):
    seen = {}
    build = lifecycle.build_trainer

    def spy(kind, args, *rest, **parts):
        seen.update(vars(args))
        return build(kind, args, *rest, **parts)

    monkeypatch.setattr(lifecycle, "build_trainer", spy)
    stalls, limit, best = "--early_stopping_stall_num", "--save_total_limit", "--load_best_model_at_end"
    for flags in ((stalls, "3"), (limit, "2"), (best, "True")):
        start(stage, "--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1", *flags,
              "--overwrite_output_dir", "True")  # fmt: skip
        first = "scores" if stage == "ppo" else "loss"
        assert (seen["metric_for_best_model"], seen["greater_is_better"]) == (f"eval_{first}", stage == "ppo")


@pytest.mark.parametrize("stage", ALL)
def test_figures_are_those_that_evaluations_give(stage, start):
    made = start(stage, "--eval_strategy", "steps", "--eval_steps", "1", "--do_train", "True", "--do_eval", "True")
    assert {f"eval_{name}" for name in FIGURES[stage]} <= set(made)


@pytest.mark.parametrize("stage", ALL)
def test_a_figure_that_nobody_makes_is_refused_at_once(stage, start, tmp_path):
    flags = ("--eval_strategy", "steps", "--eval_steps", "1", "--metric_for_best_model")
    for name in ("bleu", "eval_f1", "rows_loss", *(["loss", "eval_loss"] if stage == "ppo" else [])):
        with pytest.raises(InputError, match=f"--metric_for_best_model {name}: .*{list(FIGURES[stage])[0]}"):
            start(stage, *flags, name)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="--metric_for_best_model: needs evaluations"):
        start(stage, "--metric_for_best_model", list(FIGURES[stage])[0])


@pytest.mark.parametrize(("figure", "more_is_better"), [("perplexity", False), ("eval_loss", False)])
def test_which_way_is_better_is_known(figure, more_is_better, start, monkeypatch):
    from stagewise.trainers.causal_lm import CausalLMTrainer

    seen = {}
    train = CausalLMTrainer.train
    monkeypatch.setattr(CausalLMTrainer, "train", lambda self, **k: seen.update(vars(self.args)) or train(self, **k))
    flags = ("--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1", "--load_best_model_at_end", "True")
    start("sft", *flags, "--metric_for_best_model", figure)
    assert seen["greater_is_better"] is more_is_better
    start(
        "sft",
        *flags,
        "--metric_for_best_model",
        figure,
        "--greater_is_better",
        "True",
        "--overwrite_output_dir",
        "True",
    )
    assert seen["greater_is_better"] is True


@pytest.mark.parametrize("schedule", ["constant", "reduce_lr_on_plateau"])
def test_a_schedule_without_a_warm_up_takes_none(schedule, start):
    flags = ("--lr_scheduler_type", schedule, "--eval_strategy", "steps", "--eval_steps", "1")
    with pytest.raises(InputError, match=f"--warmup_steps: --lr_scheduler_type {schedule} has no warm-up"):
        start("sft", *flags, "--warmup_steps", "2")


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup", "inverse_sqrt", "polynomial"])
def test_other_schedules_take_one(schedule, start):
    start("sft", "--lr_scheduler_type", schedule, "--warmup_steps", "0.5", "--dry_run", "True")
