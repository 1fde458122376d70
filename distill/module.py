"""The lesson: one optimiser step, its learning rate, its moving average, and what a bad step does.

A step depends on nothing but the weights, the optimiser's state, the batch and the step's number:
the learning rate is a function of the number, torch's generator is seeded with it. That is why a
resumed lesson is the uninterrupted one.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from distill.losses import all_losses
from student.model import Student
from teacher.errors import UsageError

FINAL_LR = 0.01  # share of the peak learning rate at the end of the cosine


class Diverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite. Exit 3."""

    exit_code = 3


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long and how to train; the keys of conf/trainer/*.yaml.

    Attributes:
        steps: optimiser steps at most.
        minutes: training time at most, counted over all starts; None for no limit. The schedule
            then follows whichever is further, so such a lesson cannot be repeated bit by bit.
        batch_size: images per step.
        lr: peak learning rate of AdamW (Loshchilov & Hutter 2019).
        backbone_lr_factor: times ``lr`` for the backbone; below 1 when it starts pretrained.
        weight_decay: on matrices and kernels, not on biases and norms.
        warmup_steps: linear warm-up, then a cosine down to a hundredth.
        grad_clip: largest norm of the gradient; larger ones are scaled down.
        ema_decay: of the weights' moving average, which is what is saved as the student.
        precision: ``auto``, ``fp32`` or ``bf16``; auto is bf16 on GPUs that have it, fp32 on CPUs.
        device: ``auto``, ``cpu`` or ``cuda``.
        seed: of initial weights, order and augmentation.
        augment: ``strong``, ``geometry`` or ``none``.
        val_share: share of the keys held out for validation.
        val_every: steps between validations.
        checkpoint_every: steps between checkpoints.
        bad_steps_limit: so many bad steps in a row end the lesson.
        threads: loading threads.
    """

    steps: int = 20000
    minutes: float | None = None
    batch_size: int = 16
    lr: float = 1e-3
    backbone_lr_factor: float = 1.0
    weight_decay: float = 0.01
    warmup_steps: int = 100
    grad_clip: float = 5.0
    ema_decay: float = 0.998
    precision: str = "auto"
    device: str = "auto"
    seed: int = 0
    augment: str = "strong"
    val_share: float = 0.05
    val_every: int = 500
    checkpoint_every: int = 500
    bad_steps_limit: int = 20
    threads: int = 2

    def __post_init__(self) -> None:
        """Refuse values that cannot work, by name."""
        for field in dataclasses.fields(self):
            value, default = getattr(self, field.name), field.default
            kinds = (float, int) if isinstance(default, float) else type(default)
            if not isinstance(value, kinds) and field.name != "minutes":
                raise UsageError(
                    f"trainer.{field.name}={value!r}: expected a value like {default!r}"
                )
        for name in ("steps", "batch_size", "val_every", "checkpoint_every", "bad_steps_limit"):
            if getattr(self, name) < 1:
                raise UsageError(f"trainer.{name}={getattr(self, name)}: expected at least 1")
        minutes = self.minutes
        if minutes is not None and not (isinstance(minutes, (float, int)) and minutes > 0):
            raise UsageError(f"trainer.minutes={minutes!r}: expected more than 0, or null")
        for name in ("lr", "grad_clip", "backbone_lr_factor"):
            if not getattr(self, name) > 0:
                raise UsageError(f"trainer.{name}={getattr(self, name)}: expected more than 0")
        for name in ("ema_decay", "val_share"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"trainer.{name}={getattr(self, name)}: expected within [0, 1)")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise UsageError(f"trainer.precision={self.precision!r}: expected auto, fp32 or bf16")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UsageError(f"trainer.device={self.device!r}: expected auto, cpu or cuda")


def trainer_config(values: dict[str, Any]) -> TrainerConfig:
    """A dict of plain values -> `TrainerConfig`; an unknown key is named with its neighbours."""
    known = [field.name for field in dataclasses.fields(TrainerConfig)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UsageError(f"trainer: no key {', '.join(unknown)}; the keys are {', '.join(known)}")
    return TrainerConfig(**values)


def lr_factor(*, step: int, progress: float, warmup_steps: int) -> float:
    """Share of the peak learning rate: linear warm-up times a half cosine to `FINAL_LR`.

    ``progress`` in [0, 1] is how much of the lesson is over (Loshchilov & Hutter 2017, "SGDR",
    equation 5, one cycle).
    """
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
    return warm * (FINAL_LR + (1 - FINAL_LR) * cosine)


def parameter_groups(student: Student, config: TrainerConfig) -> list[dict[str, Any]]:
    """Backbone and rest, each with and without weight decay."""
    groups = []
    for own, factor in ((True, config.backbone_lr_factor), (False, 1.0)):
        for decays in (True, False):
            params = [
                p
                for name, p in student.named_parameters()
                if name.startswith("backbone.") is own and (p.ndim > 1) is decays
            ]
            decay = config.weight_decay if decays else 0.0
            groups.append({"params": params, "weight_decay": decay, "factor": factor})
    return [group for group in groups if group["params"]]


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
    """A student being taught; Lightning brings device, precision and loop.

    Attributes:
        step_number: optimiser steps done, skipped ones included, over all starts.
        skipped: steps skipped because loss or gradient was not finite.
        average: the moving average, which is what gets saved and validated.
    """

    def __init__(self, student: Student, config: TrainerConfig) -> None:
        """Take the student over; its average starts as a copy."""
        super().__init__()
        self.automatic_optimization = False
        self.student, self.config = student, config
        student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = MovingAverage(student, decay=config.ema_decay)
        self.step_number, self.skipped, self.skipped_in_a_row = 0, 0, 0
        self.trained_s = 0.0
        self.optimizer_state: dict[str, Any] | None = None
        self.last: dict[str, Tensor] = {}

    def progress(self) -> float:
        """How much of the lesson is over, by steps or by minutes, whichever is further."""
        by_steps = self.step_number / self.config.steps
        if self.config.minutes is None:
            return by_steps
        return max(by_steps, self.trained_s / (60 * self.config.minutes))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, with the state of an interrupted lesson if there is one."""
        groups = parameter_groups(self.student, self.config)
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

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        """One optimiser step, or a skipped one when loss or gradient is not finite."""
        optimizer: Any = self.optimizers()
        torch.manual_seed(self.config.seed * 1_000_003 + self.step_number)
        factor = lr_factor(
            step=self.step_number,
            progress=self.progress(),
            warmup_steps=self.config.warmup_steps,
        )
        for group in optimizer.param_groups:
            group["lr"] = self.config.lr * group["factor"] * factor
        statistics = [b.clone() for b in self.student.buffers()]
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        losses = all_losses(self.student(image), batch)
        self.manual_backward(losses["total"])
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.config.grad_clip)
        good = bool(torch.isfinite(norm) & torch.isfinite(losses["total"]))
        if good:
            optimizer.step()
            self.average.update(self.student, self.step_number)
        else:  # the forward pass has already touched the norms' statistics
            with torch.no_grad():
                for buffer, saved in zip(self.student.buffers(), statistics, strict=True):
                    buffer.copy_(saved)
        optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        self._count(good)
        facts = {"grad_norm": norm, "lr": torch.tensor(self.config.lr * factor)}
        self.last = {k: v.detach() for k, v in (losses | facts).items()}

    def _count(self, good: bool) -> None:
        self.skipped_in_a_row = 0 if good else self.skipped_in_a_row + 1
        self.skipped += not good
        if self.skipped_in_a_row >= self.config.bad_steps_limit:
            raise Diverged(
                f"{self.skipped_in_a_row} steps in a row (up to step {self.step_number}) had a "
                "loss or gradient that is not finite; the last checkpoint is intact. Try a smaller "
                f"trainer.lr (now {self.config.lr:g}) or trainer.precision=fp32."
            )
