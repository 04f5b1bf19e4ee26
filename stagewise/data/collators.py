"""Rows of token ids -> one batch of tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stagewise.data.streaming import POSITION
from stagewise.losses.logprobs import IGNORE_INDEX

LOCATION = "location"


class CausalLMCollator:
    """Pads to the longest row, on the right.

    Rows with `seq_lengths` are packed: the batch then has position_ids that restart with each document and no
    attention_mask, which is what keeps the documents apart (a mask of ones, or a cache, would let them see each
    other). Rows without labels are trained on every token but each document's first.

    Batch: input_ids (B, T), labels (B, T), attention_mask (B, T) with 1 = real token, or position_ids (B, T);
    num_tokens (B,) real tokens of each row; dataset_id (B,) index into `dataset_names`; with `sample_ids` sample_ids
    (B, T), which document of its row a token belongs to, from 0. For FlashAttention also the borders of the documents
    (see _borders): from position_ids it finds them in a batch of one row only, and would let the documents of a larger
    one see each other.

    Args:
        pad_token_id: fills input_ids; padding has the label IGNORE_INDEX.
        dataset_names: the names that the rows' `dataset` column may have.
        attend_across_documents: packed rows without boundaries: position_ids run through.
        flash: the model's kernel is FlashAttention.
        sample_ids: whether the loss asks which tokens are of one sample.
    """

    def __init__(
        self,
        pad_token_id: int,
        dataset_names: Sequence[str] = (),
        attend_across_documents: bool = False,
        flash: bool = False,
        sample_ids: bool = False,
    ):
        self.pad_token_id = pad_token_id
        self.dataset_ids = {name: i for i, name in enumerate(dataset_names)}
        self.attend_across_documents = attend_across_documents
        self.flash = flash
        self.sample_ids = sample_ids

    def __call__(self, rows: Sequence[dict]) -> dict[str, Any]:
        ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        labels = [_labels(row) for row in rows]
        num_tokens = torch.tensor([len(row) for row in ids])
        batch = {
            "input_ids": _pad(ids, self.pad_token_id),
            "labels": _pad(labels, IGNORE_INDEX),
            "num_tokens": num_tokens,
            "dataset_id": torch.tensor([self.dataset_ids.get(row.get("dataset", ""), 0) for row in rows]),
        }
        if self.sample_ids:
            # of packed rows also where they are seen as one text: a mean over samples is over documents
            batch["sample_ids"] = _pad([_sample_ids(row) for row in rows], 0)
        if "seq_lengths" in rows[0] and not self.attend_across_documents:
            # padding tokens are at position 0, each a document of its own
            batch["position_ids"] = _pad([_restarting_positions(row["seq_lengths"]) for row in rows], 0)
            if self.flash:
                batch |= _borders(batch["position_ids"])
        else:
            width = batch["input_ids"].shape[1]
            batch["attention_mask"] = (torch.arange(width)[None] < num_tokens[:, None]).long()
        return batch


class PairwiseCollator:
    """Chosen and rejected rows in one batch, padded to the longest of both on the right.

    Batch: margin (B,); dataset_id (B,) index into `dataset_names`; num_tokens (2B,) real tokens of each row; input_ids
    and attention_mask (2B, T), where the first B rows are prompt + chosen, the other B prompt + rejected.

    Args:
        pad_token_id: fills input_ids; a token that no row ends with, because the score is read at the last other one.
        dataset_names: the names that the rows' `dataset` column may have.
    """

    def __init__(self, pad_token_id: int, dataset_names: Sequence[str] = ()):
        self.pad_token_id = pad_token_id
        self.dataset_ids = {name: i for i, name in enumerate(dataset_names)}

    def __call__(self, rows: Sequence[dict]) -> dict[str, Tensor]:
        ids = [
            torch.tensor([*row["prompt_ids"], *row[completion]])
            for completion in ("chosen_ids", "rejected_ids")
            for row in rows
        ]
        num_tokens = torch.tensor([len(row) for row in ids])
        return {
            "margin": torch.tensor([row.get("margin", 0.0) for row in rows]),
            "dataset_id": torch.tensor([self.dataset_ids.get(row.get("dataset", ""), 0) for row in rows]),
            "num_tokens": num_tokens,
            "input_ids": _pad(ids, self.pad_token_id),
            "attention_mask": (torch.arange(int(num_tokens.max()))[None] < num_tokens[:, None]).long(),
        }


class WithLocations:
    """A collator whose batches also say where their rows came from.

    Batch: what `collate` makes, and location (B, L), the bytes of each row's `location` with zeros behind. Bytes,
    because what travels between processes and devices is tensors. Of rows from a stream also the stream's POSITION.
    """

    def __init__(self, collate: Callable[[Sequence[dict]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, rows: Sequence[dict]) -> dict[str, Any]:
        batch = {**self.collate(rows), LOCATION: encode_locations([row.get(LOCATION, "") for row in rows])}
        if POSITION in rows[0]:
            batch[POSITION] = rows[0][POSITION]
        return batch


def encode_locations(locations: Sequence[str]) -> Tensor:
    """(B, L) uint8; read_locations is its inverse."""
    return _pad([torch.tensor([*text.encode(), 0], dtype=torch.uint8) for text in locations], 0)


def read_locations(encoded: Tensor) -> list[str]:
    """The texts that encode_locations was given, but for empty ones."""
    texts = [bytes(row).rstrip(b"\0").decode() for row in encoded.tolist()]
    return [text for text in texts if text]


def _borders(position_ids: Tensor) -> dict[str, Any]:
    """What FlashAttention's kernels for documents of all lengths take, of (B, T) positions that restart at 0.

    cu_seq_lens_q, cu_seq_lens_k: (documents + 1,) int32, where each begins in the rows laid end to end, and their end.
    max_length_q, max_length_k: tokens of the longest. All of it is found here, on the CPU, once for all layers.
    """
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    borders = torch.cat([starts, torch.tensor([position_ids.numel()])]).int()
    longest = int(borders.diff().max())
    return {
        "cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest
    }  # fmt: skip


def _labels(row: dict) -> Tensor:
    if "labels" in row:
        return torch.as_tensor(row["labels"])
    labels = torch.as_tensor(row["input_ids"]).clone()
    starts = torch.tensor([0, *row.get("seq_lengths", [])[:-1]]).cumsum(0)
    labels[starts] = IGNORE_INDEX
    return labels


def _sample_ids(row: dict) -> Tensor:
    lengths = torch.tensor(row.get("seq_lengths", [len(row["input_ids"])]))
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def _restarting_positions(seq_lengths: Sequence[int]) -> Tensor:
    return torch.cat([torch.arange(n) for n in seq_lengths])


def _pad(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
