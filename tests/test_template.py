"""template.py against the layouts of the model owners, against its own jinja export, and its spans and refusals.

The expected texts are written by hand from the owners' renderings. Where these omit the stop token after an answer
(baichuan, chatglm, chatglm2, falcon, base) it stands here all the same: every answer ends with it.
"""

import importlib.resources
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import template as template_module
from template import (
    TOOL_FORMATS,
    TemplateError,
    get_template,
    register_template,
    template_names,
    with_role_markers,
)

BOS, EOS = "<BOS>", "<EOS>"

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n"
)
LLAMA2_ZH = "You are a helpful assistant. 你是一个乐于助人的助手。请你提供专业、有逻辑、内容真实、有价值的详细回复。"
CODER = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer\n"
)
INTERN = (
    "A chat between a curious <|User|> and an <|Bot|>. The <|Bot|> gives helpful, detailed, and polite answers to the "
    "<|User|>'s questions.\n\n"
)
INTERN2 = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as "
    "English and 中文."
)
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

CHATML_USER = "<|im_start|>user\n"
CHATML_SYSTEM = "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\n"
CHATML_ROUNDS = (
    "Q1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n{}"
    "A2<|im_end|>\n"
)
CHATML = CHATML_ROUNDS.format("")
THINK = "<think>\n\n</think>\n\n"
LLAMA3_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
LLAMA3_ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>\n\n"
# The generation prompt opens the block of the last answer, so it is closed before the answer.
R1 = (
    "Q1<｜Assistant｜>A1<｜end▁of▁sentence｜><｜User｜>Q2<｜Assistant｜><think>\n\n</think>\n\nA2<｜end▁of▁sentence｜>"
)
COHERE_USER = "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>"
COHERE_ASSISTANT = "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
GEMMA = (
    "Q1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n<start_of_turn>user\nQ2<end_of_turn>\n"
    "<start_of_turn>model\nA2<end_of_turn>\n"
)

