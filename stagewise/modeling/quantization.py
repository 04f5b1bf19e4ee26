"""Frozen base models with 4-bit or 8-bit weights (bitsandbytes), for adapters to be trained on.

See QLoRA, arXiv 2305.14314. Linear layers are quantized; embeddings, head, norms and a new score head keep --dtype.
They are not cast to float32, as peft's prepare_model_for_kbit_training does: norms compute in float32 anyway,
gradients of what is frozen are not needed, and embedding and head of a vocabulary of 150,000 would take gigabytes
more. What gradient checkpointing needs (an embedding output in autograd) transformers sees to. Adapter weights are
float32.
"""

import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from stagewise.arguments import LoraArguments, ModelArguments
from stagewise.distributed import uses_fsdp
from stagewise.errors import InputError
from stagewise.modeling.model_files import require_all_weights
from stagewise.modeling.multimodal import beside_language
from stagewise.modeling.untrusted import unpickling_failed

logger = logging.getLogger(__name__)

# Unquantized parameters are named in the log from this share of the model on.
WORTH_NAMING = 0.05


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a base are stored; what stage.json says under "quantization".

    bits: 4 or 8.
    quant_type: nf4 (a saved checkpoint may have fp4) or int8.
    double_quant: the scales of the 4-bit blocks are quantized themselves.
    compute_dtype: name of the data type that 4-bit layers multiply in; None is that of the other weights.
    """

    bits: Literal[4, 8]
    quant_type: str
    double_quant: bool = False
    compute_dtype: str | None = None

    @classmethod
    def of_config(cls, found: dict | BitsAndBytesConfig | None) -> "Quantization | None":
        """What a configuration's quantization_config says; None where there is none, or another method's."""
        if found is None:
            return None
        values = found if isinstance(found, dict) else found.to_dict()
        if values.get("load_in_8bit"):
            return cls(8, "int8")
        if not values.get("load_in_4bit"):
            return None
        return cls(4, values.get("bnb_4bit_quant_type", "fp4"), bool(values.get("bnb_4bit_use_double_quant")))

    def config(self, model: PreTrainedModel) -> BitsAndBytesConfig:
        """For from_pretrained. The compute dtype is set by settle_quantized, which knows that of the other weights.

        Args:
            model: of the same architecture, on any device. Towers beside its language model are not quantized: nothing
                runs them, and a merge gives them back as they were.
        """
        beside = beside_language(model)
        skipped = [*get_keys_to_not_convert(model), *beside] if beside else None
        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            llm_int8_skip_modules=skipped,
        )

    def same_weights(self, other: "Quantization | None") -> bool:
        """Whether the same checkpoint has the same values under both."""
        return other is not None and str(self) == str(other)

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.quant_type}" + (" with double quantization" if self.double_quant else "")


def plan_quantization(
    model_args: ModelArguments, lora_args: LoraArguments, args: TrainingArguments
) -> Quantization | None:
    """What the flags ask for, or what the checkpoint is saved with; reads the configuration file alone.

    4-bit layers multiply in what the rest of the training computes in: bfloat16 under --bf16, float16 under --fp16,
    else the data type of the other weights.

    Raises:
        InputError: what is asked for cannot be had: with all weights trained, with sharded weights, without
            bitsandbytes, or for a checkpoint that is quantized in another way.
    """
    name = model_args.model_name_or_path
    saved = _saved_quantization(model_args)
    if saved and not lora_args.use_peft:
        raise InputError(
            f"--use_peft False: the weights of {name} are saved quantized and cannot be trained; train an adapter on "
            "them (--use_peft True), or start from the model it was made from"
        )
    asked = asked_for(model_args)
    quantization = Quantization.of_config(saved) or asked
    if asked and saved:
        _require_agreement(model_args, Quantization.of_config(saved), saved)
    if quantization is None:
        return None
    flag = _flag(model_args)
    source = f"--{flag}" if flag else f"--model_name_or_path {name} ({quantization})"
    _require_possible(source, lora_args, args)
    if quantization.bits == 8 and args.device.type == "cpu" and _trains_dora(lora_args):
        # peft makes 8-bit weights of 8-bit weights there when it takes their norm
        raise InputError(f"--use_dora: peft cannot do it on {quantization} weights on CPU; use 4 bits, or plain LoRA")
    compute_dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    return Quantization(quantization.bits, quantization.quant_type, quantization.double_quant, compute_dtype)


def _flag(args: ModelArguments) -> str | None:
    return next((flag for flag in ("qlora", "load_in_4bit", "load_in_8bit") if getattr(args, flag)), None)


def asked_for(args: ModelArguments) -> Quantization | None:
    """What --qlora, --load_in_4bit or --load_in_8bit ask for."""
    if args.load_in_8bit:
        return Quantization(8, "int8")
    return Quantization(4, "nf4", double_quant=args.qlora) if _flag(args) else None


def _saved_quantization(args: ModelArguments) -> dict | None:
    """quantization_config of the checkpoint's configuration file."""
    if not args.model_name_or_path:
        return None
    try:
        config, _ = PretrainedConfig.get_config_dict(
            args.model_name_or_path, revision=args.model_revision, cache_dir=args.cache_dir, token=args.hf_hub_token
        )
    except OSError:
        return None  # loading says what is wrong there
    return config.get("quantization_config")


