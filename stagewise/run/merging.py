"""Merge an adapter into its base, measured: what the sum changes, what rounding costs, what a reload gives."""

import contextlib
import copy
import json
import logging
import math
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from stagewise.checkpoint_files import move_into
from stagewise.errors import InputError, SaveFailed, first_line
from stagewise.modeling.base_tensors import BaseTensors
from stagewise.modeling.generation import GENERATION_CONFIG
from stagewise.modeling.loading import is_reward_model, prepare_scoring
from stagewise.modeling.model_check import check_fits
from stagewise.modeling.model_files import copy_companions, local_path, read_json
from stagewise.modeling.model_shape import empty_model, saved_adapter
from stagewise.modeling.multimodal import adapted_config
from stagewise.modeling.quantization import Quantization, QuantizedTwin, TrainedBase, trained_quantization
from stagewise.modeling.rope_scaling import config_of_adapter
from stagewise.modeling.streamed_merge import (
    ADAPTER,
    BASE,
    SAVED,
    SUM,
    TRAINED,
    StreamedMerge,
    parts_of,
    read_adapter,
)
from stagewise.modeling.tensor_files import Layout, Writer, open_checkpoint, split_layout
from stagewise.modeling.untrusted import read_config, unpickling_failed
from stagewise.modeling.weight_check import check_packed_sizes
from stagewise.run import lineage
from stagewise.run.own_files import LIST, add_to_list, check_replaceable, clear
from stagewise.run.preflight import check_apart

logger = logging.getLogger(__name__)

REPORT = "merge_report.json"
# Share of the positions of the proof where both first choices must be the same token: for the sum in float32, where a
# difference means a wrong merge, and for the saved weights, whose cast may turn a near tie.
MIN_MERGED_AGREEMENT = 0.99
MIN_SAVED_AGREEMENT = 0.9
# Scores of two prompts that are this close, as a share of the range of all, may change places when they are rounded.
NEAR_TIE = 0.05
# The proof is on so many rows of so few tokens, which is what a block multiplies with. No model has as many heads as
# the variants make rows (23, 34 or 45, see StreamedMerge), so that inputs of a block with something for each row are
# told from others.
PROOF_ROWS, PROOF_TOKENS = 11, 4
# Files of weights are not larger, where a quantized base becomes a plain one.
DEFAULT_SHARD = "5GB"
# Short texts of several kinds; what they say does not matter, both models get the same ids.
PROMPTS = (
    "The heart pumps blood through the body.",
    "Question: what should I do about a small burn?\nAnswer:",
    "人体最大的器官是皮肤。",
    "问：发烧时应该注意什么？\n答：",
    "def add(a, b):\n    return a + b\n",
    "1, 2, 3, 4, 5, 6, 7, 8",
)


def check_paths(args: Namespace) -> None:
    """Raise InputError for what cannot end well, before anything is loaded."""
    adapter, output = Path(args.lora_model), Path(args.output_dir)
    if not (adapter / "adapter_config.json").is_file():
        if (adapter / "config.json").is_file():
            raise InputError(f"--lora_model {adapter}: holds a full model, not an adapter; there is nothing to merge")
        raise InputError(f"--lora_model {adapter}: no adapter_config.json there")
    if args.base_model.startswith((".", "/", "~")) and not Path(args.base_model).expanduser().exists():
        raise InputError(f"--base_model {args.base_model}: no such folder")
    read = {"--base_model": args.base_model, "--lora_model": args.lora_model, "--tokenizer_path": args.tokenizer_path}
    check_apart(args.output_dir, read, {})
    if output.is_dir() and any(output.iterdir()) and not args.overwrite:
        raise InputError(f"--output_dir {output}: not empty; choose another folder or pass --overwrite")
    check_replaceable("--overwrite", output)


