"""Rows read while training (--streaming): no copy on disk, and a resumed run goes on at the right row.

A stream has no length and cannot be shuffled, split, mixed by share or packed by best fit: rows come in the order of
the files, and pretraining fills its blocks in that order.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator

import torch
from datasets import IterableDataset

# A data loader reads a batch or two ahead of the trainer; states of so many batches are kept for the next checkpoint.
KEPT_STATES = 16

Encode = Callable[[dict], list[dict]]


class RowStream(torch.utils.data.IterableDataset):
    """Encoded rows from a stream of records, in whole global batches: the rows at the end that fill none are left out.

    Args:
        records: from stagewise.data.sources.stream_records; its state holds the file and the byte of the next row.
        encode: a record (`record`, `location`, `dataset`) to rows with input_ids.
        batch_rows: rows of a global batch (devices x accumulation steps x rows of a device).
        block_size: join the rows' ids into blocks of so many tokens, as pack_blocks does; None: rows as they are.
    """

    def __init__(self, records: IterableDataset, encode: Encode, batch_rows: int, block_size: int | None = None):
        self.records, self.encode, self.batch_rows, self.block_size = records, encode, batch_rows, block_size
        self._start: dict | None = None
        self._batches = 0
        self._states: deque[tuple[int, dict]] = deque(maxlen=KEPT_STATES)

    def state_after(self, batches: int) -> dict:
        """What load_state needs to go on after that many global batches."""
        for count, state in self._states:
            if count == batches:
                return {"batches": count, **state}
        raise ValueError(f"the stream has read {self._batches} batches and keeps no state after batch {batches}")

    def load_state(self, state: dict) -> None:
        """Go on where the state was taken, at the next iteration."""
        self._start = copy.deepcopy(state)

    def __iter__(self) -> Iterator[dict]:
        start, self._start = self._start, None
        if start is not None:
            self._batches = start["batches"]
        batch: list[dict] = []
        for row, state in self._rows(start):
            batch.append(row)
            if len(batch) == self.batch_rows:
                self._batches += 1
                self._states.append((self._batches, state))
                yield from batch
                batch = []

    def _rows(self, start: dict | None) -> Iterator[tuple[dict, dict]]:
        """Each row with the state to resume after it: the stream before its record, and how many rows to skip."""
        carry = start["carry"] if start else {"input_ids": [], "seq_lengths": [], "dataset": "", "location": ""}
        skip = start["skip"] if start else 0
        if start:
            self.records.load_state_dict(start["records"])
        iterator = iter(self.records)
        before = copy.deepcopy(self.records.state_dict())
        for record in iterator:
            carry_before = copy.deepcopy(carry)
            for count, row in enumerate(self._encoded(record, carry), 1):
                if count > skip:
                    yield row, {"records": before, "carry": carry_before, "skip": count}
            skip, before = 0, copy.deepcopy(self.records.state_dict())
        if carry["input_ids"] and not skip:
            yield _block(carry), {"records": before, "carry": copy.deepcopy(carry), "skip": 1}

    def _encoded(self, record: dict, carry: dict) -> Iterator[dict]:
        for row in self.encode(record):
            if self.block_size is None:
                yield row
            else:
                yield from self._fill_blocks(row, carry)

    def _fill_blocks(self, row: dict, carry: dict) -> Iterator[dict]:
        """Append the row's ids to the open block; yield each block that is full."""
        assert self.block_size is not None
        ids = row["input_ids"]
        if carry["input_ids"] and carry["dataset"] != row["dataset"]:  # a block holds one data set
            yield _block(carry)
            _empty(carry)
        start = 0
        while start < len(ids):
            piece = ids[start : start + self.block_size - len(carry["input_ids"])]
            carry["input_ids"] += piece
            carry["seq_lengths"].append(len(piece))
            carry["dataset"] = row["dataset"]
            carry["location"] = carry["location"] or row["location"]  # where the block begins
            start += len(piece)
            if len(carry["input_ids"]) == self.block_size:
                yield _block(carry)
                _empty(carry)


def _block(carry: dict) -> dict:
    return {**carry, "input_ids": list(carry["input_ids"]), "seq_lengths": list(carry["seq_lengths"])}


def _empty(carry: dict) -> None:
    carry.update(input_ids=[], seq_lengths=[], location="")
