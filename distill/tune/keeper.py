"""What happens around the steps of a tuning run: progress, log, states, snapshots, sheets."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from tqdm import tqdm

from distill.tune.module import TuneModule
from distill.tune.pairs import Pairs
from distill.tune.sheets import report
from distill.tune.stream import Plan

SAVE_EVERY_S = 120.0


class Keeper(L.Callback):
    """Progress, log lines, saved states, snapshots and validation sheets."""

    def __init__(
        self,
        out: Path,
        plan: Plan,
        *,
        checks: Mapping[str, tuple[Pairs, Pairs]],
        every: int,
        facts: dict[str, Any],
    ) -> None:
        """``checks``: validation pairs per kind, at half and full size; ``every``: steps."""
        self.out, self.plan, self.checks, self.every, self.facts = out, plan, checks, every, facts
        self.saved = self.began = time.monotonic()
        self.bar: Any = None
        self.latest: dict[str, float] = {}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Open the progress bar at the step reached before."""
        self.first = module.step + 1 if module.step else 0
        self.bar = tqdm(
            total=self.plan.steps, initial=self.first, desc="tune", unit="step", mininterval=5
        )

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        """Log, save and validate when due."""
        self.bar.update(1)
        done = module.step + 1
        if done % 50 == 0:
            self.bar.set_postfix({k: f"{v:.4f}" for k, v in module.recent.items()}, refresh=False)
            self._log(module, {})
        if time.monotonic() - self.saved > SAVE_EVERY_S:
            module.save_state(self.out)
            self.saved = time.monotonic()
        if self.every and done % self.every == 0:
            self.check(module)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Save where we are, whatever ended the slice."""
        self.bar.close()
        module.save_state(self.out)

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Ctrl-C and kills by signal keep the work; the state never holds a half-done step."""
        if isinstance(exception, KeyboardInterrupt):
            module.save_state(self.out)

    def check(self, module: Any) -> None:
        """Numbers and a sheet from the averaged weights; a snapshot beside them."""
        with averaged_weights(module):
            done = module.step + 1
            small = done <= self.plan.small_steps
            checks = {k: v[0 if small else 1] for k, v in self.checks.items()}
            self.latest = report(
                module.generator, checks, folder=self.out / "sheets", step=done, steps=1
            )
        self._log(module, self.latest)
        self.snapshot(module)

    def snapshot(self, module: Any) -> None:
        """The averaged weights as a loadable generator, ``generator.safetensors`` + card."""
        facts = {**self.facts, "steps_trained": module.step + 1, "validation": self.latest}
        module.generator.save(str(self.out / "generator.safetensors"), module.averaged, facts)

    def _log(self, module: Any, more: dict[str, float]) -> None:
        line = {"step": module.step + 1, "minutes": (time.monotonic() - self.began) / 60}
        numbers = {k: round(float(v), 5) for k, v in {**line, **module.recent, **more}.items()}
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps({**numbers, "bad_steps": module.bad_steps}) + "\n")


@contextlib.contextmanager
def averaged_weights(module: TuneModule) -> Iterator[None]:
    """The network holds its averaged weights inside, its live ones again after."""
    live = {k: v.detach().clone() for k, v in module.network.state_dict().items()}
    module.network.load_state_dict(module.averaged)
    module.network.eval()
    try:
        yield
    finally:
        module.network.load_state_dict(live)
        module.network.train()


class Moments(L.Callback):
    """Puts the optimiser's moments back once Lightning has built the optimiser."""

    def __init__(self, folder: Path) -> None:
        """``folder`` may hold a state."""
        self.folder = folder

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Read the state again, now with the optimiser."""
        if (self.folder / "state.safetensors").exists():
            module.load_state(self.folder, module.optimizers().optimizer)
            module.on_fit_start()