# name: (text before Q1 without a system text, the same with the system text SYS, text from Q1 on)
EXPECTED = {
    "vicuna": (f"<BOS>{VICUNA} USER: ", "<BOS>SYS USER: ", "Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>"),
    "alpaca": (
        f"<BOS>{ALPACA}",
        "<BOS>SYS\n\n### Instruction:\n",
        "Q1\n\n### Response:\nA1<EOS>\n\n### Instruction:\nQ2\n\n### Response:\nA2<EOS>",
    ),
    "baichuan": (
        "<BOS><reserved_102>",
        "<BOS>SYS<reserved_102>",
        "Q1<reserved_103>A1</s><reserved_102>Q2<reserved_103>A2</s>",
    ),
    "baichuan2": (
        "<BOS><reserved_106>",
        "<BOS>SYS<reserved_106>",
        "Q1<reserved_107>A1</s><reserved_106>Q2<reserved_107>A2</s>",
    ),
    "chatglm": (
        "<BOS>[Round 0]\n问：",
        "<BOS>SYS\n[Round 0]\n问：",
        "Q1\n答：A1<eop>\n[Round 1]\n问：Q2\n答：A2<eop>\n",
    ),
    "chatglm2": (
        "[gMASK]sop[Round 1]\n\n问：",
        "[gMASK]sopSYS\n\n[Round 1]\n\n问：",
        "Q1\n\n答：A1</s>\n\n[Round 2]\n\n问：Q2\n\n答：A2</s>\n\n",
    ),
    "chatglm3": (
        "[gMASK]sop<|user|>\n",
        "[gMASK]sop<|system|>\nSYS<|user|>\n",
        "Q1<|assistant|>\nA1<|user|>\nQ2<|assistant|>\nA2<|user|>",
    ),
    "glm4": (
        "[gMASK]<sop><|user|>\n",
        "[gMASK]<sop><|system|>\nSYS<|user|>\n",
        "Q1<|assistant|>\nA1<|user|>\nQ2<|assistant|>\nA2<|user|>",
    ),
    "llama2": (
        "<BOS>[INST] ",
        "<BOS>[INST] <<SYS>>\nSYS\n<</SYS>>\n\n",
        "Q1 [/INST] A1 </s><BOS>[INST] Q2 [/INST] A2 </s>",
    ),
    "llama2-zh": (
        f"<BOS>[INST] <<SYS>>\n{LLAMA2_ZH}\n<</SYS>>\n\n",
        "<BOS>[INST] <<SYS>>\nSYS\n<</SYS>>\n\n",
        "Q1 [/INST] A1 </s><BOS>[INST] Q2 [/INST] A2 </s><BOS>",
    ),
    "llama3": (
        f"<BOS>{LLAMA3_USER}",
        f"<BOS><|start_header_id|>system<|end_header_id|>\n\nSYS<|eot_id|>{LLAMA3_USER}",
        f"Q1<|eot_id|>{LLAMA3_ASSISTANT}A1<|eot_id|>{LLAMA3_USER}Q2<|eot_id|>{LLAMA3_ASSISTANT}A2<|eot_id|>",
    ),
    "mistral": (
        "<BOS> [INST] ",
        "<BOS> [INST] SYS\n\n",
        "Q1 [/INST] A1</s> [INST] Q2 [/INST] A2</s>",
    ),
    "mistral-v3": ("<BOS>[INST] ", "<BOS>[INST] SYS\n\n", "Q1[/INST] A1</s>[INST] Q2[/INST] A2</s>"),
    "mistral-tekken": ("<BOS>[INST]", "<BOS>[INST]SYS\n\n", "Q1[/INST]A1</s>[INST]Q2[/INST]A2</s>"),
    "chatml": (f"<BOS>{CHATML_USER}", f"<BOS>{CHATML_SYSTEM}", CHATML),
    "qwen": (f"<|im_start|>system\n{QWEN}<|im_end|>\n{CHATML_USER}", CHATML_SYSTEM, CHATML),
    "qwen2": (
        f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{CHATML_USER}",
        CHATML_SYSTEM,
        CHATML,
    ),
    "qwen3": (CHATML_USER, CHATML_SYSTEM, CHATML_ROUNDS.format(THINK)),
    "qwen3_nothink": (CHATML_USER, CHATML_SYSTEM, CHATML),
    "qwen3_5": (CHATML_USER, CHATML_SYSTEM, CHATML_ROUNDS.format(THINK)),
    "qwen3_5_nothink": (CHATML_USER, CHATML_SYSTEM, CHATML_ROUNDS.format(THINK)),
    "deepseek": (
        "<BOS>User: ",
        "<BOS>SYS\n\nUser: ",
        "Q1\n\nAssistant: A1<｜end▁of▁sentence｜>User: Q2\n\nAssistant: A2<｜end▁of▁sentence｜>",
    ),
    "deepseek3": (
        "<BOS><｜User｜>",
        "<BOS>SYS<｜User｜>",
        "Q1<｜Assistant｜>A1<｜end▁of▁sentence｜><｜User｜>Q2<｜Assistant｜>A2<｜end▁of▁sentence｜>",
    ),
    "deepseek_r1": ("<BOS><｜User｜>", "<BOS>SYS<｜User｜>", R1),
    "deepseekcoder": (
        f"<BOS>{CODER}### Instruction:\n",
        "<BOS>SYS### Instruction:\n",
        "Q1\n### Response:\nA1\n<|EOT|>\n### Instruction:\nQ2\n### Response:\nA2\n<|EOT|>\n",
    ),
    "gemma": ("<BOS><start_of_turn>user\n", None, GEMMA),
    "gemma3": ("<BOS><start_of_turn>user\n", "<BOS><start_of_turn>user\nSYS\n\n", GEMMA),
    "phi3": (
        "<BOS><|user|>\n",
        "<BOS><|system|>\nSYS<|end|>\n<|user|>\n",
        "Q1<|end|>\n<|assistant|>\nA1<|end|>\n<|user|>\nQ2<|end|>\n<|assistant|>\nA2<|end|>\n<|endoftext|>",
    ),
    "yi": (f"<BOS>{CHATML_USER}", f"<BOS>SYS<|im_end|>\n{CHATML_USER}", CHATML),
    "zephyr": (
        "<BOS><|user|>\n",
        "<BOS><|system|>\nSYS</s>\n<|user|>\n",
        "Q1</s>\n<|assistant|>\nA1</s>\n<|user|>\nQ2</s>\n<|assistant|>\nA2</s>\n",
    ),
    "xverse": (
        "<BOS>Human: ",
        "<BOS>SYSHuman: ",
        "Q1\n\nAssistant: A1<|endoftext|>Human: Q2\n\nAssistant: A2<|endoftext|>",
    ),
    "aquila": (
        f"<BOS>{HUMAN}###Human: ",
        "<BOS>SYS###Human: ",
        "Q1###Assistant: A1</s>Human: Q2###Assistant: A2</s>",
    ),
    "intern": (
        f"<BOS>{INTERN}<s><|User|>:",
        "<BOS>SYS<s><|User|>:",
        "Q1<eoh>\n<|Bot|>:A1<eoa>\n<s><|User|>:Q2<eoh>\n<|Bot|>:A2<eoa>\n",
    ),
    "intern2": (f"<BOS><|im_start|>system\n{INTERN2}<|im_end|>\n{CHATML_USER}", f"<BOS>{CHATML_SYSTEM}", CHATML),
    "openchat": (
        "<BOS>GPT4 Correct User: ",
        "<BOS>SYS<|end_of_turn|>GPT4 Correct User: ",
        "Q1<|end_of_turn|>GPT4 Correct Assistant: A1<|end_of_turn|>GPT4 Correct User: Q2<|end_of_turn|>"
        "GPT4 Correct Assistant: A2<|end_of_turn|>",
    ),
    "starchat": (
        "<BOS><|system|>\n<|end|>\n<|user|>\n",
        "<BOS><|system|>\nSYS<|end|>\n<|user|>\n",
        "Q1<|end|>\n<|assistant|>\nA1<|end|>\n<|user|>\nQ2<|end|>\n<|assistant|>\nA2<|end|>\n",
    ),
    "falcon": (
        "User: ",
        "SYSUser: ",
        "Q1\n\nAssistant: A1<|endoftext|>\n\nUser: Q2\n\nAssistant: A2<|endoftext|>\n\n",
    ),
    "mft": (
        "<s>human\n",
        "<s>system\nSYS\n<s>human\n",
        "Q1\n<s>bot\nA1\n<EOS>\n<s>human\nQ2\n<s>bot\nA2\n<EOS>\n",
    ),
    "ziya": ("<BOS><human>:", "<BOS>SYS\n<human>:", "Q1\n<bot>:A1</s>\n<human>:Q2\n<bot>:A2</s>"),
    "phoenix": (
        f"<BOS>{HUMAN}\n\nHuman: <s>",
        "<BOS>SYSHuman: <s>",
        "Q1</s>Assistant: <s>A1</s>Human: <s>Q2</s>Assistant: <s>A2</s>",
    ),
    "linly": ("<BOS>User: ", "<BOS>SYS\nUser: ", "Q1\nBot: A1<EOS>\nUser: Q2\nBot: A2<EOS>"),
    "belle": ("<BOS>Human: ", "<BOS>SYS\n\nHuman: ", "Q1\n\nBelle: A1<EOS>\n\nHuman: Q2\n\nBelle: A2<EOS>"),
    "orion": ("<BOS>Human: ", "<BOS>SYSHuman: ", "Q1\n\nAssistant: </s>A1</s>Human: Q2\n\nAssistant: </s>A2</s>"),
    "cohere": (
        f"<BOS>{COHERE_USER}",
        f"<BOS><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>SYS<|END_OF_TURN_TOKEN|>{COHERE_USER}",
        f"Q1<|END_OF_TURN_TOKEN|>{COHERE_ASSISTANT}A1<|END_OF_TURN_TOKEN|>{COHERE_USER}Q2<|END_OF_TURN_TOKEN|>"
        f"{COHERE_ASSISTANT}A2<|END_OF_TURN_TOKEN|>",
    ),
    "base": ("<BOS>", "<BOS>SYS", "Q1A1<EOS>Q2A2<EOS>"),
    "vanilla": ("<BOS>", "<BOS>SYS", "Q1A1<EOS>Q2A2<EOS>"),
    "default": (
        "<BOS>Human: ",
        "<BOS>System: SYS<EOS>\nHuman: ",
        "Q1<EOS>\nAssistant:A1<EOS>\nHuman: Q2<EOS>\nAssistant:A2<EOS>\n",
    ),
}

