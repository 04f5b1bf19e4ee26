"""What a row of training data means: four records, one internal form of a chat, and every way a row can be bad.

A row arrives as a dict in one of the formats of ``FORMATS``. ``from_row`` validates it and normalises it into

- ``Document``: a text for pretraining,
- ``Conversation``: messages that end with an answer (SFT),
- ``PreferencePair``: a prompt with a chosen and a rejected continuation (RM, DPO),
- ``Prompt``: messages that wait for an answer (PPO).

Messages are a list of dicts ``{"role": "system" | "user" | "assistant" | "tool", "content": str}``; an assistant
message may also carry ``reasoning_content`` (str), ``tool_calls`` (OpenAI's list, arguments as an object) and, in a
``Conversation``, ``weight`` 0 where the answer is not to be trained; a tool message ``name`` and ``tool_call_id``. A
system message stands only at index 0. A row is never repaired: what cannot be read without guessing raises
``RowError``, which names the field, what was found and what was expected; what is not read, ``unread_columns`` names.

Pure Python: neither ``datasets`` nor ``torch`` is imported, so that a converter can use it at no cost.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, KeysView
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, ClassVar, TypeVar

from stagewise.errors import InputError

Messages = list[dict[str, Any]]

# What a preference row is expected to have, where its answers are the same.
TWO_ANSWERS = "two different answers"

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "developer": "system",
    "observation": "tool",
}
_FUNCTION_CALL = "function_call"
# Levels of a tool or call: more than anybody writes, and fewer than a template can write out.
_MAX_DEPTH = 100

# Templates render the same order: a tool result follows a call, and not an answer that has the call in its text.
_FOLLOWERS = {
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user"},
    "tool": {"tool", "assistant"},
}

_PROMPT_KEYS = ("prompt", "question", "query", "input")
_ANSWER_KEYS = ("answer", "response", "output")
_SYSTEM_KEYS = ("system", "system_prompt")
_TOOL_KEYS = ("tools", "functions")
# Reasoning of an answer, in its turn or, of rows with one answer, beside it: names of DeepSeek and Qwen, of gpt-oss,
# of OpenRouter.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# Whether a turn is trained: OpenAI's and mistral-finetune's, LLaMA-Factory's, ms-swift's, axolotl's.
_WEIGHT_KEYS = ("weight", "loss_weight", "loss", "loss_scale", "train", "training", "trainable")
# axolotl's marks of parts of an answer.
_PART_WEIGHTS = "train_detail"
_TURN_KEYS = frozenset(
    ("from", "value", "role", "content", "tool_calls", "function_call", *_REASONING_KEYS, *_WEIGHT_KEYS)
)
_RESULT_KEYS = frozenset(("name", "tool_call_id"))

_PLACEHOLDERS = {
    "<NAME>": "assistant_name",
    "{{name}}": "assistant_name",
    "<AUTHOR>": "assistant_author",
    "{{author}}": "assistant_author",
}
_PLACEHOLDER = re.compile("|".join(map(re.escape, _PLACEHOLDERS)))


class RowError(InputError):
    """A row that cannot be used: ``field`` holds ``found`` where ``expected`` was needed."""

    def __init__(self, field: str, found: str, expected: str):
        # found may quote the row, and a lone surrogate could be neither printed nor stored
        found = found.encode("utf-8", "backslashreplace").decode("utf-8")
        super().__init__(f"field '{field}': found {found}, expected {expected}")
        self.field, self.found, self.expected = field, found, expected

    def __reduce__(self):
        return RowError, (self.field, self.found, self.expected)

    @property
    def reason(self) -> str:
        """The error without what varies from row to row, so that equal errors can be counted together."""
        return f"field '{re.sub(r'[0-9]+', '', self.field)}': expected {self.expected}"


@dataclass(frozen=True)
class RecordOptions:
    """The options that change what a row means; all of them are part of a data set's cache key.

    assistant_name, assistant_author: replace the placeholders of self-cognition data. A placeholder without its value
        makes the row bad, because the model would learn to call itself ``<NAME>``.
    use_reference: put the ``reference`` passages of a law triplet before its question.
    control_tokens: strings that the tokenizer takes for one special token, the template's and its own. Content that
        contains one would be parsed as the real one, so the row is bad unless keep_control_tokens.
    allow_mixed: accept files whose rows are in different formats (checked by the reader of the file).
    keep_placeholders: leave placeholders as they are (for converting a file, not for training).
    columns: (key that the formats know, column of the file) pairs, applied before anything else.
    """

    assistant_name: str | None = None
    assistant_author: str | None = None
    use_reference: bool = False
    control_tokens: tuple[str, ...] = ()
    keep_control_tokens: bool = False
    allow_mixed: bool = False
    keep_placeholders: bool = False
    columns: tuple[tuple[str, str], ...] = ()


DEFAULT_OPTIONS = RecordOptions()


@dataclass(frozen=True)
class RowFormat:
    """A format and the keys that identify it: of every group in ``keys`` at least one is in the row."""

    name: str
    kind: str
    keys: tuple[tuple[str, ...], ...]

    def matches(self, keys: set[str] | KeysView[str]) -> bool:
        return not any(keys.isdisjoint(group) for group in self.keys)

    def __str__(self) -> str:
        return " + ".join("/".join(group) for group in self.keys)


# The first match counts. Preference formats come first because their rows also carry the keys of a conversation, and
# alpaca comes before the pairs because input + output without the instruction would be another question.
FORMATS = (
    RowFormat("preference", "preference", (("question",), ("response_chosen",), ("response_rejected",))),
    RowFormat("preference_sharegpt", "preference", (("conversations",), ("chosen",), ("rejected",))),
    RowFormat("preference_trl", "preference", (("chosen",), ("rejected",))),
    RowFormat("sharegpt", "conversation", (("conversations",),)),
    RowFormat("messages", "conversation", (("messages",),)),
    RowFormat("mft", "conversation", (("chat_rounds",),)),
    RowFormat("alpaca", "conversation", (("instruction",), ("output",))),
    RowFormat("law", "conversation", (("input",), ("output",), ("reference",))),
    RowFormat("qa", "conversation", (_PROMPT_KEYS, _ANSWER_KEYS)),
    RowFormat("document", "document", (("text",),)),
)
_QUESTION_ONLY = RowFormat("question", "prompt", (_PROMPT_KEYS,))
# A law triplet without passages is still one, and input without the instruction would be another question.
_NULLABLE = frozenset(("reference", "instruction"))

_COMMON_KEYS = (*_SYSTEM_KEYS, *_TOOL_KEYS)
_ONE_ANSWER_KEYS = (*_COMMON_KEYS, "history", *_REASONING_KEYS)
_PAIR_KEYS = (*_COMMON_KEYS, "chosen", "rejected", "margin")
_LISTS_OF_TURNS = ("conversations", "messages", "chat_rounds", "prompt", "chosen", "rejected")
# What the readers below read of a row.
_READ_KEYS: dict[str, frozenset[str]] = {
    "preference": frozenset((*_COMMON_KEYS, "history", "question", "response_chosen", "response_rejected", "margin")),
    "preference_sharegpt": frozenset((*_PAIR_KEYS, "conversations")),
    "preference_trl": frozenset((*_PAIR_KEYS, "history", "instruction", *_PROMPT_KEYS)),
    "sharegpt": frozenset((*_COMMON_KEYS, "conversations")),
    "messages": frozenset((*_COMMON_KEYS, "messages")),
    "mft": frozenset((*_COMMON_KEYS, "chat_rounds")),
    "alpaca": frozenset((*_ONE_ANSWER_KEYS, "instruction", "input", "output")),
    "law": frozenset((*_ONE_ANSWER_KEYS, "input", "output", "reference")),
    "qa": frozenset((*_ONE_ANSWER_KEYS, "instruction", *_PROMPT_KEYS, *_ANSWER_KEYS)),
    "question": frozenset((*_ONE_ANSWER_KEYS, "instruction", *_PROMPT_KEYS)),
    "document": frozenset(("text",)),
}
# A prompt is asked for, so that no answer is looked at.
_ANSWERS = frozenset((*_ANSWER_KEYS, "chosen", "rejected", "response_chosen", "response_rejected", "margin"))


def detect_format(row: dict, kind: str | None = None) -> str:
    """The name of the first of ``FORMATS`` whose keys are in the row.

    kind ("document", "conversation", "preference" or "prompt") leaves only the formats that such a record can be read
    from: a row with messages, prompt, chosen and rejected is a preference to one stage and a conversation to another.
    Raises RowError for a row that fits none.
    """
    if not isinstance(row, dict):
        raise RowError("row", _describe(row), "an object")
    wanted = _formats_of(kind)
    # Arrow gives every row every key; one that is null says nothing, but where nothing else fits it is what is wrong.
    filled = {key for key, value in row.items() if value is not None or key in _NULLABLE}
    for keys in (filled, row.keys()):
        for row_format in wanted:
            if row_format.matches(keys):
                return row_format.name
    found = f"the keys {_keys(row)}"
    others = [row_format for row_format in FORMATS if row_format.matches(row.keys())]
    if others:
        found += f" (the format {others[0].name}, a {others[0].kind})"
    expected = f"the keys of a {kind or 'known'} row: {'; '.join(map(str, wanted))}"
    raise RowError("keys", found, f"{expected} (columns under other names: --columns KEY=COLUMN)")


def check_same_format(row_format: str, file_format: str, options: RecordOptions) -> None:
    """Raise RowError for a row whose format is not that of the rows before it, unless mixed files are allowed."""
    if row_format != file_format and not options.allow_mixed:
        expected = f"{file_format} as in the rows before (--allow_mixed reads mixed files)"
        raise RowError("keys", f"a row of the format {row_format}", expected)


def check_columns(kind: str, columns: Iterable[tuple[str, str]]) -> None:
    """Raise InputError for a key of --columns that no row of this kind is read from."""
    known = set().union(*(_READ_KEYS[row_format.name] for row_format in _formats_of(kind)))
    known |= _ANSWERS if kind == "prompt" else set()
    for key, column in columns:
        if key not in known:
            raise InputError(
                f"--columns {key}={column}: found {key!r}, expected a key that a {kind} is read from: "
                f"{', '.join(sorted(known))}"
            )


def rename_columns(row: Any, columns: tuple[tuple[str, str], ...]) -> tuple[Any, list[str], list[str]]:
    """(the row with the keys of --columns, columns of it that the row has not, keys of the row that they displace)."""
    if not columns or not isinstance(row, dict):
        return row, [], []
    keys, sources = {key for key, _ in columns}, {column for _, column in columns}
    absent = [column for _, column in columns if column not in row]
    displaced = [key for key in row if key in keys and key not in sources and _is_filled(row[key])]
    renamed = {key: value for key, value in row.items() if key not in keys and key not in sources}
    return renamed | {key: row[column] for key, column in columns if column in row}, absent, displaced


def unread_columns(row: dict, kind: str, row_format: str, options: RecordOptions) -> list[str]:
    """The keys of a row, and of its turns, that hold something that is not read ("context", "messages[].score").

    Raises RowError for one that --columns has made: nothing of what is asked for may be left out.
    """
    read = _READ_KEYS[row_format]
    if row_format == "law" and not options.use_reference:
        read = read - {"reference"}
    if row_format == "preference_trl" and isinstance(_turns_in_cell(row.get("prompt")), list):
        read = read - {"instruction", *_PROMPT_KEYS} | {"prompt"}
    if kind == "prompt":
        read = read | _ANSWERS
    unread = [_name(key) for key, value in row.items() if key not in read and _is_filled(value)]
    asked = [key for key, _ in options.columns if key in unread]
    if asked:
        raise RowError(asked[0], f"a column that --columns asks for in a row of the format {row_format}",
                       f"one of {', '.join(sorted(read))}")  # fmt: skip
    for key in _LISTS_OF_TURNS:
        if key in read and key in row:
            unread += sorted(_unread_in_turns(row[key], key))
    return unread


def _unread_in_turns(value: Any, key: str) -> set[str]:
    value = _turns_in_cell(value)
    unread = set()
    for turn in value if isinstance(value, list) else [value]:
        if isinstance(turn, dict) and not turn.keys() <= _TURN_KEYS:
            result = _ROLES.get(str(turn.get("role") or turn.get("from"))) == "tool"
            others = turn.keys() - _TURN_KEYS - (_RESULT_KEYS if result else frozenset())
            unread |= {f"{key}[].{_name(name)}" for name in others if _is_filled(turn[name])}
    return unread


def _is_filled(value: Any) -> bool:
    return value is not None and not (isinstance(value, str | list | dict) and not value)


@cache
def _formats_of(kind: str | None) -> list[RowFormat]:
    if kind is None:
        return list(FORMATS)
    if kind == "prompt":
        return [row_format for row_format in FORMATS if row_format.kind == "conversation"] + [_QUESTION_ONLY]
    return [row_format for row_format in FORMATS if row_format.kind == kind]


_AnyRecord = TypeVar("_AnyRecord", bound="_Record")


class _Record:
    """What the four records share: the round trip through a JSON string with stable keys."""

    def to_json(self) -> str:
        """The record as a JSON object whose keys are the fields, in their order."""
        return json.dumps(vars(self), ensure_ascii=False)

    @classmethod
    def from_json(cls: type[_AnyRecord], text: str) -> _AnyRecord:
        """The record that ``to_json`` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Document(_Record):
    """A text to pretrain on. Placeholders are left alone: ``{{name}}`` in a corpus is somebody's template."""

    kind: ClassVar[str] = "document"

    text: str

    @classmethod
    def from_row(
        cls, row: dict, options: RecordOptions = DEFAULT_OPTIONS, row_format: str | None = None
    ) -> "Document":
        """Read ``{"text": ...}``; raises RowError for a text that is missing, empty, or holds a control token."""
        _require_format(row, cls.kind, row_format)
        text = _clean(row["text"], "text", options, placeholders=False)
        if not text.strip():
            raise RowError("text", "an empty text", "a document")
        return cls(text)


