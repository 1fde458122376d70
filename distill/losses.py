"""Losses per task: masked by what is known, weighted by how sure the teacher was.

All take predictions as the student gives them and targets as `distill.data` makes them: canonical
metres with NaN unknown and +inf sky, unit normals with NaN, class indices with -1. Nothing known
gives a loss of exactly zero with zero gradient; a hole is never filled with a number. Means run
over the known pixels of the whole batch, so that an image with few of them counts little.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Map = Float[Tensor, "b 1 h w"]
Mask = Bool[Tensor, "b 1 h w"]

# The label's uncertainty at which a pixel counts half; an unknown uncertainty counts in full.
HALF_WEIGHT = {"depth": 0.1, "normals": 20.0, "semantic": 0.5}
SILOG_LAMBDA = 0.85  # as in Bhat et al. 2021 ("AdaBins"), section 3.4
GRADIENT_SCALES = 4

# What each term contributes to the total.
LOSS_WEIGHTS = {
    "depth_l1": 1.0,
    "depth_silog": 0.5,
    "depth_gradient": 0.5,
    "sky": 0.2,
    "normals_angle": 1.0,
    "semantic_ce": 0.5,
    "semantic_dice": 0.5,
    "depth_nll": 0.1,
    "normals_nll": 0.05,
}


def masked_mean(values: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum of weight * values over the mask / its pixel count; zero where nothing is known."""
    kept = torch.where(mask, values, 0.0)
    if weight is not None:
        kept = kept * weight
    return kept.sum() / mask.sum().clamp(min=1)


def label_weight(task: str, uncertainty: Map) -> Map:
    """Weight in (0, 1] of each pixel: u0 / (u0 + u), 1 where the label has no uncertainty.

    Between the inverse scale of a Laplace likelihood (large u) and a plain mean (small u), so that
    one far too confident pixel cannot outweigh an image.
    """
    half = HALF_WEIGHT[task]
    return (half / (half + uncertainty)).nan_to_num(nan=1.0)


def log_error(depth: Map, target: Map) -> tuple[Map, Mask]:
    """Difference of log depths, exactly 0 where the target is unknown or sky; and the mask."""
    known = torch.isfinite(target) & (target > 0)
    log_depth = depth.log()
    aim = torch.where(known, target, 1.0).log()
    return torch.where(known, log_depth - aim, 0.0), known


def silog(error: Map, known: Mask) -> Float[Tensor, ""]:
    """Scale-invariant log loss per image, then mean.

    Eigen et al. 2014, "Depth Map Prediction from a Single Image", equation 4, with the square root
    of Lee et al. 2019: sqrt(mean e^2 - lambda (mean e)^2). Images without depth are left out.
    """
    count = known.sum((1, 2, 3)).clamp(min=1)
    mean = error.sum((1, 2, 3)) / count
    square = (error**2).sum((1, 2, 3)) / count
    spread = (square - SILOG_LAMBDA * mean**2).clamp(min=0)
    value = torch.where(spread > 1e-8, spread, 1e-8).sqrt()
    return masked_mean(value, known.any(3).any(2).any(1))


def gradient_matching(error: Map, known: Mask, weight: Map) -> Float[Tensor, ""]:
    """Multi-scale gradient matching of log depth: edges where the label has them, flat elsewhere.

    Li & Snavely 2018, "MegaDepth", equation 3: the mean of |dR/dx| + |dR/dy| of the error map R
    at four scales, here averaged over the scales; only neighbours that are both known count.
    """
    total = error.new_zeros(())
    scales = 0
    for k in range(GRADIENT_SCALES):
        r, m, w = (t[:, :, :: 2**k, :: 2**k] for t in (error, known, weight))
        if min(r.shape[-2:]) < 2:
            break
        both_x, both_y = m[..., 1:] & m[..., :-1], m[..., 1:, :] & m[..., :-1, :]
        dx = (r[..., 1:] - r[..., :-1]).abs()
        dy = (r[..., 1:, :] - r[..., :-1, :]).abs()
        total = total + masked_mean(dx, both_x, torch.minimum(w[..., 1:], w[..., :-1]))
        total = total + masked_mean(dy, both_y, torch.minimum(w[..., 1:, :], w[..., :-1, :]))
        scales += 1
    return total / max(scales, 1)


