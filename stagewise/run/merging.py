"""Merge an adapter into its base, measured: what the sum changes, what rounding costs, what a reload gives."""

import json
import logging
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from stagewise.errors import InputError, first_line
from stagewise.modeling.loading import fit_embedding, prepare_scoring
from stagewise.modeling.quantization import (
    Quantization,
    TrainedBase,
    dequantize,
    is_quantized,
    load_trained_base,
    quantization_of,
)
from stagewise.modeling.rope_scaling import config_of_adapter
from stagewise.modeling.untrusted import check_links, read_config
from stagewise.run import lineage

logger = logging.getLogger(__name__)

REPORT = "merge_report.json"
# Share of the positions of the proof where both first choices must be the same token: for the sum in float32, where a
# difference means a wrong merge, and for the saved weights, whose cast may turn a near tie.
MIN_MERGED_AGREEMENT = 0.99
MIN_SAVED_AGREEMENT = 0.9
# Scores of two prompts that are this close, as a share of the range of all, may change places when they are rounded.
NEAR_TIE = 0.05
# Short texts of several kinds; what they say does not matter, both models get the same ids.
PROMPTS = (
    "The heart pumps blood through the body.",
    "Question: what should I do about a small burn?\nAnswer:",
    "人体最大的器官是皮肤。",
    "问：发烧时应该注意什么？\n答：",
    "def add(a, b):\n    return a + b\n",
    "1, 2, 3, 4, 5, 6, 7, 8",
)