@dataclass(frozen=True)
class Conversation(_Record):
    """A chat that ends with an answer; ``tools`` are OpenAI tool dicts."""

    kind: ClassVar[str] = "conversation"

    messages: Messages
    tools: list[dict] | None = None

    @classmethod
    def from_row(
        cls, row: dict, options: RecordOptions = DEFAULT_OPTIONS, row_format: str | None = None
    ) -> "Conversation":
        """Read any conversation format. Raises RowError.

        row_format: a name from FORMATS when it is already known, otherwise it is detected.
        """
        row_format = _require_format(row, cls.kind, row_format)
        turns = _CONVERSATION_READERS[row_format](row, options)
        messages = _messages(turns, options)
        for message, turn in zip(messages, _without_empty_system(turns), strict=True):
            if turn.weight == 0 and turn.role == "assistant":
                message["weight"] = 0
        if all(message.get("weight") == 0 for message in messages if message["role"] == "assistant"):
            raise RowError(turns[-1].field, "weight 0 in every answer", "an answer that is trained")
        return cls(messages, _row_tools(row, options))


@dataclass(frozen=True)
class PreferencePair(_Record):
    """A prompt and two continuations of it, the better one first.

    ``prompt`` ends with a user or tool message; ``chosen`` and ``rejected`` begin and end with an assistant message.
    ``margin``: by how much the chosen one is better, for the reward model's loss.
    """

    kind: ClassVar[str] = "preference"

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float | None = None
    tools: list[dict] | None = None

    @classmethod
    def from_row(
        cls, row: dict, options: RecordOptions = DEFAULT_OPTIONS, row_format: str | None = None
    ) -> "PreferencePair":
        """Read any preference format; raises RowError, also where chosen equals rejected."""
        row_format = _require_format(row, cls.kind, row_format)
        prompt, chosen, rejected = _PREFERENCE_READERS[row_format](row, options)
        asked = _messages(prompt, options, answered=False)
        prompt = _without_empty_system(prompt)
        pair = cls(
            asked,
            _messages(prompt + chosen, options)[len(prompt) :],
            _messages(prompt + rejected, options)[len(prompt) :],
            _margin(row.get("margin")),
            _row_tools(row, options),
        )
        if any(turn.weight == 0 for turn in [*chosen, *rejected]):
            raise RowError(chosen[0].field, "an answer of weight 0", "answers without weights")
        if pair.chosen == pair.rejected:
            raise RowError(rejected[-1].field, "the same text as in the chosen answer", TWO_ANSWERS)
        return pair


