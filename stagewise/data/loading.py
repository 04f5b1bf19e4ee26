"""What a stage script trains on, from its DataArguments: files -> records -> rows of token ids, with their report."""

import logging
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from stagewise.arguments import DataArguments
from stagewise.data import audit, packing, sources
from stagewise.data.records import RecordOptions
from stagewise.data.tokenization import (
    EncodingOptions,
    Renderer,
    drop_unusable,
    tokenize_conversations,
    tokenize_documents,
)
from stagewise.errors import InputError
from template import Template, get_template

logger = logging.getLogger(__name__)


@dataclass
class StageData:
    """Tokenized rows and what is to be said about them.

    report is what data_report.json holds; fingerprint identifies the training rows; names are the data sets' names.
    """

    train: Dataset
    validation: Dataset | None
    names: tuple[str, ...]
    report: dict
    fingerprint: str
    label_audit: audit.LabelAudit = field(default_factory=audit.LabelAudit)


def resolve_template(args: DataArguments, parent: dict | None) -> Template | None:
    """--template_name, or else the one that the parent stage was trained with, or None for the tokenizer's own.

    Raises:
        TemplateError: no such template.
    """
    name = args.template_name or (parent or {}).get("template")
    if name is None:
        return None
    if args.template_name is None:
        logger.info("template %s, from the base model's stage.json", name)
    return get_template(name, tool_format=args.tool_format)


def add_template_tokens(template: Template | None, tokenizer) -> list[str]:
    """Add the control tokens of the template that are not one token of the tokenizer; returns those added."""
    if template is None:
        raise InputError("--add_template_tokens: needs --template_name")
    missing = [
        token
        for token in template.control_tokens(tokenizer.eos_token)
        if len(tokenizer(token, add_special_tokens=False).input_ids) != 1
    ]
    tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_additional_special_tokens=False)
    if missing:
        logger.info("added to the vocabulary: %s", ", ".join(missing))
    return missing


def chat_template(template: Template | None, tokenizer) -> str | None:
    """What is saved as the tokenizer's chat template, so that every engine renders what training rendered."""
    return tokenizer.chat_template if template is None else template.to_jinja()


def load_conversations(
    args: DataArguments, renderer: Renderer, tokenizer, encoding: EncodingOptions, training_args
) -> StageData:
    """Tokenized conversations for SFT, audited. Raises InputError for whatever data.md calls an error."""
    options = _record_options(args, renderer.control_tokens)
    train, validation, report = _load_splits("conversation", args, options, training_args)
    result: dict[str, Any] = {}
    audits: list[audit.LabelAudit] = []
    for split, records in (("train", train), ("validation", validation)):
        if records is None:
            result[split] = None
            continue
        encoded = tokenize_conversations(
            records, renderer, tokenizer, encoding, args.preprocessing_num_workers, not args.overwrite_cache
        )
        audits.append(audit.audit_conversations(records, encoded, renderer, tokenizer, encoding, training_args.seed))
        _count_rows(report[split], encoded)
        usable = drop_unusable(encoded, args.on_bad_row, encoding.on_too_long)
        if not len(usable):
            raise InputError(f"{split} data: no usable row is left")
        result[split] = usable
    return _stage_data(result, report, audits[0])


def load_documents(
    args: DataArguments,
    tokenizer,
    block_size: int,
    pack: bool,
    training_args,
    document_separator: str = "blank_line",
    keep_linebreaks: bool = True,
) -> StageData:
    """Tokenized blocks for pretraining."""
    options = _record_options(args, ())
    train, validation, report = _load_splits(
        "document", args, options, training_args, document_separator, keep_linebreaks
    )
    workers, use_cache = args.preprocessing_num_workers, not args.overwrite_cache
    result: dict[str, Any] = {}
    for split, records in (("train", train), ("validation", validation)):
        if records is None:
            result[split] = None
            continue
        encoded = tokenize_documents(records, tokenizer, workers, use_cache)
        _count_rows(report[split], encoded)
        cut = packing.pack_blocks if pack else packing.split_documents
        result[split] = cut(encoded, block_size, workers, use_cache)
    return _stage_data(result, report, audit.LabelAudit())


def _record_options(args: DataArguments, control_tokens: tuple[str, ...]) -> RecordOptions:
    return RecordOptions(
        assistant_name=args.assistant_name,
        assistant_author=args.assistant_author,
        use_reference=args.use_reference,
        control_tokens=control_tokens,
        keep_control_tokens=args.keep_control_tokens,
        allow_mixed=args.allow_mixed,
    )


