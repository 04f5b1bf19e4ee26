r"""Direct preference optimization (DPO): pairs of answers in, a policy that prefers the better one out.

    python dpo_training.py --model_name_or_path outputs/sft-merged --train_file_dir examples/reward/train \
        --validation_file_dir examples/reward/validation --output_dir outputs/dpo

The reference is the policy at the start: the base without its adapter, a frozen copy of --peft_path, or, when all
weights are trained, a second model.
"""

from dataclasses import dataclass, field

from stagewise.errors import InputError
from stagewise.run.exit_codes import run_script

LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip


@dataclass
class DPOArguments:
    """Options of DPO."""

    beta: float = field(default=0.1, metadata={"help": "How strongly the policy is held to the reference."})
    loss_type: str = field(
        default="sigmoid",
        metadata={"help": "trl's losses, one or several with commas: " + ", ".join(LOSS_TYPES) + "."},
    )
    loss_weights: str | None = field(
        default=None, metadata={"help": "Weight of each loss of --loss_type: 1.0,0.5; unset: 1 each."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of pairs taken to be the wrong way round (robust), epsilon of exo_pair."}
    )
    reference_free: bool = field(
        default=False, metadata={"help": "No reference: every answer is taken to be equally likely under it."}
    )
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Another model as the reference, in place of the policy's own start."}
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of the prompt at most: its oldest rounds are dropped; unset: only where max_length "
            "demands it."
        },
    )
    audit_rows: int = field(
        default=2, metadata={"help": "Pairs that the audit prints side by side, with what differs in colour."}
    )

    def __post_init__(self) -> None:
        self.loss_types = [name.strip() for name in self.loss_type.split(",")]
        unknown = [name for name in self.loss_types if name not in LOSS_TYPES]
        if unknown:
            raise InputError(f"--loss_type: found {', '.join(unknown)!r}, expected some of {', '.join(LOSS_TYPES)}")
        try:
            self.weights = [float(each) for each in self.loss_weights.split(",")] if self.loss_weights else None
        except ValueError:
            raise InputError(f"--loss_weights: found {self.loss_weights!r}, expected numbers: 1.0,0.5") from None
        if self.weights and len(self.weights) != len(self.loss_types):
            raise InputError(f"--loss_weights: found {len(self.weights)} for {len(self.loss_types)} losses")
        if not 0 < self.beta < float("inf"):
            raise InputError(f"--beta: found {self.beta}, expected a number above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(f"--label_smoothing: found {self.label_smoothing}, expected a share from 0 to below 0.5")
        if self.label_smoothing and not {"robust", "exo_pair"} & set(self.loss_types):
            raise InputError("--label_smoothing: is for --loss_type robust and exo_pair")
        if "exo_pair" in self.loss_types and not self.label_smoothing:
            raise InputError("--loss_type exo_pair: needs --label_smoothing above 0; pass 1e-3, as its paper does")
        if self.reference_free and self.ref_model_name_or_path:
            raise InputError("--ref_model_name_or_path: --reference_free has no reference; give one of the two")


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
        ModelArguments, LoraArguments, DataArguments, RunArguments, DPOArguments, StageTrainingArguments,
        argv=argv, prog="dpo_training.py", description=__doc__,
        old_spellings=[prompt_and_answer_lengths("max_prompt_length", "model_max_length")],
    )  # fmt: skip
    model_args, lora_args, data_args, run_args, dpo_args, args = arguments

    from stagewise.data import loading, preference_audit, tokenization
    from stagewise.data.preferences import PreferenceOptions
    from stagewise.distributed import first_process_first
    from stagewise.modeling.generation import settle_end
    from stagewise.modeling.loading import (
        check_reference,
        load_causal_lm,
        load_config,
        load_reference,
        load_tokenizer,
        reserve_padding,
        row_limit,
    )
    from stagewise.modeling.lora import policy_adapter
    from stagewise.modeling.model_check import check_model
    from stagewise.modeling.quantization import plan_quantization, stage_entry
    from stagewise.run import lifecycle, lineage
    from stagewise.run.memory import plan_memory
    from stagewise.run.preflight import check_start
    from stagewise.trainers.dpo import dpo_config, dpo_trainer_class

    check_start("dpo", arguments, {"--ref_model_name_or_path": dpo_args.ref_model_name_or_path})
    checkpoint = lifecycle.start_run(args, run_args)
    quantization = plan_quantization(model_args, lora_args, args)
    config = dpo_config(
        args, beta=dpo_args.beta, loss_type=dpo_args.loss_types, loss_weights=dpo_args.weights,
        label_smoothing=dpo_args.label_smoothing,
    )  # fmt: skip

    # 2. tokenizer and template
    parent = lineage.read_parent(model_args.model_name_or_path)
    lineage.check_resumed(checkpoint, load_config(model_args))
    tokenizer = load_tokenizer(model_args)
    template = loading.resolve_template(data_args, parent)
    renderer = tokenization.build_renderer(template, tokenizer, lineage.day_of_run(checkpoint))
    reserve_padding(tokenizer, renderer.stop_tokens)
    tokenizer.chat_template = loading.chat_template(template, tokenizer)
    encoding = PreferenceOptions(
        max_length=row_limit(model_args, model_args.model_max_length, "--max_length"),
        max_prompt_length=dpo_args.max_prompt_length,
    )
    check_model(model_args, lora_args, args, tokenizer, checkpoint, adapts_head=False)
    check_reference(model_args, tokenizer, dpo_args.ref_model_name_or_path)

    # 3. data
    with first_process_first(args, "data"):
        data = loading.load_preferences(data_args, renderer, tokenizer, encoding, args)
    lineage.check_data(checkpoint, data.fingerprint)
    if args.should_log:
        preference_audit.print_audit(data.label_audit, data.sample, tokenizer, dpo_args.audit_rows)

    memory = plan_memory("dpo", arguments, tokenizer, data.train, encoding.max_length)
    if run_args.dry_run:
        return lifecycle.report_dry_run(args, data.report, data.train, memory)

    # 4. model
    trains_all = not lora_args.use_peft
    model = load_causal_lm(model_args, tokenizer, trains_all, token_loss=False, quantization=quantization)
    settle_end(model, tokenizer, renderer.stop_tokens, renderer.eos)
    reference = load_reference(model_args, tokenizer, dpo_args.ref_model_name_or_path, trains_all, quantization)
    model, peft_config = policy_adapter(model, lora_args)

    # 5. trainer: train, save, evaluate
    trainer = lifecycle.build_trainer(
        dpo_trainer_class(), config, run_args,
        model=model,
        ref_model=None if dpo_args.reference_free else reference,
        peft_config=peft_config,
        processing_class=tokenizer,
        train_dataset=data.train,
        eval_dataset=data.validation,
        reference_free=dpo_args.reference_free,
        starts_at_reference=dpo_args.ref_model_name_or_path is None,
    )  # fmt: skip
    lifecycle.open_output_dir(args, run_args, checkpoint, arguments, data.report)
    metrics: dict = {}
    if args.do_train:
        metrics |= lifecycle.train_and_save(
            trainer, checkpoint, memory,
            stage="dpo",
            base_model=model_args.model_name_or_path or model_args.config_name,
            parent=parent,
            template=template.name if template else None,
            head="causal_lm",
            adapter=lora_args.use_peft,
            dtype=str(model.dtype).removeprefix("torch."),
            quantization=stage_entry(model),
            data_fingerprint=data.fingerprint,
            day=renderer.day,
        )  # fmt: skip
    if args.do_eval and data.validation is not None:
        metrics |= lifecycle.evaluate_run(trainer)
    lifecycle.report_run(trainer, run_args, arguments, data.report, metrics)
    return metrics


if __name__ == "__main__":
    run_script(main)
