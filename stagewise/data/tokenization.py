"""Records and a chat template -> input_ids and labels.

input_ids are exactly what the tokenizer gives for the whole rendered text, because that is what inference engines feed
the model; labels follow the character offsets of the trained spans.
"""

import hashlib
import json
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from operator import itemgetter
from typing import Protocol

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from stagewise.data.files import MAX_BAD_SHARE
from stagewise.data.own_template import TokenizerRenderer, special_tokens
from stagewise.data.records import Conversation, Document
from stagewise.errors import InputError
from stagewise.losses.logprobs import IGNORE_INDEX
from template import Rendered, Template, TemplateError, split_reasoning

# Part of every cache key: raise it when the ids or labels of the same input change.
ENCODING_VERSION = 3
TOO_LONG = "more than max_length"
NOTHING_TRAINED = "no trained token: no answer has a span, or --train_on last meets an answer of weight 0"
# The tokenizer keeps some 200 bytes for each token of the texts that it has at hand: so many characters at once, and
# so many of one text. Windows on a longer one share so many characters, and hand over after so many equal tokens.
_LOT_CHARS, WINDOW_CHARS = 1 << 22, 1 << 18
_OVERLAP_CHARS, _SAME_TOKENS = 1 << 12, 32
QUESTION_TOO_LONG = "no trained token left after truncation to max_length"

Messages = list[dict]


class Renderer(Protocol):
    """Turns messages into text with trained spans.

    fingerprint identifies it in cache keys; control_tokens must not occur in contents; stop_tokens end an answer, and
    eos, if there is one, is that of them which becomes the EOS of a trained model's tokenizer. day
    is the date that it writes into its texts, or None; opens_think says whether its generation prompt opens a think
    block that every answer has to close, describes_tools whether the tools are in the text.
    """

    fingerprint: str
    control_tokens: tuple[str, ...]
    stop_tokens: tuple[str, ...]
    eos: str | None
    day: str | None
    opens_think: bool

    @property
    def describes_tools(self) -> bool: ...

    def render(
        self, messages: Messages, tools: list | None = None, add_generation_prompt: bool = False
    ) -> Rendered: ...

    def rows(self, messages: Messages, tools: list | None = None, last: bool = False) -> list[Rendered]:
        """The texts that together hold every assistant turn (or only the last) in a span of its own."""


class TemplateRenderer:
    """A template of template.py with the tokenizer's BOS and EOS.

    Raises:
        InputError: a control token of the template is not one token of the tokenizer.
    """

    day: str | None = None
    describes_tools = True

    def __init__(self, template: Template, tokenizer):
        self.template = template
        self.bos_token, self.eos_token = tokenizer.bos_token, tokenizer.eos_token
        written = template.control_tokens(self.eos_token)
        self.control_tokens = tuple(dict.fromkeys((*written, *special_tokens(tokenizer))))
        self.stop_tokens = template.stop_tokens(self.eos_token)
        self.eos = None if template.stop_opens_turn else self.stop_tokens[0]  # no role is an EOS
        self.fingerprint = json.dumps([template.to_jinja(), self.bos_token, self.eos_token])
        self.opens_think = template.thinking == "prompted"
        split = [t for t in written if len(tokenizer(t, add_special_tokens=False).input_ids) != 1]
        if split:
            raise InputError(
                f"--template_name {template.name}: {', '.join(split)} is not one token of this tokenizer, so it "
                "could not be learnt as a control token; pass --add_template_tokens True (adds and trains them), or "
                "choose the template of this model family"
            )

    def render(self, messages, tools=None, add_generation_prompt=False) -> Rendered:
        return self.template.render(
            messages,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
        )

    def rows(self, messages, tools=None, last=False) -> list[Rendered]:
        return [self.render(messages, tools)]


def build_renderer(template: Template | None, tokenizer, day: str | None = None) -> Renderer:
    """The named template's renderer, or the tokenizer's own chat template when no template is named.

    Args:
        day: what a chat template that prints the date takes for today, as 2025-12-31; None: today.
    """
    if template is not None:
        return TemplateRenderer(template, tokenizer)
    return TokenizerRenderer(tokenizer, date.fromisoformat(day) if day else None)


