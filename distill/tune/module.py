"""The tuning loop as a LightningModule: EMA, NaN guard, learning-rate schedule, exact resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.tune.adapter import Generator
from distill.tune.pairs import Batch
from teacher.errors import EnvironmentFailure, UsageError
from teacher.generators.runtime import bfloat16_if_fast
from teacher.prompts import KINDS

CLIP_NORM = 1.0
SPIKE = 10.0  # a gradient this many times its running norm is skipped, not more than 3 in a row
MAX_BAD_STEPS = 20  # non-finite losses or gradients in a row before we give up
STATE_FORMAT = "dense-distill tune state"


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, decay: int) -> float:
    """Warm-up, plateau, linear decay to zero over the last ``decay`` of ``steps`` steps."""
    up = min(1.0, (step + 1) / max(warmup, 1))
    down = min(1.0, (steps - step) / decay) if decay else 1.0
    return peak * up * max(down, 0.0)


class TuneModule(L.LightningModule):
    """Trains a `Generator`; batches arrive as (step, `Batch`)."""

    def __init__(
        self,
        generator: Generator,
        *,
        peak_lr: float,
        warmup: int,
        steps: int,
        decay: int,
        ema: float,
        average_from: int = 0,
        weight_decay: float = 0.01,
    ) -> None:
        """``ema`` is the decay per step of the averaged weights.

        From step ``average_from`` (the change of size) the average starts anew: weights that saw
        another size would spoil it for thousands of steps.
        """
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.network = generator, generator.network
        self.schedule = {"peak": peak_lr, "warmup": warmup, "steps": steps, "decay": decay}
        self.average_from = average_from
        self.ema_decay, self.weight_decay = ema, weight_decay
        self.averaged = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self.step = 0
        self.bad_steps = self.bad_in_a_row = 0
        self.recent: dict[str, float] = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; matrices decay, vectors do not."""
        matrices = [p for p in self.network.parameters() if p.ndim > 1]
        vectors = [p for p in self.network.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.schedule["peak"], betas=(0.9, 0.98), eps=1e-8)

    def on_fit_start(self) -> None:
        """The averaged weights live where the network lives."""
        self.averaged = {k: v.to(self.device) for k, v in self.averaged.items()}

    def transfer_batch_to_device(self, batch: Any, device: torch.device, _: int) -> Any:
        """Move a (step, `Batch`)."""
        return batch[0], batch[1].to(device)

    def training_step(self, item: tuple[int, Batch], _: int) -> None:
        """One step: loss, gradients, guard, update, average."""
        self.step, batch = item
        optimizer: Any = self.optimizers()
        rate = learning_rate(self.step, **self.schedule)  # type: ignore[arg-type]
        for group in optimizer.param_groups:
            group["lr"] = rate
        with bfloat16_if_fast(self.device):
            losses = self.generator.losses(batch, step=self.step)
        optimizer.zero_grad(set_to_none=True)
        self.manual_backward(losses.total)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), CLIP_NORM)
        finite = bool(torch.isfinite(norm) & torch.isfinite(losses.total))
        if not finite or self._is_spike(float(norm)):
            self._skip(float(losses.total.detach()), float(norm))
            return
        self.bad_in_a_row = 0
        optimizer.step()
        self._average()
        self._remember(batch, losses, float(norm))

    def _is_spike(self, norm: float) -> bool:
        """Whether a step would poison Adam's moments: clipping alone keeps its direction."""
        usual = self.recent.get("norm", math.inf)
        warm = self.step >= self.schedule["warmup"]
        return warm and norm > SPIKE * usual and self.bad_in_a_row < 3

    def _skip(self, loss: float, norm: float) -> None:
        self.bad_steps += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row >= MAX_BAD_STEPS:
            raise EnvironmentFailure(
                f"tune: step {self.step}: loss {loss:g}, gradient norm {norm:g}, not finite for"
                f" {MAX_BAD_STEPS} steps in a row; the state before them is saved. Lower lr, or"
                " check the scenes with `distill inspect`"
            )

    def _average(self) -> None:
        age = self.step - (self.average_from if self.step >= self.average_from else 0)
        decay = min(self.ema_decay, (1 + age) / (10 + age))
        live = self.network.state_dict()
        names = [k for k, v in live.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.averaged[k] for k in names], [live[k] for k in names], 1 - decay)

    def _remember(self, batch: Batch, losses: Any, norm: float) -> None:
        """Exponential means of the loss per kind and of the gradient norm, for the log."""
        per_pair = losses.per_pair.float().cpu()
        numbers = {
            "loss": float(losses.total.detach()),
            "text": float(losses.text),
            "norm": min(norm, SPIKE * self.recent.get("norm", norm)),
        }
        for i, kind in enumerate(KINDS):
            chosen = per_pair[batch.kinds.cpu() == i]
            if len(chosen):
                numbers[kind] = float(chosen.mean())
        for name, value in numbers.items():
            self.recent[name] = 0.98 * self.recent.get(name, value) + 0.02 * value

    def save_state(self, folder: Path) -> None:
        """``state.safetensors`` + ``state.json``: weights, average, moments, step; atomic."""
        optimizer: Any = self.optimizers()
        moments = optimizer.state_dict()["state"]
        tensors: dict[str, Tensor] = {}
        for name, value in self.network.state_dict().items():
            tensors[f"net.{name}"] = value
            tensors[f"ema.{name}"] = self.averaged[name]
        for i, parts in moments.items():
            for name, value in parts.items():
                tensors[f"adam.{i}.{name}"] = value
        facts = {
            "format": STATE_FORMAT,
            "step": self.step + 1,
            "bad_steps": self.bad_steps,
            "recent": self.recent,
        }
        ready = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        part = folder / "state.safetensors.part"
        # the facts travel inside the tensor file, so that one rename commits both
        save_file(ready, part, metadata={"facts": json.dumps(facts)})
        part.replace(folder / "state.safetensors")
        json_part = folder / "state.json.part"
        json_part.write_text(json.dumps(facts, indent=1) + "\n")
        json_part.replace(folder / "state.json")

    def load_state(self, folder: Path, optimizer: torch.optim.Optimizer | None = None) -> int:
        """Restore what `save_state` wrote; returns the next step. Moments need ``optimizer``."""
        path = folder / "state.safetensors"
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            if facts.get("format") != STATE_FORMAT:
                raise UsageError(f"{path}: not a tuning state ({facts.get('format')!r})")
            tensors = {k: file.get_tensor(k) for k in file.keys()}

        def part(prefix: str) -> dict[str, Tensor]:
            cut = len(prefix)
            return {k[cut:]: v for k, v in tensors.items() if k.startswith(prefix)}

        try:
            self.network.load_state_dict(part("net."))
        except RuntimeError as error:
            raise UsageError(f"{path} belongs to another network: {error}") from None
        self.averaged = part("ema.")
        if optimizer is not None:
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in part("adam.").items():
                i, _, what = name.partition(".")
                state.setdefault(int(i), {})[what] = value
            whole = optimizer.state_dict()
            optimizer.load_state_dict({**whole, "state": state})
        self.step = facts["step"] - 1
        self.bad_steps, self.recent = facts["bad_steps"], facts["recent"]
        return int(facts["step"])
