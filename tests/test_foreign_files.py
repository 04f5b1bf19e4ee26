"""Files in shapes that their names do not tell: read by their first bytes, or refused with what to do."""

import gzip
import json
import os
import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from stagewise.data import files
from stagewise.data.files import BadRow, find_files, iter_rows
from stagewise.data.records import RecordOptions
from stagewise.data.sources import find_sources, load_records
from stagewise.errors import InputError
from tests.stages import run_pt

ROWS = [{"question": f"What is {i}?\nSay.", "answer": "{" + "[" * i} for i in range(5)]
SHAPES = {
    "lines": "\n".join(map(json.dumps, ROWS)),
    "lines with blank ones": "\n\n" + "\n\n".join(map(json.dumps, ROWS)) + "\n\n",
    "array": json.dumps(ROWS),
    "pretty array": json.dumps(ROWS, indent=2),
    "array, an object a line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "pretty objects": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "pretty objects without a line end between": "".join(json.dumps(row, indent=4) for row in ROWS),
    "objects on one line": " ".join(map(json.dumps, ROWS)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("how", ["plain", "bom", "gzip", "gzip and crlf"])
def test_json_is_read_in_each_shape_under_each_name(shape, name, how, tmp_path):
    text = SHAPES[shape]
    if "crlf" in how:
        text = text.replace("\n", "\r\n")
    data = (b"\xef\xbb\xbf" if how == "bom" else b"") + text.encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if "gzip" in how else data)
    rows = list(iter_rows(path))
    assert [row.value for row in rows] == ROWS
    for index, row in enumerate(rows[:-1]):  # a stream goes on behind any row
        assert [each.value for each in iter_rows(path, row.end)] == ROWS[index + 1 :]
        assert next(iter_rows(path, row.end)).line == rows[index + 1].line


@pytest.mark.parametrize("name", ["one.json", "one.jsonl"])
def test_one_pretty_object_is_one_row(name, tmp_path):
    path = tmp_path / name
    path.write_text(json.dumps(ROWS[3], indent=2), encoding="utf-8")
    assert [row.value for row in iter_rows(path)] == [ROWS[3]]


def test_pretty_objects_that_break_off_lose_the_rest_and_say_where(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0], indent=2) + '\n{\n  "question": oops\n}\n', encoding="utf-8")
    good, bad = iter_rows(path)
    assert good.value == ROWS[0]
    assert isinstance(bad.value, BadRow)
    assert bad.value.ends_file
    assert bad.line == 6
    assert "the rest of the file cannot be read" in bad.value.problem


def test_a_bad_line_among_json_lines_is_still_one_bad_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    for lines in ([ROWS[0], "oops", ROWS[1]], ["oops", ROWS[0]], ['{"a": ', ROWS[0], ROWS[1]]):
        path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines))
        found = [isinstance(row.value, BadRow) for row in iter_rows(path)]
        assert found == [isinstance(each, str) for each in lines]


