"""convert_dataset.py: every form in, both forms out and back again; rejected rows, exit codes, no half files."""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import convert_dataset
from stagewise.data.records import Conversation, PreferencePair, RecordOptions
from stagewise.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "convert_dataset.py"

HUMAN = {"from": "human", "value": "hi"}
GPT = {"from": "gpt", "value": "hello"}
HELLO = {"conversations": [HUMAN, GPT]}


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]


def convert(in_file, out_file, *flags):
    return convert_dataset.main(["--in_file", str(in_file), "--out_file", str(out_file), *flags])


def converted(tmp_path, rows, *flags):
    counts = convert(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", *flags)
    assert counts["rows_kept"] == counts["rows_read"] == len(rows)
    return read(tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("data_type", "row", "expected"),
    [
        ("alpaca", {"instruction": "hi", "input": "", "output": "hello", "id": 3}, HELLO),
        (
            "alpaca",
            {"instruction": "Add.", "input": "1 1", "output": "2", "system": "s", "history": [["a", "b"]]},
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b"},
                    {"from": "human", "value": "Add.\n1 1"},
                    {"from": "gpt", "value": "2"},
                ]
            },
        ),
        ("qa", {"question": "hi", "answer": "hello"}, HELLO),
        ("qa", {"input": "hi", "output": "hello", "reference": ["Article 1"]}, HELLO),
        ("sharegpt", {"id": "x", "conversations": [{"from": "user", "value": "hi"}, GPT]}, HELLO),
        (
            "messages",
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
            HELLO,
        ),
        ("mft", {"chat_rounds": [{"role": "human", "content": "hi"}, {"role": "bot", "content": "hello"}]}, HELLO),
        (
            "preference",
            {"conversations": [HUMAN], "chosen": GPT, "rejected": "no"},
            {"system": "", "history": [], "question": "hi", "response_chosen": "hello", "response_rejected": "no"},
        ),
        (
            "preference",
            {
                "prompt": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "hi"},
                ],
                "chosen": "hello",
                "rejected": "no",
                "margin": 2,
            },
            {
                "system": "s",
                "history": [["a", "b"]],
                "question": "hi",
                "response_chosen": "hello",
                "response_rejected": "no",
                "margin": 2.0,
            },
        ),
    ],
)
def test_every_data_type_becomes_the_familys_form(tmp_path, data_type, row, expected):
    assert converted(tmp_path, [row], "--data_type", data_type) == [expected]
    assert converted(tmp_path, [row], "--data_type", "auto", "--overwrite") == [expected]


CALLING = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "clear", "tool_call_id": "1"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [{"name": "f", "arguments": "{}"}]},
        {"role": "tool", "content": "clear"},
        {"role": "assistant", "content": "Clear.", "reasoning_content": "It says clear."},
    ],
    "tools": [{"name": "f", "parameters": {}}],
}
PAIR = {"prompt": [{"role": "user", "content": "Weather?"}], "chosen": "a", "rejected": "b", "margin": 0.5}


@pytest.mark.parametrize(
    "row", [CALLING, {"instruction": "é\u2028\n", "output": "<NAME>"}, {"query": "a", "response": "b"}]
)
@pytest.mark.parametrize("out_format", ["sharegpt", "messages"])
def test_conversations_survive_the_round_trip(tmp_path, row, out_format):
    options = RecordOptions(keep_placeholders=True)
    (line,) = converted(tmp_path, [row], "--data_type", "auto", "--out_format", out_format)
    assert Conversation.from_row(line, options) == Conversation.from_row(row, options)
    assert list(line)[0] == {"sharegpt": "conversations", "messages": "messages"}[out_format]


@pytest.mark.parametrize("out_format", ["sharegpt", "messages"])
def test_preferences_survive_the_round_trip(tmp_path, out_format):
    (line,) = converted(tmp_path, [PAIR], "--data_type", "preference", "--out_format", out_format)
    assert PreferencePair.from_row(line) == PreferencePair.from_row(PAIR)


def test_preferences_that_the_familys_columns_cannot_hold(tmp_path):
    row = PAIR | {"tools": [{"name": "f"}]}
    with pytest.raises(InputError, match=r"in.jsonl:1: .*found tools, .*--out_format messages"):
        converted(tmp_path, [row], "--data_type", "preference")
    (line,) = converted(tmp_path, [row], "--data_type", "preference", "--out_format", "messages")
    assert PreferencePair.from_row(line) == PreferencePair.from_row(row)


