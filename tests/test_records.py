"""Every format of docs/data, every way a row can be bad, and that nothing but InputError ever comes out."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise.data.records import (
    FORMATS,
    RECORD_TYPES,
    Conversation,
    Document,
    PreferencePair,
    Prompt,
    RecordOptions,
    RowError,
    detect_format,
)
from stagewise.errors import InputError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


HUMAN_HI = {"from": "human", "value": "hi"}
GPT_HELLO = {"from": "gpt", "value": "hello"}
CHAT = [user("hi"), assistant("hello")]

WEATHER = {"name": "get_weather", "description": "", "parameters": {"type": "object", "properties": {}}}
WEATHER_TOOL = {"type": "function", "function": WEATHER}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}


# --- conversations ---------------------------------------------------------------------------------------------------

CONVERSATIONS = {
    "sharegpt": ({"conversations": [HUMAN_HI, GPT_HELLO]}, CHAT),
    "sharegpt_system_turn": (
        {"conversations": [{"from": "system", "value": "be kind"}, HUMAN_HI, GPT_HELLO]},
        [system("be kind"), *CHAT],
    ),
    "sharegpt_system_field": (
        {"system": "be kind", "conversations": [HUMAN_HI, GPT_HELLO]},
        [system("be kind"), *CHAT],
    ),
    "sharegpt_system_prompt": (
        {"system_prompt": "be kind", "system": "be kind", "conversations": [HUMAN_HI, GPT_HELLO]},
        [system("be kind"), *CHAT],
    ),
    "sharegpt_empty_system": (
        {"system": "", "conversations": [{"from": "system", "value": " "}, HUMAN_HI, GPT_HELLO]},
        CHAT,
    ),
    "sharegpt_other_names": (
        {"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "hello"}]},
        CHAT,
    ),
    "sharegpt_as_json_string": ({"conversations": json.dumps([HUMAN_HI, GPT_HELLO])}, CHAT),
    "messages": ({"messages": CHAT}, CHAT),
    "messages_reasoning": (
        {"messages": [user("hi"), {**assistant("hello"), "reasoning_content": "greet back", "tool_calls": None}]},
        [user("hi"), {**assistant("hello"), "reasoning_content": "greet back"}],
    ),
    "mft": (
        {
            "id": 0,
            "data_name": "code",
            "chat_rounds": [
                {"role": "system", "content": "be kind"},
                {"role": "human", "content": "hi"},
                {"role": "bot", "content": "hello", "chat_round_id": 0},
            ],
        },
        [system("be kind"), *CHAT],
    ),
    "alpaca": ({"instruction": "hi", "input": "", "output": "hello"}, CHAT),
    "alpaca_null_input": ({"instruction": "hi", "input": None, "output": "hello"}, CHAT),
    "alpaca_instruction_and_input": (
        {"instruction": "Translate.", "input": "chat", "output": "cat"},
        [user("Translate.\nchat"), assistant("cat")],
    ),
    "alpaca_history_system": (
        {
            "instruction": "And now?",
            "input": "",
            "output": "Noon.",
            "system": "You are a clock.",
            "history": [["What time is it?", "Dawn."]],
        },
        [
            system("You are a clock."),
            user("What time is it?"),
            assistant("Dawn."),
            user("And now?"),
            assistant("Noon."),
        ],
    ),
    "qa_prompt_response": ({"prompt": "hi", "response": "hello"}, CHAT),
    "qa_question_answer": ({"question": "hi", "answer": "hello", "system": None}, CHAT),
    "qa_query_response_history": (
        {"query": "hi", "response": "hello", "history": [["a", "b"]]},
        [user("a"), assistant("b"), *CHAT],
    ),
    "qa_input_output": ({"input": "hi", "output": "hello", "system": "s"}, [system("s"), *CHAT]),
    "qa_ignores_empty_twin": ({"input": "", "question": "hi", "output": "hello"}, CHAT),
    "law_without_reference": ({"input": "hi", "output": "hello", "reference": ["Article 1"]}, CHAT),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversation_formats(name):
    row, messages = CONVERSATIONS[name]
    assert Conversation.from_row(row) == Conversation(messages, None)
    assert detect_format(row, "conversation") == name.split("_")[0]


def test_law_reference_is_rendered_before_the_question():
    row = {"input": "hi", "output": "hello", "reference": ["Article 1", "Article 2"]}
    conversation = Conversation.from_row(row, RecordOptions(use_reference=True))
    assert conversation.messages == [user("Article 1\nArticle 2\nhi"), assistant("hello")]


def test_instruction_is_never_dropped():
    """input + output are there too; MFTCoder tests them first and trains on the input alone."""
    row = {"instruction": "Sum up.", "input": "A long text.", "output": "Short."}
    assert detect_format(row) == "alpaca"
    assert Conversation.from_row(row).messages[0]["content"] == "Sum up.\nA long text."


@pytest.mark.parametrize("tools", [json.dumps([WEATHER]), [WEATHER], [WEATHER_TOOL], json.dumps([WEATHER_TOOL])])
def test_sharegpt_tool_calling(tools):
    row = {
        "conversations": [
            {"from": "human", "value": "Weather in Oslo?"},
            {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Oslo"}}'},
            {"from": "observation", "value": '{"sky": "clear"}'},
            {"from": "gpt", "value": "Clear."},
        ],
        "tools": tools,
    }
    assert Conversation.from_row(row) == Conversation(
        [
            user("Weather in Oslo?"),
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": '{"sky": "clear"}'},
            assistant("Clear."),
        ],
        [WEATHER_TOOL],
    )


def test_several_calls_in_one_turn():
    calls = [{"name": "a", "arguments": {}}, {"name": "b", "arguments": "{}"}]
    row = {"conversations": [HUMAN_HI, {"from": "function_call", "value": json.dumps(calls)}]}
    assert Conversation.from_row(row).messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "a", "arguments": {}}},
        {"type": "function", "function": {"name": "b", "arguments": {}}},
    ]


def test_openai_tool_calling():
    """Arguments arrive as a JSON string there; inside they are an object. Ids and names are kept."""
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    row = {
        "messages": [
            user("Weather in Oslo?"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "clear", "tool_call_id": "c1", "name": "get_weather"},
            assistant("Clear."),
        ],
        "tools": [],
    }
    conversation = Conversation.from_row(row)
    assert conversation.tools is None
    assert conversation.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **CALL}]}
    assert conversation.messages[2] == {
        "role": "tool",
        "content": "clear",
        "name": "get_weather",
        "tool_call_id": "c1",
    }


# --- preferences -----------------------------------------------------------------------------------------------------

PREFERENCES = {
    "preference": (
        {"system": "", "history": [], "question": "hi", "response_chosen": "hello", "response_rejected": "no"},
        PreferencePair([user("hi")], [assistant("hello")], [assistant("no")]),
    ),
    "preference_with_history": (
        {
            "system": "s",
            "history": [["a", "b"]],
            "question": "hi",
            "response_chosen": "hello",
            "response_rejected": "no",
            "margin": 1,
        },
        PreferencePair(
            [system("s"), user("a"), assistant("b"), user("hi")], [assistant("hello")], [assistant("no")], 1.0
        ),
    ),
    "preference_sharegpt_turns": (
        {"conversations": [HUMAN_HI], "chosen": GPT_HELLO, "rejected": {"from": "gpt", "value": "no"}},
        PreferencePair([user("hi")], [assistant("hello")], [assistant("no")]),
    ),
    "preference_sharegpt_strings": (
        {"conversations": [HUMAN_HI], "chosen": "hello", "rejected": "no", "tools": json.dumps([WEATHER])},
        PreferencePair([user("hi")], [assistant("hello")], [assistant("no")], None, [WEATHER_TOOL]),
    ),
    "preference_trl_strings": (
        {"prompt": "hi", "chosen": "hello", "rejected": "no", "margin": "0.5"},
        PreferencePair([user("hi")], [assistant("hello")], [assistant("no")], 0.5),
    ),
    "preference_trl_messages_in_csv_cells": (
        {
            "prompt": json.dumps([user("hi")]),
            "chosen": json.dumps([assistant("hello")]),
            "rejected": json.dumps({"from": "gpt", "value": "no"}),
        },
        PreferencePair([user("hi")], [assistant("hello")], [assistant("no")]),
    ),
    "preference_trl_answers_in_json": (
        {"prompt": '["hi"]', "chosen": '{"from": "Oslo"}', "rejected": "[]"},
        PreferencePair([user('["hi"]')], [assistant('{"from": "Oslo"}')], [assistant("[]")]),
    ),
    "preference_trl_messages": (
        {"prompt": [user("hi")], "chosen": [assistant("hello")], "rejected": [assistant("no")]},
        PreferencePair([user("hi")], [assistant("hello")], [assistant("no")]),
    ),
    "preference_trl_question": (
        {"system": "s", "question": "hi", "chosen": "hello", "rejected": "no"},
        PreferencePair([system("s"), user("hi")], [assistant("hello")], [assistant("no")]),
    ),
    "preference_trl_instruction": (
        {"instruction": "Add.", "input": "1 1", "chosen": "2", "rejected": "3"},
        PreferencePair([user("Add.\n1 1")], [assistant("2")], [assistant("3")]),
    ),
    "preference_trl_shared_prompt": (
        {
            "prompt": "hi",
            "messages": [user("hi"), assistant("hello")],
            "chosen": [user("hi"), assistant("hello")],
            "rejected": [user("hi"), assistant("no")],
        },
        PreferencePair([user("hi")], [assistant("hello")], [assistant("no")]),
    ),
    "preference_trl_shared_turns": (
        {
            "chosen": [user("a"), assistant("b"), user("hi"), assistant("hello")],
            "rejected": [user("a"), assistant("b"), user("hi"), assistant("no")],
        },
        PreferencePair([user("a"), assistant("b"), user("hi")], [assistant("hello")], [assistant("no")]),
    ),
    "preference_trl_one_goes_on": (
        {
            "chosen": [user("hi"), assistant("hello")],
            "rejected": [user("hi"), assistant("hello"), user("bye"), assistant("no")],
        },
        PreferencePair([user("hi")], [assistant("hello")], [assistant("hello"), user("bye"), assistant("no")]),
    ),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preference_formats(name):
    row, pair = PREFERENCES[name]
    assert PreferencePair.from_row(row) == pair
    assert name.startswith(detect_format(row, "preference"))
    assert detect_format(row) == detect_format(row, "preference")


def test_a_row_is_what_the_stage_asks_for():
    row = PREFERENCES["preference_trl_shared_prompt"][0]
    assert detect_format(row, "conversation") == "messages"
    assert Conversation.from_row(row).messages == CHAT


# --- prompts and documents -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"conversations": [HUMAN_HI, GPT_HELLO]}, [user("hi")]),
        ({"conversations": [HUMAN_HI, GPT_HELLO, HUMAN_HI, GPT_HELLO]}, [*CHAT, user("hi")]),
        ({"messages": [system("s"), user("hi")]}, [system("s"), user("hi")]),
        ({"instruction": "hi", "output": ""}, [user("hi")]),
        ({"prompt": "hi"}, [user("hi")]),
        ({"question": "hi", "history": [["a", "b"]]}, [user("a"), assistant("b"), user("hi")]),
    ],
)
def test_prompt_cuts_the_last_answer_off(row, messages):
    assert Prompt.from_row(row) == Prompt(messages)


def test_document():
    assert Document.from_row({"text": "Once.\n{{name}} <NAME>", "id": 3}) == Document("Once.\n{{name}} <NAME>")


@pytest.mark.parametrize(
    ("record", "keys"),
    [
        (Document("é\u2028\n"), ["text"]),
        (Conversation(CHAT, [WEATHER_TOOL]), ["messages", "tools"]),
        (Prompt([user("hi")]), ["messages", "tools"]),
        (
            PreferencePair([user("hi")], [assistant("a")], [assistant("b")], 0.25),
            ["prompt", "chosen", "rejected", "margin", "tools"],
        ),
    ],
)
def test_json_round_trip_with_stable_keys(record, keys):
    text = record.to_json()
    assert type(record).from_json(text) == record
    assert list(json.loads(text)) == keys


# --- bad rows --------------------------------------------------------------------------------------------------------

CALL_TURN = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}

BAD_CONVERSATIONS = {
    "no_known_keys": ({"foo": 1}, "keys", "foo", "conversations"),
    "no_keys": ({}, "keys", "(none)", "instruction + output"),
    "another_kind": (PREFERENCES["preference"][0], "keys", "the format preference", "a conversation row"),
    "row_is_no_object": ([1], "row", "a list of 1", "an object"),
    "missing_output": ({"instruction": "x", "input": "y"}, "keys", "input, instruction", "output"),
    "turns_are_no_list": ({"conversations": 3}, "conversations", "a number", "a list"),
    "turns_are_no_json": ({"conversations": "hello"}, "conversations", "'hello', which is not JSON", "JSON"),
    "no_turns": ({"conversations": []}, "conversations", "no turns", "a list of turns"),
    "empty_system_alone": (
        {"messages": [system(" ")]},
        "messages[0].content",
        "an empty system prompt alone",
        "a question",
    ),
    "tool_description": (
        {"messages": CHAT, "tools": [{"name": "f", "description": ["a"]}]},
        "tools[0].description",
        "a list of 1",
        "a string",
    ),
    "turn_is_no_object": ({"conversations": ["hi"]}, "conversations[0]", "'hi'", "a turn"),
    "unknown_role": (
        {"conversations": [{"from": "alien", "value": "x"}]},
        "conversations[0].from",
        "'alien'",
        "one of system, user, human",
    ),
    "missing_role": ({"messages": [{"content": "x"}]}, "messages[0].role", "null", "one of"),
    "null_content": ({"messages": [user("hi"), assistant(None)]}, "messages[1].content", "null", "a string"),
    "missing_content": ({"conversations": [HUMAN_HI, {"from": "gpt"}]}, "conversations[1].value", "null", "a string"),
    "number_content": ({"messages": [user("hi"), assistant(7)]}, "messages[1].content", "a number", "a string"),
    "list_content": (
        {"messages": [user([{"type": "text", "text": "hi"}]), assistant("a")]},
        "messages[0].content",
        "a list of 1",
        "a string",
    ),
    "null_output": ({"instruction": "x", "output": None}, "output", "null", "a string"),
    "null_instruction": ({"instruction": None, "input": "x", "output": "y"}, "instruction", "null", "a string"),
    "number_input": ({"instruction": "x", "input": 3, "output": "y"}, "input", "a number", "a string"),
    "empty_answer": ({"instruction": "x", "output": " \n"}, "output", "an empty text", "an answer"),
    "empty_question": ({"prompt": "", "response": "x"}, "prompt", "an empty text", "a question"),
    "empty_earlier_answer": (
        {"messages": [user("a"), assistant(""), user("b"), assistant("c")]},
        "messages[1].content",
        "an empty text",
        "an answer",
    ),
    "no_assistant_turn": ({"messages": [user("hi")]}, "messages[0].content", "no assistant turn", "at least one"),
    "begins_with_answer": (
        {"conversations": [GPT_HELLO, HUMAN_HI, GPT_HELLO]},
        "conversations[0].value",
        "an assistant turn after the beginning",
        "a system or user turn",
    ),
    "two_questions": (
        {"messages": [user("a"), user("b"), assistant("c")]},
        "messages[1].content",
        "a user turn after a user turn",
        "an assistant turn",
    ),
    "two_answers": (
        {"messages": [user("a"), assistant("b"), assistant("c")]},
        "messages[2].content",
        "an assistant turn after an assistant turn",
        "a user turn",
    ),
    "late_system": (
        {"messages": [*CHAT, system("s"), *CHAT]},
        "messages[2].content",
        "a system turn after an assistant turn",
        "a user turn",
    ),
    "two_systems": (
        {"messages": [system("s"), system("t"), *CHAT]},
        "messages[1].content",
        "a system turn after a system turn",
        "a user turn",
    ),
    "second_system_field": (
        {"system": "t", "messages": [system("s"), *CHAT]},
        "system",
        "a second system prompt",
        "one system prompt",
    ),
    "ends_with_question": (
        {"messages": [*CHAT, user("b")]},
        "messages[2].content",
        "a user turn at the end",
        "an assistant turn at the end",
    ),
    "unanswered_call": (
        {"conversations": [HUMAN_HI, CALL_TURN, HUMAN_HI, GPT_HELLO]},
        "conversations[2].value",
        "a user turn after an assistant turn",
        "a tool turn",
    ),
    "broken_call": (
        {"conversations": [HUMAN_HI, {"from": "function_call", "value": "get_weather()"}]},
        "conversations[1].value",
        "'get_weather()', which is not JSON",
        "JSON",
    ),
    "call_without_name": (
        {"conversations": [HUMAN_HI, {"from": "function_call", "value": "{}"}]},
        "conversations[1].value",
        "an object with the keys (none)",
        "a tool call",
    ),
    "call_with_list_arguments": (
        {"conversations": [HUMAN_HI, {"from": "function_call", "value": '{"name": "f", "arguments": [1]}'}]},
        "conversations[1].value",
        "arguments that are a list of 1",
        "arguments that are an object",
    ),
    "call_by_the_user": (
        {"messages": [{**user("hi"), "tool_calls": [CALL]}, assistant("x")]},
        "messages[0].content",
        "tool calls in a user turn",
        "tool calls in assistant turns only",
    ),
    "tools_not_json": ({"conversations": [HUMAN_HI, GPT_HELLO], "tools": "[{"}, "tools", "'[{'", "JSON"),
    "tools_not_a_list": ({"conversations": [HUMAN_HI, GPT_HELLO], "tools": {"a": 1}}, "tools", "an object", "a list"),
    "tool_without_name": ({"messages": CHAT, "tools": [{"function": {}}]}, "tools[0]", "an object", "a tool"),
    "history_pair": ({"instruction": "x", "output": "y", "history": [["q"]]}, "history[0]", "a list of 1", "a pair"),
    "history_null": (
        {"instruction": "x", "output": "y", "history": [["q", None]]},
        "history[0][1]",
        "null",
        "a string",
    ),
    "two_questions_in_a_pair": (
        {"question": "a", "input": "b", "answer": "c"},
        "input",
        "both question and input",
        "one of instruction, prompt, question, query, input",
    ),
    "instruction_beside_a_pair": (
        {"instruction": "a", "input": "b", "answer": "c"},
        "input",
        "both instruction",
        "one",
    ),
    "two_answers_in_a_pair": (
        {"prompt": "a", "answer": "b", "response": "c"},
        "response",
        "both answer and",
        "one of",
    ),
    "lone_surrogate": ({"prompt": "a", "answer": "\ud800"}, "answer", "a lone surrogate (\\ud800)", "UTF-8"),
    "bad_reasoning": (
        {"messages": [user("hi"), {**assistant("a"), "reasoning_content": 3}]},
        "reasoning of messages[1].content",
        "a number",
        "a string",
    ),
}


@pytest.mark.parametrize("name", BAD_CONVERSATIONS)
def test_bad_conversations_name_field_found_and_expected(name):
    row, field, found, expected = BAD_CONVERSATIONS[name]
    with pytest.raises(RowError) as caught:
        Conversation.from_row(row)
    assert caught.value.field == field
    assert found in caught.value.found
    assert expected in caught.value.expected
    assert str(caught.value) == f"field '{field}': found {caught.value.found}, expected {caught.value.expected}"


BAD_PREFERENCES = {
    "equal": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected", "the same text", "two different answers"),
    "equal_conversations": (
        {"chosen": CHAT, "rejected": CHAT},
        "rejected[1].content",
        "the same text as in the chosen answer",
        "two different",
    ),
    "empty_rejected": ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected", "an empty text", "an answer"),
    "null_chosen": (
        {"question": "a", "response_chosen": None, "response_rejected": "b"},
        "response_chosen",
        "null",
        "",
    ),
    "strings_without_prompt": (
        {"chosen": "a", "rejected": "b"},
        "chosen",
        "answers without a question",
        "a field prompt",
    ),
    "other_questions": (
        {"chosen": CHAT, "rejected": [user("x"), assistant("hello")]},
        "chosen",
        "no beginning in common",
        "the same question",
    ),
    "prompt_disagrees": (
        {"prompt": "x", "chosen": CHAT, "rejected": [user("hi"), assistant("no")]},
        "chosen",
        "another question than in the field prompt",
        "the same question",
    ),
    "prompt_already_answered": (
        {"conversations": [HUMAN_HI, GPT_HELLO], "chosen": "a", "rejected": "b"},
        "conversations[1].value",
        "an assistant turn at the end",
        "a user or tool turn",
    ),
    "chosen_by_the_user": (
        {"conversations": [HUMAN_HI], "chosen": HUMAN_HI, "rejected": GPT_HELLO},
        "chosen.value",
        "no assistant turn",
        "at least one answer",
    ),
    "two_prompts": (
        {"instruction": "a", "prompt": "b", "chosen": "c", "rejected": "d"},
        "prompt",
        "both instruction and prompt",
        "one of",
    ),
    "margin_text": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"},
        "margin",
        "'big'",
        "a finite number",
    ),
    "margin_nan": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")},
        "margin",
        "a number",
        "a finite number",
    ),
    "margin_bool": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": True},
        "margin",
        "true",
        "a finite number",
    ),
}


@pytest.mark.parametrize("name", BAD_PREFERENCES)
def test_bad_preferences(name):
    row, field, found, expected = BAD_PREFERENCES[name]
    with pytest.raises(RowError) as caught:
        PreferencePair.from_row(row)
    assert caught.value.field == field
    assert found in caught.value.found
    assert expected in caught.value.expected


@pytest.mark.parametrize(
    ("row", "found"), [({"text": " \n"}, "an empty text"), ({"text": None}, "null"), ({"txt": "a"}, "the keys txt")]
)
def test_bad_documents(row, found):
    with pytest.raises(RowError, match=found):
        Document.from_row(row)


@pytest.mark.parametrize(
    "row", [{"conversations": [GPT_HELLO]}, {"messages": [system("s"), assistant("a")]}, {"prompt": ""}]
)
def test_bad_prompts(row):
    with pytest.raises(RowError):
        Prompt.from_row(row)


def test_equal_errors_have_equal_reasons():
    """They are counted together: the number of the turn does not matter."""
    rows = [{"messages": [user("a"), assistant(None)]}, {"messages": [*CHAT, user("a"), assistant(3)]}]
    reasons = set()
    for row in rows:
        with pytest.raises(RowError) as caught:
            Conversation.from_row(row)
        reasons.add(caught.value.reason)
    assert reasons == {"field 'messages[].content': expected a string"}


# --- placeholders and control tokens ---------------------------------------------------------------------------------

WHO = {"instruction": "Who is {{name}}?", "output": "I am <NAME>, made by <AUTHOR> ({{author}})."}


def test_placeholders_are_replaced():
    options = RecordOptions(assistant_name="Ada", assistant_author="the {{name}} team")
    assert Conversation.from_row(WHO, options).messages == [
        user("Who is Ada?"),
        assistant("I am Ada, made by the {{name}} team (the {{name}} team)."),
    ]


@pytest.mark.parametrize(
    ("options", "placeholder", "flag"),
    [
        (RecordOptions(), "{{name}}", "--assistant_name"),
        (RecordOptions(assistant_name="Ada"), "<AUTHOR>", "--assistant_author"),
        (RecordOptions(assistant_name="Ada", assistant_author=""), "<AUTHOR>", "--assistant_author"),
    ],
)
def test_a_placeholder_that_survives_names_the_flag(options, placeholder, flag):
    with pytest.raises(RowError) as caught:
        Conversation.from_row(WHO, options)
    assert placeholder in caught.value.found
    assert flag in caught.value.expected


def test_placeholders_can_be_kept():
    messages = Conversation.from_row(WHO, RecordOptions(keep_placeholders=True)).messages
    assert [message["content"] for message in messages] == [WHO["instruction"], WHO["output"]]


def test_the_cut_answer_of_a_prompt_needs_no_values():
    row = {"instruction": "Who?", "output": "<NAME>"}
    assert Prompt.from_row(row).messages == [user("Who?")]


CONTROL = ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "answer": "b<|im_end|>"},
        {"prompt": "<|im_end|>\n<|im_start|>system", "answer": "b"},
        {"messages": [user("a"), {**assistant("b"), "reasoning_content": "<|im_end|>"}]},
        {"messages": CHAT, "tools": [{"name": "f", "description": "<|im_end|>"}]},
        {
            "messages": [
                user("a"),
                {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": "<|im_end|>"}}]},
            ]
        },
    ],
)
def test_control_tokens_are_refused_unless_kept(row):
    with pytest.raises(RowError, match="--keep_control_tokens") as caught:
        Conversation.from_row(row, RecordOptions(control_tokens=CONTROL))
    assert "<|im_" in caught.value.found
    assert (
        "<|im_"
        in Conversation.from_row(row, RecordOptions(control_tokens=CONTROL, keep_control_tokens=True)).to_json()
    )
    assert "<|im_" in Conversation.from_row(row).to_json()


def test_control_tokens_in_documents():
    with pytest.raises(RowError, match="</s>"):
        Document.from_row({"text": "a</s>b"}, RecordOptions(control_tokens=("</s>",)))


# --- properties ------------------------------------------------------------------------------------------------------

KEYS = [
    *("conversations", "messages", "chat_rounds", "instruction", "input", "output", "system", "history", "tools"),
    *("prompt", "question", "query", "answer", "response", "reference", "chosen", "rejected", "margin", "text"),
    *("response_chosen", "response_rejected", "from", "value", "role", "content", "tool_calls", "name", "arguments"),
]
WORDS = [
    *("", "hi", "human", "user", "gpt", "assistant", "system", "tool", "function_call", "observation", "<NAME>"),
    *("[]", "{}", "[1]", '{"name": "f"}', "\ud800", "nan", "1e400"),
]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=5)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
turns = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "system", "function_call", "observation", "x"]), "value": values}
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": values},
    optional={"tool_calls": values, "reasoning_content": values, "name": values},
)
rows = values | st.dictionaries(
    st.sampled_from(KEYS), values | st.lists(turns, max_size=4) | st.lists(messages, max_size=4), max_size=8
)


def places(value, path=()):
    """The path of every value inside a row."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield (*path, key)
        yield from places(each, (*path, key))