@dataclass(frozen=True)
class Prompt(_Record):
    """Messages that wait for an answer."""

    kind: ClassVar[str] = "prompt"

    messages: Messages
    tools: list[dict] | None = None

    @classmethod
    def from_row(cls, row: dict, options: RecordOptions = DEFAULT_OPTIONS, row_format: str | None = None) -> "Prompt":
        """Read any conversation format and cut off its last answer, which is not looked at and may be missing."""
        row_format = _require_format(row, cls.kind, row_format)
        turns = _CONVERSATION_READERS[row_format](row, options)
        if turns and turns[-1].role == "assistant":
            *turns, answer = turns
            if not turns:
                raise RowError(answer.field, "an answer alone", "a question before it")
        return cls(_messages(turns, options, answered=False), _row_tools(row, options))


Record = Document | Conversation | PreferencePair | Prompt
RECORD_TYPES: dict[str, type[Record]] = {cls.kind: cls for cls in (Document, Conversation, PreferencePair, Prompt)}


def _require_format(row: dict, kind: str, row_format: str | None) -> str:
    if row_format is None:
        return detect_format(row, kind)
    known = {each.name: each for each in _formats_of(kind)}
    if row_format not in known:
        raise ValueError(f"a {kind} is not read from the format {row_format!r}, but from {', '.join(known)}")
    if not isinstance(row, dict) or not known[row_format].matches(row.keys()):
        raise RowError("keys", _describe(row), f"those of the format {row_format}: {known[row_format]}")
    return row_format