def test_parquet_and_gzip_are_known_by_their_first_bytes(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.json")
    assert [row.value for row in iter_rows(tmp_path / "rows.json")] == ROWS
    (tmp_path / "corpus.txt").write_bytes(gzip.compress(b"One.\n\nTwo.\n"))
    assert [row.value for row in iter_rows(tmp_path / "corpus.txt")] == [{"text": "One."}, {"text": "Two."}]
    (tmp_path / "unpacked.jsonl.gz").write_text(SHAPES["lines"], encoding="utf-8")
    assert [row.value for row in iter_rows(tmp_path / "unpacked.jsonl.gz")] == ROWS


@pytest.mark.parametrize(
    "magic", [b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\x00", b"BZh91AY", b"ARROW1\0\0", b"7z\xbc\xaf\x27\x1c"]
)
def test_other_archives_are_named_whatever_their_name(magic, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(magic + bytes(100))
    with pytest.raises(InputError, match="rows.jsonl: .*whatever its name says; (unpack|write) it"):
        list(iter_rows(path))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json.gz", "table.csv", "table.parquet", "corpus.txt"])
def test_pointers_of_git_lfs_are_no_text(name, tmp_path):
    path = tmp_path / name
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n")
    with pytest.raises(InputError, match=rf"{name}: a pointer of Git LFS, .*; fetch what it stands for: git lfs pull"):
        list(iter_rows(path))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["corpus.txt", "table.csv"])
def test_json_rows_in_a_text_file_are_refused(shape, name, tmp_path):
    path = tmp_path / name
    path.write_text(SHAPES[shape], encoding="utf-8")
    with pytest.raises(InputError, match=rf"{name}: it holds .*JSON.*rename it to .jsonl"):
        load_records("document", find_sources(str(path)), RecordOptions())


@pytest.mark.parametrize(
    "text", ["[1] A note.\n\n[2] Another.\n", "{braces} in prose\n", '{"a": 1} is an object.\n', "[{x}] and so on.\n"]
)
def test_a_text_that_begins_like_json_is_text(text, tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(text, encoding="utf-8")
    assert "".join(row.value["text"] for row in iter_rows(path)) == text.replace("\n", "")


def test_pipes_sockets_and_devices_are_named(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "rows.json"))
        for path in (tmp_path / "rows.jsonl", tmp_path / "rows.json", tmp_path, "/dev/null"):
            with pytest.raises(InputError, match="a pipe or device, .*write its rows into a file first"):
                find_files(path)


@pytest.mark.parametrize("splits", [False, True])
def test_a_folder_of_save_to_disk_says_how_to_write_a_file(splits, tmp_path):
    data = Dataset.from_list(ROWS)
    (DatasetDict(train=data, test=data) if splits else data).save_to_disk(tmp_path / "saved")
    load = f'load_from_disk("{tmp_path / "saved"}")' + ('["train"]' if splits else "")
    for folder in (tmp_path / "saved", tmp_path):
        with pytest.raises(InputError, match="a data set that datasets.save_to_disk has written") as caught:
            find_files(folder)
        assert load in str(caught.value)


def test_files_that_describe_a_data_set_are_no_rows(tmp_path, caplog):
    (tmp_path / "rows.jsonl").write_text(SHAPES["lines"])
    (tmp_path / "dataset_info.json").write_text('{"rows": {"file_name": "rows.jsonl"}}')
    assert find_files(tmp_path) == [tmp_path / "rows.jsonl"]
    assert "they describe data and hold no rows: dataset_info.json" in caplog.text


def test_held_out_splits_beside_the_training_files_are_named(tmp_path, caplog):
    for name in ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl", "testing.jsonl"):
        (tmp_path / name).write_text(SHAPES["lines"])
    find_sources(str(tmp_path), "--validation_file_dir")
    assert "all are trained on" not in caplog.text
    find_sources(str(tmp_path))
    assert "test-00000-of-00001.jsonl beside the files of training: all are trained on" in caplog.text


def test_a_document_on_each_line_is_told_from_one_document(tiny_model_dir, tmp_path, caplog):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"Line {i} is a document.\n" for i in range(60)), encoding="utf-8")
    said = "corpus.txt: 60 lines without a blank line are one document; if each line is one, pass --document_separator"
    for _ in range(2):  # read, and from the cache
        caplog.clear()
        _, reports = load_records("document", find_sources(str(corpus)), RecordOptions())
        assert said in caplog.text
        assert said in reports["corpus"].to_dict()["remarks"][0]
    with pytest.raises(InputError, match=said):
        run_pt(tiny_model_dir, str(corpus), tmp_path / "out", "--max_steps", "1")

    caplog.clear()
    load_records("document", find_sources(str(corpus)), RecordOptions(), document_separator="line")
    corpus.write_text("A.\nB.\n\n" * 30, encoding="utf-8")
    _, reports = load_records("document", find_sources(str(corpus)), RecordOptions())
    assert reports["corpus"].rows_read == 30
    assert "without a blank line" not in caplog.text


def test_a_large_object_is_found_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK_BYTES", 7)
    path = tmp_path / "rows.jsonl"
    path.write_text(SHAPES["pretty objects"], encoding="utf-8")
    assert [row.value for row in iter_rows(path)] == ROWS
