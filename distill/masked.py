"""Means over the known, over all processes of a lesson, weighted by how sure the teacher was."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

Map = Float[Tensor, "b 1 h w"]
Mask = Bool[Tensor, "b 1 h w"]

# The label's uncertainty at which a pixel counts half; an unknown uncertainty counts in full.
HALF_WEIGHT = {"depth": 0.1, "normals": 20.0, "semantic": 0.5}
# The label's uncertainty from which a pixel does not count at all: its value is as good as none.
UNRELIABLE = {"depth": 0.7, "normals": 60.0, "semantic": 0.9}


_ALONE = contextvars.ContextVar("alone", default=False)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within the block sums are this process's own, as in the validation of the first."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def world() -> int:
    """Number of processes that share the lesson."""
    if _ALONE.get():
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def global_sum(x: Tensor) -> Tensor:
    """The sum of ``x`` over all processes; its gradient is this process's part.

    So every process holds the loss of the whole batch, and the gradients of all processes *add up*
    to its gradient (`distill.parallel`), also where the loss is no sum over pixels.
    """
    if world() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total - x.detach() + x


def masked_mean(values: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum of weight * values over the mask / its pixel count; zero where nothing is known."""
    kept = torch.where(mask, values, 0.0)
    if weight is not None:
        kept = kept * weight
    return global_sum(kept.sum()) / global_sum(mask.sum()).clamp(min=1)


def label_weight(task: str, uncertainty: Map) -> Map:
    """Weight in (0, 1] of each pixel: u0 / (u0 + u), 1 where the label has no uncertainty.

    Between the inverse scale of a Laplace likelihood (large u) and a plain mean (small u), so that
    one far too confident pixel cannot outweigh an image.
    """
    half = HALF_WEIGHT[task]
    return (half / (half + uncertainty)).nan_to_num(nan=1.0)


def reliable(task: str, uncertainty: Map) -> Mask:
    """Where the label may teach: all but what its own uncertainty calls worthless.

    Dropping the pixels of largest loss instead (Ranftl et al. 2020, "MiDaS", equation 9: 20 %)
    drops what the student has not learnt yet, and that is the edges.
    """
    return ~(uncertainty > UNRELIABLE[task])
