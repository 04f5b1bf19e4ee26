"""Steps whose loss or gradient is not finite: their rows are named, and the run stops or goes on without them."""

import logging
import math

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor

from stagewise.data.collators import read_locations
from stagewise.errors import TrainingDiverged

logger = logging.getLogger(__name__)

# One row can spoil a step; where so many in a row are spoilt, it is not the rows.
MAX_SKIPPED_IN_A_ROW = 10
NAMED_ROWS = 16


class StepGuard:
    """Looks at every optimizer step between its gradients and its update.

    Args:
        on_nan: "stop" raises TrainingDiverged; "skip" leaves the weights and the optimizer as they were.
        max_loss: a mean loss above it is as bad as one that is not a number; None: any finite one is good.
        gradients_may_overflow: float16 with a loss scale: a step whose gradients overflow is how the scale is found.
    """

    def __init__(self, on_nan: str, max_loss: float | None, gradients_may_overflow: bool):
        self.on_nan, self.max_loss, self.gradients_may_overflow = on_nan, max_loss, gradients_may_overflow
        self._taken = self._skipped = 0  # since the last count
        self._in_a_row = 0
        self._losses: list[Tensor] = []  # of the step's micro-batches on this process
        self._locations: list[Tensor | None] = []

    @property
    def in_step(self) -> bool:
        """Whether a micro-batch of the step in hand was added."""
        return bool(self._losses)

    def count(self) -> tuple[int, int]:
        """Steps taken and left out since the last count."""
        counts, self._taken, self._skipped = (self._taken, self._skipped), 0, 0
        return counts

    def add(self, loss: Tensor, locations: Tensor | None) -> None:
        """The part of a micro-batch in the step's mean loss, and where its rows came from (see WithLocations)."""
        self._losses.append(loss)
        self._locations.append(locations)

    def is_bad(self, grad_norm: Tensor | float | None, accelerator: Accelerator, step: int) -> bool:
        """Whether the step in hand must not change the weights; called on every process, with the same answer on all.

        Args:
            grad_norm: of all gradients, the same on all processes.
            step: optimizer steps before this one.

        Raises:
            TrainingDiverged: on_nan says stop, or no step has been good for long.
        """
        losses, locations = torch.stack(self._losses).float(), self._locations
        self._losses, self._locations = [], []
        loss, norm = self._figures(losses, grad_norm, accelerator)  # waits for the device, once a step
        problem = self._problem(loss, norm)
        if problem is None:
            self._in_a_row = 0
            self._taken += 1
            return False
        finite = losses.isfinite().tolist()
        suspects = [place for good, place in zip(finite, locations, strict=True) if not good]
        rows = _named(suspects, accelerator) or _named(locations, accelerator)
        message = f"step {step + 1}: {problem}; its rows: {rows or 'not known'}"
        if self.on_nan == "stop":
            raise TrainingDiverged(f"{message}. Mend or remove what is wrong in them, or pass --on_nan skip", step)
        self._in_a_row += 1
        if self._in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise TrainingDiverged(
                f"{message}. {MAX_SKIPPED_IN_A_ROW} steps in a row were left out: it is not their rows but the run; "
                "try a smaller --learning_rate",
                step + 1 - MAX_SKIPPED_IN_A_ROW,
            )
        self._skipped += 1
        logger.warning("left out: %s", message)
        return True

    def _figures(self, losses: Tensor, grad_norm: Tensor | float | None, accelerator: Accelerator) -> list[float]:
        """The mean loss over the processes and the norm, in one trip from the device."""
        total = losses.sum()
        if accelerator.num_processes > 1:
            total = accelerator.reduce(total, "mean")  # NaN and infinity stay what they are
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm, device=total.device, dtype=total.dtype)
        return torch.stack([total, norm]).tolist()

    def _problem(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm) and not self.gradients_may_overflow:
            return f"the loss is {loss:.4g}, the norm of its gradients {norm}"
        if self.max_loss is not None and loss > self.max_loss:
            return f"the loss is {loss:.4g}, above --max_loss {self.max_loss:g}"
        return None


def _named(locations: list[Tensor | None], accelerator: Accelerator) -> str:
    """The first rows of all processes, in words."""
    rows = [name for place in locations if place is not None for name in read_locations(place)]
    if accelerator.num_processes > 1:
        rows = gather_object(rows)
    more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
    return ", ".join(rows[:NAMED_ROWS]) + more
