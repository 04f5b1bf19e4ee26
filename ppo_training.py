r"""Proximal policy optimization (PPO): prompts in, a policy out whose answers score better.

    python ppo_training.py --model_name_or_path outputs/sft-merged --reward_model_path outputs/rm \
        --train_file_dir examples/sft/train --output_dir outputs/ppo

One step is one iteration: answers are sampled and scored, then the policy is updated on them. With an adapter, policy,
value model, reference and reward model share one base model in memory.
"""

import math
from dataclasses import dataclass, field

from stagewise.errors import InputError
from stagewise.run.exit_codes import run_script

# Which figures are drawn together, in ppo.png.
CURVES = {
    "score": ("objective/scores", "eval_scores"),
    "KL to the reference": ("objective/kl", "eval_kl"),
    "tokens of an answer": ("objective/response_length", "eval_response_length"),
    "losses": ("policy/loss", "value/loss"),
}
# Flags, what they must be, and the test of it.
RANGES = (
    (
        ("num_ppo_epochs", "num_mini_batches", "rollout_batch_size", "max_new_tokens", "total_episodes"),
        "1 or more",
        lambda value: value >= 1,
    ),
    (
        ("target_kl", "kl_horizon", "max_approx_kl", "cliprange", "cliprange_value", "score_clip"),
        "a number above 0",
        lambda value: 0 < value < math.inf,
    ),
    (
        ("kl_coef", "vf_coef", "max_kl", "missing_eos_penalty", "completions_steps"),
        "0 or more",
        lambda value: 0 <= value < math.inf,
    ),
    (("gamma", "lam"), "a share from 0 to 1", lambda value: 0 <= value <= 1),
)


