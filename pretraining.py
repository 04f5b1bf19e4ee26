r"""Continued pretraining (PT): plain documents in, a model that knows the domain's language out.

    python pretraining.py --model_name_or_path BASE \
        --train_file_dir examples/pretrain/train --validation_file_dir examples/pretrain/validation \
        --output_dir outputs/pt

With --config_name and --tokenizer_name_or_path in place of --model_name_or_path, the weights start at random.
"""

from dataclasses import dataclass, field
from typing import Literal

from stagewise.multitask_arguments import MultitaskArguments
from stagewise.run.exit_codes import run_script


@dataclass
class PTArguments(MultitaskArguments):
    """Options of pretraining."""

    _trains_on_texts = True

    block_size: int | None = field(default=None, metadata={"help": "Tokens of a row; unset: --model_max_length."})
    packing: bool = field(
        default=True, metadata={"help": "Join documents into full blocks; off: a row for each document, padded."}
    )
    attend_across_documents: bool = field(
        default=False, metadata={"help": "Packed documents see the ones before them in the block (the classic way)."}
    )
    document_separator: Literal["blank_line", "line", "file"] = field(
        default="blank_line", metadata={"help": "What ends a document in a .txt file."}
    )
    keep_linebreaks: bool = field(
        default=True, metadata={"help": "Keep line breaks inside documents of .txt files; off: they become blanks."}
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

    arguments = parse_arguments(
        ModelArguments, LoraArguments, DataArguments, RunArguments, PTArguments, StageTrainingArguments,
        argv=argv, prog="pretraining.py", description=__doc__,
    )  # fmt: skip
    model_args, lora_args, data_args, run_args, pt_args, args = arguments
    model_args = model_args.with_length(pt_args.block_size)

    from stagewise.data import loading
    from stagewise.data.collators import CausalLMCollator
    from stagewise.data.tasks import plan_tasks
    from stagewise.distributed import first_process_first
    from stagewise.modeling.attention import check_packing, is_flash, settle_attention
    from stagewise.modeling.loading import load_causal_lm, load_config, load_tokenizer, row_limit
    from stagewise.modeling.lora import attach_adapter
    from stagewise.modeling.model_check import check_model
    from stagewise.modeling.quantization import plan_quantization, stage_entry
    from stagewise.run import lifecycle, lineage
    from stagewise.run.memory import plan_memory
    from stagewise.run.preflight import check_start
    from stagewise.trainers.causal_lm import CausalLMTrainer

    check_start("pt", arguments)
    checkpoint = lifecycle.start_run(args, run_args)
    quantization = plan_quantization(model_args, lora_args, args)
    tasks = plan_tasks(pt_args, data_args, args)

    # 2. tokenizer and template
    parent = lineage.read_parent(model_args.model_name_or_path)
    lineage.check_resumed(checkpoint, load_config(model_args))
    tokenizer = load_tokenizer(model_args)
    length = model_args.model_max_length if pt_args.block_size is None else pt_args.block_size
    block_size = row_limit(model_args, length, "--block_size")
    isolate = pt_args.packing and not pt_args.attend_across_documents
    check_model(model_args, lora_args, args, tokenizer, checkpoint, packs=isolate)

    # 3. data
    with first_process_first(args, "data"):
        data = loading.load_documents(
            data_args,
            tokenizer,
            block_size,
            pt_args.packing,
            args,
            pt_args.document_separator,
            pt_args.keep_linebreaks,
        )
    lineage.check_data(checkpoint, data.fingerprint)
    tasks.check(data.train, data.validation, args)

    memory = plan_memory("pt", (model_args, *arguments[1:]), tokenizer, data.train, block_size)
    if run_args.dry_run:
        return lifecycle.report_dry_run(args, data.report, data.train, memory)

    # 4. model
    model = load_causal_lm(
        model_args, tokenizer, not lora_args.use_peft, args.label_smoothing_factor, quantization=quantization
    )
    settle_attention(model, model_args, args)
    collator = CausalLMCollator(
        tokenizer.pad_token_id,
        data.names,
        not isolate,
        is_flash(model.config._attn_implementation),
        tasks.weighs_tokens,
    )
    if isolate:
        check_packing(model, collator, args)
    model = attach_adapter(model, lora_args)

    # 5. trainer: train, save, evaluate
    trainer = lifecycle.build_trainer(
        CausalLMTrainer, args, run_args,
        model=model,
        processing_class=tokenizer,
        train_dataset=data.train,
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
            stage="pt",
            base_model=model_args.model_name_or_path or model_args.config_name,
            parent=parent,
            template=(parent or {}).get("template"),
            head="causal_lm",
            adapter=lora_args.use_peft,
            dtype=str(model.dtype).removeprefix("torch."),
            quantization=stage_entry(model),
            data_fingerprint=data.fingerprint,
        )  # fmt: skip
    if args.do_eval and data.validation is not None:
        metrics |= lifecycle.evaluate_run(trainer)
    lifecycle.report_curves(trainer, run_args, trainer.curves(), "tasks.png")
    lifecycle.report_run(trainer, run_args, arguments, data.report, metrics)
    return metrics


if __name__ == "__main__":
    run_script(main)
