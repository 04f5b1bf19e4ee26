r"""Reward modeling (RM): pairs of answers in, a model that scores an answer out.

    python reward_modeling.py --model_name_or_path outputs/sft-merged \
        --train_file_dir examples/reward/train --validation_file_dir examples/reward/validation --output_dir outputs/rm
"""

from dataclasses import dataclass, field

from stagewise.run.exit_codes import run_script


@dataclass
class RMArguments:
    """Options of reward modeling."""

    _adds_tokens = True

    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of the prompt at most: its oldest rounds are dropped; unset: only where max_length "
            "demands it."
        },
    )
    center_rewards_coefficient: float = field(
        default=0.0, metadata={"help": "Weight of the term that keeps scores around 0 (0.01 is usual)."}
    )
    audit_rows: int = field(
        default=2, metadata={"help": "Pairs that the audit prints side by side, with what differs in colour."}
    )

    def __post_init__(self) -> None:
        from stagewise.errors import InputError

        if not 0 <= self.center_rewards_coefficient < float("inf"):
            raise InputError(
                f"--center_rewards_coefficient: found {self.center_rewards_coefficient}, expected a number, 0 or more"
            )


def main(argv: list[str] | None = None) -> dict:
    # 1. arguments
    from stagewise.arguments import (
        DataArguments,
        LoraArguments,
        ModelArguments,
        RunArguments,
        StageTrainingArguments,
        parse_arguments,
    )
    from stagewise.old_spellings import prompt_and_answer_lengths

    arguments = parse_arguments(
        ModelArguments, LoraArguments, DataArguments, RunArguments, RMArguments, StageTrainingArguments,
        argv=argv, prog="reward_modeling.py", description=__doc__,
        old_spellings=[prompt_and_answer_lengths("max_prompt_length", "model_max_length")],
    )  # fmt: skip
    model_args, lora_args, data_args, run_args, rm_args, args = arguments

    from stagewise.data import loading, preference_audit, tokenization
    from stagewise.data.collators import PairwiseCollator
    from stagewise.data.preferences import PreferenceOptions
    from stagewise.distributed import first_process_first
    from stagewise.modeling.loading import (
        check_score_head,
        load_config,
        load_reward_model,
        load_tokenizer,
        reserve_padding,
        row_limit,
    )
    from stagewise.modeling.lora import attach_adapter
    from stagewise.modeling.model_check import check_model
    from stagewise.modeling.quantization import plan_quantization, stage_entry
    from stagewise.run import lifecycle, lineage
    from stagewise.run.memory import plan_memory
    from stagewise.run.preflight import check_start
    from stagewise.trainers.reward import PairwiseRewardTrainer

    check_start("rm", arguments)
    checkpoint = lifecycle.start_run(args, run_args)
    quantization = plan_quantization(model_args, lora_args, args)

    # 2. tokenizer and template
    parent = lineage.read_parent(model_args.model_name_or_path, takes_reward_model=True)
    check_score_head(model_args)
    lineage.check_resumed(checkpoint, load_config(model_args))
    tokenizer = load_tokenizer(model_args)
    template = loading.resolve_template(data_args, parent)
    new_tokens = loading.add_template_tokens(template, tokenizer) if model_args.add_template_tokens else []
    renderer = tokenization.build_renderer(template, tokenizer, lineage.day_of_run(checkpoint))
    reserve_padding(tokenizer, renderer.stop_tokens)
    tokenizer.chat_template = loading.chat_template(template, tokenizer)
    encoding = PreferenceOptions(
        max_length=row_limit(model_args, model_args.model_max_length, "--max_length"),
        max_prompt_length=rm_args.max_prompt_length,
    )
    check_model(model_args, lora_args, args, tokenizer, checkpoint, scores=True, trains_new_tokens=bool(new_tokens))

    # 3. data
    with first_process_first(args, "data"):
        data = loading.load_preferences(data_args, renderer, tokenizer, encoding, args)
    lineage.check_data(checkpoint, data.fingerprint)
    if args.should_log:
        preference_audit.print_audit(data.label_audit, data.sample, tokenizer, rm_args.audit_rows)
    memory = plan_memory("rm", arguments, tokenizer, data.train, encoding.max_length, bool(new_tokens))
    if run_args.dry_run:
        return lifecycle.report_dry_run(args, data.report, data.train, memory)

    # 4. model
    model = load_reward_model(model_args, tokenizer, not lora_args.use_peft, quantization)
    model = attach_adapter(model, lora_args, "SEQ_CLS", trains_new_tokens=bool(new_tokens))

    # 5. trainer: train, save, evaluate
    trainer = lifecycle.build_trainer(
        PairwiseRewardTrainer, args, run_args,
        model=model,
        processing_class=tokenizer,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=PairwiseCollator(tokenizer.pad_token_id, data.names),
        dataset_names=data.names,
        center_coefficient=rm_args.center_rewards_coefficient,
    )  # fmt: skip
    lifecycle.open_output_dir(args, run_args, checkpoint, arguments, data.report)
    metrics: dict = {}
    if args.do_train:
        metrics |= lifecycle.train_and_save(
            trainer, checkpoint, memory,
            stage="rm",
            base_model=model_args.model_name_or_path or model_args.config_name,
            parent=parent,
            template=template.name if template else None,
            head="sequence_classification",
            adapter=lora_args.use_peft,
            dtype=str(model.dtype).removeprefix("torch."),
            quantization=stage_entry(model),
            data_fingerprint=data.fingerprint,
            day=renderer.day,
        )  # fmt: skip
    if args.do_eval and data.validation is not None:
        metrics |= lifecycle.evaluate_run(trainer)
        lifecycle.report_scores(trainer, run_args)
    lifecycle.report_run(trainer, run_args, arguments, data.report, metrics)
    return metrics


if __name__ == "__main__":
    run_script(main)