# --- turns: rows of every format become a list of these, still unchecked ---------------------------------------------


@dataclass(frozen=True)
class _Turn:
    """One turn as the row has it; ``field`` says where it was found. Two turns are equal if their contents are."""

    role: str
    content: Any
    field: str = field(compare=False)
    reasoning_content: Any = None
    tool_calls: Any = None
    name: Any = None
    tool_call_id: Any = None
    weight: int = 1


def _turn(value: Any, where: str) -> _Turn:
    if not isinstance(value, dict):
        raise RowError(where, _describe(value), "a turn such as {'from': 'human', 'value': ...}")
    sharegpt = "from" in value and (value["from"] is not None or "role" not in value)
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    speaker, content = value.get(role_key), value.get(content_key)
    if speaker != _FUNCTION_CALL and not (isinstance(speaker, str) and speaker in _ROLES):
        raise RowError(f"{where}.{role_key}", _describe(speaker), f"one of {', '.join([*_ROLES, _FUNCTION_CALL])}")
    turn = _Turn(
        _ROLES.get(speaker, "assistant"),
        content,
        f"{where}.{content_key}",
        _reasoning(value, f"{where}."),
        _only_value(value, ("tool_calls", "function_call"), f"{where}."),
        value.get("name"),
        value.get("tool_call_id"),
        _weight(value, where),
    )
    if turn.role != "assistant" and turn.reasoning_content:
        raise RowError(turn.field, f"reasoning in {_turn_of(turn.role)}", "reasoning in assistant turns only")
    if turn.role != "assistant" and turn.weight == 1 and any(value.get(key) for key in _WEIGHT_KEYS):
        expected = "weight 0 or none: only answers are trained (--train_on_prompt trains every token)"
        raise RowError(turn.field, f"weight 1 in {_turn_of(turn.role)}", expected)
    if speaker == _FUNCTION_CALL:
        return replace(turn, content="", tool_calls="" if content is None else content)
    return turn


