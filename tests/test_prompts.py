"""Prompts for PPO: the ids that inference feeds, what is cut, what is refused, what the report counts."""

import copy
import json
import logging

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

import inference
from stagewise.arguments import DataArguments, StageTrainingArguments
from stagewise.data.audit import LabelAudit
from stagewise.data.loading import load_prompts
from stagewise.data.prompts import (
    EncodedPrompt,
    PromptOptions,
    completion_suffix,
    encode_prompts,
    prompt_hashes,
    tokenize_prompts,
)
from stagewise.data.records import Prompt
from stagewise.data.tokenization import TemplateRenderer, build_renderer
from stagewise.errors import InputError
from template import Rendered, TemplateError, get_template, template_names

LONG = PromptOptions(max_prompt_length=10_000)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be kind."}
ROUNDS = [user("One?"), assistant("First."), user("再见 Two?"), assistant("Second."), user("Three?")]
CHAT = Prompt([SYSTEM, *ROUNDS])
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}

# CHAT as each template writes it, by hand.
RENDERED = {
    "chatml": (
        "<s><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nFirst."
        "<|im_end|>\n<|im_start|>user\n再见 Two?<|im_end|>\n<|im_start|>assistant\nSecond.<|im_end|>\n"
        "<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "\n\nOne?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nFirst.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n再见 Two?<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
        "\n\nSecond.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nThree?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "vicuna": (
        "<s>Be kind. USER: One? ASSISTANT: First.</s>USER: 再见 Two? ASSISTANT: Second.</s>USER: Three? ASSISTANT:"
    ),
}


@pytest.fixture(scope="module")
def chatml(tokenizer):
    return TemplateRenderer(get_template("chatml"), tokenizer)