@st.composite
def damaged_rows(draw):
    """A good row in which up to three values were replaced."""
    row = copy.deepcopy(draw(st.sampled_from([row for row, _ in [*CONVERSATIONS.values(), *PREFERENCES.values()]])))
    for _ in range(draw(st.integers(0, 3))):
        *parents, last = draw(st.sampled_from(list(places(row))))
        holder = row
        for key in parents:
            holder = holder[key]
        holder[last] = draw(values)
    return row


def check_that_only_input_errors_come_out(row, kind):
    try:
        record = RECORD_TYPES[kind].from_row(row, RecordOptions(control_tokens=CONTROL))
    except InputError as error:
        str(error).encode("utf-8")
    else:
        assert type(record).from_json(record.to_json()) == record
        record.to_json().encode("utf-8")


@given(rows, st.sampled_from(sorted(RECORD_TYPES)))
@settings(max_examples=200, derandomize=True, deadline=None)
def test_arbitrary_json_is_a_record_or_an_input_error(row, kind):
    """A record must survive the round trip, an error must be printable."""
    check_that_only_input_errors_come_out(row, kind)


@given(damaged_rows(), st.sampled_from(sorted(RECORD_TYPES)))
@settings(max_examples=500, derandomize=True, deadline=None)
def test_damaged_rows_are_records_or_input_errors(row, kind):
    check_that_only_input_errors_come_out(row, kind)


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool", "system"]), st.just("x")), max_size=6))
@settings(max_examples=300, derandomize=True, deadline=None)
def test_accepted_conversations_are_well_ordered(pairs):
    try:
        record = Conversation.from_row({"messages": [{"role": role, "content": text} for role, text in pairs]})
    except RowError:
        return
    roles = [message["role"] for message in record.messages]
    assert roles == [role for role, _ in pairs]
    assert roles[-1] == "assistant"
    assert "system" not in roles[1:]
    assert [role for role in roles if role != "system"][0] == "user"
    assert all(not (a == b and a != "tool") for a, b in zip(roles, roles[1:], strict=False))


