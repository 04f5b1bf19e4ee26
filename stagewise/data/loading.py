"""What a stage script trains on, from its DataArguments: files -> records -> rows of token ids, with their report."""

import hashlib
import json
import logging
import re
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_all_start_methods
from typing import Any, Generic, TypeVar

import numpy as np
from datasets import Dataset

from stagewise.arguments import DataArguments
from stagewise.columns import parse_columns
from stagewise.data import audit, packing, sources
from stagewise.data.preference_audit import PreferenceAudit, audit_preferences
from stagewise.data.preferences import SAME_ANSWERS, PreferenceOptions, tokenize_preferences
from stagewise.data.prompts import PromptOptions, prompt_hashes, tokenize_prompts
from stagewise.data.records import TWO_ANSWERS, Conversation, Document, RecordOptions, check_columns
from stagewise.data.streaming import RowStream
from stagewise.data.tokenization import (
    TOO_LONG,
    EncodingOptions,
    Renderer,
    drop_unusable,
    encode_documents,
    encode_or_drop,
    remedy,
    special_tokens,
    tokenize_conversations,
    tokenize_documents,
)
from stagewise.errors import InputError
from template import Template, TemplateError, get_template, with_role_markers

logger = logging.getLogger(__name__)

# How many records of a stream are audited before the first step.
STREAM_SAMPLE_ROWS = 64


Audit = TypeVar("Audit", audit.LabelAudit, PreferenceAudit)


@dataclass
class StageData(Generic[Audit]):
    """Tokenized rows and what is to be said about them.

    names are the data sets' names; report is what data_report.json holds; fingerprint identifies the training rows;
    sample is `train`, or of a stream its first rows.
    """

    train: Dataset | RowStream
    validation: Dataset | None
    names: tuple[str, ...]
    report: dict
    fingerprint: str
    label_audit: Audit
    sample: Dataset


def resolve_template(args: DataArguments, parent: dict | None) -> Template | None:
    """--template_name, or else the one that the parent stage was trained with, with --role_markers; or None for the
    tokenizer's own.

    Raises:
        InputError: no such template, or a flag that goes with none.
    """
    name = args.template_name or (parent or {}).get("template")
    if name is None:
        if args.tool_format:
            raise InputError(
                f"--tool_format {args.tool_format}: the tokenizer's own template writes tools its own way"
            )
        if args.role_markers:
            raise InputError("--role_markers: the tokenizer's own template has its own; name one with --template_name")
        return None
    if args.template_name is None:
        logger.info("template %s, from the base model's stage.json", name)
    template = named_template(name, args.tool_format)
    return with_role_markers(template, args.role_markers) if args.role_markers else template


def named_template(name: str, tool_format: str | None) -> Template:
    """The template of --template_name. Raises InputError where there is none of this name."""
    try:
        return get_template(name, tool_format=tool_format)
    except TemplateError as error:
        raise InputError(f"--template_name {name}: {error}") from error


def add_template_tokens(template: Template | None, tokenizer) -> list[str]:
    """Add the control tokens of the template that are not one token of the tokenizer; returns those added."""
    if template is None:
        raise InputError("--add_template_tokens: needs --template_name")
    missing = [
        token
        for token in template.control_tokens(tokenizer.eos_token)
        if len(tokenizer(token, add_special_tokens=False).input_ids) != 1
    ]
    tokenizer.add_tokens(missing, special_tokens=True)
    if missing:
        logger.info("added to the vocabulary: %s", ", ".join(missing))
    return missing


def chat_template(template: Template | None, tokenizer) -> str | None:
    """What is saved as the tokenizer's chat template, so that every engine renders what training rendered."""
    return tokenizer.chat_template if template is None else template.to_jinja(marked=False)


