"""What tuning needs of a generator, and the mini generator's answer to it.

Another generator (an editing pipeline with LoRA, say) joins by a class with these members; the
data, the loop, resume, EMA and the sheets stay the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.tune.pairs import Batch
from distill.tune.scenes_cache import NO_CLASS
from teacher import prompts
from teacher.generators.mini_generator import MiniGenerator, draw, text_batch
from teacher.generators.mini_net import Features, MiniNet, Prompt
from teacher.prompts import KINDS
from teacher.wordings import SLOTS

HUBER = 0.1  # RGB distance (of [-1, 1]) below which the robust loss is quadratic
MSE_SHARE, TASK_SHARE, POINT_SHARE, SIGHT_SHARE = 0.25, 0.05, 0.1, 0.3
READ_PER_BATCH = 96  # requests that are only read, not answered; half of them are foreign
WORD_DROPOUT = 0.15


def reading_lesson(rng: np.random.Generator, count: int) -> tuple[list[str], list[int]]:
    """``count`` random requests and what they ask (indices of `KINDS`), for the text encoder alone.

    Reading is cheap beside drawing, so it is practised on many more sentences than are drawn: every
    second one is foreign, every second pair loses words at random (Iyyer et al., ACL 2015), so that
    no single word decides. Class names are everyday things, scene classes or not.
    """
    texts, kinds = [], []
    things = [*SLOTS["thing"], *SLOTS["thing_too"]]
    for n in range(count):
        kind = KINDS[int(rng.integers(4))] if n % 2 else "other"
        if kind == "depth":
            text = prompts.depth(colour_map=str(rng.choice(prompts.COLOUR_MAPS)), rng=rng)
        elif kind == "normals":
            text = prompts.normals(rng=rng)
        elif kind == "semantic":
            names = rng.choice(things, int(rng.integers(2, 6)), replace=False)
            colours = prompts.distinct_colours(len(names), rng=rng)
            notation = prompts.NOTATIONS[int(rng.integers(len(prompts.NOTATIONS)))]
            palette = dict(zip((str(name) for name in names), colours, strict=True))
            text = prompts.semantic(palette, notation=notation, rng=rng)
        elif kind == "instances":
            colour = str(rng.choice(["black", "white", "grey", "#203040", "<9, 0, 200>"]))
            text = prompts.instances(str(rng.choice(things)), background=colour, rng=rng)
        else:
            text = prompts.unknown(rng=rng)
        if n % 4 < 2:
            words = text.split()
            kept = [w for w in words if rng.random() > WORD_DROPOUT]
            text = " ".join(kept if len(kept) > 1 else words)
        texts.append(text)
        kinds.append(KINDS.index(kind))
    return texts, kinds


class Losses(NamedTuple):
    """A scalar to minimise and per-pair numbers [N] for the log."""

    total: Tensor
    per_pair: Tensor
    text: Tensor


class Generator(Protocol):
    """A trainable generator: one network, one loss, one way to draw, one way to be saved."""

    @property
    def network(self) -> nn.Module:
        """The module whose parameters are trained."""
        ...

    def losses(self, batch: Batch, *, step: int) -> Losses:
        """The training loss of a batch."""
        ...

    def draw(self, batch: Batch, *, steps: int) -> Tensor:
        """Pictures [N, 3, H, W] for the batch's images, prompts and noise."""
        ...

    def save(self, path: str, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write ``weights`` of the network so that the generator's teacher can load them."""
        ...


class Sight(nn.Module):
    """Reads depth, normals and classes straight off the image encoder, while it is being trained.

    Deep supervision (Lee et al., arXiv 1409.5185): every image teaches the encoder all it shows,
    not only what its prompts happen to ask. It is thrown away with the optimiser.
    """

    def __init__(self, channels: int) -> None:
        """``channels`` of the encoder's features at 1/4."""
        super().__init__()
        self.read = nn.Conv2d(channels, 1 + 3 + NO_CLASS, 1)

    def forward(self, quarter: Tensor, batch: Batch) -> Tensor:
        """Features [B, C, H/4, W/4] -> scalar loss: |log depth|, 1 - cos of normals, classes."""
        read = self.read(quarter).float()
        far = batch.log_depth.isfinite()
        depth = (read[:, 0] - batch.log_depth.nan_to_num()).abs()[far]
        surface = batch.normals.square().sum(1) > 0.25
        cosine = F.cosine_similarity(read[:, 1:4], batch.normals, dim=1)[surface]
        known = batch.semantic != NO_CLASS
        logits, wanted = read[:, 4:].permute(0, 2, 3, 1)[known], batch.semantic[known]
        classes = F.cross_entropy(logits, wanted, reduction="none")
        losses = (depth, 1 - cosine, classes)
        return torch.stack([x.sum() / max(x.numel(), 1) for x in losses]).sum()


class MiniAdapter:
    """`Generator` for `MiniNet`."""

    def __init__(self, sizes: dict[str, int] | None = None) -> None:
        """``sizes`` are `MiniNet` arguments that differ from its defaults."""
        self.sizes = dict(sizes or {})
        self.net = MiniNet(**self.sizes).to(memory_format=torch.channels_last)
        self.sight = Sight(self.net.null[1].numel())
        self.network = nn.ModuleDict({"net": self.net, "sight": self.sight})

    def _features(self, batch: Batch, seen: Features) -> Features:
        net, encoded = self.net, seen.select(batch.owner)
        size = (batch.answer.shape[2], batch.answer.shape[3])
        nothing = net.no_image(size, len(batch.prompts))
        keep = batch.has_image[:, None, None, None]
        mixed = [torch.where(keep, a, b) for a, b in zip(encoded, nothing, strict=True)]
        return Features(*mixed)

    def losses(self, batch: Batch, *, step: int) -> Losses:
        """Robust RGB distance to the answer, plus what makes the network learn it sooner.

        Answers to an instruction use sqrt(|e|^2 + c^2) - c over the colour vector, whose minimiser
        is the geometric median: between two possible colours it picks one and never their blend.
        Pure generation keeps the squared error that the flow is derived from. Added are the task
        head's cross-entropy, the pointer's (which of the prompt's colours a pixel has is known for
        semantic answers) and the encoder's own sight (`Sight`).
        """
        net, device = self.net, batch.answer.device
        read, asked = reading_lesson(np.random.default_rng(step), READ_PER_BATCH)
        n = len(batch.prompts)
        text = text_batch([*batch.prompts, *read], max_tokens=net.max_tokens, device=device)
        everything = net.text(text)
        kinds = torch.cat([batch.kinds, batch.kinds.new_tensor(asked)])
        text_loss = F.cross_entropy(everything.kinds.float(), kinds)

        s = batch.s[:, None, None, None]
        noisy = (1 - s) * batch.answer + s * batch.noise
        prompt = everything.first(n)
        seen = net.encode_image(batch.image)
        x = net.decode(noisy, batch.s, prompt, self._features(batch, seen))
        clean = net.paint(x, prompt)
        square = (clean.float() - batch.answer).square().sum(1, keepdim=True)
        robust = (square + HUBER**2).sqrt() - HUBER
        drawing = (batch.kinds == KINDS.index("generate"))[:, None, None, None]
        per_pixel = torch.where(drawing, square, robust + MSE_SHARE * square) * batch.weight
        per_pair = per_pixel.mean((1, 2, 3))
        total = per_pair.mean() + TASK_SHARE * text_loss
        total = total + POINT_SHARE * self._pointing(x, prompt, batch)
        total = total + SIGHT_SHARE * self.sight(seen.quarter, batch)
        return Losses(total, per_pair.detach(), text_loss.detach())

    def _pointing(self, x: Tensor, prompt: Prompt, batch: Batch) -> Tensor:
        """Cross-entropy of pointing at the answer's colour; zero without a semantic pair."""
        asked = (batch.kinds == KINDS.index("semantic")) & prompt.text.colour_mask.any(1)
        rows = asked.nonzero()[:, 0]
        if not len(rows):
            return x.new_zeros((), dtype=torch.float32)
        scores, rgb = self.net.point(x, prompt, rows)
        answer = batch.answer[rows].flatten(2).transpose(1, 2)
        gap = torch.cdist(answer, rgb).masked_fill(
            ~prompt.text.colour_mask[rows][:, None], torch.inf
        )
        known = batch.weight[rows].flatten(1)
        loss = F.cross_entropy(scores, gap.argmin(2), reduction="none") * known
        return loss.sum() / known.sum().clamp_min(1)

    def draw(self, batch: Batch, *, steps: int) -> Tensor:
        """See `Generator.draw`."""
        features = self._features(batch, self.net.encode_image(batch.image))
        return draw(self.net, batch.prompts, features, batch.noise, steps=steps)

    def save(self, path: str, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """See `Generator.save`."""
        own = {k.removeprefix("net."): v for k, v in weights.items() if k.startswith("net.")}
        MiniGenerator.save(path, own, {"network": self.sizes, **facts})
