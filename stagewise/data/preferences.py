"""Preference pairs and a chat template -> the ids of a prompt and of its two completions.

As everywhere, prompt and completion together are exactly the tokenizer's ids of the whole rendered conversation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from datasets import Dataset

from stagewise.data.records import PreferencePair
from stagewise.data.tokenization import (
    Messages,
    Renderer,
    cache_key,
    encode_texts,
    map_batches,
    tokenizer_fingerprint,
)
from stagewise.errors import InputError
from template import TemplateError

# Why a pair is dropped that nothing can be learnt from; such a pair is counted and does not stop the run.
SAME_ANSWERS = "the two answers are the same tokens"
SAME_AFTER_TRUNCATION = f"{SAME_ANSWERS} after truncation"
PROMPT_TRUNCATED, COMPLETION_TRUNCATED = "prompt", "completion"


@dataclass(frozen=True)
class PreferenceOptions:
    """How long a pair may be, in tokens.

    max_length: of a row, which is the prompt and one completion. Completions are cut from their end.
    max_prompt_length: of the prompt, whose oldest rounds are dropped; None: they are dropped only where the row is too
        long otherwise.

    Raises:
        InputError: a prompt may be as long as the row.
    """

    max_length: int
    max_prompt_length: int | None = None

    def __post_init__(self) -> None:
        limit = self.max_prompt_length
        if limit is not None and not 1 <= limit < self.max_length:
            raise InputError(
                f"--max_prompt_length {limit}: expected 1 or more, and less than --max_length ({self.max_length}), "
                "which counts prompt and completion"
            )


@dataclass(frozen=True)
class EncodedPair:
    """The ids of a pair, and what happened to it.

    chosen_length, rejected_length: of the completions before they were cut.
    only_length_differs: one answer is the beginning of the other.
    dropped: the reason, or empty. truncated: "prompt", "completion", "prompt, completion", or empty.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_length: int = 0
    rejected_length: int = 0
    only_length_differs: bool = False
    dropped: str = ""
    truncated: str = ""


@dataclass(frozen=True)
class _RenderedPair:
    """Both conversations as text; in both the completion starts at character `border`."""

    chosen: str
    rejected: str
    border: int
    only_length_differs: bool


def encode_pairs(
    pairs: Sequence[PreferencePair], renderer: Renderer, tokenizer, options: PreferenceOptions
) -> list[EncodedPair]:
    """Render and tokenize a batch; one call of the tokenizer for all pairs that fit.

    Raises:
        TemplateError: the template refuses a pair, or does not render the same prompt for both of its answers.
    """
    rows = _tokenize([_render(pair, pair.prompt, renderer) for pair in pairs], tokenizer)
    return [
        _finish(row if _fits(row, options) else _shorten(pair, row, renderer, tokenizer, options), options)
        for pair, row in zip(pairs, rows, strict=True)
    ]


def _render(pair: PreferencePair, prompt: Messages, renderer: Renderer) -> _RenderedPair:
    chosen, chosen_start, chosen_answer = _render_side(prompt, pair.chosen, pair.tools, renderer)
    rejected, rejected_start, rejected_answer = _render_side(prompt, pair.rejected, pair.tools, renderer)
    if chosen[:chosen_start] != rejected[:rejected_start]:
        raise TemplateError("the template renders the prompt differently before the chosen and the rejected answer")
    continued = chosen_answer.startswith(rejected_answer) or rejected_answer.startswith(chosen_answer)
    return _RenderedPair(chosen, rejected, chosen_start, continued)


def _render_side(prompt: Messages, completion: Messages, tools, renderer: Renderer) -> tuple[str, int, str]:
    """(whole text, where the completion starts, the completion without its last stop token)."""
    messages = [*prompt, *completion]
    rendered = renderer.render(messages, tools=tools)
    turns = sum(message["role"] == "assistant" for message in messages)
    answers = sum(message["role"] == "assistant" for message in completion)
    # The last turn always has its span; which of several it is that lacks one cannot be told.
    if len(rendered.spans) < answers or (answers > 1 and len(rendered.spans) != turns):
        raise TemplateError("the template renders an earlier turn differently once others follow it")
    start, end = rendered.spans[-answers][0], rendered.spans[-1][1]
    answer = rendered.text[start:end]
    for token in renderer.stop_tokens:
        answer = answer.removesuffix(token)
    return rendered.text, start, answer.rstrip()


def _tokenize(rendered: Sequence[_RenderedPair], tokenizer) -> list[EncodedPair]:
    texts = [text for pair in rendered for text in (pair.chosen, pair.rejected)]
    sides = list(encode_texts(texts, tokenizer))
    return [_split(pair, *sides[2 * i], *sides[2 * i + 1]) for i, pair in enumerate(rendered)]


