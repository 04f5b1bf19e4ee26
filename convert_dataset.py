"""Convert a data set into the family's form: ShareGPT conversations or preference rows, one JSON object per line.

    python convert_dataset.py --in_file alpaca.json --out_file alpaca_sharegpt.jsonl --data_type alpaca

The stages read every one of these formats themselves; converting is for looking at the data, for mending it, and for
putting sets of different origin into one file. Rows stream from file to file, so the size of the file does not matter.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from stagewise.columns import parse_columns
from stagewise.data.files import BadRow, DataReport, find_files, read_rows
from stagewise.data.records import (
    Conversation,
    PreferencePair,
    RecordOptions,
    RowError,
    check_columns,
    check_same_format,
    detect_format,
    rename_columns,
    unread_columns,
)
from stagewise.errors import InputError
from stagewise.run.exit_codes import ScriptParser, run_script

# the formats (stagewise.data.records.FORMATS) that each --data_type accepts
DATA_TYPES = {
    "alpaca": ("alpaca",),
    "qa": ("qa", "law"),
    "sharegpt": ("sharegpt",),
    "messages": ("messages",),
    "mft": ("mft",),
    "preference": ("preference", "preference_sharegpt", "preference_trl"),
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Convert --in_file into --out_file and count: rows_read, rows_kept, rows_bad, reasons, first_bad."""
    args = _parse_arguments(argv)
    out_file = Path(args.out_file).expanduser()
    try:
        files = find_files(args.in_file)
    except InputError as error:
        raise InputError(f"--in_file: {error}") from None
    _check_out_file(out_file, files, args.overwrite)
    columns = parse_columns(args.columns)
    report = DataReport(Path(args.in_file).name, [str(file) for file in files], columns=dict(columns))
    try:
        with _written_at_once(out_file) as out:
            for line in _converted(files, args, report):
                out.write(line + "\n")
            report.raise_if_unusable(args.on_bad_row)
            report.raise_if_absent()
    finally:
        _print_rejected(report)
    counts = report.to_dict()
    for note in report.notes():
        print(note, file=sys.stderr)
    print(f"{counts['rows_kept']} of {counts['rows_read']} rows written to {out_file}")
    return counts


def _print_rejected(report: DataReport) -> None:
    for rejected in report.first_bad:
        print(f"rejected: {rejected}", file=sys.stderr)
    if report.rows_bad > len(report.first_bad):
        print(f"rejected: {report.rows_bad - len(report.first_bad)} more rows", file=sys.stderr)


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("--in_file", required=True, help="json, jsonl, csv or parquet, also as .gz; or a directory")
    parser.add_argument("--out_file", required=True, help="a .jsonl file")
    parser.add_argument(
        "--data_type", default="alpaca", choices=[*DATA_TYPES, "auto"], help="form of the rows (default: alpaca)"
    )
    parser.add_argument(
        "--out_format",
        default="sharegpt",
        choices=["sharegpt", "messages"],
        help="sharegpt: conversations, or system/history/question/response_chosen/response_rejected for preferences; "
        "messages: OpenAI messages, or prompt/chosen/rejected (default: sharegpt)",
    )
    parser.add_argument(
        "--on_bad_row", default="error", choices=["error", "skip"], help="skip: drop and count, up to 10%%"
    )
    parser.add_argument("--allow_mixed", action="store_true", help="rows may be in different formats")
    parser.add_argument(
        "--use_reference", action="store_true", help="put a law triplet's passages before its question"
    )
    parser.add_argument(
        "--columns", help="columns under other names, key first: question=Question,answer=Response,reasoning=CoT"
    )
    parser.add_argument("--assistant_name", help="fill in <NAME> and {{name}} (otherwise they stay)")
    parser.add_argument("--assistant_author", help="fill in <AUTHOR> and {{author}} (otherwise they stay)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out_file")
    return parser.parse_args(argv)


def _check_out_file(out_file: Path, in_files: list[Path], overwrite: bool) -> None:
    if out_file.suffix.lower() not in (".jsonl", ".json"):
        raise InputError(f"--out_file: found {out_file.name!r}, expected a name that ends with .jsonl")
    if not out_file.parent.is_dir():
        raise InputError(f"--out_file: the directory {out_file.parent} does not exist")
    if not out_file.exists():
        return
    if any(out_file.samefile(file) for file in in_files):
        raise InputError(f"--out_file: {out_file} is an input file; it would be written while it is read")
    if not overwrite:
        raise InputError(f"--out_file: {out_file} exists; pass --overwrite to replace it")


