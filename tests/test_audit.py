"""The label audit finds what would damage training, and says nothing about sound rows."""

import io

import pytest
from datasets import Dataset
from rich.console import Console

from stagewise.data.audit import audit_conversations, colour_labels, print_audit
from stagewise.data.records import Conversation
from stagewise.data.tokenization import (
    EncodingOptions,
    TemplateRenderer,
    encode_conversations,
    tokenize_conversations,
)
from stagewise.errors import InputError
from stagewise.losses.logprobs import IGNORE_INDEX
from template import get_template

OPTIONS = EncodingOptions(max_length=128)
CHATS = [
    Conversation(
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": f"Say the number {i}."},
            {"role": "assistant", "content": f"Say the number {i}."},
        ]
    )
    for i in range(5)
]


@pytest.fixture(scope="module")
def records():
    return Dataset.from_dict(
        {
            "record": [chat.to_json() for chat in CHATS],
            "location": [f"f:{i}" for i in range(5)],
            "dataset": ["f"] * 5,
        }
    )


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return TemplateRenderer(get_template("chatml"), tokenizer)


@pytest.fixture(scope="module")
def encoded(records, renderer, tokenizer):
    return tokenize_conversations(records, renderer, tokenizer, OPTIONS)


def damage(encoded: Dataset, change) -> Dataset:
    """Row 2 with its labels changed."""
    rows = encoded.to_list()
    change(rows[2])
    return Dataset.from_list(rows)


def test_sound_rows_pass_and_are_counted(records, encoded, renderer, tokenizer):
    audit = audit_conversations(records, encoded, renderer, tokenizer, OPTIONS)
    assert audit.checked == 5
    assert audit.trained_by_role["user"] == audit.trained_by_role["system"] == 0
    assert audit.trained_by_role["assistant"] == sum(encoded["trained"][:])
    answers = [tokenizer(f"Say the number {i}.<|im_end|>", add_special_tokens=False)["input_ids"] for i in range(5)]
    assert audit.trained_by_role["assistant"] == sum(map(len, answers))


def test_a_trained_user_token_is_found(records, encoded, renderer, tokenizer):
    def train_user(row):
        text_start = tokenizer.decode(row["input_ids"]).index("Say")
        prefix = tokenizer(tokenizer.decode(row["input_ids"])[:text_start], add_special_tokens=False)["input_ids"]
        row["labels"][len(prefix)] = row["input_ids"][len(prefix)]

    with pytest.raises(InputError, match="label audit: f:2: a user token is trained"):
        audit_conversations(records, damage(encoded, train_user), renderer, tokenizer, OPTIONS)


def test_an_untrained_stop_token_is_found(records, encoded, renderer, tokenizer):
    def forget_stop(row):
        last = max(i for i, label in enumerate(row["labels"]) if label != IGNORE_INDEX)
        row["labels"][last] = IGNORE_INDEX

    with pytest.raises(InputError, match="f:2: an answer ends with .* and not with a stop token"):
        audit_conversations(records, damage(encoded, forget_stop), renderer, tokenizer, OPTIONS)


def test_ids_that_inference_would_not_feed_are_found(records, encoded, renderer, tokenizer):
    def change_prompt(row):
        row["input_ids"][1] += 1

    with pytest.raises(InputError, match="f:2: input_ids are not the tokenizer's ids"):
        audit_conversations(records, damage(encoded, change_prompt), renderer, tokenizer, OPTIONS)


def test_shifted_labels_are_found(records, encoded, renderer, tokenizer):
    def shift(row):
        row["labels"] = [*row["labels"][1:], IGNORE_INDEX]

    with pytest.raises(InputError, match="f:2: a label is neither"):
        audit_conversations(records, damage(encoded, shift), renderer, tokenizer, OPTIONS)


def test_truncated_rows_pass(records, renderer, tokenizer):
    long = Conversation([*CHATS[0].messages, {"role": "user", "content": "x " * 90}, CHATS[0].messages[-1]])
    data = Dataset.from_dict({"record": [long.to_json()] * 2, "location": ["a:1", "a:2"], "dataset": ["a"] * 2})
    first_round = encode_conversations([CHATS[0]], renderer, tokenizer, OPTIONS)[0].input_ids
    for limit, kind in ((len(first_round) + 20, "turns"), (len(first_round) - 4, "answer")):
        options = EncodingOptions(limit)
        encoded = tokenize_conversations(data, renderer, tokenizer, options)
        assert encoded["truncated"][:] == [kind] * 2
        audit = audit_conversations(data, encoded, renderer, tokenizer, options)
        assert audit.turns_without_stop == (2 if kind == "answer" else 0)


def test_colours_keep_characters_whole(tokenizer):
    ids = tokenizer("你好 <|im_end|>", add_special_tokens=False)["input_ids"]
    text = colour_labels(ids, [IGNORE_INDEX] * (len(ids) - 1) + ids[-1:], tokenizer)
    assert text.plain == "你好 <|im_end|>"
    assert [(text.plain[s.start : s.end], str(s.style)) for s in text.spans] == [
        ("你好 ", "dim"),
        ("<|im_end|>", "bold green"),
    ]


def test_the_printed_audit_names_rows_and_counts(records, encoded, renderer, tokenizer):
    audit = audit_conversations(records, encoded, renderer, tokenizer, OPTIONS)
    out = io.StringIO()
    print_audit(audit, encoded, tokenizer, 1, Console(file=out, width=100))
    printed = out.getvalue()
    assert "f:0" in printed
    assert "f:1" not in printed
    assert "Label audit of 5 rows" in printed
    assert "99th percentile" in printed
