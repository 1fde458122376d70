"""Marigold's own ensembling beside ours.

``PYTHONPATH=tests python tests/benchmarks/ensembling.py`` prints the tables of docs/results.md. Two
kinds of members, ten of each image. *Pipeline*: answers of a random-weight Marigold in the
published layout to smooth random images, one per seed; nothing is true of them, so the two
combinations are compared with each other, and each with itself after a jitter of the members.
*Planted*: one depth map with a scale and a shift, smooth errors and noise of its own per member;
the combination is judged against the map after the best affine fit.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, zoom
from teacher_cases import options, query
from tiny_checkpoints import write_marigold

from teacher.generators import load_teacher
from teacher.generators.diffusion import COMBINE, combine_depth
from teacher.label import Task

MEMBERS, SIZE = 10, (48, 64)


def pipeline_members(images: int) -> list[torch.Tensor]:
    """[E, h, w] per image, from every seed of a tiny random checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        write_marigold(Path(folder, "depth"), kind="depth")
        changes = {"depth": f"{folder}/depth", "normals": None, "seeds": list(range(MEMBERS))}
        teacher = load_teacher(**options("marigold", **changes, side_px=64))
        queries = [query(f"image {i}", *SIZE, seed=i) for i in range(images)]
        model = teacher.models[Task.DEPTH]  # type: ignore[attr-defined]
        return list(model.members(queries, seeds=teacher.seeds, mirror=False)[:, :, 0])


def planted(seed: int, *, bend: float, noise: float, wrong: int) -> tuple[torch.Tensor, np.ndarray]:
    """(members [E, h, w], truth [h, w] in 0..1): a room of boxes, bent smoothly per member.

    ``bend`` and ``noise`` are standard deviations in parts of the range; the last ``wrong``
    members show another room.
    """
    rng = np.random.default_rng(seed)

    def room() -> np.ndarray:
        boxes = zoom(rng.uniform(0, 1, (6, 8)), 8, order=0)
        slope = np.linspace(1, 0, SIZE[0])[:, None]
        return 0.5 * boxes + 0.5 * slope

    truth = room()
    members = []
    for i in range(MEMBERS):
        wave = gaussian_filter(rng.normal(0, 1, SIZE), 8)
        shown = room() if i >= MEMBERS - wrong else truth
        y = shown + bend * wave / wave.std() + rng.normal(0, noise, SIZE)
        members.append(rng.uniform(0.4, 0.9) * y + rng.uniform(0, 0.3))
    return torch.from_numpy(np.stack(members)).float(), truth


def error(value: np.ndarray, truth: np.ndarray) -> float:
    """Mean absolute error in % of the truth's range, after the best affine fit."""
    a, b = np.polyfit(value.ravel(), truth.ravel(), 1)
    return 100 * float(np.abs(a * value + b - truth).mean() / np.ptp(truth))


def combined(members: torch.Tensor, how: str) -> tuple[np.ndarray, np.ndarray, float]:
    """(value, spread, CPU seconds)."""
    start = time.process_time()
    value, spread = combine_depth(members, how=how)
    assert spread is not None
    return value.numpy(), spread.numpy(), time.process_time() - start


def moved(members: torch.Tensor, how: str, jitter: float, seed: int) -> float:
    """The largest change of the value, in parts of its range, when every member is jittered."""
    noise = torch.from_numpy(np.random.default_rng(seed).normal(0, jitter, members.shape)).float()
    value, other = (combined(m, how)[0] for m in (members, members + noise))
    return float(np.abs(value - other).max() / np.ptp(value))


def main(images: int = 4) -> None:
    """Print both tables."""
    found = pipeline_members(images)
    alike, times, moves = [], {h: 0.0 for h in COMBINE}, {h: [] for h in COMBINE}  # type: ignore[var-annotated]
    for i, members in enumerate(found):
        values = {}
        for how in COMBINE:
            values[how], _, seconds = combined(members, how)
            times[how] += seconds / images
            moves[how].append(moved(members, how, 1e-6, i))
        alike.append(np.corrcoef(values["consensus"].ravel(), values["original"].ravel())[0, 1])
    print(f"Pipeline members: correlation of both {np.mean(alike):.4f}, least {min(alike):.4f}\n")
    print("| | moved by a jitter of 1e-6, worst image | CPU s per image |\n|---|---|---|")
    for how in COMBINE:
        print(f"| {how} | {max(moves[how]):.2g} | {times[how]:.3f} |")
    print("\n| planted | one member | consensus | original | spread: consensus, original |")
    print("|---|---|---|---|---|")
    for bend, noise, wrong in ((0.02, 0.01, 0), (0.1, 0.02, 0), (0.02, 0.01, 2), (0.02, 0.01, 4)):
        rows = []
        for seed in range(images):
            members, truth = planted(seed, bend=bend, noise=noise, wrong=wrong)
            both = {h: combined(members, h) for h in ("consensus", "original")}
            row = [error(members[0].numpy(), truth)] + [error(v[0], truth) for v in both.values()]
            row += [100 * float(np.median(v[1]) / np.ptp(v[0])) for v in both.values()]
            rows.append(row)
        one, ours, theirs, near, far = np.mean(rows, axis=0)
        name = f"bend {bend:.0%}, noise {noise:.0%}, {wrong} of {MEMBERS} wrong"
        print(f"| {name} | {one:.2f} | {ours:.2f} | {theirs:.2f} | {near:.2f}, {far:.2f} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