def load_conversations(
    args: DataArguments, renderer: Renderer, tokenizer, encoding: EncodingOptions, training_args
) -> StageData[audit.LabelAudit]:
    """Tokenized conversations for SFT, audited. Raises InputError for whatever data.md calls an error."""
    options = _record_options("conversation", args, renderer.control_tokens)

    def prepare(records: Dataset, found: dict) -> tuple[Dataset, audit.LabelAudit]:
        encoded = tokenize_conversations(
            records, renderer, tokenizer, encoding, args.preprocessing_num_workers, _uses_cache(args, training_args)
        )
        checked = audit.audit_conversations(records, encoded, renderer, tokenizer, encoding, training_args.seed)
        _count_rows(found, encoded)
        too_long = TOO_LONG if encoding.on_too_long == "drop" else None
        return _usable(encoded, found, args.on_bad_row, too_long), checked

    def encode(record: dict) -> list[dict]:
        rows = []
        for row in encode_or_drop([Conversation.from_json(record["record"])], renderer, tokenizer, encoding):
            if not row.dropped:
                rows.append({"input_ids": row.input_ids, "labels": row.labels, **_origin(record)})
            elif args.on_bad_row == "skip" or (encoding.on_too_long == "drop" and TOO_LONG in row.dropped):
                logger.warning("row dropped: %s: %s", record["location"], row.dropped)
            else:
                raise InputError(
                    f"{record['location']}: {row.dropped}; {remedy(row.dropped)}, or pass --on_bad_row skip"
                )
        return rows

    if args.streaming:
        return _stream("conversation", args, options, training_args, prepare, encode)
    train, validation, report = _load_splits("conversation", args, options, training_args)
    train, checked = prepare(train, report["train"])
    if validation is not None:
        validation, _ = prepare(validation, report["validation"])
    return _stage_data(train, validation, report, checked)


def load_preferences(
    args: DataArguments, renderer: Renderer, tokenizer, encoding: PreferenceOptions, training_args
) -> StageData[PreferenceAudit]:
    """Tokenized preference pairs for RM and DPO, audited. Raises InputError for whatever data.md calls an error."""
    if args.streaming:
        raise InputError("--streaming: pairs are counted and compared before the first step; leave it out")

    def prepare(records: Dataset, found: dict) -> tuple[Dataset, PreferenceAudit]:
        encoded = tokenize_preferences(
            records, renderer, tokenizer, encoding, args.preprocessing_num_workers, _uses_cache(args, training_args)
        )
        checked = audit_preferences(records, encoded, renderer, tokenizer, training_args.seed)
        checked.equal += sum(  # dropped when they were read, where --on_bad_row allows it
            count
            for counts in found["datasets"].values()
            for reason, count in counts.get("reasons", {}).items()
            if TWO_ANSWERS in reason
        )
        _count_rows(found, encoded)
        return _usable(encoded, found, args.on_bad_row, SAME_ANSWERS), checked

    options = _record_options("preference", args, renderer.control_tokens)
    train, validation, report = _load_splits("preference", args, options, training_args)
    train, checked = prepare(train, report["train"])
    if validation is not None:
        validation, _ = prepare(validation, report["validation"])
    return _stage_data(train, validation, report, checked)


def load_prompts(
    args: DataArguments, renderer: Renderer, tokenizer, options: PromptOptions, training_args
) -> StageData[audit.LabelAudit]:
    """Tokenized prompts for PPO. Nothing in them is trained, so the label audit is empty.

    The report counts the rows of each split that repeat the prompt of an earlier row ("duplicates"), and the training
    rows whose prompt is in the validation set ("also_in_validation").

    Raises:
        InputError: whatever data.md calls an error.
    """
    if args.streaming:
        raise InputError("--streaming: prompts are shuffled and counted before the first step; leave it out")

    def prepare(records: Dataset, found: dict) -> Dataset:
        encoded = tokenize_prompts(
            records, renderer, tokenizer, options, args.preprocessing_num_workers, _uses_cache(args, training_args)
        )
        _count_rows(found, encoded)
        return _usable(encoded, found, args.on_bad_row, None)

    record_options = _record_options("prompt", args, renderer.control_tokens)
    train, validation, report = _load_splits("prompt", args, record_options, training_args)
    train = prepare(train, report["train"])
    if validation is not None:
        validation = prepare(validation, report["validation"])
    _count_repeated_prompts(report, train, validation)
    return _stage_data(train, validation, report, audit.LabelAudit())