def test_every_format_has_a_test():
    tested = {detect_format(row) for row, _ in [*CONVERSATIONS.values(), *PREFERENCES.values()]} | {"document"}
    assert tested == {each.name for each in FORMATS}


def test_deeply_nested_tools_are_an_input_error():
    deep = "[" * 100_000 + "]" * 100_000
    with pytest.raises(InputError):
        Conversation.from_row({"messages": CHAT, "tools": deep})


def test_tools_that_a_template_could_not_write_out_are_an_input_error():
    """json.dumps with an indent is Python, and ends at a third of the depth that is left to C."""
    deep = json.loads('{"a":' * 400 + "1" + "}" * 400)
    row = {"messages": CHAT, "tools": [{"name": "f", "parameters": deep}]}
    with pytest.raises(RowError, match="field 'tools': found JSON nested more than 100 levels deep"):
        Conversation.from_row(row)


def test_keys_are_quoted_in_short():
    """A text in the place of a key neither fills the screen nor breaks the message into lines."""
    with pytest.raises(RowError) as caught:
        Conversation.from_row({"one\ntwo": 1, "x" * 1000: 2})
    assert caught.value.found == f"the keys 'one\\ntwo', '{'x' * 57}...'"


def test_records_import_nothing_heavy():
    code = (
        "import sys, stagewise.data.records, stagewise.data.files\n"
        "assert not {'datasets', 'torch', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
