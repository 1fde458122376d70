"""Many answers to one question -> one answer and its spread, never a blend of two readings.

A robust centre comes first: the lower median of depths, the direction closest to all others. The
answer is the mean of the members that read the same, weighted by their nearness to the centre
(Tukey's biweight; Beaton and Tukey 1974); a member that reads something else (another scale, the
other side of an edge) has no part in it. Nothing here sees an encoded colour. Spreads: ``raw`` says
how much members disagree, scale included; ``aligned`` what is left once every member's global scale
is taken out (structure). A window of the image has half a vote where it sees: shown larger, an
image is answered a little worse, with finer borders (docs/results.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from teacher.errors import UsageError
from teacher.generators import Query
from teacher.label import Answer, Space, Task

ONE_READING = 0.3  # |log ratio| to the centre from which on a depth is another reading
ONE_READING_AFFINE = 0.1  # the same for affine depth, in units of its range
ONE_READING_DEG = 30.0  # the same for normals
_CHORD_SQUARED = (2 * np.sin(np.radians(ONE_READING_DEG) / 2)) ** 2
WINDOW_LEAVES = 0.1  # of the image's width and height, beyond a corner window
WINDOW_VOTE = 0.5  # of a window, where an answer to the whole image has one
STRIP = 32  # rows of normals merged at a time, so that they stay in the processor's cache
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
    """``seeds`` askings, each also mirrored if asked, plus ``crops`` corner windows.

    Of the windows the first two, opposite each other, are shown as they are, the others mirrored
    if asked: no two askings go wrong alike.
    """
    if seeds < 1 or not 0 <= crops <= 4:
        raise UsageError(f"consensus: seeds={seeds} must be >= 1 and crops={crops} in 0..4")
    found = [Variant(seed=s, mirror=m) for s in range(seeds) for m in ((False, True)[: 1 + mirror])]
    far, side = WINDOW_LEAVES, 1 - WINDOW_LEAVES
    corners = [(0.0, 0.0), (far, far), (far, 0.0), (0.0, far)][:crops]
    for i, (x, y) in enumerate(corners):
        window = (x, y, x + side, y + side)
        found.append(Variant(seed=seeds + i, mirror=mirror and i >= 2, window=window))
    return found


def merge(answers: Sequence[Answer], *, whole: int | None = None) -> Answer:
    """One answer from several of the same task, space and size.

    The first ``whole`` (None: all) were given to the whole image; they alone decide on instances,
    on the residual, and on what is unknown. The others were given to windows of it.

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
    stack, deciding = np.stack([a.values for a in answers]), answers[:whole]
    facts: dict[str, Any] = {"members": len(answers)}
    if first.task is Task.DEPTH:
        merged = merge_depth(stack, positive=first.space is Space.METRIC, whole=whole)
        values, spread = merged.values, merged.aligned
        facts |= {"raw_spread": _median(merged.raw), "aligned_spread": _median(merged.aligned)}
    elif first.task is Task.NORMALS:
        values, spread = merge_normals(stack, whole=whole)
    elif first.task is Task.SEMANTIC:
        values, spread = merge_classes(stack, whole=whole)
    else:
        tables = [a.extras.get("instances", []) for a in deciding]
        values, table = merge_instances(stack[:whole], tables)
        spread, facts["instances"] = None, table
    residual = None
    if all(a.residual is not None for a in deciding):
        residual = _lower_middle([a.residual for a in deciding if a.residual is not None])
    return dataclasses.replace(
        first, values=values, uncertainty=spread, residual=residual, extras=first.extras | facts
    )