@dataclass(frozen=True)
class EncodingOptions:
    """How conversations become rows.

    max_length: tokens of a row at most.
    train_on: "all" assistant turns or only the "last".
    train_on_prompt: train every token.
    on_too_long: "truncate" (whole turns from the end, then the first answer), "drop" or "error".
    """

    max_length: int
    train_on: str = "all"
    train_on_prompt: bool = False
    on_too_long: str = "truncate"


@dataclass(frozen=True)
class Encoded:
    """One row: ids, labels (IGNORE_INDEX where not trained), where it comes from, what happened to it.

    conversation: its index in the batch; a conversation has several rows where the template renders earlier answers
        otherwise once others follow.
    messages: how many of the conversation's messages are in the row.
    dropped: the reason, or empty. truncated: "turns", "answer", or empty.
    remarks: what the template leaves out of the conversation or adds to it, joined by "; ", with its first row.
    """

    input_ids: list[int]
    labels: list[int]
    conversation: int = 0
    messages: int = 0
    dropped: str = ""
    truncated: str = ""
    remarks: str = ""


@dataclass(frozen=True)
class _Row:
    """A rendered text with its ids and the characters that they stand for."""

    rendered: Rendered
    ids: list[int]
    offsets: Sequence[tuple[int, int]]
    truncated: str = ""


def encode_conversations(
    conversations: Sequence[Conversation], renderer: Renderer, tokenizer, options: EncodingOptions
) -> list[Encoded]:
    """Render and tokenize a batch; one call of the tokenizer for all rows that fit.

    Returns:
        The rows of the first conversation, one or more, then those of the second ...
    """
    groups = [_render_rows(c, c.messages, renderer, options) for c in conversations]
    texts = [rendered.text for group in groups for rendered in group]
    encodings = encode_texts(texts, tokenizer, options.max_length)
    encoded = []
    for index, (conversation, group) in enumerate(zip(conversations, groups, strict=True)):
        rows = [_Row(rendered, *next(encodings)) for rendered in group]
        if options.on_too_long == "truncate" and any(len(row.ids) > options.max_length for row in rows):
            rows = _truncate(conversation, renderer, tokenizer, options)
        found = [_finish(row, index, conversation, options) for row in _rows_to_train(rows, conversation)]
        found[0] = replace(found[0], remarks=_remarks(conversation, rows, renderer))
        encoded += found
    return encoded


def _render_rows(
    conversation: Conversation, messages: Messages, renderer: Renderer, options: EncodingOptions
) -> list[Rendered]:
    # where every token is trained, one text holds them all
    last = options.train_on == "last" or options.train_on_prompt
    return renderer.rows(messages, conversation.tools, last)


def _weights(row: _Row, conversation: Conversation) -> list[int]:
    """Of each answer that has a span, whether it is trained."""
    return [conversation.messages[turn].get("weight", 1) for turn in row.rendered.turns]


def _rows_to_train(rows: Sequence[_Row], conversation: Conversation) -> Sequence[_Row]:
    """Without those whose answers all have weight 0, unless that is all there is."""
    return [row for row in rows if any(_weights(row, conversation))] or rows[:1]


def _finish(row: _Row, index: int, conversation: Conversation, options: EncodingOptions) -> Encoded:
    rendered = row.rendered
    messages = rendered.turns[-1] + 1 if rendered.turns else len(conversation.messages)
    if len(row.ids) > options.max_length:
        length = f"{len(row.ids)} tokens" if len(rendered.text) <= WINDOW_CHARS else f"{len(rendered.text)} characters"
        return Encoded([], [], index, messages, dropped=f"{length}, {TOO_LONG} {options.max_length}")
    weights = _weights(row, conversation)
    labels = label_ids(
        row.ids, row.offsets, rendered.spans, options.train_on, options.train_on_prompt,
        None if all(weights) else weights,
    )  # fmt: skip
    if count_trained(labels[1:]) == 0:  # the first token is not predicted
        return Encoded([], [], index, messages, dropped=QUESTION_TOO_LONG if row.truncated else NOTHING_TRAINED)
    return Encoded(row.ids, labels, index, messages, truncated=row.truncated)


