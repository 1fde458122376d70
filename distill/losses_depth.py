"""Losses of depth: by what its label claims, its distribution, its edges, its surface.

Predictions and targets are in metres of the canonical camera, NaN unknown, +inf sky.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.masked import (
    Map,
    Mask,
    beside,
    border_weight,
    expected_error,
    label_weight,
    masked_mean,
    reliable,
)
from student.depth_heads import BINS, bin_centres

SILOG_LAMBDA = 0.85  # as in Bhat et al. 2021 ("AdaBins"), section 3.4
GRADIENT_SCALES = 4
ROBUST_AT = 0.1  # log error from which one more counts half as much in `robust`
SURFACE_RATIO = 1.05  # neighbours whose labelled depths differ by more lie on two surfaces
BORDER_RATIO = 1.15  # and by more than this they are a border
SKY_LOG_DEPTH = 100.0  # a step from every depth, none from sky
# What a label's depth claims; the codes of ``depth_space`` (`distill.samples`).
SPACES = ("metric", "affine depth", "affine disparity", "affine log depth", "affine sqrt depth")


def log_error(depth: Map, target: Map) -> tuple[Map, Mask]:
    """Difference of log depths, exactly 0 where the target is unknown or sky; and the mask."""
    known = torch.isfinite(target) & (target > 0)
    log_depth = depth.log()
    aim = torch.where(known, target, 1.0).log()
    return torch.where(known, log_depth - aim, 0.0), known


def robust(error: Map) -> Map:
    """log(1 + |e| / 0.1) per pixel: steep near zero, ever flatter where it is wrong already.

    Hu et al. 2019, "Revisiting Single Image Depth Estimation", section 3.3, F(x) = ln(x + alpha),
    on log depth and zero at zero. Between two surfaces that are equally likely the L1 is level, so
    that any depth between them will do; this is lowest on either surface and highest between.
    """
    return (1 + error.abs() / ROBUST_AT).log()


def silog(error: Map, known: Mask, weight: Map) -> Float[Tensor, ""]:
    """Scale-invariant log loss per image, then mean.

    Eigen et al. 2014, "Depth Map Prediction from a Single Image", equation 4, with the square root
    of Lee et al. 2019: sqrt(E e^2 - lambda (E e)^2), the means weighted, the whole times the root
    of the mean weight: an error of scale alone is discounted by sqrt(1 - lambda) whatever the
    weights, and an image that is unsure throughout counts little. Those without depth are left out.
    """
    counts = torch.where(known, weight, 0.0)
    total = counts.sum((1, 2, 3)).clamp(min=1e-6)
    mean = (counts * error).sum((1, 2, 3)) / total
    square = (counts * error**2).sum((1, 2, 3)) / total
    share = total / known.sum((1, 2, 3)).clamp(min=1)
    spread = share * (square - SILOG_LAMBDA * mean**2).clamp(min=0)
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


def in_space(depth: Map, space: Int[Tensor, " b"]) -> Map:
    """Each image's depth in the space that its label is affine in (codes of `SPACES`)."""
    code = space.view(-1, 1, 1, 1)
    out = torch.where(code == 2, 1 / depth, depth)
    out = torch.where(code == 3, depth.log(), out)
    return torch.where(code == 4, depth.sqrt(), out)


def affine_invariant(
    depth: Map, target: Map, known: Mask, weight: Map, space: Int[Tensor, " b"]
) -> Float[Tensor, ""]:
    """L1 between maps that were each freed of shift and scale: for labels known only up to both.

    Ranftl et al. 2020, "Towards Robust Monocular Depth Estimation", equations 5 and 6: t = median,
    s = mean |d - t|, per image, over the known pixels, in the label's own space. ``weight`` counts
    in the mean alone. A flat map has no scale and teaches nothing.
    """
    maps = []
    some = known.any(3).any(2).any(1)
    count = known.sum((1, 2, 3)).clamp(min=1)
    for values in (depth, torch.where(known, target, 1.0)):
        x = in_space(values, space)
        hidden = torch.where(known, x, torch.nan).flatten(1)
        middle = torch.where(some[:, None], hidden, 0.0).nanmedian(1).values.view(-1, 1, 1, 1)
        centred = torch.where(known, x - middle, 0.0)
        scale = centred.abs().sum((1, 2, 3)) / count
        some = some & (scale > 1e-6)
        maps.append(centred / scale.clamp(min=1e-6).view(-1, 1, 1, 1))
    return masked_mean((maps[0] - maps[1]).abs(), known & some.view(-1, 1, 1, 1), weight)