def _only_value(value: dict, keys: tuple[str, ...], where: str) -> Any:
    """What one of the keys holds; that several hold the same is no harm, and None where all are empty."""
    filled = [key for key in keys if _is_filled(value.get(key))]
    for key in filled[1:]:
        if value[key] != value[filled[0]]:
            raise RowError(f"{where}{key}", f"another text than in {filled[0]}", "one of the two")
    return value[filled[0]] if filled else None


def _reasoning(value: dict, where: str = "") -> Any:
    return _only_value(value, _REASONING_KEYS, where)


def _weight(turn: dict, where: str) -> int:
    """0 where the turn is not to be trained, else 1. A weight in between is refused: the loss knows none."""
    if _is_filled(turn.get(_PART_WEIGHTS)):
        expected = "whole answers: weight 0 or 1 beside the turn's content"
        raise RowError(f"{where}.{_PART_WEIGHTS}", "parts of an answer that are trained or not", expected)
    weights = {key: turn[key] for key in _WEIGHT_KEYS if turn.get(key) is not None}
    for key, weight in weights.items():
        if not isinstance(weight, int | float) or weight not in (0, 1):
            raise RowError(f"{where}.{key}", _describe(weight), "0 or false (not trained), 1 or true")
    if len(set(map(int, weights.values()))) > 1:
        raise RowError(f"{where}.{[*weights][1]}", f"another weight than in {[*weights][0]}", "the same weight")
    return int(next(iter(weights.values()), 1))


def _turn_list(value: Any, where: str) -> list[_Turn]:
    return [_turn(each, f"{where}[{index}]") for index, each in enumerate(_as_list(value, where))]


def _some_turns(value: Any, where: str) -> list[_Turn]:
    turns = _turn_list(value, where)
    if not turns:
        raise RowError(where, "no turns", "a list of turns")
    return turns


def _with_system(row: dict, turns: list[_Turn]) -> list[_Turn]:
    """The turns with the row's system prompt in front; where there are several, they must say the same."""
    for key in _SYSTEM_KEYS:
        system = row.get(key)
        if system is None or system == "":
            continue
        if not turns or turns[0].role != "system":
            turns = [_Turn("system", system, key), *turns]
        elif turns[0].content != system:
            raise RowError(key, f"a second system prompt beside {turns[0].field}", "one system prompt")
    return turns


def _history_turns(row: dict) -> list[_Turn]:
    turns = []
    for index, pair in enumerate(_as_list(row.get("history"), "history")):
        where = f"history[{index}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(where, _describe(pair), "a pair [question, answer]")
        turns += [_Turn("user", pair[0], f"{where}[0]"), _Turn("assistant", pair[1], f"{where}[1]")]
    return turns


def _instruction(row: dict) -> _Turn:
    """instruction and, where there is one, input, joined by a newline."""
    parts = [_text(row["instruction"], "instruction")]
    if row.get("input") is not None:
        parts.append(_text(row["input"], "input"))
    return _Turn("user", "\n".join(part for part in parts if part.strip()), "instruction")


