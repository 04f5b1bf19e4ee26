"""What a model draws at random in training by itself: stages that compare its probabilities with earlier ones do
without."""

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

# Numbers that modules keep for functional dropout, for layers that are left out, and for noise on what routers read:
# OPT's dropout, BLOOM's hidden_dropout, OPT's layerdrop, Mixtral's jitter_noise, ...
_CHANCES = ("drop", "jitter")


def turn_randomness_off(model: nn.Module) -> None:
    """From now on a forward pass in training gives what one in evaluation gives.

    The modules stay in training mode, because gradient checkpointing and some attention kernels go by it. Routers do
    not: some of them sample in training (Phi-MoE). An adapter's dropout is a module like any other, so that one that
    is put on afterwards keeps its own. The configuration is left alone, as it is saved with the model.
    """
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for attribute, value in vars(module).items():
            if isinstance(value, float) and any(part in attribute for part in _CHANCES):
                setattr(module, attribute, 0.0)
        if "router" in name.rpartition(".")[-1].lower() or "router" in type(module).__name__.lower():
            _always_evaluates(module)


def _always_evaluates(module: nn.Module) -> None:
    module.eval()
    module.train = lambda mode=True: module  # type: ignore[method-assign, assignment]
