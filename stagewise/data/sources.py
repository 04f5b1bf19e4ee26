"""From files (or the hub) to data sets of checked records; mixing and splitting; counting what was dropped and why.

Every data set here has the string columns

- ``record``: the record as JSON (``Conversation.from_json`` and its siblings read it),
- ``location``: where the row came from, "file:line" (Parquet: "file:row number"; the hub: "name[split] row N"),
- ``dataset``: the name of the data set (its task, where losses are weighted by task).

Map-style data sets are Arrow files in the cache of ``datasets`` and mapped into memory; host memory does not grow with
them. The order of rows is the order of the files, and nothing here shuffles except ``mix`` and ``split_validation``.
"""

import copy
import hashlib
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    ArrowBasedBuilder,
    BuilderConfig,
    Dataset,
    Features,
    IterableDataset,
    SplitGenerator,
    Value,
    concatenate_datasets,
    interleave_datasets,
)
from datasets.exceptions import DatasetGenerationError
from datasets.info import DatasetInfo
from datasets.iterable_dataset import _BaseExamplesIterable

from stagewise.data.files import (
    START,
    BadRow,
    DataReport,
    Note,
    Position,
    below_home,
    check_document_separator,
    data_name,
    existing_path,
    exists,
    find_files,
    iter_rows,
    printable,
    without_nulls,
)
from stagewise.data.records import (
    RECORD_TYPES,
    RecordOptions,
    RowError,
    check_same_format,
    detect_format,
    rename_columns,
    unread_columns,
)
from stagewise.errors import InputError

logger = logging.getLogger(__name__)

# Part of every cache key: raise it whenever a row of the same file would give another record than before.
_RECORDS_VERSION = 3

# In a stream the share of bad rows means something only after this many rows.
_STREAM_CHECK_ROWS = 100
_SCAN_ROWS = 10_000
# Rows held until they are written to the cache: documents may be books.
_WRITE_ROWS = 200

_RECORD_FEATURES = Features({name: Value("string") for name in ("record", "location", "dataset")})
# error: "" for a usable row, otherwise what is wrong with it (record is then ""). reason: what equal errors are
# counted under. ends_file: "yes" where the rest of the file is lost too. notes: what DataReport.add_note reads.
_CHECK_COLUMNS = ["error", "reason", "ends_file", "notes"]
_CHECKED_FEATURES = Features({name: Value("string") for name in [*_RECORD_FEATURES, *_CHECK_COLUMNS]})

_HELD_OUT = re.compile(r"(test|validation|valid|val|dev|eval)(?![a-z])")
_MIX_STRATEGIES = {"interleave_under": "first_exhausted", "interleave_over": "all_exhausted"}


@dataclass(frozen=True)
class Source:
    """A named data set and its files, in the order in which they are read."""

    name: str
    files: tuple[Path, ...]


def find_sources(spec: str, flag: str = "--train_file_dir") -> list[Source]:
    """The data sets of "a,b,c" or "[a,b,c]", each named after its directory or file; a single path may hold commas.

    flag: where ``spec`` was given, for the messages. Raises InputError for an empty path between commas, a path that
    cannot be used, and two data sets of one name.
    """
    sources = []
    origin: dict[str, Path] = {}
    for path in _split_paths(spec, flag):
        files = tuple(find_files(path))
        if flag == "--train_file_dir":
            _warn_of_held_out(path, files)
        name = data_name(path)
        if name in origin:
            raise InputError(
                f"{flag}: {origin[name]} and {path} would both be called '{name}'; rename one of them, because losses "
                "and counts are reported by this name"
            )
        sources.append(Source(name, files))
        origin[name] = path
    return sources


def _warn_of_held_out(path: Path, files: tuple[Path, ...]) -> None:
    """A folder of the hub has the files of all splits side by side."""
    if not any(file.name.lower().startswith("train") for file in files):
        return
    held_out = [file.name for file in files if _HELD_OUT.match(file.name.lower())]
    if held_out:
        logger.warning(
            "%s: %s beside the files of training: all are trained on; name the files one by one to leave some out",
            path,
            ", ".join(held_out),
        )


def source_names(spec: str) -> tuple[str, ...]:
    """What the data sets of "a,b,c" will be called, without a look into directories.

    Raises InputError for a path that does not exist.
    """
    return tuple(data_name(path) for path in source_paths(spec))


