r"""Supervised fine-tuning (SFT): conversations in, a model that answers in turns out.

    python supervised_finetuning.py --model_name_or_path BASE --template_name chatml \
        --train_file_dir examples/sft/train --validation_file_dir examples/sft/validation --output_dir outputs/sft
"""

from dataclasses import dataclass, field
from typing import Literal

from stagewise.errors import InputError
from stagewise.multitask_arguments import MultitaskArguments
from stagewise.run.exit_codes import run_script


@dataclass
class SFTArguments(MultitaskArguments):
    """Options of supervised fine-tuning."""

    _trains_on_texts = True
    _adds_tokens = True

    packing: bool = field(
        default=False, metadata={"help": "Several conversations in one row without padding, each attending to itself."}
    )
    packing_strategy: Literal["best_fit", "sequential"] = field(
        default="best_fit",
        metadata={"help": "Which conversations share a row: those that fill it best, or neighbours, in their order."},
    )
    train_on_prompt: bool = field(default=False, metadata={"help": "Train every token, not the answers only."})
    train_on: Literal["all", "last"] = field(
        default="all", metadata={"help": "Which assistant turns are trained: all, or the last of a conversation."}
    )
    on_too_long: Literal["truncate", "drop", "error"] = field(
        default="truncate",
        metadata={"help": "Rows over model_max_length: cut whole turns from the end, drop, or stop."},
    )
    audit_rows: int = field(
        default=2, metadata={"help": "Rows that the label audit prints, with the trained tokens in colour."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing_strategy != "best_fit" and not self.packing:
            raise InputError(f"--packing_strategy {self.packing_strategy}: nothing is packed; add --packing True")
        if self.train_on_prompt and self.train_on == "last":
            raise InputError("--train_on last: --train_on_prompt trains every token; give one of the two")


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

    arguments = parse_arguments(
        ModelArguments, LoraArguments, DataArguments, RunArguments, SFTArguments, StageTrainingArguments,
        argv=argv, prog="supervised_finetuning.py", description=__doc__,
    )  # fmt: skip
    model_args, lora_args, data_args, run_args, sft_args, args = arguments

    from stagewise.data import audit, loading, tokenization
    from stagewise.data.collators import CausalLMCollator
    from stagewise.data.packing import pack_rows
    from stagewise.data.tasks import plan_tasks
    from stagewise.distributed import first_process_first
    from stagewise.modeling.attention import check_packing, is_flash, settle_attention
    from stagewise.modeling.generation import settle_end
    from stagewise.modeling.loading import load_causal_lm, load_config, load_tokenizer, row_limit
    from stagewise.modeling.lora import attach_adapter
    from stagewise.modeling.model_check import check_model
    from stagewise.modeling.quantization import plan_quantization, stage_entry
    from stagewise.run import lifecycle, lineage
    from stagewise.run.memory import plan_memory
    from stagewise.run.preflight import check_start
    from stagewise.trainers.causal_lm import CausalLMTrainer

    check_start("sft", arguments)
    checkpoint = lifecycle.start_run(args, run_args)
    quantization = plan_quantization(model_args, lora_args, args)
    tasks = plan_tasks(sft_args, data_args, args)

    # 2. tokenizer and template
    parent = lineage.read_parent(model_args.model_name_or_path)
    lineage.check_resumed(checkpoint, load_config(model_args))
    tokenizer = load_tokenizer(model_args)
    template = loading.resolve_template(data_args, parent)
    new_tokens = loading.add_template_tokens(template, tokenizer) if model_args.add_template_tokens else []
    renderer = tokenization.build_renderer(template, tokenizer, lineage.day_of_run(checkpoint))
    tokenizer.chat_template = loading.chat_template(template, tokenizer)
    encoding = tokenization.EncodingOptions(
        max_length=row_limit(model_args, model_args.model_max_length),
        train_on=sft_args.train_on,
        train_on_prompt=sft_args.train_on_prompt,
        on_too_long=sft_args.on_too_long,
    )
    check_model(
        model_args, lora_args, args, tokenizer, checkpoint,
        trains_new_tokens=bool(new_tokens), packs=sft_args.packing,
    )  # fmt: skip

    # 3. data
    with first_process_first(args, "data"):
        data = loading.load_conversations(data_args, renderer, tokenizer, encoding, args)
    lineage.check_data(checkpoint, data.fingerprint)
    if args.should_log:
        audit.print_audit(data.label_audit, data.sample, tokenizer, sft_args.audit_rows)
    train = pack_rows(data.train, encoding.max_length, sft_args.packing_strategy) if sft_args.packing else data.train
    tasks.check(train, data.validation, args)

    memory = plan_memory("sft", arguments, tokenizer, train, encoding.max_length, bool(new_tokens))
    if run_args.dry_run:
        return lifecycle.report_dry_run(args, data.report, train, memory)

    # 4. model
    model = load_causal_lm(
        model_args, tokenizer, not lora_args.use_peft, args.label_smoothing_factor, quantization=quantization
    )
    settle_end(model, tokenizer, renderer.stop_tokens, renderer.eos)
    settle_attention(model, model_args, args)
    collator = CausalLMCollator(
        tokenizer.pad_token_id, data.names,
        flash=is_flash(model.config._attn_implementation), sample_ids=tasks.weighs_tokens,
    )  # fmt: skip
    if sft_args.packing:
        check_packing(model, collator, args)
    model = attach_adapter(model, lora_args, trains_new_tokens=bool(new_tokens))

    # 5. trainer: train, save, evaluate
    trainer = lifecycle.build_trainer(
        CausalLMTrainer, args, run_args,
        model=model,
        processing_class=tokenizer,
        train_dataset=train,
        eval_dataset=data.validation,
        data_collator=collator,
        dataset_names=data.names,
        tasks=tasks,
    )  # fmt: skip
    lifecycle.open_output_dir(args, run_args, checkpoint, arguments, data.report)
    metrics: dict = {}
    if args.do_train:
        metrics |= lifecycle.train_and_save(
            trainer, checkpoint, memory,
            stage="sft",
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
    lifecycle.report_curves(trainer, run_args, trainer.curves(), "tasks.png")
    lifecycle.report_run(trainer, run_args, arguments, data.report, metrics)
    return metrics


if __name__ == "__main__":
    run_script(main)