def bins_cross_entropy(logits: Float[Tensor, "b k h w"], target: Map, known: Mask) -> Map:
    """Cross-entropy per pixel against the two bins around the true log depth, by nearness.

    The two-hot target's expectation is the true log depth (Hafner et al. 2023, "DreamerV3",
    equation 9; bins: Fu et al. 2018, "DORN").
    """
    first, last = bin_centres()[[0, -1]].tolist()
    place = (torch.where(known, target, 1.0).log() - first) / (last - first) * (BINS - 1)
    place = place.clamp(0, BINS - 1)
    low = place.floor().clamp(max=BINS - 2)
    share = place - low
    log_p = logits.log_softmax(1)
    at = low.long()
    return -((1 - share) * log_p.gather(1, at) + share * log_p.gather(1, at + 1))


def mixture_nll(mixture: Float[Tensor, "b 6 h w"], target: Map, known: Mask) -> Map:
    """Negative log likelihood per pixel of the true log depth: -log sum_k w_k / 2b_k e^(-|l-m|/b).

    Tosi et al. 2021, "SMD-Nets", equation 4.
    """
    centre, b, log_weight = mixture.chunk(3, dim=1)
    aim = torch.where(known, target, 1.0).log()
    parts = log_weight - (2 * b).log() - (aim - centre).abs() / b
    return -parts.logsumexp(1, keepdim=True)


def cross_product(a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]) -> tuple[Map, Map, Map]:
    """The components of a x b. On a CPU ten times as fast as `torch.linalg.cross` over channels."""
    (a0, a1, a2), (b0, b1, b2) = (v.split(1, dim=1) for v in (a, b))
    return a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0


def normals_of_depth(
    depth: Map, focal_px: Float[Tensor, " b"], centre_px: Float[Tensor, "b 2"]
) -> Float[Tensor, "b 3 h w"]:
    """Unit normals (x right, y up, z to the viewer) of a depth map; NaN on its outermost pixels.

    Cross product of the central differences of the back-projected points. A factor on the depth
    changes nothing, so canonical metres will do.
    """
    h, w = depth.shape[-2:]
    u = torch.arange(w, dtype=depth.dtype, device=depth.device)
    v = torch.arange(h, dtype=depth.dtype, device=depth.device)
    x = (u - centre_px[:, :1]) / focal_px[:, None]
    y = (v - centre_px[:, 1:]) / focal_px[:, None]
    z = depth[:, 0]
    points = torch.stack([x[:, None] * z, -y[:, :, None] * z, -z], dim=1)
    right = points[..., 1:-1, 2:] - points[..., 1:-1, :-2]
    down = points[..., 2:, 1:-1] - points[..., :-2, 1:-1]
    normal = torch.cat(cross_product(down, right), dim=1)
    length = normal.square().sum(1, keepdim=True).clamp(min=1e-18).sqrt()
    return torch.nn.functional.pad(normal / length, (1, 1, 1, 1), value=torch.nan)


def on_one_surface(target: Map) -> Mask:
    """Pixels whose four neighbours are known and within `SURFACE_RATIO` of each other in depth."""
    known = torch.isfinite(target) & (target > 0)
    filled = torch.where(known, target, torch.inf)
    inner, back, on = slice(1, -1), slice(0, -2), slice(2, None)
    windows = [(inner, inner), (inner, back), (inner, on), (back, inner), (on, inner)]
    stack = torch.stack([filled[..., rows, columns] for rows, columns in windows])
    far = stack.amax(0)
    inside = torch.isfinite(far) & (far <= SURFACE_RATIO * stack.amin(0))
    return torch.nn.functional.pad(inside, (1, 1, 1, 1))


