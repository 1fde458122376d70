"""The mini generator as a pipeline: image or none + prompt + seed + steps -> RGB picture.

The flow's integration, the noise, loading and saving; the network is in `mini_net.py`, and what
makes a teacher of it in `mini.py`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from teacher.errors import UsageError
from teacher.generators.mini_net import Features, MiniNet, Text
from teacher.generators.mini_text import parse_colour, tokenize, words
from teacher.generators.runtime import has_bfloat16
from teacher.prompts import KINDS

FORMAT, VERSION = "mini-generator", 1
WEIGHTS = Path(__file__).parent.parent / "weights" / "mini.safetensors"
REFUSE_BELOW = 0.5  # probability that the prompt asks for something the generator was tuned for


def text_batch(texts: Sequence[str], *, max_tokens: int, device: torch.device) -> Text:
    """Prompts -> stacked tokens on ``device``, cut to the longest of the batch."""
    tokens = [tokenize(t, max_tokens=max_tokens) for t in texts]
    length = max(1, max(int(t.mask.sum()) for t in tokens))
    ngrams, rgb, mask, at, colour_mask = (
        torch.from_numpy(np.stack(part)) for part in zip(*tokens, strict=True)
    )
    colours = max(1, int(colour_mask.sum(1).max()))
    cut = (ngrams[:, :length], rgb[:, :length], mask[:, :length],
           at[:, :colours], colour_mask[:, :colours])  # fmt: skip
    return Text(*(t.to(device) for t in cut))


def draw(
    net: MiniNet, texts: Sequence[str], features: Features, noise: Tensor, *, steps: int
) -> Tensor:
    """Integrate the flow from noise [N, 3, H, W] at s = 1 to s = 0 in ``steps`` equal steps.

    One step returns the network's first estimate of the clean picture. float32 in [-1, 1].
    """
    prompt = net.text(text_batch(texts, max_tokens=net.max_tokens, device=noise.device))
    x, times = noise, torch.linspace(1, 0, steps + 1).tolist()
    for start, end in itertools.pairwise(times):
        s = torch.full((len(texts),), start, device=noise.device)
        clean = net(x, s, prompt, features).float()
        x = clean + (end / start) * (x - clean)
    return x.clamp(-1, 1)


def noise_for(seeds: Sequence[int], size: tuple[int, int]) -> Tensor:
    """One noise picture [3, H, W] per seed, the same on every device and in every batch."""
    pictures = [
        torch.randn(3, *size, generator=torch.Generator().manual_seed(s % 2**63)) for s in seeds
    ]
    return torch.stack(pictures)


def key_seed(key: str, seed: int) -> int:
    """The noise seed of image ``key``: answers never depend on what else is in the batch."""
    return int.from_bytes(hashlib.sha256(f"{key}/{seed}".encode()).digest()[:7], "big")


def to_pictures(x: Tensor) -> np.ndarray:
    """[N, 3, H, W] in [-1, 1] -> uint8 [N, H, W, 3]."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(
        0, 2, 3, 1
    ).cpu().numpy()  # fmt: skip


