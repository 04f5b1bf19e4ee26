"""ids are the tokenizer's of the rendered text, labels are exactly the assistant spans, whatever the template."""

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise.data.records import Conversation
from stagewise.data.tokenization import (
    TOO_LONG,
    EncodingOptions,
    TemplateRenderer,
    TokenizerRenderer,
    build_renderer,
    drop_unusable,
    encode_conversations,
    label_ids,
    tokenize_conversations,
    tokenize_documents,
)
from stagewise.errors import InputError
from stagewise.losses.logprobs import IGNORE_INDEX
from template import get_template, template_names

LONG = EncodingOptions(max_length=10_000)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TWO_ROUNDS = Conversation([user("Hi there"), assistant("Good day"), user("再见 🙂"), assistant("Bye\nbye")])


def runs(labels: list[int]) -> list[list[int]]:
    """Consecutive trained labels."""
    found, current = [], []
    for label in [*labels, IGNORE_INDEX]:
        if label != IGNORE_INDEX:
            current.append(label)
        elif current:
            found.append(current)
            current = []
    return found


@pytest.fixture(scope="module")
def chatml(tokenizer):
    return TemplateRenderer(get_template("chatml"), tokenizer)


@pytest.fixture(scope="module")
def every_tokenizer(tiny_model_dir):
    """A tokenizer that knows the control tokens of all templates."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokens = {t for name in template_names() for t in get_template(name).control_tokens(tokenizer.eos_token)}
    tokenizer.add_tokens(sorted(tokens), special_tokens=True)
    return tokenizer


def test_ids_are_the_tokenizers_of_the_whole_text(chatml, tokenizer):
    (row,) = encode_conversations([TWO_ROUNDS], chatml, tokenizer, LONG)
    text = (
        "<s><|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nGood day<|im_end|>\n"
        "<|im_start|>user\n再见 🙂<|im_end|>\n<|im_start|>assistant\nBye\nbye<|im_end|>\n"
    )
    assert row.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_exactly_the_answers_and_their_stop_tokens_are_trained(chatml, tokenizer):
    (row,) = encode_conversations([TWO_ROUNDS], chatml, tokenizer, LONG)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(row.input_ids, row.labels, strict=True))
    assert [tokenizer.decode(run) for run in runs(row.labels)] == ["Good day<|im_end|>", "Bye\nbye<|im_end|>"]


def test_train_on_last_and_train_on_prompt(chatml, tokenizer):
    (last,) = encode_conversations([TWO_ROUNDS], chatml, tokenizer, EncodingOptions(10_000, train_on="last"))
    assert [tokenizer.decode(run) for run in runs(last.labels)] == ["Bye\nbye<|im_end|>"]
    (everything,) = encode_conversations(
        [TWO_ROUNDS], chatml, tokenizer, EncodingOptions(10_000, train_on_prompt=True)
    )
    assert everything.labels == everything.input_ids


@pytest.mark.parametrize("name", template_names())
def test_every_template_trains_its_spans(name, every_tokenizer):
    renderer = TemplateRenderer(get_template(name), every_tokenizer)
    rendered = renderer.render(TWO_ROUNDS.messages)
    (row,) = encode_conversations([TWO_ROUNDS], renderer, every_tokenizer, LONG)
    assert row.input_ids == every_tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
    trained = "".join(every_tokenizer.decode(run) for run in runs(row.labels))
    wanted = "".join(rendered.text[start:end] for start, end in rendered.spans)
    # a token that begins with the blank at the end of a prompt ("Assistant: ") carries it into the trained text
    assert trained.replace(" ", "") == wanted.replace(" ", "")
    assert row.labels[0] == IGNORE_INDEX or name in ("vanilla", "base")


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=12).filter(lambda t: t.strip()),
        min_size=2,
        max_size=6,
    )
)
def test_any_text_round_trips(every_tokenizer, texts):
    turns = [(user if i % 2 == 0 else assistant)(text) for i, text in enumerate(texts)]
    if turns[-1]["role"] == "user":
        turns.append(assistant("ok"))
    for name in ("chatml", "vicuna", "llama2"):
        renderer = TemplateRenderer(get_template(name), every_tokenizer)
        rendered = renderer.render(turns)
        (row,) = encode_conversations([Conversation(turns)], renderer, every_tokenizer, LONG)
        stop = every_tokenizer.convert_tokens_to_ids(renderer.stop_tokens[0])
        assert sum(label == stop for label in row.labels) == len(rendered.spans)
        trained_chars = sum(end - start for start, end in rendered.spans)
        decoded = "".join(every_tokenizer.decode(run) for run in runs(row.labels))
        assert len(decoded) >= trained_chars


def test_straddling_tokens_by_hand():
    # tokens over characters 0-3, 3-6, 6-8, 8-9; the span 4-8 begins inside the second token
    assert label_ids([1, 2, 3, 4], [(0, 3), (3, 6), (6, 8), (8, 9)], [(4, 8)]) == [-100, 2, 3, -100]
    # a token that only ends where the span begins is not in it
    assert label_ids([1, 2, 3], [(0, 4), (4, 6), (6, 8)], [(4, 6)]) == [-100, 2, -100]


def test_tokens_of_one_multi_byte_character_stay_together():
    # one character of three tokens at 2-3
    assert label_ids([1, 2, 3, 4, 5], [(0, 2), (2, 3), (2, 3), (2, 3), (3, 4)], [(2, 3)]) == [-100, 2, 3, 4, -100]


def test_whole_rounds_are_cut_first(chatml, tokenizer):
    one_round = encode_conversations([Conversation(TWO_ROUNDS.messages[:2])], chatml, tokenizer, LONG)[0]
    whole = encode_conversations([TWO_ROUNDS], chatml, tokenizer, LONG)[0]
    options = EncodingOptions(max_length=len(whole.input_ids) - 1)
    (row,) = encode_conversations([TWO_ROUNDS], chatml, tokenizer, options)
    assert (row.input_ids, row.labels, row.truncated) == (one_round.input_ids, one_round.labels, "turns")


def test_then_the_first_answer_is_cut_without_its_stop_token(chatml, tokenizer):
    whole = encode_conversations([Conversation(TWO_ROUNDS.messages[:2])], chatml, tokenizer, LONG)[0]
    limit = len(whole.input_ids) - 4
    (row,) = encode_conversations([TWO_ROUNDS], chatml, tokenizer, EncodingOptions(limit))
    assert row.input_ids == whole.input_ids[:limit]
    assert row.truncated == "answer"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in row.labels


def test_a_prompt_that_fills_the_row_leaves_nothing_to_train(chatml, tokenizer):
    (row,) = encode_conversations([TWO_ROUNDS], chatml, tokenizer, EncodingOptions(4))
    assert row.dropped == "no trained token left after truncation to max_length"


def records(*conversations: Conversation) -> Dataset:
    return Dataset.from_dict(
        {
            "record": [c.to_json() for c in conversations],
            "location": [f"chats.jsonl:{i + 1}" for i in range(len(conversations))],
            "dataset": ["chats"] * len(conversations),
        }
    )


def test_rows_that_do_not_fit_stop_the_run_or_are_dropped(chatml, tokenizer):
    short = Conversation([user("a"), assistant("b")])
    for on_too_long, limit, message in (
        ("error", 20, r"chats\.jsonl:1: \d+ tokens, more than max_length 20"),
        ("truncate", 8, r"chats\.jsonl:1: no trained token left after truncation"),
    ):
        options = EncodingOptions(limit, on_too_long=on_too_long)
        encoded = tokenize_conversations(records(TWO_ROUNDS, *[short] * 19), chatml, tokenizer, options)
        assert len(encoded) == 20
        with pytest.raises(InputError, match=message):
            drop_unusable(encoded, "error")
        if limit == 20:
            assert len(drop_unusable(encoded, "skip")) == 19
        else:  # every row is unusable: more than 10% are not skipped
            with pytest.raises(InputError, match="20 of 20 rows cannot be used"):
                drop_unusable(encoded, "skip")
    options = EncodingOptions(20, on_too_long="drop")
    encoded = tokenize_conversations(records(TWO_ROUNDS, short), chatml, tokenizer, options)
    assert drop_unusable(encoded, "error", harmless=TOO_LONG)["location"][:] == ["chats.jsonl:2"]


def test_documents_end_with_eos(tokenizer):
    data = Dataset.from_dict({"record": ['{"text": "one two"}'], "location": ["a:1"], "dataset": ["a"]})
    (row,) = tokenize_documents(data, tokenizer)
    assert row["input_ids"] == [*tokenizer("one two")["input_ids"], tokenizer.eos_token_id]


def test_own_chat_template_gives_the_same_rows(chatml, tokenizer):
    import copy

    own = copy.deepcopy(tokenizer)
    own.chat_template = get_template("chatml").to_jinja()
    renderer = build_renderer(None, own)
    assert isinstance(renderer, TokenizerRenderer)
    for messages in (TWO_ROUNDS.messages, [{"role": "system", "content": "S"}, *TWO_ROUNDS.messages[:2]]):
        chat = Conversation(messages)
        assert encode_conversations([chat], renderer, own, LONG) == encode_conversations(
            [chat], chatml, tokenizer, LONG
        )
    assert "<|im_end|>" in renderer.stop_tokens


def test_no_template_at_all_is_an_error(tokenizer):
    with pytest.raises(InputError, match="--template_name: not given"):
        build_renderer(None, tokenizer)


def test_a_control_token_that_the_tokenizer_lacks_is_an_error(tokenizer):
    with pytest.raises(InputError, match=r"--add_template_tokens True"):
        TemplateRenderer(get_template("llama3"), tokenizer)
