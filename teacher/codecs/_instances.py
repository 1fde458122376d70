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
    """Stage 5: groups of labels of one colour and not too far apart, in order of first label.

    The closest pair in colour merges first; then only its distances are new.
    """
    groups = [[int(label)] for label in kept]
    rows = facts[kept].copy()
    apart = np.full((len(rows), len(rows)), np.inf)
    for i in range(len(rows)):
        apart[i, i + 1 :] = _may_merge(codec, rows[i], rows[i + 1 :])
    while apart.size:
        i, j = (int(v) for v in np.unravel_index(int(apart.argmin()), apart.shape))
        if not np.isfinite(apart[i, j]):
            break
        groups[i] += groups[j]
        groups[j] = []
        rows[i, : COLOUR.stop] += rows[j, : COLOUR.stop]
        rows[i, LOW] = np.minimum(rows[i, LOW], rows[j, LOW])
        rows[i, HIGH] = np.maximum(rows[i, HIGH], rows[j, HIGH])
        alive = np.array([bool(group) for group in groups])
        fresh = np.where(alive, _may_merge(codec, rows[i], rows), np.inf)
        apart[j, :] = apart[:, j] = np.inf
        apart[:i, i], apart[i, i + 1 :] = fresh[:i], fresh[i + 1 :]
    return sorted((group for group in groups if group), key=min)


def _may_merge(codec: InstanceCodec, one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Squared colour distances of a group to others [n, 9]; infinite where they must not merge."""
    means = others[:, COLOUR] / others[:, AREA : AREA + 1]
    apart = ((means - one[COLOUR] / one[AREA]) ** 2).sum(-1)
    low, high = np.minimum(one[LOW], others[:, LOW]), np.maximum(one[HIGH], others[:, HIGH])
    boxes = (one[HIGH] - one[LOW] + 1).prod() + (others[:, HIGH] - others[:, LOW] + 1).prod(-1)
    common = (high - low + 1).prod(-1)
    allowed = (apart <= codec.tau**2) & (common <= codec.max_spread * boxes)
    return np.where(allowed, apart, np.inf)
