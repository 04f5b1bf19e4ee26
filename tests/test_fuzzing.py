"""Random data of every format and file type, whole and damaged: what goes in comes out, or an InputError does.

2,000 examples, the same in every run. Ten times as many, drawn anew:

    pytest tests/test_fuzzing.py --hypothesis-profile deep [--hypothesis-seed N]

The expectations are computed here from what was generated: a conversation is its messages, and its text is written out
by `chatml` below, which shares no code with the program.
"""

import copy
import csv
import gzip
import io
import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagewise.arguments import DataArguments
from stagewise.data import loading
from stagewise.data.preferences import PreferenceOptions, encode_pairs
from stagewise.data.prompts import PromptOptions, encode_prompts
from stagewise.data.records import Conversation, Document, PreferencePair, Prompt, RecordOptions
from stagewise.data.sources import find_sources, stream_records
from stagewise.data.tokenization import EncodingOptions, build_renderer, encode_documents, encode_or_drop
from stagewise.errors import InputError
from stagewise.losses.logprobs import IGNORE_INDEX
from template import TemplateError, get_template

STOP = "<|im_end|>"
PLACEHOLDERS = ("<NAME>", "<AUTHOR>", "{{name}}", "{{author}}")
MAX_LENGTH = 1_000_000  # nothing is cut here


def examples(number: int):
    factor = settings.default.max_examples // 100
    return settings(
        max_examples=number * factor,
        derandomize=factor == 1,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


# --- what is written -------------------------------------------------------------------------------------------------

# What text is made of beside random characters: white space of every kind, characters of several bytes and of several
# code points, and pieces of what templates and formats write.
PIECES = [
    *(" ", "\n", "\n\n", "\r", "\r\n", "\t", "\0", "\x1b[31m", "\x1f", "\x85", "\xa0", "\u200b", "\u2028", "\u3000"),
    *("\ufeff", "\ufffd", "é", "e\u0301", "中文", "👩‍🚀", "ﷺ", "<|im", "im_end|>", "user", "assistant\n", "[INST]"),
    *('"', "'", ",", "\\", "\\u", "{", "}}", "{{", "[", "null", "<think>", "</think>", "<tool_call>", "0"),
]


def is_clean(text: str) -> bool:
    tokens = ("<|im_start|>", STOP, "<s>", "</s>", *PLACEHOLDERS)
    return bool(text.strip()) and not any(token in text for token in tokens)


texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), min_size=1, max_size=5).map("".join).filter(is_clean)


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


@dataclass(frozen=True)
class Chat:
    """A system text or "", and rounds of a question and an answer."""

    system: str
    rounds: list[tuple[str, str]]

    @property
    def messages(self) -> list[dict]:
        turns = [message(*turn) for q, a in self.rounds for turn in (("user", q), ("assistant", a))]
        return [message("system", self.system), *turns] if self.system else turns

    @property
    def history(self) -> list[list[str]]:
        return [list(pair) for pair in self.rounds[:-1]]

    @property
    def question(self) -> str:
        return self.rounds[-1][0]

    @property
    def answer(self) -> str:
        return self.rounds[-1][1]


chats = st.builds(Chat, st.just("") | texts, st.lists(st.tuples(texts, texts), min_size=1, max_size=3))


def listed(chat: Chat, key: str, names: dict[str, str], role: str, content: str) -> dict:
    return {key: [{role: names[each["role"]], content: each["content"]} for each in chat.messages]}


def sharegpt(chat: Chat) -> dict:
    return listed(chat, "conversations", {"system": "system", "user": "human", "assistant": "gpt"}, "from", "value")


def openai(chat: Chat) -> dict:
    return listed(chat, "messages", {each: each for each in ("system", "user", "assistant")}, "role", "content")


def mft(chat: Chat) -> dict:
    names = {"system": "system", "user": "human", "assistant": "bot"}
    return {"id": 1, "data_name": "d", **listed(chat, "chat_rounds", names, "role", "content")}


def beside(chat: Chat) -> dict:
    return {"system": chat.system, "history": chat.history}


def alpaca(chat: Chat) -> dict:
    first, _, rest = chat.question.partition("\n")
    if not (first.strip() and rest.strip()):  # blank parts are not joined
        first, rest = chat.question, ""
    return {"instruction": first, "input": rest, "output": chat.answer, **beside(chat)}


def pair(chat: Chat) -> dict:
    return {"question": chat.question, "answer": chat.answer, **beside(chat)}