def _split(pair: _RenderedPair, chosen, chosen_offsets, rejected, rejected_offsets) -> EncodedPair:
    """The prompt is what both sides have in common up to the border.

    A token that straddles the border may differ between the sides; the completions then begin with it, or with the
    first token that its presence has changed.
    """
    limit = min(_tokens_before(chosen_offsets, pair.border), _tokens_before(rejected_offsets, pair.border))
    common = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    return EncodedPair(
        prompt_ids=chosen[:common],
        chosen_ids=chosen[common:],
        rejected_ids=rejected[common:],
        chosen_length=len(chosen) - common,
        rejected_length=len(rejected) - common,
        only_length_differs=pair.only_length_differs,
    )


def _tokens_before(offsets: Sequence[tuple[int, int]], border: int) -> int:
    """How many tokens end at or before the character `border`."""
    return next((i for i, (_, end) in enumerate(offsets) if end > border), len(offsets))


def _fits(row: EncodedPair, options: PreferenceOptions) -> bool:
    """Whether the prompt may stay as it is."""
    if options.max_prompt_length is not None:
        return len(row.prompt_ids) <= options.max_prompt_length
    return len(row.prompt_ids) + max(row.chosen_length, row.rejected_length) <= options.max_length


def _shorten(
    pair: PreferencePair, row: EncodedPair, renderer: Renderer, tokenizer, options: PreferenceOptions
) -> EncodedPair:
    """Drop rounds from the front of the prompt until it fits, or until only the last one is left."""
    for prompt in shorter_prompts(pair.prompt):
        (row,) = _tokenize([_render(pair, prompt, renderer)], tokenizer)
        row = replace(row, truncated=PROMPT_TRUNCATED)
        if _fits(row, options):
            break
    return row


def shorter_prompts(prompt: Messages) -> Iterator[Messages]:
    """The prompt without its first round, without its first two ...; the system message and the last round stay."""
    head = [message for message in prompt[:1] if message["role"] == "system"]
    starts = [i for i, message in enumerate(prompt) if message["role"] == "user"]
    for start in starts[1:]:
        yield [*head, *prompt[start:]]


def _finish(row: EncodedPair, options: PreferenceOptions) -> EncodedPair:
    """Cut the completions to the room that the prompt leaves, or say why the pair is of no use."""
    if row.chosen_ids == row.rejected_ids:
        return replace(row, dropped=SAME_ANSWERS)
    prompt_limit = options.max_prompt_length or options.max_length - 1
    if len(row.prompt_ids) > prompt_limit:
        name = "max_prompt_length" if options.max_prompt_length else "max_length"
        return EncodedPair([], [], [], dropped=f"{len(row.prompt_ids)} tokens, a prompt that does not fit {name}")
    room = options.max_length - len(row.prompt_ids)
    if max(len(row.chosen_ids), len(row.rejected_ids)) <= room:
        return row
    truncated = ", ".join(part for part in (row.truncated, COMPLETION_TRUNCATED) if part)
    row = replace(row, chosen_ids=row.chosen_ids[:room], rejected_ids=row.rejected_ids[:room], truncated=truncated)
    return replace(row, dropped=SAME_AFTER_TRUNCATION) if row.chosen_ids == row.rejected_ids else row


def tokenize_preferences(
    dataset: Dataset,
    renderer: Renderer,
    tokenizer,
    options: PreferenceOptions,
    num_proc: int | None = None,
    load_from_cache: bool = True,
) -> Dataset:
    """Columns prompt_ids, chosen_ids, rejected_ids, margin (0 where the record has none), prompt_length, length
    (tokens of both rows), the other fields of EncodedPair, location, dataset. Row i is row i of `dataset`. Cached by
    everything that changes ids.
    """

    def encode_batch(batch: dict) -> dict:
        pairs = [PreferencePair.from_json(record) for record in batch["record"]]
        rows = _encode_each(pairs, renderer, tokenizer, options)
        columns = {name: [getattr(row, name) for row in rows] for name in EncodedPair.__dataclass_fields__}
        return columns | {
            "margin": [float(pair.margin or 0.0) for pair in pairs],
            "prompt_length": [len(row.prompt_ids) for row in rows],
            "length": [2 * len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids) for row in rows],
        }

    key = cache_key(
        dataset._fingerprint, tokenizer_fingerprint(tokenizer), renderer.fingerprint, options, "preferences"
    )
    return map_batches(dataset, encode_batch, key, num_proc, load_from_cache, "Tokenizing preference pairs")


def _encode_each(
    pairs: Sequence[PreferencePair], renderer: Renderer, tokenizer, options: PreferenceOptions
) -> list[EncodedPair]:
    """The batch at once; if the template refuses a pair, pair by pair, so that the refused one carries its reason."""
    try:
        return encode_pairs(pairs, renderer, tokenizer, options)
    except TemplateError as error:
        if len(pairs) == 1:
            return [EncodedPair([], [], [], dropped=str(error))]
        return [row for pair in pairs for row in _encode_each([pair], renderer, tokenizer, options)]