def _require_agreement(args: ModelArguments, saved: Quantization | None, config: dict) -> None:
    """A checkpoint that is saved quantized stays what it is; --load_in_4bit is said of any that has 4 bits."""
    flag, name = _flag(args), args.model_name_or_path
    if saved is None:
        raise InputError(
            f"--{flag}: {name} is quantized already, by {config.get('quant_method')}; leave the flag out, or start "
            "from the model it was made from"
        )
    asked = asked_for(args)
    if asked and (saved.bits != asked.bits or (args.qlora and not saved.same_weights(asked))):
        raise InputError(
            f"--{flag}: asks for {asked}, and {name} is saved as {saved}; leave the flag out, or start from the model "
            "it was made from"
        )


def _require_possible(source: str, lora_args: LoraArguments, args: TrainingArguments) -> None:
    if not lora_args.use_peft:
        raise InputError(f"{source}: quantized weights cannot be trained; leave out --use_peft False")
    if is_deepspeed_zero3_enabled():
        raise InputError(f"{source}: ZeRO-3 cannot share out quantized weights; use ZeRO-2, or no quantization")
    if uses_fsdp(args):
        raise InputError(f"{source}: FSDP cannot share out quantized weights; use torchrun alone, or no quantization")
    require_bitsandbytes(source)


def _trains_dora(args: LoraArguments) -> bool:
    path = Path(args.peft_path or ".", "adapter_config.json")
    if args.peft_path and path.is_file():
        return bool(json.loads(path.read_text(encoding="utf-8")).get("use_dora"))
    return args.use_dora


def require_bitsandbytes(source: str) -> None:
    """Raises InputError where bitsandbytes is not installed; `source` is what needs it."""
    if find_spec("bitsandbytes") is None:
        raise InputError(f"{source}: needs bitsandbytes, which is not installed: pip install 'bitsandbytes>=0.50,<1'")


def loading_options(
    auto_class: Any,
    config: PretrainedConfig,
    quantization: Quantization | None,
    device_map: str | torch.device | None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """What from_pretrained needs beside its usual arguments; {} for a base that is not quantized.

    Args:
        config: of the checkpoint; one that is saved quantized is loaded as it is.
        device_map: as --device_map, or a device; None is the device of the run. Quantized weights are made where they
            are to be, the Trainer does not move them.
    """
    saved = getattr(config, "quantization_config", None)
    if quantization is None and Quantization.of_config(saved) is None:
        return {}
    if device_map is None:
        device_map = PartialState().device
    options: dict[str, Any] = {"device_map": device_map if isinstance(device_map, str) else {"": device_map}}
    if saved is None and quantization is not None:
        with torch.device("meta"):
            model = auto_class.from_config(config, trust_remote_code=trust_remote_code)
        options["quantization_config"] = quantization.config(model)
    return options


def settle_quantized(model: PreTrainedModel, compute_dtype: str | torch.dtype | None = None) -> None:
    """Called once after loading: what 4-bit layers compute in, the AVX512 trap, and a line in the log.

    Models without quantized layers are left alone.

    Args:
        compute_dtype: of the 4-bit layers; None is that of the other weights.

    Raises:
        InputError: nothing in the model could be quantized.
    """
    if not is_quantized(model):
        return
    keep_weights_unpacked(model)
    # says in every forward of every 8-bit layer that inputs become float16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if isinstance(compute_dtype, str):
        compute_dtype = getattr(torch, compute_dtype)
    for layer in quantized_layers(model):
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype = compute_dtype or model.dtype
            layer.compute_type_is_set = True
            # what backward and dequantize() make of the weights: the values that forward multiplies with
            layer.weight.quant_state.dtype = layer.compute_dtype
    _log_layers(model)


def keep_weights_unpacked(model: PreTrainedModel) -> None:
    """Part of settle_quantized; models without 4-bit layers are left alone.

    On CPUs with AVX512-BF16 a Linear4bit of bitsandbytes repacks its weights at the first forward pass in eval mode,
    and every backward pass, merge or dequantization after that is silently wrong. The flag prevents the repacking.
    """
    if not getattr(model, "is_loaded_in_4bit", False):
        return
    for layer in quantized_layers(model):
        layer.support_avx512bf16_for_cpu = False


def is_quantized(model: nn.Module) -> bool:
    """Whether bitsandbytes holds (some of) the weights."""
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)


