"""Broken data as a user meets it: the script ends with exit code 2 and one message that says where and what to do.

Every case is a file (or folder) that one of the stage scripts is started on. The expectations are those of the
documentation: file, line, field, what was found, what to do; no traceback, and nothing written.
"""

import errno
import gzip
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stagewise.data import files
from stagewise.run.exit_codes import run_script
from tests.stages import TINY

HI, HELLO = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}
CHAT = {"conversations": [HI, HELLO]}
PAIR = {"system": "", "history": [], "question": "hi", "response_chosen": "hello", "response_rejected": "no"}
TEXT = {"text": "Once upon a time."}
GOOD = {"pt": TEXT, "sft": CHAT, "rm": PAIR, "dpo": PAIR, "ppo": CHAT}
# Some message of every remedy: what to do about the file, or a flag.
REMEDY = re.compile(r"mend|rename|remove|give|pass|put|check the path|save it|raise|--\w+", re.IGNORECASE)

Build = Callable[[Path], str]


@dataclass(frozen=True)
class Broken:
    """What --train_file_dir names, and what the message must hold.

    build: writes it into a folder and returns the path; place: how the message names it, "file:line" where there are
    lines; says: field, finding and remedy.
    """

    stage: str
    build: Build
    place: str
    says: tuple[str, ...]
    flags: tuple[str, ...] = ()


def file(name: str, content: bytes) -> Build:
    def build(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return build


def lines(*rows: dict | str | bytes) -> bytes:
    """Lines of JSON; what is no dict is taken as it is."""
    encoded = (row if isinstance(row, bytes) else row if isinstance(row, str) else json.dumps(row) for row in rows)
    return b"".join((row if isinstance(row, bytes) else row.encode()) + b"\n" for row in encoded)


def third(stage: str, row: dict | str | bytes, *says: str, flags: tuple[str, ...] = ()) -> Broken:
    """A .jsonl file whose third line is bad."""
    good = GOOD[stage]
    return Broken(stage, file("data.jsonl", lines(good, good, row, good)), "data.jsonl:3", says, flags)


def whole(stage: str, name: str, content: bytes, place: str, *says: str, flags: tuple[str, ...] = ()) -> Broken:
    """A file that is bad as a whole."""
    return Broken(stage, file(name, content), place, says, flags)


def chat(*turns: dict, **fields) -> dict:
    return {"conversations": list(turns), **fields}


def gpt(value) -> dict:
    return {"from": "gpt", "value": value}


def pair(**changes) -> dict:
    """PAIR with other values; None takes the key away."""
    return {key: value for key, value in {**PAIR, **changes}.items() if value is not None}


def parquet(rows: list[dict], schema: pa.Schema | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema), sink)
    return sink.getvalue().to_pybytes()


