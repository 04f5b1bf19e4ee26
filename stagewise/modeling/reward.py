"""What scores the completions of PPO: a reward model, on the policy's base or by itself, or a function."""

import copy
import functools
import importlib
import importlib.util
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from stagewise.errors import InputError, first_line
from stagewise.modeling.actor_critic import POLICY, REWARD, ActorCritic
from stagewise.modeling.generation import load_for_inference
from stagewise.modeling.loading import is_reward_model, prepare_scoring
from stagewise.modeling.model_files import SCORE_HEADS, check_adapter_files, check_model_files
from stagewise.modeling.model_shape import adapter_base
from stagewise.modeling.quantization import TrainedBase, quantization_of
from stagewise.modeling.rope_scaling import config_of_adapter, max_positions
from stagewise.modeling.untrusted import check_named_base, read_config
from stagewise.modeling.weight_check import check_weights

logger = logging.getLogger(__name__)

NO_SHARED_BASE = (
    "--value_init reward_model: needs a reward model that is an adapter on the policy's own base; use --value_init "
    "zero"
)


@dataclass(frozen=True)
class Sample:
    """One completion, to be scored.

    prompt: the rendered prompt, control tokens and all. finished: the completion ends with a stop token.
    """

    prompt: str
    prompt_ids: list[int]
    completion_ids: list[int]
    finished: bool


Scorer = Callable[[Sequence[Sample]], list[float]]


class RewardModel:
    """Scores a sample as the RM stage scored its pairs: the whole rendered text, read at its last token.

    Args:
        model: a sequence-classification model with one label; its pad_token_id is that of its configuration.
        suffix: ids that the chat template writes behind a stop token.
        on: gives a context in which the model is the reward model, its adapter being on.
        shares_base: the weights are the policy's base and an adapter on it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        suffix: Sequence[int] = (),
        on: Callable[[], AbstractContextManager] = nullcontext,
        batch_size: int = 16,
        shares_base: bool = True,
    ):
        self.model, self.suffix, self.on, self.batch_size = model, list(suffix), on, batch_size
        self.shares_base = shares_base
        own = model.parameters() if not shares_base else ()
        self.weights_gib = sum(p.numel() * p.element_size() for p in own) / 2**30

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        rows = [s.prompt_ids + s.completion_ids + (self.suffix if s.finished else []) for s in samples]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        positions = max_positions(self.model.config)
        longest = max(map(len, rows), default=0)
        if positions and longest > positions:
            raise InputError(
                f"--reward_model_path: a prompt with its answer has {longest} tokens, and the reward model was made "
                f"for {positions} positions; lower --max_prompt_length or --max_new_tokens"
            )
        scores = [0.0] * len(rows)
        # the device: asked for with no adapter on, as an embedding that the policy alone has has none for the others
        pad, device = self.model.config.get_text_config().pad_token_id, self.device
        with self.on():
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                ids = [torch.tensor(rows[i]) for i in chosen]
                lengths = torch.tensor([len(row) for row in ids])
                batch = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad).to(device)
                mask = (torch.arange(batch.shape[1])[None] < lengths[:, None]).long().to(device)
                logits = self.model(batch, attention_mask=mask, use_cache=False).logits
                for i, score in zip(chosen, logits.squeeze(-1).float().tolist(), strict=True):
                    scores[i] = score
        return scores

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def to(self, device: torch.device) -> None:
        """Move what is the reward model's own: the score head, or all of it."""
        (score_head(self.model) if self.shares_base else self.model).to(device)


class RewardFunction:
    """A function of the user's: (prompts, completions) -> scores. Both are lists of text; special tokens are cut from
    the completions, not from the prompts.
    """

    def __init__(self, function: Callable[[list[str], list[str]], Sequence[float]], tokenizer, name: str):
        self.function, self.tokenizer, self.name = function, tokenizer, name

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        completions = self.tokenizer.batch_decode([s.completion_ids for s in samples], skip_special_tokens=True)
        try:
            scores = [float(score) for score in self.function([s.prompt for s in samples], completions)]
        except TypeError as error:
            raise InputError(f"--reward_function {self.name}: expected a list of numbers: {error}") from error
        if len(scores) != len(samples):
            raise InputError(
                f"--reward_function {self.name}: gave {len(scores)} scores for {len(samples)} completions"
            )
        for score, completion in zip(scores, completions, strict=True):
            if not math.isfinite(score):
                raise InputError(f"--reward_function {self.name}: gave {score} for the completion {completion!r}")
        return scores