# What inference feeds after the first question, from Q1 on, by the owners' generation prompts.
GENERATION_PROMPTS = {
    "vicuna": "Q1 ASSISTANT:",
    "alpaca": "Q1\n\n### Response:\n",
    "baichuan": "Q1<reserved_103>",
    "baichuan2": "Q1<reserved_107>",
    "chatglm": "Q1\n答：",
    "chatglm2": "Q1\n\n答：",
    "chatglm3": "Q1<|assistant|>",
    "glm4": "Q1<|assistant|>\n",
    "llama2": "Q1 [/INST]",
    "llama2-zh": "Q1 [/INST]",
    "llama3": f"Q1<|eot_id|>{LLAMA3_ASSISTANT}",
    "mistral": "Q1 [/INST]",
    "mistral-v3": "Q1[/INST]",
    "mistral-tekken": "Q1[/INST]",
    **dict.fromkeys(
        ["chatml", "qwen", "qwen2", "qwen3", "qwen3_nothink", "yi", "intern2"],
        "Q1<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen3_5": "Q1<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "qwen3_5_nothink": "Q1<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "deepseek": "Q1\n\nAssistant:",
    "deepseek3": "Q1<｜Assistant｜>",
    "deepseek_r1": "Q1<｜Assistant｜><think>\n",
    "deepseekcoder": "Q1\n### Response:\n",
    "gemma": "Q1<end_of_turn>\n<start_of_turn>model\n",
    "gemma3": "Q1<end_of_turn>\n<start_of_turn>model\n",
    "phi3": "Q1<|end|>\n<|assistant|>\n",
    "zephyr": "Q1</s>\n<|assistant|>\n",
    "xverse": "Q1\n\nAssistant: ",
    "aquila": "Q1###Assistant:",
    "intern": "Q1<eoh>\n<|Bot|>:",
    "openchat": "Q1<|end_of_turn|>GPT4 Correct Assistant:",
    "starchat": "Q1<|end|>\n<|assistant|>",
    "falcon": "Q1\n\nAssistant:",
    "mft": "Q1\n<s>bot\n",
    "ziya": "Q1\n<bot>:",
    "phoenix": "Q1</s>Assistant: <s>",
    "linly": "Q1\nBot: ",
    "belle": "Q1\n\nBelle: ",
    "orion": "Q1\n\nAssistant: </s>",
    "cohere": f"Q1<|END_OF_TURN_TOKEN|>{COHERE_ASSISTANT}",
    "base": "Q1",
    "vanilla": "Q1",
    "default": "Q1<EOS>\nAssistant:",
}

# What is trained of the answer A2: blanks, tails and think blocks of the layout, and the stop token.
TRAINED = {
    **dict.fromkeys(["vicuna", "mistral", "mistral-v3", "aquila"], " A2</s>"),
    **dict.fromkeys(["llama2", "llama2-zh"], " A2 </s>"),
    **dict.fromkeys(["alpaca", "linly", "belle", "base", "vanilla", "default"], "A2<EOS>"),
    **dict.fromkeys(
        ["baichuan", "baichuan2", "chatglm2", "mistral-tekken", "zephyr", "ziya", "phoenix", "orion"], "A2</s>"
    ),
    **dict.fromkeys(["chatml", "qwen", "qwen2", "qwen3_nothink", "qwen3_5_nothink", "yi", "intern2"], "A2<|im_end|>"),
    "chatglm": "A2<eop>",
    "chatglm3": "\nA2<|user|>",
    "glm4": "A2<|user|>",
    "llama3": "A2<|eot_id|>",
    "qwen3": "<think>\n\n</think>\n\nA2<|im_end|>",
    "qwen3_5": "\n</think>\n\nA2<|im_end|>",
    "deepseek": " A2<｜end▁of▁sentence｜>",
    "deepseek3": "A2<｜end▁of▁sentence｜>",
    "deepseek_r1": "\n</think>\n\nA2<｜end▁of▁sentence｜>",
    "deepseekcoder": "A2\n<|EOT|>",
    **dict.fromkeys(["gemma", "gemma3"], "A2<end_of_turn>"),
    "phi3": "A2<|end|>",
    "xverse": "A2<|endoftext|>",
    "intern": "A2<eoa>",
    "openchat": " A2<|end_of_turn|>",
    "starchat": "\nA2<|end|>",
    "falcon": " A2<|endoftext|>",
    "mft": "A2\n<EOS>",
    "cohere": "A2<|END_OF_TURN_TOKEN|>",
}


def chat(*contents: str, system: str | None = None) -> list[dict]:
    """User and assistant in turns, beginning with the user."""
    head = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return head + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def render(name, messages, **options):
    template = get_template(name) if isinstance(name, str) else name
    return template.render(messages, **{"bos_token": BOS, "eos_token": EOS, **options})


def trained(rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.spans]


# ---- the table


def test_every_template_is_in_the_expectations():
    assert set(template_names()) == set(EXPECTED) == set(GENERATION_PROMPTS) == set(TRAINED)


@pytest.mark.parametrize("name", EXPECTED)
def test_two_rounds_without_system(name):
    before, _, rounds = EXPECTED[name]
    assert render(name, chat("Q1", "A1", "Q2", "A2")).text == before + rounds


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "gemma"])
def test_two_rounds_with_system(name):
    _, before, rounds = EXPECTED[name]
    assert render(name, chat("Q1", "A1", "Q2", "A2", system="SYS")).text == before + rounds


@pytest.mark.parametrize("name", EXPECTED)
def test_an_empty_system_text_counts_as_none(name):
    messages = chat("Q1", "A1")
    assert render(name, chat("Q1", "A1", system="")) == render(name, messages)


