"""What tuning needs of a generator, and the mini generator's answer to it.

Another generator (an editing pipeline with LoRA, say) joins by a class with these members; the
data, the loop, resume, EMA and the sheets stay the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.tune.pairs import Batch
from teacher import prompts
from teacher.generators.mini_generator import MiniGenerator, draw, text_batch
from teacher.generators.mini_net import Features, MiniNet
from teacher.prompts import KINDS

HUBER = 0.1  # RGB distance (of [-1, 1]) below which the robust loss is quadratic
MSE_SHARE, TASK_SHARE = 0.25, 0.05
UNKNOWN_PER_BATCH = 8


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


class MiniAdapter:
    """`Generator` for `MiniNet`."""

    def __init__(self, sizes: dict[str, int] | None = None) -> None:
        """``sizes`` are `MiniNet` arguments that differ from its defaults."""
        self.sizes = dict(sizes or {})
        self.network = MiniNet(**self.sizes).to(memory_format=torch.channels_last)

    def _features(self, batch: Batch) -> Features:
        net = self.network
        encoded = net.encode_image(batch.image).select(batch.owner)
        size = (batch.answer.shape[2], batch.answer.shape[3])
        nothing = net.no_image(size, len(batch.prompts))
        keep = batch.has_image[:, None, None, None]
        mixed = [torch.where(keep, a, b) for a, b in zip(encoded, nothing, strict=True)]
        return Features(*mixed)

    def losses(self, batch: Batch, *, step: int) -> Losses:
        """Robust RGB distance to the answer, plus the task head's cross-entropy.

        Answers to an instruction use sqrt(|e|^2 + c^2) - c over the colour vector, whose minimiser
        is the geometric median: between two possible colours it picks one and never their blend.
        Pure generation keeps the squared error that the flow is derived from.
        """
        net, device = self.network, batch.answer.device
        rng = torch.Generator().manual_seed(step)
        at = torch.randint(len(prompts.UNKNOWN), (UNKNOWN_PER_BATCH,), generator=rng).tolist()
        free = [prompts.fill(prompts.UNKNOWN[i], _numpy_rng(step, i)) for i in at]
        n = len(batch.prompts)
        text = text_batch([*batch.prompts, *free], max_tokens=net.max_tokens, device=device)
        tokens, sentence, logits = net.text(text)
        kinds = torch.cat([batch.kinds, batch.kinds.new_full((len(free),), KINDS.index("other"))])
        text_loss = F.cross_entropy(logits.float(), kinds)

        s = batch.s[:, None, None, None]
        noisy = (1 - s) * batch.answer + s * batch.noise
        own = type(text)(*(t[:n] for t in text))
        prompt = (tokens[:n], sentence[:n], logits[:n])
        clean = net(noisy, batch.s, prompt, own, self._features(batch))
        square = (clean.float() - batch.answer).square().sum(1, keepdim=True)
        robust = (square + HUBER**2).sqrt() - HUBER
        drawing = (batch.kinds == KINDS.index("generate"))[:, None, None, None]
        per_pixel = torch.where(drawing, square, robust + MSE_SHARE * square) * batch.weight
        per_pair = per_pixel.mean((1, 2, 3))
        total = per_pair.mean() + TASK_SHARE * text_loss
        return Losses(total, per_pair.detach(), text_loss.detach())

    def draw(self, batch: Batch, *, steps: int) -> Tensor:
        """See `Generator.draw`."""
        features = self._features(batch)
        return draw(self.network, batch.prompts, features, batch.noise, steps=steps)

    def save(self, path: str, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """See `Generator.save`."""
        MiniGenerator.save(path, weights, {"network": self.sizes, **facts})


def _numpy_rng(*seed: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed)