def _lower_middle(planes: Sequence[np.ndarray]) -> np.ndarray:
    """Per pixel the lower median of all, NaN as the largest; a network of swaps, plane by plane."""
    ranked = list(planes)
    for end in range(len(ranked) - 1, 0, -1):
        for k in range(end):
            low, high = ranked[k], ranked[k + 1]
            ranked[k], ranked[k + 1] = np.fmin(low, high), np.maximum(low, high)
    return ranked[(len(ranked) - 1) // 2].astype(np.float32)


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


def _votes(members: int, whole: int | None) -> np.ndarray:
    """[K, 1, 1]: what each member counts."""
    votes = np.ones((members, 1, 1), np.float32)
    votes[members if whole is None else whole :] = WINDOW_VOTE
    return votes


def _mostly_unknown(unknown: np.ndarray, whole: int | None) -> np.ndarray:
    """[K, H, W] -> [H, W]: whether at least half of the answers to the whole image do not know."""
    return 2 * unknown[:whole].sum(0) >= len(unknown[:whole])


def lower_median(stack: np.ndarray, votes: np.ndarray) -> np.ndarray:
    """Per pixel the lower median of the known members [K, H, W] with ``votes`` [K, 1, 1].

    It is a member's own value; +inf (sky) votes as a value, so that two readings never meet in the
    middle. NaN where no member knows.
    """
    order = np.argsort(stack, axis=0)  # NaN last
    ordered = np.take_along_axis(stack, order, 0)
    reached = np.cumsum(
        np.take_along_axis(np.where(np.isnan(stack), np.float32(0), votes), order, 0), axis=0
    )
    at = (reached >= reached[-1:] / 2).argmax(0)
    return np.take_along_axis(ordered, at[None], 0)[0]


def _biweight(gap: np.ndarray) -> np.ndarray:
    """1 at no gap, falling to 0 at a gap of 1 and staying there; 0 for NaN."""
    return np.square(np.fmax(1 - np.square(gap), 0))  # which takes the 0 beside a NaN


def _log_gap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b| of log depths; 0 between skies, a large constant between sky and ground, NaN."""
    with np.errstate(invalid="ignore"):
        gap = np.abs(a - b)
    gap = np.where(np.isposinf(a) & np.isposinf(b), 0.0, gap)
    return np.where(np.isinf(gap), 3.0, gap)


def merge_depth(
    stack: np.ndarray, *, positive: bool = True, whole: int | None = None
) -> DepthConsensus:
    """Depths [K, H, W] (NaN unknown, +inf sky) -> values and spreads.

    The values are the geometric mean of the members nearer than `ONE_READING` to the lower median.
    With ``positive`` False (affine depth) logs are not taken: the mean of those nearer than
    `ONE_READING_AFFINE`.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(stack) if positive else stack
    votes = _votes(len(stack), whole)
    middle = lower_median(logs, votes)
    reach = ONE_READING if positive else ONE_READING_AFFINE
    votes = votes * np.isfinite(logs) * _biweight(_log_gap(logs, middle[None]) / reach)
    total = (votes * np.where(votes > 0, logs, 0)).sum(0)
    centre = np.where(np.isfinite(middle), total / np.maximum(votes.sum(0), WINDOW_VOTE), middle)
    centre[_mostly_unknown(np.isnan(logs), whole)] = np.nan
    values = (np.exp(centre) if positive else centre).astype(np.float32)
    scales = np.zeros(len(stack))
    for k, log in enumerate(logs):
        both = np.isfinite(log) & np.isfinite(centre)
        scales[k] = np.median(log[both] - centre[both]) if both.any() else 0.0
    raw = _mean_known(_log_gap(logs, centre[None]))
    aligned = _mean_known(_log_gap(logs - scales[:, None, None], centre[None]))
    return DepthConsensus(values, raw, aligned, scales)


def _mean_known(gaps: np.ndarray) -> np.ndarray:
    unknown = np.isnan(gaps)
    count = len(gaps) - unknown.sum(0)
    total = np.where(unknown, np.float32(0), gaps).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def merge_normals(stack: np.ndarray, *, whole: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Normals [K, H, W, 3] -> (unit normals, mean angle of all members to them in degrees).

    The mean direction of the members nearer than `ONE_READING_DEG` to the one closest to all.
    """
    rows = range(0, stack.shape[1], STRIP)
    strips = [_merge_normals(stack[:, row : row + STRIP], whole) for row in rows]
    values, spread = zip(*strips, strict=True)
    return np.concatenate(values), np.concatenate(spread)


def _merge_normals(stack: np.ndarray, whole: int | None) -> tuple[np.ndarray, np.ndarray]:
    stack = np.ascontiguousarray(np.moveaxis(stack, -1, 0))  # [3, K, H, W]: planes are faster
    known = ~np.isnan(stack[0])
    votes = _votes(len(known), whole) * known
    safe = np.where(np.isnan(stack), np.float32(0), stack)
    likeness = _dot(safe, (votes * safe).sum(1))  # to all others together
    best = np.where(known, likeness, -np.inf).argmax(0)
    middle = np.take_along_axis(safe, best[None, None], 1)[:, 0]
    votes = votes * _biweight(np.sqrt(_chord_squared(safe, middle) / _CHORD_SQUARED))
    mean = (votes * safe).sum(1)
    values = mean / np.maximum(np.sqrt(_dot(mean, mean)), 1e-12)
    chord = np.sqrt(np.where(known, _chord_squared(safe, values), np.nan))
    spread = np.degrees(2 * np.arcsin(np.minimum(chord / 2, 1)))  # exact near 0, unlike arccos
    none = _mostly_unknown(~known, whole)
    values, spread = np.stack(tuple(values), -1).astype(np.float32), _mean_known(spread)
    values[none], spread[none] = np.nan, np.nan
    return values, spread


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[3, ..., H, W] x [3, H, W] -> [..., H, W]."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _chord_squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[3, K, H, W], [3, H, W] -> [K, H, W]."""
    gap = a - b[:, None]
    return _dot(gap, gap)


def merge_classes(stack: np.ndarray, *, whole: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Class ids [K, H, W] -> (majority of the votes, 1 - its share); a tie goes to the first."""
    unknown = np.iinfo(stack.dtype).max
    votes = np.broadcast_to(_votes(len(stack), whole), stack.shape)
    total = np.stack([(votes * (stack == one)).sum(0) for one in stack])
    total[stack == unknown] = 0
    values = np.take_along_axis(stack, total.argmax(0)[None], 0)[0]
    values[(stack[:whole] == unknown).all(0)] = unknown
    blind = (stack == unknown) & (np.arange(len(stack))[:, None, None] >= len(stack[:whole]))
    share = (votes * (stack == values)).sum(0) / (votes * ~blind).sum(0)
    return values, np.where(values == unknown, np.nan, 1 - share).astype(np.float32)


def merge_instances(
    stack: np.ndarray, tables: Sequence[Sequence[dict[str, Any]]]
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Instance ids [K, H, W] with their tables -> ids and table; matched first, then voted.

    The reference is the member whose instances the others find most often. Each of its instances
    is matched in every other member by IoU > 0.5 and equal class; one found by fewer than half of
    all members is dropped; a pixel belongs to it if more than half of the matches hold it, in a
    draw if the reference does.
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
        inside = (2 * np.sum(masks, axis=0) + masks[0] > len(masks)) & (values == 0)
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