def law(chat: Chat) -> dict:
    return {"input": chat.question, "output": chat.answer, "reference": ["Article 1"], **beside(chat)}


def family_preference(chat: Chat, rejected: str) -> dict:
    answers = {"response_chosen": chat.answer, "response_rejected": rejected}
    return {"question": chat.question, **answers, **beside(chat)}


def sharegpt_preference(chat: Chat, rejected: str) -> dict:
    *prompt, chosen = sharegpt(chat)["conversations"]
    return {"conversations": prompt, "chosen": chosen, "rejected": {"from": "gpt", "value": rejected}}


def trl_preference(chat: Chat, rejected: str) -> dict:
    return {"prompt": chat.messages[:-1], "chosen": chat.messages[-1:], "rejected": [message("assistant", rejected)]}


def question_alone(chat: Chat) -> dict:
    return {"query": chat.question, **beside(chat)}


def unanswered(chat: Chat) -> dict:
    return {"messages": openai(chat)["messages"][:-1]}


CONVERSATIONS = (sharegpt, openai, mft, alpaca, pair, law)
PREFERENCES = (family_preference, sharegpt_preference, trl_preference)
PROMPTS = (question_alone, unanswered, sharegpt, alpaca)


@dataclass(frozen=True)
class Data:
    """Rows of one format, and what each of them means: messages; (prompt, chosen, rejected); or a text."""

    kind: str
    rows: list[dict]
    meanings: list[Any]


@st.composite
def whole_data(draw) -> Data:
    kind = draw(st.sampled_from(["conversation", "preference", "prompt", "document"]))
    if kind == "document":
        meanings = draw(st.lists(texts, min_size=1, max_size=4))
        return Data(kind, [{"text": text} for text in meanings], meanings)
    some = draw(st.lists(chats, min_size=1, max_size=4))
    if kind == "conversation":
        write = draw(st.sampled_from(CONVERSATIONS))
        return Data(kind, [write(chat) for chat in some], [chat.messages for chat in some])
    if kind == "prompt":
        write = draw(st.sampled_from(PROMPTS))
        return Data(kind, [write(chat) for chat in some], [chat.messages[:-1] for chat in some])
    write_pair = draw(st.sampled_from(PREFERENCES))
    worse = [draw(texts.filter(lambda text, chat=chat: text != chat.answer)) for chat in some]
    meanings = [(chat.messages[:-1], chat.answer, other) for chat, other in zip(some, worse, strict=True)]
    return Data(kind, [write_pair(chat, other) for chat, other in zip(some, worse, strict=True)], meanings)


# --- how it is written -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A file type, and the liberties that it leaves."""

    suffix: str
    packed: bool = False
    bom: bool = False
    crlf: bool = False
    ascii_only: bool = False
    blank_lines: bool = False
    indent: int | None = None


forms = st.builds(
    Form,
    st.sampled_from([".jsonl", ".json", ".array.json", ".csv", ".parquet"]),
    *[st.booleans()] * 5,
    st.sampled_from([None, 2]),
)
json_forms = forms.filter(lambda form: "json" in form.suffix)


def to_bytes(rows: list[dict], form: Form) -> bytes:
    """The content of a file. Lone surrogates can only be written as escapes."""
    if form.suffix == ".parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        content = sink.getvalue()
    else:
        end = "\r\n" if form.crlf else "\n"
        text = {".csv": to_csv, ".array.json": to_array}.get(form.suffix, to_lines)(rows, form, end)
        content = (b"\xef\xbb\xbf" if form.bom else b"") + text.encode()
    return gzip.compress(content, mtime=0) if form.packed else content


def to_lines(rows: list[dict], form: Form, end: str) -> str:
    lines = [json.dumps(row, ensure_ascii=form.ascii_only) for row in rows]
    return (end * 2 if form.blank_lines else end).join(lines)


def to_array(rows: list[dict], form: Form, end: str) -> str:
    return json.dumps(rows, ensure_ascii=form.ascii_only, indent=form.indent).replace("\n", end)