@pytest.mark.parametrize("name", EXPECTED)
def test_generation_prompt(name):
    expected = EXPECTED[name][0] + GENERATION_PROMPTS[name]
    rendered = render(name, chat("Q1"), add_generation_prompt=True)
    assert (rendered.text, rendered.spans) == (expected, ())


@pytest.mark.parametrize("name", EXPECTED)
def test_trained_spans(name):
    history, last = trained(render(name, chat("Q1", "A1", "Q2", "A2")))
    assert last == TRAINED[name]
    without_block = TRAINED[name].replace("A2", "A1").removeprefix("<think>\n").removeprefix("\n</think>\n\n")
    assert history == without_block


@pytest.mark.parametrize("name", EXPECTED)
def test_bos_once_or_once_a_round_or_never(name):
    per_round = {"llama2": 2, "llama2-zh": 3}  # two rounds; the latter's owner ends the text with one as well
    never = {"qwen", "qwen2", "qwen3", "qwen3_nothink", "qwen3_5", "qwen3_5_nothink", "falcon", "mft"}
    never |= {"chatglm2", "chatglm3", "glm4"}  # these begin with the family's own [gMASK]<sop>
    text = render(name, chat("Q1", "A1", "Q2", "A2")).text
    assert text.count(BOS) == per_round.get(name, 0 if name in never else 1)
    assert text.startswith(BOS) == (name not in never)
    assert BOS not in render(name, chat("Q1", "A1"), bos_token=None).text


def test_owner_trims_or_contents_stay():
    trimming = {"llama2", "llama3", "gemma", "gemma3", "cohere", "qwen3_5", "qwen3_5_nothink"}
    for name in template_names():
        texts = [render(name, chat(q, a)).text for q, a in [("Q1", "A1"), ("\n Q1 \n", "  A1 ")]]
        assert (texts[0] == texts[1]) == (name in trimming), name


def test_contents_are_never_read_as_patterns():
    contents = ["{content} {bos} {eos}", "{round0} {{ messages }} {% raw %}", "{tool}"]
    text = render("vicuna", chat(contents[0], contents[1], system=contents[2])).text
    assert text == f"<BOS>{{tool}} USER: {contents[0]} ASSISTANT: {contents[1]}</s>"


# ---- the templates that the owners ship, as far as TRL keeps copies of them

SHIPPED = {
    "qwen": "qwen2_5",
    "qwen3": "qwen3",
    "qwen3_nothink": "qwen3_instruct_2507",
    "qwen3_5": "qwen3_5_think",
    "qwen3_5_nothink": "qwen3_5_nothink",
    "gemma": "gemma",
    "gemma3": "gemma3",
    "llama3": "llama3",
    "cohere": "cohere",
    "phi3": "phi3",
    "deepseek_r1": "deepseek_r1_distill",
}
THINKING_HISTORY = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1", "reasoning_content": "old"},
    {"role": "user", "content": "Q2"},
]


def shipped(name: str) -> str:
    path = importlib.resources.files("trl").joinpath("chat_templates", f"{SHIPPED[name]}.jinja")
    if not path.is_file():
        pytest.skip(f"this TRL has no {path.name}")
    return path.read_text(encoding="utf-8")


def apply(tokenizer, jinja: str, messages, bos=BOS, eos=EOS, **options) -> str:
    """transformers' own rendering of a chat template."""
    tokens = {"bos_token": bos, "eos_token": eos}
    return tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False, **tokens, **options)


@pytest.fixture(scope="session")
def char_tokenizer():
    """One token per character, so that offsets are token indices."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("system", [None, " Be brief.\n"])
def test_history_and_generation_prompt_are_the_shipped_ones(char_tokenizer, name, system):
    if name == "gemma" and system:
        pytest.skip("the family has no system role")
    bos = BOS if name == "phi3" else ""  # the shipped template leaves BOS to the tokenizer
    messages = chat(" Q1\n", "A1 ", "Q2", "A2", "好的?", system=system)
    expected = bos + apply(char_tokenizer, shipped(name), messages, add_generation_prompt=True)
    assert render(name, messages, add_generation_prompt=True).text == expected


@pytest.mark.parametrize("name", [name for name in SHIPPED if not name.startswith("deepseek")])
def test_finished_texts_are_the_shipped_ones(char_tokenizer, name):
    messages = chat("Q1", "A1", "Q2", "A2\n")
    eos = "<|endoftext|>"
    expected = apply(char_tokenizer, shipped(name), messages, eos=eos)
    assert render(name, messages).text == (BOS if name == "phi3" else "") + expected


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5"])
@pytest.mark.parametrize(
    "answer",
    [
        {"content": "A2", "reasoning_content": "because\n"},
        {"content": "\nA2", "reasoning_content": ""},
        {"content": "<think>\ninline\n</think>\n\nA2"},
        {"content": "<think>\n\n</think>\n\nA2"},
    ],
)
def test_reasoning_is_the_shipped_one(char_tokenizer, name, answer):
    messages = [*THINKING_HISTORY, {"role": "assistant", **answer}]
    assert render(name, messages).text == apply(char_tokenizer, shipped(name), messages)


# ---- reasoning


def test_reasoning_of_the_last_answer_is_trained_and_of_earlier_ones_dropped():
    messages = [*THINKING_HISTORY, {"role": "assistant", "content": "A2", "reasoning_content": "because"}]
    stop = "<|im_end|>"
    assert trained(render("qwen3", messages)) == [f"A1{stop}", f"<think>\nbecause\n</think>\n\nA2{stop}"]
    assert trained(render("qwen3_5", messages)) == [f"A1{stop}", f"because\n</think>\n\nA2{stop}"]
    assert trained(render("qwen3_5_nothink", messages)) == [f"A1{stop}", f"A2{stop}"]
    assert trained(render("qwen3_nothink", messages)) == [f"A1{stop}", f"A2{stop}"]
    eos = "<｜end▁of▁sentence｜>"
    assert render("deepseek_r1", messages).text == (
        f"<BOS><｜User｜>Q1<｜Assistant｜>A1{eos}<｜User｜>Q2<｜Assistant｜><think>\nbecause\n</think>\n\nA2{eos}"
    )


def test_reasoning_between_calls_of_one_question_is_kept():
    call = {"function": {"name": "clock", "arguments": {}}}
    messages = [
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "look"},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "Noon."},
    ]
    first, second = trained(render("qwen3", messages))
    assert first.startswith("<think>\nlook\n</think>\n\n<tool_call>\n")
    assert second == "<think>\n\n</think>\n\nNoon.<|im_end|>"


# ---- tools

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Das Wetter für <Ort>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "clock"}},
]
WEATHER = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
CLOCK = {"type": "function", "function": {"name": "clock", "arguments": '{"zone":1}'}}


def tool_chat(*calls: dict, content: str | None = None) -> list[dict]:
    """A question, the assistant's calls, one result for each, the answer, another question."""
    results = [{"role": "tool", "content": f"R{i}", "tool_call_id": call.get("id")} for i, call in enumerate(calls)]
    return [
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": content, "tool_calls": list(calls)},
        *results,
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"},
    ]


