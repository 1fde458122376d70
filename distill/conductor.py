"""Between the steps of a lesson: progress, logs, validation, checkpoints, signals, the end."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tqdm import tqdm

from distill.data import DataModule
from distill.journal import PICTURE, STEPS, VALIDATIONS, Journal, validate
from distill.lesson_report import REPORT, write_report
from distill.module import Lesson
from distill.parallel import rank
from distill.resume import save_state
from student.checkpoint import load_student, save_student, write_atomic

STUDENT, STATE, BEST = "student.safetensors", "state.safetensors", "best.safetensors"
FLUSH_EVERY = 20  # steps
CHECKPOINT_S = 180.0  # on a slow machine no kill costs more than that


class Stopped(BaseException):
    """A signal asked for the end; the step was finished and the checkpoint is whole."""

    def __init__(self, message: str, *, number: int) -> None:
        """``number``: the signal; the exit code is 128 + it, as a shell would say."""
        super().__init__(message)
        self.exit_code = 128 + number


class Conductor(L.Callback):
    """Between the steps: progress, logs, validation, checkpoints, signals.

    Of several processes only the first writes and validates; all agree on when to stop.
    """

    def __init__(
        self, lesson: Lesson, data: DataModule, folder: Path, identity: dict[str, Any]
    ) -> None:
        """Nothing is touched before the first step."""
        self.lesson, self.data, self.folder, self.identity = lesson, data, folder, identity
        self.signal = 0
        self.numbers: dict[str, float] = {}
        self.worst: list[dict[str, Any]] = []
        self.first, self.over = rank() == 0, False
        self.validated_at = -1
        self.before_s, self.first_step = lesson.trained_s, lesson.step_number

    def __enter__(self) -> Conductor:
        """Open logs and the progress bar."""
        self.started, self.show_next_s = time.monotonic(), 0.0
        self.saved = self.started
        if self.first:
            self.journal = Journal(self.folder, step=self.lesson.step_number)
        self.bar = tqdm(
            total=100,
            desc="train",
            bar_format="{desc} {percentage:3.0f}%|{bar:20}|{postfix}",
            disable=not self.first,
        )
        self.originals = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        """Close them, and give the signals back."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.originals.items():
                signal.signal(number, handler)
        self.bar.close()
        if self.first:
            self.journal.close()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Take the signals: Lightning would raise in the middle of a step."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)
        if self.first and self._due() and self.lesson.validated_at != self.lesson.step_number:
            self._validate()  # a signal came first
        if self.lesson.agree(signal=0)[1]:  # and patience is out with that
            trainer.should_stop = True

    def _on_signal(self, number: int, _: object) -> None:
        if self.signal:  # asked twice: do not wait for the step
            raise Stopped("stopped at once; the last checkpoint is whole.", number=number)
        self.signal = number

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """After every step."""
        lesson = self.lesson
        lesson.trained_s = self.before_s + time.monotonic() - self.started
        if self.first:
            self.journal.step(lesson)
            if self._due() and not self.signal:
                self._validate()
        self.signal, tired = lesson.agree(signal=self.signal)
        self.over = lesson.progress() >= 1 or tired
        if self.first:
            self._keep(trainer.optimizers[0])
        if self.over or self.signal:
            trainer.should_stop = True

    def _due(self) -> bool:
        """Whether this step ends with a validation; the lesson's last one is `finish`'s."""
        lesson = self.lesson
        return lesson.step_number % lesson.config.val_every == 0 and lesson.progress() < 1

    def _keep(self, optimizer: torch.optim.Optimizer) -> None:
        """Show the step, and save it when it is time."""
        lesson = self.lesson
        self._show()
        due = time.monotonic() - self.saved >= CHECKPOINT_S
        wanted = lesson.step_number % lesson.config.checkpoint_every == 0
        if wanted or due or self.over or self.signal:
            self.checkpoint(optimizer)
        elif lesson.step_number % FLUSH_EVERY == 0:
            self.journal.flush()

    def _show(self) -> None:
        lesson = self.lesson
        now_s = time.monotonic() - self.started
        if now_s < self.show_next_s and lesson.progress() < 1:
            return
        self.show_next_s = now_s + (0.5 if sys.stderr.isatty() else 5)
        rate = (lesson.step_number - self.first_step) / max(now_s, 1e-9)
        left_s = (lesson.config.steps - lesson.step_number) / max(rate, 1e-9)
        if lesson.config.minutes is not None:
            left_s = min(left_s, max(0.0, 60 * lesson.config.minutes - lesson.trained_s))
        self.bar.n = round(100 * min(1.0, lesson.progress()), 1)
        self.bar.set_postfix_str(
            f"step {lesson.step_number}, {rate * lesson.config.batch_size:.0f} img/s, "
            f"{tqdm.format_interval(int(left_s))} left, loss {float(lesson.last['total']):.3f}",
            refresh=False,
        )
        self.bar.refresh()

    def _validate(self) -> None:
        self.numbers, picture, self.worst = validate(self.lesson, self.data)
        self.validated_at = self.lesson.validated_at = self.lesson.step_number
        if not self.numbers:
            return
        self.journal.validation(self.lesson, self.numbers, picture)
        better = self.lesson.note_validation(self.numbers["loss"])
        if better and self.lesson.config.patience is not None:
            self.save_student(BEST)
        write_report(self.folder, self.identity, worst=self.worst, skipped=self.lesson.skipped)

    def checkpoint(self, optimizer: torch.optim.Optimizer) -> None:
        """State first, then the student: each whole at any moment."""
        self.journal.flush()
        save_state(self.lesson, optimizer, self.folder / STATE)
        self.save_student()
        self.saved = time.monotonic()

    def save_student(self, name: str = STUDENT) -> None:
        """The moving average as ``student.safetensors``."""
        lesson = self.lesson
        provenance = {
            "made_by": "distill train",
            **{k: self.identity[k] for k in ("trainer", "data", "weights", "features", "init")},
            "licences": self.identity["licences"],
            "steps": lesson.step_number,
            "skipped": lesson.skipped,
            "backbone": lesson.student.config["backbone"],
            "backbone_licence": lesson.student.backbone.licence,
            "torch": torch.__version__,
            "validation": self._plain(),
        }
        save_student(lesson.average.student, self.folder / name, provenance)

    def finish(self) -> dict[str, Any]:
        """Validate, save, sum up; or say that a signal ended the lesson."""
        lesson = self.lesson
        if self.signal:
            raise Stopped(
                f"{self.folder}: stopped by {signal.Signals(self.signal).name} after step "
                f"{lesson.step_number}; the same command goes on there.",
                number=self.signal,
            )
        if not self.first:
            return {}
        if self.validated_at != lesson.step_number:
            self._validate()
        self.save_student()
        best = self.folder / BEST
        if best.is_file():  # it goes when the run is finished: a crash here loses nothing
            write_atomic(self.folder / STUDENT, best.read_bytes())
            lesson.average.student.load_state_dict(load_student(best).state_dict())
            self.numbers, picture, self.worst = validate(lesson, self.data)
            self.journal.picture(picture)
        result = self._result()
        write_report(
            self.folder, self.identity, worst=self.worst, skipped=lesson.skipped, result=result
        )
        return result

    def _plain(self) -> dict[str, float | None]:
        """The last validation's numbers as JSON may hold them."""
        return {k: v if math.isfinite(v) else None for k, v in self.numbers.items()}

    def _result(self) -> dict[str, Any]:
        lesson = self.lesson
        here_s = time.monotonic() - self.started
        seconds = self.before_s + here_s
        images_per_s = lesson.step_number * lesson.config.batch_size / max(seconds, 1e-9)
        shown = ", ".join(f"{k} {v:.3g}" for k, v in self.numbers.items()) or "no validation images"
        early = "" if lesson.progress() >= 1 else ", stopped early"
        bad = self.data.bad_pixels()
        masked = f", {sum(bad.values())} impossible label pixels masked" if bad else ""
        numbers = self._plain()
        names = (STEPS, VALIDATIONS, PICTURE, "tensorboard", REPORT)
        return {
            "summary": f"{self.folder / STUDENT}: {lesson.step_number} steps in {seconds:.0f} s "
            f"({images_per_s:.0f} img/s){early}, {shown}{masked}",
            "student": str(self.folder / STUDENT),
            "steps": lesson.step_number,
            "skipped": lesson.skipped,
            "bad_pixels": bad,
            "seconds": round(seconds, 1),
            "outside_steps": round(1 - lesson.busy_s / max(here_s, 1e-9), 4),
            "images_per_s": round(images_per_s, 2),
            "objective": numbers.get("loss"),
            "validation": {k: v if v is None else round(v, 6) for k, v in numbers.items()},
            "logs": [str(self.folder / n) for n in names],
        }
