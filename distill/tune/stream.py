"""What a step number means: the plan of a run, and the endless batches it asks for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from distill.tune.pairs import Batch, Pairs
from distill.tune.scenes_cache import Scenes


@dataclass
class Plan:
    """What a step number means: stage, size and mixture. Same plan, same batches."""

    generate_steps: int
    small_steps: int
    steps: int
    retention: float
    task_weights: dict[str, float]

    def mixture(self, step: int) -> dict[str, float]:
        """Shares of the kinds of request at ``step``."""
        if step < self.generate_steps:
            return {"generate": 1.0}
        total = sum(self.task_weights.values())
        tasks = {k: v / total * (1 - self.retention) for k, v in self.task_weights.items()}
        return {**tasks, "generate": self.retention}


@dataclass
class Stream(IterableDataset):
    """Yields (step, batch) from ``start`` until the plan, or the time of this slice, is over."""

    plan: Plan
    full: Scenes
    small: Scenes
    start: int
    deadline: float
    options: dict[str, Any]
    sources: dict[tuple, Pairs] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        """One batch per step; the sources are kept per (size, mixture)."""
        for step in range(self.start, self.plan.steps):
            if time.monotonic() > self.deadline:
                return
            mixture = self.plan.mixture(step)
            small = step < self.plan.small_steps
            name = (small, tuple(mixture.items()))
            if name not in self.sources:
                scenes = self.small if small else self.full
                options = dict(self.options)
                if len([k for k, v in mixture.items() if v > 0]) == 1:
                    options["prompts_per_image"] = 1
                self.sources[name] = Pairs(scenes, weights=mixture, **options)
            yield step, self.sources[name].draw(step)


def split(scenes: Scenes, held_back: float) -> tuple[Scenes, Scenes]:
    """Training and validation scenes; a scene's side depends on its key alone.

    So a set that grows between two slices of a run never moves a scene to the other side.
    """
    shares = [int(sha256(k.encode()).hexdigest()[:8], 16) / 2**32 for k in scenes.keys]
    back = np.array(shares) < held_back
    return _take(scenes, np.flatnonzero(~back)), _take(scenes, np.flatnonzero(back))


def _take(scenes: Scenes, at: np.ndarray) -> Scenes:
    picked = {
        name: getattr(scenes, name)[at]
        for name in ("image", "depth", "normals", "semantic", "instances", "instance_class")
    }
    return Scenes(
        **picked,
        captions=[scenes.captions[i] for i in at],
        keys=[scenes.keys[i] for i in at],
        classes=scenes.classes,
        focal_px=scenes.focal_px,
    )
