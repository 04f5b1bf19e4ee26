"""Files, rows and their locations; data sets of checked records, their cache, mixing, splitting and streaming."""

import gzip
import itertools
import json
import logging
import os
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise.data import files as files_module
from stagewise.data import sources as sources_module
from stagewise.data.files import BadRow, find_files, iter_rows, read_rows
from stagewise.data.records import Conversation, Document, Prompt, RecordOptions
from stagewise.data.sources import (
    Source,
    find_sources,
    load_hub_dataset,
    load_records,
    mix,
    split_validation,
    stream_records,
)
from stagewise.errors import InputError

OPTIONS = RecordOptions()
BOM = b"\xef\xbb\xbf"


def qa(number, name="q"):
    return {"prompt": f"{name}{number}", "response": f"answer {number}"}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(path, **options):
    return [(int(location.rsplit(":", 1)[1]), value) for location, value in read_rows(path, **options)]


def questions(dataset):
    return [json.loads(row["record"])["messages"][0]["content"] for row in dataset]


def load(path, tmp_path, kind="conversation", options=OPTIONS, **more):
    """The one data set of a path, and its report."""
    loaded, reports = load_records(kind, find_sources(str(path)), options, cache_dir=str(tmp_path / "cache"), **more)
    (dataset,), (report,) = loaded.values(), reports.values()
    return dataset, report


# --- finding files ---------------------------------------------------------------------------------------------------