def _only_key(row: dict, keys: tuple[str, ...]) -> str:
    """The one of ``keys`` that the row fills. Two of them would mean that one text is dropped, so that is an error."""
    filled = [key for key in keys if row.get(key) is not None and row[key] != ""]
    if len(filled) > 1:
        raise RowError(filled[1], f"both {' and '.join(filled)}", f"one of {', '.join(keys)}")
    return filled[0] if filled else next(key for key in keys if key in row)


def _question(row: dict) -> _Turn:
    key = _only_key(row, ("instruction", *_PROMPT_KEYS))
    return _Turn("user", row[key], key)


def _listed_turns(row: dict, options: RecordOptions, key: str) -> list[_Turn]:
    return _with_system(row, _some_turns(row[key], key))


def _alpaca_turns(row: dict, options: RecordOptions) -> list[_Turn]:
    return _with_system(row, [*_history_turns(row), _instruction(row), _answer(row, "output")])


def _pair_turns(row: dict, options: RecordOptions) -> list[_Turn]:
    return [*_question_turns(row, options), _answer(row, _only_key(row, _ANSWER_KEYS))]


def _answer(row: dict, key: str) -> _Turn:
    """The one answer of a row, with the reasoning that stands beside it."""
    return _Turn("assistant", row[key], key, _reasoning(row))


def _question_turns(row: dict, options: RecordOptions) -> list[_Turn]:
    return _with_system(row, [*_history_turns(row), _question(row)])


def _law_turns(row: dict, options: RecordOptions) -> list[_Turn]:
    question = _text(row["input"], "input")
    if options.use_reference:
        passages = _as_list(row["reference"], "reference")
        texts = [_text(each, f"reference[{index}]") for index, each in enumerate(passages)]
        question = "\n".join([*texts, question])
    turns = [_Turn("user", question, "input"), _answer(row, "output")]
    return _with_system(row, [*_history_turns(row), *turns])


_CONVERSATION_READERS: dict[str, Callable[[dict, RecordOptions], list[_Turn]]] = {
    "sharegpt": partial(_listed_turns, key="conversations"),
    "messages": partial(_listed_turns, key="messages"),
    "mft": partial(_listed_turns, key="chat_rounds"),
    "alpaca": _alpaca_turns,
    "law": _law_turns,
    "qa": _pair_turns,
    "question": _question_turns,
}

_PairTurns = tuple[list[_Turn], list[_Turn], list[_Turn]]


def _completion(row: dict, key: str) -> list[_Turn]:
    """An answer given as a string, as one turn, or as a list of turns."""
    value = _turns_in_cell(row[key])
    if isinstance(value, dict):
        return [_turn(value, key)]
    return _some_turns(value, key) if isinstance(value, list) else [_Turn("assistant", value, key)]


