"""Rows as others write them: weights, reasoning, calls of 2023, null keys, further columns, special tokens as text."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stagewise.columns import parse_columns
from stagewise.data.records import (
    Conversation,
    Document,
    PreferencePair,
    Prompt,
    RecordOptions,
    RowError,
    check_columns,
)
from stagewise.data.sources import find_sources, load_hub_dataset, load_records, stream_records
from stagewise.data.tokenization import (
    EncodingOptions,
    TemplateRenderer,
    encode_conversations,
    encode_or_drop,
    special_tokens,
)
from stagewise.errors import InputError
from template import get_template
from tests.stages import run_pt, run_sft


def messages(*turns: dict) -> dict:
    return {"messages": list(turns)}


def user(text: str = "How?", **more) -> dict:
    return {"role": "user", "content": text, **more}


def answer(text: str = "So.", **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def chatml(tokenizer):
    return TemplateRenderer(get_template("chatml"), tokenizer)


# --- weights ---------------------------------------------------------------------------------------------------------

UNTRAINED = [
    {"weight": 0},
    {"weight": 0.0},
    {"loss_weight": 0.0},
    {"loss": False},
    {"loss_scale": 0},
    {"train": False},
    {"training": False},
    {"trainable": False},
]


@pytest.mark.parametrize("mark", UNTRAINED, ids=lambda mark: next(iter(mark)))
@pytest.mark.parametrize("form", ["messages", "sharegpt"])
def test_an_answer_of_weight_0_is_read_and_not_trained(mark, form, chatml, tokenizer):
    turns = [user(), answer("WRONG", **mark), user("No."), answer("RIGHT")]
    row = messages(*turns)
    if form == "sharegpt":
        names = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
        renamed = [{names.get(key, key): names.get(value, value) for key, value in turn.items()} for turn in turns]
        row = {"conversations": renamed}
    (encoded,) = encode_conversations([Conversation.from_row(row)], chatml, tokenizer, EncodingOptions(200))
    assert "WRONG" in tokenizer.decode(encoded.input_ids)
    assert tokenizer.decode([label for label in encoded.labels if label >= 0]) == "RIGHT<|im_end|>"


def test_weight_0_holds_with_every_token_trained_and_when_rounds_are_cut(chatml, tokenizer):
    row = messages(user(), answer("WRONG", weight=0), user("No."), answer("RIGHT", weight=1), user(), answer("x" * 99))
    conversation = Conversation.from_row(row)
    assert [message.get("weight") for message in conversation.messages] == [None, 0, None, None, None, None]

    options = EncodingOptions(500, train_on_prompt=True)
    (whole,) = encode_conversations([conversation], chatml, tokenizer, options)
    left_out = [token for token, label in zip(whole.input_ids, whole.labels, strict=True) if label < 0]
    assert tokenizer.decode(left_out) == "WRONG<|im_end|>"

    (cut,) = encode_conversations([conversation], chatml, tokenizer, EncodingOptions(len(whole.input_ids) - 50))
    assert cut.truncated == "turns"
    assert tokenizer.decode([label for label in cut.labels if label >= 0]) == "RIGHT<|im_end|>"


def test_train_on_last_with_a_last_answer_of_weight_0_says_so(chatml, tokenizer):
    conversation = Conversation.from_row(messages(user(), answer(), user(), answer(weight=0)))
    (row,) = encode_or_drop([conversation], chatml, tokenizer, EncodingOptions(200, train_on="last"))
    assert "weight 0" in row.dropped


@pytest.mark.parametrize(
    ("row", "field", "found"),
    [
        (messages(user(), answer(weight=0.5)), "messages[1].weight", "a number"),
        (messages(user(), answer(weight="0")), "messages[1].weight", "'0'"),
        (messages(user(), answer(weight=0, train=True)), "messages[1].train", "another weight than in weight"),
        (messages(user(), answer(weight=0)), "messages[1].content", "weight 0 in every answer"),
        (messages(user(weight=1), answer()), "messages[0].content", "weight 1 in a user turn"),
        (
            messages(user(), answer(train_detail=[{"begin_offset": 0}])),
            "messages[1].train_detail",
            "parts of an answer",
        ),
    ],
)
def test_weights_that_cannot_be_honoured_are_refused(row, field, found):
    with pytest.raises(RowError, match=found) as caught:
        Conversation.from_row(row)
    assert caught.value.field == field


def test_weight_0_elsewhere():
    assert Conversation.from_row(messages(user(loss_weight=0.0), answer(loss_weight=1.0))).messages == [
        user(),
        answer(),
    ]
    asked = Prompt.from_row(messages(user(), answer(weight=0), user("And?")))
    assert asked.messages == [user(), answer(), user("And?")]
    pair = {"prompt": "How?", "chosen": [answer("a", weight=0)], "rejected": [answer("b")]}
    with pytest.raises(RowError, match="weight 0"):
        PreferencePair.from_row(pair)


# --- reasoning, calls, parts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_read_under_each_of_its_names(key):
    turn = Conversation.from_row(messages(user(thinking=None), answer(**{key: "because"}))).messages[1]
    assert turn == answer(reasoning_content="because")
    row = {"question": "How?", "answer": "So.", key: "because"}
    assert Conversation.from_row(row).messages[1] == answer(reasoning_content="because")


def test_two_reasonings_and_reasoning_of_a_question_are_refused():
    both = answer(thinking="a", reasoning="a")
    assert Conversation.from_row(messages(user(), both)).messages[1]["reasoning_content"] == "a"
    with pytest.raises(RowError, match="another text than in thinking"):
        Conversation.from_row(messages(user(), answer(thinking="a", reasoning="b")))
    with pytest.raises(RowError, match="reasoning in a user turn"):
        Conversation.from_row(messages(user(thinking="a"), answer()))


def test_calls_of_2023_are_read_as_calls():
    call = {"name": "weather", "arguments": '{"city": "Rome"}'}
    row = messages(
        user(),
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "weather", "content": "sunny"},
        answer(function_call=None),
    ) | {"functions": [{"name": "weather", "parameters": {}}], "tools": None}
    record = Conversation.from_row(row)
    function = {"name": "weather", "arguments": {"city": "Rome"}}
    assert record.messages[1] == answer("", tool_calls=[{"type": "function", "function": function}])
    assert record.messages[2] == {"role": "tool", "name": "weather", "content": "sunny"}
    assert record.tools == [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    with pytest.raises(RowError, match="another text than in tools"):
        Conversation.from_row(row | {"tools": [{"name": "other"}]})


def test_a_tool_result_after_a_plain_answer_is_refused_by_the_reader_as_by_the_template():
    row = messages(user(), answer('<tool_call>{"name": "f"}</tool_call>'), {"role": "tool", "content": "1"}, answer())
    with pytest.raises(RowError, match="a tool turn after an assistant turn"):
        Conversation.from_row(row)


# --- null keys and further columns -----------------------------------------------------------------------------------


def test_null_keys_that_arrow_adds_say_nothing(tmp_path):
    call = {"name": "f", "arguments": {"city": "Rome", "unit": None}}
    turns = [
        {"from": None, "value": None, "role": "user", "content": "How?", "tool_calls": None, "thinking": None},
        {"from": None, "value": None, "role": "assistant", "content": None, "tool_calls": [call], "thinking": None},
        {"from": None, "value": None, "role": "tool", "content": "1", "tool_calls": None, "thinking": None},
        {"from": None, "value": None, "role": "assistant", "content": "So.", "tool_calls": None, "thinking": None},
    ]
    row = {"conversations": None, "messages": turns, "instruction": None, "output": None, "tools": None}
    pq.write_table(pa.Table.from_pylist([row, row]), tmp_path / "rows.parquet")
    found, reports = load_records("conversation", find_sources(str(tmp_path / "rows.parquet")), RecordOptions())
    record = Conversation.from_json(found["rows"][0]["record"])
    assert [message["role"] for message in record.messages] == ["user", "assistant", "tool", "assistant"]
    assert record.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    assert reports["rows"].columns_not_read == {}

    folder = tmp_path / "hub"
    folder.mkdir()
    (tmp_path / "rows.parquet").rename(folder / "train.parquet")
    hub, report = load_hub_dataset("conversation", str(folder), RecordOptions())
    assert hub[1]["record"] == found["rows"][1]["record"]
    assert not report.rows_bad


def test_null_where_something_is_needed_is_named():
    with pytest.raises(RowError, match="field 'answer': found null"):
        Conversation.from_row({"question": "How?", "answer": None})
    law = {"input": "How?", "output": "So.", "reference": None}
    assert Conversation.from_row(law, RecordOptions(use_reference=True), "law").messages == [user(), answer()]


FURTHER = {"question": "How?", "answer": "So.", "context": "Once.", "options": ["a", "b"], "empty": "", "none": None}


@pytest.mark.parametrize(
    ("kind", "row", "unread"),
    [
        ("conversation", FURTHER, ["context", "options"]),
        ("prompt", FURTHER, ["context", "options"]),
        ("prompt", {"prompt": "How?", "chosen": "a", "rejected": "b", "score": 1}, ["score"]),
        ("conversation", {"input": "How?", "output": "So.", "reference": ["x"]}, ["reference"]),
        (
            "conversation",
            messages(user(name="Ann"), answer(score=3, annotations=[])) | {"id": 7},
            ["id", "messages[].name", "messages[].score"],
        ),
        (
            "preference",
            {"prompt": "How?", "chosen": [answer("a", score=1)], "rejected": [answer("b")], "messages": [user()]},
            ["messages", "chosen[].score"],
        ),
        ("document", {"text": "Once.", "title": "T"}, ["title"]),
    ],
)
def test_what_is_not_read_is_counted_and_named_once(kind, row, unread, tmp_path, caplog):
    path = write(tmp_path / "rows.jsonl", [row] * 3)
    for _ in range(2):  # read, and from the cache
        caplog.clear()
        _, reports = load_records(kind, find_sources(path), RecordOptions())
        assert reports["rows"].to_dict()["columns_not_read"] == dict.fromkeys(unread, 3)
        (warning,) = [each for each in caplog.messages if "not read" in each]
        assert warning == f"data set 'rows': columns not read: {', '.join(f'{name} (3 rows)' for name in unread)}"

    caplog.clear()
    streams, _ = stream_records(kind, find_sources(path), RecordOptions())
    assert len(list(streams["rows"])) == 3
    assert [each for each in caplog.messages if "not read" in each] == [
        f"data set 'rows': column not read: {name}" for name in unread
    ]


# --- --columns -------------------------------------------------------------------------------------------------------

RENAMED = [
    (
        "conversation",
        "question=Question,answer=Response,reasoning=Complex_CoT",
        {"Question": "How?", "Response": "So.", "Complex_CoT": "because", "answer": "an older one"},
        Conversation([user(), answer(reasoning_content="because")]),
    ),
    (
        "conversation",
        "instruction=instruction,input=context,output=response",
        {"instruction": "How?", "context": "Here.", "response": "So."},
        Conversation([user("How?\nHere."), answer()]),
    ),
    ("conversation", "messages=dialog", {"dialog": [user(), answer()]}, Conversation([user(), answer()])),
    (
        "preference",
        "prompt=q,chosen=good,rejected=bad",
        {"q": "How?", "good": "a", "bad": "b"},
        PreferencePair([user()], [answer("a")], [answer("b")]),
    ),
    (
        "preference",
        "chosen=rejected,rejected=chosen",
        {"prompt": "How?", "chosen": "b", "rejected": "a"},
        PreferencePair([user()], [answer("a")], [answer("b")]),
    ),
    ("prompt", "question=Question,answer=Response", {"Question": "How?", "Response": "So."}, Prompt([user()])),
    ("document", "text=content", {"content": "Once."}, Document("Once.")),
]


@pytest.mark.parametrize(("kind", "columns", "row", "record"), RENAMED)
def test_columns_are_read_under_other_names(kind, columns, row, record, tmp_path):
    path = write(tmp_path / "rows.jsonl", [row])
    options = RecordOptions(columns=parse_columns(columns))
    check_columns(kind, options.columns)
    found, reports = load_records(kind, find_sources(path), options)
    assert found["rows"][0]["record"] == record.to_json()
    assert reports["rows"].to_dict()["columns"] == dict(part.split("=") for part in columns.split(","))
    assert list(reports["rows"].columns_not_read) == (["answer"] if "an older one" in row.values() else [])


def test_the_mapping_is_in_the_cache_key(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "How?", "a": "one", "b": "two"}])
    for column, text in (("a", "one"), ("b", "two")):
        options = RecordOptions(columns=(("answer", column),))
        found, _ = load_records("conversation", find_sources(path), options)
        assert json.loads(found["rows"][0]["record"])["messages"][1]["content"] == text


@pytest.mark.parametrize(
    "text", ["question", "=Question", "question=", "question=Q,", "question=Q,question=R", "a=Q,b=Q"]
)
def test_a_mapping_that_is_written_wrongly(text):
    with pytest.raises(InputError, match="--columns"):
        parse_columns(text)


@pytest.mark.parametrize(
    ("kind", "columns", "rows", "message"),
    [
        (
            "conversation",
            "question=Frage,answer=Response",
            [{"Question": "How?", "Response": "So."}],
            r"rows.jsonl:1: .*found the keys Question, answer, and no column Frage, which --columns names",
        ),
        (
            "conversation",
            "question=Question,answer=Response,reasoning=CoT",
            [{"Question": "How?", "Response": "So."}] * 2,
            r"--columns reasoning=CoT: none of the 2 rows of .*rows.jsonl has a column 'CoT'",
        ),
        (
            "conversation",
            "answer=Response",
            [{"instruction": "How?", "output": "So.", "Response": "Other."}],
            "'answer': found a column that --columns asks for in a row of the format alpaca",
        ),
    ],
)
def test_a_mapping_that_the_rows_do_not_fit(kind, columns, rows, message, tmp_path):
    path = write(tmp_path / "rows.jsonl", rows)
    options = RecordOptions(columns=parse_columns(columns))
    with pytest.raises(InputError, match=message):
        load_records(kind, find_sources(path), options)
    streams, _ = stream_records(kind, find_sources(path), options)
    with pytest.raises(InputError, match=message):
        list(streams["rows"])


def test_a_column_that_some_rows_lack_is_missing_there(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"q": "How?", "a": "So.", "c": "Hm."}, {"q": "How?", "a": "So."}])
    options = RecordOptions(columns=(("question", "q"), ("answer", "a"), ("reasoning", "c")))
    found, _ = load_records("conversation", find_sources(path), options)
    assert [json.loads(row["record"])["messages"][1].get("reasoning_content") for row in found["rows"]] == [
        "Hm.",
        None,
    ]


@pytest.mark.parametrize(
    ("kind", "key"), [("document", "question"), ("preference", "reasoning"), ("conversation", "x")]
)
def test_a_key_that_the_stage_does_not_read(kind, key):
    with pytest.raises(InputError, match=f"--columns {key}=c: found '{key}', expected a key"):
        check_columns(kind, ((key, "c"),))


# --- special tokens of the tokenizer as text -------------------------------------------------------------------------

LONG = "A line of text.\n" * 20_000 + "and then {} here\nand more.\n"


@pytest.mark.parametrize("text", ["Write {} here.", LONG], ids=["short", "long"])
def test_special_tokens_of_the_tokenizer_in_a_content_are_refused(text, chatml, tokenizer):
    tokens = special_tokens(tokenizer)
    assert {"<s>", "</s>"} <= set(tokens) <= set(chatml.control_tokens)
    for token in tokens:
        options = RecordOptions(control_tokens=tokens)
        bad = text.format(token)
        for read, row in (
            (Document, {"text": bad}),
            (Conversation, messages(user(), answer(bad))),
            (Prompt, {"question": bad}),
            (PreferencePair, {"prompt": "How?", "chosen": "a", "rejected": bad}),
        ):
            with pytest.raises(RowError) as caught:
                read.from_row(row, options)
            assert token in caught.value.found
            assert "--keep_control_tokens" in caught.value.expected
            read.from_row(row, RecordOptions(control_tokens=tokens, keep_control_tokens=True))
    assert Document.from_row({"text": "a < b, <b>bold</b> and <|"}, options).text


def test_special_tokens_stop_a_run_of_sft_and_of_pt(tiny_model_dir, tmp_path):
    rows = write(tmp_path / "rows.jsonl", [messages(user(), answer("Write <s>a</s>."))] * 4)
    with pytest.raises(InputError, match=r"rows.jsonl:1: field 'messages\[1\].content': found the control token <s>"):
        run_sft(tiny_model_dir, rows, tmp_path / "sft", "--do_train", "True")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Fine.\n\nA line,\nand </s> in the next.\n", encoding="utf-8")
    with pytest.raises(InputError, match="corpus.txt:3: field 'text': found the control token </s>"):
        run_pt(tiny_model_dir, str(corpus), tmp_path / "pt", "--do_train", "True")


# --- questions that are too long -------------------------------------------------------------------------------------


def test_questions_that_are_too_long_name_the_flag_that_leaves_them_out(tiny_model_dir, tmp_path):
    rows = [messages(user("word " * (400 if i % 2 else 1)), answer()) for i in range(8)]
    path = write(tmp_path / "rows.jsonl", rows)
    flags = ("--validation_file_dir", path, "--dry_run", "True")
    for more in ((), ("--on_bad_row", "skip")):
        with pytest.raises(InputError, match="raise --model_max_length, or pass --on_too_long drop"):
            run_sft(tiny_model_dir, path, tmp_path / "out", *flags, *more)
    run_sft(tiny_model_dir, path, tmp_path / "out", *flags, "--on_too_long", "drop")
