"""What instruction tuning owes to each of its parts: short runs of equal budget, judged on truth.

    python -m tests.benchmarks.tune_ablations TRAIN HELDOUT OUT --steps 500 edges curves parts

Half the scenes' size, one step, one seed, averaged weights; a run that is in OUT is not repeated.

``--init`` starts edges and curves from a trained generator, so that late training is compared.

edges    depth alone: the generator and a regression network (the same network, no noise, L1 of log
         depth) at three rates each, then each at its best rate by delta1 with two more seeds
long     the two of edges, at one rate and seed
curves   depth alone in other codes: cube walk, Hilbert curve of order 2 and 8, grey
parts    all tasks, started from generation pretraining; without it; with fewer scenes; without
         retention; ``drawing`` is the squared error of pictures from captions
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from distill.tune.adapter import SIGHT_SHARE, Losses, MiniAdapter
from distill.tune.look import Look
from distill.tune.module import TuneModule
from distill.tune.pairs import Batch, Pairs
from distill.tune.scenes_cache import (
    NO_CLASS,
    SKY_CODE,
    UNKNOWN_CODE,
    Scenes,
    depth_of_codes_m,
    load_scenes,
)
from distill.tune.stream import _take
from teacher import metrics, prompts
from teacher.codecs.depth import DepthCodec
from teacher.codecs.normals import NormalCodec
from teacher.generators.mini_generator import MiniGenerator, noise_for, text_batch, to_pictures
from teacher.generators.mini_net import Features

NEAR_M, FAR_M, SKY_M = 0.3, 40.0, 60.0
RATES = (4e-4, 1.2e-3, 3e-3)
ALL = {"depth": 4.0, "normals": 3.0, "semantic": 2.0, "instances": 2.0}
RETAINED = {**{k: v * 0.92 / 11 for k, v in ALL.items()}, "generate": 0.08}
CODECS = {
    "cube walk": DepthCodec(),
    "Hilbert, order 2": DepthCodec(curve="hilbert", order=2),
    "Hilbert, order 8": DepthCodec(curve="hilbert", order=8),
}


class Regressor(MiniAdapter):
    """The same network read as log depth: no noise, one time, mean absolute error."""

    def read(self, batch: Batch) -> tuple[Tensor, Features]:
        """Log depth [N, H, W], the first output channel; and what the encoder saw."""
        net = self.net
        text = text_batch(batch.prompts, max_tokens=net.max_tokens, device=batch.image.device)
        seen = net.encode_image(batch.image)
        features, still = self._features(batch, seen), torch.zeros_like(batch.noise)
        drawn = net.decode(still, torch.ones_like(batch.s), net.text(text), features)
        return drawn[:, 0].float(), seen

    def losses(self, batch: Batch, *, step: int) -> Losses:
        """Mean |ln ratio|, beside the encoder's own sight; the sky is taken for `SKY_M`."""
        log_depth, seen = self.read(batch)
        per_pair = ((log_depth - batch.answer[:, 0]).abs() * batch.weight[:, 0]).mean((1, 2))
        total = per_pair.mean() + SIGHT_SHARE * self.sight(seen.quarter, batch)
        return Losses(total, per_pair.detach(), total.detach())


def depth_table(name: str) -> np.ndarray:
    """[65536, 3] answer in [-1, 1] of every depth code: a curve, grey, or the log depth itself."""
    metres = depth_of_codes_m()
    metres[UNKNOWN_CODE], metres[SKY_CODE - 1 :] = np.nan, np.inf
    if name == "log depth":
        log = np.log(np.clip(np.nan_to_num(metres, nan=1.0, posinf=SKY_M), 0.05, SKY_M))
        return np.repeat(log[:, None], 3, axis=1).astype(np.float32)
    if name == "grey":
        u = np.clip(np.arange(65536) / (SKY_CODE - 1), 0, 1)
        return np.repeat(u[:, None] * 2 - 1, 3, axis=1).astype(np.float32)
    return CODECS[name].encode(metres.astype(np.float32)).astype(np.float32) / 127.5 - 1


def decoded(name: str, picture: np.ndarray) -> np.ndarray:
    """Depth [m] of an answer; unknown counts as near, sky as far."""
    if name == "grey":
        levels = picture.mean(-1) / 255 * (SKY_CODE - 1)
        depth_m = depth_of_codes_m()[np.clip(levels.round(), 1, SKY_CODE - 2).astype(int)]
    else:
        depth_m = CODECS[name].decode(picture)[0]
    return clipped(np.nan_to_num(depth_m, nan=NEAR_M, posinf=FAR_M))


def clipped(depth_m: np.ndarray) -> np.ndarray:
    """Within the judged range."""
    return np.clip(depth_m, NEAR_M, FAR_M).astype(np.float32)