@pytest.fixture(scope="module")
def every_tokenizer(tiny_model_dir):
    """A tokenizer that knows the control tokens of all templates."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokens = {t for name in template_names() for t in get_template(name).control_tokens(tokenizer.eos_token)}
    tokenizer.add_tokens(sorted(tokens), special_tokens=True)
    return tokenizer


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def length_of(messages, renderer, tokenizer):
    return len(ids_of(tokenizer, renderer.render(messages, add_generation_prompt=True).text))


# --- prompts to ids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RENDERED)
def test_ids_are_the_tokenizers_of_the_rendered_prompt(name, every_tokenizer):
    renderer = TemplateRenderer(get_template(name), every_tokenizer)
    assert encode_prompts([CHAT], renderer, every_tokenizer, LONG) == [
        EncodedPrompt(ids_of(every_tokenizer, RENDERED[name]), RENDERED[name])
    ]


def test_the_tokenizers_own_chat_template_gives_the_same_prompt(chatml, tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = get_template("chatml").to_jinja()
    for prompt in (CHAT, Prompt([user("Weather?")], [WEATHER])):
        (row,) = encode_prompts([prompt], build_renderer(None, own), own, LONG)
        text = own.apply_chat_template(prompt.messages, tools=prompt.tools, add_generation_prompt=True, tokenize=False)
        assert (row.text, row.input_ids) == (text, ids_of(tokenizer, text))
        assert [row] == encode_prompts([prompt], chatml, tokenizer, LONG)


@pytest.mark.parametrize("name", ["chatml", "vicuna", "alpaca"])
def test_inference_feeds_the_same_ids(name, tiny_model_dir, tmp_path, monkeypatch):
    rows = [
        {"conversations": [{"from": "human", "value": "Hi 🙂"}, {"from": "gpt", "value": "cut off"}]},
        {"conversations": [{"from": "human", "value": "Weather in Rome?"}], "tools": json.dumps([WEATHER])},
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    args = ["--model_name_or_path", tiny_model_dir, "--template_name", name, "--batch_size", "1", "--input_file"]
    args = inference.parse_arguments([*args, str(source), "--output_file", str(tmp_path / "out.jsonl")])
    chat = inference.Chat(args)
    fed = []

    def generate(input_ids, **_):
        fed.append(input_ids[0].tolist())
        return input_ids

    monkeypatch.setattr(chat.model, "generate", generate)
    inference.answer_file(chat, str(source), str(tmp_path / "out.jsonl"))
    prompts = [Prompt.from_row(row) for row in rows]
    encoded = encode_prompts(prompts, chat.renderer, chat.tokenizer, LONG)
    assert sorted(row.input_ids for row in encoded) == sorted(fed)


def test_tools_are_rendered_also_where_rounds_are_dropped(chatml, tokenizer):
    whole = Prompt([user("word " * 60), assistant("a"), user("Weather?")], [WEATHER])
    last = Prompt([user("Weather?")], [WEATHER])
    (expected,) = encode_prompts([last], chatml, tokenizer, LONG)
    assert "> Tool Name: weather" in expected.text
    (row,) = encode_prompts([whole], chatml, tokenizer, PromptOptions(len(expected.input_ids)))
    assert (row.input_ids, row.text, row.truncated) == (expected.input_ids, expected.text, "prompt")


def test_long_prompts_lose_their_oldest_rounds(chatml, tokenizer):
    """One token too few for what is kept costs one round more; system message and last question always stay."""
    whole = length_of(CHAT.messages, chatml, tokenizer)
    two = length_of([SYSTEM, *ROUNDS[2:]], chatml, tokenizer)
    last = length_of([SYSTEM, ROUNDS[-1]], chatml, tokenizer)
    for limit, kept, truncated in (
        (whole, ROUNDS, ""),
        (whole - 1, ROUNDS[2:], "prompt"),
        (two, ROUNDS[2:], "prompt"),
        (two - 1, ROUNDS[-1:], "prompt"),
        (last, ROUNDS[-1:], "prompt"),
    ):
        (row,) = encode_prompts([CHAT], chatml, tokenizer, PromptOptions(limit))
        assert row.text == chatml.render([SYSTEM, *kept], add_generation_prompt=True).text
        assert row.input_ids == ids_of(tokenizer, row.text)
        assert (row.truncated, row.dropped) == (truncated, "")
    assert encode_prompts([CHAT], chatml, tokenizer, PromptOptions(last - 1)) == [
        EncodedPrompt([], "", dropped=f"{last} tokens, more than max_prompt_length {last - 1}")
    ]
    with pytest.raises(InputError, match="--max_prompt_length 0: expected a number of tokens, 1 or more"):
        PromptOptions(0)


def test_the_last_round_keeps_its_tool_calls_and_results(chatml, tokenizer):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    last = [user("Rome?"), assistant("") | {"tool_calls": [call]}, {"role": "tool", "content": "sunny"}]
    limit = length_of(last, chatml, tokenizer)
    (row,) = encode_prompts([Prompt([*ROUNDS[:2], *last])], chatml, tokenizer, PromptOptions(limit))
    assert row.text == chatml.render(last, add_generation_prompt=True).text


def records(*prompts: Prompt) -> Dataset:
    return Dataset.from_dict(
        {
            "record": [prompt.to_json() for prompt in prompts],
            "location": [f"prompts.jsonl:{i + 1}" for i in range(len(prompts))],
            "dataset": ["prompts"] * len(prompts),
        }
    )


class NoSystem:
    """A renderer of a family that refuses system messages."""

    fingerprint = "no system"
    control_tokens = ()
    stop_tokens = ("</s>",)

    def render(self, messages, tools=None, add_generation_prompt=False):
        if messages[0]["role"] == "system":
            raise TemplateError("no system messages")
        return Rendered("".join(message["content"] for message in messages), ())


def test_a_prompt_that_the_template_refuses_carries_its_reason(tokenizer):
    data = records(Prompt([user("a")]), Prompt([SYSTEM, user("b")]), Prompt([user("c")]))
    encoded = tokenize_prompts(data, NoSystem(), tokenizer, LONG)
    assert encoded["dropped"][:] == ["", "no system messages", ""]
    assert encoded["text"][:] == ["a", "", "c"]
    assert encoded["length"][:] == [len(ids_of(tokenizer, "a")), 0, len(ids_of(tokenizer, "c"))]


def test_columns_of_the_data_set_and_its_cache(chatml, tokenizer):
    data = records(CHAT, Prompt([user("Hi")]))
    encoded = tokenize_prompts(data, chatml, tokenizer, LONG)
    assert set(encoded.column_names) == {
        "input_ids", "text", "length", "dropped", "truncated", "location", "dataset"
    }  # fmt: skip
    assert encoded[0]["text"] == RENDERED["chatml"]
    assert encoded["location"][:] == ["prompts.jsonl:1", "prompts.jsonl:2"]
    fingerprints = {
        tokenize_prompts(data, renderer, tokenizer, options)._fingerprint
        for renderer in (chatml, TemplateRenderer(get_template("vicuna"), tokenizer))
        for options in (LONG, PromptOptions(50), LONG)
    }
    assert len(fingerprints) == 4


def test_hashes_are_equal_where_the_ids_are():
    data = Dataset.from_dict({"input_ids": [[1, 2], [2, 1], [1, 2], [1], [1, 2, 0], [258]]})
    hashes = prompt_hashes(data).tolist()
    assert hashes[0] == hashes[2]
    assert len(set(hashes)) == 5


# --- what follows a completion ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("chatml", ["\n"]),
        ("zephyr", ["\n"]),
        ("falcon", ["\n", "\n"]),
        ("phi3", ["\n", "<|endoftext|>"]),
        ("llama3", []),
        ("vicuna", []),
        ("glm4", []),
    ],
)
def test_prompt_answer_and_suffix_are_the_whole_conversation(name, suffix, every_tokenizer):
    renderer = TemplateRenderer(get_template(name), every_tokenizer)
    found = completion_suffix(renderer, every_tokenizer)
    assert [every_tokenizer.decode([token]) for token in found] == suffix
    (row,) = encode_prompts([Prompt([user("Hi?")])], renderer, every_tokenizer, LONG)
    whole = renderer.render([user("Hi?"), assistant("Well 好.")])
    answer = ids_of(every_tokenizer, whole.text[slice(*whole.spans[-1])])
    assert row.input_ids + answer + found == ids_of(every_tokenizer, whole.text)


def test_the_suffix_of_the_tokenizers_own_template(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = get_template("chatml").to_jinja()
    assert completion_suffix(build_renderer(None, own), own) == ids_of(tokenizer, "\n")


def test_what_the_stop_token_swallows_is_no_suffix(tiny_model_dir):
    """Stop tokens of some tokenizers take the white space behind them along; alone, the newline would have an id."""
    from tokenizers import AddedToken

    own = AutoTokenizer.from_pretrained(tiny_model_dir)
    own.add_tokens([AddedToken("<|end|>", special=True, rstrip=True)], special_tokens=True)
    own.add_tokens(["<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"], special_tokens=True)
    suffix = completion_suffix(TemplateRenderer(get_template("phi3"), own), own)
    assert own.convert_ids_to_tokens(suffix) == ["<|endoftext|>"]


# --- from files ------------------------------------------------------------------------------------------------------


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(train, renderer, tokenizer, tmp_path, options=LONG, **flags):
    training_args = StageTrainingArguments(
        output_dir=str(tmp_path / "out"), do_train=True, do_eval="validation_file_dir" in flags
    )
    return load_prompts(DataArguments(train_file_dir=train, **flags), renderer, tokenizer, options, training_args)


HISTORY = [["One?", "First."], ["再见 Two?", "Second."]]
TURNS = [("human", "One?"), ("gpt", "First."), ("human", "再见 Two?"), ("gpt", "Second."), ("human", "Three?")]
SHAREGPT = [{"from": "system", "value": "Be kind."}, *({"from": who, "value": text} for who, text in TURNS)]
SAME_PROMPT = {
    "ends_with_the_question": {"conversations": SHAREGPT},
    "answered": {"conversations": [*SHAREGPT, {"from": "gpt", "value": "Third."}]},
    "messages": {"messages": [*CHAT.messages, assistant("Third.")]},
    "alpaca": {"instruction": "Three?", "output": "Third.", "system": "Be kind.", "history": HISTORY},
    "pair": {"question": "Three?", "answer": "Third.", "system": "Be kind.", "history": HISTORY},
    "pair_without_an_answer": {"question": "Three?", "answer": None, "system": "Be kind.", "history": HISTORY},
    "question": {"question": "Three?", "system": "Be kind.", "history": HISTORY},
    "alpaca_with_an_empty_answer": {"instruction": "Three?", "output": "", "system": "Be kind.", "history": HISTORY},
    "preference_sharegpt": {"conversations": SHAREGPT, "chosen": "Third.", "rejected": "No."},
    "preference_trl": {
        "prompt": "Three?",
        "chosen": "Third.",
        "rejected": "No.",
        "system": "Be kind.",
        "history": HISTORY,
    },
    "preference": {
        "system": "Be kind.",
        "history": HISTORY,
        "question": "Three?",
        "response_chosen": "Third.",
        "response_rejected": "No.",
    },
}


@pytest.mark.parametrize("row", SAME_PROMPT.values(), ids=SAME_PROMPT)
def test_history_and_system_stay_and_the_last_answer_goes(row, chatml, tokenizer, tmp_path):
    data = load(write(tmp_path / "rows.jsonl", row), chatml, tokenizer, tmp_path)
    assert data.train["text"][:] == [RENDERED["chatml"]]
    assert data.train["input_ids"][:] == [ids_of(tokenizer, RENDERED["chatml"])]
    assert data.validation is None
    assert data.label_audit == LabelAudit()
    assert data.names == ("rows",)
    assert data.sample is data.train


def test_a_row_without_a_question_is_an_error(chatml, tokenizer, tmp_path):
    for row, message in (
        ({"conversations": [{"from": "gpt", "value": "hello"}]}, "found an answer alone, expected a question"),
        ({"conversations": SHAREGPT[:1]}, "found a system turn at the end, expected a user or tool turn at the end"),
        ({"text": "a document"}, "the keys of a prompt row"),
    ):
        file = write(tmp_path / "rows.jsonl", row)
        with pytest.raises(InputError, match=rf"rows\.jsonl:1: .*{message}"):
            load(file, chatml, tokenizer, tmp_path)


def test_a_prompt_that_is_too_long_stops_the_run_or_is_counted(chatml, tokenizer, tmp_path):
    rows = [{"question": f"q{i}"} for i in range(11)]
    rows[3] = {"question": "word " * 60}
    rows[5] = {"question": "q5", "history": [["word " * 60, "a"]]}
    file, options = write(tmp_path / "rows.jsonl", *rows), PromptOptions(40)
    too_long = length_of([user("word " * 60)], chatml, tokenizer)
    message = (
        rf"rows\.jsonl:4: {too_long} tokens, more than max_prompt_length 40; raise --max_prompt_length, or take "
        "the rows that are too long out of the data, or pass --on_bad_row skip$"
    )
    with pytest.raises(InputError, match=message):
        load(file, chatml, tokenizer, tmp_path, options)
    data = load(file, chatml, tokenizer, tmp_path, options, on_bad_row="skip")
    assert [location.rsplit(":")[-1] for location in data.train["location"][:]] == list("12356789") + ["10", "11"]
    counts = data.report["train"]["datasets"]["rows"]
    assert counts["dropped"] == {"more than max_prompt_length 40": 1}
    assert counts["truncated"] == {"prompt": 1}
    assert counts["tokens"] == sum(map(len, data.train["input_ids"][:]))
    assert data.report["train"]["rows"] == 10


def test_repeated_prompts_are_counted_and_kept(chatml, tokenizer, tmp_path, caplog):
    """Answers do not tell prompts apart; a and b are in both sets, a three times in training."""
    train = write(
        tmp_path / "train.jsonl",
        *({"question": q, "answer": f"{i}"} for i, q in enumerate(["a", "b", "a", "c", "a", "c", "d"])),
    )
    held_out = write(tmp_path / "held_out.jsonl", *({"question": q} for q in ["b", "e", "a", "e"]))
    with caplog.at_level(logging.WARNING, logger="stagewise.data.loading"):
        data = load(train, chatml, tokenizer, tmp_path, validation_file_dir=held_out)
    train_report, validation_report = data.report["train"], data.report["validation"]
    assert (train_report["rows"], train_report["duplicates"], train_report["also_in_validation"]) == (7, 3, 4)
    assert (validation_report["rows"], validation_report["duplicates"]) == (4, 1)
    assert (len(data.train), len(data.validation)) == (7, 4)
    assert data.names == ("train", "held_out")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("4 of the 7 training prompts are also in the validation set")


def test_nothing_is_said_where_no_prompt_is_repeated(chatml, tokenizer, tmp_path, caplog):
    train = write(tmp_path / "train.jsonl", {"question": "a"}, {"question": "b"})
    held_out = write(tmp_path / "held_out.jsonl", {"question": "c"})
    for flags in ({}, {"validation_file_dir": held_out}):
        with caplog.at_level(logging.WARNING, logger="stagewise.data.loading"):
            report = load(train, chatml, tokenizer, tmp_path, **flags).report
        assert (report["train"]["duplicates"], report["train"]["also_in_validation"]) == (0, 0)
        assert report["validation"]["duplicates"] == 0
    assert not caplog.records


def test_streams_are_refused(chatml, tokenizer, tmp_path):
    file = write(tmp_path / "rows.jsonl", {"question": "a"})
    with pytest.raises(InputError, match="--streaming: prompts are shuffled and counted before the first step"):
        load(file, chatml, tokenizer, tmp_path, streaming=True)
