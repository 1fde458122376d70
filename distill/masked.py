"""Means over the known, over all processes of a lesson, weighted by how sure the teacher was and
by whether a border is near."""

from __future__ import annotations

import contextlib
import contextvars
import functools
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
BORDER_REACH_PX = 2  # so near a border pixels count
BORDER_WEIGHT = 3.0  # times as much as others


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


def expected_error(task: str, error: Map, uncertainty: Map) -> Map:
    """How far from truth an answer is to be expected that is ``error`` away from its label.

    sqrt(e^2 + u^2), detached, with the label's uncertainty u; |e| where it has none. It holds for
    a student that has learnt its labels' errors too, so that its distance from the label tells
    nothing about the label's from truth; by |e| alone it would be sure of them, and most beside
    borders (docs/results.md). u is at most `UNRELIABLE`: beyond, labels only say that they are bad.
    """
    doubt = uncertainty.nan_to_num(nan=0.0).clamp(max=UNRELIABLE[task])
    return torch.hypot(error.detach(), doubt.to(error.dtype))


def beside(across: Bool[Tensor, "b 1 h u"], down: Bool[Tensor, "b 1 v w"]) -> Mask:
    """Pixels within `BORDER_REACH_PX` of a border.

    ``across`` and ``down`` tell of it between each pixel and the next to the right (u = w - 1) and
    below (v = h - 1).
    """
    near = across.new_zeros((*across.shape[:-1], down.shape[-1]))
    near[..., 1:] |= across
    near[..., :-1] |= across
    near[..., 1:, :] |= down
    near[..., :-1, :] |= down
    reach = BORDER_REACH_PX
    for dim, pad in ((-1, (reach, reach)), (-2, (0, 0, reach, reach))):
        # by shifts of a mask: on a CPU some twenty times as fast as `max_pool2d`
        padded = torch.nn.functional.pad(near, pad)
        shifts = (padded.narrow(dim, k, near.shape[dim]) for k in range(2 * reach + 1))
        near = functools.reduce(torch.logical_or, shifts)
    return near


def border_weight(weight: Map, near: Mask, known: Mask) -> Map:
    """The weights, changed so that known pixels ``near`` a border count `BORDER_WEIGHT` times as
    much as the others.

    A student is soon righter than its label far from borders and stays behind it beside them
    (docs/results.md), where labels are least sure, so that by their uncertainty alone these pixels
    would count less than others, not more. Uncertainty ranks pixels on either side, and images:
    one that is unsure throughout counts as little as before. Averages over both sides are those of
    the whole batch, each pixel taken relative to the mean of its image.
    """
    weight = weight.float()  # a half cannot count the pixels of a batch
    image_mean = torch.where(known, weight, 0.0).sum((1, 2, 3), keepdim=True)
    image_mean = image_mean / known.sum((1, 2, 3), keepdim=True).clamp(min=1)
    relative = weight / image_mean.clamp(min=1e-6)
    sides = torch.stack([known & near, known & ~near])
    tally = [sides.float().sum((1, 2, 3, 4)), torch.where(sides, relative, 0.0).sum((1, 2, 3, 4))]
    pixels, total = global_sum(torch.stack(tally)).unbind()
    wanted = weight.new_tensor([BORDER_WEIGHT, 1.0])
    wanted = wanted * pixels.sum() / (wanted * pixels).sum().clamp(min=1)  # 1 over both sides
    factor = wanted / (total / pixels.clamp(min=1)).clamp(min=1e-6)
    return torch.where(known, weight * torch.where(near, factor[0], factor[1]), weight)