def test_directories_are_searched_in_sorted_order(tmp_path, caplog):
    names = [
        "b.jsonl",
        "a/z.JSON",
        "a/c.csv.gz",
        "c/d/e.txt",
        "x.parquet",
        ".hidden.jsonl",
        ".git/f.jsonl",
        "README.md",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with caplog.at_level(logging.WARNING):
        found = find_files(tmp_path)
    expected = ["a/c.csv.gz", "a/z.JSON", "b.jsonl", "c/d/e.txt", "x.parquet"]
    assert [file.relative_to(tmp_path).as_posix() for file in found] == expected
    assert "README.md" in caplog.text


def test_find_files_errors_name_the_place(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "useless").mkdir()
    (tmp_path / "useless" / "notes.docx").write_text("x")
    (tmp_path / "nothing.jsonl").touch()
    expected = {
        "missing": "missing: no such file or directory",
        "empty": "empty: the directory is empty",
        "useless": "useless: no usable file among notes.docx",
        "useless/notes.docx": "notes.docx: the file type is not known; give one of .jsonl, .json, .csv, .parquet",
        "nothing.jsonl": "nothing.jsonl: the file is empty",
    }
    for name, message in expected.items():
        with pytest.raises(InputError) as caught:
            find_files(tmp_path / name)
        assert message in str(caught.value)


# --- reading rows ----------------------------------------------------------------------------------------------------


def test_jsonl_with_bom_crlf_and_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(BOM + '{"a": "é\u2028"}\r\n\r\n{"a": 2}\n  \n{"a": 3}'.encode())
    assert rows_of(path) == [(1, {"a": "é\u2028"}), (3, {"a": 2}), (5, {"a": 3})]


def test_bad_lines_are_reported_in_their_place(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [b'{"a": 1}', b'{"a": }', 'é{"a": "'.encode() + b'\xff"}', b"[1]", b'{"a":' + b"[" * 100_000, b'{"a": 2}']
    path.write_bytes(b"\n".join(lines))
    rows = rows_of(path)
    assert [line for line, _ in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0][1] == {"a": 1}
    assert rows[1][1] == BadRow("invalid JSON: Expecting value at column 7", "invalid JSON")
    assert rows[2][1] == BadRow("invalid UTF-8: byte 0xff at column 9", "invalid UTF-8")
    assert rows[3][1] == BadRow("found an array, expected an object", "JSON that is not an object")
    assert rows[4][1].reason == "invalid JSON"
    assert rows[5][1] == {"a": 2}


def test_json_array_gives_the_line_of_each_element(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(BOM + b'[\r\n  {"a": 1},\r\n  {\r\n    "a": 2\r\n  }, {"a": 3}\r\n]\r\n')
    assert rows_of(path) == [(2, {"a": 1}), (3, {"a": 2}), (5, {"a": 3})]


def test_json_lines_in_a_json_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\n{"a": 1}\n{"a": 2}\n')
    assert rows_of(path) == [(2, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize(
    ("text", "good", "line", "problem"),
    [
        ('[{"a": 1},\n{"a": 2}', 1 + 1, 2, "the file ends, expected ']'"),
        ('[{"a": 1},\n{"a": }]', 1, 2, "Expecting value at column 7"),
        ('[{"a": 1}\n {"a": 2}]', 1, 2, "found '{', expected ']' at column 2"),
        ('[{"a": 1},]', 1, 1, "Expecting value at column 11"),
        ('[{"a": 1}] x', 1, 1, "text after the end of the array"),
        ('[{"a": 1}, {"b": "never closed]', 1, 1, "Unterminated string"),
        ("[", 0, 1, "Expecting value"),
    ],
)
def test_a_broken_array_ends_with_one_bad_row(tmp_path, text, good, line, problem):
    path = tmp_path / "a.json"
    path.write_text(text)
    rows = rows_of(path)
    assert [value for _, value in rows[:-1]] == [{"a": each + 1} for each in range(good)]
    last_line, bad = rows[-1]
    assert bad.ends_file
    assert last_line == line
    assert problem in bad.problem


def test_array_with_bad_utf8_and_with_elements_that_are_no_objects(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[1, 23, "x", {"a": 1}]')
    assert [value if isinstance(value, dict) else value.reason for _, value in rows_of(path)] == [
        *["JSON that is not an object"] * 3,
        {"a": 1},
    ]
    path.write_bytes(b'[{"a": "\xff"}]')
    ((_, bad),) = rows_of(path)
    assert bad.ends_file
    assert "invalid UTF-8" in bad.problem


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(st.dictionaries(st.text(max_size=3), json_values, max_size=3), max_size=6),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.integers(1, 40),
)
@settings(max_examples=150, derandomize=True, deadline=None)
def test_arrays_are_read_alike_however_they_are_cut_into_chunks(rows, indent, ascii_only, chunk_bytes):
    import tempfile
    from pathlib import Path

    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files_module, "_CHUNK_BYTES", chunk_bytes)
        path = Path(folder, "a.json")
        path.write_text(text, encoding="utf-8", newline="")
        read = list(iter_rows(path))
        assert [row.value for row in read] == rows
        lines = text.encode("utf-8").splitlines(keepends=True) if indent else [text.encode("utf-8")]
        assert all(lines[row.line - 1].lstrip(b"[ ").startswith(b"{") for row in read)
        for index, row in enumerate(read):
            assert list(iter_rows(path, row.end)) == read[index + 1 :]


def test_csv_with_newlines_in_quotes(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(BOM + 'prompt,response\r\n"two\nlines","say ""é"""\r\n\r\nx,y\r\n'.encode())
    assert rows_of(path) == [
        (2, {"prompt": "two\nlines", "response": 'say "é"'}),
        (5, {"prompt": "x", "response": "y"}),
    ]


def test_csv_errors(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'a,b\n1,2,3\n1,"2"x\n1,\xff\n1,2\n1,"never\nclosed\n')
    rows = rows_of(path)
    assert [line for line, _ in rows] == [2, 3, 4, 5, 6]
    assert rows[0][1].problem == "invalid CSV: found 3 fields, expected 2 as in the header"
    assert rows[1][1].reason == "invalid CSV"
    assert rows[2][1].reason == "invalid UTF-8"
    assert rows[3][1] == {"a": "1", "b": "2"}
    assert rows[4][1] == BadRow("invalid CSV: a quote that is never closed", "invalid CSV", ends_file=True)


@pytest.mark.parametrize("header", ["a,a", "a,", '"a'])
def test_csv_header_errors(tmp_path, header):
    path = tmp_path / "a.csv"
    path.write_text(f"{header}\n1,2\n")
    ((line, bad),) = rows_of(path)
    assert line == 1
    assert bad.ends_file


def test_long_csv_cells(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"text\n{'x' * 300_000}\n")
    assert rows_of(path) == [(2, {"text": "x" * 300_000})]


def test_parquet_rows_are_numbered(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"a": str(each), "turns": [{"role": "user", "content": "é"}] * (each % 3)} for each in range(700)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=300)
    assert rows_of(path) == [(each + 1, rows[each]) for each in range(700)]


def test_damaged_parquet_and_gzip_end_the_file(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 this is not one")
    ((_, bad),) = rows_of(path)
    assert bad.ends_file
    assert bad.reason == "damaged Parquet file"
    packed = gzip.compress(b"".join(b'{"a": %d}\n' % each for each in range(50_000)))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(packed[: len(packed) // 2])
    rows = rows_of(path)
    assert rows[0] == (1, {"a": 0})
    assert rows[-1][1].ends_file
    assert rows[-1][1].reason == "damaged gzip file"


TEXT = "\n\nOnce upon\r\n  a time.\r\n \nThe end.\nReally.\n\n"


@pytest.mark.parametrize(
    ("separator", "keep", "expected"),
    [
        ("blank_line", True, [(3, "Once upon\n  a time."), (6, "The end.\nReally.")]),
        ("blank_line", False, [(3, "Once upon a time."), (6, "The end. Really.")]),
        ("line", True, [(3, "Once upon"), (4, "  a time."), (6, "The end."), (7, "Really.")]),
        ("file", True, [(3, "Once upon\n  a time.\n \nThe end.\nReally.")]),
        ("file", False, [(3, "Once upon a time. The end. Really.")]),
    ],
)
def test_documents_of_a_text_file(tmp_path, separator, keep, expected):
    path = tmp_path / "a.txt"
    path.write_bytes(BOM + TEXT.encode())
    rows = rows_of(path, document_separator=separator, keep_linebreaks=keep)
    assert rows == [(line, {"text": text}) for line, text in expected]


def test_text_with_bad_utf8_loses_that_document_only(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ntwo\n\xc3\xa9\xff\n\nthree\n")
    assert rows_of(path) == [
        (1, {"text": "one"}),
        (3, BadRow("invalid UTF-8: byte 0xff at column 2 of the document's line 2", "invalid UTF-8")),
        (6, {"text": "three"}),
    ]


def write_every_type(folder):
    """The same five rows in every type; files of one row per line, and with rows over several lines."""
    rows = [{"text": f"row {each} é\nsecond line"} for each in range(5)]
    contents = {
        "a.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "lines.json": "\n".join(json.dumps(row) for row in rows),
        "array.json": json.dumps(rows, indent=2, ensure_ascii=False),
        "short_array.json": json.dumps(rows),
        "a.csv": "text\n" + "".join(f'"{row["text"]}"\n' for row in rows),
        "a.txt": "\n\n".join(row["text"] for row in rows),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content.encode("utf-8"))
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=2)
    for path in list(folder.iterdir()):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    return rows


def test_every_type_gives_the_same_rows_and_goes_on_from_every_row(tmp_path):
    rows = write_every_type(tmp_path)
    paths = find_files(tmp_path)
    assert len(paths) == 14
    for path in paths:
        read = list(iter_rows(path))
        assert [row.value for row in read] == rows, path
        for index, row in enumerate(read):
            assert list(iter_rows(path, row.end)) == read[index + 1 :], (path, index)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    """8 MB are read within 1 MB."""
    text = "x" * 8_000
    row = {"a.csv": text, "a.txt": f"{text}\n"}.get(name, json.dumps({"text": text}))
    separator = ",\n" if name == "a.json" else "\n"
    body = separator.join(itertools.repeat(row, 1_000))
    (tmp_path / name).write_text({"a.json": f"[{body}]", "a.csv": f"text\n{body}"}.get(name, body))
    del body
    tracemalloc.start()
    count = sum(value == {"text": text} for _, value in read_rows(tmp_path / name))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1_000
    assert peak < 1_000_000


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_sets(tmp_path):
    (tmp_path / "code").mkdir()
    write_jsonl(tmp_path / "code" / "1.jsonl", [qa(each, "code") for each in range(3)])
    write_jsonl(tmp_path / "code" / "2.jsonl", [qa(each, "code") for each in range(3, 5)])
    write_jsonl(tmp_path / "law.jsonl", [qa(each, "law") for each in range(3)])
    return f"{tmp_path}/code", f"{tmp_path}/law.jsonl"


@pytest.mark.parametrize("form", ["{},{}", "[{}, {}]", "['{}','{}']", '["{}/", "{}"]'])
def test_sources_are_named_after_folder_or_file(two_sets, form):
    code, law = find_sources(form.format(*two_sets))
    assert (code.name, [file.name for file in code.files]) == ("code", ["1.jsonl", "2.jsonl"])
    assert (law.name, [file.name for file in law.files]) == ("law", ["law.jsonl"])


def test_a_path_may_hold_a_comma(tmp_path):
    (tmp_path / "a,b.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    assert find_sources(str(tmp_path / "a,b.jsonl.gz")) == [Source("a,b", (tmp_path / "a,b.jsonl.gz",))]


def test_source_errors(tmp_path, two_sets):
    code, law = two_sets
    write_jsonl(tmp_path / "code" / "law.jsonl", [qa(1)])
    with pytest.raises(InputError, match=r"--train_file_dir: .*law.jsonl and .*law.jsonl would both be called 'law'"):
        find_sources(f"{law},{code}/law.jsonl")
    with pytest.raises(InputError, match="found an empty path"):
        find_sources(f"{law},,{code}")
    with pytest.raises(InputError, match="--validation_file_dir: found an empty path"):
        find_sources("", "--validation_file_dir")
    with pytest.raises(InputError, match="nowhere: no such file"):
        find_sources(f"{law},{tmp_path}/nowhere")


# --- loading ---------------------------------------------------------------------------------------------------------


def test_records_locations_and_reports(tmp_path, two_sets):
    sources = find_sources(",".join(two_sets))
    loaded, reports = load_records("conversation", sources, OPTIONS, cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == list(reports) == ["code", "law"]
    code = loaded["code"]
    assert code.column_names == ["record", "location", "dataset"]
    assert questions(code) == ["code0", "code1", "code2", "code3", "code4"]
    assert Conversation.from_json(code[4]["record"]).messages[1]["content"] == "answer 4"
    assert code[4]["location"] == f"{two_sets[0]}/2.jsonl:2"
    assert set(code["dataset"]) == {"code"}
    assert code.cache_files
    assert reports["code"].to_dict() == {
        "dataset": "code",
        "files": [f"{two_sets[0]}/1.jsonl", f"{two_sets[0]}/2.jsonl"],
        "rows_read": 5,
        "rows_kept": 5,
        "rows_bad": 0,
        "reasons": {},
        "first_bad": [],
    }


def test_documents_and_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    dataset, _ = load(tmp_path / "a.txt", tmp_path, "document")
    assert [Document.from_json(record).text for record in dataset["record"]] == ["one\ntwo", "three"]
    options = {"document_separator": "line", "keep_linebreaks": False}
    dataset, _ = load(tmp_path / "a.txt", tmp_path, "document", **options)
    assert [Document.from_json(record).text for record in dataset["record"]] == ["one", "two", "three"]
    write_jsonl(tmp_path / "b.jsonl", [qa(1)])
    dataset, _ = load(tmp_path / "b.jsonl", tmp_path, "prompt")
    assert Prompt.from_json(dataset[0]["record"]).messages == [{"role": "user", "content": "q1"}]


def test_files_are_shared_out_to_processes_in_order(tmp_path):
    (tmp_path / "many").mkdir()
    for number in range(3):
        write_jsonl(tmp_path / "many" / f"{number}.jsonl", [qa(10 * number + each) for each in range(4)])
    dataset, report = load(tmp_path / "many", tmp_path, num_proc=2)
    assert questions(dataset) == [f"q{10 * number + each}" for number in range(3) for each in range(4)]
    assert report.rows_read == 12


def test_max_samples_takes_the_first_rows(tmp_path, two_sets):
    dataset, report = load(two_sets[0], tmp_path, max_samples_per_dataset=4, num_proc=2)
    assert questions(dataset) == ["code0", "code1", "code2", "code3"]
    assert report.rows_read == 4
    assert len(load(two_sets[0], tmp_path, max_samples_per_dataset=-1)[0]) == 5
    assert len(load(two_sets[0], tmp_path, max_samples_per_dataset=99)[0]) == 5
    with pytest.raises(InputError, match="--max_samples_per_dataset: found 0"):
        load(two_sets[0], tmp_path, max_samples_per_dataset=0)


def test_the_cache_is_reused_until_something_changes(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [qa(1), qa(2)])
    reads = []
    original = sources_module.iter_rows
    monkeypatch.setattr(sources_module, "iter_rows", lambda *args, **kw: reads.append(args) or original(*args, **kw))

    first, _ = load(path, tmp_path)
    again, report = load(path, tmp_path)
    assert len(reads) == 1
    assert again._fingerprint == first._fingerprint
    assert questions(again) == ["q1", "q2"]
    assert report.rows_read == 2

    load(path, tmp_path, options=RecordOptions(assistant_name="Ada"))
    load(path, tmp_path, kind="prompt")
    load(path, tmp_path, max_samples_per_dataset=1)
    assert len(reads) == 4

    stat = path.stat()
    write_jsonl(path, [qa(3), qa(4)])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert path.stat().st_size == stat.st_size
    changed, _ = load(path, tmp_path)
    assert questions(changed) == ["q3", "q4"]
    assert changed._fingerprint != first._fingerprint
    assert len(reads) == 5


def test_overwrite_cache_reads_again(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [qa(1)])
    stat = path.stat()
    assert questions(load(path, tmp_path)[0]) == ["q1"]
    write_jsonl(path, [qa(2)])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # nothing that the key could see
    assert questions(load(path, tmp_path)[0]) == ["q1"]
    assert questions(load(path, tmp_path, overwrite_cache=True)[0]) == ["q2"]
    assert questions(load(path, tmp_path)[0]) == ["q2"]


# --- bad rows --------------------------------------------------------------------------------------------------------


def bad_file(tmp_path, rows=40, bad=(16, 30)):
    """Row 17 has no answer, row 31 is not JSON."""
    lines = [json.dumps(qa(each)) for each in range(rows)]
    for number, line in zip(bad, [json.dumps({"prompt": "x", "response": None}), "{"], strict=False):
        lines[number] = line
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_the_first_bad_row_stops_the_run_after_all_were_checked(tmp_path):
    path = bad_file(tmp_path)
    with pytest.raises(InputError) as caught:
        load(path, tmp_path)
    assert str(caught.value) == (
        f"{path}:17: field 'response': found null, expected a string; 1 more bad row among the 40 rows read of data "
        "set 'bad'. Mend the file, or pass --on_bad_row skip to drop bad rows and count them"
    )


@pytest.mark.parametrize(("rows", "helps"), [(10, True), (9, False)])
def test_skipping_is_advised_only_where_it_would_help(rows, helps, tmp_path):
    """One row of ten may be bad, and no more."""
    path = tmp_path / "rows.jsonl"
    path.write_text("oops\n" + "".join(f"{json.dumps(qa(each))}\n" for each in range(rows - 1)))
    with pytest.raises(InputError) as caught:
        load(path, tmp_path)
    assert ("--on_bad_row skip" in str(caught.value)) == helps
    if helps:
        assert len(load(path, tmp_path, on_bad_row="skip")[0]) == rows - 1
        return
    with pytest.raises(InputError, match="more than 10% are not skipped"):
        load(path, tmp_path, on_bad_row="skip")


def test_bad_rows_are_skipped_and_counted(tmp_path):
    path = bad_file(tmp_path)
    dataset, report = load(path, tmp_path, on_bad_row="skip")
    assert questions(dataset) == [f"q{each}" for each in range(40) if each not in (16, 30)]
    assert dataset.column_names == ["record", "location", "dataset"]
    assert (report.rows_read, report.rows_bad, report.to_dict()["rows_kept"]) == (40, 2, 38)
    assert report.reasons == {"field 'response': expected a string": 1, "invalid JSON": 1}
    assert report.first_bad == [
        f"{path}:17: field 'response': found null, expected a string",
        f"{path}:31: invalid JSON: Expecting property name enclosed in double quotes at column 2",
    ]


def test_ten_locations_are_kept(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x", "response": ""}] * 12 + [qa(1)] * 200)
    _, report = load(path, tmp_path, on_bad_row="skip")
    assert report.rows_bad == 12
    assert [text.split(": ")[0] for text in report.first_bad] == [f"{path}:{line}" for line in range(1, 11)]


def test_more_than_a_tenth_bad_stops_anyway(tmp_path):
    rows = [qa(each) for each in range(18)] + [{"prompt": "x", "response": ""}] * 2
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert len(load(path, tmp_path, on_bad_row="skip")[0]) == 18
    write_jsonl(path, rows[1:])
    with pytest.raises(
        InputError, match=r"'a': 2 of 19 rows are bad, and more than 10% are not skipped. Why: 2 x field"
    ):
        load(path, tmp_path, on_bad_row="skip")


def test_a_file_that_breaks_off_cannot_be_skipped(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([qa(each) for each in range(30)])[:-5])
    with pytest.raises(InputError, match=r"a.json:1: invalid JSON: .* here nobody knows how many are lost"):
        load(path, tmp_path, on_bad_row="skip")


def test_a_file_without_rows_is_an_error_that_names_it(tmp_path):
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "a.jsonl", [qa(1)])
    (tmp_path / "set" / "b.csv").write_text("prompt,response\n")
    for on_bad_row in ("error", "skip"):
        with pytest.raises(InputError, match=r"b.csv: the file holds no rows"):
            load(tmp_path / "set", tmp_path, on_bad_row=on_bad_row)


def test_mixed_formats_in_a_file(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [qa(1), {"instruction": "q2", "output": "b"}])
    with pytest.raises(
        InputError, match=r"a.jsonl:2: .*format alpaca, expected qa as in the rows before.*--allow_mixed"
    ):
        load(path, tmp_path)
    assert questions(load(path, tmp_path, options=RecordOptions(allow_mixed=True))[0]) == ["q1", "q2"]


def test_each_file_may_have_its_own_format(tmp_path):
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "a.jsonl", [qa(1)])
    write_jsonl(tmp_path / "set" / "b.jsonl", [{"instruction": "q2", "output": "b"}])
    assert questions(load(tmp_path / "set", tmp_path)[0]) == ["q1", "q2"]


def test_unknown_options(tmp_path, two_sets):
    for loading in (
        lambda: load(two_sets[0], tmp_path, document_separator="page"),
        lambda: stream(two_sets[0], document_separator="page"),
    ):
        with pytest.raises(
            InputError, match="--document_separator: found 'page', expected one of blank_line, line, file"
        ):
            loading()
    with pytest.raises(InputError, match="--on_bad_row: found 'drop', expected error or skip"):
        load(two_sets[0], tmp_path, on_bad_row="drop")


# --- the hub's layout ------------------------------------------------------------------------------------------------


def test_hub_dataset_from_a_local_folder(tmp_path):
    folder = tmp_path / "medical"
    folder.mkdir()
    rows = [
        {"messages": [{"role": "user", "content": f"q{each}"}, {"role": "assistant", "content": "a"}]}
        for each in range(30)
    ]
    write_jsonl(folder / "train.jsonl", rows)
    cache = str(tmp_path / "cache")
    dataset, report = load_hub_dataset("conversation", str(folder), OPTIONS, cache_dir=cache, max_samples=20)
    assert questions(dataset) == [f"q{each}" for each in range(20)]
    assert dataset[2] == {"record": dataset[2]["record"], "location": f"{folder}[train] row 3", "dataset": "medical"}
    assert report.rows_read == 20

    rows[4]["messages"][1]["content"] = None
    write_jsonl(folder / "train.jsonl", rows)
    with pytest.raises(InputError, match=r"medical\[train\] row 5: field 'messages\[1\].content': found null"):
        load_hub_dataset("conversation", str(folder), OPTIONS, cache_dir=cache)
    dataset, report = load_hub_dataset("conversation", str(folder), OPTIONS, cache_dir=cache, on_bad_row="skip")
    assert (len(dataset), report.rows_bad) == (29, 1)
    with pytest.raises(InputError, match=r"--dataset_name .*medical, split test: "):
        load_hub_dataset("conversation", str(folder), OPTIONS, cache_dir=cache, split="test")
    with pytest.raises(InputError, match=r"--dataset_name .*nowhere, split train: "):
        load_hub_dataset("conversation", str(tmp_path / "nowhere"), OPTIONS, cache_dir=cache)


# --- mixing ----------------------------------------------------------------------------------------------------------


def numbered(name, rows):
    return Dataset.from_dict({"row": [f"{name}{each}" for each in range(rows)]})


THREE = {"a": numbered("a", 3), "b": numbered("b", 4), "c": numbered("c", 5)}


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("concat", "a0 a1 a2 b0 b1 b2 b3 c0 c1 c2 c3 c4"),
        ("interleave_under", "a0 b0 c0 a1 b1 c1 a2 b2 c2"),
        ("interleave_over", "a0 b0 c0 a1 b1 c1 a2 b2 c2 a0 b3 c3 a1 b0 c4"),
    ],
)
def test_mixing_without_probabilities(strategy, expected):
    assert mix(THREE, strategy)["row"][:] == expected.split()


def drawn_order(lengths, probs, seed, under):
    """The rule of mix(), one row at a time."""
    draws = np.random.default_rng(seed).choice(len(lengths), size=1000, p=probs)
    taken = [0] * len(lengths)
    order = []
    for source in draws:
        order.append(f"{'abc'[source]}{taken[source] % lengths[source]}")
        taken[source] += 1
        through = [count >= length for count, length in zip(taken, lengths, strict=True)]
        if any(through) if under else all(through):
            return order
    raise AssertionError("1000 draws were not enough")


@pytest.mark.parametrize("strategy", ["interleave_under", "interleave_over"])
@pytest.mark.parametrize("seed", [0, 1, 42])
def test_mixing_with_probabilities_is_one_exact_order(strategy, seed):
    probs = [0.7, 0.2, 0.1]
    mixed = mix(THREE, strategy, probs, seed)["row"][:]
    assert mixed == drawn_order([3, 4, 5], probs, seed, strategy == "interleave_under")
    assert mix(THREE, strategy, probs, seed)["row"][:] == mixed


def test_the_seed_changes_the_order():
    orders = {tuple(mix(THREE, "interleave_over", [0.4, 0.3, 0.3], seed)["row"][:]) for seed in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize(
    ("strategy", "probs", "message"),
    [
        (
            "shuffle",
            None,
            "--mix_strategy: found 'shuffle', expected one of concat, interleave_under, interleave_over",
        ),
        ("concat", [0.5, 0.3, 0.2], "--mix_probs has no meaning with --mix_strategy concat"),
        ("interleave_under", [0.5, 0.5], r"--mix_probs: found 2 numbers for 3 data sets \(a, b, c\)"),
        ("interleave_over", [0.5, 0.6, -0.1], "expected positive numbers"),
        ("interleave_over", [0.5, 0.5, 0.0], "expected positive numbers"),
        ("interleave_over", [0.5, 0.5, float("nan")], "expected positive numbers"),
        ("interleave_under", [0.5, 0.3, 0.1], "with the sum 0.9, expected the sum 1"),
    ],
)
def test_mixing_errors(strategy, probs, message):
    with pytest.raises(InputError, match=message):
        mix(THREE, strategy, probs)


def test_one_data_set_is_not_copied():
    only = {"a": THREE["a"]}
    assert mix(only, "interleave_over", [1.0]) is THREE["a"]


# --- splitting -------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(2, 60), min_size=1, max_size=3),
    st.floats(0.001, 99.9, allow_nan=False),
    st.integers(0, 2**31),
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_splits_are_disjoint_complete_ordered_and_repeatable(lengths, percentage, seed):
    datasets = {f"set{index}": numbered("r", length) for index, length in enumerate(lengths)}
    training, validation = split_validation(datasets, percentage, seed)
    again = split_validation(datasets, percentage, seed)
    assert list(training) == list(validation) == list(datasets)
    for name, dataset in datasets.items():
        train, held_out = training[name]["row"][:], validation[name]["row"][:]
        share = percentage if percentage < 1 else percentage / 100
        assert len(held_out) == min(max(1, round(share * len(dataset))), len(dataset) - 1)
        assert not set(train) & set(held_out)
        assert sorted(train + held_out) == sorted(dataset["row"][:])
        assert all(sorted(part, key=lambda row: int(row[1:])) == part for part in (train, held_out))
        assert (again[0][name]["row"][:], again[1][name]["row"][:]) == (train, held_out)


@pytest.mark.parametrize(
    ("percentage", "rows", "held_out"), [(5, 200, 10), (0.05, 200, 10), (1, 200, 2), (1, 10, 1), (99, 2, 1)]
)
def test_percentages_and_fractions(percentage, rows, held_out):
    training, validation = split_validation({"a": numbered("a", rows)}, percentage)
    assert (len(training["a"]), len(validation["a"])) == (rows - held_out, held_out)


def test_the_seed_changes_the_split():
    splits = {tuple(split_validation({"a": numbered("a", 50)}, 10, seed)[1]["a"]["row"][:]) for seed in range(5)}
    assert len(splits) == 5


@pytest.mark.parametrize("percentage", [0, -5, 100, 250, float("nan")])
def test_split_percentage_out_of_range(percentage):
    with pytest.raises(InputError, match="--validation_split_percentage: found"):
        split_validation({"a": numbered("a", 10)}, percentage)


def test_a_data_set_of_one_row_cannot_be_split():
    with pytest.raises(InputError, match="data set 'tiny' has 1 row; a validation split needs at least 2"):
        split_validation({"a": numbered("a", 10), "tiny": numbered("t", 1)}, 10)


# --- streams ---------------------------------------------------------------------------------------------------------


def stream(path, kind="conversation", options=OPTIONS, **more):
    streams, reports = stream_records(kind, find_sources(str(path)), options, **more)
    (dataset,), (report,) = streams.values(), reports.values()
    return dataset, report


def test_a_stream_gives_what_loading_gives(tmp_path, two_sets):
    loaded, _ = load(two_sets[0], tmp_path)
    streamed, report = stream(two_sets[0])
    assert list(streamed) == list(loaded)
    assert (report.rows_read, report.rows_bad) == (5, 0)
    assert streamed.column_names == ["record", "location", "dataset"]
    capped, report = stream(two_sets[0], max_samples_per_dataset=2)
    assert questions(capped) == ["code0", "code1"]
    assert report.rows_read == 2


def test_a_capped_stream_counts_on_when_resumed_and_is_one_shard(two_sets):
    capped, _ = stream(two_sets[0], max_samples_per_dataset=4)
    assert questions(itertools.islice(capped, 3)) == ["code0", "code1", "code2"]
    resumed, _ = stream(two_sets[0], max_samples_per_dataset=4)
    resumed.load_state_dict(capped.state_dict())
    assert questions(resumed) == ["code3"]
    resumed.load_state_dict(resumed.state_dict())
    assert questions(resumed) == []
    assert capped.num_shards == 1
    capped.set_epoch(1)
    assert questions(capped) == ["code0", "code1", "code2", "code3"]


@pytest.mark.parametrize("transform", [lambda each: each, lambda each: each.map(lambda row: {"n": 1})])
def test_a_stream_resumes_at_every_row(tmp_path, transform):
    write_every_type(tmp_path)
    complete = list(transform(stream(tmp_path, "document")[0]))
    assert len(complete) == 70
    for passed in range(1, 70, 3):
        dataset = transform(stream(tmp_path, "document")[0])
        list(itertools.islice(dataset, passed))
        state = json.loads(json.dumps(dataset.state_dict()))
        resumed = transform(stream(tmp_path, "document")[0])
        resumed.load_state_dict(state)
        assert list(resumed) == complete[passed:]


def test_resuming_does_not_read_what_was_passed(tmp_path, two_sets):
    dataset, _ = stream(two_sets[0])
    list(itertools.islice(dataset, 4))
    state = dataset.state_dict()
    code = tmp_path / "code"
    (code / "1.jsonl").write_bytes(b"\xff" * 100)
    second = (code / "2.jsonl").read_bytes()
    first_line = second.index(b"\n") + 1
    (code / "2.jsonl").write_bytes(b"\xff" * first_line + second[first_line:])
    resumed, report = stream(two_sets[0])
    resumed.load_state_dict(state)
    rows = list(resumed)
    assert questions(rows) == ["code4"]
    assert rows[0]["location"] == f"{code}/2.jsonl:2"
    assert report.rows_read == 1


def test_resuming_remembers_the_format_of_the_file(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [qa(1), qa(2), {"instruction": "x", "output": "y"}])
    dataset, _ = stream(path)
    list(itertools.islice(dataset, 2))
    resumed, _ = stream(path)
    resumed.load_state_dict(dataset.state_dict())
    with pytest.raises(InputError, match=r"a.jsonl:3: .*expected qa as in the rows before"):
        list(resumed)


def test_a_stream_stops_at_a_bad_row(tmp_path):
    path = bad_file(tmp_path)
    dataset, _ = stream(path)
    seen = []
    with pytest.raises(InputError, match=r"bad.jsonl:17: field 'response': found null, expected a string"):
        seen.extend(dataset)
    dataset, report = stream(path, on_bad_row="skip")
    assert len(list(dataset)) == 38
    assert (report.rows_read, report.rows_bad, len(report.first_bad)) == (40, 2, 2)


def test_a_stream_stops_at_too_many_bad_rows(tmp_path):
    rows = [qa(1)] * 99 + [{"prompt": "x", "response": ""}] * 13
    dataset, report = stream(write_jsonl(tmp_path / "a.jsonl", rows), on_bad_row="skip")
    with pytest.raises(InputError, match="12 of 111 rows are bad"):
        list(dataset)
    dataset, _ = stream(write_jsonl(tmp_path / "b.jsonl", rows[:20] + rows[-3:]), on_bad_row="skip")
    with pytest.raises(InputError, match="3 of 23 rows are bad"):
        list(dataset)
    (tmp_path / "c.json").write_text(json.dumps([qa(1), qa(2)])[:-3])
    dataset, _ = stream(tmp_path / "c.json", on_bad_row="skip")
    with pytest.raises(InputError, match="nobody knows how many are lost"):
        list(dataset)


@pytest.mark.parametrize("strategy", ["concat", "interleave_under", "interleave_over"])
def test_streams_are_mixed_like_data_sets(tmp_path, two_sets, strategy):
    sources = find_sources(",".join(two_sets))
    loaded, _ = load_records("conversation", sources, OPTIONS, cache_dir=str(tmp_path / "cache"))
    streamed, reports = stream_records("conversation", sources, OPTIONS)
    probs = None if strategy == "concat" else [0.6, 0.4]
    mixed = mix(streamed, strategy, probs, seed=3)
    expected = questions(mix(loaded, strategy, probs, seed=3))
    assert questions(mixed) == expected
    assert all(report.rows_read > 0 for report in reports.values())
    mixed = mix(stream_records("conversation", sources, OPTIONS)[0], strategy, probs, seed=3)
    list(itertools.islice(mixed, 3))
    resumed = mix(stream_records("conversation", sources, OPTIONS)[0], strategy, probs, seed=3)
    resumed.load_state_dict(mixed.state_dict())
    assert questions(resumed) == expected[3:]


def test_epochs_and_shards_of_a_stream(tmp_path):
    (tmp_path / "many").mkdir()
    for number in range(4):
        write_jsonl(tmp_path / "many" / f"{number}.jsonl", [qa(10 * number + each) for each in range(2)])
    dataset, _ = stream(tmp_path / "many")
    in_order = questions(dataset)
    assert dataset.num_shards == 4
    shards = [questions(dataset.shard(2, index)) for index in range(2)]
    assert sorted(itertools.chain(*shards)) == sorted(in_order)
    assert all(len(shard) == 4 for shard in shards)
    dataset.set_epoch(1)
    first = questions(dataset)
    assert sorted(first) == sorted(in_order)
    assert questions(dataset) == first
    other, _ = stream(tmp_path / "many")
    other.set_epoch(1)
    assert questions(other) == first


def test_data_loader_workers_share_the_files(tmp_path):
    torch_data = pytest.importorskip("torch.utils.data")
    (tmp_path / "many").mkdir()
    for number in range(2):
        write_jsonl(tmp_path / "many" / f"{number}.jsonl", [qa(10 * number + each) for each in range(3)])
    dataset, _ = stream(tmp_path / "many")
    loader = torch_data.DataLoader(dataset, batch_size=None, num_workers=2)
    assert sorted(questions(loader)) == ["q0", "q1", "q10", "q11", "q12", "q2"]
