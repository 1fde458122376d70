"""The mini teacher: a small generator trained here, asked in words, answering in RGB pictures.

Depth, normals, semantic classes and instances all come from one network, chosen by the prompt;
codecs decode the pictures, several seeds (and the mirror image) give a spread.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from teacher import consensus, prompts, wordings
from teacher.codecs.depth import DepthCodec
from teacher.codecs.normals import NormalCodec
from teacher.codecs.segmentation import InstanceCodec, PaletteCodec, merge_passes
from teacher.errors import UsageError
from teacher.generators import Query
from teacher.generators.mini_generator import WEIGHTS, MiniGenerator, key_seed
from teacher.label import Answer, Camera, Space, Task

TASKS = (Task.DEPTH, Task.NORMALS, Task.SEMANTIC, Task.INSTANCES)
NORMALS_MAX_RESIDUAL = 64.0  # nearer to no direction (black, 93; grey, 127) than this is unknown
CLASS_MAX_DISTANCE = 64.0
COLOUR_NOISE = 12.0  # scatter of an instance per channel, 0..255: colours drift over large ones
MIN_INSTANCE = 1e-3  # share of the picture; both by PQ on scenes set aside (docs/results.md)
THING_SHARE = 0.002  # a class is looked for as instances if it covers this share of the picture
ROWS = 32  # pictures per call of the network


class MiniTeacher:
    """Asks the mini generator for dense answers.

    The picture is drawn at the size the generator was tuned at and decoded there; values are
    then resampled (nearest) to the query's size. Depth is drawn for the canonical camera and
    multiplied by focal / canonical focal.
    """

    tasks = TASKS

    def __init__(
        self,
        *,
        weights: str | os.PathLike[str] | None = None,
        steps: int = 1,
        seeds: int = 1,
        mirror: bool = True,
        crops: int = 4,
        device: str = "cpu",
    ) -> None:
        """Load the weights; ``seeds``, ``mirror``, ``crops`` say how many answers make one."""
        if steps < 1:
            raise UsageError(f"mini teacher: steps={steps}, expected at least 1")
        self.generator = MiniGenerator.from_pretrained(weights or WEIGHTS, device=device)
        self.steps, self.variants = (
            steps,
            consensus.variants(seeds=seeds, mirror=mirror, crops=crops),
        )
        card = self.generator.card
        self.classes = {int(k): str(v) for k, v in card["classes"].items()}
        self.things = [str(n) for n in card["things"]]
        self.palette = PaletteCodec.automatic(
            list(self.classes.values()), max_distance=CLASS_MAX_DISTANCE
        )
        self.depth_codec, self.normal_codec = DepthCodec(), NormalCodec(axes="ours")
        self.instance_codec = InstanceCodec.for_noise(
            COLOUR_NOISE, background="black", min_area=MIN_INSTANCE
        )

    def prompt(self, task: Task, *, name: str = "") -> str:
        """The sentence asked for ``task``; instances need the class ``name``."""
        if task is Task.DEPTH:
            return prompts.depth()
        if task is Task.NORMALS:
            return prompts.normals()
        if task is Task.SEMANTIC:
            names = dict(zip(self.palette.names, self.palette.colours, strict=True))
            return prompts.semantic(names, notation="hex")
        return prompts.instances(name, background="black")

    def describe(self) -> dict[str, Any]:
        """See `Teacher.describe`."""
        card = self.generator.card
        return {
            "name": "mini",
            "weights_sha256": self.generator.sha256,
            "steps_trained": card.get("steps_trained"),
            "license": card.get("license"),
            **({"licences": card["licences"]} if card.get("licences") else {}),
            "prompts": {str(t): self.prompt(t, name="{name}") for t in TASKS},
            "prompts_version": wordings.VERSION,
            "steps": self.steps,
            "askings": [dataclasses.asdict(v) for v in self.variants],
            "codecs": {
                "depth": self.depth_codec.to_json(),
                "normals": self.normal_codec.to_json(),
                "semantic": self.palette.to_json(),
                "instances": dataclasses.asdict(self.instance_codec),
            },
            "classes": {str(k): v for k, v in self.classes.items()},
        }

    def answer(self, queries: Sequence[Query], tasks: Sequence[Task]) -> list[dict[Task, Answer]]:
        """See `Teacher.answer`; any image size of at least 8x8, any mixture of sizes."""
        wanted = [self._task(t) for t in tasks]
        return [self._answer_one(q, wanted) for q in queries]

    def _task(self, task: Task | str) -> Task:
        try:
            return Task(task)
        except ValueError:
            known = ", ".join(str(t) for t in TASKS)
            raise UsageError(f"mini teacher: unknown task {task!r}; it answers {known}") from None

    def _answer_one(self, query: Query, tasks: Sequence[Task]) -> dict[Task, Answer]:
        """All variants of one image together: the encoder runs once per variant."""
        height, width = query.image.shape[:2]
        if min(height, width) < 8:
            raise UsageError(
                f"mini teacher: image {query.key!r} is {width}x{height}, expected at least 8x8"
            )
        size = self.generator.working_size(height, width)
        asked = [v.apply(query) for v in self.variants]
        features = self.generator.encode([q.image for q in asked], size)
        seeds = [key_seed(query.key, v.seed) for v in self.variants]
        draw = functools.partial(self._draw, features, seeds)
        found: dict[Task, list[Answer]] = {}
        simple = [t for t in tasks if t is not Task.INSTANCES]
        if Task.INSTANCES in tasks and Task.SEMANTIC not in simple:
            simple.append(Task.SEMANTIC)  # says which classes to look for
        pictures = draw([self.prompt(t) for t in simple])
        for task, drawn in zip(simple, pictures, strict=True):
            found[task] = [
                self._decode(task, picture, q.camera)
                for picture, q in zip(drawn, asked, strict=True)
            ]
        if Task.INSTANCES in tasks:
            found[Task.INSTANCES] = self._instances(draw, found[Task.SEMANTIC])
        return {t: self._merged(found[t], asked, query) for t in tasks}

    def _draw(self, features: Any, seeds: list[int], texts: list[str]) -> np.ndarray:
        """Pictures [prompts, variants, h, w, 3], in calls of at most `ROWS` rows."""
        import torch

        rows = [(text, k) for text in texts for k in range(len(seeds))]
        parts = []
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            at = torch.tensor([k for _, k in part], device=features.half.device)
            parts.append(
                self.generator.pictures(
                    features.select(at), [t for t, _ in part], [seeds[k] for _, k in part],
                    steps=self.steps,
                )
            )  # fmt: skip
        drawn = np.concatenate(parts)
        return drawn.reshape(len(texts), len(seeds), *drawn.shape[1:])

    def _decode(self, task: Task, picture: np.ndarray, camera: Camera) -> Answer:
        """One picture at working size -> an answer at working size."""
        extras = {"prompt": self.prompt(task), "steps": self.steps}
        if task is Task.DEPTH:
            canonical_m, residual = self.depth_codec.decode(picture)
            focal_px = camera.fx * picture.shape[1] / camera.width
            depth_m = canonical_m * np.float32(focal_px / self.generator.card["focal_px"])
            return Answer(task=task, space=Space.METRIC, values=depth_m, residual=residual,
                          picture=picture, extras=extras)  # fmt: skip
        if task is Task.NORMALS:
            normals, residual = self.normal_codec.decode(picture, max_residual=NORMALS_MAX_RESIDUAL)
            return Answer(task=task, space=Space.UNIT_NORMALS, values=normals, residual=residual,
                          picture=picture, extras=extras)  # fmt: skip
        places, residual = self.palette.decode(picture)
        table = np.full(np.iinfo(places.dtype).max + 1, np.iinfo(places.dtype).max, places.dtype)
        table[: len(self.classes)] = list(self.classes)
        return Answer(task=task, space=Space.CLASS_IDS, values=table[places], residual=residual,
                      picture=picture, extras=extras)  # fmt: skip

    def _instances(self, draw: Any, semantic: Sequence[Answer]) -> list[Answer]:
        """One pass per class that any variant's semantic answer shows; passes joined by score."""
        seen = np.stack([a.values for a in semantic])
        by_name = {name: i for i, name in self.classes.items()}
        names = [n for n in self.things if (seen == by_name[n]).mean() >= THING_SHARE]
        shape = seen.shape[1:]
        empty = {"instances": [], "prompts": [], "steps": self.steps}
        if not names:
            return [
                Answer(task=Task.INSTANCES, space=Space.INSTANCE_IDS,
                       values=np.zeros(shape, np.uint16), extras=dict(empty))
                for _ in semantic
            ]  # fmt: skip
        texts = [self.prompt(Task.INSTANCES, name=n) for n in names]
        pictures = draw(texts)
        answers = []
        for k in range(len(semantic)):
            passes = []
            for name, drawn in zip(names, pictures[:, k], strict=True):
                ids, table = self.instance_codec.decode(drawn)
                passes.append((name, ids, table))
            values, merged = merge_passes(passes)
            for row in merged:
                row["class_id"] = by_name[row["class"]]
            extras = {"instances": merged, "prompts": texts, "steps": self.steps}
            answers.append(Answer(task=Task.INSTANCES, space=Space.INSTANCE_IDS, values=values,
                                  extras=extras))  # fmt: skip
        return answers

    def _merged(self, answers: list[Answer], asked: Sequence[Query], query: Query) -> Answer:
        """Bring every variant's answer to the query's pixels, undo it, and find the consensus."""
        height, width = query.image.shape[:2]
        whole = []
        for answer, variant, question in zip(answers, self.variants, asked, strict=True):
            h, w = question.image.shape[:2]
            whole.append(variant.undo(_resampled(answer, h, w), height=height, width=width))
        of_whole = sum(v.whole for v in self.variants)  # they come first
        merged = consensus.merge(whole, whole=of_whole)
        merged.extras["seeds"] = [key_seed(query.key, v.seed) for v in self.variants]
        return merged


def _resampled(answer: Answer, height: int, width: int) -> Answer:
    """The answer at another size by picking nearest pixel centres; nothing is averaged."""
    h, w = answer.values.shape[:2]
    if (h, w) == (height, width):
        return answer
    rows = ((np.arange(height) + 0.5) * h / height).astype(int)
    columns = ((np.arange(width) + 0.5) * w / width).astype(int)

    def pick(array: np.ndarray | None) -> Any:
        return None if array is None else np.ascontiguousarray(array[rows][:, columns])

    return Answer(task=answer.task, space=answer.space, values=pick(answer.values),
                  residual=pick(answer.residual), picture=pick(answer.picture),
                  uncertainty=pick(answer.uncertainty), extras=answer.extras)  # fmt: skip
