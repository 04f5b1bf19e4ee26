"""Packing: nothing lost, documents apart, and the same loss per token as without packing."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise.data.collators import CausalLMCollator
from stagewise.data.packing import (
    PackedDataset,
    best_fit_decreasing,
    next_fit,
    pack_blocks,
    pack_rows,
    split_documents,
)
from stagewise.losses.logprobs import IGNORE_INDEX


def documents(*lengths: int) -> Dataset:
    ids, start = [], 10
    for n in lengths:
        ids.append(list(range(start, start + n)))
        start += n
    return Dataset.from_dict({"input_ids": ids, "length": list(lengths), **origin("a" * len(lengths))})


def origin(names: str) -> dict[str, list[str]]:
    """Columns for rows of the data sets of these names, a letter each, in a file of as many lines."""
    return {"dataset": list(names), "location": [f"{name}.txt:{line}" for line, name in enumerate(names, 1)]}


def test_best_fit_by_hand():
    # 6, 5, 4, 3, 2 into 10: 6 opens a bin; 5 a second; 4 fits the first exactly; 3 and 2 fill the second
    bins = best_fit_decreasing(np.array([2, 6, 3, 5, 4]), 10)
    assert [sorted(b) for b in bins] == [[1, 4], [0, 2, 3]]


@settings(derandomize=True, max_examples=50)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=80))
def test_best_fit_keeps_every_item_once_and_no_two_bins_could_be_one(lengths):
    bins = best_fit_decreasing(np.array(lengths), 64)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    rooms = [64 - sum(lengths[i] for i in b) for b in bins]
    assert min(rooms) >= 0
    loads = sorted(64 - room for room in rooms)
    assert len(bins) < 2 or loads[0] + loads[1] > 64


def test_next_fit_by_hand():
    """The last bin is kept, an item that fills the rest of one exactly belongs to it."""
    assert next_fit(np.array([3, 2, 4, 1, 5, 2]), 5) == [[0, 1], [2, 3], [4], [5]]
    assert next_fit(np.array([5]), 5) == [[0]]
    assert next_fit(np.array([], dtype=int), 5) == []


@settings(derandomize=True, max_examples=50)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_next_fit_keeps_the_order_and_overfills_nothing(lengths):
    bins = next_fit(np.array(lengths), 20)
    assert [item for found in bins for item in found] == list(range(len(lengths)))
    totals = [sum(lengths[item] for item in found) for found in bins]
    assert max(totals) <= 20
    for total, following in zip(totals, bins[1:], strict=False):
        assert total + lengths[following[0]] > 20


def test_sequential_packing_keeps_data_sets_apart_and_in_their_order():
    """Interleaved data sets stay interleaved, and no row holds two (the tail of one under the name of the other)."""
    lengths = [3, 4, 2, 4, 5, 1]
    ids = [[i] * n for i, n in enumerate(lengths)]
    dataset = Dataset.from_dict({"input_ids": ids, "labels": ids, "length": lengths, **origin("ababab")})
    packed = pack_rows(dataset, 5, "sequential")
    assert packed.bins == [[0, 2], [1], [3, 5], [4]]
    assert [packed[i]["dataset"] for i in range(4)] == ["a", "b", "b", "a"]
    assert [packed[i]["location"] for i in range(2)] == ["a.txt:1 + a.txt:3", "b.txt:2"]


def test_blocks_by_hand_lose_nothing():
    blocks = pack_blocks(documents(5, 4, 7, 1), 6, load_from_cache=False)
    assert blocks["input_ids"][:] == [[10, 11, 12, 13, 14, 15], [16, 17, 18, 19, 20, 21], [22, 23, 24, 25, 26]]
    assert blocks["seq_lengths"][:] == [[5, 1], [3, 3], [4, 1]]
    assert blocks["location"][:] == ["a.txt:1 to a.txt:2", "a.txt:2 to a.txt:3", "a.txt:3 to a.txt:4"]


def test_blocks_never_hold_two_data_sets():
    data = Dataset.from_dict({**documents(3, 3).to_dict(), **origin("ab")})
    blocks = pack_blocks(data, 8, load_from_cache=False)
    assert blocks["dataset"][:] == ["a", "b"]
    assert blocks["input_ids"][:] == [[10, 11, 12], [13, 14, 15]]


def test_split_documents_cuts_long_ones():
    rows = split_documents(documents(5, 2), 3, load_from_cache=False)
    assert rows["input_ids"][:] == [[10, 11, 12], [13, 14], [15, 16]]
    assert rows["location"][:] == ["a.txt:1", "a.txt:1", "a.txt:2"]


def test_collator_of_packed_rows_by_hand():
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "seq_lengths": [3, 2], "dataset": "a"},
        {"input_ids": [6, 7], "seq_lengths": [2], "dataset": "b"},
    ]
    batch = CausalLMCollator(0, ("a", "b"))(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5], [-100, 7, -100, -100, -100]]
    assert batch["num_tokens"].tolist() == [5, 2]
    assert batch["dataset_id"].tolist() == [0, 1]
    assert "attention_mask" not in batch


def test_collator_of_padded_rows_by_hand():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [-100]}]
    batch = CausalLMCollator(9)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, -100, -100]]


def test_attend_across_documents_has_no_boundaries():
    batch = CausalLMCollator(0, attend_across_documents=True)([{"input_ids": [1, 2, 3], "seq_lengths": [2, 1]}])
    assert "position_ids" not in batch
    assert batch["attention_mask"].tolist() == [[1, 1, 1]]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    from stagewise.modeling.token_loss import install_token_loss

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    # as random as it is, its attention is nearly uniform: sharpen it, or a leak would hardly show
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight *= 20
    assert install_token_loss(model)
    return model


@pytest.fixture(scope="module")
def tokenized():
    rng = np.random.default_rng(0)
    lengths = [int(n) for n in rng.integers(3, 40, 17)]
    ids = [rng.integers(10, 590, n).tolist() for n in lengths]
    labels = [[IGNORE_INDEX if rng.random() < 0.4 else token for token in row] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "length": lengths, **origin("a" * len(ids))})


def total_nll(model, rows, batch_size):
    """(sum of negative log-likelihoods, trained tokens) over all rows, batch by batch."""
    collate, nll, tokens = CausalLMCollator(0), 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        batch.pop("num_tokens"), batch.pop("dataset_id")
        with torch.no_grad():
            out = model(**batch)
        nll += out.row_nll.double().sum().item()
        tokens += int(out.row_tokens.sum())
    return nll, tokens


def test_packed_loss_equals_unpacked_loss(model, tokenized):
    packed = PackedDataset(tokenized, 64)
    assert len(packed) < len(tokenized)
    alone, alone_tokens = total_nll(model, tokenized, 1)
    for batch_size in (1, 3):
        nll, tokens = total_nll(model, packed, batch_size)
        assert tokens == alone_tokens
        assert nll == pytest.approx(alone, rel=1e-5)


def test_padding_changes_nothing(model, tokenized):
    alone, tokens = total_nll(model, tokenized, 1)
    padded, padded_tokens = total_nll(model, tokenized, 17)
    assert padded_tokens == tokens
    assert padded == pytest.approx(alone, rel=1e-5)


def test_packing_gradients_equal_unpacked_ones(model, tokenized):
    packed, count = PackedDataset(tokenized, 64), total_nll(model, tokenized, 1)[1]
    gradients = []
    for rows in (tokenized, packed):
        model.zero_grad()
        collate = CausalLMCollator(0)
        for i in range(len(rows)):
            batch = collate([rows[i]])
            batch.pop("num_tokens"), batch.pop("dataset_id")
            model(**batch, num_items_in_batch=count).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).clone())
    model.zero_grad()
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


def test_packing_keeps_data_sets_in_rows_of_their_own():
    data = Dataset.from_dict(
        {"input_ids": [[1, 2], [3, 4], [5, 6]], "labels": [[1, 2], [3, 4], [5, 6]], "length": [2, 2, 2]}
        | origin("aba")
    )
    packed = PackedDataset(data, 8)
    assert sorted((row["dataset"], sorted(row["input_ids"])) for row in packed) == [
        ("a", [1, 2, 5, 6]),
        ("b", [3, 4]),
    ]
    assert packed.efficiency == pytest.approx(6 / 16)
