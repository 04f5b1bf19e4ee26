"""Whether a model's files hold the weights that its configuration asks for: from their headers, nothing is loaded."""

import json
import logging
import re
from pathlib import Path

from transformers import PretrainedConfig

from stagewise.errors import InputError
from stagewise.modeling.base_tensors import BaseTensors
from stagewise.modeling.model_files import refuse_missing
from stagewise.modeling.model_shape import empty_model
from stagewise.modeling.packed_files import STATE
from stagewise.modeling.quantization import Quantization, QuantizedTwin
from stagewise.modeling.tensor_files import open_checkpoint

logger = logging.getLogger(__name__)


def check_weights(
    what: str,
    name: str | Path,
    config: PretrainedConfig,
    scores: bool = False,
    draws_head: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """What require_all_weights would say once the model is loaded.

    Of a name on the hub, pickled weights, quantization by another program, and code that cannot be built or that names
    its tensors in ways of its own, nothing is known before loading.

    Args:
        what: flag and folder, for messages. config: of the checkpoint.
        scores: one score for a row in place of a head over the vocabulary; draws_head: which is new, or an adapter's.

    Raises:
        InputError: weights are missing, of other sizes, or not packed where the configuration says that they are.
    """
    folder = Path(name).expanduser()
    saved = getattr(config, "quantization_config", None)
    saved = saved if saved is None or isinstance(saved, dict) else saved.to_dict()
    packed = Quantization.of_config(saved)
    if not any(folder.glob("*.safetensors")) or (saved and packed is None):
        return
    try:
        model = empty_model(config, scores=scores, trust_remote_code=trust_remote_code)
        twin = None
        if packed is not None:
            twin = QuantizedTwin(empty_model(config, None, scores, trust_remote_code), packed, saved)
        tensors = BaseTensors(model, open_checkpoint(folder), twin)
    except InputError:
        raise
    except Exception as error:  # see above
        logger.warning("%s: not checked before loading (%s: %s)", what, type(error).__name__, error)
        return
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    names = dict(model.named_parameters()).keys()
    missing = [name for name in names if not tensors.holds(name) and not any(p.search(name) for p in optional)]
    refuse_missing(what, names, missing, tensors.unknown, model.base_model_prefix if draws_head else None)
    check_packed_sizes(what, tensors)


def check_packed_sizes(what: str, tensors: BaseTensors) -> None:
    """Hold what a base is saved quantized as against its configuration: bitsandbytes itself goes by the files alone.

    Raises:
        InputError: a layer that is to be quantized is not packed, or is of another size.
    """
    twin = tensors.twin
    if twin is not None and twin.is_stored:
        for name in filter(twin.quantizes, tensors.groups):
            _check_packed(what, name, tensors, twin)


def _check_packed(what: str, name: str, tensors: BaseTensors, twin: QuantizedTwin) -> None:
    group, layer = tensors.groups[name], twin.model.get_submodule(name.rpartition(".")[0])
    wanted, problem = (layer.out_features, layer.in_features), "is not packed"
    if group.stored_quantized:
        state = next((key for key in group.keys if STATE in key), None)
        found = tensors.checkpoint.tensors[group.keys[0]].shape
        if state is not None:
            found = tuple(json.loads(bytes(tensors.checkpoint.read(state).tolist()))["shape"])
        if found == wanted:
            return
        problem = "is " + " x ".join(map(str, found))
    size = " x ".join(map(str, wanted))
    raise InputError(
        f"{what}: {name} {problem} in the files, and config.json makes it {size} in {twin.bits} bits; take "
        "configuration and weights from the same model"
    )