def test_qwen_tools_are_the_shipped_ones(char_tokenizer):
    as_dict = {"function": {"name": "clock", "arguments": {"zone": 1}}}  # the shipped template takes no JSON strings
    messages = tool_chat(WEATHER, as_dict, content="Let me see.")
    for name in ("qwen", "qwen3", "qwen3_nothink"):
        for conversation in (messages, [{"role": "system", "content": "SYS"}, *messages]):
            expected = apply(char_tokenizer, shipped(name), conversation, tools=TOOLS, add_generation_prompt=True)
            assert render(name, conversation, tools=TOOLS, add_generation_prompt=True).text == expected


def test_default_tools_are_plain_text():
    text = (
        "<BOS>SYS\n\nYou have access to the following tools:\n"
        "> Tool Name: weather\nTool Description: Das Wetter für <Ort>\n"
        'Tool Args: {"type": "object", "properties": {"city": {"type": "string"}}}\n'
        "> Tool Name: clock\nTool Description: \nTool Args: {}\n"
        "Use the following format to call a tool:\nAction: tool name\nAction Input: arguments as a JSON object "
        'USER: Q1 ASSISTANT: Look.\nAction: weather\nAction Input: {"city": "北京"}\nAction: clock\n'
        'Action Input: {"zone":1}</s>USER: R0\nR1 ASSISTANT: A1</s>USER: Q2'
    )
    messages = [{"role": "system", "content": "SYS"}, *tool_chat(WEATHER, CLOCK, content="Look.")]
    assert render("vicuna", messages, tools=TOOLS).text == text


def test_llama3_tools():
    rendered = render("llama3", tool_chat(CLOCK), tools=TOOLS[1:])
    assert rendered.text == (
        "<BOS><|start_header_id|>system<|end_header_id|>\n\n"
        "You have access to the following functions. To call a function, please respond with JSON for a function "
        'call.Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
        'Do not use variables.\n\n{\n    "type": "function",\n    "function": {\n        "name": "clock"\n    }\n}\n\n'
        f"<|eot_id|>{LLAMA3_USER}Q1<|eot_id|>{LLAMA3_ASSISTANT}"
        '{"name": "clock", "parameters": {"zone":1}}<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n"R0"'
        f"<|eot_id|>{LLAMA3_ASSISTANT}A1<|eot_id|>{LLAMA3_USER}Q2<|eot_id|>"
    )
    assert trained(rendered) == ['{"name": "clock", "parameters": {"zone":1}}<|eot_id|>', "A1<|eot_id|>"]


def test_glm4_tools_and_the_stop_token_of_a_call():
    rendered = render("glm4", [{"role": "system", "content": "SYS"}, *tool_chat(CLOCK)], tools=TOOLS[1:])
    assert rendered.text == (
        "[gMASK]<sop><|system|>\n你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
        "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具\n\n## clock\n\n"
        '{\n    "name": "clock"\n}\n在调用上述函数时，请使用 Json 格式表示调用的参数。<|system|>\nSYS<|user|>\nQ1'
        '<|assistant|>\nclock\n{"zone":1}<|observation|>\nR0<|assistant|>\nA1<|user|>\nQ2'
    )
    assert trained(rendered) == ['clock\n{"zone":1}<|observation|>', "A1<|user|>"]
    # chatglm3's newline belongs to the answer, so a call follows the role token directly, as the owner has it
    assert trained(render("chatglm3", tool_chat(CLOCK)))[0] == 'clock\n{"zone":1}<|observation|>'


def test_mistral_tools():
    def text(blank: str) -> str:
        return (
            f"<BOS>[AVAILABLE_TOOLS]{blank}["
            '{"type": "function", "function": {"name": "clock"}}'
            f"][/AVAILABLE_TOOLS][INST]{blank}SYS\n\nQ1[/INST][TOOL_CALLS]{blank}["
            '{"name": "weather", "arguments": {"city": "北京"}, "id": "abcdefghi"}, '
            '{"name": "clock", "arguments": {"zone":1}}'
            f"]</s>[TOOL_RESULTS]{blank}"
            '{"content": R0, "call_id": "abcdefghi"}'
            f"[/TOOL_RESULTS][TOOL_RESULTS]{blank}"
            '{"content": R1}'
            f"[/TOOL_RESULTS]{blank}A1</s>[INST]{blank}Q2[/INST]"
        )

    messages = [{"role": "system", "content": "SYS"}, *tool_chat(WEATHER, CLOCK)]
    assert render("mistral-v3", messages, tools=TOOLS[1:]).text == text(" ")
    assert render("mistral-tekken", messages, tools=TOOLS[1:]).text == text("")