@dataclass
class PPOArguments:
    """Options of PPO."""

    reward_model_path: str | None = field(
        default=None,
        metadata={
            "help": "Reward model: an adapter of reward_modeling.py (shares the policy's base), or a full model."
        },
    )
    reward_function: str | None = field(
        default=None,
        metadata={
            "help": "module:function or file.py:function in place of a reward model: (prompts, completions) -> "
            "list of float."
        },
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a prompt at most: its oldest rounds are dropped; unset: what is left of "
            "--model_max_length, or 1024, or what is left of the model's positions."
        },
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Tokens of an answer at most."})
    temperature: float = field(default=0.7, metadata={"help": "Of sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the most likely tokens up to this probability."})
    value_init: str = field(
        default="auto",
        metadata={
            "help": "Where the value model starts: reward_model (an adapter on the policy's base), zero, or auto, the "
            "first where it can."
        },
    )
    rollout_batch_size: int = field(
        default=64, metadata={"help": "Answers that a process samples and evaluates at once."}
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "How often the answers of an iteration are gone over."})
    num_mini_batches: int = field(
        default=1, metadata={"help": "Optimizer steps of one such round; each takes a whole accumulated batch."}
    )
    total_episodes: int | None = field(
        default=None, metadata={"help": "Answers of the whole run, in place of --max_steps and --num_train_epochs."}
    )
    kl_coef: float = field(default=0.05, metadata={"help": "What a nat of KL to the reference costs."})
    kl_estimator: str = field(default="k1", metadata={"help": "k1 (log ratio) or k3 (never negative)."})
    target_kl: float | None = field(
        default=None, metadata={"help": "Adapt --kl_coef so that the KL of an answer nears this."}
    )
    kl_horizon: float = field(default=10_000.0, metadata={"help": "Answers in which --target_kl is to be reached."})
    max_approx_kl: float | None = field(
        default=None,
        metadata={"help": "End an iteration's updates early once the policy has moved this far; one more follows."},
    )
    max_kl: float | None = field(
        default=200.0, metadata={"help": "Stop the run where the mean KL of the answers is above this; 0 never."}
    )
    cliprange: float = field(default=0.2, metadata={"help": "How far the ratio of policies may leave 1."})
    cliprange_value: float = field(default=0.2, metadata={"help": "How far a value may move in one iteration."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of later rewards."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalized advantage estimation."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale the rewards of an iteration to variance 1."})
    score_clip: float | None = field(default=None, metadata={"help": "Clip scores to +- this."})
    reward_baseline: float = field(default=0.0, metadata={"help": "Taken off every score."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken off the score of an answer that does not end."}
    )
    completions_steps: int = field(
        default=10, metadata={"help": "Show sampled answers with their scores every N steps; 0 never."}
    )

    def __post_init__(self) -> None:
        if (self.reward_model_path is None) == (self.reward_function is None):
            raise InputError("--reward_model_path, --reward_function: give one of them, to score the answers")
        if self.kl_estimator not in ("k1", "k3"):
            raise InputError(f"--kl_estimator: found {self.kl_estimator!r}, expected k1 or k3")
        if self.value_init not in ("auto", "reward_model", "zero"):
            raise InputError(f"--value_init: found {self.value_init!r}, expected auto, reward_model or zero")
        for names, expected, fits in RANGES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not fits(value):
                    raise InputError(f"--{name}: found {value}, expected {expected}")


def main(argv: list[str] | None = None) -> dict:
    # 1. arguments
    from stagewise.arguments import (
        DataArguments,
        LoraArguments,
        ModelArguments,
        PPOTrainingArguments,
        RunArguments,
        parse_arguments,
    )
    from stagewise.old_spellings import PPO_SPELLINGS

    arguments = parse_arguments(
        ModelArguments, LoraArguments, DataArguments, RunArguments, PPOArguments, PPOTrainingArguments,
        argv=argv, prog="ppo_training.py", description=__doc__, old_spellings=PPO_SPELLINGS,
    )  # fmt: skip
    model_args, lora_args, data_args, run_args, ppo_args, args = arguments
    if ppo_args.max_prompt_length is not None:
        model_args = model_args.with_length(ppo_args.max_prompt_length + ppo_args.max_new_tokens)

    from stagewise.data import loading, tokenization
    from stagewise.data.prompts import PromptOptions, completion_suffix
    from stagewise.distributed import first_process_first
    from stagewise.modeling.actor_critic import load_actor_critic, log_memory
    from stagewise.modeling.generation import own_generation, sampling_config, settle_end, stop_token_ids
    from stagewise.modeling.loading import load_config, load_tokenizer, prompt_limit, reserve_padding
    from stagewise.modeling.model_check import check_model
    from stagewise.modeling.quantization import plan_quantization, stage_entry
    from stagewise.modeling.reward import check_scorer, load_scorer
    from stagewise.run import callbacks, lifecycle, lineage
    from stagewise.run.memory import plan_memory
    from stagewise.run.preflight import check_start
    from stagewise.trainers.ppo import PPOSettings, PPOTrainer

    if ppo_args.total_episodes is not None and args.max_steps > 0:
        raise InputError("--total_episodes: found beside --max_steps; give one of them")
    check_start("ppo", arguments, {"--reward_model_path": ppo_args.reward_model_path})
    checkpoint = lifecycle.start_run(args, run_args)
    quantization = plan_quantization(model_args, lora_args, args)

    # 2. tokenizer and template
    parent = lineage.read_parent(model_args.model_name_or_path)
    lineage.check_resumed(checkpoint, load_config(model_args))
    tokenizer = load_tokenizer(model_args)
    template = loading.resolve_template(data_args, parent)
    lineage.check_reward_model(
        ppo_args.reward_model_path, template.name if template else None, load_config(model_args)
    )
    renderer = tokenization.build_renderer(template, tokenizer, lineage.day_of_run(checkpoint))
    reserve_padding(tokenizer, renderer.stop_tokens)
    tokenizer.chat_template = loading.chat_template(template, tokenizer)
    own = own_generation(model_args.model_name_or_path, load_config(model_args))
    sampling = sampling_config(
        tokenizer, stop_token_ids(tokenizer, renderer.stop_tokens, own),
        ppo_args.max_new_tokens, ppo_args.temperature, ppo_args.top_p,
    )  # fmt: skip
    limit = prompt_limit(model_args, ppo_args.max_prompt_length, ppo_args.max_new_tokens)
    prompts = PromptOptions(limit)
    check_model(model_args, lora_args, args, tokenizer, checkpoint)
    check_scorer(
        ppo_args.reward_model_path, ppo_args.reward_function, model_args.model_name_or_path, tokenizer,
        (ppo_args.max_prompt_length or 1) + ppo_args.max_new_tokens, ppo_args.value_init,
        model_args.allow_pickle,
    )  # fmt: skip

    # 3. data
    with first_process_first(args, "data"):
        data = loading.load_prompts(data_args, renderer, tokenizer, prompts, args)
    lineage.check_data(checkpoint, data.fingerprint)
    memory = plan_memory("ppo", (model_args, *arguments[1:]), tokenizer, data.train, limit)
    if run_args.dry_run:
        return lifecycle.report_dry_run(args, data.report, data.train, memory, ppo_args.num_mini_batches)

    # 4. model
    model = load_actor_critic(model_args, lora_args, tokenizer, ppo_args.temperature, quantization)
    settle_end(model.base, tokenizer, renderer.stop_tokens, renderer.eos)
    scorer = load_scorer(
        ppo_args.reward_model_path, ppo_args.reward_function, model, tokenizer,
        completion_suffix(renderer, tokenizer), math.ceil(ppo_args.rollout_batch_size / 4), ppo_args.value_init,
        model_args.allow_pickle,
    )  # fmt: skip
    log_memory(model, scorer)

    # 5. trainer: train, save, evaluate
    trainer = lifecycle.build_trainer(
        PPOTrainer, args, run_args,
        model=model,
        settings=PPOSettings.from_arguments(ppo_args),
        scorer=scorer,
        sampling=sampling,
        rollout_batch_size=ppo_args.rollout_batch_size,
        total_episodes=ppo_args.total_episodes,
        processing_class=tokenizer,
        train_dataset=data.train,
        eval_dataset=data.validation,
    )  # fmt: skip
    trainer.add_callback(callbacks.SaveSamples(trainer.samples, ppo_args.completions_steps))
    lifecycle.open_output_dir(args, run_args, checkpoint, arguments, data.report)
    metrics: dict = {}
    if args.do_train:
        metrics |= lifecycle.train_and_save(
            trainer, checkpoint, memory,
            stage="ppo",
            base_model=model_args.model_name_or_path or model_args.config_name,
            parent=parent,
            template=template.name if template else None,
            head="causal_lm",
            adapter=lora_args.use_peft,
            dtype=str(model.base.dtype).removeprefix("torch."),
            quantization=stage_entry(model.base),
            data_fingerprint=data.fingerprint,
            day=renderer.day,
            reward=ppo_args.reward_model_path or ppo_args.reward_function,
        )  # fmt: skip
    if args.do_eval and data.validation is not None:
        metrics |= lifecycle.evaluate_run(trainer)
    lifecycle.report_curves(trainer, run_args, CURVES, "ppo.png")
    lifecycle.report_run(trainer, run_args, arguments, data.report, metrics)
    return metrics


if __name__ == "__main__":
    run_script(main)
