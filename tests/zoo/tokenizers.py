"""Tiny tokenizers with the habits that real ones have."""

import functools

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

VOCABULARY = 400
# Of words alone, with the end token behind an answer, so that it fits any of them.
_CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_TEXT = [
    f"user assistant system: What is {i} plus {i}? It is {2 * i}. Gladly, ask me anytime! Who cares, count yourself."
    for i in range(100)
]


def _byte_level(special: dict[str, str]) -> PreTrainedTokenizerFast:
    """Bytes as letters, no BOS put in front: GPT-2, Qwen, Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _TEXT,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[*dict.fromkeys(special.values())],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _sentencepiece_like(bos: str, eos: str) -> PreTrainedTokenizerFast:
    """Spaces as letters, bytes for what is unknown, BOS in front of every text: Llama 2, Mistral, Gemma."""
    special = ["<unk>", bos, eos, "<pad>"]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.train_from_iterator(
        _TEXT, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[*special, *alphabet], show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token=bos, eos_token=eos, pad_token="<pad>"
    )


@functools.cache
def tiny_tokenizer(habit: str) -> PreTrainedTokenizerFast:
    """One of HABITS; its rows of 400 to 700 tokens fit a vocabulary of models.VOCABULARY."""
    tokenizer = HABITS[habit]()
    tokenizer.chat_template = _CHAT
    return tokenizer


HABITS = {
    "byte-level": lambda: _byte_level({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "unk is eos": lambda: _byte_level(dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")),
    "pad is eos": lambda: _byte_level(
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|eot_id|>"}
    ),
    "no BOS": lambda: _byte_level({"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}),
    "sentencepiece": lambda: _sentencepiece_like("<s>", "</s>"),
    "sentencepiece, <bos>": lambda: _sentencepiece_like("<bos>", "<eos>"),
}