def test_tool_format_of_the_family_unless_another_is_given():
    formats = {name: get_template(name).tool_format for name in template_names()}
    qwen = [name for name in formats if name.startswith("qwen")]
    own = {
        **dict.fromkeys(qwen, "qwen"),
        **dict.fromkeys(["glm4", "chatglm3"], "glm4"),
        "llama3": "llama3",
        "mistral-v3": "mistral",
        "mistral-tekken": "mistral-tekken",
    }
    assert formats == {**dict.fromkeys(formats, "default"), **own}
    assert get_template("vicuna", "qwen").tool_format == "qwen"
    assert get_template("vicuna").tool_format == "default"


# Every template with its own tool format; each kind of layout with all of them.
LAYOUTS = ["vicuna", "llama2", "gemma", "gemma3", "glm4", "chatglm", "chatglm3", "qwen3", "qwen3_5", "starchat", "mft"]
TEMPLATES_AND_FORMATS = [(name, None) for name in EXPECTED]
TEMPLATES_AND_FORMATS += [(name, tool_format) for name in LAYOUTS for tool_format in TOOL_FORMATS]


# ---- the jinja export

CONTENTS = {
    "plain": ("Hello", "Hi there", "Who are you", "An assistant", "Bye"),
    "chinese": ("你好，世界", "你好！", "再见", "再见。", "喂"),
    "newlines": ("a\n\nb\n", "\n\nc\r\n", "\t", "d\n", "\n"),
    "code": ("```python\nprint('{{ x }}')\n```", '{% if "a" %}\\n{%- endif -%}', "{# no #}", "{content}", "\\u0041"),
    "emoji": ("🙂🧑‍🚀", "👍🏽\u200b", "e\u0301", "\u2028", "\U0001f9ec"),
    "blanks": ("  q  ", " a  ", "\u3000q\u3000", "\xa0a ", " "),
}


def assert_same(char_tokenizer, template, messages, tools=None, generation=False, bos=BOS):
    rendered = render(template, messages, tools=tools, add_generation_prompt=generation, bos_token=bos)
    jinja = template.to_jinja()
    options = {"tools": tools, "add_generation_prompt": generation}
    assert apply(char_tokenizer, jinja, messages, bos=bos, **options) == rendered.text


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("kind", CONTENTS)
def test_jinja_renders_the_same(char_tokenizer, name, kind):
    template, contents = get_template(name), CONTENTS[kind]
    for system in (None, "") if template.system is None else (None, "", "Be brief. \n", contents[0]):
        for turns in range(1, 6):
            messages = chat(*contents[:turns], system=system)
            assert_same(char_tokenizer, template, messages)
            if turns % 2:
                assert_same(char_tokenizer, template, messages, generation=True, bos=None)


@pytest.mark.parametrize(("name", "tool_format"), TEMPLATES_AND_FORMATS)
def test_jinja_renders_tools_the_same(char_tokenizer, name, tool_format):
    template = get_template(name, tool_format)
    form = TOOL_FORMATS[template.tool_format]
    conversations = [tool_chat(WEATHER), tool_chat(CLOCK)]
    conversations += [] if form.one_call else [tool_chat(WEATHER, CLOCK)]
    conversations += [] if form.text_join is None else [tool_chat(CLOCK, WEATHER, content=" Let me see.\n")]
    for messages in conversations:
        assert_same(char_tokenizer, template, messages, generation=True)
        assert_same(char_tokenizer, template, messages[:-1])
        assert_same(char_tokenizer, template, messages[:2])
        if template.system is not None:
            assert_same(char_tokenizer, template, messages, tools=TOOLS)
            assert_same(char_tokenizer, template, [{"role": "system", "content": "SYS"}, *messages], tools=TOOLS)


@pytest.mark.parametrize("name", [name for name in EXPECTED if get_template(name).thinking])
@pytest.mark.parametrize("reasoning", [None, "", "\nbecause\n", " so ", "因为"])
@pytest.mark.parametrize("content", ["A2", "\n\nA2 ", "<think>\nx\n</think>\n\nA2", "no opening</think>A2"])
def test_jinja_renders_reasoning_the_same(char_tokenizer, name, reasoning, content):
    template = get_template(name)
    answer = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    messages = [*THINKING_HISTORY, answer, {"role": "user", "content": "Q3"}]
    assert_same(char_tokenizer, template, messages[:-1])
    assert_same(char_tokenizer, template, messages, generation=True)
    question, call, *rest = tool_chat(WEATHER)
    assert_same(char_tokenizer, template, [question, {**call, "reasoning_content": reasoning}, *rest[:-1]])


TEXTS = st.text(max_size=30) | st.sampled_from(["</think>", "{eos}", "{{ bos_token }}", "<think>\n", " \n", "'\"\\n"])


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.sampled_from(template_names()), st.lists(TEXTS, min_size=1, max_size=5), st.none() | TEXTS, st.booleans())
def test_jinja_renders_any_content_the_same(char_tokenizer, name, contents, system, with_bos):
    template = get_template(name)
    system = None if template.system is None else system
    messages = chat(*contents, system=system)
    generation = messages[-1]["role"] == "user"
    assert_same(char_tokenizer, template, messages, generation=generation, bos=BOS if with_bos else None)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    st.sampled_from([name for name in template_names() if get_template(name).system is not None]),
    st.sampled_from(sorted(TOOL_FORMATS)),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5) | st.integers() | st.booleans() | st.none(), max_size=3),
    TEXTS,
)
def test_jinja_writes_any_json_the_same(char_tokenizer, name, tool_format, arguments, text):
    template = get_template(name, tool_format)
    call = {"function": {"name": "f", "arguments": arguments}}
    tools = [{"type": "function", "function": {"name": "f", "description": text, "parameters": {"x": arguments}}}]
    assert_same(char_tokenizer, template, tool_chat(call), tools=tools)