class MiniGenerator:
    """Image (or none) + prompt + seed + steps -> RGB picture, as a diffusers pipeline would.

    Images are resampled to the size the network was tuned at; the picture comes back in that
    size's pixels (`working_size`), because an encoded picture must not be resampled.
    """

    def __init__(self, net: MiniNet, card: dict[str, Any], *, sha256: str = "") -> None:
        """``card`` is the JSON beside the weights: network sizes, tuning size, provenance."""
        self.net, self.card, self.sha256 = net, card, sha256
        self.device = next(net.parameters()).device
        self.dtype = torch.bfloat16 if has_bfloat16(self.device) else torch.float32

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str] = WEIGHTS, *, device: str = "cpu"
    ) -> MiniGenerator:
        """Load ``mini.safetensors`` and the ``.json`` card beside it."""
        weights = Path(path)
        card_path = weights.with_suffix(".json")
        if not weights.exists() or not card_path.exists():
            raise UsageError(
                f"mini teacher: {weights} (with its .json card) not found; the shipped ones"
                f" are {WEIGHTS}, `distill tune` makes others"
            )
        card = json.loads(card_path.read_text())
        if card.get("format") != FORMAT or card.get("version", 0) > VERSION:
            found = f"{card.get('format')} version {card.get('version')}"
            raise UsageError(f"{card_path}: found {found}, expected {FORMAT} version <= {VERSION}")
        net = MiniNet(**card["network"])
        stored = {k: v.float() for k, v in load_file(weights).items()}
        try:
            net.load_state_dict(stored)
        except RuntimeError as error:
            raise UsageError(f"{weights} does not fit the card beside it: {error}") from None
        net.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
        sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
        return cls(net, card, sha256=sha256)

    @staticmethod
    def save(
        path: str | os.PathLike[str], weights: dict[str, Tensor], card: dict[str, Any]
    ) -> Path:
        """Write float16 weights and the card, each atomically; returns the weights' path."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        half = {k: v.detach().cpu().to(torch.float16).contiguous() for k, v in weights.items()}
        part = target.with_name(target.name + ".part")
        save_file(half, part, metadata={"format": FORMAT})
        part.replace(target)
        full = {"format": FORMAT, "version": VERSION, **card}
        card_part = target.with_name(target.stem + ".json.part")
        card_part.write_text(json.dumps(full, indent=1, sort_keys=True) + "\n")
        card_part.replace(target.with_suffix(".json"))
        return target

    def working_size(self, height: int, width: int) -> tuple[int, int]:
        """The multiple-of-8 size nearest the image's shape with the tuning size's area."""
        tuned_h, tuned_w = self.card["size"]
        scale = (tuned_h * tuned_w / (height * width)) ** 0.5
        return max(8, round(height * scale / 8) * 8), max(8, round(width * scale / 8) * 8)

    def kind_of(self, prompt: str) -> tuple[str, float]:
        """What the prompt asks for (one of `prompts.KINDS`) and its probability."""
        with torch.inference_mode():
            text = text_batch([prompt], max_tokens=self.net.max_tokens, device=self.device)
            share = self.net.text(text).kinds.softmax(-1)[0]
        best = int(share.argmax())
        return KINDS[best], float(share[best])

    def refuse_unknown(self, prompt: str) -> None:
        """Raise `UsageError` for a request the generator was not tuned for."""
        kind, share = self.kind_of(prompt)
        if kind == "other" or share < REFUSE_BELOW:
            known = ", ".join(KINDS[:-1])
            raise UsageError(
                f"mini teacher: the prompt {prompt!r} reads as {kind!r} ({share:.0%}); it was tuned"
                f" for {known}; see teacher/prompts.py for wordings"
            )
        if kind in ("semantic", "instances") and not any(map(parse_colour, words(prompt))):
            needed = {"semantic": "every class", "instances": "the background"}[kind]
            raise UsageError(
                f"mini teacher: the prompt {prompt!r} reads as {kind!r} but names no colour; it"
                f" answers in the colours of the prompt: name that of {needed}"
            )

    def _autocast(self) -> torch.autocast:
        exact = self.dtype is torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=not exact)

    def encode(self, images: Sequence[np.ndarray], size: tuple[int, int]) -> Features:
        """uint8 [H, W, 3] images, resampled to ``size`` (area mean when shrinking) -> features."""
        resized = []
        for image in images:
            x = torch.from_numpy(np.ascontiguousarray(image)).to(self.device)
            x = x.permute(2, 0, 1)[None].float() / 127.5 - 1
            if x.shape[2:] != size:
                x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
            resized.append(x)
        with torch.inference_mode(), self._autocast():
            return self.net.encode_image(torch.cat(resized))

    def pictures(
        self, features: Features, texts: Sequence[str], seeds: Sequence[int], *, steps: int
    ) -> np.ndarray:
        """One picture uint8 [N, h, w, 3] per row of ``features``, prompt and seed."""
        size = (features.half.shape[2] * 2, features.half.shape[3] * 2)
        noise = noise_for(seeds, size).to(self.device)
        with torch.inference_mode(), self._autocast():
            return to_pictures(draw(self.net, texts, features, noise, steps=steps))

    def __call__(
        self,
        image: np.ndarray | None,
        prompt: str,
        *,
        seed: int = 0,
        steps: int = 1,
        size: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """One picture uint8 [h, w, 3]; without an image the prompt is a caption to be drawn."""
        self.refuse_unknown(prompt)
        tuned_h, tuned_w = self.card["size"]
        if image is None:
            size = size or (tuned_h, tuned_w)
            features = self.net.no_image(size, 1)
        else:
            size = size or self.working_size(image.shape[0], image.shape[1])
            features = self.encode([image], size)
        return self.pictures(features, [prompt], [seed], steps=steps)[0]
