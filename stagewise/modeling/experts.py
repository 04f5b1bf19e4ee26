"""Mixtures of experts: the loss that keeps their routers balanced, and what ZeRO-3 has to know of them."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from stagewise.errors import InputError
from stagewise.modeling.multimodal import beside_language


@dataclass(frozen=True)
class RouterLoss:
    """Load balancing of Switch Transformer (arXiv 2101.03961, equations 4 to 6), as the architecture computes it.

    With E experts, f_e the share of tokens that are sent to expert e (each to top_k of them) and p_e its mean
    probability, over all layers and real tokens, it is E * sum_e f_e p_e: top_k where all experts are used alike.

    coefficient: of the loss; function: transformers' load_balancing_loss_func of the architecture.
    """

    coefficient: float
    function: Callable[..., Tensor]
    experts: int
    top_k: int

    def __call__(self, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
        """Of (B * T, E) logits for each layer with experts, and the (B, T) mask of real tokens."""
        if attention_mask is not None and attention_mask.dim() != 2:
            attention_mask = None
        return self.function(router_logits, self.experts, self.top_k, attention_mask)


def find_router_loss(model: PreTrainedModel, coefficient: float | None) -> RouterLoss | None:
    """What the run adds to its loss.

    Args:
        coefficient: --router_aux_loss_coef; 0 adds nothing, None leaves it to the model's configuration
            (output_router_logits and router_aux_loss_coef).

    Raises:
        InputError: it is asked for, and the architecture has no such loss.
    """
    config = model.config.get_text_config()
    if coefficient is None and getattr(config, "output_router_logits", False):
        coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if not coefficient:
        return None
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    experts, top_k = getattr(model, "num_experts", None), getattr(model, "num_experts_per_tok", None)
    if function is None or experts is None or top_k is None:
        raise InputError(
            f"--router_aux_loss_coef {coefficient}: {type(model).__name__} has no load-balancing loss (it is no "
            "mixture of experts, or balances its routers in another way); leave the flag out"
        )
    return RouterLoss(coefficient, function, experts, top_k)


def every_pass_trains_all(model: nn.Module) -> bool:
    """Whether each backward pass reaches everything that is trained, as DistributedDataParallel needs to know.

    It does not where tokens are sent to some experts, or layers are left out at random (OPT's layerdrop), or where a
    model reads images as well and it is not known which part of it does (what is known is not trained).
    """
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    has_experts = any("expert" in name for name in trained)
    reads_text = model.config.get_text_config() is model.config or beside_language(model)
    return not has_experts and not getattr(model.config, "layerdrop", 0) and bool(reads_text)


def gather_experts_together(model: nn.Module) -> None:
    """Under ZeRO-3 the blocks with experts are fetched whole.

    Which experts a batch reaches is another question on each process. Parameters that are gathered one by one, by
    whoever comes to them, would leave processes waiting for each other.
    """
    blocks = {type(module) for module in model.modules() if isinstance(getattr(module, "experts", None), nn.Module)}
    if blocks:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, list(blocks))