def _turns_in_cell(value: Any) -> Any:
    """A turn or turns that a CSV cell holds as JSON; any other value, an answer in JSON too, as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    turns = found if isinstance(found, list) else [found]
    return found if turns and all(map(_is_turn, turns)) else value


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and any(value.keys() >= pair for pair in ({"from", "value"}, {"role", "content"}))


def _family_pair(row: dict, options: RecordOptions) -> _PairTurns:
    question = _Turn("user", row["question"], "question")
    prompt = _with_system(row, [*_history_turns(row), question])
    answers = [[_Turn("assistant", row[key], key)] for key in ("response_chosen", "response_rejected")]
    return prompt, answers[0], answers[1]


def _sharegpt_pair(row: dict, options: RecordOptions) -> _PairTurns:
    prompt = _with_system(row, _some_turns(row["conversations"], "conversations"))
    return prompt, _completion(row, "chosen"), _completion(row, "rejected")


def _trl_pair(row: dict, options: RecordOptions) -> _PairTurns:
    """A separate prompt (a string or messages), or a prompt that both answers begin with, or both."""
    chosen, rejected = _completion(row, "chosen"), _completion(row, "rejected")
    prompt = _trl_prompt(row)
    if chosen[:1] and chosen[0].role != "assistant":
        shared, chosen, rejected = _split_shared_prompt(chosen, rejected)
        if prompt and prompt[-1] != shared[-1]:
            raise RowError("chosen", "another question than in the field prompt", "the same question")
        prompt = shared
    elif not prompt:
        raise RowError("chosen", "answers without a question", "a field prompt, or messages that begin with it")
    return _with_system(row, prompt), chosen, rejected


def _trl_prompt(row: dict) -> list[_Turn]:
    history = _history_turns(row)
    prompt = _turns_in_cell(row.get("prompt"))
    if isinstance(prompt, list):
        return [*history, *_turn_list(prompt, "prompt")]
    if row.get("instruction"):
        _only_key(row, ("instruction", "prompt", "question", "query"))
        return [*history, _instruction(row)]
    return [*history, _question(row)] if any(row.get(key) is not None for key in _PROMPT_KEYS) else history


def _split_shared_prompt(chosen: list[_Turn], rejected: list[_Turn]) -> _PairTurns:
    """Two whole conversations: their longest common beginning after which both go on with an assistant turn."""
    split = 0
    for index, (left, right) in enumerate(zip(chosen, rejected, strict=False)):
        if left.role == right.role == "assistant":
            split = index
        if left != right:
            break
    if not split:
        raise RowError("chosen", "no beginning in common with rejected", "two answers to the same question")
    return chosen[:split], chosen[split:], rejected[split:]


_PREFERENCE_READERS: dict[str, Callable[[dict, RecordOptions], _PairTurns]] = {
    "preference": _family_pair,
    "preference_sharegpt": _sharegpt_pair,
    "preference_trl": _trl_pair,
}


# --- messages: the checks that all formats share ---------------------------------------------------------------------


def _messages(turns: list[_Turn], options: RecordOptions, answered: bool = True) -> Messages:
    """The checked internal form; ``answered``: the last message must be the assistant's, otherwise it must not be."""
    first, turns = turns[0], _without_empty_system(turns)
    if not turns:
        raise RowError(first.field, "an empty system prompt alone", "a question")
    messages = [_message(turn, options) for turn in turns]
    if answered and all(message["role"] != "assistant" for message in messages):
        raise RowError(turns[-1].field, "no assistant turn", "at least one answer")
    _check_order(messages, turns)
    last = messages[-1]["role"]
    if answered and last != "assistant":
        raise RowError(turns[-1].field, f"{_turn_of(last)} at the end", "an assistant turn at the end")
    if not answered and last not in ("user", "tool"):
        raise RowError(turns[-1].field, f"{_turn_of(last)} at the end", "a user or tool turn at the end")
    return messages


def _without_empty_system(turns: list[_Turn]) -> list[_Turn]:
    """An empty system prompt counts as none."""
    first = turns[0] if turns else None
    empty = first and first.role == "system" and isinstance(first.content, str) and not first.content.strip()
    return turns[1:] if empty else turns


def _check_order(messages: Messages, turns: list[_Turn]) -> None:
    before, allowed = "the beginning", {"system", "user"}
    for message, turn in zip(messages, turns, strict=True):
        role = message["role"]
        if role not in allowed:
            raise RowError(turn.field, f"{_turn_of(role)} after {before}", _turn_of(" or ".join(sorted(allowed))))
        # A call that is never answered would teach the model to go on without the result.
        allowed = {"tool"} if message.get("tool_calls") else _FOLLOWERS[role]
        before = _turn_of(role)


def _turn_of(roles: str) -> str:
    return f"{'an' if roles.startswith('a') else 'a'} {roles} turn"


def _message(turn: _Turn, options: RecordOptions) -> dict[str, Any]:
    tool_calls = _tool_calls(turn, options)
    content = "" if turn.content is None and tool_calls else turn.content
    message: dict[str, Any] = {"role": turn.role, "content": _clean(content, turn.field, options)}
    if turn.role in ("user", "assistant") and not message["content"].strip() and not tool_calls:
        expected = "a question" if turn.role == "user" else "an answer"
        raise RowError(turn.field, "an empty text", expected)
    if turn.role == "assistant" and turn.reasoning_content:
        where = f"reasoning of {turn.field}"
        message["reasoning_content"] = _clean(turn.reasoning_content, where, options)
    if tool_calls:
        message["tool_calls"] = tool_calls
    if turn.role == "tool":
        labels = {"name": turn.name, "tool_call_id": turn.tool_call_id}
        message |= {key: _clean(value, f"{key} of {turn.field}", options) for key, value in labels.items() if value}
    return message


def _tool_calls(turn: _Turn, options: RecordOptions) -> list[dict] | None:
    """OpenAI's form with the arguments as an object (chat templates write them with tojson), or None."""
    value = turn.tool_calls
    if value is None or value == []:
        return None
    if turn.role != "assistant":
        raise RowError(turn.field, f"tool calls in {_turn_of(turn.role)}", "tool calls in assistant turns only")
    value = _parsed_json(value, turn.field)
    calls = [_tool_call(each, turn.field) for each in (value if isinstance(value, list) else [value])]
    _check_json(calls, turn.field, options)
    return calls or None


