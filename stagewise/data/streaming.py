"""Rows read while training (--streaming): no copy on disk, and a resumed run goes on at the right row.

A stream has no length and cannot be shuffled, split, mixed by share or packed by best fit: rows come in the order of
the files, and pretraining fills its blocks in that order.

Every process reads and encodes the whole stream and trains on its share of each step: where a row or a block begins is
known only to who has encoded the ones before. So no rows travel between processes, each has its own widths, and what a
step takes does not depend on how many processes there are.
"""

import copy
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator

import torch
from datasets import IterableDataset

from stagewise.errors import InputError

logger = logging.getLogger(__name__)

# In each row, as JSON: the place in the data after the step that the row belongs to, for load_state.
POSITION = "stream_position"

Encode = Callable[[dict], list[dict]]


class RowStream(torch.utils.data.IterableDataset):
    """Encoded rows from a stream of records, without end: when the files have been read they are read again.

    All processes get the same rows; accelerate leaves each its micro-batches. A data loader's worker gets the
    micro-batches that the loader will take from it, in the order in which a loader without workers would have them.

    Args:
        records: from stagewise.data.sources.stream_records; its state holds the file and the byte of the next row.
        encode: a record (`record`, `location`, `dataset`) to rows with input_ids.
        step_rows: rows of an optimizer step, of all processes.
        round_rows: rows of a micro-batch of all processes; step_rows is a multiple of it.
        block_size: join the rows' ids into blocks of so many tokens, as pack_blocks does; None: rows as they are.
        tells: this process names in the log what the stream leaves out; the others read the same.

    Raises:
        InputError: while iterating, for a row that cannot be used, and where one reading of the files gives fewer rows
            than a step takes: a step would have a row twice.
    """

    def __init__(
        self,
        records: IterableDataset,
        encode: Encode,
        step_rows: int,
        round_rows: int,
        block_size: int | None = None,
        tells: bool = True,
    ):
        self.records, self.encode, self.block_size, self.tells = records, encode, block_size, tells
        self.step_rows, self.round_rows = step_rows, round_rows
        self._start: dict | None = None

    def load_state(self, state: dict) -> None:
        """Go on where the state was taken, at the next iteration."""
        self._start = copy.deepcopy(state)

    def __iter__(self) -> Iterator[dict]:
        start, self._start = self._start, None
        worker = torch.utils.data.get_worker_info()
        if not self.tells or (worker is not None and worker.id > 0):
            logging.getLogger("stagewise.data").setLevel(logging.ERROR)
        if worker is None:
            yield from itertools.chain.from_iterable(self._rounds(start))
            return
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it has been forked, and encodes one row at a time
        # datasets would give each worker some of the files; here each reads all of them
        torch.utils.data._utils.worker._worker_info = None
        try:
            for rows in itertools.islice(self._rounds(start), worker.id, None, worker.num_workers):
                yield from rows
        except InputError as error:
            raise WorkerInputError(str(error)) from None

    def _rounds(self, start: dict | None) -> Iterator[list[dict]]:
        """The rows of one micro-batch of all processes after the other."""
        rows = self._rows(start)
        while True:
            step = list(itertools.islice(rows, self.step_rows))
            position = json.dumps(step[-1][1])
            for first in range(0, self.step_rows, self.round_rows):
                yield [{**row, POSITION: position} for row, _ in step[first : first + self.round_rows]]

    def _rows(self, start: dict | None) -> Iterator[tuple[dict, dict]]:
        """Each row with the state to resume after it, one reading of the files after the other."""
        while True:
            count = 0
            for row_and_state in self._one_reading(start or {}):
                count += 1
                yield row_and_state
            if start is None and count < self.step_rows:
                raise InputError(
                    f"--streaming: the files give {count} rows, and a step takes {self.step_rows} "
                    "(--per_device_train_batch_size x processes x --gradient_accumulation_steps); lower these, or "
                    "leave --streaming out"
                )
            logger.info("--streaming: the files have been read through; from here on they are read again")
            start = None

    def _one_reading(self, start: dict) -> Iterator[tuple[dict, dict]]:
        """Each row with the state to resume after it: the stream before its record, and how many rows to skip."""
        carry = start.get("carry") or {"input_ids": [], "seq_lengths": [], "dataset": "", "location": ""}
        skip = start.get("skip", 0)
        before = start.get("records", {})  # {}: the beginning
        self.records.load_state_dict(before)
        for record in self.records:
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


class WorkerInputError(InputError):
    """An InputError on its way out of a data loader's worker, for which torch writes a traceback into the message."""

    def __init__(self, message: str):
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())
