"""Rotary position embeddings (RoPE) beyond the length that a model was made for: --rope_scaling.

The setting is a part of the model's configuration. Weights that are saved whole carry it in their config.json; an
adapter has no configuration of its own, so it travels in the stage.json beside the adapter, and whoever puts the
adapter on its base asks `config_of_adapter` first.
"""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PretrainedConfig

from stagewise.errors import InputError

KINDS = ("linear", "dynamic", "yarn", "llama3")
# What llama3 needs beside factor and original length, as Llama 3.1 has it.
LLAMA3_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
STAGE_FILE = "stage.json"
# Types of RoPE that stretch nothing.
UNSCALED = ("default", "proportional", "axial")


@dataclass(frozen=True)
class RopeRequest:
    """What inference is asked for beside what the model was trained with.

    forced: another setting than that of training is allowed. With kind None it is the base model's own.
    """

    kind: str | None = None
    max_length: int | None = None
    forced: bool = False


AS_TRAINED = RopeRequest()


def scale_rope(config: PretrainedConfig, kind: str, max_length: int) -> PretrainedConfig:
    """A copy of `config` that reaches `max_length` tokens: factor = ceil(max_length / original length).

    A configuration that is scaled already is not scaled on top: the factor counts from its original length, and what
    else it says (rope_theta, the share of a head that is rotated, the bands of llama3 and yarn) stays. Where layers
    have RoPE of their own by type, each type gets it, but for sliding windows that the original length holds: no two
    tokens within one are further apart than the model has learnt.

    Raises:
        InputError: no RoPE there, or none that takes this kind; scaled by another kind, or from an unknown length;
            `max_length` needs no scaling.
    """
    scaled = copy.deepcopy(config)
    text = scaled.get_text_config()
    original = _original_length(config, kind, max_length)
    factor = math.ceil(max_length / original)
    stretched = {
        name: rope if _has_short_window(name, text, original) else _stretch(rope, kind, factor, original)
        for name, rope in _ropes(text).items()
    }
    text.rope_parameters = stretched.get("", {**text.rope_parameters, **stretched})
    if kind != "dynamic":  # whose frequencies change where a row is longer than max_position_embeddings
        text.max_position_embeddings = original * factor
    if kind == "linear" or hasattr(text, "original_max_position_embeddings"):
        # linear's rope_parameters have no place for it, and a later scaling has to know it
        text.original_max_position_embeddings = original
    if getattr(text, "head_dim", 0) is None:  # Mixtral: dynamic and yarn multiply with it
        text.head_dim = text.hidden_size // text.num_attention_heads
    _check_is_kept(scaled, kind)
    return scaled


def rope_setting(config: PretrainedConfig) -> dict | None:
    """rope_type, factor, original_max_position_embeddings and max_position_embeddings of a scaled configuration; None
    where RoPE is not scaled, or not there.

    The original length is None where the configuration does not say it, as for linear scaling by others.
    """
    text = config.get_text_config()
    rope = _scaled_rope(text)
    if rope is None:
        return None
    original = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    if rope["rope_type"] == "dynamic":
        original = text.max_position_embeddings
    return {
        "rope_type": rope["rope_type"],
        "factor": rope.get("factor"),
        "original_max_position_embeddings": original,
        "max_position_embeddings": text.max_position_embeddings,
    }


