"""How long and how to train: the keys of conf/trainer/*.yaml."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from distill.augment import MODES
from distill.precision import PRECISIONS
from student.kinds import wrong_kind
from teacher.errors import UsageError

MOST_IMAGES = 2**28  # in one lesson: 3 GiB of plan
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long and how to train; the keys of conf/trainer/*.yaml.

    Attributes:
        steps: optimiser steps at most.
        minutes: training time at most, counted over all starts; None for no limit. The schedule
            then follows whichever is further, so such a lesson cannot be repeated bit by bit.
        batch_size: images per step, over all devices.
        accumulate: passes per step, each with its share of the batch; saves memory.
        optimizer: ``adamw`` (Loshchilov & Hutter 2019), or ``muon`` (Jordan et al. 2024), whose
            steps of matrices and dense kernels are orthogonalised; `timm`'s, scaled to AdamW's
            rates, with NAdamW for all else.
        lr: its peak learning rate.
        backbone_lr_factor: times ``lr`` for the backbone; below 1 when it starts pretrained.
        layer_decay: and times this for every layer of the backbone further from its end.
        weight_decay: on matrices and kernels, not on biases, norms and position embeddings.
        warmup_steps: linear warm-up, then a cosine down to a hundredth.
        grad_clip: largest norm of the gradient; larger ones are scaled down.
        ema_decay: of the weights' moving average, which is what is saved as the student.
        precision: ``auto`` or one of `PRECISIONS`; auto is bf16 on GPUs that have it, else fp32.
        device: ``auto``, ``cpu`` or ``cuda``.
        devices: processes on this machine that share every batch, one GPU each; under ``torchrun``
            its processes are taken.
        sync_norms: batch norms see the whole batch, so that several processes learn exactly what
            one does; false: each its own share (16 images or more, say), 1.7 times as fast on a
            CPU.
        seed: of initial weights, order and augmentation.
        augment: ``strong``, ``geometry`` or ``none``.
        val_share: share of the keys held out for validation.
        val_every: steps between validations.
        patience: validations without a lower loss that end the lesson early, with the best student
            so far; None: never.
        checkpoint_every: steps between checkpoints.
        bad_steps_limit: so many bad steps in a row end the lesson.
        threads: loading threads.
    """

    steps: int = 20000
    minutes: float | None = None
    batch_size: int = 16
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-3
    backbone_lr_factor: float = 1.0
    layer_decay: float = 1.0
    weight_decay: float = 0.01
    warmup_steps: int = 100
    grad_clip: float = 5.0
    ema_decay: float = 0.998
    precision: str = "auto"
    device: str = "auto"
    devices: int = 1
    sync_norms: bool = True
    seed: int = 0
    augment: str = "strong"
    val_share: float = 0.05
    val_every: int = 500
    patience: int | None = None
    checkpoint_every: int = 500
    bad_steps_limit: int = 20
    threads: int = 2

    def __post_init__(self) -> None:
        """Refuse values that cannot work, by name."""
        wrong = wrong_kind(TrainerConfig, vars(self), where="trainer.")
        if wrong is not None:
            raise UsageError(wrong)
        whole = ("steps", "batch_size", "accumulate", "devices", "val_every", "checkpoint_every")
        for name in (*whole, "bad_steps_limit", "threads"):
            if getattr(self, name) < 1:
                raise UsageError(f"trainer.{name}={getattr(self, name)}: expected at least 1")
        if self.steps * self.batch_size > MOST_IMAGES:
            raise UsageError(
                f"trainer.steps={self.steps} of batch_size={self.batch_size}: their order is "
                f"planned ahead, for at most {MOST_IMAGES} images. If trainer.minutes ends the "
                f"lesson anyway, steps={MOST_IMAGES // self.batch_size} changes nothing"
            )
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"trainer.seed={self.seed}: expected 0 to {2**32 - 1}")
        minutes, patience = self.minutes, self.patience
        if minutes is not None and not minutes > 0:
            raise UsageError(f"trainer.minutes={minutes!r}: expected more than 0, or null")
        if patience is not None and not patience > 0:
            raise UsageError(f"trainer.patience={patience!r}: expected at least 1, or null")
        if patience is not None and self.val_share == 0:
            raise UsageError("trainer.patience needs held-out images; set trainer.val_share")
        for name in ("lr", "grad_clip", "backbone_lr_factor", "layer_decay"):
            if not getattr(self, name) > 0:
                raise UsageError(f"trainer.{name}={getattr(self, name)}: expected more than 0")
        for name in ("weight_decay", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"trainer.{name}={getattr(self, name)}: expected at least 0")
        for name in ("minutes", "lr", "backbone_lr_factor", "layer_decay", "weight_decay"):
            if getattr(self, name) == math.inf:
                raise UsageError(f"trainer.{name}=inf: expected a finite number")
        for name in ("ema_decay", "val_share"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"trainer.{name}={getattr(self, name)}: expected within [0, 1)")
        self._check_choices()

    def _check_choices(self) -> None:
        if self.precision != "auto" and self.precision not in PRECISIONS:
            known = ", ".join(("auto", *PRECISIONS))
            raise UsageError(f"trainer.precision={self.precision!r}: expected one of {known}")
        if self.optimizer not in OPTIMIZERS:
            known = ", ".join(OPTIMIZERS)
            raise UsageError(f"trainer.optimizer={self.optimizer!r}: expected one of {known}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UsageError(f"trainer.device={self.device!r}: expected auto, cpu or cuda")
        if self.augment not in MODES:
            raise UsageError(
                f"trainer.augment={self.augment!r}: expected one of {', '.join(MODES)}"
            )
        if self.batch_size % (self.accumulate * self.devices):
            raise UsageError(
                f"trainer.batch_size={self.batch_size}: expected a multiple of trainer.accumulate "
                "x the processes that share a batch (trainer.devices, torchrun) = "
                f"{self.accumulate} x {self.devices}"
            )


def trainer_config(values: dict[str, Any]) -> TrainerConfig:
    """A dict of plain values -> `TrainerConfig`; an unknown key is named with its neighbours."""
    known = [field.name for field in dataclasses.fields(TrainerConfig)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UsageError(f"trainer: no key {', '.join(unknown)}; the keys are {', '.join(known)}")
    return TrainerConfig(**values)