@dataclass
class Run:
    """One network: how it is trained, and on what."""

    name: str
    lr: float = 1.2e-3
    seed: int = 0
    steps: int = 0
    scenes: int = 0
    shares: dict[str, float] | None = None
    code: str = "cube walk"
    start: str = ""

    @property
    def regression(self) -> bool:
        """Whether it is the regression network."""
        return self.code == "log depth"


class Steps(IterableDataset):
    """(step, batch) of one source."""

    def __init__(self, pairs: Pairs, steps: int) -> None:
        self.pairs, self.steps = pairs, steps

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        for step in range(self.steps):
            yield step, self.pairs.draw(step)


def trained(run: Run, scenes: Scenes, out: Path, init: str | None) -> MiniAdapter:
    """The averaged network of a run, from OUT if it is there."""
    torch.manual_seed(run.seed)
    adapter = Regressor() if run.regression else MiniAdapter()
    path = out / f"{run.name}.safetensors"
    if not path.exists():
        if init and not run.start:
            adapter.net.load_state_dict(MiniGenerator.from_pretrained(init).net.state_dict())
        if run.start:
            adapter.network.load_state_dict(load_file(out / f"{run.start}.safetensors"))
        single = sum(v > 0 for v in run.shares.values()) == 1
        picked = np.linspace(0, len(scenes) - 1, run.scenes or len(scenes)).astype(int)
        pairs = Pairs(
            _take(scenes, picked), weights=run.shares, batch=16 if single else 32,
            prompts_per_image=1 if single else 2, single_step_share=0.6, seed=run.seed,
            colour_map_share=0.1 if run.code == "cube walk" and not single else 0.0,
        )  # fmt: skip
        pairs.tables["cube-walk"] = depth_table(run.code)
        module = TuneModule(adapter, peak_lr=run.lr, warmup=50, steps=run.steps,
                            decay=run.steps // 3, ema=0.99)  # fmt: skip
        trainer = L.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(Steps(pairs, run.steps), batch_size=None))
        part = path.with_suffix(".part")
        save_file({k: v.contiguous() for k, v in module.averaged.items()}, part)
        part.replace(path)
    adapter.network.load_state_dict(load_file(path))
    adapter.network.eval()
    return adapter