def load_documents(
    args: DataArguments,
    tokenizer,
    block_size: int,
    pack: bool,
    training_args,
    document_separator: str = "blank_line",
    keep_linebreaks: bool = True,
) -> StageData[audit.LabelAudit]:
    """Tokenized blocks for pretraining."""
    options = _record_options("document", args, special_tokens(tokenizer))
    workers, use_cache = args.preprocessing_num_workers, _uses_cache(args, training_args)
    text_files: dict[str, Any] = {"document_separator": document_separator, "keep_linebreaks": keep_linebreaks}

    def prepare(records: Dataset, found: dict) -> tuple[Dataset, audit.LabelAudit]:
        encoded = tokenize_documents(records, tokenizer, workers, use_cache)
        _count_rows(found, encoded)
        cut = packing.pack_blocks if pack else packing.split_documents
        return cut(encoded, block_size, workers, use_cache), audit.LabelAudit()

    def encode(record: dict) -> list[dict]:
        ids = encode_documents([Document.from_json(record["record"]).text], tokenizer)[0]
        cuts = range(0, len(ids), len(ids) if pack else block_size)
        return [{"input_ids": ids[cut : cut + block_size if not pack else None], **_origin(record)} for cut in cuts]

    if args.streaming:
        return _stream(
            "document", args, options, training_args, prepare, encode, block_size if pack else None, text_files
        )
    train, validation, report = _load_splits("document", args, options, training_args, **text_files)
    train, nothing = prepare(train, report["train"])
    if validation is not None:
        validation, _ = prepare(validation, report["validation"])
    return _stage_data(train, validation, report, nothing)


def _origin(record: dict) -> dict[str, str]:
    return {name: record[name] for name in ("dataset", "location")}


def _stream(
    kind: str,
    args: DataArguments,
    options: RecordOptions,
    training_args,
    prepare,
    encode,
    block_size=None,
    text_files=None,
) -> StageData[audit.LabelAudit]:
    """Training rows as a RowStream, validation rows as always; the first records are audited beforehand."""
    _check_streaming(args, training_args)

    def open_stream():
        streams, reports = sources.stream_records(
            kind, sources.find_sources(args.train_file_dir or ""), options, **(text_files or {}),
            max_samples_per_dataset=args.max_samples_per_dataset, on_bad_row=args.on_bad_row,
        )  # fmt: skip
        return sources.mix(streams, args.mix_strategy, _probabilities(args), _seed(training_args)), reports

    records, reports = open_stream()
    report: dict[str, Any] = {
        "streaming": True,
        "train": {"datasets": {name: {} for name in reports}},
        "validation": {"datasets": {}},
    }
    head = Dataset.from_list(list(islice(open_stream()[0], STREAM_SAMPLE_ROWS)))
    sample, checked = prepare(head, {"datasets": {name: {} for name in reports}})
    validation = None
    if training_args.do_eval:
        held_out, found = _load_files(
            kind, args.validation_file_dir, args, options, training_args, **(text_files or {})
        )
        report["validation"]["datasets"] = {name: each.to_dict() for name, each in found.items()}
        limited = _limit(sources.mix(held_out), args.max_eval_samples, 2, _seed(training_args))
        validation, _ = prepare(limited, report["validation"])
    # each process reads for itself; accelerate would have the first one read, and join rows of different widths
    training_args.accelerator_config.dispatch_batches = False
    round_rows = training_args.per_device_train_batch_size * training_args.world_size
    step_rows = round_rows * training_args.gradient_accumulation_steps
    train = RowStream(records, encode, step_rows, round_rows, block_size, training_args.process_index == 0)
    names = tuple(dict.fromkeys([*reports, *report["validation"]["datasets"]]))
    return StageData(train, validation, names, report, "streaming", checked, sample)