def max_positions(config: PretrainedConfig) -> int | None:
    """How many tokens a row may have; None where there is no limit (ALiBi).

    It is max_position_embeddings, but for dynamic scaling, which keeps the original length there.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    rope = _scaled_rope(text)
    if positions and rope and rope["rope_type"] == "dynamic":
        return int(positions * rope["factor"])
    return positions


def describe(setting: dict | None) -> str:
    """A rope_setting in words, for messages."""
    if setting is None:
        return "no RoPE scaling"
    return (
        f"RoPE scaling {setting['rope_type']}, factor {setting['factor']}, from "
        f"{setting['original_max_position_embeddings'] or 'unknown'} positions"
    )


def _ropes(text: PretrainedConfig) -> dict[str, dict]:
    """The RoPE parameters by type of layer; under "" where all layers share them; {} without RoPE."""
    parameters = getattr(text, "rope_parameters", None) or {}
    if getattr(text, "alibi", False):  # Falcon has both, and uses one
        return {}
    nested = {name: rope for name, rope in parameters.items() if isinstance(rope, dict)}
    return nested or ({"": parameters} if parameters.get("rope_theta") else {})


def _scaled_rope(text: PretrainedConfig) -> dict | None:
    return next((rope for rope in _ropes(text).values() if rope.get("rope_type", "default") not in UNSCALED), None)


def _original_length(config: PretrainedConfig, kind: str, max_length: int) -> int:
    text = config.get_text_config()
    flag = f"--rope_scaling {kind}"
    if not _ropes(text) or not getattr(text, "max_position_embeddings", None):
        raise InputError(
            f"{flag}: the configuration of {text.model_type} has no rope_parameters to scale: its positions are not "
            "rotary (as in bloom, gpt2 or opt), or rotary in a way of its own; leave the flag out"
        )
    others = {rope.get("rope_type", "default") for rope in _ropes(text).values()} - {"default", kind}
    if others:
        raise InputError(
            f"{flag}: the model has RoPE of type {others.pop()} already, and two kinds do not go together; give that "
            "one, or leave the flag out"
        )
    setting = rope_setting(config)
    if setting is None:
        original = text.max_position_embeddings
        if max_length <= original:
            raise InputError(
                f"{flag}: the model was made for {original} positions, enough for {max_length}; leave the flag out"
            )
        return original
    original, reach = setting["original_max_position_embeddings"], max_positions(config)
    if original is None:
        raise InputError(
            f"{flag}: the model is scaled already, and its config.json does not say from how many positions; add "
            "original_max_position_embeddings to it, or leave the flag out"
        )
    if max_length <= (reach or 0) and math.ceil(max_length / original) != setting["factor"]:
        raise InputError(
            f"{flag}: the model reaches {reach} positions already ({describe(setting)}), enough for {max_length}, and "
            "another factor would undo what it has learnt; leave the flag out"
        )
    return original


def _has_short_window(name: str, text: PretrainedConfig, original: int) -> bool:
    window = getattr(text, "sliding_window", None) or math.inf
    return name == "sliding_attention" and window <= original


def _stretch(rope: dict, kind: str, factor: int, original: int) -> dict:
    stretched = {**rope, "rope_type": kind, "factor": float(factor)}
    if kind in ("yarn", "llama3"):  # or they would take the new max_position_embeddings for it
        stretched["original_max_position_embeddings"] = original
    return {**LLAMA3_BANDS, **stretched} if kind == "llama3" else stretched


def _check_is_kept(config: PretrainedConfig, kind: str) -> None:
    """Some architectures know some kinds only, or turn one into another when they are loaded (Phi-3)."""
    problem = None
    try:
        again = type(config).from_dict(config.to_dict())
        kept = _ropes(again.get_text_config()) == _ropes(config.get_text_config())
    except (ValueError, KeyError, StrictDataclassError) as error:
        kept, problem = False, error
    if not kept:
        model_type = config.get_text_config().model_type
        raise InputError(
            f"--rope_scaling {kind}: {model_type} does not take it: {problem or 'its configuration changes it'}"
        ) from problem


def saved_setting(folder: str | Path | None) -> dict | None:
    """{"rope": the rope_setting of a run} from the stage.json of its output or checkpoint; None where none says it."""
    path = Path(folder or ".", STAGE_FILE)
    if folder is None or not path.is_file():
        return None
    try:
        stage = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    return {"rope": stage["rope"]} if "rope" in stage else None


def config_of_adapter(config: PretrainedConfig, adapter_path: str | Path) -> PretrainedConfig:
    """The configuration that an adapter was trained with: its base's, scaled as the adapter's stage.json says.

    Raises:
        InputError: the base does not lend itself to it, being another one or scaled otherwise.
    """
    saved = saved_setting(adapter_path)
    if saved is None or saved["rope"] == rope_setting(config):
        return config
    wanted = saved["rope"]
    found = f"{adapter_path}: was trained with {describe(wanted)}, and its base has {describe(rope_setting(config))}"
    if wanted is None or wanted["rope_type"] not in KINDS or not wanted["original_max_position_embeddings"]:
        raise InputError(f"{found}; give the base model that it was trained on")
    length = int(wanted["factor"] * wanted["original_max_position_embeddings"])
    try:
        scaled = scale_rope(config, wanted["rope_type"], length)
    except InputError as error:
        raise InputError(f"{found}: {error}") from error
    if rope_setting(scaled) != wanted:
        raise InputError(
            f"{found}, made for {config.get_text_config().max_position_embeddings} positions; give the base model "
            "that it was trained on"
        )
    return scaled


def check_peft_path(adapter_path: str, config: PretrainedConfig) -> None:
    """Refuse to train an adapter on with less scaling than it was trained with; a first scaling, or a longer one of
    the same kind, is what a run may want.

    Raises:
        InputError: the adapter's stage.json says another kind or a larger factor than `config`.
    """
    saved = saved_setting(adapter_path)
    if saved is None or saved["rope"] is None:
        return
    wanted, setting = saved["rope"], rope_setting(config)
    if setting is None or setting["rope_type"] != wanted["rope_type"] or _factor(setting) < _factor(wanted):
        raise InputError(
            f"--peft_path {adapter_path}: was trained with {describe(wanted)}, and this run has {describe(setting)}; "
            "pass the --rope_scaling and --model_max_length of its run"
        )


def _factor(setting: dict) -> float:
    return setting["factor"] or 1.0  # some kinds of others have none


def config_for_inference(
    config: PretrainedConfig, adapter_path: str | Path | None, request: RopeRequest
) -> PretrainedConfig:
    """The configuration to generate with: that of training, which a request may confirm, or replace where forced.

    Raises:
        InputError: the request is not what the model was trained with; or as config_of_adapter and scale_rope.
    """
    if request.forced:
        return scale_rope(config, request.kind, request.max_length or 0) if request.kind else config
    trained = config_of_adapter(config, adapter_path) if adapter_path else config
    if request.kind and not _is_what_was_asked(rope_setting(trained), request.kind, request.max_length or 0):
        raise InputError(
            f"--rope_scaling {request.kind}: for {request.max_length} tokens it is not what the model was trained "
            f"with, {describe(rope_setting(trained))}; leave the flag out, or pass --force_rope_scaling"
        )
    return trained


def _is_what_was_asked(setting: dict | None, kind: str, max_length: int) -> bool:
    if setting is None or not setting["original_max_position_embeddings"]:
        return False
    factor = math.ceil(max_length / setting["original_max_position_embeddings"])
    return setting["rope_type"] == kind and setting["factor"] == factor


def check_rope(model: nn.Module, kind: str) -> None:
    """Raise InputError unless the model's code has taken this kind from its configuration."""
    if not any(kind in _rope_types(module) for module in _rotary_modules(model)):
        raise InputError(
            f"--rope_scaling {kind}: {type(model).__name__} does not follow the rope_parameters of its configuration; "
            "leave the flag out"
        )