@contextmanager
def _written_at_once(path: Path) -> Iterator[TextIO]:
    """A file that appears under its name complete and on the disk, or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("x", encoding="utf-8", newline="\n") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _converted(files: list[Path], args: argparse.Namespace, report: DataReport) -> Iterator[str]:
    """The lines of the output. From the first bad row on rows are only checked, unless bad ones may be skipped."""
    from tqdm import tqdm

    convert = _Converter(args, report)
    rows = (row for file in files for row in read_rows(file))
    for location, row in tqdm(rows, desc="Converting", unit=" rows", delay=2):
        report.rows_read += 1
        if isinstance(row, BadRow):
            report.add_bad(location, row.problem, row.reason, row.ends_file)
            continue
        try:
            line = json.dumps(convert(row), ensure_ascii=False)
        except RowError as error:
            report.add_bad(location, str(error), error.reason)
            continue
        if not report.rows_bad or args.on_bad_row == "skip":
            yield line
    if not report.rows_read:
        raise InputError(f"--in_file: {args.in_file} holds no rows")


class _Converter:
    """Row in, row out. With --data_type auto the first row decides between conversations and preferences."""

    def __init__(self, args: argparse.Namespace, report: DataReport):
        self._report = report
        self._accepted = DATA_TYPES.get(args.data_type)
        self._kind = None if args.data_type == "auto" else _kind_of(args.data_type)
        self._file_format: str | None = None
        self._messages = args.out_format == "messages"
        self._options = RecordOptions(
            assistant_name=args.assistant_name or None,
            assistant_author=args.assistant_author or None,
            use_reference=args.use_reference,
            allow_mixed=args.allow_mixed,
            keep_placeholders=not (args.assistant_name or args.assistant_author),
            columns=parse_columns(args.columns),
        )
        if self._kind:
            check_columns(self._kind, self._options.columns)

    def __call__(self, row: dict) -> dict:
        row, absent, unread = rename_columns(row, self._options.columns)
        row_format = self._format_of(row)
        kind = _kind_of(row_format)
        if kind == "preference":
            pair = PreferencePair.from_row(row, self._options, row_format)
            converted = _trl_row(pair) if self._messages else _family_preference_row(pair)
        else:
            conversation = Conversation.from_row(row, self._options, row_format)
            converted = _openai_row(conversation) if self._messages else _sharegpt_row(conversation)
        self._report.count_columns([*unread, *unread_columns(row, kind, row_format, self._options)], absent)
        return converted

    def _format_of(self, row: dict) -> str:
        if self._accepted and len(self._accepted) == 1:
            return self._accepted[0]
        row_format = detect_format(row, self._kind)
        if row_format == "document":
            raise RowError("keys", "a document", "a conversation or a preference")
        if self._accepted and row_format not in self._accepted:
            raise RowError("keys", f"a row of the format {row_format}", f"one of {', '.join(self._accepted)}")
        self._kind = self._kind or _kind_of(row_format)
        self._file_format = self._file_format or row_format
        check_same_format(row_format, self._file_format, self._options)
        return row_format


def _kind_of(name: str) -> str:
    return "preference" if name.startswith("preference") else "conversation"


def _openai_row(record: Conversation) -> dict:
    return _without_none({"messages": record.messages, "tools": record.tools})


def _trl_row(record: PreferencePair) -> dict:
    return _without_none(vars(record))


def _sharegpt_row(record: Conversation) -> dict:
    """A row that stagewise reads back as the same record (LLaMA-Factory's keys; tools as a JSON string)."""
    tools = None if record.tools is None else json.dumps(record.tools, ensure_ascii=False)
    return _without_none({"conversations": [_sharegpt_turn(each) for each in record.messages], "tools": tools})


def _sharegpt_turn(message: dict) -> dict:
    speakers = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    more = {key: value for key, value in message.items() if key not in ("role", "content")}
    if list(more) == ["tool_calls"] and not message["content"]:
        calls = [_bare_call(call) for call in more["tool_calls"]]
        value = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
        return {"from": "function_call", "value": value}
    return {"from": speakers[message["role"]], "value": message["content"], **more}


def _bare_call(call: dict) -> dict:
    return _without_none({"id": call.get("id"), **call["function"]})


def _family_preference_row(record: PreferencePair) -> dict:
    """MedicalGPT's columns. They hold plain text only, so a row with more than that is refused."""
    answers = [*record.chosen, *record.rejected]
    plain = all(message.keys() == {"role", "content"} for message in [*record.prompt, *answers])
    if record.tools or not plain or len(answers) != 2:
        raise RowError(
            "row", "tools, reasoning, or answers of several turns", "plain text (use --out_format messages)"
        )
    has_system = record.prompt[0]["role"] == "system"
    texts = [message["content"] for message in record.prompt[has_system:]]
    row = {
        "system": record.prompt[0]["content"] if has_system else "",
        "history": [list(pair) for pair in zip(texts[:-1:2], texts[1::2], strict=True)],
        "question": texts[-1],
        "response_chosen": record.chosen[0]["content"],
        "response_rejected": record.rejected[0]["content"],
        "margin": record.margin,
    }
    return _without_none(row)


def _without_none(row: dict) -> dict:
    return {key: value for key, value in row.items() if value is not None}


if __name__ == "__main__":
    run_script(main)