@pytest.mark.parametrize("name", EXPECTED)
def test_assistant_mask_is_the_spans(char_tokenizer, name):
    template = get_template(name)
    for messages in (chat("Q1", "A1\n", "Q2 ", " 好的"), tool_chat(CLOCK)[:-1]):
        rendered = render(template, messages)
        encoded = char_tokenizer.apply_chat_template(
            messages,
            chat_template=template.to_jinja(),
            bos_token=BOS,
            eos_token=EOS,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        expected = [0] * len(rendered.text)
        for start, end in rendered.spans:
            expected[start:end] = [1] * (end - start)
        assert encoded["assistant_masks"] == expected


def test_the_export_keeps_no_line_of_another_feature():
    assert "<<" not in get_template("vicuna").to_jinja()
    assert "think" not in get_template("mistral").to_jinja().replace("think ~", "").replace('set think = ""', "")


# ---- training text and inference prompt


@pytest.mark.parametrize(("name", "tool_format"), TEMPLATES_AND_FORMATS)
def test_what_inference_feeds_is_a_prefix_of_the_training_text(name, tool_format):
    template = get_template(name, tool_format)
    reasoned = {"role": "assistant", "content": "A2", "reasoning_content": "because"}
    for messages in (chat("Q1", " A1 ", "Q2", "A2"), [*chat("Q1", "A1", "Q2"), reasoned], tool_chat(CLOCK)[:-1]):
        full = render(template, messages)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        assert len(answers) == len(full.spans)
        for index, (start, _) in zip(answers, full.spans, strict=True):
            prompt = render(template, messages[:index], add_generation_prompt=True).text
            if index == answers[-1]:
                assert full.text[:start] == prompt
            else:  # an earlier answer of a reasoning model follows the header alone
                assert prompt.startswith(full.text[:start])


@pytest.mark.parametrize("name", EXPECTED)
def test_a_finished_text_grows_by_whole_turns(name):
    short, long = (render(name, chat(*turns)) for turns in (("Q1", "A1", "Q2"), ("Q1", "A1", "Q2", "A2")))
    assert long.text.startswith(short.text)
    assert long.spans[:1] == short.spans


@pytest.mark.parametrize("name", EXPECTED)
def test_every_span_ends_with_the_trained_stop_token(name):
    template = get_template(name)
    stops = template.stop_tokens(EOS)
    assert all(text.endswith(stops[0]) for text in trained(render(name, chat("Q1", "A1", "Q2", "A2"))))
    assert stops[0] in template.control_tokens(EOS)


# ---- refusals


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ([{"role": "system", "content": "S"}], r"messages\[1\]: no user"),
        ([{"role": "assistant", "content": "A"}], r"messages\[0\]: role 'assistant'"),
        ([*chat("Q", "A"), {"role": "assistant", "content": "A"}], r"messages\[2\]: role 'assistant'"),
        ([*chat("Q"), *chat("Q")], r"messages\[1\]: role 'user' where 'assistant'"),
        ([*chat("Q", "A"), {"role": "system", "content": "S"}], r"messages\[2\]: role 'system'"),
        ([{"role": "system", "content": "S"}, {"role": "system", "content": "S"}], r"messages\[1\]: role 'system'"),
        ([*chat("Q", "A"), {"role": "tool", "content": "R"}], r"messages\[2\]: role 'tool' where 'user'"),
        (tool_chat(CLOCK)[:2] + chat("Q"), r"messages\[2\]: role 'user' where 'tool'"),
        ([{"role": "human", "content": "Q"}], r"messages\[0\]: role 'human'"),
    ],
)
def test_roles_out_of_order(char_tokenizer, messages, where):
    import jinja2

    with pytest.raises(TemplateError, match=where):
        render("vicuna", messages)
    with pytest.raises(jinja2.TemplateError, match="no user message|is expected"):
        apply(char_tokenizer, get_template("vicuna").to_jinja(), messages)


def test_no_messages():
    with pytest.raises(TemplateError, match=r"messages\[0\]: no user message"):
        render("vicuna", [])


@pytest.mark.parametrize("content", [None, 3, ["text"]])
def test_contents_that_are_no_strings(content):
    with pytest.raises(TemplateError, match=r"messages\[1\]: content of role 'assistant' is (NoneType|int|list)"):
        render("vicuna", [*chat("Q"), {"role": "assistant", "content": content}])


def assert_both_refuse(char_tokenizer, template, messages, match, eos=EOS, **options):
    import jinja2

    with pytest.raises(TemplateError, match=match):
        template.render(messages, eos_token=eos, **options)
    with pytest.raises(jinja2.TemplateError):
        apply(char_tokenizer, template.to_jinja(), messages, eos=eos, **options)


def test_a_family_without_a_system_role_raises(char_tokenizer):
    gemma = get_template("gemma")
    assert_both_refuse(char_tokenizer, gemma, chat("Q", system="S"), r"messages\[0\].*no system role")
    assert_both_refuse(char_tokenizer, gemma, chat("Q"), "no system role", tools=TOOLS)


def test_calls_that_a_format_has_no_place_for(char_tokenizer):
    llama3, mistral = get_template("llama3"), get_template("mistral-v3")
    assert_both_refuse(char_tokenizer, llama3, tool_chat(CLOCK, CLOCK), r"messages\[1\]: 2 tool calls")
    assert_both_refuse(char_tokenizer, mistral, tool_chat(CLOCK, content="Hm."), r"messages\[1\]: content and tool_c")
    with pytest.raises(TemplateError, match="needs a function with a name"):
        render("qwen", tool_chat({"function": {"arguments": {}}}))


def test_a_generation_prompt_cannot_follow_an_answer(char_tokenizer):
    template = get_template("chatml")
    for messages in (chat("Q", "A"), tool_chat(CLOCK)[:2]):
        assert_both_refuse(char_tokenizer, template, messages, r"messages\[1\]", add_generation_prompt=True)


@pytest.mark.parametrize("name", ["vanilla", "base", "default", "alpaca", "belle", "linly", "mft"])
def test_neutral_templates_need_the_eos_of_the_tokenizer(char_tokenizer, name):
    template = get_template(name)
    assert_both_refuse(char_tokenizer, template, chat("Q", "A"), "set the tokenizer's EOS token", eos=None)
    for method in (template.stop_tokens, template.control_tokens):
        with pytest.raises(TemplateError, match="eos_token is None"):
            method()


# ---- stop tokens, control tokens, names, role markers