def choose_device(name: str) -> torch.device:
    """`auto` is the accelerator where there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def named_device(name: str) -> torch.device:
    """What a merge is computed on; `auto` is the CPU, where it is as fast as the disk."""
    return torch.device("cpu" if name == "auto" else name)


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
class Merge:
    """An adapter on its base, read so far that what fits is known, and no weights of the base.

    config: of the merged model, but for what the sum will change in it.
    quantization: of the base that the adapter was trained on; None where that was not quantized.
    onto: "trained" (the values that training saw) or "original" (those that were quantized).
    """

    stream: StreamedMerge
    config: PretrainedConfig
    folder: Path
    scores: bool
    quantization: Quantization | None
    onto: str


def open_merge(
    base_model: str,
    lora_model: str,
    tokenizer,
    device: torch.device,
    trust_remote_code: bool,
    onto: str = "trained",
    allow_pickle: bool = False,
    dtype: torch.dtype | None = None,
) -> Merge:
    """Put the adapter on an empty copy of the base, scaled as it was trained, and find the base's tensors.

    Where the adapter was trained on a quantized base, its weights are quantized again as they are read, and stand for
    the very values that training saw; with `onto` "original" those only show what they differ by.

    Raises:
        InputError: the base cannot be read, is not what the adapter was trained on, cannot be scaled as the
            adapter's stage.json says, or is saved quantized, so that there are no original values.
    """
    scores = is_reward_model(lora_model)
    try:
        config = read_config(f"--base_model {base_model}", base_model, trust_remote_code=trust_remote_code)
        config = config_of_adapter(config, lora_model)
        saved = getattr(config, "quantization_config", None)
        _check_saved(base_model, saved, onto)
        trained = trained_quantization(base_model, saved, lora_model)
        folder = base_folder(base_model, allow_pickle)
        checkpoint = open_checkpoint(folder)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"--base_model {base_model}: {error}") from error
    of_model = config if scores else adapted_config(config, lora_model)
    model = _empty_base(of_model, tokenizer, scores, trust_remote_code)
    twin, seen = None, None
    if trained is not None:
        logger.info("the adapter was trained on %s weights: %s", trained, _WHICH[onto])
        copy_of_it = empty_model(of_model, len(tokenizer), scores, trust_remote_code)
        twin = QuantizedTwin(copy_of_it, trained, _as_dict(saved))
        seen = TrainedBase.of(lora_model).dtype
    seen_dtype = None if seen in (None, "auto") or saved else named_dtype(seen)
    parts = parts_of(model)
    tensors = BaseTensors(model, checkpoint, twin, seen_dtype, config.dtype or torch.float32)
    check_packed_sizes(f"--base_model {base_model}", tensors)
    peft_model = saved_adapter(model, "--lora_model", lora_model)
    check_fits(f"--lora_model {lora_model}", lora_model, peft_model)
    try:
        read_adapter(peft_model, parts, lora_model)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"--lora_model {lora_model}: does not fit the base model: {error}") from error
    except KeyError as error:
        raise InputError(f"--lora_model {lora_model}: lacks {error}; copy the adapter anew") from error
    except UnpicklingError as error:
        raise unpickling_failed(f"--lora_model {lora_model}", error) from error
    peft_model.eval()
    stream = StreamedMerge(model, parts, tensors, device, onto == "trained", dtype)
    return Merge(stream, _merged_config(config, model, stream, scores), folder, scores, trained, onto)


def base_folder(base_model: str, allow_pickle: bool = False) -> Path:
    """Where the base's files are; those of a name on the hub are fetched."""
    path = local_path("--base_model", base_model)
    if path is not None:
        return path
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.py", "*.jinja", "LICENSE*", "NOTICE*"] + (
        ["*.bin"] if allow_pickle else []
    )
    return Path(snapshot_download(base_model, allow_patterns=patterns, ignore_patterns=["*/*"]))


def _as_dict(saved: Any) -> dict | None:
    return saved if saved is None or isinstance(saved, dict) else saved.to_dict()


def _empty_base(config: PretrainedConfig, tokenizer, scores: bool, trust_remote_code: bool) -> PreTrainedModel:
    """The model without weights, but with the tensors that it makes itself, such as rotary frequencies."""
    from accelerate import init_empty_weights

    rows = config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        logger.info("embedding: %d rows grow to %d for the vocabulary", rows, len(tokenizer))
    with init_empty_weights(include_buffers=False):
        model = empty_model(config, len(tokenizer), scores, trust_remote_code, on_meta=False)
    model.tie_weights()
    if scores:
        prepare_scoring(model, tokenizer)
    return model.eval()


def _merged_config(config: PretrainedConfig, model: PreTrainedModel, stream: StreamedMerge, scores: bool):
    """The base's configuration, with what the merge has changed."""
    config = copy.deepcopy(config)
    text, made = config.get_text_config(), model.config.get_text_config()
    text.vocab_size = made.vocab_size
    if stream.untied:
        config.tie_word_embeddings = text.tie_word_embeddings = False
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = stream.dtype or stream.tensors.main_dtype()
    if scores:
        config.num_labels = 1
        config.architectures = [type(model).__name__]
        text.pad_token_id = config.pad_token_id = made.pad_token_id
    elif not config.architectures:
        config.architectures = [type(model).__name__]
    return config


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


