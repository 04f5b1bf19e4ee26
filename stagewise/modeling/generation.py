"""Load what a stage left behind, and generate from it, or score with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    TextStreamer,
)

from stagewise.errors import InputError, first_line
from stagewise.modeling.loading import fit_embedding, is_reward_model, prepare_scoring
from stagewise.modeling.model_check import check_adapter_on
from stagewise.modeling.model_shape import adapter_base
from stagewise.modeling.multimodal import adapted_config, generating_class
from stagewise.modeling.quantization import is_quantized, load_trained_base
from stagewise.modeling.rope_scaling import (
    AS_TRAINED,
    RopeRequest,
    config_for_inference,
    hold_frequencies,
    max_positions,
)
from stagewise.modeling.untrusted import read_config
from stagewise.modeling.weight_check import check_weights

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy: the same answer every time."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 0.9
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for flag, fits, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "a share above 0, at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "more than 0 (1 is none)"),
        ):
            if not fits:
                raise InputError(f"--{flag} {getattr(self, flag)}: expected {expected}")

    def as_generate_arguments(self) -> dict:
        sample = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {
            **(sample if self.temperature > 0 else greedy),
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
        }


def load_for_inference(
    model_path: str,
    adapter_path: str | None = None,
    tokenizer_path: str | None = None,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    scores: bool = False,
    rope: RopeRequest = AS_TRAINED,
    allow_pickle: bool = False,
):
    """(model, tokenizer) of a full or merged model, of base + adapter, or of an adapter folder that names its base.

    An adapter that was trained on a quantized base gets that base, quantized as its stage.json says: on any other
    weights it would answer differently.

    Args:
        scores: a reward model is wanted, which scores; otherwise a language model, which generates.
        rope: what is asked for beside the RoPE scaling of training, which an adapter's stage.json tells.
        allow_pickle: weights need not be safetensors.

    Raises:
        InputError: nothing loadable there, the adapter does not fit, or it is a model of the other kind; see
            config_for_inference.
    """
    _check_kind(adapter_path or model_path, scores)
    flag = "--lora_model" if adapter_path else "--model_name_or_path"
    if adapter_path is None and (Path(model_path) / "adapter_config.json").is_file():
        adapter_path = model_path
        model_path = adapter_base(adapter_path) or ""
    tokenizer_path = tokenizer_path or _first_with_tokenizer(adapter_path, model_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=trust_remote_code)
        config = read_config(model_path, model_path, trust_remote_code=trust_remote_code)
        config = config_for_inference(config, adapter_path, rope)
        if scores:
            config.num_labels = 1
        if adapter_path:
            config = config if scores else adapted_config(config, adapter_path)
            check_adapter_on(flag, adapter_path, config, len(tokenizer), trust_remote_code)
        check_weights(model_path, model_path, config, scores, scores and adapter_path is not None, trust_remote_code)
        auto_class = AutoModelForSequenceClassification if scores else generating_class(config)
        model = load_trained_base(
            auto_class, model_path, config, adapter_path, dtype, torch.device(device), trust_remote_code, allow_pickle
        )
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"--model_name_or_path {model_path}: {first_line(error)}") from error
    hold_frequencies(model)
    fit_embedding(model, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if scores and (adapter_path or model.config.get_text_config().pad_token_id is None):
        prepare_scoring(model, tokenizer)
    if adapter_path:
        model = _with_adapter(model, adapter_path, model_path)
    tokenizer.padding_side = "left"
    if not is_quantized(model):  # those are made where they belong, and moving spoils 8-bit ones
        model = model.to(device)
    return model.eval(), tokenizer


def _with_adapter(model: PreTrainedModel, adapter_path: str, model_path: str):
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, adapter_path)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"--lora_model {adapter_path}: does not fit {model_path}: {error}") from error


def _check_kind(path: str, scores: bool) -> None:
    if scores and not is_reward_model(path):
        raise InputError(
            f"--score: {path} is no reward model, it has no score head; give one that reward_modeling.py made"
        )
    if not scores and is_reward_model(path):
        raise InputError(f"{path}: is a reward model, it scores answers and writes none; pass --score")


def _first_with_tokenizer(adapter_path: str | None, model_path: str) -> str:
    if adapter_path and (Path(adapter_path) / "tokenizer_config.json").is_file():
        return adapter_path
    return model_path


def stop_token_ids(tokenizer, stop_tokens: Sequence[str], own: GenerationConfig | None = None) -> list[int]:
    """Ids that end an answer: the template's stop tokens, the tokenizer's EOS, and what the model's `own` settings
    name, if it is a token that never stands for text (configurations have numbers of other tokenizers in them).
    """
    ids = {i for i in _end_ids(own) if i in tokenizer.added_tokens_decoder}
    for token in (tokenizer.eos_token, *stop_tokens):
        (number,) = tokenizer.convert_tokens_to_ids([token])
        # of a token that it does not know, a tokenizer gives the id of "unknown", which may be that of EOS
        if number is not None and tokenizer.convert_ids_to_tokens(number) == token:
            ids.add(number)
    return sorted(ids)


def own_generation(name: str | None, config: PretrainedConfig) -> GenerationConfig:
    """The generation_config.json of a model, or what its configuration says where it has none."""
    try:
        return GenerationConfig.from_pretrained(name) if name else GenerationConfig.from_model_config(config)
    except OSError:
        return GenerationConfig.from_model_config(config)


def _end_ids(own: GenerationConfig | None) -> list[int]:
    found = getattr(own, "eos_token_id", None)
    return list(found) if isinstance(found, (list, tuple)) else [] if found is None else [found]


def settle_end(model: PreTrainedModel, tokenizer, stop_tokens: Sequence[str], eos: str | None) -> None:
    """Let whoever runs the saved model end where training ended answers: generate() and serving engines go by
    generation_config.json, others by the tokenizer's EOS.

    Args:
        stop_tokens: the template's.
        eos: the one that becomes the tokenizer's EOS; None: it keeps its own.
    """
    if eos is not None:
        tokenizer.eos_token = eos
    own = model.generation_config
    if own is None:  # code of somebody's own that generates in its own way
        return
    own.eos_token_id = list(dict.fromkeys([*_end_ids(own), *stop_token_ids(tokenizer, stop_tokens)]))


def generating_base(model: nn.Module) -> PreTrainedModel | None:
    """The language model under an adapter, or in an actor-critic; None of a model that writes nothing."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "base", model)
    return base if base.can_generate() else None


