"""Many answers to one question -> one answer and its spread, never a blend of two readings.

Every centre is a member's own value: the lower median, or where members disagree (edges, two valid
readings) the member that its neighbourhood is closest to, so that a region comes from one member.
Nothing here sees an encoded colour. Spreads: ``raw`` says how much members disagree, scale
included; ``aligned`` what is left once every member's global scale is taken out (structure).
Windows of the image only doubt: shown larger, it is answered worse (docs/results.md), so they count
in spreads and not in centres.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import uniform_filter

from teacher.errors import UsageError
from teacher.generators import Query
from teacher.label import Answer, Space, Task

REGION_PX = 5  # window in which one member is chosen where members disagree
TWO_READINGS = 0.1  # |log ratio| beyond which members are taken to disagree
MATCH_IOU = 0.5  # two instances of two members are the same above this


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of asking: seed, mirrored or not, window (fractions left, top, right, bottom)."""

    seed: int = 0
    mirror: bool = False
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    @property
    def whole(self) -> bool:
        """Whether it shows the whole image."""
        return self.window == (0.0, 0.0, 1.0, 1.0)

    def _box(self, height: int, width: int) -> tuple[int, int, int, int]:
        left, top, right, bottom = self.window
        box = round(left * width), round(top * height), round(right * width), round(bottom * height)
        if not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
            raise UsageError(f"consensus: window {self.window} leaves no pixel of {width}x{height}")
        return box

    def apply(self, query: Query) -> Query:
        """The query as this variant asks it: window first, then mirror; the camera follows."""
        height, width = query.image.shape[:2]
        x0, y0, x1, y1 = self._box(height, width)
        image = query.image[y0:y1, x0:x1]
        camera = query.camera.cropped(left=x0, top=y0, width=x1 - x0, height=y1 - y0)
        if self.mirror:
            image, camera = image[:, ::-1], camera.mirrored()
        return dataclasses.replace(query, image=np.ascontiguousarray(image), camera=camera)

    def undo(self, answer: Answer, *, height: int, width: int) -> Answer:
        """The answer in the whole image's pixels: x of normals negated, unseen pixels unknown."""
        x0, y0, x1, y1 = self._box(height, width)

        def whole(array: np.ndarray | None, fill: Any) -> Any:
            if array is None:
                return None
            array = array[:, ::-1] if self.mirror else array
            canvas = np.full((height, width, *array.shape[2:]), fill, array.dtype)
            canvas[y0:y1, x0:x1] = array
            return canvas

        values = whole(answer.values, _unknown(answer))
        if self.mirror and answer.task is Task.NORMALS:
            values[..., 0] *= -1
        return dataclasses.replace(
            answer,
            values=values,
            residual=whole(answer.residual, np.nan),
            uncertainty=whole(answer.uncertainty, np.nan),
            picture=whole(answer.picture, 0),
        )


def variants(*, seeds: int = 1, mirror: bool = False, crops: int = 0) -> list[Variant]:
    """``seeds`` askings, each also mirrored if asked, plus ``crops`` corner windows of 80 %."""
    if seeds < 1 or not 0 <= crops <= 4:
        raise UsageError(f"consensus: seeds={seeds} must be >= 1 and crops={crops} in 0..4")
    found = [Variant(seed=s, mirror=m) for s in range(seeds) for m in ((False, True)[: 1 + mirror])]
    corners = [(0.0, 0.0), (0.2, 0.2), (0.2, 0.0), (0.0, 0.2)][:crops]
    return found + [
        Variant(seed=seeds + i, window=(x, y, x + 0.8, y + 0.8)) for i, (x, y) in enumerate(corners)
    ]