def parquet_with(name: str, column: pa.Array) -> bytes:
    """One document with another column beside its text."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays([pa.array(["Once"]), column], names=["text", name]), sink)
    return sink.getvalue().to_pybytes()


def empty_folder(folder: Path) -> str:
    (folder / "data").mkdir()
    return str(folder / "data")


def folder_of(**contents: bytes) -> Build:
    """A folder "data" with files; "__" in a name stands for a dot."""

    def build(folder: Path) -> str:
        data = Path(empty_folder(folder))
        for name, content in contents.items():
            (data / name.replace("__", ".")).write_bytes(content)
        return str(data)

    return build


def dangling_link(folder: Path) -> str:
    data = Path(folder_of(a__jsonl=lines(CHAT, CHAT))(folder))
    (data / "b.jsonl").symlink_to(folder / "gone.jsonl")
    return str(data)


def circle_of_links(folder: Path) -> str:
    data = Path(folder_of(a__jsonl=lines(CHAT, CHAT))(folder))
    (data / "again").symlink_to(data)
    return str(data)


def same_names(folder: Path) -> str:
    paths = [folder / parent / "law.jsonl" for parent in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(lines(CHAT, CHAT))
    return ",".join(map(str, paths))


MEND = "Mend the file"
ARRAY = json.dumps([CHAT, CHAT, CHAT], indent=1).encode()
PACKED = gzip.compress(b"".join(b'{"question": "%d", "answer": "a"}\n' % n for n in range(30_000)))
DEEP = json.loads('{"a":' * 400 + "1" + "}" * 400)
NOT_ENCODABLE = r'{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "a\ud800b"}]}'

BROKEN = {
    # JSON and its encoding
    "invalid JSON": third("sft", '{"conversations": [}', "invalid JSON", "column 20", MEND),
    "a Python dict": third("sft", "{'conversations': []}", "invalid JSON", "double quotes", "column 2"),
    "a comma too many": third("sft", '{"conversations": [],}', "invalid JSON", "column"),
    "two objects on a line": third("sft", json.dumps(CHAT) * 2, "invalid JSON", "Extra data"),
    "a line cut off": third("pt", '{"text": "Once upon', "invalid JSON", "Unterminated string"),
    "a line break inside a string": third("pt", '{"text": "Once\nupon"}', "invalid JSON"),
    "a NUL byte": third("pt", b'{"text": "Once\0upon"}', "invalid JSON", "control character"),
    "a number": third("sft", "42", "expected an object"),
    "a string": third("pt", '"Once upon a time."', "expected an object"),
    "null": third("rm", "null", "expected an object"),
    "an array on a line": third("sft", json.dumps([CHAT]), "expected an object"),
    "a key twice": third(
        "sft", json.dumps(CHAT)[:-1] + ', "conversations": []}', "the key 'conversations' is there twice"
    ),
    "a key twice inside": third(
        "sft", '{"conversations": [{"from": "human", "value": "a", "value": "b"}]}', "the key 'value' is there twice"
    ),
    "brackets without end": third("sft", '{"conversations": ' + "[" * 100_000, "invalid JSON", "nested too deeply"),
    "a number of 5000 digits": third(
        "sft", json.dumps(CHAT)[:-1] + f', "id": {"9" * 5000}}}', "invalid JSON", "digits"
    ),
    "Latin-1": third("sft", '{"conversations": "é"}'.encode("latin-1"), "invalid UTF-8", "0xe9", "column 20"),
    "a byte order mark in the middle": third("sft", b"\xef\xbb\xbf" + json.dumps(CHAT).encode(), "byte order mark"),
    "UTF-16": whole("sft", "data.jsonl", lines(CHAT).decode().encode("utf-16"), "data.jsonl:1", "UTF-16", "UTF-8"),
    "UTF-16 of CSV": whole("pt", "a.csv", "text\nabc\n".encode("utf-16"), "a.csv:1", "UTF-16", "UTF-8"),
    # arrays
    "an array cut off": whole("sft", "a.json", ARRAY[:-60], "a.json:", "invalid JSON", "rest of the array"),
    "an array without its end": whole("sft", "a.json", ARRAY[:-1], "a.json:", "expected ']'"),
    "an array of strings": whole(
        "sft", "a.json", b'["hi",\n"hello"]', "a.json:1", "expected an object", "1 more bad row"
    ),
    "an array of arrays": whole("sft", "a.json", b"[[1, 2]]", "a.json:1", "expected an object"),
    "an array with a key twice": whole(
        "pt", "a.json", b'[{"text": "a"},\n{"text": "a", "text": "b"}]', "a.json:2", "the key 'text' is there twice"
    ),
    "an empty array": whole("sft", "a.json", b"[]", "a.json", "no rows"),
    "an array in an object": whole("sft", "a.json", b'{"data": [{"text": "a"}]}', "a.json:1", "field 'keys'", "data"),
    "an array with an invalid byte": whole("pt", "a.json", b'[{"text": "\xff"}]', "a.json:1", "invalid UTF-8"),
    # keys
    "other keys": third("sft", {"utterance": "a", "reply": "b"}, "field 'keys'", "utterance", "conversations", MEND),
    "no keys": third("sft", {}, "field 'keys'", "none"),
    "a misspelt key": third("sft", {"conversation": [HI, HELLO]}, "field 'keys'", "conversation", "conversations"),
    "a key that fills the screen": third("sft", {"a\nb" * 1000: ""}, "field 'keys'"),
    "a missing answer": third("sft", {"instruction": "hi", "input": ""}, "field 'keys'", "output"),
    "documents in SFT": third("sft", {"text": "a"}, "field 'keys'", "document"),
    "another format": third("sft", {"instruction": "a", "output": "b"}, "sharegpt", "--allow_mixed"),
    # values
    "null as the text": third("pt", {"text": None}, "field 'text'", "null", "a string"),
    "a list as the text": third("pt", {"text": ["a"]}, "field 'text'", "a list of 1", "a string"),
    "an empty text": third("pt", {"text": "  "}, "field 'text'", "an empty text"),
    "conversations that are null": third("sft", {"conversations": None}, "field 'conversations'", "no turns"),
    "conversations that are a text": third("sft", {"conversations": "hi"}, "field 'conversations'", "'hi'", "JSON"),
    "conversations that are an object": third("sft", {"conversations": HI}, "field 'conversations'", "a list"),
    "no turns": third("sft", chat(), "field 'conversations'", "no turns"),
    "a turn that is a text": third("sft", {"conversations": ["hi"]}, "field 'conversations[0]'", "'hi'", "a turn"),
    "a turn without a value": third("sft", chat(HI, {"from": "gpt"}), "field 'conversations[1].value'", "null"),
    "a turn without a role": third("sft", chat(HI, {"value": "a"}), "field 'conversations[1].role'", "null"),
    "a null answer": third("sft", chat(HI, gpt(None)), "field 'conversations[1].value'", "null", "a string"),
    "a number as the answer": third(
        "sft", chat(HI, gpt(42)), "field 'conversations[1].value'", "a number", "a string"
    ),
    "a content in parts": third(
        "sft",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        *("field 'messages[0].content'", "a list of 1", "a string"),
        flags=("--allow_mixed", "True"),
    ),
    "an empty answer": third("sft", chat(HI, gpt("")), "field 'conversations[1].value'", "an empty text", "an answer"),
    "a blank answer": third(
        "sft", chat(HI, gpt(" \n")), "field 'conversations[1].value'", "an empty text", "an answer"
    ),
    "an empty question": third(
        "sft", chat({"from": "human", "value": ""}, HELLO), "conversations[0].value", "a question"
    ),
    "an unknown role": third(
        "sft", chat({"from": "alice", "value": "hi"}, HELLO), "conversations[0].from", "'alice'", "human"
    ),
    "roles out of order": third("sft", chat(HI, HELLO, HELLO), "conversations[2].value", "an assistant turn after"),
    "two questions": third("sft", chat(HI, HI, HELLO), "conversations[1].value", "a user turn after a user turn"),
    "an answer first": third(
        "sft", chat(HELLO, HI, HELLO), "conversations[0].value", "an assistant turn after the beginning"
    ),
    "no answer": third("sft", chat(HI), "conversations[0].value", "no assistant turn", "at least one answer"),
    "a system turn in the middle": third(
        "sft", chat(HI, HELLO, {"from": "system", "value": "s"}, HI, HELLO), "conversations[2].value", "a system turn"
    ),
    "half a character": third("sft", NOT_ENCODABLE, "conversations[1].value", r"lone surrogate (\ud800)", "UTF-8"),
    "half a character in a document": third("pt", r'{"text": "\udc00"}', "field 'text'", "lone surrogate"),
    "a control token": third("sft", chat(HI, gpt("<|im_end|>")), "<|im_end|>", "--keep_control_tokens"),
    "a placeholder": third("sft", chat(HI, gpt("I am <NAME>.")), "placeholder <NAME>", "--assistant_name"),
    "tools that are no JSON": third("sft", chat(HI, HELLO, tools="[{"), "field 'tools'", "'[{'", "JSON"),
    "a tool without a name": third("sft", chat(HI, HELLO, tools=[{"type": "function"}]), "field 'tools[0]'", "name"),
    "a description that is a list": third(
        "sft", chat(HI, HELLO, tools=[{"name": "f", "description": ["a"]}]), "field 'tools[0].description'", "a string"
    ),
    "tools nested too deeply": third(
        "sft", chat(HI, HELLO, tools=[{"name": "f", "parameters": DEEP}]), "field 'tools'", "levels deep"
    ),
    "infinity in tools": third("sft", chat(HI, HELLO, tools='[{"name": "f", "x": 1e999}]'), "field 'tools'", "JSON"),
    "a call that is no JSON": third(
        "sft", chat(HI, {"from": "function_call", "value": "f()"}, HI, HELLO), "conversations[1].value", "JSON"
    ),
    "half a history": third(
        "sft",
        {"instruction": "a", "output": "b", "history": [["q"]]},
        "field 'history[0]'",
        "a pair",
        flags=("--allow_mixed", "True"),
    ),
    "no room for the answer": third(
        "sft", chat({"from": "human", "value": "why " * 200}, HELLO), "no trained token left", "--model_max_length"
    ),
    # preferences
    "equal answers": third(
        "rm", pair(response_rejected="hello"), "field 'response_rejected'", "the same text", "different"
    ),
    "an empty chosen": third("rm", pair(response_chosen=""), "field 'response_chosen'", "an empty text", "an answer"),
    "no rejected": third("dpo", pair(response_rejected=None), "field 'keys'", "response_rejected"),
    "no question": third("rm", pair(question=""), "field 'question'", "an empty text", "a question"),
    "no prompt": third(
        "dpo",
        {"chosen": "a", "rejected": "b"},
        "field 'chosen'",
        "without a question",
        "prompt",
        flags=("--allow_mixed", "True"),
    ),
    "a margin in words": third("rm", pair(margin="large"), "field 'margin'", "'large'", "a finite number"),
    "a margin of NaN": third("rm", json.dumps(pair(margin=float("nan"))), "field 'margin'", "a finite number"),
    "SFT rows in DPO": whole(
        "dpo", "a.jsonl", lines(CHAT, CHAT), "a.jsonl:1", "field 'keys'", "chosen", "1 more bad row"
    ),
    "a question too long for a pair": third("rm", pair(question="why " * 200), "does not fit", "--model_max_length"),
    # prompts
    "no question for the policy": third("ppo", chat(HELLO), "field 'conversations[0].value'", "a question"),
    "only a system text for the policy": third(
        "ppo", chat({"from": "system", "value": "s"}, HELLO), "conversations[0].value", "a system turn"
    ),
    "documents in PPO": whole("ppo", "a.jsonl", lines(TEXT), "a.jsonl:1", "field 'keys'", "conversations"),
    # CSV
    "CSV without the answers": whole(
        "sft", "a.csv", b"question,topic\na,b\n", "a.csv:2", "field 'keys'", "topic", "answer"
    ),
    "CSV with ragged rows": whole(
        "sft", "a.csv", b"question,answer\na,b\na,b,c\n", "a.csv:3", "3 fields", "expected 2"
    ),
    "CSV with an open quote": whole(
        "sft", "a.csv", b'question,answer\na,b\n"a,b\na,b\n', "a.csv:3", "never closed", MEND
    ),
    "CSV with a column twice": whole("sft", "a.csv", b"question,answer,answer\na,b,c\n", "a.csv:1", "'answer'"),
    "CSV with NUL bytes": whole("sft", "a.csv", b"question,answer\na,b\nc,\0\0\n", "a.csv:3", "NUL"),
    "CSV with an invalid byte": whole("sft", "a.csv", b"question,answer\na,b\nc,\xff\n", "a.csv:3", "invalid UTF-8"),
    "CSV with an invalid header": whole(
        "sft", "a.csv", b"question,answer,\xff,\xff\na,b,c,d\n", "a.csv:1", "invalid UTF-8"
    ),
    "CSV with an empty cell": whole(
        "sft", "a.csv", b"question,answer\na,b\nc,\n", "a.csv:3", "field 'answer'", "an empty text"
    ),
    "CSV of a header alone": whole("sft", "a.csv", b"question,answer\n", "a.csv", "no rows"),
    # packed and columnar files
    "gzip cut off": whole("sft", "a.jsonl.gz", PACKED[: len(PACKED) // 2], "a.jsonl.gz:", "damaged gzip", MEND),
    "gzip with a flipped byte": whole(
        "sft", "a.jsonl.gz", PACKED[:-6] + b"\0\0" + PACKED[-4:], "a.jsonl.gz:", "damaged gzip"
    ),
    "gzip of nothing": whole("sft", "a.jsonl.gz", gzip.compress(b""), "a.jsonl.gz", "no rows"),
    "no Parquet": whole("sft", "a.parquet", lines(CHAT), "a.parquet:1", "damaged Parquet"),
    "Parquet cut off": whole("sft", "a.parquet", parquet([CHAT] * 9)[:-9], "a.parquet:1", "damaged Parquet", MEND),
    "Parquet with a null": whole(
        "pt", "a.parquet", parquet([TEXT, {"text": None}]), "a.parquet:2", "field 'text'", "null"
    ),
    "Parquet of bytes": whole("pt", "a.parquet", parquet([{"text": b"a"}]), "a.parquet:1", "field 'text'", "bytes"),
    "Parquet with a column twice": whole(
        "pt", "a.parquet", parquet_with("text", pa.array(["a"])), "a.parquet:1", "two columns", "'text'"
    ),
    "Parquet with a date after 9999": whole(
        "pt",
        "a.parquet",
        parquet_with("day", pa.array([2**31 - 1], pa.date32())),
        "a.parquet:1",
        "damaged Parquet",
        "magnitude",
    ),
    "Parquet without rows": whole(
        "pt", "a.parquet", parquet([], pa.schema({"text": pa.string()})), "a.parquet", "no rows"
    ),
    # text
    "text that is not UTF-8": whole("pt", "a.txt", b"one\n\ntwo\xff\n", "a.txt:3", "invalid UTF-8", "0xff"),
    "UTF-16 that passes for UTF-8": whole("pt", "a.txt", "one\n".encode("utf-16-le"), "a.txt:1", "NUL", "UTF-16"),
    "text of blank lines": whole("pt", "a.txt", b"\n \n\t\n", "a.txt", "no rows"),
    # files and folders
    "an empty file": whole("sft", "a.jsonl", b"", "a.jsonl", "the file is empty"),
    "an empty text file": whole("pt", "a.txt", b"", "a.txt", "the file is empty"),
    "blank lines only": whole("sft", "a.jsonl", b"\n\n  \n", "a.jsonl", "no rows"),
    "an unknown type": whole("sft", "a.docx", b"x", "a.docx", "type is not known", ".jsonl"),
    "an empty folder": Broken("sft", empty_folder, "data", ("the directory is empty", ".jsonl")),
    "a folder of other files": Broken("sft", folder_of(a__docx=b"x"), "data", ("a.docx", ".jsonl")),
    "an empty file in a folder": Broken(
        "sft", folder_of(a__jsonl=lines(CHAT), b__jsonl=b""), "b.jsonl", ("the file is empty",)
    ),
    "a bad row in the second file": Broken(
        "sft", folder_of(a__jsonl=lines(CHAT), b__jsonl=lines(CHAT, "{")), "b.jsonl:2", ("invalid JSON",)
    ),
    "a missing path": Broken("sft", lambda folder: str(folder / "gone"), "gone", ("no such file", "check the path")),
    "a missing home": Broken(
        "sft",
        lambda folder: "~nobody-of-that-name/a.jsonl",
        "~nobody-of-that-name",
        ("no such file", "check the path"),
    ),
    "a list of missing files": Broken(
        "sft", lambda folder: ",".join(f"part-{n}.jsonl" for n in range(99)), "part-0.jsonl", ("no such file",)
    ),
    "an empty path": Broken("sft", lambda folder: f"{folder},", "--train_file_dir", ("none of them empty",)),
    "a dangling link": Broken("sft", dangling_link, "b.jsonl", ("a link", "gone.jsonl")),
    "a circle of links": Broken("sft", circle_of_links, "again", ("a link", "that it lies in")),
    "two files of one name": Broken("sft", same_names, "law.jsonl", ("'law'", "rename")),
}


def start(stage: str, path: str, model_dir: str, output: Path, *flags: str) -> None:
    """Run a script as the shell would, on the data at `path`."""
    import dpo_training
    import ppo_training
    import pretraining
    import reward_modeling
    import supervised_finetuning

    main, own = {
        "pt": (pretraining.main, ["--block_size", "64"]),
        "sft": (supervised_finetuning.main, ["--model_max_length", "128"]),
        "rm": (reward_modeling.main, ["--max_length", "128"]),
        "dpo": (dpo_training.main, ["--max_length", "128"]),
        "ppo": (ppo_training.main, ["--max_prompt_length", "128", "--max_new_tokens", "8"]),
    }[stage]
    if stage != "pt":
        own = ["--template_name", "chatml", *own]
    if stage == "ppo":
        own = ["--reward_function", "builtins:len", *own]
    run_script(
        lambda: main(
            ["--model_name_or_path", model_dir, "--train_file_dir", path, "--output_dir", str(output)]
            + [*TINY, *own, *flags]
        )
    )


def message_of(capsys, *call) -> str:
    """What the run that fails says at its end; everything that a user error must be is checked here."""
    with pytest.raises(SystemExit) as caught:
        start(*call)
    stderr = capsys.readouterr().err
    assert caught.value.code == 2
    assert "Traceback" not in stderr
    assert stderr.count("error: ") == 1
    message = stderr[stderr.index("error: ") :].strip()
    assert len(message.splitlines()) <= 2
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_data(kind, tiny_model_dir, tmp_path, capsys):
    case = BROKEN[kind]
    message = message_of(capsys, case.stage, case.build(tmp_path), tiny_model_dir, tmp_path / "out", *case.flags)
    for text in (case.place, *case.says):
        assert text in message
    assert REMEDY.search(message)
    assert not (tmp_path / "out").exists()


# Three kinds of failure: of a line, of a value, of a file; each is found by another part of the code.
THREE = ("invalid JSON", "a null answer", "a Python dict")
STREAM = ("--streaming", "True", "--max_steps", "2", "--do_train", "True", "--train_sampling_strategy", "sequential")


@pytest.mark.parametrize(
    "flags",
    [("--dry_run", "True"), STREAM, ("--preprocessing_num_workers", "2"), ("--max_samples_per_dataset", "100000")],
    ids=lambda flags: flags[0],
)
@pytest.mark.parametrize("kind", THREE)
def test_it_is_the_same_message_however_the_data_is_read(kind, flags, tiny_model_dir, tmp_path, capsys):
    """But for how many rows are bad, which a stream does not know."""
    case = BROKEN[kind]
    message = message_of(capsys, case.stage, case.build(tmp_path), tiny_model_dir, tmp_path / "out", *flags)
    for text in (case.place, *case.says):
        assert text in message
    assert not (tmp_path / "out").exists()


def test_workers_report_the_first_bad_row_of_several_files(tiny_model_dir, tmp_path, capsys):
    folder = folder_of(a__jsonl=lines(CHAT, CHAT), b__jsonl=lines(CHAT, "{"), c__jsonl=lines("[", CHAT))(tmp_path)
    flags = ("--preprocessing_num_workers", "2")
    message = message_of(capsys, "sft", folder, tiny_model_dir, tmp_path / "out", *flags)
    assert "b.jsonl:2: invalid JSON" in message
    assert "1 more bad row among the 6 rows" in message
    assert not (tmp_path / "out").exists()


def test_skipping_names_the_first_ten_of_twelve_bad_rows(tiny_model_dir, tmp_path):
    """Every tenth of 120 lines is bad: exactly the share that may be skipped."""
    bad = [chat(HI, gpt(None)), "{"] * 6
    rows = [bad[n // 10] if n % 10 == 9 else chat(HI, gpt(f"answer {n}")) for n in range(120)]
    path = file("data.jsonl", lines(*rows))(tmp_path)
    start("sft", path, tiny_model_dir, tmp_path / "out", "--on_bad_row", "skip", "--max_steps", "1")
    report = json.loads((tmp_path / "out" / "data_report.json").read_text(encoding="utf-8"))
    found = report["train"]["datasets"]["data"]
    assert (found["rows_read"], found["rows_bad"], found["rows_kept"]) == (120, 12, 108)
    assert sorted(found["reasons"].values()) == [6, 6]
    assert [location.split(": ")[0] for location in found["first_bad"]] == [f"{path}:{n}" for n in range(10, 101, 10)]
    assert "conversations[1].value" in found["first_bad"][0]
    assert "invalid JSON" in found["first_bad"][1]


@pytest.mark.parametrize("flags", [(), STREAM], ids=["read", "streamed"])
def test_more_than_a_tenth_is_not_skipped(flags, tiny_model_dir, tmp_path, capsys):
    path = file("data.jsonl", lines(*[CHAT] * 17, "{", "{"))(tmp_path)
    message = message_of(capsys, "sft", path, tiny_model_dir, tmp_path / "out", "--on_bad_row", "skip", *flags)
    for text in ("2 of 19 rows", "10%", "2 x invalid JSON", "data.jsonl:18", MEND):
        assert text in message
    assert not (tmp_path / "out").exists()


def test_the_rest_of_a_broken_file_is_not_skipped(tiny_model_dir, tmp_path, capsys):
    path = file("data.json", json.dumps([CHAT] * 50).encode()[:-3])(tmp_path)
    message = message_of(capsys, "sft", path, tiny_model_dir, tmp_path / "out", "--on_bad_row", "skip")
    for text in ("data.json:1: invalid JSON", "nobody knows how many are lost", "mend the file"):
        assert text in message
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tiny_model_dir, tmp_path, capsys):
    path = file("data.jsonl", lines(CHAT, CHAT))(tmp_path)
    Path(path).chmod(0)
    message = message_of(capsys, "sft", path, tiny_model_dir, tmp_path / "out")
    assert f"{path}: no permission to read the file" in message


def test_a_disk_that_fails(tiny_model_dir, tmp_path, capsys, monkeypatch):
    """The cache of checked rows is built inside `datasets`, which wraps what goes wrong there."""

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    path = file("data.jsonl", lines(CHAT, CHAT))(tmp_path)
    monkeypatch.setattr(files, "_json_object", fails)
    message = message_of(capsys, "sft", path, tiny_model_dir, tmp_path / "out")
    assert f"{path}: the file cannot be read (Input/output error)" in message
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_listed(tiny_model_dir, tmp_path, capsys, monkeypatch):
    """Its rows would be missing without a word."""
    folder = Path(folder_of(a__jsonl=lines(CHAT, CHAT))(tmp_path))
    closed = folder / "closed"
    closed.mkdir()
    scandir = os.scandir

    def refuses(path):
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(closed))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    message = message_of(capsys, "sft", str(folder), tiny_model_dir, tmp_path / "out")
    assert f"{closed}: the directory cannot be read (Permission denied)" in message


def test_a_linked_folder_is_read(tmp_path):
    folder = Path(empty_folder(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jsonl").write_bytes(lines(CHAT))
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    assert files.find_files(folder) == [folder / "link" / "a.jsonl"]


def test_a_name_that_is_not_utf8(tiny_model_dir, tmp_path, capsys):
    """As an archive from a GBK system leaves them."""
    folder = empty_folder(tmp_path)
    Path(os.fsdecode(os.fsencode(folder) + b"/\xb2\xe2.jsonl")).write_bytes(lines(*[CHAT] * 20, "{"))
    message = message_of(capsys, "sft", folder, tiny_model_dir, tmp_path / "out")
    assert r"\xb2\xe2.jsonl:21: invalid JSON" in message
    start("sft", folder, tiny_model_dir, tmp_path / "out", "--on_bad_row", "skip", "--max_steps", "1")
    report = json.loads((tmp_path / "out" / "data_report.json").read_text(encoding="utf-8"))
    assert report["train"]["datasets"]["data"]["files"] == [rf"{folder}/\xb2\xe2.jsonl"]
