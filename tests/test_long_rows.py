"""Rows of many megabytes: the tokenizer sees windows of them, and the ids are those of the whole text."""

import os
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from stagewise.data import tokenization
from stagewise.data.audit import audit_conversations
from stagewise.data.records import Conversation
from stagewise.data.tokenization import (
    EncodingOptions,
    TemplateRenderer,
    encode_conversations,
    encode_documents,
    encode_texts,
)
from template import get_template

WINDOW = 8192


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(tokenization, "WINDOW_CHARS", WINDOW)
    monkeypatch.setattr(tokenization, "_LOT_CHARS", 4 * WINDOW)


def words(count: int) -> str:
    pieces = [
        "the",
        "心脏",
        "naïve",
        "don't",
        "\n",
        "\n\n",
        "<s>",
        "123456",
        "é",
        "😀",
        "a_b",
        "    ",
        "--------",
        ".",
    ]
    draw = random.Random(0)
    return "".join(draw.choice(pieces) + draw.choice(["", " "]) for _ in range(count))


TEXTS = {
    "mixed": words(12_000),
    "one letter": words(3_000) + "a" * 30_000 + words(3_000),
    "blanks": "x" + " " * 30_000 + words(3_000),
}


def sentencepiece_like() -> Tokenizer:
    """No words: merges may reach across blanks; the text begins with one that it has not."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([words(300)] * 5, trainer)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([words(300)] * 5, trainer)
    return tokenizer


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_like", "unigram"])
@pytest.mark.parametrize("text", TEXTS)
def test_windows_give_the_tokens_of_the_whole_text(kind, text, tokenizer):
    backend = tokenizer.backend_tokenizer if kind == "byte_level" else globals()[kind]()
    whole = backend.encode(TEXTS[text], add_special_tokens=False)
    ids, offsets = next(encode_texts([TEXTS[text]], SimpleNamespace(backend_tokenizer=backend)))
    assert ids == whole.ids
    assert list(offsets) == whole.offsets


class Recorder:
    """A tokenizer whose backend notes how many characters it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.seen = tokenizer, []
        self.backend_tokenizer = SimpleNamespace(
            no_truncation=lambda: None, no_padding=lambda: None, encode_batch=self.encode_batch
        )

    def encode_batch(self, texts, **options):
        self.seen += [len(text) for text in texts]
        return self.tokenizer.backend_tokenizer.encode_batch(texts, **options)


def test_a_long_row_costs_what_its_limit_can_use(tokenizer):
    renderer = TemplateRenderer(get_template("chatml"), tokenizer)
    turns = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": words(2_000_000 // 5)}]
    recorder = Recorder(tokenizer)
    row, row_dropped = (
        encode_conversations([Conversation(turns)], renderer, recorder, EncodingOptions(100, on_too_long=how))[0]
        for how in ("truncate", "drop")
    )
    assert max(recorder.seen) <= WINDOW
    assert sum(recorder.seen) <= 10 * WINDOW
    assert row_dropped.dropped.endswith("characters, more than max_length 100")

    head = renderer.render([turns[0], {"role": "assistant", "content": turns[1]["content"][:4000]}]).text
    assert row.input_ids == tokenizer(head, add_special_tokens=False)["input_ids"][:100]
    prompt = len(tokenizer(renderer.render(turns[:1], None, True).text, add_special_tokens=False)["input_ids"])
    assert row.labels == [-100] * prompt + row.input_ids[prompt:]


def test_the_audit_reads_no_more_of_a_long_row(tokenizer):
    from datasets import Dataset

    renderer, options = TemplateRenderer(get_template("chatml"), tokenizer), EncodingOptions(100)
    turns = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": words(40_000)}]
    record = Conversation(turns)
    row = encode_conversations([record], renderer, tokenizer, options)[0]
    columns = {
        name: getattr(row, name)
        for name in ("input_ids", "labels", "dropped", "truncated", "conversation", "messages")
    }
    encoded = Dataset.from_list([columns | {"location": "rows.jsonl:1"}])
    recorder = Recorder(tokenizer)
    recorder.convert_tokens_to_ids = tokenizer.convert_tokens_to_ids
    audit = audit_conversations(
        Dataset.from_list([{"record": record.to_json()}]), encoded, renderer, recorder, options
    )
    assert audit.checked == 1
    assert max(recorder.seen) <= WINDOW
    assert audit.trained_by_role["assistant"] == sum(label >= 0 for label in row.labels)


def test_long_documents_keep_their_frame_and_their_neighbours(tokenizer, monkeypatch):
    texts = ["Short.", TEXTS["mixed"], "Between.", TEXTS["blanks"], "", "Last."]
    whole = [[*row, tokenizer.eos_token_id] for row in tokenizer(texts)["input_ids"]]
    assert encode_documents(texts, tokenizer) == whole
    framed = tokenizer.backend_tokenizer.post_processor
    try:
        from tokenizers.processors import TemplateProcessing

        bos = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
        assert encode_documents(texts, tokenizer) == [[bos[1], *row] for row in whole]
    finally:
        tokenizer.backend_tokenizer.post_processor = framed


def memory(name: str) -> int:
    """MiB of this process: VmRSS is what it has, VmHWM the most that it had."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory cannot be measured")
def test_a_row_of_12_mb_takes_little_memory(tokenizer, monkeypatch):
    """Tokenized whole, 6 MB took 1.2 GB: hundreds of bytes for each token, of which 1,024 are kept."""
    monkeypatch.undo()
    renderer = TemplateRenderer(get_template("chatml"), tokenizer)
    text = "A line of text that goes on, number 12345.\n" * 280_000
    row = Conversation([{"role": "user", "content": "Go on."}, {"role": "assistant", "content": text}])
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = memory("VmRSS")
    (encoded,) = encode_conversations([row], renderer, tokenizer, EncodingOptions(1024))
    assert len(encoded.input_ids) == 1024
    assert memory("VmHWM") - before < 400