def _remarks(conversation: Conversation, rows: Sequence[_Row], renderer: Renderer) -> str:
    """What the template leaves out of the conversation, and what it adds to answers, each said once."""
    found = dict.fromkeys(
        remark
        for row in rows
        for turn, (start, end) in zip(row.rendered.turns, row.rendered.spans, strict=True)
        for remark in _turn_remarks(conversation.messages[turn], row.rendered.text, start, end, renderer)
    )
    if conversation.tools and not renderer.describes_tools:
        found["tool descriptions are left out"] = None
    return "; ".join(found)


def _turn_remarks(message: dict, text: str, start: int, end: int, renderer: Renderer) -> Iterator[str]:
    content = message.get("content") or ""
    reasoning = message.get("reasoning_content")
    if not reasoning and "</think>" in content:
        reasoning, content = split_reasoning(message, content)
    if reasoning:
        if text.find(reasoning.strip(), start, end) < 0:
            yield "reasoning is left out"
    elif renderer.opens_think:
        yield "answers without reasoning close an empty think block"
    if message.get("tool_calls") and text.find(content.strip(), start, end) < 0:
        yield "text beside a call is left out"


class _Offsets(Sequence):
    """The characters that the tokens of an encoding stand for, looked up one by one: labels ask for few of them, and a
    list of all takes a fifth of the tokenizer's own time.
    """

    def __init__(self, encoding):
        self._encoding = encoding

    def __len__(self) -> int:
        return len(self._encoding)

    def __getitem__(self, index):
        return self._encoding.token_to_chars(index) or self._encoding.offsets[index]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._encoding.offsets)


class _PackedOffsets(Sequence):
    """The same of a long text, as numbers without an object for each."""

    def __init__(self) -> None:
        self.starts, self.ends = array("q"), array("q")

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index):
        return self.starts[index], self.ends[index]