def test_the_first_stop_token_is_the_trained_one():
    assert get_template("vicuna").stop_tokens() == ("</s>",)
    assert get_template("glm4").stop_tokens() == ("<|user|>", "<|endoftext|>", "<|observation|>")
    assert get_template("chatglm3").stop_tokens() == ("<|user|>", "</s>", "<|observation|>")
    assert get_template("intern").stop_tokens() == ("<eoa>", "</s>")
    assert get_template("alpaca").stop_tokens("<|im_end|>") == ("<|im_end|>",)


def test_control_tokens_are_special_tokens_only():
    assert get_template("vicuna").control_tokens() == ("</s>",)
    assert get_template("llama2").control_tokens() == ("</s>",)
    assert get_template("zephyr").control_tokens() == ("</s>",)
    assert get_template("qwen3").control_tokens() == ("<|im_start|>", "<|im_end|>")
    assert get_template("baichuan").control_tokens() == ("<reserved_102>", "<reserved_103>", "</s>")
    assert get_template("intern").control_tokens() == ("<s>", "<eoh>", "<eoa>")
    assert get_template("mft").control_tokens("<eos>") == ("<eos>",)
    assert "sop" not in get_template("chatglm3").control_tokens()


@pytest.mark.parametrize("name", EXPECTED)
def test_special_tokens_are_written_by_the_template(name):
    template = get_template(name)
    form = TOOL_FORMATS[template.tool_format]
    written = "".join((*template.patterns, *form.tools, *form.calls, form.result, form.call_stop))
    assert [token for token in template.special if token not in written] == []


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("llama-2", "llama2"),
        ("Llama_3", "llama3"),
        ("llama-3", "llama3"),
        ("qwen2.5", "qwen"),
        ("qwen3.5", "qwen3_5"),
        ("deepseek-r1", "deepseek_r1"),
        ("DeepSeek-V3", "deepseek3"),
        ("DeepSeek-R1-Distill", "deepseek_r1"),
        ("internlm2", "intern2"),
        ("gemma2", "gemma"),
        ("mistral-v2", "mistral-v3"),
    ],
)
def test_other_spellings(spelling, name):
    assert get_template(spelling).name == name


def test_unknown_names():
    with pytest.raises(TemplateError, match=r"unknown template 'vicunna'; nearest: vicuna"):
        get_template("vicunna")
    with pytest.raises(TemplateError, match=r"known: alpaca, aquila.*ziya"):
        get_template("zzzzzzzz")
    with pytest.raises(TemplateError, match=r"unknown tool format 'openai'; known: default, qwen, llama3, glm4, mis"):
        get_template("vicuna", "openai")


def test_register_refuses_a_taken_name_and_an_unknown_tool_format(monkeypatch):
    monkeypatch.setattr(template_module, "_TEMPLATES", dict(template_module._TEMPLATES))
    monkeypatch.setattr(template_module, "_NAMES", dict(template_module._NAMES))
    with pytest.raises(TemplateError, match="'Qwen-2.5' is taken by 'qwen'"):
        register_template("mine", aliases=("Qwen-2.5",), user="{content}", assistant="")
    with pytest.raises(TemplateError, match="unknown tool format"):
        register_template("mine", user="{content}", assistant="", tool_format="none")
    assert "mine" not in template_names()
    mine = register_template("mine", aliases=("my-own",), user="U{content}", assistant="A")
    assert get_template("MyOwn") is mine
    assert render("mine", chat("Q", "A")).text == "<BOS>UQAA</s>"


def test_role_markers_of_mft():
    markers = {"system": "<|role_start|>system<|role_end|>", "user": "<|u|>", "assistant": "<|a|>"}
    template = with_role_markers(get_template("mft"), markers)
    rendered = render(template, chat("Q1", "A1", "Q2", system="S"), add_generation_prompt=True)
    assert rendered.text == "<|role_start|>system<|role_end|>S\n<|u|>Q1\n<|a|>A1\n<EOS>\n<|u|>Q2\n<|a|>"
    assert trained(rendered) == ["A1\n<EOS>"]
    assert with_role_markers(get_template("mft"), {}) == get_template("mft")
    only_user = with_role_markers(get_template("mft"), {"user": "U:"})
    assert render(only_user, chat("Q1", "A1")).text == "U:Q1\n<s>bot\nA1\n<EOS>\n"


def test_a_template_with_role_markers_is_found_by_its_name():
    """What stage.json keeps of a template is its name."""
    marked = with_role_markers(get_template("mft"), {"user": "<用户>:", "assistant": 'say "it": '})
    assert marked.name == 'mft {"assistant": "say \\"it\\": ", "user": "<用户>:"}'
    assert get_template(marked.name) == marked
    assert get_template(marked.name, tool_format="qwen") == replace(marked, tool_format="qwen")
    twice = with_role_markers(marked, {"user": "U:", "system": "S:"})
    assert twice == with_role_markers(get_template("mft"), {"system": "S:", "user": "U:", "assistant": 'say "it": '})
    with pytest.raises(TemplateError, match="not JSON"):
        get_template('mft {"user": ')


def test_role_markers_drop_special_tokens_that_are_no_longer_written():
    markers = {"system": "S:", "user": "U:", "assistant": "A:"}
    assert with_role_markers(get_template("chatml"), markers).control_tokens() == ("<|im_end|>",)


@pytest.mark.parametrize("markers", [{"bot": "B"}, {"user": None}, {"user": "{content}"}])
def test_role_markers_that_cannot_be(markers):
    with pytest.raises(TemplateError, match="role markers: "):
        with_role_markers(get_template("mft"), markers)


# ---- the command line


def test_command_line(capsys):
    assert template_module.main([]) == 0
    assert capsys.readouterr().out.split() == list(template_names())
    assert template_module.main(["vicuna"]) == 0
    shown = capsys.readouterr().out
    assert "USER: What is anaemia? ASSISTANT:[[ A lack of red blood cells.</s>]]USER: And its causes?" in shown
    assert template_module.main(["gemma", "qwen3_5"]) == 0
    assert template_module.main(["vicunna"]) == 2
    assert "nearest: vicuna" in capsys.readouterr().err
