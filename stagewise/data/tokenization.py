"""Records and a chat template -> input_ids and labels.

input_ids are exactly what the tokenizer gives for the whole rendered text, because that is what inference engines feed
the model; labels follow the character offsets of the trained spans.
"""

import hashlib
import json
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Protocol

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from stagewise.data.files import MAX_BAD_SHARE
from stagewise.data.records import Conversation, Document
from stagewise.errors import InputError
from stagewise.losses.logprobs import IGNORE_INDEX
from template import Rendered, Template, TemplateError

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


def special_tokens(tokenizer) -> tuple[str, ...]:
    """The texts that the tokenizer takes for a special token wherever they stand; its template writes some of them."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(dict.fromkeys((*tokenizer.all_special_tokens, *added)))


class Renderer(Protocol):
    """Turns messages into text with trained spans.

    fingerprint identifies it in cache keys; control_tokens must not occur in contents; stop_tokens end an answer.
    """

    fingerprint: str
    control_tokens: tuple[str, ...]
    stop_tokens: tuple[str, ...]

    def render(
        self, messages: Messages, tools: list | None = None, add_generation_prompt: bool = False
    ) -> Rendered: ...


class TemplateRenderer:
    """A template of template.py with the tokenizer's BOS and EOS.

    Raises:
        InputError: a control token of the template is not one token of the tokenizer.
    """

    def __init__(self, template: Template, tokenizer):
        self.template = template
        self.bos_token, self.eos_token = tokenizer.bos_token, tokenizer.eos_token
        written = template.control_tokens(self.eos_token)
        self.control_tokens = tuple(dict.fromkeys((*written, *special_tokens(tokenizer))))
        self.stop_tokens = template.stop_tokens(self.eos_token)
        self.fingerprint = json.dumps([template.to_jinja(), self.bos_token, self.eos_token])
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


class TokenizerRenderer:
    """The tokenizer's own chat template. Spans come from prefix rendering: up to each assistant turn with the
    generation prompt, then with the turn.

    Where the template renders a turn differently once others follow (reasoning that is dropped from the history), only
    the turns whose prefix is still a prefix of the whole text are trained; the last turn always is.
    """

    def __init__(self, tokenizer):
        if not tokenizer.chat_template:
            raise InputError(
                "--template_name: not given, and the tokenizer has no chat template of its own; "
                "`python template.py` lists the templates"
            )
        self.tokenizer = tokenizer
        self.control_tokens = special_tokens(tokenizer)
        self.fingerprint = json.dumps([tokenizer.chat_template, tokenizer.special_tokens_map])
        probe = self.render([{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}])
        answer = probe.text[slice(*probe.spans[-1])]
        self.stop_tokens = tuple({tokenizer.eos_token, *(t for t in self.control_tokens if answer.endswith(t))})

    def _text(self, messages, tools, add_generation_prompt) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # jinja2 errors, raise_exception() of the template
            raise TemplateError(f"the tokenizer's chat template refuses the conversation: {error}") from error

    def render(self, messages, tools=None, add_generation_prompt=False) -> Rendered:
        text = self._text(messages, tools, add_generation_prompt)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._text(messages[:i], tools, True)
            upto = self._text(messages[: i + 1], tools, False)
            if not text.startswith(prompt):
                continue
            end = self._span_end(text, upto, message, len(prompt))
            if end is not None:
                spans.append((len(prompt), end))
        return Rendered(text=text, spans=tuple(spans))

    def _span_end(self, text: str, upto: str, message: dict, start: int) -> int | None:
        """The end of the first control token after the answer: the separator that follows it is not trained."""
        if not text.startswith(upto.rstrip("\n")):
            return None
        content = message["content"].rstrip()
        after_content = max(start, upto.rfind(content) + len(content))
        stops = [(at, at + len(t)) for t in self.control_tokens if (at := upto.find(t, after_content)) >= 0]
        return min(stops)[1] if stops else len(upto.rstrip("\n"))


def build_renderer(template: Template | None, tokenizer) -> Renderer:
    """The named template's renderer, or the tokenizer's own chat template when no template is named."""
    return TemplateRenderer(template, tokenizer) if template is not None else TokenizerRenderer(tokenizer)


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
    """One row: ids, labels (IGNORE_INDEX where not trained), what happened to it."""

    input_ids: list[int]
    labels: list[int]
    dropped: str = ""  # the reason, or empty
    truncated: str = ""  # "turns", "answer", or empty


def encode_conversations(
    conversations: Sequence[Conversation], renderer: Renderer, tokenizer, options: EncodingOptions
) -> list[Encoded]:
    """Render and tokenize a batch; one call of the tokenizer for all rows that fit."""
    rendered = [renderer.render(c.messages, tools=c.tools) for c in conversations]
    rows = []
    encodings = encode_texts([r.text for r in rendered], tokenizer, options.max_length)
    for conversation, text, (ids, offsets) in zip(conversations, rendered, encodings, strict=True):
        truncated, weights = "", _weights(conversation, text.spans)
        if len(ids) > options.max_length:
            if options.on_too_long != "truncate":
                length = f"{len(ids)} tokens" if len(text.text) <= WINDOW_CHARS else f"{len(text.text)} characters"
                rows.append(Encoded([], [], dropped=f"{length}, {TOO_LONG} {options.max_length}"))
                continue
            text, ids, offsets, truncated = _truncate(conversation, renderer, tokenizer, options.max_length)
        weights = weights and weights[: len(text.spans)]
        labels = label_ids(ids, offsets, text.spans, options.train_on, options.train_on_prompt, weights)
        if count_trained(labels[1:]) == 0:  # the first token is not predicted
            rows.append(Encoded([], [], dropped=QUESTION_TOO_LONG if truncated else NOTHING_TRAINED))
        else:
            rows.append(Encoded(ids, labels, truncated=truncated))
    return rows


def _weights(conversation: Conversation, spans: Sequence) -> list[int] | None:
    """The weight of each answer, which is that of its span, or None where every answer is trained.

    Raises:
        TemplateError: the template gives some answers no span, and it cannot be told which.
    """
    weights = [message.get("weight", 1) for message in conversation.messages if message["role"] == "assistant"]
    if all(weights):
        return None
    if len(spans) != len(weights):
        raise TemplateError("an answer has weight 0, and the template renders earlier answers differently")
    return weights


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


def _truncate(conversation: Conversation, renderer: Renderer, tokenizer, max_length: int):
    """Cut whole rounds from the end; if the first answer alone is too long, cut it (its stop token goes with it)."""
    messages = conversation.messages
    ends = [i + 1 for i, m in enumerate(messages) if m["role"] == "assistant" and not m.get("tool_calls")]
    ends = ends or [len(messages)]
    for end in reversed(ends):
        rendered = renderer.render(messages[:end], tools=conversation.tools)
        ids, offsets = next(encode_texts([rendered.text], tokenizer, max_length))
        if len(ids) <= max_length:
            return rendered, ids, offsets, "turns"
    return rendered, ids[:max_length], list(offsets)[:max_length], "answer"


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
    """Columns input_ids, labels, length, trained (count of labels), dropped and truncated (why, or empty), location,
    dataset. Row i is row i of `dataset`. Cached by everything that changes ids.
    """

    def encode_batch(batch: dict) -> dict:
        conversations = [Conversation.from_json(record) for record in batch["record"]]
        rows = encode_or_drop(conversations, renderer, tokenizer, options)
        return {
            "input_ids": [row.input_ids for row in rows],
            "labels": [row.labels for row in rows],
            "length": [len(row.input_ids) for row in rows],
            "trained": [count_trained(row.labels) for row in rows],
            "dropped": [row.dropped for row in rows],
            "truncated": [row.truncated for row in rows],
        }

    key = cache_key(dataset._fingerprint, tokenizer_fingerprint(tokenizer), renderer.fingerprint, options)
    return map_batches(dataset, encode_batch, key, num_proc, load_from_cache, "Tokenizing conversations")


def encode_or_drop(
    conversations: Sequence[Conversation], renderer: Renderer, tokenizer, options: EncodingOptions
) -> list[Encoded]:
    """The batch at once; if the template refuses a row, row by row, so that the refused one carries its reason."""
    try:
        return encode_conversations(conversations, renderer, tokenizer, options)
    except TemplateError:
        rows = []
        for conversation in conversations:
            try:
                rows += encode_conversations([conversation], renderer, tokenizer, options)
            except TemplateError as error:
                rows.append(Encoded([], [], dropped=str(error)))
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
    dataset: Dataset, encode_batch, key: str, num_proc: int | None, load_from_cache: bool, desc: str
) -> Dataset:
    """The columns of `encode_batch` in place of `record`, cached under `key`. Lists are token ids."""

    def typed_batch(batch: dict) -> dict:
        """Lists as int64: a batch whose rows are all dropped has nothing from which the type could be told."""
        return {
            name: [np.asarray(row, dtype=np.int64) for row in column] if isinstance(column[0], list) else column
            for name, column in encode_batch(batch).items()
        }

    return dataset.map(
        typed_batch,
        batched=True,
        batch_size=1000,
        remove_columns=["record"],
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
    return next((f"raise {flag}" for name, flag in limits.items() if name in reason), "mend the row")


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
    if fatal and on_bad_row != "skip":
        first, reason = dataset[fatal[0]]["location"], reasons[fatal[0]].as_py()
        more = f" ({len(fatal) - 1} more rows cannot be used)" if len(fatal) > 1 else ""
        raise InputError(f"{first}: {reason}{more}; {remedy(reason)}, or pass --on_bad_row skip")
    if len(fatal) > MAX_BAD_SHARE * len(dataset):
        first, reason = dataset[fatal[0]]["location"], reasons[fatal[0]].as_py()
        raise InputError(
            f"{len(fatal)} of {len(dataset)} rows cannot be used, more than {MAX_BAD_SHARE:.0%}, so --on_bad_row skip "
            f"does not apply: {remedy(reason)}; the first: {first}: {reason}"
        )
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), bad))