def encode_texts(
    texts: Sequence[str], tokenizer, limit: int | None = None
) -> Iterator[tuple[list[int], Sequence[tuple[int, int]]]]:
    """Ids of each text and the characters that each token stands for, without special tokens of the tokenizer's own.

    By the batch of the tokenizer behind transformers' own, whose other results take as long again to make. The memory
    of a batch does not grow with its texts: they come in lots, and long ones in windows. Of a text of more than
    WINDOW_CHARS that has more than `limit` tokens, more than `limit` are given, and not all.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # which a tokenizer.json may switch on, as padding
    backend.no_padding()
    for lot in _lots(texts):
        if len(lot[0]) > WINDOW_CHARS:
            yield _encode_long(lot[0], backend, limit)
            continue
        for encoding in backend.encode_batch(lot, add_special_tokens=False):
            yield encoding.ids, _Offsets(encoding)


def _lots(texts: Sequence[str]) -> Iterator[list[str]]:
    """Neighbours of no more than _LOT_CHARS together; a text of more than WINDOW_CHARS is alone."""
    lot: list[str] = []
    chars = 0
    for text in texts:
        alone = len(text) > WINDOW_CHARS
        if lot and (alone or chars + len(text) > _LOT_CHARS):
            yield lot
            lot, chars = [], 0
        lot.append(text)
        chars += len(text)
        if alone:
            yield lot
            lot, chars = [], 0
    if lot:
        yield lot


def _encode_long(text: str, backend, limit: int | None) -> tuple[list[int], _PackedOffsets]:
    ids: list[int] = []
    offsets = _PackedOffsets()
    for tokens in _windows(text, backend):
        ids += [token for token, _, _ in tokens]
        offsets.starts.extend(start for _, start, _ in tokens)
        offsets.ends.extend(end for _, _, end in tokens)
        if limit is not None and len(ids) > limit:
            break
    return ids, offsets


_Token = tuple[int, int, int]  # id, first character, the one after its last


def _windows(text: str, backend) -> Iterator[list[_Token]]:
    """The tokens of a text, in pieces that overlap nowhere.

    Each window is tokenized by itself and begins inside the one before it. What a cut changes is near it: where both
    windows have the same _SAME_TOKENS tokens in a row, the first hands over to the second. Where they nowhere agree
    (one character a hundred thousand times), the first is doubled until it reaches behind that.
    """
    windows = _encoded_windows(text, backend)
    first, end, window = next(windows)
    valid, wanted = 0, 0  # from which character on the window's tokens count; how far it is to reach
    for begin, end, following in windows:
        border = None if wanted else _meeting(window, following)
        if border is not None:
            yield _between(window, valid, border)
            first, window, valid = begin, following, border
            continue
        wanted = wanted or min(len(text), 2 * end - first)
        if end >= wanted:
            window, wanted = _encode_windows(text, [(first, end)], backend)[0], 0
    yield _between(window, valid, len(text))


def _encoded_windows(text: str, backend) -> Iterator[tuple[int, int, list[_Token]]]:
    """(first character, the one after its last, tokens) of each; ever more at once, since few may be asked for."""
    stride = WINDOW_CHARS - _OVERLAP_CHARS
    places = [(begin, min(begin + WINDOW_CHARS, len(text))) for begin in range(0, len(text) - _OVERLAP_CHARS, stride)]
    done = 0
    while done < len(places):
        lot = places[done : done + min(max(done, 1), _LOT_CHARS // WINDOW_CHARS)]
        for (begin, end), tokens in zip(lot, _encode_windows(text, lot, backend), strict=True):
            yield begin, end, tokens
        done += len(lot)


def _encode_windows(text: str, places: list[tuple[int, int]], backend) -> list[list[_Token]]:
    encodings = backend.encode_batch([text[begin:end] for begin, end in places], add_special_tokens=False)
    return [
        [(token, begin + start, begin + end) for token, (start, end) in zip(each.ids, each.offsets, strict=True)]
        for (begin, _), each in zip(places, encodings, strict=True)
    ]


def _meeting(window: list[_Token], following: list[_Token]) -> int | None:
    """The character at which tokens of both windows begin that are the same for a while."""
    places = {start: index for index, (_, start, _) in reversed([*enumerate(following)])}
    first = bisect_left(window, following[0][1] + 1, key=itemgetter(1)) if following else len(window)
    for index in range(first, len(window) - _SAME_TOKENS):
        start = window[index][1]
        place = places.get(start, 0)
        # parts of one character have its place in common: the first of them is meant
        if place and window[index - 1][1] < start and following[place - 1][1] < start:
            run = window[index : index + _SAME_TOKENS]
            if run == following[place : place + _SAME_TOKENS]:
                return start
    return None


def _between(window: list[_Token], first: int, end: int) -> list[_Token]:
    start = bisect_left(window, first, key=itemgetter(1))
    return window[start : bisect_left(window, end, lo=start, key=itemgetter(1))]


def _truncate(conversation: Conversation, renderer: Renderer, tokenizer, options: EncodingOptions) -> list[_Row]:
    """Cut whole rounds from the end; if the first answer alone is too long, cut it (its stop token goes with it)."""
    messages = conversation.messages
    ends = [i + 1 for i, m in enumerate(messages) if m["role"] == "assistant" and not m.get("tool_calls")]
    for end in reversed(ends or [len(messages)]):
        rendered = _render_rows(conversation, messages[:end], renderer, options)
        texts = encode_texts([each.text for each in rendered], tokenizer, options.max_length)
        rows = [_Row(each, *ids, "turns") for each, ids in zip(rendered, texts, strict=True)]
        if all(len(row.ids) <= options.max_length for row in rows):
            return rows
    first = next(i for i, row in enumerate(rows) if len(row.ids) > options.max_length)
    cut, limit = rows[first], options.max_length
    return [*rows[:first], _Row(cut.rendered, cut.ids[:limit], list(cut.offsets)[:limit], "answer")]


def label_ids(
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int]],
    train_on: str = "all",
    train_on_prompt: bool = False,
    weights: Sequence[int] | None = None,
) -> list[int]:
    """The ids of tokens that carry a character of a trained span, IGNORE_INDEX elsewhere.

    A token that straddles the start of a span is trained; one that starts at or after its end is not. Several tokens
    of one multi-byte character share its offsets and stay together. A span of weight 0 (`weights` has one for each
    span, or is None for 1 everywhere) is never trained, by train_on_prompt neither.
    """
    labels = list(ids) if train_on_prompt else [IGNORE_INDEX] * len(ids)
    weighed = [(span, 1) for span in spans] if weights is None else list(zip(spans, weights, strict=True))
    if train_on_prompt:
        weighed = [(span, weight) for span, weight in weighed if not weight]
    elif train_on == "last":
        weighed = weighed[-1:]
    for (start, end), weight in weighed:
        first = bisect_left(offsets, start, key=itemgetter(0))
        while first > 0 and offsets[first - 1][1] > start:
            first -= 1
        stop = bisect_left(offsets, end, lo=first, key=itemgetter(0))
        labels[first:stop] = ids[first:stop] if weight else [IGNORE_INDEX] * (stop - first)
    return labels


def count_trained(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORE_INDEX)


def tokenizer_fingerprint(tokenizer) -> str:
    """What the ids depend on: vocabulary, merges, normalisation and added tokens."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def cache_key(*parts: object) -> str:
    """The name of a tokenized data set in the cache, from everything that its ids depend on."""
    text = json.dumps([ENCODING_VERSION, *map(str, parts)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def tokenize_conversations(
    dataset: Dataset,
    renderer: Renderer,
    tokenizer,
    options: EncodingOptions,
    num_proc: int | None = None,
    load_from_cache: bool = True,
) -> Dataset:
    """Columns: the fields of Encoded (`conversation` is the row of `dataset`), further (not the first row of its
    conversation), length, trained (count of labels), location, dataset. Each row of `dataset` has one or more, in its
    order. Cached by everything that changes ids.
    """

    def encode_batch(batch: dict, indices: list[int]) -> dict:
        conversations = [Conversation.from_json(record) for record in batch["record"]]
        rows = encode_or_drop(conversations, renderer, tokenizer, options)
        columns = {name: [getattr(row, name) for row in rows] for name in Encoded.__dataclass_fields__}
        return columns | {
            "conversation": [indices[row.conversation] for row in rows],
            "further": [i > 0 and rows[i - 1].conversation == row.conversation for i, row in enumerate(rows)],
            "length": [len(row.input_ids) for row in rows],
            "trained": [count_trained(row.labels) for row in rows],
            "location": [batch["location"][row.conversation] for row in rows],
            "dataset": [batch["dataset"][row.conversation] for row in rows],
        }

    key = cache_key(dataset._fingerprint, tokenizer_fingerprint(tokenizer), renderer.fingerprint, options)
    return map_batches(dataset, encode_batch, key, num_proc, load_from_cache, "Tokenizing conversations", True)


def encode_or_drop(
    conversations: Sequence[Conversation], renderer: Renderer, tokenizer, options: EncodingOptions
) -> list[Encoded]:
    """The batch at once; if the template refuses a row, row by row, so that the refused one carries its reason."""
    try:
        return encode_conversations(conversations, renderer, tokenizer, options)
    except TemplateError:
        rows = []
        for index, conversation in enumerate(conversations):
            try:
                found = encode_conversations([conversation], renderer, tokenizer, options)
            except TemplateError as error:
                found = [Encoded([], [], dropped=str(error))]
            rows += [replace(row, conversation=index) for row in found]
        return rows


def encode_documents(texts: Sequence[str], tokenizer) -> list[list[int]]:
    """BOS where the tokenizer adds one, the text, and one EOS."""
    eos = tokenizer.eos_token_id
    rows: list[list[int]] = []
    for lot in _lots(texts):
        if len(lot[0]) <= WINDOW_CHARS:
            rows += tokenizer(lot, verbose=False)["input_ids"]
            continue
        before, after = _added_around(tokenizer)
        rows.append([*before, *next(encode_texts(lot, tokenizer))[0], *after])
    return [row if row[-1:] == [eos] else [*row, eos] for row in rows]


def _added_around(tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer writes before and after a text."""
    whole = tokenizer("a", verbose=False)["input_ids"]
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    before = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:before], whole[before + len(bare) :]


def tokenize_documents(
    dataset: Dataset, tokenizer, num_proc: int | None = None, load_from_cache: bool = True
) -> Dataset:
    """Columns input_ids (see encode_documents), length, location, dataset."""

    def encode_batch(batch: dict) -> dict:
        ids = encode_documents([Document.from_json(record).text for record in batch["record"]], tokenizer)
        return {"input_ids": ids, "length": [len(row) for row in ids]}

    key = cache_key(dataset._fingerprint, tokenizer_fingerprint(tokenizer), "documents")
    return map_batches(dataset, encode_batch, key, num_proc, load_from_cache, "Tokenizing documents")


def map_batches(
    dataset: Dataset,
    encode_batch,
    key: str,
    num_proc: int | None,
    load_from_cache: bool,
    desc: str,
    changes_rows: bool = False,
) -> Dataset:
    """The columns of `encode_batch` in place of `record`, cached under `key`. Lists are token ids.

    Args:
        changes_rows: `encode_batch` takes the rows' numbers as well and gives all columns, for more rows than it took.
    """

    def typed_batch(batch: dict, *indices: list[int]) -> dict:
        """Lists as int64: a batch whose rows are all dropped has nothing from which the type could be told."""
        return {
            name: [np.asarray(row, dtype=np.int64) for row in column] if isinstance(column[0], list) else column
            for name, column in encode_batch(batch, *indices).items()
        }

    return dataset.map(
        typed_batch,
        with_indices=changes_rows,
        batched=True,
        batch_size=1000,
        remove_columns=dataset.column_names if changes_rows else ["record"],
        num_proc=num_proc if num_proc and num_proc > 1 and len(dataset) > 1000 else None,
        new_fingerprint=key,
        load_from_cache_file=load_from_cache,
        desc=desc,
    )


def remedy(reason: str) -> str:
    """What to do about a row that is dropped for `reason`."""
    if reason == QUESTION_TOO_LONG:
        return "raise --model_max_length, or pass --on_too_long drop, which leaves rows that are too long out"
    limits = {"max_prompt_length": "--max_prompt_length", "max_length": "--model_max_length"}
    flag = next((flag for name, flag in limits.items() if name in reason), None)
    return f"raise {flag}, or take the rows that are too long out of the data" if flag else "mend the row"


def drop_unusable(dataset: Dataset, on_bad_row: str = "error", harmless: str | None = None) -> Dataset:
    """Without the rows that tokenization could not use.

    A row whose reason contains `harmless` is dropped without more ado (a row that is too long, where --on_too_long
    says so); any other unusable row stops the run unless --on_bad_row skip.

    Raises:
        InputError: with the first such row's location and reason, and how many more there are.
    """
    reasons = dataset.with_format("arrow")["dropped"][:]
    bad = np.flatnonzero(pc.not_equal(reasons, "").to_numpy(zero_copy_only=False))
    if not len(bad):
        return dataset
    fatal = [int(i) for i in bad if harmless is None or harmless not in reasons[int(i)].as_py()]
    too_many = len(fatal) > MAX_BAD_SHARE * len(dataset)
    if fatal and on_bad_row != "skip":
        first, reason = dataset[fatal[0]]["location"], reasons[fatal[0]].as_py()
        more = f" ({len(fatal) - 1} more rows cannot be used)" if len(fatal) > 1 else ""
        skip = "" if too_many else ", or pass --on_bad_row skip"
        raise InputError(f"{first}: {reason}{more}; {remedy(reason)}{skip}")
    if too_many:
        first, reason = dataset[fatal[0]]["location"], reasons[fatal[0]].as_py()
        raise InputError(
            f"{len(fatal)} of {len(dataset)} rows cannot be used, more than {MAX_BAD_SHARE:.0%}, so --on_bad_row skip "
            f"does not apply: {remedy(reason)}; the first: {first}: {reason}"
        )
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), bad))
