"""(image, instruction, RGB answer) triples drawn from scenes with truth: what tuning learns from.

Everything random comes from one generator per step, so a resumed run sees the same batches.
Pictures are float32 [3, H, W] in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from distill.tune.look import Look, as_picture
from distill.tune.readings import STYLES, framed
from distill.tune.scenes_cache import (
    CODES,
    NO_CLASS,
    SKY_CODE,
    UNKNOWN_CODE,
    Scenes,
    depth_of_codes_m,
)
from teacher import prompts
from teacher.prompts import KINDS, NOTATIONS, RGB

DISTRACTORS = ("cat", "car", "tree", "person", "book", "cup", "dog", "curtain", "river", "bird",
               "guitar", "window blind", "plate", "shoe", "cloud", "bicycle")  # fmt: skip
_CUBE = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1],
                  [1, 1, 1]], np.float32)  # fmt: skip


@dataclass
class Batch:
    """N pairs over B images, N = B x prompts per image.

    image [B, 3, H, W]; owner int64 [N], the image of each pair; has_image bool [N]; prompts and
    kinds [N]; answer [N, 3, H, W]; weight [N, 1, H, W], 0 where the truth is unknown;
    noise [N, 3, H, W]; s [N] in (0, 1]. Truth at every fourth pixel of each image, whatever was
    asked: log_depth [B, h, w] (NaN unknown or sky), normals [B, 3, h, w] (0 unknown), semantic
    int64 [B, h, w] (`NO_CLASS` unknown).
    """

    image: Tensor
    owner: Tensor
    has_image: Tensor
    prompts: list[str]
    kinds: Tensor
    answer: Tensor
    weight: Tensor
    noise: Tensor
    s: Tensor
    log_depth: Tensor
    normals: Tensor
    semantic: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        moved: dict[str, Any] = {
            k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v
            for k, v in vars(self).items()
        }
        return Batch(**moved)


def colour_table(colour_map: str) -> np.ndarray:
    """[65536, 3] float32 RGB in [-1, 1] of every depth code; unknown black, sky white."""
    u = np.clip(np.arange(65536) / CODES, 0, 1)
    if colour_map == "cube-walk":
        s = u * 7
        k = np.minimum(s.astype(int), 6)
        t = (s - k)[:, None].astype(np.float32)
        table = _CUBE[k] * (1 - t) + _CUBE[k + 1] * t
    elif colour_map == "grey":
        table = np.repeat(u[:, None], 3, axis=1).astype(np.float32)
    else:
        table = matplotlib.colormaps[colour_map](u)[:, :3].astype(np.float32)
    table[UNKNOWN_CODE], table[SKY_CODE] = 0, 1
    return table.astype(np.float32) * 2 - 1


def instance_colours(masks: np.ndarray, *, mean: np.ndarray, background: RGB) -> np.ndarray:
    """Colours [K, 3] in [0, 1] of K instances, chosen by where they are and by the noise's mean.

    Any assignment of distinct colours is a right answer, so the one is taught that a network can
    read off: position in the picture (turned by an angle) in red and green, size in blue, in a
    band away from the background's blue. ``mean`` [3] is the whitened mean of the noise; its
    first two entries give the angle, the sign of the third the blue band's direction, so each seed
    draws its own colours and the colour is uniform over seeds.
    """
    k, h, w = masks.shape
    area = masks.reshape(k, -1).sum(1).clip(1)
    rows = (masks.sum(2) * np.arange(h)).sum(1) / area / max(h - 1, 1) - 0.5
    columns = (masks.sum(1) * np.arange(w)).sum(1) / area / max(w - 1, 1) - 0.5
    size = np.sqrt(area / (h * w)).clip(0, 0.6) / 0.6
    length = np.hypot(mean[0], mean[1]) + 1e-6
    cos, sin = mean[0] / length, mean[1] / length
    red = (cos * columns - sin * rows) / np.sqrt(2) + 0.5
    green = (sin * columns + cos * rows) / np.sqrt(2) + 0.5
    band = size if mean[2] > 0 else 1 - size
    blue = 0.6 + 0.4 * band if background[2] < 128 else 0.4 * band
    return np.stack([red, green, blue], axis=1).astype(np.float32)


class Pairs:
    """Draws batches; ``weights`` gives the share of each kind of request."""

    def __init__(
        self,
        scenes: Scenes,
        *,
        weights: Mapping[str, float],
        batch: int,
        prompts_per_image: int = 2,
        single_step_share: float = 0.35,
        colour_map_share: float = 0.1,
        two_readings_share: float = 0.0,
        window_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        """``batch`` counts pairs; it is a multiple of ``prompts_per_image``.

        ``two_readings_share`` of the images are framed (`readings.framed`) and asked for depth,
        if depth is asked at all; which reading is the answer depends on the sign of the whitened
        mean of the noise's first channel: a choice of the seed that one step can read off, each
        reading for half of them. ``window_share`` of the images show a window of their scene.
        """
        assert batch % prompts_per_image == 0
        self.scenes, self.batch, self.per_image, self.seed = scenes, batch, prompts_per_image, seed
        self.kinds = [k for k in KINDS if weights.get(k, 0) > 0]
        share = np.array([weights[k] for k in self.kinds], float)
        self.share = share / share.sum()
        self.single_step_share, self.colour_map_share = single_step_share, colour_map_share
        self.two_readings_share = two_readings_share if "depth" in self.kinds else 0.0
        self.window_share = window_share
        self.tables = {name: colour_table(name) for name in prompts.COLOUR_MAPS}
        with np.errstate(divide="ignore"):
            self.log_depth = np.log(depth_of_codes_m()).astype(np.float32)
        ids = np.unique(scenes.instance_class)
        self.distractors = [d for d in DISTRACTORS if d not in scenes.classes.values()]
        self.things = [int(i) for i in ids if i != NO_CLASS and int(i) in scenes.classes]

    def draw(self, step: int) -> Batch:
        """The batch of training step ``step``: the same for the same seed and scenes."""
        rng = np.random.default_rng([self.seed, step])
        torch_rng = torch.Generator().manual_seed(int(rng.integers(2**62)))
        count = self.batch // self.per_image
        at = rng.choice(len(self.scenes), count, replace=bool(len(self.scenes) < count))
        h, w = self.scenes.image.shape[1:3]
        noise = torch.randn(self.batch, 3, h, w, generator=torch_rng)
        mean = (noise.mean((2, 3)) * np.sqrt(h * w)).numpy()
        images, texts, kinds, answers, weights, truths = [], [], [], [], [], []
        for b, index in enumerate(at):
            mirror = bool(rng.random() < 0.5)
            whole = look = Look.whole((h, w), mirror)
            if self.window_share and rng.random() < self.window_share:
                look = Look.window((h, w), mirror, rng)
            image = self._augmented(int(index), look, rng)
            truth = self._truth(int(index), look)
            readings: tuple[np.ndarray, ...] = ()
            if self.two_readings_share and rng.random() < self.two_readings_share:
                style = str(rng.choice(STYLES))
                codes = look.depth(self.scenes.depth[index])
                image, readings = framed(image, codes, style=style)
                truth = (truth[0] * np.nan, truth[1] * 0, truth[2] * 0 + NO_CLASS)
            images.append(image)
            truths.append(truth)
            replace = bool(self.per_image > np.count_nonzero(self.share))
            chosen = rng.choice(len(self.kinds), self.per_image, p=self.share, replace=replace)
            for j, kind in enumerate(self.kinds[c] for c in chosen):
                n = b * self.per_image + j
                if readings:
                    kind = "depth"
                    codes = readings[int(mean[n, 0] > 0)]
                    text, answer = prompts.depth(rng=rng), self.tables["cube-walk"][codes]
                    weight = np.asarray(codes != UNKNOWN_CODE, np.float32)
                else:
                    shown = whole if kind == "generate" else look  # a caption tells of all
                    text, answer, weight = self.pair(int(index), kind, shown, mean[n], rng)
                texts.append(text)
                kinds.append(KINDS.index(kind))
                if answer is not None:
                    answers.append(as_picture(answer))
                else:
                    drawn = image if look is whole else self._augmented(int(index), whole, rng)
                    answers.append(drawn)
                weights.append(weight[None])
        s = torch.rand(self.batch, generator=torch_rng)
        single = torch.rand(self.batch, generator=torch_rng) < self.single_step_share
        kind_ids = torch.tensor(kinds)
        has_image = kind_ids != KINDS.index("generate")
        log_depth, normals, semantic = (
            torch.from_numpy(np.stack(part)) for part in zip(*truths, strict=True)
        )
        return Batch(
            image=torch.from_numpy(np.stack(images)),
            owner=torch.arange(count).repeat_interleave(self.per_image),
            has_image=has_image,
            prompts=texts,
            kinds=kind_ids,
            answer=torch.from_numpy(np.stack(answers)),
            weight=torch.from_numpy(np.stack(weights)),
            noise=noise,
            s=torch.where(single, 1.0, s.clamp_min(0.02)),
            log_depth=log_depth,
            normals=normals,
            semantic=semantic,
        )

    def _truth(self, index: int, look: Look) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log depth, normals and classes of a scene at every fourth pixel, see `Batch`."""
        at = (slice(2, None, 4), slice(2, None, 4))
        depth = look.depth(self.scenes.depth[index])[at]
        normals = look.normals(self.scenes.normals[index])[at]
        semantic = look.truth(self.scenes.semantic[index])[at]
        return self.log_depth[depth], as_picture(normals), semantic.astype(np.int64)

    def _augmented(self, index: int, look: Look, rng: np.random.Generator) -> np.ndarray:
        """A look at a scene as a picture, with exposure, gamma and white balance jittered."""
        x = look.image(self.scenes.image[index]) ** np.exp(rng.normal(0, 0.12))
        x = x * np.exp(rng.normal(0, 0.06, 3)).astype(np.float32) * np.exp(rng.normal(0, 0.08))
        x = x + rng.normal(0, rng.uniform(0, 0.015), x.shape)
        return as_picture(np.clip(x, 0, 1).astype(np.float32) * 2 - 1)

    def pair(
        self, index: int, kind: str, look: Look, mean: np.ndarray, rng: np.random.Generator
    ) -> tuple[str, Any, np.ndarray]:
        """Prompt, answer [H, W, 3] (None: the image itself) and weight [H, W] of one request."""
        scenes = self.scenes
        ones = np.ones(scenes.image.shape[1:3], np.float32)
        if kind == "depth":
            codes = look.depth(scenes.depth[index])
            others = prompts.COLOUR_MAPS[1:]
            alternative = rng.random() < self.colour_map_share
            colour_map = str(rng.choice(others)) if alternative else "cube-walk"
            known = np.asarray(codes != UNKNOWN_CODE, np.float32)
            return (
                prompts.depth(colour_map=colour_map, rng=rng),
                self.tables[colour_map][codes],
                known,
            )
        if kind == "normals":
            normals = look.normals(scenes.normals[index])
            normals[~normals.any(-1)] = -1  # black: no surface, as NormalCodec encodes NaN
            return prompts.normals(rng=rng), normals, ones
        if kind == "semantic":
            return self._semantic(look.truth(scenes.semantic[index]), rng)
        if kind == "instances":
            return self._instances(index, look, mean, rng)
        if kind == "generate":
            caption = scenes.captions[index]
            if look.mirror:
                caption = swap_sides(caption)
            return prompts.generate(caption, rng=rng), None, ones
        return prompts.unknown(rng=rng), None, ones * 0

    def _semantic(
        self, ids: np.ndarray, rng: np.random.Generator
    ) -> tuple[str, np.ndarray, np.ndarray]:
        present = [int(i) for i in np.unique(ids) if i != NO_CLASS]
        absent = [i for i in self.scenes.classes if i not in present]
        rng.shuffle(absent)
        named = present + absent[: max(0, min(len(absent), int(rng.integers(2, 20))))]
        rest = len(named) > 3 and rng.random() < 0.3  # some classes go unnamed
        if rest:
            rng.shuffle(named)
            named = named[: int(rng.integers(2, len(named)))]
        fakes = list(rng.choice(self.distractors, int(rng.integers(0, 3)), replace=False))
        names = [self.scenes.classes[i] for i in named] + fakes
        names += ["everything else"] if rest else []
        if rng.random() < 0.15:
            css = prompts.named_colours()
            texts = [str(t) for t in rng.choice(sorted(css), len(names), replace=False)]
            colours = [css[t] for t in texts]
            order = rng.permutation(len(names))
            listing = ", ".join(f"{names[i]}: {texts[i]}" for i in order) + "."
            text = prompts.fill(prompts.template("semantic", rng), rng, palette=listing)
        else:
            colours = prompts.distinct_colours(len(names), rng=rng)
            order = rng.permutation(len(names))
            palette = {names[i]: colours[i] for i in order}
            notation = NOTATIONS[int(rng.integers(len(NOTATIONS)))]
            text = prompts.semantic(palette, notation=notation, rng=rng)
        table = np.zeros((256, 3), np.float32)
        weight = np.zeros(256, np.float32)
        by_name = dict(zip(names, colours, strict=True))
        for i, name in self.scenes.classes.items():
            colour = by_name.get(name, by_name.get("everything else"))
            if colour is not None:
                table[i], weight[i] = np.array(colour) / 127.5 - 1, 1
        return text, table[ids], np.asarray(weight[ids])

    def _instances(
        self, index: int, look: Look, mean: np.ndarray, rng: np.random.Generator
    ) -> tuple[str, np.ndarray, np.ndarray]:
        ids = look.truth(self.scenes.instances[index])
        classes = self.scenes.instance_class[index]
        area = np.bincount(classes[ids[ids > 0]], minlength=256).astype(float)
        area[NO_CLASS] = 0
        if area.any() and rng.random() < 0.85:  # large things more often than specks
            wanted = int(rng.choice(256, p=np.sqrt(area) / np.sqrt(area).sum()))
        else:
            wanted = int(rng.choice(self.things))
        background: RGB = (0, 0, 0)
        choice = rng.random()
        if choice < 0.3:
            background = (255, 255, 255)
        elif choice < 0.5:
            background = prompts.distinct_colours(1, rng=rng)[0]
            background = (background[0], background[1], 0 if background[2] < 128 else 255)
        members = [int(i) for i in np.unique(ids) if i and classes[i] == wanted]
        answer = np.empty((*ids.shape, 3), np.float32)
        answer[:] = np.array(background, np.float32) / 255
        if members:
            masks = np.stack([ids == i for i in members])
            colours = instance_colours(masks, mean=mean, background=background)
            for mask, colour in zip(masks, colours, strict=True):
                answer[mask] = colour
        words = {(0, 0, 0): "black", (255, 255, 255): "white"}
        text = words.get(background, prompts.colour_text(background, "hex"))
        name = self.scenes.classes[wanted]
        prompt = prompts.instances(name, background=text, rng=rng)
        return prompt, answer * 2 - 1, np.ones(ids.shape, np.float32)


def swap_sides(caption: str) -> str:
    """The caption of the mirrored picture: left and right change places."""
    return caption.replace("left", "\0").replace("right", "left").replace("\0", "right")