def check_scorer(
    reward_model_path: str | None,
    reward_function: str | None,
    policy: str | None,
    tokenizer,
    length: int,
    value_init: str = "auto",
    allow_pickle: bool = False,
) -> None:
    """What load_scorer would refuse, found without weights.

    Args:
        policy: --model_name_or_path.
        length: tokens that a prompt with its answer may have at least.

    Raises:
        InputError: as load_scorer; the reward model has fewer positions than `length`.
    """
    if reward_function is not None:
        load_reward_function(reward_function, tokenizer)
    elif reward_model_path is not None:
        _require_reward_model(reward_model_path)
        _check_base(reward_model_path, str(policy), length, allow_pickle)
        _check_tokenizer(reward_model_path, tokenizer)
    if value_init == "reward_model" and not (reward_model_path and same_base(reward_model_path, str(policy))):
        raise InputError(NO_SHARED_BASE)


def _check_base(path: str, policy: str, length: int, allow_pickle: bool) -> None:
    is_adapter = (Path(path) / "adapter_config.json").is_file()
    base = (adapter_base(path) or "") if is_adapter else path
    if is_adapter:
        check_adapter_files("--reward_model_path", path, allow_pickle)
        if not same_base(path, policy):
            check_named_base(f"--reward_model_path {path}", base)
    check_model_files(f"--reward_model_path {path}: its base", base, allow_pickle=allow_pickle)
    try:
        config = read_config(f"--reward_model_path {path}", base)
    except (OSError, ValueError) as error:
        raise InputError(f"--reward_model_path {path}: its base: {first_line(error)}") from error
    positions = max_positions(config_of_adapter(config, path) if is_adapter else config)
    if positions and length > positions:
        raise InputError(
            f"--reward_model_path {path}: was made for {positions} positions, and a prompt with its answer may have "
            f"{length} tokens; lower --max_prompt_length or --max_new_tokens"
        )
    check_weights(f"--reward_model_path {path}: its base {base}", base, config, scores=True, draws_head=is_adapter)


def load_reward_function(spec: str, tokenizer) -> RewardFunction:
    """`module:function`, or `folder/file.py:function`.

    Raises:
        InputError: there is no such thing, or it cannot be called.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name or (place.startswith(".") and not place.endswith(".py")):
        raise InputError(f"--reward_function {spec}: expected module:function, or folder/file.py:function")
    if place.endswith(".py") and not Path(place).is_file():
        raise InputError(f"--reward_function {spec}: no such file; correct the path")
    try:
        module = _import_file(Path(place).resolve()) if place.endswith(".py") else importlib.import_module(place)
    except ImportError as error:
        raise InputError(f"--reward_function {spec}: {error}; a file is given as folder/file.py:{name}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"--reward_function {spec}: {place} has no function {name}; correct the name")
    return RewardFunction(function, tokenizer, spec)


@functools.cache  # looked for when a run starts, and used later: what the file does, it does once, as other imports
def _import_file(path: Path) -> ModuleType:
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None, path  # it ends with .py
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def load_scorer(
    reward_model_path: str | None,
    reward_function: str | None,
    actor: ActorCritic,
    tokenizer,
    suffix: Sequence[int],
    batch_size: int,
    value_init: str = "auto",
    allow_pickle: bool = False,
) -> RewardModel | RewardFunction:
    """The one of --reward_model_path and --reward_function that is given; see load_reward_model for the rest.

    Args:
        value_init: where the value model starts: "zero", "reward_model", or "auto", which is the second where the
            reward model is an adapter on the policy's base.

    Raises:
        InputError: the value model cannot start at the reward model; or as load_reward_model, load_reward_function.
    """
    if reward_function is not None:
        scorer: RewardModel | RewardFunction = load_reward_function(reward_function, tokenizer)
    else:
        scorer = load_reward_model(str(reward_model_path), actor, tokenizer, suffix, batch_size, allow_pickle)
    if isinstance(scorer, RewardModel) and scorer.shares_base and value_init != "zero":
        actor.start_value_at_reward(score_head(scorer.model))
    elif value_init == "reward_model":
        raise InputError(NO_SHARED_BASE)
    return scorer


def load_reward_model(
    path: str, actor: ActorCritic, tokenizer, suffix: Sequence[int], batch_size: int, allow_pickle: bool = False
) -> RewardModel:
    """The reward model at `path`: its adapter joins the policy's base where it was trained on it; otherwise it is a
    model of its own in memory. Either way the log says so.

    Args:
        suffix: ids that the chat template writes behind a stop token.

    Raises:
        InputError: no reward model there, or its tokenizer is not the policy's.
    """
    _require_reward_model(path)
    reward_tokenizer = _check_tokenizer(path, tokenizer)
    device = actor.value_head.weight.device
    own_path = actor.base.config.name_or_path
    if actor.shares_base and same_base(path, own_path) and _same_weights(path, actor.base):
        model = _join_base(path, actor, reward_tokenizer)
        if model is not None:
            logger.info("reward model: the adapter %s, on the policy's own base", path)
            return RewardModel(model, suffix, lambda: actor.adapters.use(REWARD), batch_size)
    model, _ = load_for_inference(path, scores=True, device=device, allow_pickle=allow_pickle)
    logger.info("reward model: %s, a model of its own in memory", path)
    model.requires_grad_(False)
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    if base.config.get_text_config().pad_token_id is None:
        prepare_scoring(base, reward_tokenizer)
    return RewardModel(base, suffix, nullcontext, batch_size, shares_base=False)


def _require_reward_model(path: str) -> None:
    if not is_reward_model(path):
        raise InputError(
            f"--reward_model_path {path}: is no reward model, it has no score head; give one that reward_modeling.py "
            "made (an adapter or merged)"
        )


def score_head(model: PreTrainedModel) -> nn.Module:
    """The layer that makes a score of a hidden state."""
    return next(getattr(model, name) for name in SCORE_HEADS if hasattr(model, name))


def _check_tokenizer(path: str, tokenizer):
    """The reward model's tokenizer; it must give the policy's ids, which the reward model reads as they are."""
    folder = path
    if not (Path(path) / "tokenizer_config.json").is_file() and (Path(path) / "adapter_config.json").is_file():
        folder = adapter_base(path) or path
    try:
        found = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"--reward_model_path {path}: its tokenizer: {first_line(error)}") from error
    if found.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"--reward_model_path {path}: its tokenizer is not the policy's ({len(found.get_vocab())} and "
            f"{len(tokenizer.get_vocab())} entries), so it would read other text than the policy writes; train the "
            "reward model from the policy's own model (run_rm.sh), or score with --reward_function"
        )
    if found.pad_token is None:
        found.pad_token = tokenizer.pad_token
    return found


def same_base(path: str, policy_path: str) -> bool:
    """Whether `path` is an adapter that was trained on the checkpoint at `policy_path`."""
    base = adapter_base(path)
    if base is None:
        return False
    return base == policy_path or (Path(base).exists() and Path(base).resolve() == Path(policy_path).resolve())


def _same_weights(path: str, policy: PreTrainedModel) -> bool:
    """Whether the adapter at `path` was trained on weights that are quantized as the policy's are."""
    trained, here = TrainedBase.of(path), quantization_of(policy)
    if trained.differs_from(here):
        logger.info("reward model: was trained on %s, the policy has %s", trained, here or "no quantization")
        return False
    return True