def test_tool_calls_become_function_call_turns(tmp_path):
    rows = [{"messages": [*CALLING["messages"][1:4], CALLING["messages"][6]], "tools": CALLING["tools"]}]
    (line,) = converted(tmp_path, rows, "--data_type", "messages")
    assert line["conversations"][1] == {
        "from": "function_call",
        "value": '{"id": "1", "name": "f", "arguments": {"x": 1}}',
    }
    assert json.loads(line["tools"]) == [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def test_options_of_the_rows(tmp_path):
    law = {"input": "hi", "output": "I am <NAME> by {{author}}", "reference": ["Article 1"]}
    flags = ["--data_type", "qa", "--use_reference", "--assistant_name", "Ada", "--assistant_author", "us"]
    (line,) = converted(tmp_path, [law], *flags)
    assert [turn["value"] for turn in line["conversations"]] == ["Article 1\nhi", "I am Ada by us"]
    (line,) = converted(tmp_path, [law], "--data_type", "qa", "--overwrite")
    assert [turn["value"] for turn in line["conversations"]] == ["hi", "I am <NAME> by {{author}}"]
    with pytest.raises(InputError, match="--assistant_author"):
        converted(tmp_path, [law], "--data_type", "qa", "--assistant_name", "Ada", "--overwrite")


ALPACA = [{"instruction": f"question {each}, é", "input": "", "output": f"two\nlines {each}"} for each in range(3)]


def write_csv(path):
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(ALPACA[0]))
        writer.writeheader()
        writer.writerows(ALPACA)


WRITERS = {
    "in.jsonl": lambda path: write(path, ALPACA),
    "in.json": lambda path: path.write_text(json.dumps(ALPACA, indent=1), encoding="utf-8"),
    "in.csv": write_csv,
    "in.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ALPACA), path),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_every_file_type_gives_the_same(tmp_path, name, packed):
    path = tmp_path / name
    WRITERS[name](path)
    if packed:
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    convert(path, tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl") == [
        {
            "conversations": [
                {"from": "human", "value": row["instruction"]},
                {"from": "gpt", "value": row["output"]},
            ]
        }
        for row in ALPACA
    ]


def test_a_directory_is_converted_into_one_file(tmp_path):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "b.jsonl", ALPACA[2:])
    write(tmp_path / "set" / "a.jsonl", ALPACA[:2])
    counts = convert(tmp_path / "set", tmp_path / "out.jsonl")
    assert counts["rows_read"] == 3
    assert [row["conversations"][0]["value"][:10] for row in read(tmp_path / "out.jsonl")] == [
        "question 0",
        "question 1",
        "question 2",
    ]


# --- rejected rows ---------------------------------------------------------------------------------------------------


def rows_with_two_bad(rows=40):
    good = [{"instruction": f"q{each}", "output": "a"} for each in range(rows)]
    good[4] = {"instruction": "q4", "output": None}
    good[9] = {"question": "q9", "answer": "a"}
    return good