def merge(
    found: Merge, tokenizer, output_dir: str, base_model: str, lora_model: str, max_shard_size: str | None = None
) -> dict:
    """Add the adapter's update to the weights in float32, cast, and write beside output_dir; compare; move into place.

    Args:
        max_shard_size: such as "5GB"; None leaves the weights in the files that they had in the base.

    Returns:
        The report: proof ("logits", or "weights" for a model that does not let itself be run block by block),
        max_logit_difference, mean_logit_difference and top1_agreement of the sum against base + adapter;
        adapter_effect (the largest change of a logit of the first row that the adapter makes); update_lost, the rms of
        the cast's rounding error over the rms of the adapter's update, over the adapted weights; merged_onto and
        quantization, as in Merge; and for weights that were not trained on base_difference, the same three figures
        against the base that was; under "saved" those of the files. With a proof on weights alone, what is
        of logits is not there.

        Base + adapter are as they were trained, quantized or not, unless the adapter is merged onto original weights.

    Raises:
        InputError: the adapter does not fit the base, changes nothing, the sum is not base + adapter, or the saved
            model's greedy choices agree with base + adapter in less than MIN_SAVED_AGREEMENT of the positions;
            nothing is left behind then.
    """
    stream, output = found.stream, Path(output_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        folder = Path(temporary) / output.name
        folder.mkdir()
        writer = Writer(folder, _files(found, max_shard_size))
        with _disk_errors(output):
            try:
                outputs = stream.run(proof_rows(tokenizer), writer)
            finally:
                writer.close()
        report = {
            "base_model": base_model,
            "lora_model": lora_model,
            "dtype": str(found.config.dtype).removeprefix("torch."),
            "proof": "logits" if outputs else "weights",
            **_figures(found, outputs),
            "update_lost": (stream.rounding / stream.update) ** 0.5 if stream.update else 0.0,
            "merged_onto": found.onto,
            "quantization": asdict(found.quantization) if found.quantization else None,
        }
        _judge(report, found, lora_model)
        with _disk_errors(output):
            _save_settings(found, tokenizer, Path(lora_model), folder)
            stage = lineage.read_stage(lora_model) or {"base_model": base_model}
            known = {key: value for key, value in stage.items() if key not in ("versions", "created")}
            changed = {"adapter": False, "merged_from": lora_model, "dtype": report["dtype"], "quantization": None}
            lineage.write_stage(folder, **{**known, **changed})
            (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        add_to_list(folder, [LIST, *(path.name for path in folder.iterdir())])
        clear(output)
        if any(output.glob("*")):
            move_into(folder, output)
        else:
            os.replace(folder, output)
    return report


@contextlib.contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    """What a full or broken disk raises becomes SaveFailed; tokenizers hide its kind in a text."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and "(os error" not in str(error):
            raise
        free = shutil.disk_usage(output.parent).free
        raise SaveFailed(
            f"--output_dir {output}: {first_line(error)} ({free / 2**20:,.1f} MiB are free); nothing was written"
        ) from error


def _files(found: Merge, max_shard_size: str | None) -> list[Layout]:
    stream = found.stream
    # a head over the vocabulary is nothing to a reward model
    dropped = stream.tensors.unknown if found.scores else []
    if dropped:
        logger.info("not in the reward model: %s", ", ".join(dropped[:6]))
    files = stream.layout(keeps_unknown=not dropped)
    if max_shard_size is None and (stream.twin is None or not stream.twin.is_stored):
        return files
    merged = {name: entry for layout in files for name, entry in layout.items()}
    return split_layout(merged, size_in_bytes(max_shard_size or DEFAULT_SHARD))


def size_in_bytes(text: str) -> int:
    """ "5GB" -> 5,000,000,000"""
    number, unit = float(text[:-2]), text[-2:].upper()
    return int(number * 1000 ** ("KB", "MB", "GB", "TB").index(unit) * 1000)


def _figures(found: Merge, outputs: dict[str, Tensor]) -> dict[str, Any]:
    """What the logits say; {} without them."""
    if not outputs:
        return {}
    wanted, report = outputs[ADAPTER], {}
    if TRAINED in outputs and found.onto == "original":
        report["base_difference"] = compare(outputs[SUM], outputs[TRAINED])
    elif TRAINED in outputs:
        wanted = outputs[TRAINED]
    return {
        **compare(outputs[SUM], wanted),
        "adapter_effect": (outputs[ADAPTER][: len(outputs[BASE])] - outputs[BASE]).abs().max().item(),
        **report,
        "saved": compare(outputs[SAVED], wanted),
    }


def _judge(report: dict, found: Merge, lora_model: str) -> None:
    """Raises InputError where the merged model is not base + adapter."""
    if not found.stream.changed:
        raise InputError(f"--lora_model {lora_model}: the adapter changes nothing; was it trained at all?")
    if not all(math.isfinite(each.get("max_logit_difference", 0.0)) for each in (report, report.get("saved", {}))):
        raise InputError(
            f"--dtype {report['dtype']}: logits of the merged model are not finite; is the adapter broken, or are its "
            "weights too large for the data type?"
        )
    # in use 8-bit layers round their inputs as well
    rounds = found.onto == "trained" and found.quantization is not None and found.quantization.bits == 8
    wanted = MIN_SAVED_AGREEMENT if rounds else MIN_MERGED_AGREEMENT
    if report.get("top1_agreement", 1.0) < wanted:
        raise InputError(
            f"the merge is not base + adapter: their first choices agree in {report['top1_agreement']:.1%} of the "
            f"positions, logits differ by up to {report['max_logit_difference']:.2g}"
        )
    if report["update_lost"] >= 1:
        raise InputError(
            f"--dtype {report['dtype']}: rounding costs more than the whole update "
            f"({report['update_lost']:.0%}); use --dtype float32"
        )
    if "saved" in report and report["saved"]["top1_agreement"] < MIN_SAVED_AGREEMENT:
        raise InputError(
            "the merged model's first choices agree with base + adapter in "
            f"{report['saved']['top1_agreement']:.1%} of the positions only (update lost to rounding: "
            f"{report['update_lost']:.0%}); try --dtype float32"
        )


def _save_settings(found: Merge, tokenizer, adapter: Path, folder: Path) -> None:
    """Everything beside the weights that the base has and a model needs; answers end where the adapter learnt to."""
    if not found.scores:
        _settle_end(found, tokenizer, adapter, folder / GENERATION_CONFIG)
    found.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    copy_companions("--base_model", str(found.folder), folder)


def _settle_end(found: Merge, tokenizer, adapter: Path, target: Path) -> None:
    """generation_config.json as the base has it, and where answers end as the adapter's says."""
    own, trained = found.folder / GENERATION_CONFIG, adapter / GENERATION_CONFIG
    if own.is_file():
        settings = read_json("--base_model", own)
    else:
        generation = getattr(found.stream.model, "generation_config", None)
        settings = json.loads(generation.to_json_string()) if generation is not None else {}
    ends = read_json("--lora_model", trained).get("eos_token_id") if trained.is_file() else None
    config = found.config.get_text_config()
    if ends is not None and tokenizer.eos_token_id is not None and not isinstance(config.eos_token_id, list):
        config.eos_token_id = tokenizer.eos_token_id  # as the Trainer has it when all weights are trained
    if own.is_file() and ends in (None, settings.get("eos_token_id")):
        shutil.copy2(own, target)
        return
    settings |= {} if ends is None else {"eos_token_id": ends}
    target.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def push(output_dir: str, hub_name: str, token: str | None) -> None:
    """Upload the merged folder."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(hub_name, private=True, exist_ok=True)
    api.upload_folder(folder_path=output_dir, repo_id=hub_name)


def proof_rows(tokenizer) -> Tensor:
    """(PROOF_ROWS, PROOF_TOKENS) ids, which are those of PROMPTS one after the other."""
    ids = [token for text in PROMPTS for token in tokenizer(text)["input_ids"]]
    wanted = PROOF_ROWS * PROOF_TOKENS
    return torch.tensor((ids * (wanted // len(ids) + 1))[:wanted]).view(PROOF_ROWS, PROOF_TOKENS)


def compare(outputs: Tensor, wanted: Tensor) -> dict[str, float]:
    """Largest and mean |difference|, and the share of positions where the largest logit is the same one.

    Both are (..., V), or (R, 1) for scores.

    Scores have one column, where "the largest" says nothing: there, agreement is of the prompts' order by score, over
    the pairs of prompts that are further apart than NEAR_TIE of the range of scores.
    """
    differences = (outputs - wanted).abs()
    if outputs.shape[-1] == 1:
        got, want = outputs.flatten(), wanted.flatten()
        apart, wanted_apart = (scores[:, None] - scores[None] for scores in (got, want))
        clear = wanted_apart > NEAR_TIE * (want.max() - want.min())
        agreement = (apart[clear] > 0).double().mean().item() if clear.any() else 1.0
    else:
        agreement = (outputs.argmax(-1) == wanted.argmax(-1)).double().mean().item()
    return {
        "max_logit_difference": differences.max().item(),
        "mean_logit_difference": differences.mean().item(),
        "top1_agreement": agreement,
    }