def near_steps(target: Map, space: Int[Tensor, " b"] | None = None) -> Mask:
    """Pixels near a step: neighbours whose labelled depths differ by more than `BORDER_RATIO`, or
    of which one alone is sky.

    None where nothing is known, nor in labels that are only affine: they have no ratios.
    """
    known, sky = torch.isfinite(target) & (target > 0), torch.isposinf(target)
    if space is not None:
        metric = (space == 0).view(-1, 1, 1, 1)
        known, sky = known & metric, sky & metric
    log_depth = torch.where(known, target, torch.nan).log()  # NaN is no step from anything
    log_depth = torch.where(sky, SKY_LOG_DEPTH, log_depth)
    return beside(*(log_depth.diff(dim=d).abs() > math.log(BORDER_RATIO) for d in (-1, -2)))


def depth_losses(
    answer: Mapping[str, Tensor],
    target: Map,
    label_uncertainty: Map,
    space: Int[Tensor, " b"] | None = None,
    steps: Mask | None = None,
) -> dict[str, Tensor]:
    """Depth in the canonical camera, sky, and the depth's own uncertainty.

    Metric labels: the L1 of log depth and its `robust` form (or the likelihood of the head's
    distribution) keep the magnitude, SILog the shape, gradient matching the edges. Labels that are
    only affine (``space``, a code of `SPACES` per image) teach shape alone; the metric ones are the
    anchor. Sky is a binary cross-entropy wherever the label says sky or a depth. The uncertainty
    follows the Laplace likelihood log 2b + |e| / b (Kendall & Gal 2017, equation 8) of the error
    against truth (`expected_error`), detached, so that it learns E|e| and never excuses the depth
    (Seitzer et al. 2022 describe that trap); bins and mixtures have theirs from their distribution.
    ``steps``: pixels near a step (`near_steps`), which count more (`border_weight`).
    """
    error, known = log_error(answer["depth"], target)
    if space is None:
        space = torch.zeros(len(target), dtype=torch.int64, device=target.device)
    affine = space != 0
    metric = ~affine.view(-1, 1, 1, 1)
    teaches = known & reliable("depth", label_uncertainty)
    told = ~torch.isnan(target)
    is_sky = torch.isposinf(target).to(error.dtype)
    logits = answer["sky"].to(error.dtype)
    cross = torch.nn.functional.binary_cross_entropy_with_logits(logits, is_sky, reduction="none")
    by_claim = teaches & metric
    weight = label_weight("depth", label_uncertainty)
    if steps is not None:
        weight = border_weight(weight, steps, by_claim)
    losses = {
        "depth_silog": silog(error, by_claim, weight),
        "depth_gradient": gradient_matching(error, by_claim, weight),
        "depth_affine": affine_invariant(
            *(v[affine] for v in (answer["depth"], target, teaches, weight, space))
        ),
        "sky": masked_mean(cross, told),
    }
    if "depth_bins" in answer:
        cross = bins_cross_entropy(answer["depth_bins"], target, known)
        losses["depth_bins"] = masked_mean(cross, by_claim, weight)
    elif "depth_mixture" in answer:
        nll = mixture_nll(answer["depth_mixture"], target, known)
        losses["depth_mixture"] = masked_mean(nll, by_claim, weight)
    else:
        losses["depth_l1"] = masked_mean(error.abs(), by_claim, weight)
        losses["depth_robust"] = masked_mean(robust(error), by_claim, weight)
        if "depth_uncertainty" in answer:
            b = answer["depth_uncertainty"]
            nll = (2 * b).log() + expected_error("depth", error, label_uncertainty) / b
            losses["depth_nll"] = masked_mean(nll, known & metric)
    return losses
