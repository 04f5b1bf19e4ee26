"""Prompts and a chat template -> the ids that a policy continues.

They are exactly what inference.py feeds the model for the same messages: the tokenizer's ids of the rendered prompt,
generation prompt included.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset

from stagewise.data.preferences import PROMPT_TRUNCATED, shorter_prompts
from stagewise.data.records import Prompt
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


@dataclass(frozen=True)
class PromptOptions:
    """max_prompt_length: tokens of a prompt at most. A longer one loses its oldest rounds.

    Raises:
        InputError: no prompt could be so short.
    """

    max_prompt_length: int

    def __post_init__(self) -> None:
        if self.max_prompt_length < 1:
            raise InputError(f"--max_prompt_length {self.max_prompt_length}: expected a number of tokens, 1 or more")


@dataclass(frozen=True)
class EncodedPrompt:
    """The ids of a prompt, the text that they encode (control tokens included), and what happened to it.

    dropped: the reason, or empty; a dropped prompt has neither ids nor text.
    truncated: "prompt" where rounds were dropped, or empty.
    """

    input_ids: list[int]
    text: str
    dropped: str = ""
    truncated: str = ""


def encode_prompts(
    prompts: Sequence[Prompt], renderer: Renderer, tokenizer, options: PromptOptions
) -> list[EncodedPrompt]:
    """Render and tokenize a batch; one call of the tokenizer for all prompts that fit.

    Raises:
        TemplateError: the template refuses a prompt.
    """
    rows = _tokenize([_render(prompt, prompt.messages, renderer) for prompt in prompts], tokenizer)
    return [
        row if _fits(row, options) else _shorten(prompt, row, renderer, tokenizer, options)
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def _render(prompt: Prompt, messages: Messages, renderer: Renderer) -> str:
    return renderer.render(messages, tools=prompt.tools, add_generation_prompt=True).text


def _tokenize(texts: list[str], tokenizer) -> list[EncodedPrompt]:
    return [EncodedPrompt(ids, text) for (ids, _), text in zip(encode_texts(texts, tokenizer), texts, strict=True)]


def _fits(row: EncodedPrompt, options: PromptOptions) -> bool:
    return len(row.input_ids) <= options.max_prompt_length


def _shorten(
    prompt: Prompt, row: EncodedPrompt, renderer: Renderer, tokenizer, options: PromptOptions
) -> EncodedPrompt:
    """Drop rounds from the front until the prompt fits; one whose last round is too long by itself cannot be used."""
    for messages in shorter_prompts(prompt.messages):
        (row,) = _tokenize([_render(prompt, messages, renderer)], tokenizer)
        if _fits(row, options):
            return replace(row, truncated=PROMPT_TRUNCATED)
    reason = f"{len(row.input_ids)} tokens, more than max_prompt_length {options.max_prompt_length}"
    return EncodedPrompt([], "", dropped=reason)


def tokenize_prompts(
    dataset: Dataset,
    renderer: Renderer,
    tokenizer,
    options: PromptOptions,
    num_proc: int | None = None,
    load_from_cache: bool = True,
) -> Dataset:
    """Columns input_ids, text, length, dropped, truncated (see EncodedPrompt), location, dataset. Row i is row i of
    `dataset`. Cached by everything that changes ids.
    """

    def encode_batch(batch: dict) -> dict:
        prompts = [Prompt.from_json(record) for record in batch["record"]]
        rows = _encode_each(prompts, renderer, tokenizer, options)
        columns = {name: [getattr(row, name) for row in rows] for name in EncodedPrompt.__dataclass_fields__}
        return columns | {"length": [len(row.input_ids) for row in rows]}

    key = cache_key(dataset._fingerprint, tokenizer_fingerprint(tokenizer), renderer.fingerprint, options, "prompts")
    return map_batches(dataset, encode_batch, key, num_proc, load_from_cache, "Tokenizing prompts")


def _encode_each(
    prompts: Sequence[Prompt], renderer: Renderer, tokenizer, options: PromptOptions
) -> list[EncodedPrompt]:
    """The batch at once; if the template refuses a prompt, one by one, so that the refused one carries its reason."""
    try:
        return encode_prompts(prompts, renderer, tokenizer, options)
    except TemplateError as error:
        if len(prompts) == 1:
            return [EncodedPrompt([], "", dropped=str(error))]
        return [row for prompt in prompts for row in _encode_each([prompt], renderer, tokenizer, options)]


def prompt_hashes(dataset: Dataset) -> np.ndarray:
    """(rows,) uint64, equal where the input_ids are: eight bytes a prompt find those that occur twice."""
    hashes = np.empty(len(dataset), dtype=np.uint64)
    rows = (ids for batch in dataset.select_columns("input_ids").iter(1000) for ids in batch["input_ids"])
    for i, ids in enumerate(rows):
        digest = hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=8).digest()
        hashes[i] = int.from_bytes(digest, "little")
    return hashes


def completion_suffix(renderer: Renderer, tokenizer) -> list[int]:
    """The ids that the template writes behind the stop token of an answer, often none; of chatml those of a newline.

    A generated completion ends at its stop token; the rows on which reward models are trained go on with these ids.
    They are taken from a whole conversation: a tokenizer may give the same text other ids when it stands alone.
    """
    probe = renderer.render([{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}])
    encoding = tokenizer(probe.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    end = probe.spans[-1][1]
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    return [token for token, (start, _) in zip(ids, offsets, strict=True) if start >= end]