def quantized_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers with 4-bit or 8-bit weights, of a model that has some."""
    import bitsandbytes

    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return [module for module in model.modules() if isinstance(module, kinds)]


def quantized_inside(module: nn.Module) -> bool:
    """Whether some of the module's own or inner weights are quantized."""
    return any(type(parameter).__module__.startswith("bitsandbytes") for parameter in module.parameters())


def quantization_of(model: PreTrainedModel) -> Quantization | None:
    """What the model really has, adapters on it or not."""
    if not is_quantized(model):
        return None
    found = Quantization.of_config(model.config.quantization_config)
    layer = quantized_layers(model)[0]
    if found is None or not hasattr(layer, "compute_dtype"):
        return found
    compute_dtype = str(layer.compute_dtype).removeprefix("torch.")
    return Quantization(found.bits, found.quant_type, found.double_quant, compute_dtype)


def stage_entry(model: PreTrainedModel) -> dict | None:
    """quantization_of as stage.json has it."""
    found = quantization_of(model)
    return asdict(found) if found else None


@dataclass(frozen=True)
class TrainedBase:
    """The base that an adapter was trained on, as its stage.json tells.

    known: the adapter has a stage.json that tells.
    quantization: None for weights that were not quantized.
    dtype: in which the weights were loaded, before they were quantized.
    """

    known: bool = False
    quantization: Quantization | None = None
    dtype: str = "auto"

    @classmethod
    def of(cls, adapter: str | None) -> "TrainedBase":
        path = Path(adapter or ".", "stage.json")
        if adapter is None or not path.is_file():
            return cls()
        stage = json.loads(path.read_text(encoding="utf-8"))
        if "quantization" not in stage:
            return cls()
        entry = stage["quantization"]
        return cls(True, Quantization(**entry) if entry else None, stage.get("dtype") or "auto")

    def differs_from(self, found: Quantization | None) -> bool:
        """Whether a base with weights like `found` is another one than the adapter was trained on."""
        return self.known and str(found) != str(self.quantization)

    def __str__(self) -> str:
        return f"{self.quantization} weights" if self.quantization else "weights that were not quantized"


def trained_quantization(name: str, saved_config: Any, adapter: str | None) -> Quantization | None:
    """How the base of an adapter was quantized in training: by the run, or as it is saved.

    Raises:
        InputError: the base is saved quantized in another way than it was trained on, or bitsandbytes is missing.
    """
    trained, saved = TrainedBase.of(adapter), Quantization.of_config(saved_config)
    if saved and trained.differs_from(saved):
        raise InputError(f"{name}: is saved as {saved}, and {adapter} was trained on {trained}; give the base of that")
    quantization = saved or trained.quantization
    if quantization is not None:
        require_bitsandbytes(f"{name} ({quantization})")
    return quantization