def _load_splits(
    kind: str,
    args: DataArguments,
    options: RecordOptions,
    training_args,
    document_separator: str = "blank_line",
    keep_linebreaks: bool = True,
) -> tuple[Dataset, Dataset | None, dict]:
    """(training records, validation records or None, report): read, split where nothing is named, mixed, limited."""
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed

    def read(spec: str | None, split: str) -> tuple[dict[str, Dataset], dict]:
        if spec is None:
            dataset, found = sources.load_hub_dataset(
                kind, args.dataset_name or "", options, config_name=args.dataset_config_name, split=split,
                max_samples=args.max_samples_per_dataset, on_bad_row=args.on_bad_row,
                num_proc=args.preprocessing_num_workers, overwrite_cache=args.overwrite_cache,
            )  # fmt: skip
            return {found.dataset: dataset}, {found.dataset: found}
        return sources.load_records(
            kind, sources.find_sources(spec), options,
            document_separator=document_separator, keep_linebreaks=keep_linebreaks,
            max_samples_per_dataset=args.max_samples_per_dataset if split == "train" else None,
            on_bad_row=args.on_bad_row, num_proc=args.preprocessing_num_workers,
            overwrite_cache=args.overwrite_cache and training_args.process_index == 0,
        )  # fmt: skip

    train, train_reports = read(args.train_file_dir, "train")
    validation_reports: dict = {}
    if args.validation_file_dir:
        if args.validation_file_dir == args.train_file_dir:
            logger.warning("--validation_file_dir is --train_file_dir: the run evaluates on what it trains on")
        validation, validation_reports = read(args.validation_file_dir, "validation")
    elif training_args.do_eval:
        train, validation = sources.split_validation(train, args.validation_split_percentage, seed)
    else:
        validation = {}
    report = {
        "train": {"datasets": {name: found.to_dict() for name, found in train_reports.items()}},
        "validation": {"datasets": {name: found.to_dict() for name, found in validation_reports.items()}},
    }
    mixed = sources.mix(train, args.mix_strategy, _probabilities(args), seed)
    held_out = sources.mix(validation) if validation else None
    return _limit(mixed, args.max_train_samples, len(train), seed), _limit_validation(held_out, args, seed), report


def _probabilities(args: DataArguments) -> list[float] | None:
    return list(args.mix_probabilities) if args.mix_probabilities else None


def _limit_validation(dataset: Dataset | None, args: DataArguments, seed: int) -> Dataset | None:
    return None if dataset is None else _limit(dataset, args.max_eval_samples, 2, seed)


def _limit(dataset: Dataset, rows: int | None, n_datasets: int, seed: int) -> Dataset:
    """The first `rows` rows; of a mixture, as many drawn with the seed, so that every data set has its share."""
    if rows is None or rows < 0 or rows >= len(dataset):
        return dataset
    if n_datasets == 1:
        return dataset.select(range(rows))
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:rows]
    return dataset.select(np.sort(chosen))


def _count_rows(report: dict, encoded: Dataset) -> None:
    """Add what tokenization did to each data set's part of the report."""
    columns = [c for c in ("dataset", "length", "trained", "dropped", "truncated") if c in encoded.column_names]
    for batch in encoded.select_columns(columns).with_format("pandas").iter(batch_size=100_000):
        for name, rows in batch.groupby("dataset"):
            counts = report["datasets"].setdefault(name, {})
            _add(counts, "tokens", int(rows["length"].sum()))
            if "trained" in rows:
                _add(counts, "trained_tokens", int(rows["trained"].sum()))
                _merge_counts(counts, "dropped", rows["dropped"])
                _merge_counts(counts, "truncated", rows["truncated"])


def _add(counts: dict, key: str, value: int) -> None:
    counts[key] = counts.get(key, 0) + value


def _merge_counts(counts: dict, key: str, reasons) -> None:
    """Reasons without their figures ("1700 tokens, more than ..."), so that equal ones count together."""
    found = Counter(re.sub(r"^\d+ tokens, ", "", reason) for reason in reasons if reason)
    counts[key] = dict(Counter(counts.get(key, {})) + found)


def _stage_data(result: dict, report: dict, label_audit: audit.LabelAudit) -> StageData:
    for split in ("train", "validation"):
        report[split]["rows"] = 0 if result[split] is None else len(result[split])
    names = tuple(dict.fromkeys([*report["train"]["datasets"], *report["validation"]["datasets"]]))
    return StageData(
        train=result["train"],
        validation=result["validation"],
        names=names,
        report=report,
        fingerprint=result["train"]._fingerprint,
        label_audit=label_audit,
    )


def first_documents(blocks: Dataset, count: int = 3) -> list[list[int]]:
    """The first documents of packed blocks, as ids."""
    documents: list[list[int]] = []
    for block in blocks.select(range(min(count, len(blocks)))):
        start = 0
        for length in block["seq_lengths"]:
            documents.append(block["input_ids"][start : start + length])
            start += length
    return documents[:count]
