"""A causal LM whose forward pass gives the loss of its labels without ever building all logits."""

import functools
import logging
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from stagewise.losses.logprobs import IGNORE_INDEX, head_cross_entropy, linear_cross_entropy
from stagewise.modeling.experts import RouterLoss
from stagewise.modeling.sequence_parallel import shards_of
from stagewise.modeling.small_copy import on_small_copy

logger = logging.getLogger(__name__)


@dataclass
class TokenLossOutput(ModelOutput):
    """What a forward pass with labels returns: of this process's part of the rows, where several share them (see
    stagewise.modeling.sequence_parallel).

    loss: scalar, sum over trained tokens of weight * cross-entropy; in training, with router_loss added where there is
        one.
    row_nll: (B,), the detached sum of the negative log-likelihoods of each row's trained tokens.
    row_tokens: (B,), how many trained tokens each row has.
    router_loss: scalar, detached, of a mixture of experts (see RouterLoss), before its coefficient.
    """

    loss: Tensor | None = None
    row_nll: Tensor | None = None
    row_tokens: Tensor | None = None
    router_loss: Tensor | None = None


def install_token_loss(model: nn.Module, label_smoothing: float = 0.0, router_loss: RouterLoss | None = None) -> bool:
    """Replace `model.forward` for calls with labels: hidden states of trained positions only, then a chunked loss.

    Positions whose next label is IGNORE_INDEX never reach the head. The replacement works for every architecture
    whose logits are `head(decoder(...))`, with soft-capping and logit scaling where the configuration names them; this
    is proven on a small copy with a few tokens. An architecture that does something else in between keeps its own
    logits (correct, but the whole matrix is in memory).

    Args:
        model: a transformers causal LM (not yet wrapped by peft).
        label_smoothing: as torch.nn.functional.cross_entropy defines it.
        router_loss: what is added in training for a mixture of experts.

    Returns:
        True if the chunked loss is in use, False if the architecture's own logits are.
    """
    original = model.forward
    transform = logit_transform(model.config)
    chunked = hidden_states_reproduce_logits(model)

    @functools.wraps(original)
    def forward(self, *args, labels: Tensor | None = None, **kwargs):
        token_weights = kwargs.pop("token_weights", None)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        shards = shards_of(self)
        if labels is None:
            return original(*args, **kwargs)
        following = _following(labels, IGNORE_INDEX)
        count = (following != IGNORE_INDEX).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        if shards is not None:
            kwargs, following = shards.cut(kwargs, following, IGNORE_INDEX)
        trained = following != IGNORE_INDEX
        targets = following[trained]
        if token_weights is None:
            weights = torch.ones_like(targets, dtype=torch.float32) / count
        else:
            weights = _following(token_weights, 0)[trained]
        routing = router_loss if self.training else None
        if routing is not None:
            kwargs["output_router_logits"] = True
        if chunked:
            outputs = _decode(self, *args, **kwargs)
            hidden = outputs.last_hidden_state[trained]
            loss, nll = _head_loss(self, hidden, targets, weights, transform, label_smoothing)
        else:
            # with a cache, which many make by themselves, transformers looks for no packed documents
            outputs = original(*args, **{"use_cache": False, **kwargs})
            logits = outputs.logits[trained]
            loss, nll = head_cross_entropy(logits, lambda z: z, targets, weights, logits.shape[-1], label_smoothing)
        balance = None
        if routing is not None:
            balance = routing(outputs.router_logits, kwargs.get("attention_mask"))
            # this batch's share of an optimizer step, as its tokens have it in the loss
            share = 1.0 if num_items_in_batch is None else targets.numel() / num_items_in_batch
            loss = loss + routing.coefficient * share * balance
            balance = balance.detach()
        rows = trained.nonzero()[:, 0]
        row_nll = nll.new_zeros(labels.shape[0]).index_add_(0, rows, nll)
        return TokenLossOutput(loss=loss, row_nll=row_nll, row_tokens=trained.sum(1), router_loss=balance)

    model.forward = types.MethodType(forward, model)
    return chunked


def _following(of_tokens: Tensor, at_end: int) -> Tensor:
    """(B, T) -> (B, T): what the next token has."""
    return F.pad(of_tokens[:, 1:], (0, 1), value=at_end)