def _check_streaming(args: DataArguments, training_args) -> None:
    """A stream has no length and no epochs, and each process takes its share of every step."""
    strategies = {name: getattr(training_args, f"{name}_strategy") for name in ("eval", "save", "logging")}
    by_epoch = next((name for name, strategy in strategies.items() if strategy == "epoch"), None)
    sharing = training_args.accelerator_config
    for needed, message in (
        (args.train_file_dir, "--streaming: reads files; pass --train_file_dir"),
        (training_args.max_steps > 0, "--streaming: a stream has no length; pass --max_steps"),
        (
            args.validation_file_dir or not training_args.do_eval,
            "--streaming: nothing can be split off a stream; pass --validation_file_dir, or --do_train True alone",
        ),
        (
            by_epoch is None,
            f"--{by_epoch}_strategy epoch: a stream has no epochs; pass steps, and --{by_epoch}_steps",
        ),
        (
            not sharing.dispatch_batches and not sharing.split_batches,
            "--accelerator_config: with --streaming each process reads for itself; leave dispatch_batches and "
            "split_batches out",
        ),
        (
            not training_args.auto_find_batch_size,
            "--auto_find_batch_size: with --streaming the rows of a step are settled at the start; leave it out",
        ),
        (
            training_args.dataloader_num_workers == 0 or get_all_start_methods()[0] == "fork",
            "--dataloader_num_workers: on this system workers cannot share a stream; leave it at 0",
        ),
        (
            training_args.dataloader_multiprocessing_context in (None, "fork"),
            "--dataloader_multiprocessing_context: workers share a stream by being forked; leave it out",
        ),
        (
            training_args.dataloader_in_order,
            "--dataloader_in_order False: with --streaming the place in the data would be lost; leave it out",
        ),
        (
            args.max_train_samples == -1,
            "--max_train_samples: with --streaming use --max_steps or --max_samples_per_dataset",
        ),
    ):
        if not needed:
            raise InputError(message)


def _record_options(kind: str, args: DataArguments, control_tokens: tuple[str, ...]) -> RecordOptions:
    columns = parse_columns(args.columns)
    check_columns(kind, columns)
    return RecordOptions(
        assistant_name=args.assistant_name,
        assistant_author=args.assistant_author,
        use_reference=args.use_reference,
        control_tokens=control_tokens,
        keep_control_tokens=args.keep_control_tokens,
        allow_mixed=args.allow_mixed,
        columns=columns,
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
    seed = _seed(training_args)
    text_files: dict[str, Any] = {"document_separator": document_separator, "keep_linebreaks": keep_linebreaks}
    train, train_reports = _load_files(kind, args.train_file_dir, args, options, training_args, **text_files)
    validation_reports: dict = {}
    if args.validation_file_dir:
        if args.validation_file_dir == args.train_file_dir:
            logger.warning("--validation_file_dir is --train_file_dir: the run evaluates on what it trains on")
        validation, validation_reports = _load_files(
            kind, args.validation_file_dir, args, options, training_args, **text_files
        )
    elif training_args.do_eval:
        for name, found in train_reports.items():
            if len(train[name]) < 2 and found.remarks:
                raise InputError(f"data set '{name}' has 1 row, too few to hold one out: {found.remarks[0]}")
        train, validation = sources.split_validation(train, args.validation_split_percentage, seed)
    else:
        validation = {}
    report: dict[str, dict[str, Any]] = {
        "train": {"datasets": {name: found.to_dict() for name, found in train_reports.items()}},
        "validation": {"datasets": {name: found.to_dict() for name, found in validation_reports.items()}},
    }
    mixed = _limit(
        sources.mix(train, args.mix_strategy, _probabilities(args), seed), args.max_train_samples, len(train), seed
    )
    held_out = _limit(sources.mix(validation), args.max_eval_samples, 2, seed) if validation else None
    report["train"]["fingerprint"] = _fingerprint(mixed)
    return mixed, held_out, report


def _fingerprint(records: Dataset) -> str:
    """Of how many rows there are and what stands in 256 of them: the same wherever the files lie, and on another day
    for a template that prints the date.
    """
    chosen = np.unique(np.linspace(0, max(0, len(records) - 1), min(256, len(records))).astype(int))
    rows = records.select(chosen)["record"]
    return hashlib.sha256(json.dumps([len(records), *rows]).encode()).hexdigest()[:16]


def _load_files(
    kind: str, spec: str | None, args: DataArguments, options: RecordOptions, training_args, **text_files
) -> tuple[dict[str, Dataset], dict]:
    """(data sets, reports) by name, of files or, with no `spec`, of --dataset_name."""
    if spec is None:
        dataset, found = sources.load_hub_dataset(
            kind, args.dataset_name or "", options, config_name=args.dataset_config_name,
            max_samples=args.max_samples_per_dataset, on_bad_row=args.on_bad_row,
            num_proc=args.preprocessing_num_workers, overwrite_cache=args.overwrite_cache,
        )  # fmt: skip
        return {found.dataset: dataset}, {found.dataset: found}
    training = spec == args.train_file_dir
    flag = "--train_file_dir" if training else "--validation_file_dir"
    return sources.load_records(
        kind, sources.find_sources(spec, flag), options, **text_files,
        max_samples_per_dataset=args.max_samples_per_dataset if training else None,
        on_bad_row=args.on_bad_row, num_proc=args.preprocessing_num_workers,
        overwrite_cache=not _uses_cache(args, training_args),
    )  # fmt: skip


def _uses_cache(args: DataArguments, training_args) -> bool:
    """--overwrite_cache is for the first process; the others read what it has written."""
    return not args.overwrite_cache or training_args.local_process_index != 0


def _seed(training_args) -> int:
    return training_args.seed if training_args.data_seed is None else training_args.data_seed


def _probabilities(args: DataArguments) -> list[float] | None:
    return list(args.mix_probabilities) if args.mix_probabilities else None


def _limit(dataset: Dataset, rows: int | None, n_datasets: int, seed: int) -> Dataset:
    """The first `rows` rows; of a mixture, as many drawn with the seed, so that every data set has its share."""
    if rows is None or rows < 0 or rows >= len(dataset):
        return dataset
    if n_datasets == 1:
        return dataset.select(range(rows))
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:rows]
    return dataset.select(np.sort(chosen))


