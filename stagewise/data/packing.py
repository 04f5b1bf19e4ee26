"""Packing: several documents in one row without padding, each attending to itself alone.

Both packers keep the documents' lengths (`seq_lengths`) with the row; the collator turns them into position_ids that
restart, which isolates the documents in attention (transformers builds the block-diagonal mask from them).
"""

import bisect
import hashlib
import json
import logging

import numpy as np
import torch
from datasets import Dataset

from stagewise.data.tokenization import ENCODING_VERSION
from stagewise.distributed import decide_on_first
from stagewise.errors import InputError
from stagewise.losses.logprobs import IGNORE_INDEX

logger = logging.getLogger(__name__)


def pack_blocks(
    dataset: Dataset, block_size: int, num_proc: int | None = None, load_from_cache: bool = True
) -> Dataset:
    """Tokenized documents one after another, cut into blocks of `block_size` tokens (pretraining).

    No token is lost: a document that does not fit goes on in the next block, and the last block of each 10,000
    documents is left short. Columns: input_ids, seq_lengths (the pieces of documents in the block, in order),
    dataset, location (of the first document, and of the last).
    """

    def pack_batch(batch: dict) -> dict:
        blocks: list[list[int]] = [[]]
        pieces: list[list[int]] = [[]]
        names: list[str] = []
        locations: list[list[str]] = []
        for ids, name, location in zip(batch["input_ids"], batch["dataset"], batch["location"], strict=True):
            start = 0
            while start < len(ids):
                if len(blocks[-1]) == block_size or (blocks[-1] and names[-1] != name):
                    blocks.append([])
                    pieces.append([])
                if not blocks[-1]:
                    names.append(name)
                    locations.append([])
                locations[-1][1:] = [location]
                piece = ids[start : start + block_size - len(blocks[-1])]
                blocks[-1] += piece
                pieces[-1].append(len(piece))
                start += len(piece)
        full = [i for i, block in enumerate(blocks) if block]
        return {
            "input_ids": [blocks[i] for i in full],
            "seq_lengths": [pieces[i] for i in full],
            "dataset": names,
            "location": [" to ".join(dict.fromkeys(found)) for found in locations],
        }

    return _map_documents(dataset, pack_batch, "pack", block_size, num_proc, load_from_cache)


def split_documents(
    dataset: Dataset, block_size: int, num_proc: int | None = None, load_from_cache: bool = True
) -> Dataset:
    """Tokenized documents without packing: one row a document, a long one cut into rows of `block_size` tokens."""

    def split_batch(batch: dict) -> dict:
        rows = [
            {"input_ids": ids[start : start + block_size], "dataset": name, "location": location}
            for ids, name, location in zip(batch["input_ids"], batch["dataset"], batch["location"], strict=True)
            for start in range(0, len(ids), block_size)
        ]
        return {name: [row[name] for row in rows] for name in ("input_ids", "dataset", "location")}

    return _map_documents(dataset, split_batch, "split", block_size, num_proc, load_from_cache)


def _map_documents(dataset: Dataset, function, kind: str, block_size: int, num_proc, load_from_cache) -> Dataset:
    key = json.dumps([ENCODING_VERSION, dataset._fingerprint, kind, block_size])
    return dataset.map(
        function,
        batched=True,
        batch_size=10_000,
        remove_columns=dataset.column_names,
        num_proc=num_proc if num_proc and num_proc > 1 and len(dataset) > 10_000 else None,
        new_fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
        load_from_cache_file=load_from_cache,
        desc=f"Cutting into blocks of {block_size}",
    )


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Bins of item indices: the longest item first, each into the fullest bin that still has room.

    At most 11/9 of the optimal number of bins (Johnson 1974). Open bins are kept by remaining room, one list a room
    size, so that n items take O(n log capacity).

    Args:
        lengths: (n,), each between 1 and `capacity`.
    """
    rooms: list[int] = []  # sorted sizes of the room that some open bin has left
    open_bins: dict[int, list[int]] = {}
    bins: list[list[int]] = []
    for item in np.argsort(-np.asarray(lengths), kind="stable"):
        length = int(lengths[item])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            bins.append([])
            index, room = len(bins) - 1, capacity
        else:
            room = rooms[at]
            index = open_bins[room].pop()
            if not open_bins[room]:
                del open_bins[room], rooms[at]
        bins[index].append(int(item))
        left = room - length
        if left:
            if left not in open_bins:
                bisect.insort(rooms, left)
                open_bins[left] = []
            open_bins[left].append(index)
    return bins


def next_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Bins of item indices in the items' own order: an item that does not fit into the last bin opens a new one.

    Args:
        lengths: (n,), each between 1 and `capacity`.
    """
    bins: list[list[int]] = []
    room = 0
    for item, length in enumerate(lengths.tolist()):
        if length > room:
            bins.append([])
            room = capacity
        bins[-1].append(item)
        room -= length
    return bins


# --packing_strategy: what shares rows out to packed rows.
STRATEGIES = {"best_fit": best_fit_decreasing, "sequential": next_fit}


def pack_rows(dataset: Dataset, max_length: int, strategy: str = "best_fit") -> "PackedDataset":
    """Pack and say in the log how full the rows are.

    Args:
        strategy: a key of STRATEGIES.

    Raises:
        InputError: a stream, whose lengths nobody knows beforehand.
    """
    if not isinstance(dataset, Dataset):
        raise InputError("--packing: packing looks at the whole data set; with --streaming leave it off")
    packed = PackedDataset(dataset, max_length, strategy)
    logger.info("packing: %d rows in %d, %.1f%% full", len(dataset), len(packed), 100 * packed.efficiency)
    return packed


def _bins(lengths: np.ndarray, names: np.ndarray, max_length: int, strategy: str) -> list[list[int]]:
    """Rows that share a packed row, by their indices; those of each data set by themselves.

    In sequence they come in the order of their first rows, so that mixed data sets stay mixed.
    """
    bins = []
    for name in dict.fromkeys(names.tolist()):
        members = np.flatnonzero(names == name)
        bins += [members[found].tolist() for found in STRATEGIES[strategy](lengths[members], max_length)]
    return sorted(bins) if strategy == "sequential" else bins


class PackedDataset(torch.utils.data.Dataset):
    """Rows of a tokenized data set packed into rows of at most `max_length` tokens.

    Only the assignment is in memory, found by the first process for all; ids stay in the memory-mapped data set. The
    first label of each document is IGNORE_INDEX: no token is predicted from another document's last one.

    Item: input_ids, labels (lists of equal length), seq_lengths, dataset (the first document's; a row holds documents
    of one data set only), location (of all of them).
    """

    def __init__(self, dataset: Dataset, max_length: int, strategy: str = "best_fit"):
        self.dataset = dataset
        lengths = np.asarray(dataset.with_format("numpy")["length"][:])
        names = np.asarray(dataset["dataset"][:])
        self.bins: list[list[int]] = decide_on_first(lambda: _bins(lengths, names, max_length, strategy))
        self.efficiency = float(lengths.sum() / (len(self.bins) * max_length)) if self.bins else 0.0

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> dict:
        rows = self.dataset[self.bins[index]]
        labels = [[IGNORE_INDEX, *row[1:]] for row in rows["labels"]]
        return {
            "input_ids": [token for row in rows["input_ids"] for token in row],
            "labels": [label for row in labels for label in row],
            "seq_lengths": [len(row) for row in rows["input_ids"]],
            "dataset": rows["dataset"][0],
            "location": " + ".join(rows["location"]),
        }