def _head_loss(model, hidden, targets, weights, transform, label_smoothing):
    """The loss, computed inside of one call of the head.

    Engines that shard parameters (ZeRO-3, FSDP) make them whole around the call of the module that has them, which all
    processes have to come to equally often: once, whatever number of tokens each of them trains, none included.
    """
    head = model.get_output_embeddings()
    own, plain = head.forward, transform is None and _is_plain_linear(head)

    def loss(hidden: Tensor) -> tuple[Tensor, Tensor]:
        if plain:
            return linear_cross_entropy(hidden, head.weight, targets, weights, head.bias, label_smoothing)
        return head_cross_entropy(
            hidden,
            own if transform is None else lambda h: transform(own(h)),
            targets,
            weights,
            model.config.get_text_config().vocab_size,
            label_smoothing,
            [parameter for parameter in head.parameters() if parameter.requires_grad],
        )

    with forward_of(head, loss):
        return head(hidden)


@contextmanager
def forward_of(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Within it a call of the module, with its hooks, is a call of `forward`."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _is_plain_linear(head: nn.Module) -> bool:
    """Whether logits are hidden @ weight.T + bias: no adapter or quantization, no forward of somebody else's (as
    accelerate's, which fetches weights from where it keeps them)."""
    plain = type(head) is nn.Linear and head.weight.is_floating_point()
    return plain and getattr(head.forward, "__func__", None) is nn.Linear.forward


def last_hidden_state(model, *args, **kwargs) -> Tensor:
    return _decode(model, *args, **kwargs).last_hidden_state


def _decode(model, *args, **kwargs) -> ModelOutput:
    kwargs.pop("logits_to_keep", None)
    kwargs.pop("return_dict", None)
    kwargs.setdefault("use_cache", False)
    return decoder_of(model)(*args, **kwargs)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part of a causal LM that makes hidden states of ids: all but the head.

    transformers' get_decoder() is some architectures' whole model (Llama 4), or their head, which they call decoder
    (ModernBERT); the decoder is then the part that holds the embedding.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()

    def holds(part: nn.Module, wanted: nn.Module) -> bool:
        return any(module is wanted for module in part.modules())

    found = model.get_decoder()
    if found is not model and holds(found, embedding) and (head is embedding or not holds(found, head)):
        return found
    part = next((part for part in model.children() if part is not embedding and holds(part, embedding)), model)
    # a language model with its head, in one that also reads images
    return decoder_of(part) if part is not model and isinstance(part, PreTrainedModel) and holds(part, head) else part


def logit_transform(config) -> Callable[[Tensor], Tensor] | None:
    """What the architecture does to `head(hidden)` before the softmax, from the names that configurations use."""
    config = config.get_text_config()
    # of gemma2 and recurrent_gemma
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    # of cohere and falcon_h1: logits * scale
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
    divisor = getattr(config, "logits_scaling", None)  # granite: logits / scaling
    if scale is None and divisor:
        scale = 1.0 / divisor
    if not cap and (scale is None or scale == 1):
        return None

    def transform(logits: Tensor) -> Tensor:
        if scale is not None:
            logits = logits * scale
        return torch.tanh(logits / cap) * cap if cap else logits

    return transform


def hidden_states_reproduce_logits(model: PreTrainedModel) -> bool:
    """Whether the architecture's logits are head(decoder(x)), with what logit_transform finds: tried on a handful of
    tokens by a small copy, so that the model itself is not run. False where it cannot be tried.
    """
    if not hasattr(model, "get_decoder") or model.get_output_embeddings() is None:
        return False
    if "forward" in vars(model) and not hasattr(model, "_hf_hook"):
        return False  # somebody's own forward pass, which a copy would not have (accelerate's calls the class's)
    try:
        return on_small_copy(model, "eager", _reproduces_logits)
    except Exception as error:  # see on_small_copy
        logger.warning("%s: no small copy could be tried (%s: %s)", type(model).__name__, type(error).__name__, error)
        return False


@torch.no_grad()
def _reproduces_logits(model: PreTrainedModel) -> bool:
    ids = torch.arange(1, 9)[None]
    transform = logit_transform(model.config)
    logits = model(input_ids=ids, use_cache=False).logits
    mine = model.get_output_embeddings()(last_hidden_state(model, input_ids=ids))
    mine = mine if transform is None else transform(mine)
    # logits may be scaled down to anything
    return logits.shape == mine.shape and bool((logits - mine).abs().max() <= 1e-3 * logits.abs().max())