def check_paths(base_model: str, lora_model: str, output_dir: str, overwrite: bool) -> None:
    """Raise InputError for what cannot end well, before anything is loaded."""
    adapter = Path(lora_model)
    if not (adapter / "adapter_config.json").is_file():
        if (adapter / "config.json").is_file():
            raise InputError(f"--lora_model {adapter}: holds a full model, not an adapter; there is nothing to merge")
        raise InputError(f"--lora_model {adapter}: no adapter_config.json there")
    if base_model.startswith((".", "/", "~")) and not Path(base_model).expanduser().exists():
        raise InputError(f"--base_model {base_model}: no such folder")
    output = Path(output_dir)
    for flag, source in (("--base_model", Path(base_model)), ("--lora_model", adapter)):
        if source.exists() and output.exists() and output.samefile(source):
            raise InputError(f"--output_dir {output}: is also {flag}; choose another folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise InputError(f"--output_dir {output}: not empty; choose another folder or pass --overwrite")
    if output.is_dir() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise InputError(f"--output_dir {output}: not empty, and no model that --overwrite could replace")


def choose_device(name: str) -> torch.device:
    """`auto` is the accelerator where there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def named_dtype(name: str) -> torch.dtype:
    """ "bfloat16" -> torch.bfloat16"""
    return getattr(torch, name)


def load_merge_tokenizer(tokenizer_path: str | None, lora_model: str, base_model: str, trust_remote_code: bool):
    """--tokenizer_path, else the adapter's, else the base's tokenizer; with the adapter's chat template.

    Raises:
        InputError: the named tokenizer is smaller than the one the adapter was trained with.
    """
    trained = (
        _tokenizer(lora_model, trust_remote_code) if (Path(lora_model) / "tokenizer_config.json").is_file() else None
    )
    if tokenizer_path is None:
        return trained or _tokenizer(base_model, trust_remote_code)
    tokenizer = _tokenizer(tokenizer_path, trust_remote_code)
    if trained is not None:
        if len(trained) > len(tokenizer):
            raise InputError(
                f"--tokenizer_path {tokenizer_path}: has {len(tokenizer)} tokens, the adapter was trained with "
                f"{len(trained)}; leave the flag out to use the adapter's"
            )
        tokenizer.chat_template = trained.chat_template or tokenizer.chat_template
    return tokenizer


def _tokenizer(path: str, trust_remote_code: bool):
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no tokenizer can be loaded from {path}: {first_line(error)}; name one: --tokenizer_path"
        ) from error


@dataclass
class MergeBase:
    """What an adapter is merged into.

    model: in float32, nothing of it quantized, with the head that the adapter was trained for.
    dtype: name of the checkpoint's own data type.
    quantization: of the base that the adapter was trained on; None where that was not quantized.
    trained_outputs: outputs of that quantized base with the adapter on it, for the proof's prompts.
    onto: "trained" (the values that training saw) or "original" (those that were quantized).
    """

    model: PreTrainedModel
    dtype: str
    quantization: Quantization | None = None
    trained_outputs: list[Tensor] | None = None
    onto: str = "trained"


def load_base(
    base_model: str,
    lora_model: str,
    tokenizer,
    device: torch.device,
    trust_remote_code: bool,
    onto: str = "trained",
    allow_pickle: bool = False,
) -> MergeBase:
    """The base model in float32, with the RoPE scaling that the adapter was trained with.

    Where the adapter was trained on a quantized base, that base is made again, with the adapter on it gives the
    outputs that the merged model must have, and is then dequantized: the very values that training saw. With `onto`
    "original" it gives way to the checkpoint's own values.

    Raises:
        InputError: the base cannot be loaded, is not what the adapter was trained on, cannot be scaled as the
            adapter's stage.json says, or is saved quantized, so that there are no original values.
    """
    adapter_config = json.loads((Path(lora_model) / "adapter_config.json").read_text())
    scores = adapter_config.get("task_type") == "SEQ_CLS"
    auto_class = AutoModelForSequenceClassification if scores else AutoModelForCausalLM

    def load(config: PretrainedConfig, adapter: str | None) -> PreTrainedModel:
        model = load_trained_base(
            auto_class, base_model, config, adapter, "float32", device, trust_remote_code, allow_pickle
        )
        fit_embedding(model, tokenizer)
        if scores:
            prepare_scoring(model, tokenizer)
        return (model if is_quantized(model) else model.to(device)).eval()

    try:
        config = read_config(f"--base_model {base_model}", base_model, trust_remote_code=trust_remote_code)
        config = config_of_adapter(config, lora_model)
        if scores:
            config.num_labels = 1
        _check_saved(base_model, getattr(config, "quantization_config", None), onto)
        dtype = str(config.dtype or torch.float32).removeprefix("torch.")
        model = load(config, lora_model)
        if not is_quantized(model):
            return MergeBase(model, dtype, onto=onto)
        quantization = TrainedBase.of(lora_model).quantization or quantization_of(model)
        logger.info("the adapter was trained on %s weights: %s", quantization, _WHICH[onto])
        peft_model = _with_adapter(model, lora_model)
        trained_outputs = outputs_of(peft_model, prompt_ids(tokenizer))
        model = dequantize(peft_model.unload()) if onto == "trained" else load(config, None)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"--base_model {base_model}: {error}") from error
    return MergeBase(model, dtype, quantization, trained_outputs, onto)


_WHICH = {
    "trained": "it is merged onto the values that these stand for",
    "original": "it is merged onto the weights that these were made from",
}


def _check_saved(base_model: str, saved: dict | None, onto: str) -> None:
    """Refuse a base that is saved quantized where its values cannot be had, or are not what is asked for."""
    if saved and Quantization.of_config(saved) is None:
        raise InputError(
            f"--base_model {base_model}: its weights are quantized by {saved.get('quant_method')}; give the model it "
            "was made from"
        )
    if saved and onto == "original":
        raise InputError(
            f"--merge_onto original: {base_model} is saved quantized; give the model it was made from as --base_model"
        )


def _with_adapter(model: PreTrainedModel, lora_model: str):
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, lora_model).eval()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--lora_model {lora_model}: does not fit the base model: {error}") from error


def merge(base: MergeBase, lora_model: str, tokenizer, dtype: torch.dtype) -> tuple[nn.Module, list[Tensor], dict]:
    """Add the adapter's update to the weights in float32, and compare with base + adapter.

    Args:
        dtype: what the weights will be saved in; update_lost is the rms of that cast's rounding error over the rms of
            the adapter's update, over all adapted weights.

    Returns:
        The merged model (no adapter left in it), the outputs of base + adapter, and the first half of the report:
        max_logit_difference, mean_logit_difference, top1_agreement, adapter_effect (the largest change of a logit that
        the adapter makes) and update_lost; merged_onto and quantization, as in MergeBase; and for weights that were
        not trained on base_difference, the same three figures against the base that was.

        Base + adapter are as they were trained, quantized or not, unless the adapter is merged onto original weights.

    Raises:
        InputError: the adapter does not fit the base, changes nothing, or the sum is not base + adapter.
    """
    ids = prompt_ids(tokenizer)
    base_outputs = outputs_of(base.model, ids)
    peft_model = _with_adapter(base.model, lora_model)
    adapter_outputs = outputs_of(peft_model, ids)
    effect = max((a - b).abs().max().item() for a, b in zip(adapter_outputs, base_outputs, strict=True))
    if effect == 0:
        raise InputError(f"--lora_model {lora_model}: the adapter changes nothing; was it trained at all?")
    lost = merge_layers(peft_model, dtype)
    merged = peft_model.unload()
    outputs = outputs_of(merged, ids)
    min_agreement = MIN_MERGED_AGREEMENT
    report: dict[str, Any] = {}
    if base.trained_outputs and base.onto == "original":
        report["base_difference"] = compare(outputs, base.trained_outputs)
    elif base.trained_outputs:
        adapter_outputs = base.trained_outputs
        if base.quantization and base.quantization.bits == 8:
            min_agreement = MIN_SAVED_AGREEMENT  # in use 8-bit layers round their inputs as well
    report = {
        **compare(outputs, adapter_outputs),
        "adapter_effect": effect,
        "update_lost": lost,
        "merged_onto": base.onto,
        "quantization": asdict(base.quantization) if base.quantization else None,
        **report,
    }
    if report["top1_agreement"] < min_agreement:
        raise InputError(
            f"the merge is not base + adapter: their first choices agree in {report['top1_agreement']:.1%} of the "
            f"positions, logits differ by up to {report['max_logit_difference']:.2g}"
        )
    return merged, adapter_outputs, report


@torch.no_grad()
def merge_layers(peft_model: nn.Module, dtype: torch.dtype) -> float:
    """Merge each adapted layer in place; returns rms(cast(W + U) - (W + U)) / rms(U) over all of them."""
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    def weight(layer: BaseTunerLayer) -> Tensor:
        found = layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
        return found.detach()

    rounding = update = 0.0
    for layer in (m for m in peft_model.modules() if isinstance(m, BaseTunerLayer)):
        before = weight(layer).clone()
        layer.merge(safe_merge=True)
        after = weight(layer)
        rounding += (after.to(dtype).float() - after).double().pow(2).sum().item()
        update += (after - before).double().pow(2).sum().item()
    return (rounding / update) ** 0.5 if update else 0.0


def save_merged(
    merged: nn.Module,
    tokenizer,
    output_dir: str,
    dtype: torch.dtype,
    max_shard_size: str,
    adapter_outputs: list[Tensor],
    report: dict,
    base_model: str,
    lora_model: str,
) -> dict:
    """Cast, save beside output_dir, load again, compare with base + adapter, and only then move into place.

    Returns:
        The whole report: the given one, and under "saved" the same figures of the reloaded files.

    Raises:
        InputError: the saved model's greedy choices agree with base + adapter in less than MIN_SAVED_AGREEMENT
            of the positions; nothing is left behind then.
    """
    output = Path(output_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        folder = Path(temporary) / output.name
        merged.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
        copy_remote_code(base_model, folder)
        device = next(merged.parameters()).device
        reloaded = type(merged).from_pretrained(folder, dtype=dtype).to(device).eval()
        report = {
            "base_model": base_model,
            "lora_model": lora_model,
            "dtype": str(dtype).removeprefix("torch."),
            **report,
            "saved": compare(outputs_of(reloaded, prompt_ids(tokenizer)), adapter_outputs),
        }
        if report["update_lost"] >= 1:
            raise InputError(
                f"--dtype {report['dtype']}: rounding costs more than the whole update "
                f"({report['update_lost']:.0%}); use --dtype float32"
            )
        if report["saved"]["top1_agreement"] < MIN_SAVED_AGREEMENT:
            raise InputError(
                "the merged model's first choices agree with base + adapter in "
                f"{report['saved']['top1_agreement']:.1%} of the positions only (update lost to rounding: "
                f"{report['update_lost']:.0%}); try --dtype float32"
            )
        stage = lineage.read_stage(lora_model) or {"base_model": base_model}
        known = {key: value for key, value in stage.items() if key not in ("versions", "created")}
        changed = {"adapter": False, "merged_from": lora_model, "dtype": report["dtype"], "quantization": None}
        lineage.write_stage(folder, **{**known, **changed})
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        if output.exists():
            shutil.rmtree(output)
        os.replace(folder, output)
    return report


def copy_remote_code(base_model: str, folder: Path) -> None:
    """The .py files that auto_map names travel with the weights, or the result could not be loaded.

    Raises:
        InputError: one is a link to somewhere else, whose content would end in the merged folder.
    """
    check_links(f"--base_model {base_model}", Path(base_model), "*.py")
    for source in Path(base_model).glob("*.py"):
        if not (folder / source.name).exists():
            shutil.copy2(source, folder)


def push(output_dir: str, hub_name: str, token: str | None) -> None:
    """Upload the merged folder."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(hub_name, private=True, exist_ok=True)
    api.upload_folder(folder_path=output_dir, repo_id=hub_name)


def prompt_ids(tokenizer) -> list[Tensor]:
    """The proof's prompts as (1, T) ids, T at most 64."""
    return [torch.tensor([tokenizer(text)["input_ids"][:64]]) for text in PROMPTS]


@torch.no_grad()
def outputs_of(model: nn.Module, ids: list[Tensor]) -> list[Tensor]:
    """The logits (T, V), or the scores (1, 1) of a reward model, for each prompt, on the CPU in float32."""
    device = next(model.parameters()).device
    return [model(input_ids=row.to(device), use_cache=False).logits[0].float().cpu() for row in ids]


def compare(outputs: list[Tensor], wanted: list[Tensor]) -> dict[str, float]:
    """Largest and mean |difference|, and the share of positions where the largest logit is the same one.

    Scores have one column, where "the largest" says nothing: there, agreement is of the prompts' order by score, over
    the pairs of prompts that are further apart than NEAR_TIE of the range of scores.
    """
    differences = torch.cat([(a - b).abs().flatten() for a, b in zip(outputs, wanted, strict=True)])
    if outputs[0].shape[-1] == 1:
        got, want = (torch.cat(scores).flatten() for scores in (outputs, wanted))
        apart, wanted_apart = (scores[:, None] - scores[None] for scores in (got, want))
        clear = wanted_apart > NEAR_TIE * (want.max() - want.min())
        agreement = (apart[clear] > 0).double().mean().item() if clear.any() else 1.0
    else:
        same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(outputs, wanted, strict=True)])
        agreement = same.double().mean().item()
    return {
        "max_logit_difference": differences.max().item(),
        "mean_logit_difference": differences.mean().item(),
        "top1_agreement": agreement,
    }
