"""Four ways to say a depth: one number, a number and a step, a distribution over bins, a mixture of
two Laplacians.

All answer ``depth`` (canonical metres), ``sky`` and ``depth_uncertainty``; the last two also say
the distribution that they were taught by. An L1 regressor learns the median, which between two
surfaces is neither; with a step beside it it gets from one to the other within fewer pixels, and
the distributions can name both surfaces and pick one (docs/results.md compares them at equal cost).

Depth is in metres of the canonical camera: D_canonical = D f_c / f (Yin et al. 2023, "Metric3D",
section 3.1), ``exp`` of a number clamped only where float16 would overflow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from student.heads import Image, SubPixel

LOG_DEPTH_RANGE = (-7.0, 11.0)  # 0.9 mm to 60 km: finite in float16 as well
LOG_SCALE_RANGE = (-6.0, 3.0)  # Laplace scale of log depth between 0.0025 and 20
START_DEPTH_M = 3.0  # what an untrained depth head says
START_SCALE = 0.2  # and its Laplace scale of log depth
BINS = 32
BIN_RANGE_M = (0.15, 150.0)  # first and last bin centre, canonical metres
BIN_STEP = math.log(BIN_RANGE_M[1] / BIN_RANGE_M[0]) / (BINS - 1)  # between neighbours, log depth


def bin_centres() -> Tensor:
    """Log depths of the bin centres, evenly spaced: [BINS]."""
    return torch.linspace(math.log(BIN_RANGE_M[0]), math.log(BIN_RANGE_M[1]), BINS)


def _answer(log_depth: Image, sky: Image) -> dict[str, Image]:
    return {"depth": log_depth.clamp(*LOG_DEPTH_RANGE).exp(), "sky": sky}


def _scale(log_scale: Image) -> Image:
    return log_scale.clamp(*LOG_SCALE_RANGE).exp()


class LogDepthHead(nn.Module):
    """One unbounded log depth, sky, and the Laplace scale of log depth."""

    def __init__(self, inputs: int, *, stride: int, uncertainty: bool) -> None:
        """``inputs``: decoder channels."""
        super().__init__()
        start = [math.log(START_DEPTH_M), -3.0, math.log(START_SCALE)]
        self.uncertainty = uncertainty
        outputs = 2 + uncertainty
        self.maps = SubPixel(inputs, outputs, stride=stride, start=start[:outputs])

    def forward(self, x: Image) -> dict[str, Image]:
        """``depth`` [B,1,H,W] canonical m, ``sky`` logits, ``depth_uncertainty`` Laplace b."""
        maps = self.maps(x).float()
        return self.said(maps[:, 0:1], maps)

    def said(self, log_depth: Image, maps: Image) -> dict[str, Image]:
        """``maps``: of which the second is the sky's logit, the third the log of the scale."""
        answer = _answer(log_depth, maps[:, 1:2])
        if self.uncertainty:
            answer["depth_uncertainty"] = _scale(maps[:, 2:3])
        return answer


class StepDepthHead(LogDepthHead):
    """One log depth and, added to it, a step: its half height times tanh of the side.

    Our own. A linear map of features that vary smoothly passes through every depth between two
    surfaces; the tanh passes through them quickly, and height and place of a step are learnt apart
    from each other. It begins without steps, so that a lesson may begin with the weights of a
    `LogDepthHead` (``init=``).
    """

    def __init__(self, inputs: int, *, stride: int, uncertainty: bool) -> None:
        """``inputs``: decoder channels."""
        super().__init__(inputs, stride=stride, uncertainty=uncertainty)
        self.step = nn.Conv2d(inputs, 2 * stride**2, 1)
        with torch.no_grad():
            for values in (self.step.weight, self.step.bias):
                values[: stride**2] = 0  # type: ignore[index]

    def forward(self, x: Image) -> dict[str, Image]:
        """As `LogDepthHead`."""
        hidden = self.maps.hidden(x)
        maps = torch.cat([self.maps.out(hidden), self.step(hidden)], dim=1)
        maps = self.maps.shuffle(maps).float()
        half_height, side = maps[:, -2:-1], maps[:, -1:]
        return self.said(maps[:, 0:1] + half_height * side.tanh(), maps)