def load_trained_base(
    auto_class,
    name: str,
    config: PretrainedConfig,
    adapter: str | None,
    dtype: str,
    device: torch.device,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> PreTrainedModel:
    """The base of an adapter with the values it had in training; without an adapter simply the model.

    A base that was quantized in training is loaded as it was then and quantized in the same way.

    Args:
        config: of the checkpoint, with what the adapter changes in it.
        dtype: of what is not quantized, and what 4-bit layers compute in; "auto" is as in training.

    Raises:
        InputError: the base is saved quantized in another way than it was trained on, or bitsandbytes is missing.
    """
    trained = TrainedBase.of(adapter)
    quantization = trained_quantization(name, getattr(config, "quantization_config", None), adapter)
    options: dict[str, Any] = {"dtype": dtype}
    if quantization is not None:
        options = {
            "dtype": trained.dtype,
            **loading_options(auto_class, config, quantization, device, trust_remote_code),
        }
    try:
        model, found = auto_class.from_pretrained(
            name,
            config=config,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            **options,
        )
    except UnpicklingError as error:
        raise unpickling_failed(name, error) from error
    scores = type(model).__name__.endswith("ForSequenceClassification")
    require_all_weights(name, model, found, draws_head=scores and adapter is not None)
    if quantization is None:
        return model
    if dtype != "auto":
        cast_unquantized(model, getattr(torch, dtype))
    compute_dtype = trained.quantization.compute_dtype if trained.quantization else None
    settle_quantized(model, compute_dtype if dtype == "auto" else dtype)
    return model


def cast_unquantized(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast all that is not quantized; from_pretrained and .to() cast either everything or nothing."""
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _log_layers(model: PreTrainedModel) -> None:
    layers = quantized_layers(model)
    if not layers:
        raise InputError(f"{type(model).__name__}: has no linear layer that bitsandbytes could quantize")
    quantized = sum(layer.in_features * layer.out_features for layer in layers)
    inside = {id(layer.weight) for layer in layers}
    others: Counter[str] = Counter()
    fused = set()
    for name, parameter in model.named_parameters():
        if id(parameter) in inside:
            continue
        kind = ".".join(part for part in name.split(".")[-3:] if not part.isdigit())
        others[kind] += parameter.numel()
        if parameter.dim() > 2:
            fused.add(kind)
    total = quantized + sum(others.values())
    named = [f"{kind} {count / total:.0%}" for kind, count in others.most_common() if count / total >= WORTH_NAMING]
    logger.info(
        "%s: %d linear layers with %.0f%% of the parameters; in %s stay %s",
        quantization_of(model), len(layers), 100 * quantized / total, str(model.dtype).removeprefix("torch."),
        ", ".join(named) or "the rest",
    )  # fmt: skip
    if fused:
        logger.warning(
            "%s: several layers in one parameter, which bitsandbytes does not quantize (it takes linear layers)",
            ", ".join(sorted(fused)),
        )


class QuantizedTwin:
    """A model's quantized layers without their weights: says what bitsandbytes makes of a weight, one at a time.

    Args:
        model: on the meta device; its linear layers are replaced.
        saved: quantization_config of a checkpoint that is saved quantized; None where `quantization` is of training.
    """

    def __init__(self, model: PreTrainedModel, quantization: Quantization, saved: dict | None = None):
        from transformers.quantizers import AutoHfQuantizer

        self.model, self.bits, self.is_stored = model, quantization.bits, saved is not None
        config = BitsAndBytesConfig.from_dict(saved) if saved else quantization.config(model)
        self._quantizer = AutoHfQuantizer.from_config(config, pre_quantized=self.is_stored)
        self._quantizer.preprocess_model(model=model, device_map={"": "cpu"}, dtype=torch.float32)
        model.eval()  # in training, on the CPU, 8-bit layers do not round their inputs
        self._paths = {name for name, module in model.named_modules() if module in set(quantized_layers(model))}
        if not self._paths:
            raise InputError(f"{type(model).__name__}: has no linear layer that bitsandbytes could quantize")
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # as in settle_quantized

    def quantizes(self, name: str) -> bool:
        """Whether a parameter is the weight of a quantized layer."""
        path, _, kind = name.rpartition(".")
        return kind == "weight" and path in self._paths

    def packed_weight(self, key: str) -> str | None:
        """The weight that a tensor of a file unpacks (its scales and the like); None where it is none of those."""
        if not self.is_stored:
            return None
        for ending in self._quantizer.serialized_names["weight"]:
            if ending != "weight" and key.endswith(f".{ending}"):
                return f"{key.removesuffix(f'.{ending}')}.weight"
        return None

    def round(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The values in float32 that the quantized weight stands for; the layer's own are set for layer()."""
        made = self._quantizer.get_quantize_ops().convert({name: value}, model=self.model, full_layer_name=name)
        return self._dequantized(name, made[name])

    def unpack(self, name: str, tensors: dict[str, torch.Tensor], weight: str) -> torch.Tensor:
        """As round, from the tensors that a quantized layer was saved as."""
        stem = weight.removesuffix("weight")
        read = {key.removeprefix(stem): [tensor] for key, tensor in tensors.items()}
        operation = self._quantizer.get_load_operations()["deserialize"](self._quantizer)
        made = operation.convert(read, model=self.model, full_layer_name=name)
        return self._dequantized(name, made["weight"])

    def _dequantized(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        layer = self.model.get_submodule(name.rpartition(".")[0])
        if self.bits == 4:
            weight.quant_state.dtype = torch.float32
            value = dequantize_bnb_weight(weight)
        else:
            layer.weight, layer.state.SCB = weight, None
            value = dequantize_bnb_weight(layer.weight, layer.state).float()
        return value.T.contiguous() if issubclass(layer.source_cls, Conv1D) else value

    def layer(self, path: str) -> nn.Module | None:
        """The 8-bit layer, whose inputs are rounded too, with the weight that it was given last; None for others."""
        return self.model.get_submodule(path) if self.bits == 8 and path in self._paths else None

    def forget(self, path: str) -> None:
        """Let go of the weight that a layer was given."""
        layer = self.layer(path)
        if layer is not None:
            layer.weight, layer.state.SCB = layer.weight.to("meta"), None
