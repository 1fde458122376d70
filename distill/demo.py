"""`distill demo`: every verb in a row on synthetic scenes, small enough for two cores."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

UNSEEN = 500_000  # seeds of training scenes that the shipped teacher was not tuned on


def demo(
    *, out: str, teacher: str, train_scenes: int, held_out_scenes: int, minutes: float
) -> dict[str, Any]:
    """Scenes -> labels -> student -> ONNX -> verdict; started again it resumes.

    Args:
        out: folder for everything.
        teacher: ``mini``, ``truth`` (the scenes' exact labels), or another of ``conf/teacher``.
        train_scenes: scenes that the teacher labels for training.
        held_out_scenes: scenes of the held-out seeds, for teacher, student and artefact alike.
        minutes: training time of the student.
    """
    from distill.cli import run_verb

    root = Path(out)
    started = time.monotonic()
    held_out = f"{root}/scenes-held-out"
    taught = ["student.height=96", "student.width=128", "trainer.val_every=200"]
    taught += ["trainer.optimizer=muon", "trainer.lr=0.012"]  # docs/results.md

    def asked(images: str) -> list[str]:
        known = [f"teacher.labels={images}"] if teacher == "truth" else []
        return [f"teacher={teacher}", *known, f"images={images}"]

    exact = [] if teacher == "truth" else [f"truth={held_out}"]  # its labels are the truth
    student = f"{root}/student/student.safetensors"
    labels, held_out_labels = f"{root}/labels", f"{root}/labels-held-out"
    steps: list[tuple[str, list[str]]] = [
        ("scenes", [f"out={root}/scenes", f"n={train_scenes}", f"seed={UNSEEN}"]),
        ("scenes", [f"out={held_out}", f"n={held_out_scenes}", "split=heldout"]),
        ("label", [*asked(f"{root}/scenes"), f"out={labels}"]),
        ("label", [*asked(held_out), f"out={held_out_labels}"]),
        ("train", [f"data={labels}", f"out={root}/student", f"trainer.minutes={minutes}", *taught]),
        ("export", [f"checkpoint={student}", f"out={root}/export"]),
        ("verify", [f"export={root}/export", f"labels={held_out_labels}", *exact]),
    ]
    for number, (verb, overrides) in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] distill {verb} {' '.join(overrides)}", flush=True)
        result = run_verb(verb, overrides)
        print(f"      {result['summary']}", flush=True)
    folder = root / "export" / "verify"
    print("\n" + (folder / "report.md").read_text())
    wall_s = time.monotonic() - started
    summary = f"demo: {wall_s:.0f} s; {result['summary']}\nreport: {folder / 'report.html'}"
    return {**result, "summary": summary, "wall_s": wall_s}