def _tool_call(value: Any, where: str) -> dict:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(where, _describe(value), "a tool call {'name': ..., 'arguments': {...}}")
    arguments = function.get("arguments")
    arguments = {} if arguments is None else _parsed_json(arguments, where)
    if not isinstance(arguments, dict):
        raise RowError(where, f"arguments that are {_describe(arguments)}", "arguments that are an object")
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return call if value.get("id") is None else {"id": value["id"], **call}


def _row_tools(row: dict, options: RecordOptions) -> list[dict] | None:
    value = _only_value(row, _TOOL_KEYS, "")
    tools = [_tool(each, f"tools[{index}]") for index, each in enumerate(_as_list(value, "tools"))]
    if not tools:
        return None
    _check_json(tools, "tools", options)
    return tools


def _tool(value: Any, where: str) -> dict:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(where, _describe(value), "a tool {'type': 'function', 'function': {'name': ...}}")
    description = function.get("description")
    if description is not None:
        _text(description, f"{where}.description")
    return value if function is not value else {"type": "function", "function": function}


def _margin(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        margin = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if not math.isfinite(margin):
        raise RowError("margin", _describe(value), "a finite number")
    return margin


# --- values ----------------------------------------------------------------------------------------------------------


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RowError(where, _describe(value), "a string")
    return value


def _clean(value: Any, where: str, options: RecordOptions, placeholders: bool = True) -> str:
    """A string that can be encoded, with its placeholders filled in and no control token left."""
    text = _text(value, where)
    _check_encodable(text, where)
    if placeholders and not options.keep_placeholders:
        text = _PLACEHOLDER.sub(lambda match: _placeholder_value(match.group(), where, options), text)
    _check_control_tokens(text, where, options)
    return text


def _placeholder_value(placeholder: str, where: str, options: RecordOptions) -> str:
    flag = _PLACEHOLDERS[placeholder]
    value = getattr(options, flag)
    if not value:
        raise RowError(where, f"the placeholder {placeholder}", f"a value for it: pass --{flag}")
    return value


def _check_encodable(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"a lone surrogate (\\u{ord(text[error.start]):04x})"
        raise RowError(where, found, "text that can be encoded as UTF-8") from None


def _check_control_tokens(text: str, where: str, options: RecordOptions) -> None:
    if options.keep_control_tokens:
        return
    starts, pattern = _token_pattern(options.control_tokens)
    found = pattern.search(text) if any(start in text for start in starts) else None
    if found:
        expected = (
            "no text that the tokenizer takes for a special token; write it otherwise, or pass --keep_control_tokens "
            "True to train it as that token"
        )
        raise RowError(where, f"the control token {found.group()}", expected)


@cache
def _token_pattern(tokens: tuple[str, ...]) -> tuple[tuple[str, ...], re.Pattern]:
    """(how the tokens begin, a pattern of all): a tokenizer may have hundreds, and few texts have such a beginning."""
    firsts = {token[0] for token in tokens if token}
    starts = tuple(os.path.commonprefix([token for token in tokens if token[:1] == first]) for first in sorted(firsts))
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return starts, re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _check_json(value: Any, where: str, options: RecordOptions) -> None:
    """Tools and calls are rendered as JSON into the prompt, so the checks of text apply to that JSON."""
    if _is_deeper(value, _MAX_DEPTH):
        raise RowError(where, f"JSON nested more than {_MAX_DEPTH} levels deep", "less")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(where, f"a value that JSON cannot hold ({error})", "JSON values") from None
    _check_encodable(text, where)
    _check_control_tokens(text, where, options)


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list | tuple):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(each, levels - 1) for each in inside)


def _as_list(value: Any, where: str) -> list:
    """A list, or a string that holds one as JSON (the only way into a CSV cell). Nothing at all is an empty list."""
    if value is None or value == "":
        return []
    value = _parsed_json(value, where)
    if not isinstance(value, list | tuple):
        raise RowError(where, _describe(value), "a list")
    return list(value)


def _parsed_json(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RowError(where, f"{_describe(value)}, which is not JSON", "JSON") from None


def _describe(value: Any) -> str:
    """What was found, short enough for an error message."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, dict):
        return f"an object with the keys {_keys(value)}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, bool):
        return str(value).lower()
    return "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"


def _keys(value: dict) -> str:
    """The first dozen keys; in a file of another kind a text may stand in their place."""
    return ", ".join(map(_name, sorted(map(str, value))[:12])) or "(none)"


def _name(key: Any) -> str:
    return key if isinstance(key, str) and len(key) <= 40 and key.isprintable() else _describe(str(key))