def source_paths(spec: str) -> tuple[Path, ...]:
    """The files and directories of "a,b,c". Raises InputError for a path that does not exist."""
    return tuple(existing_path(path) for path in _split_paths(spec, "--train_file_dir"))


def _split_paths(spec: str, flag: str) -> list[Path]:
    spec = spec.strip()
    if spec and exists(below_home(spec)):
        return [below_home(spec)]
    inner = spec[1:-1] if spec.startswith("[") and spec.endswith("]") else spec
    parts = [part.strip().strip("'\"") for part in inner.split(",")]
    if not all(parts):
        raise InputError(f"{flag}: found an empty path in {spec!r}, expected paths separated by commas")
    return [below_home(part) for part in parts]


# --- rows to records -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    """How the rows of one data set are read. Every field changes what comes out, so all are in the cache key."""

    kind: str
    dataset: str
    options: RecordOptions
    document_separator: str = "blank_line"
    keep_linebreaks: bool = True
    version: int = _RECORDS_VERSION

    def __post_init__(self):
        check_document_separator(self.document_separator)

    def read_file(
        self, path: Path, start: Position = START, file_format: str | None = None
    ) -> Iterator[tuple[dict[str, str], Position, str | None]]:
        """(checked row, the position after it, the format of the file) of every row from ``start`` on."""
        rows = iter_rows(path, start, document_separator=self.document_separator, keep_linebreaks=self.keep_linebreaks)
        empty = start == START
        for row in rows:
            empty = False
            checked, file_format = self.check(row.value, f"{printable(path)}:{row.line}", file_format)
            if row.note:
                place = printable(path).replace("\n", " ")
                checked["notes"] += f"{Note.REMARK}{place}: {row.note}\n"
            yield checked, row.end, file_format
        if empty:
            bad = BadRow("the file holds no rows", "a file without rows", ends_file=True)
            yield self.check(bad, printable(path), None)[0], START, None

    def check(
        self, row: dict[str, Any] | BadRow, location: str, file_format: str | None
    ) -> tuple[dict[str, str], str | None]:
        """One row of _CHECKED_FEATURES, and the format that the first readable row of the file has set."""
        checked = dict.fromkeys(_CHECKED_FEATURES, "") | {"location": location, "dataset": self.dataset}
        if isinstance(row, BadRow):
            problem = {"error": row.problem, "reason": row.reason, "ends_file": "yes" if row.ends_file else ""}
            return checked | problem, file_format
        named, absent, unread = rename_columns(row, self.options.columns)
        try:
            row_format = detect_format(named, self.kind)
            file_format = file_format or row_format
            check_same_format(row_format, file_format, self.options)
            record = RECORD_TYPES[self.kind].from_row(named, self.options, row_format)
            unread += unread_columns(named, self.kind, row_format, self.options)
        except RowError as error:
            if absent:
                found = f"{error.found}, and no column {' or '.join(absent)}, which --columns names"
                error = RowError(error.field, found, error.expected)
            return checked | {"error": str(error), "reason": error.reason}, file_format
        notes = [f"{Note.UNREAD}{name}\n" for name in unread] + [f"{Note.ABSENT}{name}\n" for name in absent]
        return checked | {"record": record.to_json(), "notes": "".join(notes)}, file_format


def _generate(files: list[Path], reader: _Reader, max_samples: int | None) -> Iterator[dict[str, str]]:
    """Every row of the files, bad ones too, up to ``max_samples`` usable ones."""
    usable = 0
    for path in files:
        for checked, _, _ in reader.read_file(path):
            yield checked
            usable += not checked["error"]
            if max_samples is not None and usable >= max_samples:
                return


@dataclass
class _CheckedRowsConfig(BuilderConfig):
    """files: a list is shared out to several processes; a tuple, whose rows are counted together, stays whole."""

    files: list[Path] | tuple[Path, ...] = ()
    reader: _Reader | None = None
    max_samples: int | None = None