def depth_losses(
    answer: Mapping[str, Tensor], target: Map, label_uncertainty: Map
) -> dict[str, Tensor]:
    """Metric depth in the canonical camera, sky, and the depth's own uncertainty.

    The L1 of log depth keeps the magnitude, SILog the shape, gradient matching the edges. Sky is
    a binary cross-entropy wherever the label says sky or a depth. The uncertainty follows the
    Laplace likelihood log 2b + |e| / b (Kendall & Gal 2017, equation 8) with the error detached,
    so that it learns E|e| and never excuses the depth (Seitzer et al. 2022 describe that trap).
    """
    error, known = log_error(answer["depth"], target)
    weight = label_weight("depth", label_uncertainty)
    told = ~torch.isnan(target)
    is_sky = torch.isposinf(target).to(error.dtype)
    logits = answer["sky"].to(error.dtype)
    cross = torch.nn.functional.binary_cross_entropy_with_logits(logits, is_sky, reduction="none")
    losses = {
        "depth_l1": masked_mean(error.abs(), known, weight),
        "depth_silog": silog(error * weight.sqrt(), known),
        "depth_gradient": gradient_matching(error, known, weight),
        "sky": masked_mean(cross, told),
    }
    if "depth_uncertainty" in answer:
        b = answer["depth_uncertainty"]
        losses["depth_nll"] = masked_mean((2 * b).log() + error.detach().abs() / b, known)
    return losses


def angle_rad(a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]) -> Map:
    """Angle between vectors, atan2(|a x b|, a . b): exact near 0 and 180 degrees, unlike acos.

    The gradient stays finite at equal vectors through a floor of 1e-4 rad under the root.
    """
    cross = torch.linalg.cross(a, b, dim=1)
    sine = ((cross**2).sum(1, keepdim=True) + 1e-8).sqrt()
    return torch.atan2(sine, (a * b).sum(1, keepdim=True))


def normals_losses(
    answer: Mapping[str, Tensor], target: Float[Tensor, "b 3 h w"], label_uncertainty: Map
) -> dict[str, Tensor]:
    """The angular error in radians (Bae et al. 2021, "Estimating and Exploiting the Aleatoric
    Uncertainty in Surface Normal Estimation", without their distribution), and its expectation.

    The uncertainty is the mean mu of an exponential distribution of the angle: log mu + angle / mu,
    lowest at mu = E[angle]; in degrees, the angle detached.
    """
    known = ~torch.isnan(target).any(1, keepdim=True)
    predicted = answer["normals"]
    aim = torch.where(known, target, predicted.detach())
    angle = angle_rad(predicted, aim)
    weight = label_weight("normals", label_uncertainty)
    losses = {"normals_angle": masked_mean(angle, known, weight)}
    if "normals_uncertainty" in answer:
        mu = answer["normals_uncertainty"].clamp(min=1e-3)
        degrees = torch.rad2deg(angle.detach())
        losses["normals_nll"] = masked_mean(mu.log() + degrees / mu, known)
    return losses


def semantic_losses(
    answer: Mapping[str, Tensor], target: Int[Tensor, "b h w"], label_uncertainty: Map
) -> dict[str, Tensor]:
    """Cross-entropy, and Dice over the classes present (Milletari et al. 2016, section 3)."""
    logits = answer["semantic"].float()
    known = (target >= 0)[:, None]
    aim = target.clamp(min=0)
    cross = torch.nn.functional.cross_entropy(logits, aim, reduction="none")[:, None]
    weight = label_weight("semantic", label_uncertainty)
    share = logits.softmax(1) * known
    truth = torch.nn.functional.one_hot(aim, logits.shape[1]).movedim(-1, 1) * known
    overlap, present = (share * truth).sum((0, 2, 3)), truth.sum((0, 2, 3))
    dice = 1 - 2 * overlap / (share.sum((0, 2, 3)) + present).clamp(min=1e-6)
    return {
        "semantic_ce": masked_mean(cross, known, weight),
        "semantic_dice": masked_mean(dice, present > 0),
    }


LOSSES = {"depth": depth_losses, "normals": normals_losses, "semantic": semantic_losses}


def all_losses(answer: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every term of every task that the student answers, and ``total``, their weighted sum.

    Args:
        answer: the student's output.
        batch: ``TASK`` and ``TASK_uncertainty`` as `distill.data` makes them, for every task of
            the answer; what a sample's label lacks is unknown in all its pixels.
    """
    terms: dict[str, Tensor] = {}
    for task, loss in LOSSES.items():
        if task in answer:
            terms.update(loss(answer, batch[task], batch[f"{task}_uncertainty"]))
    total = torch.stack([LOSS_WEIGHTS[name] * value for name, value in terms.items()]).sum()
    return {"total": total} | terms