def merge(answers: Sequence[Answer], *, voters: int | None = None) -> Answer:
    """One answer from several of the same task, space and size.

    The first ``voters`` (None: all) decide on values, residual and instances; the others, answers
    to windows of the image, count in the spread alone.

    ``uncertainty`` becomes the members' aligned spread in the task's unit for depth (mean |log
    ratio| to the centre), the mean angle to the centre for normals, 1 - share of votes for
    semantic. ``extras`` gain ``members`` (all of them), and for depth the image medians
    ``raw_spread`` and ``aligned_spread``. A single answer is returned as it is.

    Raises:
        UsageError: no answer, or answers that do not fit together.
    """
    if not answers:
        raise UsageError("consensus: no answer to merge")
    first = answers[0]
    for other in answers[1:]:
        if (other.task, other.space, other.values.shape) != (
            first.task,
            first.space,
            first.values.shape,
        ):
            raise UsageError(
                f"consensus: {other.task} in {other.space} {other.values.shape} cannot be merged"
                f" with {first.task} in {first.space} {first.values.shape}"
            )
    if len(answers) == 1:
        return first
    stack, deciding = np.stack([a.values for a in answers]), answers[:voters]
    facts: dict[str, Any] = {"members": len(answers)}
    if first.task is Task.DEPTH:
        merged = merge_depth(stack, positive=first.space is Space.METRIC, voters=voters)
        values, spread = merged.values, merged.aligned
        facts |= {"raw_spread": _median(merged.raw), "aligned_spread": _median(merged.aligned)}
    elif first.task is Task.NORMALS:
        values, spread = merge_normals(stack, voters=voters)
    elif first.task is Task.SEMANTIC:
        values, spread = merge_classes(stack, voters=voters)
    else:
        tables = [a.extras.get("instances", []) for a in deciding]
        values, table = merge_instances(stack[:voters], tables)
        spread, facts["instances"] = None, table
    residual = None
    if all(a.residual is not None for a in deciding):
        residual = np.nan_to_num(np.stack([a.residual for a in deciding]), nan=np.inf)  # type: ignore
        residual = np.sort(residual, axis=0)[(len(deciding) - 1) // 2].astype(np.float32)
        residual[np.isinf(residual)] = np.nan
    return dataclasses.replace(
        first, values=values, uncertainty=spread, residual=residual, extras=first.extras | facts
    )


def _unknown(answer: Answer) -> Any:
    if answer.task is Task.INSTANCES:
        return 0
    if answer.task is Task.SEMANTIC:
        return np.iinfo(answer.values.dtype).max
    return np.nan


def _median(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return round(float(np.median(known)), 6) if known.size else None


@dataclass(frozen=True)
class DepthConsensus:
    """values [H, W]; raw and aligned spread [H, W] (mean |log ratio| to the centre), NaN unknown;
    scales [K]: each member's median log ratio to the centre.
    """

    values: np.ndarray
    raw: np.ndarray
    aligned: np.ndarray
    scales: np.ndarray


def lower_median(stack: np.ndarray) -> np.ndarray:
    """Per pixel the lower median of the known members [K, H, W]; NaN where most are unknown.

    +inf (sky) votes as a value: two readings never meet in the middle.
    """
    known = ~np.isnan(stack)
    count = known.sum(0)
    ordered = np.sort(stack, axis=0)  # NaN last
    at = np.maximum(count - 1, 0) // 2
    centre = np.take_along_axis(ordered, at[None], 0)[0]
    return np.where(2 * count > len(stack), centre, np.nan).astype(stack.dtype)


def _log_gap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b| of log depths; 0 between skies, a large constant between sky and ground, NaN."""
    with np.errstate(invalid="ignore"):
        gap = np.abs(a - b)
    gap = np.where(np.isposinf(a) & np.isposinf(b), 0.0, gap)
    return np.where(np.isinf(gap), 3.0, gap)


def regional_medoid(stack: np.ndarray) -> np.ndarray:
    """Per pixel the index of the member [K, H, W] closest to all others over its neighbourhood."""
    cost = np.zeros(stack.shape)
    for i, a in enumerate(stack):
        gaps = [_log_gap(a, b) for b in stack]
        cost[i] = uniform_filter(
            np.nan_to_num(np.sum(gaps, axis=0), nan=3.0 * len(stack)), REGION_PX
        )
    return cost.argmin(0)


def merge_depth(
    stack: np.ndarray, *, positive: bool = True, voters: int | None = None
) -> DepthConsensus:
    """Depths [K, H, W] (NaN unknown, +inf sky) -> centre (of the first ``voters``) and spreads.

    Where members agree within `TWO_READINGS` the centre is the lower median; elsewhere the
    regional medoid's own value. With ``positive`` False (affine depth) logs are not taken.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(stack.astype(np.float64)) if positive else stack.astype(np.float64)
    deciding = logs[:voters]
    median = lower_median(deciding)
    disagree = np.nanmax(np.nan_to_num(_log_gap(deciding, median[None]), nan=0.0), axis=0)
    member = np.take_along_axis(stack, regional_medoid(deciding)[None], 0)[0]
    centre_value = lower_median(stack[:voters])
    values = np.where((disagree > TWO_READINGS) & ~np.isnan(member), member, centre_value)
    values = np.where(np.isnan(centre_value), np.nan, values).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        centre = np.log(values.astype(np.float64)) if positive else values.astype(np.float64)
    scales = np.zeros(len(stack))
    for k, log in enumerate(logs):
        both = np.isfinite(log) & np.isfinite(centre)
        scales[k] = np.median(log[both] - centre[both]) if both.any() else 0.0
    raw = _mean_known(_log_gap(logs, centre[None]))
    aligned = _mean_known(_log_gap(logs - scales[:, None, None], centre[None]))
    return DepthConsensus(values, raw, aligned, scales)


def _mean_known(gaps: np.ndarray) -> np.ndarray:
    count = (~np.isnan(gaps)).sum(0)
    total = np.nan_to_num(gaps).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def merge_normals(stack: np.ndarray, *, voters: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Normals [K, H, W, 3] -> (of ``voters`` the one closest to all, mean angle of all to it)."""
    known = ~np.isnan(stack[..., 0])
    safe = np.nan_to_num(stack).astype(np.float64)
    likeness = np.einsum("ihwc,jhwc->ihw", safe[:voters], safe[:voters])
    likeness = np.where(known[:voters], likeness, -np.inf)
    best = likeness.argmax(0)
    values = np.take_along_axis(stack, best[None, ..., None], 0)[0]
    chord = np.linalg.norm(safe - np.nan_to_num(values), axis=-1)  # exact near 0, unlike arccos
    angle_deg = np.where(known, np.degrees(2 * np.arcsin(np.clip(chord / 2, 0, 1))), np.nan)
    spread = _mean_known(angle_deg)
    none = 2 * known[:voters].sum(0) <= len(stack[:voters])
    values, spread = values.astype(np.float32), spread.astype(np.float32)
    values[none], spread[none] = np.nan, np.nan
    return values, spread


def merge_classes(stack: np.ndarray, *, voters: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Class ids [K, H, W] -> (majority of ``voters``, 1 - its share); a tie goes to the first.

    The share is that of the voters and of the windows that see the pixel.
    """
    unknown = np.iinfo(stack.dtype).max
    deciding, windows = stack[:voters], stack[len(stack[:voters]) :]
    votes = np.stack([(deciding == one).sum(0) for one in deciding])
    votes[deciding == unknown] = 0
    values = np.take_along_axis(deciding, votes.argmax(0)[None], 0)[0]
    seen = len(deciding) + (windows != unknown).sum(0)
    share = (stack == values).sum(0) / seen
    return values, np.where(values == unknown, np.nan, 1 - share).astype(np.float32)


def merge_instances(
    stack: np.ndarray, tables: Sequence[Sequence[dict[str, Any]]]
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Instance ids [K, H, W] with their tables -> ids and table; matched first, then voted.

    The reference is the member whose instances the others find most often. Each of its instances
    is matched in every other member by IoU > 0.5 and equal class; one found by fewer than half of
    all members is dropped; a pixel belongs to it if more than half of the matches hold it.
    ``score`` is the mean IoU over all members, 0 where it is missing.
    """
    classes = [{row["id"]: row.get("class") for row in table} for table in tables]
    matches = [_matches(stack, classes, k) for k in range(len(stack))]
    reference = int(np.argmax([sum(sum(iou) for _, iou in m.values()) for m in matches]))
    rows_of = {row["id"]: row for row in tables[reference]}
    values = np.zeros(stack.shape[1:], np.uint16)
    table: list[dict[str, Any]] = []
    ranked = sorted(matches[reference].items(), key=lambda item: -sum(item[1][1]))
    for old, (masks, iou) in ranked:
        if 2 * len(masks) < len(stack):
            continue
        inside = (2 * np.sum(masks, axis=0) > len(masks)) & (values == 0)
        if not inside.any():
            continue
        new = len(table) + 1
        values[inside] = new
        score = round(float(sum(iou)) / len(stack), 6)
        table.append(
            {**rows_of.get(old, {}), "id": new, "score": score, "area_px": int(inside.sum())}
        )
    return values, table


def _matches(
    stack: np.ndarray, classes: Sequence[dict[int, Any]], k: int
) -> dict[int, tuple[list[np.ndarray], list[float]]]:
    """For every instance of member ``k``: the masks found for it (its own first) and their IoU."""
    found = {}
    for old in np.unique(stack[k][stack[k] > 0]).tolist():
        mask = stack[k] == old
        masks, overlaps = [mask], [1.0]
        for j, other in enumerate(stack):
            if j == k:
                continue
            ids, counts = np.unique(other[mask & (other > 0)], return_counts=True)
            for i, common in zip(ids.tolist(), counts.tolist(), strict=True):
                iou = common / ((other == i).sum() + mask.sum() - common)
                if iou > MATCH_IOU and classes[j].get(i) == classes[k].get(old):
                    masks.append(other == i)
                    overlaps.append(float(iou))
        found[old] = (masks, overlaps)
    return found