class _CheckedRows(ArrowBasedBuilder):
    """The cache of checked rows, as ``Dataset.from_generator`` would build it from rows, which looks at every value
    once more and takes half as long again.
    """

    BUILDER_CONFIG_CLASS = _CheckedRowsConfig

    def _info(self) -> DatasetInfo:
        return DatasetInfo(features=_CHECKED_FEATURES)

    def _split_generators(self, dl_manager) -> list[SplitGenerator]:
        names = ("files", "reader", "max_samples")
        return [SplitGenerator("train", gen_kwargs={name: getattr(self.config, name) for name in names})]

    def _generate_tables(
        self, files: list[Path] | tuple[Path, ...], reader: _Reader, max_samples: int | None
    ) -> Iterator[tuple[tuple[int, int], pa.Table]]:
        rows = _generate(list(files), reader, max_samples)
        lots = iter(lambda: list(islice(rows, _WRITE_ROWS)), [])
        for index, lot in enumerate(lots):
            yield (0, index), pa.Table.from_pylist(lot, schema=_CHECKED_FEATURES.arrow_schema)


# --- data sets -------------------------------------------------------------------------------------------------------


def load_records(
    kind: str,
    sources: list[Source],
    options: RecordOptions,
    *,
    document_separator: str = "blank_line",
    keep_linebreaks: bool = True,
    max_samples_per_dataset: int | None = None,
    on_bad_row: str = "error",
    num_proc: int | None = None,
    cache_dir: str | None = None,
    overwrite_cache: bool = False,
) -> tuple[dict[str, Dataset], dict[str, DataReport]]:
    """Read and check every row of every source: (data sets, reports), both by name and in the order of the sources.

    kind: "document", "conversation", "preference" or "prompt".
    max_samples_per_dataset: read no further than this many usable rows of each data set; None or a negative number
        reads all. The first rows are taken, so a larger number adds to what a smaller one gave.
    on_bad_row: "error" raises InputError after the whole data set was checked; it shows the first bad row (location,
        field, what was found, what was expected) and the number of the others. "skip" drops and counts them, but stops
        where more than 10% are bad, or where the rest of a file cannot be read.
    num_proc: files of one data set are shared out to so many processes (not with max_samples_per_dataset).
    overwrite_cache: read the files again. In a distributed run pass it on the first process only.

    The cache is keyed by the files' names, sizes and modification times and by every option that changes a record; a
    file that changes is read again. It is safe against several processes that build it at the same time (datasets
    locks it and renames it into place), but they would wait for each other: let the main process go first.
    """
    _check_on_bad_row(on_bad_row)
    max_samples = _sample_limit(max_samples_per_dataset)
    loaded, reports = {}, {}
    for source in sources:
        reader = _Reader(kind, source.name, options, document_separator, keep_linebreaks)
        checked = _load_checked(source, reader, max_samples, num_proc, cache_dir, overwrite_cache)
        report = DataReport(source.name, list(map(printable, source.files)), columns=dict(options.columns))
        loaded[source.name] = _settle(checked, report, on_bad_row)
        reports[source.name] = report
    return loaded, reports


def _load_checked(
    source: Source,
    reader: _Reader,
    max_samples: int | None,
    num_proc: int | None,
    cache_dir: str | None,
    overwrite_cache: bool,
) -> Dataset:
    files: list[Path] | tuple[Path, ...] = list(source.files) if max_samples is None else source.files
    processes = min(num_proc or 1, len(files) if max_samples is None else 1)
    key = _cache_key(source, reader, max_samples)

    def build() -> Dataset:
        builder = _CheckedRows(cache_dir=cache_dir, config_id=key, files=files, reader=reader, max_samples=max_samples)
        try:
            builder.download_and_prepare(num_proc=processes if processes > 1 else None)
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, InputError):  # a file that has become unreadable since it was found
                raise error.__cause__ from None
            raise
        dataset = builder.as_dataset("train")
        dataset._fingerprint = key
        return dataset

    started = time.time()
    dataset = build()
    cached = Path(dataset.cache_files[0]["filename"])
    if overwrite_cache and cached.stat().st_mtime < started:
        del dataset
        shutil.rmtree(cached.parent)
        dataset = build()
    return dataset


