"""Find data files, read their rows as streams, and count the rows that cannot be used.

Every reader holds one row (or one batch of a Parquet file) in memory, whatever the size of the file, and says after
each row at which ``Position`` the next one begins, so that reading can go on from there without what lies before it.

A row that cannot be read comes out as a ``BadRow`` in its place; reading goes on with the next row wherever the format
tells where that begins.
"""

import codecs
import csv
import gzip
import json
import logging
import os
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from shutil import copyfileobj
from typing import IO, Any, NamedTuple

from stagewise.errors import InputError

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
DOCUMENT_SEPARATORS = ("blank_line", "line", "file")

MAX_BAD_SHARE = 0.1
_LOCATIONS_KEPT = 10

# How files begin that their names do not tell; and those that are not read, with what makes a file of them that is.
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_UNREADABLE = {
    b"PK\x03\x04": ("a zip archive", "unpack it with unzip"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unpack it with zstd -d"),
    b"\xfd7zXZ\x00": ("compressed with xz", "unpack it with xz -d"),
    b"BZh": ("compressed with bzip2", "unpack it with bzip2 -d"),
    b"ARROW1": (
        "an Arrow file",
        "write it as Parquet: pyarrow.parquet.write_table(pyarrow.feather.read_table(FILE), OUT)",
    ),
    b"SQLite format 3\x00": ("an SQLite data base", "export its rows as CSV"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it with 7z x"),
    b"version https://git-lfs": ("a pointer of Git LFS", "fetch what it stands for: git lfs pull"),
}
# Files that describe a data set and hold no rows of it: the hub's, datasets', LLaMA-Factory's.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
# So many lines without a blank one are hardly one document.
_MANY_LINES = 20

_BOM = codecs.BOM_UTF8
_UTF16_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_CHUNK_BYTES = 1 << 16
# A CSV cell may be a whole document, but an unclosed quote must not swallow a file of any size.
_MAX_CSV_FIELD_CHARS = 1 << 24
_PARQUET_BATCH_ROWS = 256
# An error this close to the end of what was read so far may only mean that the rest has not been read yet: longer than
# any literal, number sign or escape sequence that can be cut in two.
_CUT_MARGIN_CHARS = 16


class Position(NamedTuple):
    """Where a row begins: offset in bytes of the uncompressed file (Parquet: in rows), and the number of its line."""

    offset: int = 0
    line: int = 1


START = Position()


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read. ``reason`` is ``problem`` without what varies from row to row.

    ends_file: the rest of the file could not be read either, so it is not a matter of this row alone.
    """

    problem: str
    reason: str
    ends_file: bool = False


class Row(NamedTuple):
    """A row, the line on which it begins (Parquet: its number), the position after it, and a remark on its file."""

    line: int
    value: dict[str, Any] | BadRow
    end: Position
    note: str = ""


class Note:
    """How the lines of a usable row's notes begin: the name of a column that is not read, or of one that --columns
    names and the row has not, or a remark on its file.
    """

    UNREAD, ABSENT, REMARK = "unread ", "absent ", "remark "


@dataclass
class DataReport:
    """What became of the rows of one data set.

    reasons: why rows are bad, and how many for each reason. columns: --columns, as key and column of the file.
    columns_not_read: keys that hold something that no format reads, and in how many rows. remarks: on its files.
    """

    dataset: str
    files: list[str]
    rows_read: int = 0
    rows_bad: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    first_bad: list[str] = field(default_factory=list)
    unreadable: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    columns_not_read: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    absent: dict[str, int] = field(default_factory=dict)

    def count_columns(self, unread: list[str], absent: list[str]) -> None:
        """Count the columns of one row that are not read, and those of --columns that it has not."""
        for counts, names in ((self.columns_not_read, unread), (self.absent, absent)):
            for name in names:
                counts[name] = counts.get(name, 0) + 1

    def add_notes(self, notes: str, rows: int = 1) -> list[str]:
        """Count the notes that so many rows have; returns those that are new, in words."""
        new = []
        for line in filter(None, notes.split("\n")):
            kind, text = line[: len(Note.UNREAD)], line[len(Note.UNREAD) :]
            if kind == Note.REMARK:
                self.remarks.append(text)
                new.append(text)
                continue
            counts = self.columns_not_read if kind == Note.UNREAD else self.absent
            if kind == Note.UNREAD and text not in counts:
                new.append(f"column not read: {text}")
            counts[text] = counts.get(text, 0) + rows
        return new

    def notes(self) -> list[str]:
        """All of them in words."""
        unread = ", ".join(
            f"{name} ({count:,} {'row' if count == 1 else 'rows'})" for name, count in self.columns_not_read.items()
        )
        more = f" (and {len(self.remarks) - 1} more files of this kind)" if len(self.remarks) > 1 else ""
        remarks = [self.remarks[0] + more] if self.remarks else []
        return ([f"columns not read: {unread}"] if unread else []) + remarks

    def raise_if_absent(self) -> None:
        """Raise InputError for a column of --columns that no row has had so far."""
        for column, rows in self.absent.items():
            if rows >= self.rows_read - self.rows_bad:
                key = next(key for key, name in self.columns.items() if name == column)
                raise InputError(
                    f"--columns {key}={column}: none of the {rows} rows of {self.files[0]} has a column {column!r}; "
                    "name one that is there"
                )

    def add_bad(self, location: str, problem: str, reason: str, ends_file: bool = False) -> None:
        """Count a bad row (it is in ``rows_read`` too); ends_file: the rest of its file could not be read."""
        self.rows_bad += 1
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if len(self.first_bad) < _LOCATIONS_KEPT:
            self.first_bad.append(f"{location}: {problem}")
        if ends_file and self.unreadable is None:
            self.unreadable = f"{location}: {problem}"

    def raise_if_unusable(self, on_bad_row: str, all_read: bool = True) -> None:
        """Raise InputError for any bad row ("error"); for a share above 10% or a file that breaks off ("skip").

        all_read: there are no rows to come, so that the share is known.
        """
        if not self.rows_bad:
            return
        if on_bad_row == "error":
            raise InputError(self._first_bad_message(all_read))
        if self.unreadable:
            raise InputError(
                f"{self.unreadable}. Bad rows can be skipped, but here nobody knows how many are lost: mend the file"
            )
        if self.rows_bad > MAX_BAD_SHARE * self.rows_read:
            raise InputError(self._too_many_message())

    def _first_bad_message(self, all_read: bool) -> str:
        more = self.rows_bad - 1
        others = f"{more} more bad {'row' if more == 1 else 'rows'}" if more else "no other row is bad"
        among = "the only row" if self.rows_read == 1 else f"{others} among the {self.rows_read} rows"
        # neither what ends a file nor too many rows can be skipped
        no_skip = self.unreadable or (all_read and self.rows_bad > MAX_BAD_SHARE * self.rows_read)
        skip = "" if no_skip else ", or pass --on_bad_row skip to drop bad rows and count them"
        return f"{self.first_bad[0]}; {among} read of data set '{self.dataset}'. Mend the file{skip}"

    def _too_many_message(self) -> str:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in Counter(self.reasons).most_common(5))
        return (
            f"data set '{self.dataset}': {self.rows_bad} of {self.rows_read} rows are bad, and more than "
            f"{MAX_BAD_SHARE:.0%} are not skipped. Why: {reasons}. First: {self.first_bad[0]}. Mend the file"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as it goes into data_report.json, with ``rows_kept``, without notes where there are none."""
        counts = asdict(self) | {"rows_kept": self.rows_read - self.rows_bad}
        for name in ("unreadable", "absent"):
            del counts[name]
        for name in ("columns", "columns_not_read", "remarks"):
            if not counts[name]:
                del counts[name]
        return counts


def find_files(path: str | Path) -> list[Path]:
    """The data files of a file or directory (searched recursively, hidden names skipped), in sorted order.

    Known are .jsonl, .json, .csv, .parquet, .txt, and each of them with .gz. Files of another type are an error when
    named and are left out with a warning when found in a directory, as the files are that only describe a data set.
    Links are followed. Raises InputError for a path that does not exist, a directory without any usable file, one that
    datasets.save_to_disk has written, a file that is empty or must not be read, a pipe or device, a link that leads
    nowhere, and one to a directory that it lies in.
    """
    path = existing_path(path)
    if not path.is_dir():
        _check_plain(path)
        _suffix(path)
        files = [path]
    else:
        files = _files_below(path)
    for file in files:
        if not exists(file):
            raise InputError(f"{file}: a link to {os.readlink(file)}, which is not there; mend or remove it")
        _check_plain(file)
        if file.stat().st_size == 0:
            raise InputError(f"{file}: the file is empty; write rows into it, or remove it")
        if not os.access(file, os.R_OK):
            raise InputError(f"{file}: no permission to read the file; give it with chmod")
    return files


def existing_path(path: str | Path) -> Path:
    """The path with its ~ resolved; raises InputError where nothing is there."""
    found = below_home(path)
    if not exists(found):
        raise InputError(f"{found}: no such file or directory; check the path")
    return found


def below_home(path: str | Path) -> Path:
    """The path with its ~ resolved; as it is where nobody knows whose home that would be (Path.expanduser raises)."""
    return Path(os.path.expanduser(path))


def exists(path: Path) -> bool:
    """Whether something is there; False for a name that is too long (Path.exists raises)."""
    return os.path.exists(path)


def _check_plain(file: Path) -> None:
    """A pipe can be read once, and rows are read for the check, for the cache, and after a restart."""
    if not file.is_file():
        raise InputError(f"{file}: a pipe or device, which can be read only once; write its rows into a file first")


def _files_below(directory: Path) -> list[Path]:
    found: list[Path] = []
    for folder, _, names in _walk_visible(directory):
        _check_not_saved(Path(folder), names)
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    found.sort()
    if not found:
        raise InputError(f"{directory}: the directory is empty; put files into it of the types {_known_types()}")
    usable = [file for file in found if _known_suffix(file) and file.name not in _DESCRIPTIONS]
    if not usable:
        raise InputError(f"{directory}: no usable file among {_listed(found)}; give one of {_known_types()}")
    others = [file for file in found if not _known_suffix(file)]
    if others:
        logger.warning("%s: not read, because their type is not known: %s", directory, _listed(others))
    described = [file for file in found if file.name in _DESCRIPTIONS]
    if described:
        logger.warning("%s: not read, because they describe data and hold no rows: %s", directory, _listed(described))
    return usable


def _check_not_saved(folder: Path, names: list[str]) -> None:
    """What datasets' save_to_disk writes is for load_from_disk alone."""
    splits = "dataset_dict.json" in names
    if splits or {"dataset_info.json", "state.json"} <= set(names):
        which = '["train"]' if splits else ""
        raise InputError(
            f"{folder}: a data set that datasets.save_to_disk has written; write it as a file that can be read: "
            f'python -c \'import datasets; datasets.load_from_disk("{folder}"){which}.to_json("train.jsonl")\''
        )


def _walk_visible(directory: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    for folder, folders, names in os.walk(directory, onerror=_refuse_folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            _check_no_circle(Path(folder, name).absolute())
        yield folder, folders, names


def _refuse_folder(error: OSError) -> None:
    raise InputError(f"{error.filename}: the directory cannot be read ({error.strerror}); mend or remove it")


def _check_no_circle(folder: Path) -> None:
    if folder.is_symlink() and any(folder.samefile(above) for above in folder.parents):
        raise InputError(f"{folder}: a link to a directory that it lies in; remove it")


def _listed(files: list[Path]) -> str:
    names = ", ".join(file.name for file in files[:5])
    return names if len(files) <= 5 else f"{names} and {len(files) - 5} more"


def _known_types() -> str:
    return f"{', '.join(SUFFIXES)} and .gz of these"


def _known_suffix(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _suffix(path: Path) -> str:
    suffix = _known_suffix(path)
    if suffix is None:
        raise InputError(f"{path}: the file type is not known; give one of {_known_types()}")
    return suffix


def printable(path: Path) -> str:
    """The path as text; the bytes of a name that is not UTF-8 are written out, since no data set could store them."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def data_name(path: Path) -> str:
    """What a data set is called: the name of its directory, or of its file without the type."""
    name = printable(Path(path.resolve().name))
    if path.is_dir():
        return name
    if name.lower().endswith(".gz"):
        name = name[: -len(".gz")]
    return name[: -len(_suffix(path))]


def read_rows(
    path: str | Path, *, document_separator: str = "blank_line", keep_linebreaks: bool = True
) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """The rows of a file, each with its location "path:line" (Parquet: "path:row number")."""
    rows = iter_rows(path, document_separator=document_separator, keep_linebreaks=keep_linebreaks)
    return ((f"{path}:{row.line}", row.value) for row in rows)


def iter_rows(
    path: str | Path,
    start: Position = START,
    *,
    document_separator: str = "blank_line",
    keep_linebreaks: bool = True,
) -> Iterator[Row]:
    """The rows of a file from ``start`` on, which is the ``end`` of an earlier row of the same file.

    What lies before ``start`` is not read again (a .gz is decompressed up to there, of a .csv the header is read, of a
    Parquet file the row group that holds ``start``).

    .jsonl and .json: one object per line, one array of objects, or objects over several lines one after another; the
    first characters tell. .csv: with a header, comma separated. .txt: one document per row, as ``{"text": ...}``;
    document_separator "blank_line" splits at blank lines, "line" makes every line a document, "file" the whole file.
    keep_linebreaks False joins the lines of a document with blanks, for text that was wrapped to a width. What is
    compressed with gzip, and what is Parquet, is read as such under any name.

    Raises InputError for a file that cannot be opened, whose type is not known, or whose contents are not what its
    name says.
    """
    check_document_separator(document_separator)
    path = Path(path)
    read_text = partial(_read_text, separator=document_separator, keep_linebreaks=keep_linebreaks)
    read_json = partial(_read_json, arrays="all")
    readers = {".jsonl": _read_json, ".json": read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    return _guarded(path, readers.get(_suffix(path), read_text), start)


def check_document_separator(separator: str) -> None:
    """Raise InputError for what is none of DOCUMENT_SEPARATORS."""
    if separator not in DOCUMENT_SEPARATORS:
        known = ", ".join(DOCUMENT_SEPARATORS)
        raise InputError(f"--document_separator: found {separator!r}, expected one of {known}")


def _guarded(path: Path, reader, start: Position) -> Iterator[Row]:
    end = start
    with _opened(path) as stream:
        try:
            for row in _settled(path, stream, reader)(stream, start):
                end = row.end
                yield row
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            yield Row(end.line, BadRow(f"damaged gzip file ({error})", "damaged gzip file", ends_file=True), end)
        except OSError as error:
            raise _cannot_be_read(path, error) from None


def _settled(path: Path, stream: BufferedIOBase, reader):
    """The reader of the file's name, or of what its first bytes say; refuses what neither can read."""
    head = stream.read(_CHUNK_BYTES)
    stream.seek(0)
    if head.startswith(_PARQUET):
        return _read_parquet
    for magic, (what, remedy) in _UNREADABLE.items():
        if head.startswith(magic):
            raise InputError(f"{path}: {what}, whatever its name says; {remedy}")
    if _suffix(path) in (".csv", ".txt"):
        form = _json_form(stream, "whole")
        stream.seek(0)
        if form:
            raise InputError(
                f"{path}: {form}, which is not read from a {_suffix(path)} file; rename it to .jsonl (to train on the "
                'JSON itself as text, write it as {"text": ...})'
            )
    return reader


def _cannot_be_read(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: the file cannot be read ({error.strerror}); check it and its disk")


@contextmanager
def _opened(path: Path) -> Iterator[BufferedIOBase]:
    """The bytes of a file, decompressed where it begins as a gzip file does; browsers unpack one and keep its name."""
    try:
        stream = path.open("rb")
    except OSError as error:
        raise _cannot_be_read(path, error) from None
    with stream:
        if not stream.peek(len(_GZIP)).startswith(_GZIP):
            yield stream
        else:
            with gzip.GzipFile(fileobj=stream) as unpacked:
                yield unpacked


class _Lines:
    """The lines of a stream with their line ends; ``position`` is where the next one begins."""

    def __init__(self, stream: BufferedIOBase, start: Position):
        stream.seek(start.offset)
        self._stream = stream
        self.position = start

    def __iter__(self) -> Iterator[bytes]:
        for line in self._stream:
            at_start = self.position.offset == 0
            self.position = Position(self.position.offset + len(line), self.position.line + 1)
            yield line.removeprefix(_BOM) if at_start else line


# --- JSON ------------------------------------------------------------------------------------------------------------


def _read_jsonl(stream: BufferedIOBase, start: Position) -> Iterator[Row]:
    lines = _Lines(stream, start)
    for line in lines:
        if line.strip():
            yield Row(lines.position.line - 1, _json_object(line.rstrip(b"\r\n")), lines.position)


def _json_object(line: bytes) -> dict[str, Any] | BadRow:
    if line.startswith(_BOM):
        return BadRow("invalid JSON: a byte order mark, as of files that were joined", "invalid JSON")
    try:
        value = _JSON.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _bad_utf8(line, error)
    except json.JSONDecodeError as error:
        return BadRow(f"invalid JSON: {_json_problem(error)} at column {error.colno}", "invalid JSON")
    except (ValueError, RecursionError) as error:
        return BadRow(f"invalid JSON: {_json_problem(error)}", "invalid JSON")
    return _object(value)


class _RepeatedKey(ValueError):
    """One of the two values would be lost."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise _RepeatedKey(f"the key {repeated!r:.60} is there twice in one object")
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_without_repeats)


def _json_problem(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "lists or objects nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return error.msg.removesuffix(" at")
    return str(error) if isinstance(error, _RepeatedKey) else "a number with too many digits"


def _object(value: Any) -> dict[str, Any] | BadRow:
    if isinstance(value, dict):
        return value
    names = {str: "a string", list: "an array", bool: "a boolean", type(None): "null"}
    return BadRow(f"found {names.get(type(value), 'a number')}, expected an object", "JSON that is not an object")


def _bad_utf8(line: bytes, error: UnicodeDecodeError) -> BadRow:
    column = len(line[: error.start].decode("utf-8")) + 1
    hint = " (if this is UTF-16, save it as UTF-8)" if line.startswith(_UTF16_BOMS) else ""
    return BadRow(f"invalid UTF-8: byte 0x{line[error.start]:02x} at column {column}{hint}", "invalid UTF-8")


def _bad_nul(place: str) -> BadRow:
    """UTF-16 without a mark would otherwise pass for UTF-8 text with a NUL behind every letter."""
    return BadRow(f"a NUL byte {place} (if this is UTF-16, save it as UTF-8)", "a NUL byte")


def _read_json(stream: BufferedIOBase, start: Position, arrays: str = "of objects") -> Iterator[Row]:
    form = _json_form(stream, arrays)
    read = {_ARRAY: _read_json_array, _OBJECTS: _read_json_objects}.get(form, _read_jsonl)
    return read(stream, start)


_LINES, _ARRAY, _OBJECTS = "it holds JSON lines", "it holds a JSON array", "it holds JSON objects of several lines"


def _first_char(stream: BufferedIOBase) -> bytes:
    head = stream.read(_CHUNK_BYTES).removeprefix(_BOM).lstrip()
    while not head:
        chunk = stream.read(_CHUNK_BYTES)
        if not chunk:
            return b""
        head = chunk.lstrip()
    return head[:1]


def _json_form(stream: BufferedIOBase, arrays: str) -> str:
    """How a file that begins like JSON holds its objects, or "" for any other file.

    arrays: which count as such, "all" that begin like one, those "of objects" if they begin like that, or those with a
    "whole" object at their beginning. Others, and objects of which the first is broken, are left to the reader of
    lines, which says of each what is wrong with it.
    """
    first = _first_char(stream)
    if first not in (b"[", b"{"):
        return ""
    if first == b"[" and arrays == "all":
        return _ARRAY
    text = _JsonText(stream, START)
    try:
        if first == b"[":
            text.expect("[")
            found = text.peek()
            if arrays == "whole" and found == "{":
                text.element()
            return _ARRAY if found == "{" or (found == "]" and arrays != "whole") else ""
        begun = text.position.line
        if isinstance(text.element().value, BadRow):
            return ""
        ended = text.position.line
        if text.peek() not in ("{", ""):
            return ""
        shares_line = text.position.line == ended and text.peek()
        return _LINES if begun == ended and not shares_line else _OBJECTS
    except _BrokenJson:
        return ""


def _read_json_objects(stream: BufferedIOBase, start: Position) -> Iterator[Row]:
    text = _JsonText(stream, start)
    try:
        while text.peek():
            yield text.element()
    except _BrokenJson as error:
        yield _broken_json(text, error, "file")


def _read_json_array(stream: BufferedIOBase, start: Position) -> Iterator[Row]:
    text = _JsonText(stream, start)
    try:
        if start == START:
            text.expect("[")
            if text.peek() != "]":
                yield text.element()
        while text.peek() == ",":
            text.expect(",")
            yield text.element()
        text.expect("]")
        if text.peek():
            raise _BrokenJson("text after the end of the array")
    except _BrokenJson as error:
        yield _broken_json(text, error, "array")


def _broken_json(text: "_JsonText", error: "_BrokenJson", whole: str) -> Row:
    problem = f"invalid JSON: {error} at column {text.column}; the rest of the {whole} cannot be read"
    return Row(text.position.line, BadRow(problem, "invalid JSON", ends_file=True), text.position)


class _BrokenJson(Exception):
    """An array that cannot be read any further."""


class _JsonText:
    """A window on JSON values that slides from one to the next.

    ``position`` and ``column`` say where the window's cursor is. The window grows, doubling, until it holds the whole
    of the next element, so that decoding it again after each growth costs no more than twice the decoding itself.
    """

    _NO_WHITESPACE = re.compile(r"[^ \t\r\n]")
    _decode = _JSON.raw_decode

    def __init__(self, stream: BufferedIOBase, start: Position):
        stream.seek(start.offset)
        self._stream = stream
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._cursor = 0
        self._at_end = False
        self.position = start
        self.column = 1
        if start.offset == 0 and stream.read(len(_BOM)) == _BOM:
            self.position = Position(len(_BOM), 1)
        else:
            stream.seek(start.offset)

    def peek(self) -> str:
        """The next character that is not white space, or "" at the end of the file."""
        while True:
            found = self._NO_WHITESPACE.search(self._text, self._cursor)
            self._advance(found.start() if found else len(self._text))
            if found:
                return found.group()
            if not self._fill():
                return ""

    def expect(self, char: str) -> None:
        found = self.peek()
        if found != char:
            raise _BrokenJson(f"found {found!r}, expected {char!r}" if found else f"the file ends, expected {char!r}")
        self._advance(self._cursor + 1)

    def element(self) -> Row:
        """The next value."""
        self.peek()
        line = self.position.line
        while True:
            try:
                value, end = self._decode(self._text, self._cursor)
            except json.JSONDecodeError as error:
                if not (self._may_be_cut(error) and self._fill()):
                    self._advance(max(error.pos, self._cursor))
                    raise _BrokenJson(_json_problem(error)) from None
            except (ValueError, RecursionError) as error:
                raise _BrokenJson(_json_problem(error)) from None
            else:
                # a number may go on behind the end of the window, an object cannot
                if isinstance(value, dict) or end < len(self._text) or not self._fill():
                    break
        self._advance(end)
        return Row(line, _object(value), self.position)

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        near_end = error.pos >= len(self._text) - _CUT_MARGIN_CHARS
        return near_end or error.msg.startswith("Unterminated string")

    def _fill(self) -> bool:
        """Read on; False at the end of the file."""
        if self._at_end:
            return False
        rest = self._text[self._cursor :]
        chunk = self._stream.read(max(_CHUNK_BYTES, len(rest)))
        self._at_end = not chunk
        try:
            self._text = rest + self._utf8.decode(chunk, final=self._at_end)
        except UnicodeDecodeError as error:
            raise _BrokenJson(f"invalid UTF-8 ({error.reason})") from None
        self._cursor = 0
        return True

    def _advance(self, cursor: int) -> None:
        passed = self._text[self._cursor : cursor]
        lines = passed.count("\n")
        self.position = Position(self.position.offset + len(passed.encode("utf-8")), self.position.line + lines)
        self.column = len(passed) - passed.rfind("\n") if lines else self.column + len(passed)
        self._cursor = cursor


# --- CSV -------------------------------------------------------------------------------------------------------------


def _read_csv(stream: BufferedIOBase, start: Position) -> Iterator[Row]:
    # the limit is the process's, not the reader's; it is only ever raised
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_CSV_FIELD_CHARS))
    head = _Lines(stream, START)
    header = _csv_header(head)
    if isinstance(header, BadRow):
        yield Row(1, header, head.position)
        return
    body = _Lines(stream, max(start, head.position))
    rows = csv.reader(map(_decode_lossless, body), strict=True)
    while True:
        line = body.position.line
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            # a quote that is not closed has taken everything up to the end with it
            unclosed = "unexpected end of data" in str(error)
            problem = "a quote that is never closed" if unclosed else str(error)
            yield Row(line, BadRow(f"invalid CSV: {problem}", "invalid CSV", ends_file=unclosed), body.position)
        else:
            if fields:
                yield Row(line, _csv_object(header, fields), body.position)


def _decode_lossless(line: bytes) -> str:
    # invalid bytes become lone surrogates, so that the row around them can still be delimited and then be refused
    return line.decode("utf-8", "surrogateescape")


def _csv_header(lines: _Lines) -> list[str] | BadRow:
    try:
        header = next(filter(None, csv.reader(map(_decode_lossless, lines), strict=True)), [])
    except csv.Error as error:
        return BadRow(f"invalid CSV header: {error}", "invalid CSV header", ends_file=True)
    problem = _header_problem(header)
    return BadRow(f"invalid CSV header: {problem}", "invalid CSV header", ends_file=True) if problem else header


def _header_problem(header: list[str]) -> str | None:
    for number, name in enumerate(header, 1):
        bad = _bad_text(name, f"in the name of column {number}")
        if bad:
            return bad.problem
        if not name.strip():
            return f"column {number} has no name"
        if header.count(name) > 1:
            return f"two columns of the name {name!r:.60}"
    return None


def _csv_object(header: list[str], fields: list[str]) -> dict[str, str] | BadRow:
    if len(fields) != len(header):
        problem = f"invalid CSV: found {len(fields)} fields, expected {len(header)} as in the header"
        return BadRow(problem, "invalid CSV")
    row = dict(zip(header, fields, strict=True))
    bad = (_bad_text(value, f"in the field {name!r:.60}") for name, value in row.items())
    return next(filter(None, bad), None) or row


def _bad_text(text: str, place: str) -> BadRow | None:
    """What is wrong with text of a CSV file, whose invalid bytes are lone surrogates here."""
    if "\0" in text:
        return _bad_nul(place)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        hint = " (if this is UTF-16, save it as UTF-8)" if text.startswith(("\udcff\udcfe", "\udcfe\udcff")) else ""
        return BadRow(f"invalid UTF-8: byte 0x{ord(text[error.start]) - 0xDC00:02x} {place}{hint}", "invalid UTF-8")
    return None


# --- text ------------------------------------------------------------------------------------------------------------


def _read_text(stream: BufferedIOBase, start: Position, separator: str, keep_linebreaks: bool) -> Iterator[Row]:
    lines = _Lines(stream, start)
    waiting: Row | None = None  # for a second one: what is alone in its file may have been meant as many
    for number, (line, block) in enumerate(_text_blocks(lines, separator)):
        row = Row(line, _document(block, keep_linebreaks), lines.position)
        if number == 0 and start == START and separator == "blank_line":
            waiting = row._replace(note=_one_document(block))
            continue
        if waiting:
            yield waiting._replace(note="")
            waiting = None
        yield row
    if waiting:
        yield waiting


def _one_document(block: bytes) -> str:
    count = len(block.splitlines())
    if count < _MANY_LINES:
        return ""
    return f"{count} lines without a blank line are one document; if each line is one, pass --document_separator line"


def _text_blocks(lines: _Lines, separator: str) -> Iterator[tuple[int, bytes]]:
    """(number of the first line, bytes) of each document; blank ones are left out."""
    block: list[bytes] = []
    first = 1
    for line in lines:
        blank = not line.strip()
        if not block:
            if blank:
                continue
            first = lines.position.line - 1
        if not blank or separator == "file":
            block.append(line)
        if separator == "line" or (blank and separator == "blank_line"):
            yield first, b"".join(block)
            block = []
    if block:
        yield first, b"".join(block)


def _document(block: bytes, keep_linebreaks: bool) -> dict[str, str] | BadRow:
    try:
        text = block.decode("utf-8")
    except UnicodeDecodeError as error:
        start = block.rfind(b"\n", 0, error.start) + 1
        line = block.count(b"\n", 0, error.start) + 1
        bad = _bad_utf8(block[start:], UnicodeDecodeError("utf-8", block[start:], error.start - start, 0, ""))
        return BadRow(f"{bad.problem} of the document's line {line}", bad.reason)
    if "\0" in text:
        return _bad_nul("in the document")
    text = text.replace("\r\n", "\n").strip("\n")
    return {"text": text if keep_linebreaks else re.sub(r"\s*\n\s*", " ", text)}


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _read_parquet(stream: BufferedIOBase, start: Position) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = start.offset
    try:
        with _random_access(stream) as source:
            file = pyarrow.parquet.ParquetFile(source)
            _check_columns(file.schema_arrow.names)
            for value in _parquet_values(file, start.offset):
                number += 1
                yield Row(number, value, Position(number, number + 1))
    # ValueError and OverflowError: a value that Python has no place for, such as a date after the year 9999
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        problem = f"damaged Parquet file ({' '.join(str(error).split())})"
        bad = BadRow(problem, "damaged Parquet file", ends_file=True)
        yield Row(number + 1, bad, Position(number, number + 1))


def _check_columns(names: list[str]) -> None:
    """A row as a dict would keep only the last of two columns."""
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"two columns of the name {repeated!r:.60}")


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row of Arrow's without the null keys of its inner objects: Arrow gives each object the keys of all of them."""
    return {key: _without_null_keys(value) if isinstance(value, dict | list) else value for key, value in row.items()}


def _without_null_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null_keys(each) for key, each in value.items() if each is not None}
    return [_without_null_keys(each) for each in value] if isinstance(value, list) else value


def _parquet_values(file, first: int) -> Iterator[dict[str, Any]]:
    """The rows from number ``first`` (counted from 0) on; row groups that lie before it are not read."""
    begin = 0
    for group in range(file.num_row_groups):
        end = begin + file.metadata.row_group(group).num_rows
        if end > first:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, row_groups=[group]):
                passed = min(max(first - begin, 0), batch.num_rows)
                yield from map(without_nulls, batch.slice(passed).to_pylist())
                begin += batch.num_rows
        begin = end


@contextmanager
def _random_access(stream: BufferedIOBase) -> Iterator[BufferedIOBase | IO[bytes]]:
    """Parquet is read from its end; a compressed file is unpacked to disk first."""
    if not isinstance(stream, gzip.GzipFile):
        yield stream
        return
    with tempfile.TemporaryFile() as unpacked:
        copyfileobj(stream, unpacked)
        yield unpacked