def _usable(encoded: Dataset, found: dict, on_bad_row: str, harmless: str | None) -> Dataset:
    usable = drop_unusable(encoded, on_bad_row, harmless)
    if not len(usable):
        raise InputError(f"no usable row is left of {', '.join(found['datasets'])}")
    return usable


def _count_rows(report: dict, encoded: Dataset) -> None:
    """Add what tokenization did to each data set's part of the report."""
    counted = ("dataset", "length", "trained", "dropped", "truncated", "further", "remarks")
    columns = [name for name in counted if name in encoded.column_names]
    for batch in encoded.select_columns(columns).with_format("pandas").iter(batch_size=100_000):
        for name, rows in batch.groupby("dataset"):
            counts = report["datasets"].setdefault(name, {})
            _add(counts, "tokens", int(rows["length"].sum()))
            if "trained" in rows:
                _add(counts, "trained_tokens", int(rows["trained"].sum()))
            if "dropped" in rows:
                _merge_counts(counts, "dropped", rows["dropped"])
                _merge_counts(counts, "truncated", rows["truncated"])
            if "further" in rows:
                _add(counts, "further_rows_of_conversations", int(rows["further"].sum()))
                _merge_counts(counts, "remarks", [each for text in rows["remarks"] for each in text.split("; ")])


def _count_repeated_prompts(report: dict, train: Dataset, validation: Dataset | None) -> None:
    """Repeated prompts are legitimate, so none is removed; but who trains on the validation set is told so."""
    trained = prompt_hashes(train)
    held_out = prompt_hashes(validation) if validation is not None else trained[:0]
    shared = int(np.isin(trained, held_out).sum())
    report["train"]["duplicates"] = len(trained) - len(np.unique(trained))
    report["train"]["also_in_validation"] = shared
    report["validation"]["duplicates"] = len(held_out) - len(np.unique(held_out))
    if shared:
        logger.warning(
            "%d of the %d training prompts are also in the validation set: its scores will look better than those of "
            "new prompts",
            shared,
            len(trained),
        )


def _add(counts: dict, key: str, value: int) -> None:
    counts[key] = counts.get(key, 0) + value


def _merge_counts(counts: dict, key: str, reasons) -> None:
    """Reasons without their figures ("1700 tokens, more than ..."), so that equal ones count together."""
    found = Counter(re.sub(r"^\d+ (tokens|characters), ", "", reason) for reason in reasons if reason)
    counts[key] = dict(Counter(counts.get(key, {})) + found)


def _stage_data(train: Dataset, validation: Dataset | None, report: dict, checked: Audit) -> StageData[Audit]:
    report["train"]["rows"] = len(train)
    report["validation"]["rows"] = 0 if validation is None else len(validation)
    names = tuple(dict.fromkeys([*report["train"]["datasets"], *report["validation"]["datasets"]]))
    return StageData(train, validation, names, report, report["train"]["fingerprint"], checked, train)
