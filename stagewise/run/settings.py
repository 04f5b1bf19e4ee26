"""Settings of transformers' Trainer that a stage cannot honour, and the figures that its evaluations make."""

from collections.abc import Iterator, Sequence

from transformers import TrainingArguments

from stagewise.distributed import uses_fsdp, zero_stage
from stagewise.errors import InputError

# Of each stage, as --metric_for_best_model names them, and whether more is better.
_TOKENS = {"loss": False, "perplexity": False}
FIGURES: dict[str, dict[str, bool]] = {
    "pt": _TOKENS,
    "sft": _TOKENS,
    "rm": {"loss": False, "accuracy": True, "margin": True, "chosen_score": True, "rejected_score": False},
    "dpo": {
        "loss": False, "rewards/accuracies": True, "rewards/margins": True, "rewards/chosen": True,
        "rewards/rejected": False, "logps/chosen": True, "logps/rejected": False, "mean_token_accuracy": True,
    },
    "ppo": {
        "scores": True, "rlhf_reward": True, "non_score_reward": True, "kl": False, "scores_std": False,
        "entropy": True, "response_length": False, "without_eos": False,
    },
}  # fmt: skip
# Stages whose evaluations have figures of each data set too: eval_NAME_loss.
ALL, _BY_DATASET = tuple(FIGURES), ("pt", "sft", "rm")


def check_settings(stage: str, args: TrainingArguments, datasets: Sequence[str], stops_early: bool) -> None:
    """Refuse what would change nothing; settle by which figure checkpoints are compared, and which way is better.

    Args:
        stage: "pt", "sft", "rm", "ppo" or "dpo".
        datasets: the names of the data sets that the run may evaluate on.
        stops_early: --early_stopping_stall_num is given.

    Raises:
        InputError: a setting that the stage cannot honour, with the way on.
    """
    for message in _refused(stage, args):
        raise InputError(message)
    figures, name = FIGURES[stage], (args.metric_for_best_model or "").removeprefix("eval_")
    # a checkpoint that is known to be the best is not deleted
    compares = stops_early or ((args.save_total_limit or 0) > 1 and args.eval_strategy != "no")
    # where nothing is said the Trainer falls back on the loss, which PPO's evaluations do not have
    if (compares or name) and not (args.said_metric or name in figures):
        name = next(iter(figures))
    if not name:
        return
    own = next((dataset for dataset in datasets if name.startswith(f"{dataset}_")), None)
    figure = name.removeprefix(f"{own}_") if stage in _BY_DATASET and len(datasets) > 1 else name
    if figure not in figures:
        of_each = f", each also as NAME_loss of one of {', '.join(datasets)}" if len(datasets) > 1 else ""
        raise InputError(
            f"--metric_for_best_model {args.metric_for_best_model}: evaluations of this stage give "
            f"{', '.join(figures)}{of_each if stage in _BY_DATASET else ''}; choose one of them"
        )
    if args.eval_strategy == "no":
        raise InputError(
            "--metric_for_best_model: needs evaluations on the way; pass --eval_strategy steps (and --eval_steps)"
        )
    args.metric_for_best_model = f"eval_{name}"
    if not args.said_greater_is_better:
        args.greater_is_better = figures[figure]


def _refused(stage: str, args: TrainingArguments) -> Iterator[str]:
    smoothing = "--label_smoothing is for --loss_type robust and exo_pair" if stage == "dpo" else "leave it at 0"
    rules = [
        (ALL, args.include_for_metrics, "--include_for_metrics: figures are made of losses and scores; leave it out"),
        (ALL, args.label_names, "--label_names: what is trained is found by template and data; leave it out"),
        (ALL, not args.eval_do_concat_batches, "--eval_do_concat_batches False: figures are of a whole evaluation; "
         "leave it out"),
        (ALL, not args.average_tokens_across_devices, "--average_tokens_across_devices False: a step's loss is a mean "
         "over all processes; leave it out"),
        (ALL, args.enable_jit_checkpoint, "--enable_jit_checkpoint: a signal writes a checkpoint; leave it out"),
        (ALL, args.push_to_hub and not (args.hub_token or _has_token()), "--push_to_hub: there is no token for it; "
         "pass --hub_token, set HF_TOKEN, or run hf auth login"),
        (("rm", "dpo", "ppo"), args.label_smoothing_factor, "--label_smoothing_factor: the stage has no labels to "
         f"smooth; {smoothing}"),
        (("ppo",), args.torch_empty_cache_steps is not None, "--torch_empty_cache_steps: PPO's steps are many updates "
         "and do not count them; leave it out"),
        (("ppo",), args.bf16_full_eval or args.fp16_full_eval, "--bf16_full_eval, --fp16_full_eval: PPO evaluates by "
         "sampling, as it trains; use --bf16, or --dtype"),
        (("ppo",), args.include_num_input_tokens_seen not in ("no", False), "--include_num_input_tokens_seen: PPO's "
         "tokens are sampled, and counted in episodes; leave it out"),
        (("ppo",), args.neftune_noise_alpha, "--neftune_noise_alpha: with noise in the updates, policy and sampled "
         "log-probabilities would differ by the noise; leave it out"),
        (("ppo",), args.auto_find_batch_size, "--auto_find_batch_size: an iteration is made of the batch size; "
         "set it"),
        (("ppo",), args.train_sampling_strategy == "group_by_length", "--train_sampling_strategy group_by_length: "
         "rollouts are sorted by length anyway; use random"),
        (("ppo",), uses_fsdp(args), "--fsdp: PPO runs on plain data parallelism or ZeRO-2; leave it out"),
        (("ppo",), zero_stage(args) == 3, "--deepspeed: PPO runs with ZeRO-2, not with ZeRO-3"),
    ]  # fmt: skip
    return (message for stages, found, message in rules if stage in stages and found)


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None
