"""The lesson: one optimiser step, its learning rate, its moving average, and what a bad step does.

A step depends on nothing but the weights, the optimiser's state, the batch and the step's number:
the learning rate is a function of the number, torch's generator is seeded with it. That is why a
resumed lesson is the uninterrupted one.
"""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from distill.capture import save_capture
from distill.data import in_passes
from distill.features import FeatureLoss
from distill.losses import all_losses
from distill.parallel import add_gradients, agreed, rank
from distill.precision import DepthwiseInFloat32, Muon, autocast
from distill.trainer import TrainerConfig
from student.model import Student

FINAL_LR = 0.01  # share of the peak learning rate at the end of the cosine
FP16_SCALE = 2.0**14  # of the loss at the start; halved at every overflow
FP16_GROW = 500  # good steps after which the scale is doubled


class Diverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite. Exit 3."""

    exit_code = 3


def lr_factor(*, step: int, progress: float, warmup_steps: int) -> float:
    """Share of the peak learning rate: linear warm-up times a half cosine to `FINAL_LR`.

    ``progress`` in [0, 1] is how much of the lesson is over (Loshchilov & Hutter 2017, "SGDR",
    equation 5, one cycle).
    """
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
    return warm * (FINAL_LR + (1 - FINAL_LR) * cosine)


def layers_of(names: list[str]) -> dict[str, int]:
    """Parameter name -> number of its layer, in order; a layer ends with the last whole number.

    ``net.blocks.3.attn.qkv.weight`` belongs to ``net.blocks.3``; what comes before the first such
    layer is layer 0, what comes after the last one belongs to the last. The parts of a
    ``downsample`` are no layers: they belong to their block, or to what stands before them.
    """
    found: dict[str, int] = {}
    order: list[str] = []
    for name in names:
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        at = max((i for i in numbers if parts[i - 1] != "downsample"), default=-1)
        layer = ".".join(parts[: at + 1])
        if layer and layer not in order:
            order.append(layer)
        found[name] = order.index(layer) + 1 if layer else len(order)
    return found


def parameter_groups(
    student: Student, config: TrainerConfig, extra: nn.Module | None = None
) -> list[dict[str, Any]]:
    """Parameters by learning rate and weight decay.

    The backbone's rate falls by ``layer_decay`` per layer from its end to its beginning (Clark et
    al. 2020, "ELECTRA", section A; Bao et al. 2022, "BEiT"); ``extra`` counts as a head. Vectors
    do not decay, nor does what `timm` exempts by name (position embeddings, class tokens).
    """
    exempt = {
        f"{owner}.{name}"
        for owner, part in student.named_modules()
        for name in getattr(part, "no_weight_decay", set)()
    }
    named = list(student.named_parameters())
    layers = layers_of([n for n, _ in named if n.startswith("backbone.")])
    last = max(layers.values(), default=0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in (*named, *(extra.named_parameters() if extra is not None else ())):
        factor = 1.0
        if name in layers:
            factor = config.backbone_lr_factor * config.layer_decay ** (last - layers[name])
        decay = config.weight_decay if p.ndim > 1 and name not in exempt else 0.0
        groups.setdefault((factor, decay), []).append(p)
    return [
        {"params": params, "weight_decay": decay, "factor": factor}
        for (factor, decay), params in groups.items()
    ]


class MovingAverage:
    """Exponential moving average of a network; statistics of norms are copied, not averaged.

    The decay grows as (1 + t) / (10 + t) up to its value, so that early weights are forgotten.
    """

    def __init__(self, student: Student, *, decay: float) -> None:
        """Start as a copy of ``student``."""
        self.student = copy.deepcopy(student).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, student: Student, step: int) -> None:
        """Move towards ``student`` after its step number ``step``."""
        decay = min(self.decay, (1 + step) / (10 + step))
        mine: list[Tensor] = list(self.student.parameters())
        other: list[Tensor] = list(student.parameters())
        torch._foreach_lerp_(mine, other, 1 - decay)
        for a, b in zip(self.student.buffers(), student.buffers(), strict=True):
            a.copy_(b)


class Lesson(L.LightningModule):
    """A student being taught; Lightning brings device and loop.

    Attributes:
        step_number: optimiser steps done, skipped ones included, over all starts.
        skipped: steps skipped because loss or gradient was not finite.
        average: the moving average, which is what gets saved and validated.
        best, best_for: lowest validation loss so far, and validations since.
        validated_at: step of the last validation.
        trained_s, busy_s: seconds over all starts, and those inside steps since this start.
    """

    def __init__(
        self,
        student: Student,
        config: TrainerConfig,
        *,
        folder: Path | None = None,
    ) -> None:
        """Take the student over; its average starts as a copy. ``folder``: for captures."""
        super().__init__()
        self.automatic_optimization = False
        self.average = MovingAverage(student, decay=config.ema_decay)
        self.student, self.config, self.folder = student, config, folder
        self.features: FeatureLoss | None = None
        student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.step_number, self.skipped, self.skipped_in_a_row = 0, 0, 0
        self.best, self.best_for, self.good_steps = math.inf, 0, 0
        self.validated_at = 0
        self.trained_s, self.busy_s = 0.0, 0.0
        self.precision_name = "fp32"
        self.loss_scale = 1.0
        self.optimizer_state: dict[str, Any] | None = None
        self.last: dict[str, Tensor] = {}

    def learn_features(self, source: dict[str, Any]) -> None:
        """Also draw the student's features towards a frozen network's (`distill.features`)."""
        self.features = FeatureLoss(source, self.student)

    def set_precision(self, name: str) -> None:
        """Any of `distill.precision`; float16 gets a scaled loss (Micikevicius et al. 2018)."""
        self.precision_name = name
        if name == "fp16" and self.step_number == 0:
            self.loss_scale = FP16_SCALE

    def progress(self) -> float:
        """How much of the lesson is over, by steps or by minutes, whichever is further."""
        by_steps = self.step_number / self.config.steps
        if self.config.minutes is None:
            return by_steps
        return max(by_steps, self.trained_s / (60 * self.config.minutes))

    def taught(self) -> list[nn.Parameter]:
        """Everything that learns: the student, and what projects its features."""
        extra = list(self.features.parameters()) if self.features is not None else []
        return [*self.student.parameters(), *extra]

    def names(self) -> dict[Tensor, str]:
        """What learns by its name; a feature projection's parts begin with ``features.``."""
        found: dict[Tensor, str] = {p: name for name, p in self.student.named_parameters()}
        if self.features is not None:
            found |= {p: f"features.{name}" for name, p in self.features.named_parameters()}
        return found

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As configured, with the state of an interrupted lesson if there is one."""
        groups = parameter_groups(self.student, self.config, self.features)
        optimizer: torch.optim.Optimizer
        if self.config.optimizer == "muon":
            optimizer = Muon(groups, lr=self.config.lr, nesterov=True)
        else:
            optimizer = torch.optim.AdamW(groups, lr=self.config.lr, fused=True)
        if self.optimizer_state is not None:
            optimizer.load_state_dict(self.optimizer_state)
            for parameter, entries in optimizer.state.items():
                for name, value in entries.items():  # in memory exactly as the parameter lies
                    if value.shape == parameter.shape:
                        entries[name] = torch.empty_like(parameter).copy_(value)
            self.optimizer_state = None
        return optimizer

    def on_fit_start(self) -> None:
        """Lightning has placed the student; the average follows."""
        self.average.student.to(self.device)
        DepthwiseInFloat32.within(self.student, self.precision_name, self.device.type)

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        """One optimiser step, or a skipped one when loss or gradient is not finite."""
        started = time.perf_counter()
        optimizer: Any = self.optimizers()
        seed = self.config.seed * 1_000_003 + self.step_number + 7919 * rank()
        torch.manual_seed(seed)
        factor = lr_factor(
            step=self.step_number,
            progress=self.progress(),
            warmup_steps=self.config.warmup_steps,
        )
        for group in optimizer.param_groups:
            group["lr"] = self.config.lr * group["factor"] * factor
        statistics = {name: b.clone() for name, b in self.student.named_buffers()}
        losses = self._backward(batch)
        norm = self._gradient_norm()
        good = bool(torch.isfinite(norm) & torch.isfinite(losses["total"]))
        # an overflow of float16 is no fault of the lesson: a smaller scale mends it
        overflow = not good and self.loss_scale > 1 and bool(torch.isfinite(losses["total"]))
        if good:
            optimizer.step()
            self.average.update(self.student, self.step_number)
        else:  # the forward pass has already touched the norms' statistics
            with torch.no_grad():
                for name, buffer in self.student.named_buffers():
                    buffer.copy_(statistics[name])
            if not overflow:
                self._capture(batch, statistics, seed, losses)
        optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        self._rescale(good)
        facts = {"grad_norm": norm, "lr": torch.tensor(self.config.lr * factor)}
        self.last = {k: v.detach() for k, v in (losses | facts).items()}
        self.busy_s += time.perf_counter() - started
        self._count(good, overflow)

    def _backward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Forward and backward over the batch, in as many passes as configured; mean losses."""
        passes = self.config.accumulate
        sums: dict[str, Tensor] = {}
        for piece in in_passes(batch, passes):
            image = piece["image"].contiguous(memory_format=torch.channels_last)
            with autocast(self.precision_name, self.device.type):
                answer = self.student(image)
            losses = all_losses(answer, piece)
            if self.features is not None:  # not in float16: what overflows there no scale mends
                as_safe = "bf16" if self.precision_name == "bf16" else "fp32"
                with autocast(as_safe, self.device.type):
                    aim = self.features.aim(piece["clean"])
                losses["features"] = self.features(aim)
                losses["total"] = losses["total"] + self.features.weight * losses["features"]
            self.manual_backward(losses["total"] * (self.loss_scale / passes))
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / passes
        return sums

    def _gradient_norm(self) -> Tensor:
        """Gradients of all processes together, unscaled and clipped; their norm before that."""
        taught = self.taught()
        add_gradients(taught)
        if self.loss_scale != 1:
            for parameter in taught:
                if parameter.grad is not None:
                    parameter.grad.div_(self.loss_scale)
        return nn.utils.clip_grad_norm_(taught, self.config.grad_clip)

    def _rescale(self, good: bool) -> None:
        if self.precision_name != "fp16":
            return
        self.good_steps = self.good_steps + 1 if good else 0
        if not good:
            self.loss_scale = max(1.0, self.loss_scale / 2)
        elif self.good_steps % FP16_GROW == 0:
            self.loss_scale = min(2.0**16, self.loss_scale * 2)

    def _capture(
        self,
        batch: dict[str, Tensor],
        statistics: dict[str, Tensor],
        seed: int,
        losses: dict[str, Tensor],
    ) -> None:
        if self.folder is None:
            return
        facts = {
            "step": self.step_number + 1,
            "seed": seed,
            "precision": self.precision_name,
            "accumulate": self.config.accumulate,
            "not_finite": [f"loss {k}" for k, v in losses.items() if not torch.isfinite(v)],
        }
        suffix = f"-process{rank()}" if rank() else ""
        save_capture(self.folder, self.student, batch, statistics, facts, suffix=suffix)

    def _count(self, good: bool, overflow: bool) -> None:
        if overflow:  # ends of itself, at a scale of 1 at the latest
            return
        self.skipped_in_a_row = 0 if good else self.skipped_in_a_row + 1
        self.skipped += not good
        if self.skipped_in_a_row >= self.config.bad_steps_limit:
            raise Diverged(
                f"{self.skipped_in_a_row} steps in a row (up to step {self.step_number}) had a "
                "loss or gradient that is not finite; the last checkpoint is intact. `python -m "
                "distill.capture OUT/bad-step-*.safetensors` runs such a step again. Try a smaller "
                f"trainer.lr (now {self.config.lr:g}) or trainer.precision=fp32."
            )

    def note_validation(self, loss: float) -> bool:
        """Count a validation; True if it was the best so far."""
        better = loss < self.best
        self.best, self.best_for = (loss, 0) if better else (self.best, self.best_for + 1)
        return better

    def out_of_patience(self) -> bool:
        """Whether the validations have stopped getting better for long enough."""
        return self.config.patience is not None and self.best_for >= self.config.patience

    def agree(self, *, signal: int) -> tuple[int, bool]:
        """Settle with all processes: the signal that stops them, and whether patience is out."""
        values = agreed(signal, self.trained_s, self.out_of_patience(), device=self.device)
        self.trained_s = values[1]
        return int(values[0]), bool(values[2])