@torch.inference_mode()
def judged(run: Run, adapter: MiniAdapter, held: Scenes) -> dict[str, float]:
    """Mean scores over the held-out scenes of what the run was taught."""
    rows: dict[str, list[float]] = {}
    metres = depth_of_codes_m()
    for kind in run.shares:
        every = {k: float(k == kind) for k in prompts.KINDS}
        source = Pairs(held, weights=every, batch=len(held), prompts_per_image=1,
                       single_step_share=1.0, colour_map_share=0.0, seed=7)  # fmt: skip
        for at in np.array_split(np.arange(len(held)), max(1, len(held) // 16)):
            batch = _asked(source, kind, at)
            if kind == "generate":
                rows.setdefault("drawing", []).append(_drawing(adapter, batch))
                continue
            with torch.autocast("cpu", torch.bfloat16):
                if run.regression:
                    depths = list(adapter.read(batch)[0].exp().numpy())
                else:
                    pictures = to_pictures(adapter.draw(batch, steps=1))
            for n, index in enumerate(at):
                if kind == "depth":
                    truth = metres[held.depth[index]].astype(np.float32)
                    sky = held.depth[index] >= SKY_CODE - 1
                    found = clipped(depths[n]) if run.regression else decoded(run.code, pictures[n])
                    scores = metrics.depth_metrics(found, truth, min_m=NEAR_M, max_m=FAR_M)
                    scores["boundary_f1"] = metrics.boundary_f1(found, np.where(sky, np.inf, truth))
                    for name in ("delta1", "abs_rel", "boundary_f1"):
                        rows.setdefault(name, []).append(scores[name])
                elif kind == "normals":
                    normals = NormalCodec().decode(pictures[n])[0]
                    normals[np.isnan(normals[..., 0])] = (0, 0, 1)
                    truth = held.normals[index].astype(np.float32) / 127
                    truth[~truth.any(-1)] = np.nan
                    scores = metrics.normal_metrics(normals, truth)
                    rows.setdefault("normals_deg", []).append(scores["mean_deg"])
                else:
                    gap = np.abs(pictures[n].astype(int) - to_pictures(batch.answer)[n]).max(-1)
                    known = batch.weight[n, 0].numpy() > 0
                    rows.setdefault(f"{kind}_right", []).append(float((gap[known] < 40).mean()))
    return {k: round(float(np.nanmean(v)), 4) for k, v in rows.items()}


def _asked(source: Pairs, kind: str, at: np.ndarray) -> Batch:
    """Pairs of ``kind`` of the scenes ``at``, as they are: no mirror, no jitter."""
    seeds = [1000 + int(i) for i in at]
    h, w = source.scenes.image.shape[1:3]
    noise = noise_for(seeds, (h, w))
    means = (noise.mean((2, 3)) * np.sqrt(h * w)).numpy()
    images, texts, answers, weights = [], [], [], []
    for n, index in enumerate(at):
        rng = np.random.default_rng(seeds[n])
        image = source.scenes.image[index].transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
        text, answer, weight = source.pair(
            int(index), kind, Look.whole((h, w), False), means[n], rng
        )
        images.append(image)
        texts.append(text)
        answers.append(image if answer is None else answer.transpose(2, 0, 1))
        weights.append(weight[None])
    count = len(at)
    quarter = torch.zeros(count, h // 4, w // 4)
    return Batch(
        image=torch.from_numpy(np.stack(images)), owner=torch.arange(count),
        has_image=torch.full((count,), kind != "generate"), prompts=texts,
        kinds=torch.full((count,), prompts.KINDS.index(kind)),
        answer=torch.from_numpy(np.ascontiguousarray(np.stack(answers))),
        weight=torch.from_numpy(np.stack(weights)), noise=noise, s=torch.ones(count),
        log_depth=quarter, normals=quarter[:, None].repeat(1, 3, 1, 1),
        semantic=torch.full(quarter.shape, NO_CLASS, dtype=torch.long),
    )  # fmt: skip


def _drawing(adapter: MiniAdapter, batch: Batch) -> float:
    """Squared error of the picture guessed from its caption, at five times."""
    net, errors = adapter.net, []
    prompt = net.text(text_batch(batch.prompts, max_tokens=net.max_tokens,
                                 device=batch.image.device))  # fmt: skip
    nothing = net.no_image(tuple(batch.answer.shape[2:]), len(batch.prompts))
    for s in (0.1, 0.3, 0.5, 0.7, 0.9):
        noisy = (1 - s) * batch.answer + s * batch.noise
        guess = net(noisy, torch.full((len(batch.prompts),), s), prompt, nothing)
        errors.append(float((guess - batch.answer).square().mean()))
    return float(np.mean(errors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train", help="a label set, or several, with commas")
    parser.add_argument("heldout")
    parser.add_argument("out", type=Path)
    parser.add_argument("groups", nargs="+", choices=("edges", "long", "curves", "parts"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--limit", type=int, default=200, help="held-out scenes")
    parser.add_argument("--init", help="a generator.safetensors; not for parts")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(many workers|__len__|LeafSpec).*")
    given.out.mkdir(parents=True, exist_ok=True)
    scenes = load_scenes(given.train.split(","), cache=str(given.out / "cache-train")).halved()
    held = load_scenes(given.heldout, cache=str(given.out / "cache-held")).halved()
    held = _take(held, np.linspace(0, len(held) - 1, min(given.limit, len(held))).astype(int))
    results = given.out / "results.json"
    told: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}

    def go(run: Run) -> dict[str, float]:
        run = replace(run, steps=run.steps or given.steps)
        if run.name not in told:
            found = judged(run, trained(run, scenes, given.out, given.init), held)
            told[run.name] = {**vars(run), "train_scenes": run.scenes or len(scenes), **found}
            results.write_text(json.dumps(told, indent=1) + "\n")
            print(told[run.name], flush=True)
        return told[run.name]

    depth = {"depth": 1.0}
    if "edges" in given.groups:
        for what, code in (("generator", "cube walk"), ("regression", "log depth")):
            tried = [go(Run(f"{what}-{lr:g}", lr=lr, shares=depth, code=code)) for lr in RATES]
            best = max(tried, key=lambda row: row["delta1"])["lr"]
            for seed in (1, 2):
                go(Run(f"{what}-{best:g}-s{seed}", lr=best, seed=seed, shares=depth, code=code))
    if "long" in given.groups:
        for what, code in (("generator", "cube walk"), ("regression", "log depth")):
            go(Run(f"{what}-{given.steps}-steps", shares=depth, code=code))
    if "curves" in given.groups:
        go(Run("generator-0.0012", shares=depth))
        for code in ("Hilbert, order 2", "Hilbert, order 8", "grey"):
            go(Run(code.replace(", order ", "-"), shares=depth, code=code))
    if "parts" in given.groups:
        if given.init:
            parser.error("parts asks what pretraining is worth: it takes no --init")
        go(Run("drawing-only", shares={"generate": 1.0}))
        go(Run("all", shares=RETAINED, start="drawing-only"))
        go(Run("no-pretraining", shares=RETAINED))
        go(Run("no-pretraining-same-total", shares=RETAINED, steps=2 * given.steps))
        for count in (64, 256):
            go(Run(f"{count}-scenes", shares=RETAINED, start="drawing-only", scenes=count))
        go(Run("no-retention", shares={**ALL, "generate": 0.0}, start="drawing-only"))


if __name__ == "__main__":
    main()