def to_csv(rows: list[dict], form: Form, end: str) -> str:
    """Every cell in quotes; lists as JSON."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), quoting=csv.QUOTE_ALL, lineterminator=end)
    writer.writeheader()
    for row in rows:
        writer.writerow({key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()})
        out.write(end if form.blank_lines else "")
    return out.getvalue()


# --- how it is read --------------------------------------------------------------------------------------------------


class Reader:
    """Writes files into a folder and reads them as the stages do, for the template chatml."""

    def __init__(self, folder: Path, tokenizer):
        self.folder, self.tokenizer = folder, tokenizer
        self.renderer = build_renderer(get_template("chatml"), tokenizer)
        self.numbers = itertools.count()

    def write(self, content: bytes, form: Form) -> Path:
        path = self.folder / f"data{next(self.numbers)}{form.suffix}{'.gz' if form.packed else ''}"
        path.write_bytes(content)
        return path

    def stream(self, path: Path, kind: str) -> tuple[list[str], InputError | None]:
        """The records up to the first bad row, and what is said about it."""
        options = RecordOptions(control_tokens=self.renderer.control_tokens)
        records = []
        try:
            (stream,) = stream_records(kind, find_sources(str(path)), options)[0].values()
            records.extend(row["record"] for row in stream)
        except InputError as error:
            check_message(error, path)
            return records, error
        return records, None

    def load(self, path: Path, kind: str):
        """All rows of the file as a stage gets them, audited; raises InputError."""
        args = DataArguments(train_file_dir=str(path))
        run = SimpleNamespace(seed=1, data_seed=None, do_eval=False, local_process_index=0)
        if kind == "conversation":
            return loading.load_conversations(args, self.renderer, self.tokenizer, EncodingOptions(MAX_LENGTH), run)
        if kind == "preference":
            return loading.load_preferences(args, self.renderer, self.tokenizer, PreferenceOptions(MAX_LENGTH), run)
        if kind == "prompt":
            return loading.load_prompts(args, self.renderer, self.tokenizer, PromptOptions(MAX_LENGTH), run)
        return loading.load_documents(args, self.tokenizer, MAX_LENGTH, False, run)

    def encode(self, records: list[str], kind: str) -> list[Any]:
        """What load() gives, without the data set around it."""
        if not records:
            return []
        if kind == "conversation":
            chats = [Conversation.from_json(record) for record in records]
            return encode_or_drop(chats, self.renderer, self.tokenizer, EncodingOptions(MAX_LENGTH))
        if kind == "preference":
            pairs = [PreferencePair.from_json(record) for record in records]
            return encode_pairs(pairs, self.renderer, self.tokenizer, PreferenceOptions(MAX_LENGTH))
        if kind == "prompt":
            prompts = [Prompt.from_json(record) for record in records]
            return encode_prompts(prompts, self.renderer, self.tokenizer, PromptOptions(MAX_LENGTH))
        rows = encode_documents([Document.from_json(record).text for record in records], self.tokenizer)
        return [SimpleNamespace(input_ids=ids) for ids in rows]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def check(self, row, kind: str, meaning) -> None:
        """The ids of a row are those of what it means, and of a conversation exactly the answers are trained."""
        if kind == "document":
            assert self.decode(row.input_ids) == f"{meaning}</s>"
        elif kind == "prompt":
            assert self.decode(row.input_ids) == chatml(meaning) + "<|im_start|>assistant\n"
        elif kind == "preference":
            prompt, *answers = meaning
            for answer, ids in zip(answers, (row.chosen_ids, row.rejected_ids), strict=True):
                assert self.decode([*row.prompt_ids, *ids]) == chatml([*prompt, message("assistant", answer)])
                assert self.is_answer(self.decode(ids).removesuffix("\n"), answer)
        else:
            assert self.decode(row.input_ids) == chatml(meaning)
            answers = [each["content"] for each in meaning if each["role"] == "assistant"]
            for found, answer in zip(self.trained(row), answers, strict=True):
                assert self.is_answer(found, answer)

    def trained(self, row) -> list[str]:
        """The runs of trained tokens as texts."""
        tokens = zip(row.input_ids, row.labels, strict=True)
        runs = itertools.groupby(tokens, key=lambda token: token[1] != IGNORE_INDEX)
        return [self.decode([token for token, _ in run]) for is_trained, run in runs if is_trained]

    @staticmethod
    def is_answer(found: str, answer: str) -> bool:
        """The last token of the prompt, a newline, is trained where the answer begins in the middle of it."""
        return found == answer + STOP or (found == f"\n{answer}{STOP}" and answer[0].isspace())


def chatml(messages: list[dict]) -> str:
    turns = (f"<|im_start|>{each['role']}\n{each['content']}{STOP}\n" for each in messages)
    return "<s>" + "".join(turns)


def check_message(error: Exception, path: Path) -> None:
    """An error is one printable line that names the file (or the data set, which has its name)."""
    text = str(error)
    assert path.name.split(".")[0] in text
    assert len(text.splitlines()) == 1
    assert len(text) < 2000
    text.encode("utf-8")


@pytest.fixture(scope="module")
def reader(tokenizer, tmp_path_factory) -> Reader:
    return Reader(tmp_path_factory.mktemp("fuzzing"), tokenizer)


# --- whole data ------------------------------------------------------------------------------------------------------


@given(whole_data(), forms)
@examples(500)
def test_what_is_written_is_read(reader, data, form):
    """Every row, whole and in its order, in every format and file type. NUL bytes are refused in CSV."""
    records, error = reader.stream(reader.write(to_bytes(data.rows, form), form), data.kind)
    if form.suffix == ".csv" and any(
        "\0" in value for row in data.rows for value in row.values() if isinstance(value, str)
    ):
        assert error is not None
        return
    assert error is None
    rows = reader.encode(records, data.kind)
    for row, meaning in zip(rows, data.meanings, strict=True):
        reader.check(row, data.kind, meaning)


def is_line(text: str) -> bool:
    """A line of a text file; U+FEFF at its start would be a byte order mark at the start of the file."""
    return is_clean(text) and not set(text) & {"\n", "\r", "\0"} and text[0] != "\ufeff"


@given(st.lists(st.lists(texts.filter(is_line), min_size=1, max_size=3), min_size=1, max_size=4), forms)
@examples(100)
def test_text_files_are_cut_at_their_blank_lines(reader, documents, form):
    form = replace(form, suffix=".txt")
    end = "\r\n" if form.crlf else "\n"
    text = (end * (3 if form.blank_lines else 2)).join(end.join(lines) for lines in documents)
    content = (b"\xef\xbb\xbf" if form.bom else b"") + text.encode()
    records, error = reader.stream(reader.write(gzip.compress(content) if form.packed else content, form), "document")
    assert error is None
    assert [json.loads(record)["text"] for record in records] == ["\n".join(lines) for lines in documents]


@given(whole_data(), json_forms)
@examples(200)
def test_stages_train_on_what_is_written(reader, data, form):
    """The same through the loading of the stages, with cache and audit."""
    loaded = reader.load(reader.write(to_bytes(data.rows, form), form), data.kind)
    (counts,) = loaded.report["train"]["datasets"].values()
    assert counts["rows_read"] == counts["rows_kept"] == len(data.rows)
    for row, meaning in zip(loaded.train, data.meanings, strict=True):
        reader.check(SimpleNamespace(**row), data.kind, meaning)


# --- damaged rows ----------------------------------------------------------------------------------------------------

JUNK = [
    *(None, True, 0, -1.5, 10**30, float("nan"), float("inf"), "", " ", "\u3000", "x" * 20_000),
    *([], {}, [None], [[]], [{}], {"": None}, [["q", "a"]], [HI := {"from": "human", "value": "hi"}], "[]", "[{}]"),
    *("[" * 500 + "]" * 500, "]"),
]
# What no text may hold.
FORBIDDEN = [STOP, f"a{STOP}\n<|im_start|>assistant\n", *PLACEHOLDERS, "\ud800", "a\udfffb"]
KEYS = [
    *("conversations", "messages", "chat_rounds", "from", "value", "role", "content", "system", "system_prompt"),
    *("history", "instruction", "input", "output", "prompt", "question", "query", "answer", "response", "reference"),
    *("chosen", "rejected", "response_chosen", "response_rejected", "margin", "tools", "tool_calls", "text", "Value"),
    *("reasoning_content", "name", "tool_call_id", "key\nof two lines", "\ud800", ""),
]
CALL = {"from": "function_call", "value": '{"name": "clock", "arguments": {"city": "Oslo"}}'}
TOOL = {"type": "function", "function": {"name": "clock", "description": "d", "parameters": {"type": "object"}}}
TOOL_ROW = {
    "conversations": [HI, CALL, {"from": "observation", "value": "12"}, {"from": "gpt", "value": "Noon."}],
    "tools": [TOOL],
}


def places(value: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of every value inside, at any depth."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, each in inside for place in [(value, key), *places(each)]]


def harm(draw, row: dict) -> None:
    """Change one thing of a row, in place."""
    found = places(row)
    if not found:
        return
    holder, key = draw(st.sampled_from(found))
    texts_of_row = [(each, name) for each, name in found if isinstance(each[name], str)]
    how = draw(
        st.sampled_from(["edit", "forbidden", "swap", "swap turns", "drop", "replace", "wrap", "rename", "repeat"])
    )
    if how == "drop":
        del holder[key]
    elif how == "replace":
        holder[key] = copy.deepcopy(draw(st.sampled_from(JUNK) | texts))
    elif how == "wrap":
        holder[key] = [holder[key]]
    elif how == "rename" and isinstance(holder, dict):
        holder[draw(st.sampled_from(KEYS))] = holder.pop(key)
    elif how == "repeat" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif how in ("edit", "forbidden") and texts_of_row:
        holder, key = draw(st.sampled_from(texts_of_row))
        at = draw(st.integers(0, len(holder[key])))
        junk = draw(texts if how == "edit" else st.sampled_from(FORBIDDEN))
        holder[key] = holder[key][:at] + junk + holder[key][at:]
    elif how == "swap" and texts_of_row:
        (one, left), (other, right) = draw(st.sampled_from(texts_of_row)), draw(st.sampled_from(texts_of_row))
        one[left], other[right] = other[right], one[left]
    elif how == "swap turns" and isinstance(holder, list):
        other = draw(st.integers(0, len(holder) - 1))
        holder[key], holder[other] = holder[other], holder[key]


@st.composite
def damaged_rows(draw) -> Data:
    """One to three things of one row are changed; the meanings are those of the row as it was."""
    data = draw(whole_data() | st.just(Data("conversation", [TOOL_ROW], [None])))
    rows = copy.deepcopy(data.rows)
    row = rows[draw(st.integers(0, len(rows) - 1))]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        harm(draw, row)
    return Data(data.kind, rows, data.meanings)


ROLES = {"system": "system", "user": "user", "human": "user"} | dict.fromkeys(("assistant", "gpt", "bot"), "assistant")
QUESTIONS, ANSWERS = ("instruction", "prompt", "question", "query", "input"), ("answer", "response", "output")


def meaning_of(row: dict, kind: str) -> Any:
    """What an accepted row means by docs/data_formats.md; None where tools or turns of several kinds are in play."""
    if kind == "document":
        return row["text"]
    if '"tool' in json.dumps(row) or CALL["from"] in json.dumps(row) or "observation" in json.dumps(row):
        return None
    if kind == "preference":
        return preference_meaning(row)
    messages = conversation_meaning(row)
    if kind == "prompt" and messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages


def conversation_meaning(row: dict) -> list[dict]:
    for key in ("conversations", "messages", "chat_rounds"):
        if key in row:
            return with_system(row, turns(row[key]))
    answer = only(row, ANSWERS)
    if "instruction" in row and "output" in row:
        parts, answer = [row["instruction"], row.get("input") or ""], row["output"]
        question = "\n".join(part for part in parts if part.strip())
    elif {"input", "output", "reference"} <= row.keys():
        question, answer = row["input"], row["output"]
    else:
        question = only(row, QUESTIONS)
    asked = [*history(row), message("user", question)]
    return with_system(row, [*asked, message("assistant", answer)] if answer is not None else asked)


def preference_meaning(row: dict) -> Any:
    if {"question", "response_chosen", "response_rejected"} <= row.keys():
        prompt = [*history(row), message("user", row["question"])]
        return with_system(row, prompt), row["response_chosen"], row["response_rejected"]
    answers = [row[key] if isinstance(row[key], str) else turns(row[key]) for key in ("chosen", "rejected")]
    answers = [each[0]["content"] if isinstance(each, list) and len(each) == 1 else each for each in answers]
    if not all(isinstance(each, str) for each in answers):
        return None
    if "conversations" in row:
        return with_system(row, turns(row["conversations"])), *answers
    if not isinstance(row.get("prompt"), list):
        return None
    return with_system(row, [*history(row), *turns(row["prompt"])]), *answers


def turns(value: Any) -> list[dict]:
    value = json.loads(value) if isinstance(value, str) else value
    pairs = [
        (each["from"], each.get("value")) if "from" in each else (each["role"], each.get("content"))
        for each in (value if isinstance(value, list) else [value])
    ]
    return [message(ROLES[speaker], text) for speaker, text in pairs]


def history(row: dict) -> list[dict]:
    value = row.get("history") or []
    pairs = json.loads(value) if isinstance(value, str) else value
    return [message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]


def with_system(row: dict, messages: list[dict]) -> list[dict]:
    system = row.get("system") or row.get("system_prompt")
    if system and messages[0]["role"] != "system":
        messages = [message("system", system), *messages]
    blank = messages[0]["role"] == "system" and not messages[0]["content"].strip()
    return messages[1:] if blank else messages


def only(row: dict, keys: tuple[str, ...]) -> str | None:
    """The one of the keys that holds a text."""
    return next((row[key] for key in keys if row.get(key)), None)


def contents(meaning: Any) -> list[str]:
    if isinstance(meaning, tuple):
        return [*contents(meaning[0]), *meaning[1:]]
    return [each["content"] for each in meaning]


@given(damaged_rows(), json_forms)
@examples(600)
def test_damaged_rows_are_refused_or_read_as_they_stand(reader, data, form):
    """No row is lost, none is read as anything but what its format says, and nothing is let in that must not be."""
    form = replace(form, ascii_only=True)
    records, error = reader.stream(reader.write(to_bytes(data.rows, form), form), data.kind)
    assert len(records) == len(data.rows) or error is not None
    try:
        encoded = reader.encode(records, data.kind)
    except TemplateError:  # a tool result after an answer that calls no tool
        return
    for row, written in zip(encoded, data.rows, strict=False):
        meaning = meaning_of(written, data.kind)
        if meaning is not None and not getattr(row, "dropped", ""):
            assert data.kind == "document" or all(map(is_clean, contents(meaning)))
            reader.check(row, data.kind, meaning)


# --- damaged files ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DamagedFile:
    data: Data
    form: Form
    content: bytes
    harm: str


@st.composite
def damaged_files(draw) -> DamagedFile:
    """A file in which bytes were changed, cut off, taken out, put in, or doubled, or line ends are those of a Mac."""
    data, form = draw(whole_data()), draw(forms)
    content = to_bytes(data.rows, form)
    how = draw(st.sampled_from(["flip", "cut", "take out", "put in", "double", "line ends"]))
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    if how == "flip":
        changed = bytearray(content)
        for at in draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
            changed[at] ^= draw(st.integers(1, 255))
        content = bytes(changed)
    elif how == "cut":
        content = content[:start]
    elif how == "take out":
        content = content[:start] + content[end:]
    elif how == "put in":
        content = content[:start] + draw(st.binary(min_size=1, max_size=9)) + content[start:]
    elif how == "double":
        content = content[:end] + content[start:end] + content[end:]
    else:
        content = content.replace(b"\r\n", b"\n").replace(b"\n", b"\r")
    return DamagedFile(data, form, content, how)


@given(damaged_files())
@examples(400)
def test_damaged_files_are_refused_or_read_to_where_they_are_whole(reader, damaged):
    data, form = damaged.data, damaged.form
    original = to_bytes(data.rows, form)
    records, error = reader.stream(reader.write(damaged.content, form), data.kind)
    rows = reader.encode(records, data.kind)
    cut = damaged.harm == "cut" and damaged.content != original
    if cut and (form.packed or form.suffix in (".parquet", ".array.json")):  # they say where they end
        assert error is not None or damaged.content.rstrip() == original.rstrip()
    # A part of a CSV cell may be a whole one, Parquet has no checksum, and gzip has one at its end.
    is_beginning = cut and form.suffix not in (".csv", ".parquet")
    is_checked = form.packed and error is None and damaged.harm != "double"
    if is_beginning or is_checked:
        for row, meaning in zip(rows, data.meanings, strict=is_checked):
            reader.check(row, data.kind, meaning)


def written(data: Data, form: Form) -> DamagedFile:
    form = replace(form, ascii_only=True)
    return DamagedFile(data, form, to_bytes(data.rows, form), "rows")


@given(damaged_files() | st.builds(written, damaged_rows(), json_forms))
@examples(200)
def test_stages_refuse_damaged_data_or_count_every_row(reader, damaged):
    """Through the loading of the stages: an InputError that names the file, or rows that add up."""
    path = reader.write(damaged.content, damaged.form)
    try:
        loaded = reader.load(path, damaged.data.kind)
    except (InputError, TemplateError) as error:
        check_message(error, path)
        return
    (counts,) = loaded.report["train"]["datasets"].values()
    dropped = sum(counts.get("dropped", {}).values())  # pairs whose answers are the same tokens
    assert counts["rows_read"] == counts["rows_kept"] == len(loaded.train) + dropped
