"""The five stages of the instance decoder around their kernels; see `InstanceCodec`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from teacher.codecs import _segment_kernels as kernels

if TYPE_CHECKING:
    from teacher.codecs.segmentation import InstanceCodec

AREA, CORE, COLOUR, LOW, HIGH = 0, 1, slice(2, 5), slice(5, 7), slice(7, 9)  # columns of `measure`


def decode_instances(
    codec: InstanceCodec, rgb: np.ndarray
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Ids uint16 [H, W] and the table of one picture uint8 [H, W, 3]."""
    height, width = shape = rgb.shape[:2]
    ids = np.zeros(shape, np.uint16)
    framed = (height + 2 * kernels.MARGIN) * (width + 2 * kernels.MARGIN)
    packed = np.zeros(framed, np.uint32)
    labels = np.zeros(framed, np.int32)
    limit = float(codec.tau) ** 2
    kernels.prepare(rgb, np.array(codec.background), limit, packed, labels)
    stack = np.empty(framed, np.int64)
    count = kernels.flood(packed, labels, shape, limit, stack)
    radius = codec.erosion_px or max(1, round(min(shape) / 1024))
    facts = kernels.measure(packed, labels, shape, count, radius)
    large = facts[:, AREA] >= max(1.0, codec.min_area * height * width)
    specks = (facts[:, AREA] > 0) & ~large
    kept = large & ~_halos(codec, facts, large, labels, shape)
    groups = _merge(codec, facts, np.flatnonzero(kept))
    final = np.zeros(count + 1, np.int64)
    means = np.zeros((len(groups) + 1, 3))
    for i, group in enumerate(groups, start=1):
        final[group] = i
        means[i] = facts[group, COLOUR].sum(0) / facts[group, AREA].sum()
    likeness = kernels.finish(packed, labels, shape, final, specks, means, float(codec.tau), ids)
    areas = np.bincount(ids.ravel(), minlength=len(groups) + 1)
    table = [
        {
            "id": i,
            "colour": [round(float(v), 1) for v in means[i]],
            "area_px": int(areas[i]),
            "box": [*facts[group, LOW].min(0).tolist(), *facts[group, HIGH].max(0).tolist()],
            "score": round(float(likeness[i] / areas[i]), 4),
        }
        for i, group in enumerate(groups, start=1)
    ]
    return ids, table


def _halos(
    codec: InstanceCodec,
    facts: np.ndarray,
    large: np.ndarray,
    labels: np.ndarray,
    shape: tuple[int, ...],
) -> np.ndarray:
    """Components that erosion destroys and whose colour blends two things they touch."""
    halo = np.zeros(len(facts), bool)
    thin = large & (facts[:, CORE] < codec.min_core * facts[:, AREA])
    solid = large & ~thin
    thin_labels, solid_labels = np.flatnonzero(thin), np.flatnonzero(solid)
    if not thin_labels.size or not solid_labels.size:
        return halo
    rows = np.full((2, len(facts)), -1, np.int64)
    rows[0, thin_labels] = np.arange(thin_labels.size)
    rows[1, solid_labels] = np.arange(solid_labels.size)
    counts = thin_labels.size, solid_labels.size
    touching = kernels.contacts(labels, shape, rows[0], rows[1], *counts)
    means = facts[:, COLOUR] / np.maximum(facts[:, AREA : AREA + 1], 1)
    for row, label in enumerate(thin_labels):
        ends = [np.array(codec.background, float), *means[solid_labels[touching[row]]]]
        halo[label] = any(
            _off_chord(means[label], ends[i], ends[j]) <= codec.tau
            for i in range(len(ends))
            for j in range(i)
        )
    return halo


def _off_chord(colour: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Distance of a colour to the straight line between two others."""
    along = b - a
    t = np.clip((colour - a) @ along / max(float(along @ along), 1e-9), 0, 1)
    return float(np.linalg.norm(colour - a - t * along))


def _merge(codec: InstanceCodec, facts: np.ndarray, kept: np.ndarray) -> list[list[int]]:
    """Stage 5: groups of labels of one colour and not too far apart, in order of first label."""
    groups = [[int(label)] for label in kept]
    rows = [facts[label].copy() for label in kept]
    while True:
        pair = _closest_pair(codec, rows)
        if pair is None:
            return sorted(groups, key=min)
        i, j = pair
        groups[i] += groups.pop(j)
        gone = rows.pop(j)
        rows[i][: COLOUR.stop] += gone[: COLOUR.stop]
        rows[i][LOW] = np.minimum(rows[i][LOW], gone[LOW])
        rows[i][HIGH] = np.maximum(rows[i][HIGH], gone[HIGH])


def _closest_pair(codec: InstanceCodec, rows: list[np.ndarray]) -> tuple[int, int] | None:
    """The two groups closest in colour that may merge."""
    if len(rows) < 2:
        return None
    facts = np.array(rows)
    means = facts[:, COLOUR] / facts[:, AREA : AREA + 1]
    apart = ((means[:, None] - means[None]) ** 2).sum(-1)
    low = np.minimum(facts[:, None, LOW], facts[None, :, LOW])
    high = np.maximum(facts[:, None, HIGH], facts[None, :, HIGH])
    box = (facts[:, HIGH] - facts[:, LOW] + 1).prod(-1)
    common = (high - low + 1).prod(-1)
    allowed = (apart <= codec.tau**2) & (common <= codec.max_spread * (box[:, None] + box[None]))
    allowed &= np.triu(np.ones_like(allowed), 1)
    if not allowed.any():
        return None
    i, j = np.unravel_index(int(np.where(allowed, apart, np.inf).argmin()), apart.shape)
    return int(i), int(j)