def _join_base(path: str, actor: ActorCritic, tokenizer) -> PreTrainedModel | None:
    """The architecture's own sequence-classification model around the policy's base, and the adapter on that base.

    None where the architecture does not allow it.
    """
    from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict

    config = copy.deepcopy(actor.base.config)
    config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    prefix = model.base_model_prefix
    ours = getattr(actor.base, prefix, None)
    head_name = next((name for name in SCORE_HEADS if isinstance(getattr(model, name, None), nn.Linear)), None)
    if ours is None or head_name is None or not isinstance(getattr(model, prefix, None), type(ours)):
        return None

    adapter = LoraConfig.from_pretrained(path)
    experts = set(adapter.target_parameters or ())
    if experts and experts != set(actor.policy.peft_config[POLICY].target_parameters or ()):
        return None  # of parameters that are not linear layers, peft wants the same set for all adapters
    beside = [name for name in adapter.modules_to_save or [] if name not in SCORE_HEADS]
    adapter.modules_to_save, adapter.task_type, adapter.inference_mode = beside or None, "CAUSAL_LM", True
    weights = load_peft_weights(path, device="cpu")
    head = f"base_model.model.{head_name}."
    head_weights = {name.removeprefix(head): weights.pop(name) for name in [*weights] if name.startswith(head)}
    actor.policy.add_adapter(REWARD, adapter)
    result = set_peft_model_state_dict(actor.policy, weights, adapter_name=REWARD)
    if result.unexpected_keys or not head_weights:
        actor.policy.delete_adapter(REWARD)
        actor.share_adapters()
        return None
    actor.share_adapters()

    setattr(model, prefix, ours)
    head_layer = getattr(model, head_name).to_empty(device="cpu")
    head_layer.load_state_dict(head_weights)
    embedding = ours.get_input_embeddings().weight
    head_layer.to(embedding.device, embedding.dtype).requires_grad_(False)
    prepare_scoring(model, tokenizer)
    head_layer.load_state_dict(head_weights)  # exactly: prepare_scoring has made it float32 again
    return model.eval()