class BinsDepthHead(nn.Module):
    """A distribution over `BINS` log depths; the depth is the mean of the best bin's neighbourhood.

    Bins as in Fu et al. 2018, "DORN", spaced evenly in log depth; the answer is the expectation of
    Bhat et al. 2021 ("AdaBins", equation 3) over the most likely bin and its two neighbours only:
    over all bins it would mix foreground and background. The answer's range is the bins'. The
    uncertainty is the mean distance of the distribution from the answer, in log depth, less the
    distance that a sure answer between two bins has from both.
    """

    def __init__(self, inputs: int, *, stride: int, uncertainty: bool) -> None:
        """``inputs``: decoder channels."""
        super().__init__()
        centres = bin_centres()
        near = -((centres - math.log(START_DEPTH_M)) ** 2) / (2 * START_SCALE**2)
        start = [*near.clamp(min=-6.0).tolist(), -3.0]
        self.uncertainty = uncertainty
        self.maps = SubPixel(inputs, BINS + 1, stride=stride, start=start)
        self.register_buffer("centres", centres.view(1, BINS, 1, 1), persistent=False)
        self.register_buffer("number", torch.arange(BINS).view(1, BINS, 1, 1), persistent=False)
        self.centres: Tensor
        self.number: Tensor

    def forward(self, x: Image) -> dict[str, Image]:
        """As `LogDepthHead`, and ``depth_bins`` [B,BINS,H,W], logits of `bin_centres`."""
        maps = self.maps(x).float()
        logits = maps[:, :BINS]
        share = logits.softmax(1)
        best = logits.argmax(1, keepdim=True)
        kept = share * ((self.number - best).abs() <= 1)
        log_depth = (kept * self.centres).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
        answer = _answer(log_depth, maps[:, BINS:]) | {"depth_bins": logits}
        if self.uncertainty:
            away = (share * (self.centres - log_depth).abs()).sum(1, keepdim=True)
            place = (log_depth - math.log(BIN_RANGE_M[0])) / BIN_STEP
            beside = place - place.floor()
            own = 2 * BIN_STEP * beside * (1 - beside)  # of a share 1 - beside and a share beside
            least = math.exp(2 * LOG_SCALE_RANGE[0])
            answer["depth_uncertainty"] = (away**2 - own**2).clamp(min=least).sqrt()
        return answer


class MixtureDepthHead(nn.Module):
    """Two Laplacians of log depth and their weights; the depth is the centre of the higher peak.

    Tosi et al. 2021, "SMD-Nets: Stereo Mixture Density Networks", equations 3 and 5, on log depth.
    The uncertainty is E|l - answer| under the mixture, in closed form: for a component of centre m
    and scale b at distance a = |m - answer| it is a + b exp(-a / b).
    """

    def __init__(self, inputs: int, *, stride: int, uncertainty: bool) -> None:
        """``inputs``: decoder channels."""
        super().__init__()
        start = [math.log(START_DEPTH_M / 1.2), math.log(START_DEPTH_M * 1.2)]
        start += [math.log(START_SCALE)] * 2 + [0.0, -3.0]
        self.uncertainty = uncertainty
        self.maps = SubPixel(inputs, 6, stride=stride, start=start)

    def forward(self, x: Image) -> dict[str, Image]:
        """As `LogDepthHead`, and ``depth_mixture`` [B,6,H,W]: two centres (log depth), two scales
        b, two log weights."""
        maps = self.maps(x).float()
        centre, log_b = maps[:, :2], maps[:, 2:4].clamp(*LOG_SCALE_RANGE)
        log_weight = nn.functional.logsigmoid(torch.cat([maps[:, 4:5], -maps[:, 4:5]], dim=1))
        peak = log_weight - log_b  # of the density, up to the constant 1/2
        first = peak[:, :1] >= peak[:, 1:]
        log_depth = torch.where(first, centre[:, :1], centre[:, 1:])
        b = log_b.exp()
        answer = _answer(log_depth, maps[:, 5:])
        answer["depth_mixture"] = torch.cat([centre, b, log_weight], dim=1)
        if self.uncertainty:
            away = (centre - log_depth).abs()
            spread = log_weight.exp() * (away + b * (-away / b).exp())
            answer["depth_uncertainty"] = spread.sum(1, keepdim=True)
        return answer


DEPTH_HEADS = {
    "log": LogDepthHead,
    "step": StepDepthHead,
    "bins": BinsDepthHead,
    "mixture": MixtureDepthHead,
}