def test_a_rejected_row_is_an_error_and_nothing_is_written(tmp_path, capsys):
    path = write(tmp_path / "in.jsonl", rows_with_two_bad())
    with pytest.raises(InputError) as caught:
        convert(path, tmp_path / "out.jsonl")
    assert str(caught.value).startswith(
        f"{path}:5: field 'output': found null, expected a string; 1 more bad row among the 40 rows read"
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl"]
    assert capsys.readouterr().err.splitlines() == [
        f"rejected: {path}:5: field 'output': found null, expected a string",
        f"rejected: {path}:10: field 'keys': found an object with the keys answer, question, "
        "expected those of the format alpaca: instruction + output",
    ]


def test_rejected_rows_can_be_skipped(tmp_path, capsys):
    path = write(tmp_path / "in.jsonl", rows_with_two_bad())
    counts = convert(path, tmp_path / "out.jsonl", "--on_bad_row", "skip")
    assert (counts["rows_read"], counts["rows_kept"], counts["rows_bad"]) == (40, 38, 2)
    assert len(read(tmp_path / "out.jsonl")) == 38
    output = capsys.readouterr()
    assert output.out == f"38 of 40 rows written to {tmp_path}/out.jsonl\n"
    assert [line.split(": ")[1] for line in output.err.splitlines()] == [f"{path}:5", f"{path}:10"]


def test_more_than_a_tenth_is_not_skipped(tmp_path):
    path = write(tmp_path / "in.jsonl", rows_with_two_bad(12))
    with pytest.raises(InputError, match="2 of 12 rows are bad, and more than 10% are not skipped"):
        convert(path, tmp_path / "out.jsonl", "--on_bad_row", "skip")
    assert not (tmp_path / "out.jsonl").exists()


def test_many_rejected_rows_are_summed_up(tmp_path, capsys):
    rows = [{"instruction": "q", "output": ""}] * 13
    with pytest.raises(InputError):
        converted(tmp_path, rows)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[-1] == "rejected: 3 more rows"


def test_broken_lines_are_rejected_rows(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b'{"instruction": "a", "output": "b"}\n{"instruction": \n{"instruction": "\xff", "output": "b"}\n'
    )
    with pytest.raises(InputError, match=r"in.jsonl:2: invalid JSON.*1 more bad row"):
        convert(path, tmp_path / "out.jsonl")


def test_an_array_that_breaks_off_is_not_skipped(tmp_path):
    path = tmp_path / "in.json"
    path.write_text(json.dumps(ALPACA * 10)[:-3])
    with pytest.raises(InputError, match="nobody knows how many are lost"):
        convert(path, tmp_path / "out.jsonl", "--on_bad_row", "skip")


@pytest.mark.parametrize("second", [{"prompt": "a", "response": "b"}, PAIR])
def test_auto_keeps_to_the_form_of_the_first_row(tmp_path, second):
    rows = [{"instruction": "a", "output": "b"}, second]
    with pytest.raises(InputError, match=r"in.jsonl:2: field 'keys': found"):
        converted(tmp_path, rows, "--data_type", "auto")
    flags = ["--data_type", "auto", "--allow_mixed"]
    if second is PAIR:
        with pytest.raises(InputError, match=r"in.jsonl:2: .*the format preference_trl, a preference"):
            converted(tmp_path, rows, *flags)
    else:
        assert len(converted(tmp_path, rows, *flags)) == 2


def test_qa_refuses_other_formats_and_documents_are_no_chat(tmp_path):
    with pytest.raises(InputError, match="found a row of the format sharegpt, expected one of qa, law"):
        converted(tmp_path, [HELLO], "--data_type", "qa")
    with pytest.raises(InputError, match="found a document, expected a conversation or a preference"):
        converted(tmp_path, [{"text": "a"}], "--data_type", "auto")


# --- the output file -------------------------------------------------------------------------------------------------


def test_the_output_file_is_protected(tmp_path):
    path = write(tmp_path / "in.jsonl", ALPACA)
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    for same in (path, link):
        with pytest.raises(InputError, match="is an input file; it would be written while it is read"):
            convert(path, same, "--overwrite")
    out = write(tmp_path / "out.jsonl", [{"old": True}])
    with pytest.raises(InputError, match="out.jsonl exists; pass --overwrite to replace it"):
        convert(path, out)
    assert read(out) == [{"old": True}]
    with pytest.raises(InputError, match=r"expected a name that ends with .jsonl"):
        convert(path, tmp_path / "out.parquet")
    with pytest.raises(InputError, match="the directory .*nowhere does not exist"):
        convert(path, tmp_path / "nowhere" / "out.jsonl")
    convert(path, out, "--overwrite")
    assert len(read(out)) == 3
    assert len(read(path)) == 3


def test_a_failure_leaves_the_old_output_as_it_was(tmp_path):
    path = write(tmp_path / "in.jsonl", [*ALPACA, {"instruction": "q", "output": ""}])
    out = write(tmp_path / "out.jsonl", [{"old": True}])
    with pytest.raises(InputError):
        convert(path, out, "--overwrite")
    assert read(out) == [{"old": True}]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_no_rows_is_an_error(tmp_path):
    (tmp_path / "in.csv").write_text("instruction,output\n")
    with pytest.raises(InputError, match="holds no rows"):
        convert(tmp_path / "in.csv", tmp_path / "out.jsonl")


# --- as a command ----------------------------------------------------------------------------------------------------


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_exit_code_2_with_a_message_and_no_traceback(tmp_path):
    path = write(tmp_path / "in.jsonl", rows_with_two_bad())
    result = run("--in_file", path, "--out_file", tmp_path / "out.jsonl")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: {path}:5: field 'output': found null, expected a string")
    assert "Traceback" not in result.stderr
    assert run("--in_file", path, "--out_file", tmp_path / "o.jsonl", "--data_type", "xml").returncode == 2
    assert run("--in_f", path, "--out_file", tmp_path / "o.jsonl").returncode == 2


def test_exit_code_0(tmp_path):
    result = run("--in_file", write(tmp_path / "in.jsonl", ALPACA), "--out_file", tmp_path / "out.jsonl")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"3 of 3 rows written to {tmp_path}/out.jsonl\n"


def test_neither_torch_nor_transformers_nor_datasets_is_imported(tmp_path):
    path = write(tmp_path / "in.jsonl", ALPACA)
    code = (
        "import sys, convert_dataset\n"
        f"convert_dataset.main(['--in_file', {str(path)!r}, '--out_file', {str(tmp_path / 'out.jsonl')!r}])\n"
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