def save_end(model: PreTrainedModel, folder: Path) -> None:
    """generation_config.json beside an adapter: the base's with what settle_end has made of it, for the merge."""
    (folder / GENERATION_CONFIG).write_text(model.generation_config.to_json_string(), encoding="utf-8")


def sampling_config(
    tokenizer, stop_ids: Sequence[int], max_new_tokens: int, temperature: float, top_p: float
) -> GenerationConfig:
    """Plain sampling from softmax(logits / temperature), cut to the nucleus `top_p`, and nothing else.

    Raises:
        InputError: a value out of range; a temperature of 0 leaves nothing to sample.
    """
    for flag, value, fits, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("temperature", temperature, 0 < temperature < float("inf"), "a number above 0"),
        ("top_p", top_p, 0 < top_p <= 1, "a share above 0, at most 1"),
    ):
        if not fits:
            raise InputError(f"--{flag} {value}: expected {expected}")
    return GenerationConfig(
        do_sample=True,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        eos_token_id=list(stop_ids),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer,
    prompts: Sequence[str],
    stop_ids: Sequence[int],
    sampling: Sampling,
    batch_size: int = 8,
    stream: bool = False,
) -> list[str]:
    """One answer for each rendered prompt, in the order given; stop tokens are not part of it.

    Prompts are batched by length, padded on the left. `stream` prints a single prompt's answer while it is made.

    Raises:
        InputError: a prompt leaves no room for max_new_tokens in the model's positions.
    """
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    positions = max_positions(model.config)
    longest = max(map(len, encoded), default=0)
    if positions and longest + sampling.max_new_tokens > positions:
        raise InputError(
            f"a prompt of {longest} tokens and --max_new_tokens {sampling.max_new_tokens} are more than the model's "
            f"{positions} positions"
        )
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    answers = [""] * len(encoded)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [encoded[i] for i in rows]}, return_tensors="pt").to(model.device)
        output = model.generate(
            **batch,
            **sampling.as_generate_arguments(),
            use_cache=True,
            eos_token_id=list(stop_ids),
            pad_token_id=tokenizer.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
        )
        new = output[:, batch["input_ids"].shape[1] :]
        for i, answer in zip(rows, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            answers[i] = answer.strip()
    return answers


@torch.inference_mode()
def score(model: PreTrainedModel, tokenizer, texts: Sequence[str], batch_size: int = 8) -> list[float]:
    """The score of each rendered conversation, in the order given. Texts are batched by length.

    Raises:
        InputError: a text is longer than the model's positions.
    """
    config = model.config.get_text_config()
    encoded = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    positions = max_positions(config)
    longest = max(map(len, encoded), default=0)
    if positions and longest > positions:
        raise InputError(f"a conversation of {longest} tokens is more than the model's {positions} positions")
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    scores = [0.0] * len(encoded)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids = [torch.tensor(encoded[i]) for i in rows]
        lengths = torch.tensor([len(row) for row in ids])
        batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=config.pad_token_id)
        mask = torch.arange(batch.shape[1])[None] < lengths[:, None]
        output = model(batch.to(model.device), attention_mask=mask.long().to(model.device), use_cache=False)
        for i, value in zip(rows, output.logits.squeeze(-1).float().tolist(), strict=True):
            scores[i] = value
    return scores