def _cache_key(source: Source, reader: _Reader, max_samples: int | None) -> str:
    stats = [(str(file), str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]
    content = json.dumps([_RECORDS_VERSION, stats, asdict(reader), max_samples], sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def hub_name(name: str) -> str:
    """What a data set of the hub is called here: the last part of its name."""
    return name.rstrip("/").split("/")[-1]


def load_hub_dataset(
    kind: str,
    name: str,
    options: RecordOptions,
    *,
    config_name: str | None = None,
    split: str = "train",
    max_samples: int | None = None,
    on_bad_row: str = "error",
    num_proc: int | None = None,
    cache_dir: str | None = None,
    overwrite_cache: bool = False,
    token: str | None = None,
) -> tuple[Dataset, DataReport]:
    """A data set of the hub, or of a local folder in the hub's layout, read and checked like ``load_records``.

    The data set is called after the last part of its name. Raises InputError where it, its configuration or its split
    is not found, and for bad rows.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    _check_on_bad_row(on_bad_row)
    try:
        raw = load_dataset(name, config_name, split=split, cache_dir=cache_dir, token=token)
    except (DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        config = f", --dataset_config_name {config_name}" if config_name else ""
        raise InputError(f"--dataset_name {name}{config}, split {split}: {error}") from None
    limit = _sample_limit(max_samples)
    if limit is not None:
        raw = raw.select(range(min(limit, len(raw))))
    if not len(raw):
        raise InputError(f"--dataset_name {name}, split {split}: the data set holds no rows")
    reader = _Reader(kind, hub_name(name), options)
    checked = raw.map(
        partial(_check_hub_row, reader=reader, origin=f"{name}[{split}]", file_format=_format_of(raw[0], reader)),
        with_indices=True,
        features=_CHECKED_FEATURES,
        remove_columns=raw.column_names,
        num_proc=num_proc,
        load_from_cache_file=not overwrite_cache,
        desc=f"Checking {reader.dataset}",
    )
    report = DataReport(reader.dataset, [f"{name}[{split}]"], columns=dict(options.columns))
    return _settle(checked, report, on_bad_row), report


def _check_hub_row(row: dict, index: int, reader: _Reader, origin: str, file_format: str | None) -> dict[str, str]:
    return reader.check(without_nulls(dict(row)), f"{origin} row {index + 1}", file_format)[0]


def _format_of(row: dict, reader: _Reader) -> str | None:
    try:
        return detect_format(rename_columns(row, reader.options.columns)[0], reader.kind)
    except RowError:
        return None


def _check_on_bad_row(on_bad_row: str) -> None:
    if on_bad_row not in ("error", "skip"):
        raise InputError(f"--on_bad_row: found {on_bad_row!r}, expected error or skip")


def _sample_limit(max_samples: int | None) -> int | None:
    if max_samples == 0:
        raise InputError("--max_samples_per_dataset: found 0, expected a positive number, or -1 for all rows")
    return None if max_samples is None or max_samples < 0 else max_samples


def _settle(checked: Dataset, report: DataReport, on_bad_row: str) -> Dataset:
    """Fill in the report, stop where the bad rows demand it, and leave the usable rows."""
    _count(checked, report)
    report.raise_if_unusable(on_bad_row)
    report.raise_if_absent()
    for note in report.notes():
        logger.warning("data set '%s': %s", report.dataset, note)
    if not report.rows_bad:
        return checked.remove_columns(_CHECK_COLUMNS)
    usable = checked.filter(_is_usable, input_columns=["error"], desc=f"Dropping bad rows of {report.dataset}")
    return usable.remove_columns(_CHECK_COLUMNS)


def _is_usable(error: str) -> bool:
    return not error


def _count(checked: Dataset, report: DataReport) -> None:
    columns = checked.select_columns(["location", *_CHECK_COLUMNS]).with_format("arrow")
    for batch in columns.iter(batch_size=_SCAN_ROWS):
        report.rows_read += batch.num_rows
        errors = np.flatnonzero(batch["error"].to_numpy() != "")
        for bad in batch.take(errors).to_pylist():
            report.add_bad(bad["location"], bad["error"], bad["reason"], bool(bad["ends_file"]))
        for counted in pc.value_counts(batch["notes"]).to_pylist():
            report.add_notes(counted["values"], counted["counts"])


# --- streams ---------------------------------------------------------------------------------------------------------


def stream_records(
    kind: str,
    sources: list[Source],
    options: RecordOptions,
    *,
    document_separator: str = "blank_line",
    keep_linebreaks: bool = True,
    max_samples_per_dataset: int | None = None,
    on_bad_row: str = "error",
) -> tuple[dict[str, IterableDataset], dict[str, DataReport]]:
    """Read and check rows while they are used, without a copy on disk: (streams, reports), both by name.

    A bad row raises InputError with its location when its turn comes, because nobody has looked at the whole file
    before. With on_bad_row "skip" it is dropped, logged and counted, and the stream stops once more than 10% are bad
    (looked at from the 100th row on, and at the end), or where the rest of a file cannot be read.

    ``state_dict()`` holds the file, and the byte and line at which the next row begins, so ``load_state_dict()`` goes
    on at exactly that row. What was passed is not read again: earlier files are not opened, and within the file
    reading begins at that byte. The exceptions: a .gz is decompressed up to there (not parsed), a .csv has its header
    read, a Parquet file the row group that holds the row. A state fits the same files in the same order only.

    The files are the shards for DataLoader workers and ranks, and ``set_epoch`` shuffles their order, as in datasets;
    with max_samples_per_dataset, which counts from the first row on, there is one shard and one order.
    The reports count what the calling process has read so far, over all epochs; other processes count for themselves.
    """
    _check_on_bad_row(on_bad_row)
    max_samples = _sample_limit(max_samples_per_dataset)
    streams, reports = {}, {}
    for source in sources:
        reader = _Reader(kind, source.name, options, document_separator, keep_linebreaks)
        report = DataReport(source.name, list(map(printable, source.files)), columns=dict(options.columns))
        stream = _RecordStream(source.files, reader, report, on_bad_row, max_samples)
        streams[source.name] = IterableDataset(stream, DatasetInfo(features=_RECORD_FEATURES))
        reports[source.name] = report
    return streams, reports


_BEGINNING: dict[str, Any] = {"file": 0, "offset": START.offset, "line": START.line, "format": None, "usable": 0}


class _RecordStream(_BaseExamplesIterable):
    """The source of a stream. ``IterableDataset.from_generator`` would find its place by generating what it passed;
    the class that datasets derives its own sources from is the only way to keep a byte offset in the state.
    """

    _sleep_on_threads_shutdown = False

    def __init__(
        self,
        files: tuple[Path, ...],
        reader: _Reader,
        report: DataReport,
        on_bad_row: str,
        max_samples: int | None,
    ):
        super().__init__()
        self.files = files
        self.reader = reader
        self.report = report
        self.on_bad_row = on_bad_row
        self.max_samples = max_samples

    def __deepcopy__(self, memo: dict) -> "_RecordStream":
        # interleaving copies its sources deeply; their rows still belong into the one report of the caller
        clone = self._with_files(self.files)
        clone._state_dict = copy.deepcopy(self._state_dict, memo)
        return clone

    def _with_files(self, files: tuple[Path, ...]) -> "_RecordStream":
        return _RecordStream(files, self.reader, self.report, self.on_bad_row, self.max_samples)

    def _init_state_dict(self) -> dict:
        self._state_dict = {"type": type(self).__name__, **_BEGINNING}
        return self._state_dict

    def __iter__(self) -> Iterator[tuple[str, dict[str, str]]]:
        state = self._state_dict or dict(_BEGINNING)
        while state["file"] < len(self.files) and state["usable"] != self.max_samples:
            start = Position(state["offset"], state["line"])
            path = self.files[state["file"]]
            for checked, end, file_format in self.reader.read_file(path, start, state["format"]):
                state.update(offset=end.offset, line=end.line, format=file_format)
                if self._accept(checked):
                    state["usable"] += 1
                    yield checked["location"], {name: checked[name] for name in _RECORD_FEATURES}
                    if state["usable"] == self.max_samples:
                        return
            state.update(_BEGINNING, file=state["file"] + 1, usable=state["usable"])
        self.report.raise_if_unusable(self.on_bad_row)
        self.report.raise_if_absent()

    def _accept(self, checked: dict[str, str]) -> bool:
        report = self.report
        report.rows_read += 1
        if report.rows_read == _STREAM_CHECK_ROWS:
            report.raise_if_absent()
        for note in report.add_notes(checked["notes"]):
            logger.warning("data set '%s': %s", report.dataset, note)
        if not checked["error"]:
            return True
        report.add_bad(checked["location"], checked["error"], checked["reason"], bool(checked["ends_file"]))
        if self.on_bad_row == "error" or checked["ends_file"] or report.rows_read >= _STREAM_CHECK_ROWS:
            report.raise_if_unusable(self.on_bad_row, all_read=False)
        logger.warning("bad row dropped: %s: %s", checked["location"], checked["error"])
        return False

    def shuffle_data_sources(self, generator: np.random.Generator) -> "_RecordStream":
        if self.max_samples is not None:
            return self
        order = copy.deepcopy(generator).permutation(len(self.files))
        return self._with_files(tuple(self.files[index] for index in order))

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> "_RecordStream":
        mine = self.split_shard_indices_by_worker(num_shards, index, contiguous=contiguous)
        if self.max_samples is not None:
            return self._with_files(self.files if mine else ())
        return self._with_files(tuple(self.files[each] for each in mine))

    def reshard_data_sources(self) -> "_RecordStream":
        return self

    @property
    def num_shards(self) -> int:
        return len(self.files) if self.max_samples is None else 1


# --- mixing and splitting --------------------------------------------------------------------------------------------

AnyDataset: TypeAlias = Dataset | IterableDataset


def mix(
    datasets: dict[str, AnyDataset], strategy: str = "concat", probs: list[float] | None = None, seed: int = 42
) -> AnyDataset:
    """One data set out of several, all map-style or all streams.

    concat: one after the other, every row once.
    interleave_under, interleave_over: rows in turns, or, with ``probs`` (one per data set, in their order), from a
    data set drawn anew for each row with numpy's generator of ``seed``. Within a data set rows keep their order.
    "under" stops when the first data set has run out, so rows of the others are left over; "over" goes on until every
    data set has been through, so the shorter ones are repeated from their start.

    Raises InputError for an unknown strategy, probs with concat, and probs that are not one positive number per data
    set with the sum 1.
    """
    if strategy != "concat" and strategy not in _MIX_STRATEGIES:
        known = ", ".join(["concat", *_MIX_STRATEGIES])
        raise InputError(f"--mix_strategy: found {strategy!r}, expected one of {known}")
    if probs is not None:
        _check_probs(probs, list(datasets), strategy)
    parts = list(datasets.values())
    if len(parts) == 1:
        return parts[0]
    if strategy == "concat":
        return concatenate_datasets(parts)
    return interleave_datasets(parts, probabilities=probs, seed=seed, stopping_strategy=_MIX_STRATEGIES[strategy])


def _check_probs(probs: list[float], names: list[str], strategy: str) -> None:
    if strategy == "concat":
        raise InputError("--mix_probs has no meaning with --mix_strategy concat: pass interleave_under or _over")
    if len(probs) != len(names):
        raise InputError(f"--mix_probs: found {len(probs)} numbers for {len(names)} data sets ({', '.join(names)})")
    if not all(prob > 0 for prob in probs):
        raise InputError(f"--mix_probs: found {probs}, expected positive numbers")
    if not math.isclose(sum(probs), 1.0, abs_tol=1e-6):
        raise InputError(f"--mix_probs: found {probs} with the sum {sum(probs):g}, expected the sum 1")


def split_validation(
    datasets: dict[str, Dataset], percentage: float, seed: int = 42
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """Hold rows of every data set out for validation: (training, validation), both by name.

    percentage: of the rows of each data set, rounded, and at least one row of it is held out and one is left; a value
    below 1 is a fraction (0.05 is 5%). Which rows they are depends on ``seed`` and the number of rows alone; both
    parts keep the order of the rows. Raises InputError for a percentage outside (0, 100) and for a data set of fewer
    than two rows.
    """
    if not 0 < percentage < 100:
        raise InputError(f"--validation_split_percentage: found {percentage:g}, expected a number between 0 and 100")
    share = percentage if percentage < 1 else percentage / 100
    training, validation = {}, {}
    for name, dataset in datasets.items():
        rows = len(dataset)
        if rows < 2:
            raise InputError(
                f"data set '{name}' has {rows} row; a validation split needs at least 2: add rows, or pass "
                "--validation_file_dir, or --do_train True alone"
            )
        held_out = np.zeros(rows, dtype=bool)
        count = min(max(1, round(rows * share)), rows - 1)
        held_out[np.random.default_rng(seed).permutation(rows)[:count]] = True
        training[name] = dataset.select(np.flatnonzero(~held_out))
        validation[name] = dataset.select(np.flatnonzero(held_out))
    return training, validation
