"""Losses per task: masked by what is known, weighted by how sure the teacher was.

All take predictions as the student gives them and targets as `distill.data` makes them: canonical
metres with NaN unknown and +inf sky, unit normals with NaN, class indices with -1. Nothing known
gives a loss of exactly zero with zero gradient; a hole is never filled with a number. Means run
over the known pixels of the whole batch, so that an image with few of them counts little. Depth's
own are in `distill.losses_depth`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.losses_depth import (
    cross_product,
    depth_losses,
    near_steps,
    normals_of_depth,
    on_one_surface,
)
from distill.masked import (
    Map,
    Mask,
    beside,
    border_weight,
    expected_error,
    global_sum,
    label_weight,
    masked_mean,
    reliable,
)

# What each term contributes to the total.
LOSS_WEIGHTS = {
    "depth_l1": 1.0,
    "depth_robust": 0.3,
    "depth_bins": 0.2,
    "depth_mixture": 0.2,
    "depth_silog": 0.5,
    "depth_gradient": 0.5,
    "depth_affine": 1.0,
    "depth_surface": 0.1,
    "sky": 0.2,
    "normals_angle": 2.0,
    "semantic_ce": 0.5,
    "semantic_dice": 0.5,
    "instances_center": 2.0,
    "instances_offset": 5.0,
    "depth_nll": 0.1,
    "normals_nll": 0.05,
}
CREASE_DEG = 15.0  # neighbours whose labels differ by more lie on a crease: labels round them off
BACKGROUND_SHARE = 0.1  # of an offset's loss where there is no instance (its aim is 0)


def angle_rad(a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]) -> Map:
    """Angle between vectors, atan2(|a x b|, a . b): exact near 0 and 180 degrees, unlike acos.

    The gradient stays finite at equal vectors through a floor of 1e-4 rad under the root.
    """
    x, y, z = cross_product(a, b)
    sine = (x * x + y * y + z * z + 1e-8).sqrt()
    return torch.atan2(sine, (a * b).sum(1, keepdim=True))


def near_creases(target: Float[Tensor, "b 3 h w"]) -> Mask:
    """Pixels near neighbours whose labelled unit normals are more than `CREASE_DEG` apart."""
    across = (target[..., 1:] * target[..., :-1]).sum(1, keepdim=True)  # cosines
    down = (target[..., 1:, :] * target[..., :-1, :]).sum(1, keepdim=True)
    bound = math.cos(math.radians(CREASE_DEG))  # NaN is not below it
    return beside(across < bound, down < bound)


def normals_losses(
    answer: Mapping[str, Tensor],
    target: Float[Tensor, "b 3 h w"],
    label_uncertainty: Map,
    steps: Mask | None = None,
) -> dict[str, Tensor]:
    """The angular error in radians (Bae et al. 2021, "Estimating and Exploiting the Aleatoric
    Uncertainty in Surface Normal Estimation", without their distribution), and its expectation.

    The uncertainty is the mean mu of an exponential distribution of the angle to truth
    (`expected_error`): log mu + angle / mu, lowest at mu = E[angle], in degrees. ``steps``: pixels
    near a step of the depth, which count like those near a crease (`border_weight`).
    """
    known = ~torch.isnan(target).any(1, keepdim=True)
    predicted = answer["normals"]
    aim = torch.where(known, target, predicted.detach())
    angle = angle_rad(predicted, aim)
    teaches = known & reliable("normals", label_uncertainty)
    near = near_creases(target) if steps is None else near_creases(target) | steps
    weight = border_weight(label_weight("normals", label_uncertainty), near, teaches)
    losses = {"normals_angle": masked_mean(angle, teaches, weight)}
    if "normals_uncertainty" in answer:
        mu = answer["normals_uncertainty"].clamp(min=1e-3)
        degrees = expected_error("normals", torch.rad2deg(angle), label_uncertainty)
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
    teaches = known & reliable("semantic", label_uncertainty)
    share = logits.softmax(1) * teaches
    truth = torch.nn.functional.one_hot(aim, logits.shape[1]).movedim(-1, 1) * teaches
    overlap, present = global_sum((share * truth).sum((0, 2, 3))), global_sum(truth.sum((0, 2, 3)))
    dice = 1 - 2 * overlap / (global_sum(share.sum((0, 2, 3))) + present).clamp(min=1e-6)
    some = present > 0
    return {
        "semantic_ce": masked_mean(cross, teaches, weight),
        "semantic_dice": torch.where(some, dice, 0.0).sum() / some.sum().clamp(min=1),
    }


def instance_losses(
    answer: Mapping[str, Tensor], target: Float[Tensor, "b 3 h w"]
) -> dict[str, Tensor]:
    """The centre's heat by penalty-reduced focal loss, the offset by L1 in shares of the diagonal.

    Law & Deng 2018, "CornerNet", equation 1 (alpha 2, beta 4) for the heat, where Cheng et al. 2020
    ("Panoptic-DeepLab") take a square: on small pictures the peaks are few pixels and drown.
    ``target``: heat in [0, 1], offset right and down [px]; NaN unknown.
    """
    known = ~torch.isnan(target[:, :1])
    heat = torch.where(known, target[:, :1], 0.0)
    score = answer["center"].clamp(1e-4, 1 - 1e-4)
    peak = heat >= 1
    focal = torch.where(
        peak,
        -((1 - score) ** 2) * score.log(),
        -((1 - heat) ** 4) * score**2 * (1 - score).log(),
    )
    peaks = global_sum((peak & known).sum())
    aims = torch.where(known, target[:, 1:], 0.0)
    diagonal_px = float(target.shape[-2] ** 2 + target.shape[-1] ** 2) ** 0.5
    away = (answer["offset"] - aims).abs().mean(1, keepdim=True) / diagonal_px
    inside = (aims != 0).any(1, keepdim=True)
    weight = torch.where(inside, 1.0, BACKGROUND_SHARE)
    return {
        "instances_center": global_sum(torch.where(known, focal, 0.0).sum())
        / peaks.clamp(min=1)
        / 10,
        "instances_offset": masked_mean(away, known, weight),
    }


def surface_loss(answer: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The angle between the labelled normals and those of the predicted depth.

    Where the camera is known, inside one surface of the labelled metric depth: what ties depth to
    normals (Qi et al. 2018, "GeoNet", section 3.2, with central differences, not a plane fit).
    """
    tells = batch["camera_known"]  # an affine depth's ratios say nothing about surfaces
    if "depth_space" in batch:
        tells = tells & (batch["depth_space"] == 0)
    flat = on_one_surface(batch["depth"]) & tells.view(-1, 1, 1, 1)
    normals = batch["normals"]
    known = flat & ~torch.isnan(normals).any(1, keepdim=True)
    known = known & reliable("normals", batch["normals_uncertainty"])
    said = normals_of_depth(answer["depth"], batch["focal_px"], batch["centre_px"])
    aim = torch.where(known, normals, 0.0)
    angle = angle_rad(torch.where(known, said, 0.0), aim)
    weight = label_weight("normals", batch["normals_uncertainty"])
    return {"depth_surface": masked_mean(angle, known, weight)}


def all_losses(answer: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every term of every task that the student answers, and ``total``, their weighted sum.

    Args:
        answer: the student's output.
        batch: ``TASK`` and ``TASK_uncertainty`` as `distill.data` makes them, for every task of
            the answer; what a sample's label lacks is unknown in all its pixels.
    """
    terms: dict[str, Tensor] = {}
    space = batch.get("depth_space")
    steps = near_steps(batch["depth"], space) if "depth" in batch else None
    if "depth" in answer:
        terms |= depth_losses(answer, batch["depth"], batch["depth_uncertainty"], space, steps)
    if "depth" in answer and "normals" in batch and "camera_known" in batch:
        terms |= surface_loss(answer, batch)
    if "normals" in answer:
        terms |= normals_losses(answer, batch["normals"], batch["normals_uncertainty"], steps)
    if "semantic" in answer:
        terms |= semantic_losses(answer, batch["semantic"], batch["semantic_uncertainty"])
    if "center" in answer:
        terms |= instance_losses(answer, batch["instances"])
    total = torch.stack([LOSS_WEIGHTS[name] * value for name, value in terms.items()]).sum()
    return {"total": total} | terms