def hold_frequencies(model: nn.Module) -> None:
    """Keep the inverse frequencies of every row those that the configuration says.

    A cast of the whole model (--bf16_full_eval, DeepSpeed) would round them to bf16, which is radians off at long
    positions. And transformers' dynamic scaling goes on with the frequencies of the longest row that it has seen,
    until one comes that is shorter than the original length: what a row gives would depend on the rows before it.
    TF32 is off while angles are made, which some models do by a matrix product: it has eleven significant bits, and
    positions from 2049 on need more.
    """
    for module in model.modules():
        if any(_is_in_use(name) for name, _ in module.named_buffers(recurse=False)):
            full = _FullProducts()
            module.register_forward_pre_hook(full.begin)
            module.register_forward_hook(full.end, always_call=True)
    for module in _rotary_modules(model):
        if "longrope" not in _rope_types(module):  # which writes into its frequencies
            module.register_forward_pre_hook(_Frequencies(module))


class _Frequencies:
    """Forward pre-hook of a rotary embedding: as it was built, before each forward."""

    def __init__(self, rotary: nn.Module):
        self.built: dict[str, Tensor] = {
            name: tensor.detach().clone() for name, tensor in rotary.named_buffers(recurse=False) if _is_in_use(name)
        }
        self.is_dynamic = "dynamic" in _rope_types(rotary)

    def __call__(self, rotary: nn.Module, inputs: tuple) -> None:
        for name, built in self.built.items():
            present = getattr(rotary, name)
            if built.device != present.device:
                self.built[name] = built = built.to(present.device)
            if self.is_dynamic:
                setattr(rotary, name.removesuffix("inv_freq") + "max_seq_len_cached", rotary.original_max_seq_len)
            if self.is_dynamic or present.dtype != built.dtype:
                setattr(rotary, name, built)


class _FullProducts:
    """Forward hooks: products of float32 numbers are exact in between."""

    def __init__(self) -> None:
        self.found: str | None = None

    def begin(self, module: nn.Module, inputs: tuple) -> None:
        if not torch.compiler.is_compiling():  # which cannot follow the switch
            self.found = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")

    def end(self, module: nn.Module, inputs: tuple, output: object) -> None:
        if self.found is not None:
            torch.set_float32_matmul_precision(self.found)
            self.found = None


def _rotary_modules(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if hasattr(module, "rope_type") and any(_is_in_use(name) for name, _ in module.named_buffers(recurse=False)):
            yield module


def _is_in_use(name: str) -> bool:
    return name.endswith("inv_freq") and "original" not in name


def _rope_types(rotary: nn.Module) -> set[str]:
    found = rotary.rope_type  # by type of layer where layers differ
    return set(found.values()) if isinstance(found, dict) else {str(found)}
