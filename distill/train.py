"""`distill train`: label sets -> ``student.safetensors``, interruptible at any moment.

A run's folder:

* ``train.json``: what is trained on what (written first), and the result once finished;
* ``student.safetensors``: the moving average of the weights, replaced atomically (DESIGN 7);
* ``state.safetensors``: what resuming needs (`distill.resume`); gone when finished;
* ``metrics.csv``, ``validation.csv``, ``validation.png``, ``tensorboard/``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from tqdm import tqdm

from distill.conductor import STATE, STUDENT, Conductor
from distill.data import DataModule, merged_classes
from distill.module import Lesson, TrainerConfig, trainer_config
from distill.resume import alone_in, load_state
from distill.samples import Frame
from student.checkpoint import write_atomic
from student.model import Student
from teacher.cores import usable_cores
from teacher.errors import EnvironmentFailure, UsageError
from teacher.jobs.licences import of_student, refuse
from teacher.jobs.selection import apply_selections
from teacher.label import Task
from teacher.store import LabelSet

RUN = "train.json"
FORMAT = "dense-distill run 1"


def train(
    *,
    data: str | Sequence[str],
    out: str,
    student: dict[str, Any],
    trainer: dict[str, Any],
    weights: Sequence[float] | None = None,
    selection: str | Sequence[str] | None = None,
    licence: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a student on one or several label sets; started again, it goes on where it stopped.

    Args:
        data: a label set's folder, or several.
        out: the run's folder: new, empty, or of the same run.
        student: arguments of `student.model.Student`; the classes come from the label sets.
        trainer: fields of `distill.module.TrainerConfig`.
        weights: how often each label set is drawn, relative; None: by its number of images.
        selection: selection file(s) of those label sets (`teacher.jobs.selection`); None: all.
        licence: ``refuse``: terms that no ancestor may have (`teacher.jobs.licences.TERMS`).

    Returns:
        ``summary``, ``student`` (path), ``steps``, ``skipped``, ``seconds``, ``images_per_s``,
        ``validation``; the same stands in ``train.json``.

    Raises:
        UsageError: a wrong key or value, a damaged label set, an ``out`` with something else in it.
        distill.conductor.Stopped: SIGTERM or SIGINT; the same command goes on.
    """
    config = trainer_config(trainer)
    folders = [data] if isinstance(data, str) else list(data)
    if not folders:
        raise UsageError("data=[]: expected at least one label set")
    sets = [LabelSet(folder) for folder in folders]
    files = [selection] if isinstance(selection, str) else list(selection or ())
    for labels, keys in zip(sets, apply_selections(files, sets), strict=True):
        labels.keys = keys
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))  # in a small container
    torch.manual_seed(config.seed)
    model = _build(student, sets)
    identity = {
        "student": model.config
        | {k: v for k, v in student.items() if k in ("pretrained", "backbone_weights")},
        "trainer": {k: v for k, v in dataclasses.asdict(config).items() if k != "threads"},
        "data": [_identity(labels) for labels in sets],
        "weights": list(weights) if weights else None,
    }
    ancestors = {
        "data": identity["data"],
        "backbone": model.config["backbone"],
        "backbone_licence": model.backbone.licence,
    }
    refuse(of_student(ancestors), (licence or {}).get("refuse", []), what=f"student {out}")
    folder, finished = _open_run(out, identity)
    if finished:
        if not (folder / STUDENT).is_file():
            raise UsageError(
                f"{folder}: {RUN} says that this run is finished, but {STUDENT} is gone. Put it "
                "back, or delete that folder to train anew."
            )
        done = (
            f"{folder}: already trained ({finished['summary']}); choose another out= to train anew"
        )
        return {**finished, "summary": done}
    for labels in tqdm(sets, desc="verify labels", unit="set", leave=False, disable=None):
        labels.verify()
    frame = Frame(
        height=model.config["height"],
        width=model.config["width"],
        canonical_focal_px=model.canonical_focal_px,
        tasks=model.tasks,
        class_ids=tuple(model.class_ids),
    )
    lessons = DataModule(
        sets,
        frame=frame,
        weights=weights,
        val_share=config.val_share,
        batch_size=config.batch_size,
        seed=config.seed,
        augment=config.augment,
        threads=config.threads,
    )
    with alone_in(folder):
        result = _teach(Lesson(model, config), lessons, folder, identity)
        document = {"format": FORMAT, **identity, "result": result}
        write_atomic(folder / RUN, json.dumps(document, indent=1, sort_keys=True).encode())
        (folder / STATE).unlink(missing_ok=True)
    return result


def _build(student: dict[str, Any], sets: Sequence[LabelSet]) -> Student:
    """The student asked for, on the tasks that the label sets have."""
    known = [
        n for n in inspect.signature(Student.__init__).parameters if n not in ("self", "classes")
    ]
    unknown = sorted(set(student) - set(known))
    if unknown:
        raise UsageError(f"student: no key {', '.join(unknown)}; the keys are {', '.join(known)}")
    missing = sorted({"height", "width"} - set(student))
    if missing:
        raise UsageError(f"student: {' and '.join(missing)} must be given")
    offered = sorted({str(task) for labels in sets for task in labels.tasks})
    tasks = list(student.get("tasks", ("depth", "normals")))
    absent = [task for task in tasks if task not in offered and task in list(Task)]
    if absent:
        raise UsageError(
            f"student.tasks={tasks}: no label set in data has {', '.join(absent)}; they have "
            f"{', '.join(offered)}"
        )
    return Student(**student, classes=merged_classes(sets) if "semantic" in tasks else None)


def _identity(labels: LabelSet) -> dict[str, Any]:
    """What pins a label set, wherever it lies: its plan and the images that got a label."""
    keys = hashlib.sha256("\n".join(labels.keys).encode()).hexdigest()
    kept: dict[str, Any] = {
        k: labels.meta[k] for k in ("teacher", "licences", "licence") if k in labels.meta
    }
    return {"plan_hash": labels.meta["plan_hash"], "images": len(labels), "keys": keys, **kept}


def _open_run(out: str, identity: dict[str, Any]) -> tuple[Path, dict[str, Any] | None]:
    """Create the run's folder or take up the one of the same run; its result if it is finished."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"out={folder}: found a file, expected a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RUN
    if not path.exists():
        strangers = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if strangers:
            raise UsageError(
                f"out={folder}: found {', '.join(strangers[:3])}, expected a new or empty folder, "
                "or a run of the same command to go on with. Choose another out=."
            )
        document = {"format": FORMAT, **identity}
        write_atomic(path, json.dumps(document, indent=1, sort_keys=True).encode())
        return folder, None
    try:
        found = json.loads(path.read_bytes())
        ours = found["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UsageError(f"{path}: not the description of a run. Choose another out=.")
    changed = sorted(_differences(json.loads(json.dumps(identity)), found))
    if changed:
        raise UsageError(
            f"out={folder}: holds another run; different: {', '.join(changed[:6])}. Choose another "
            "out=, or delete that folder."
        )
    return folder, found.get("result")


def _differences(now: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Dotted names of what differs, with both values where they are short."""
    names = []
    for group in ("student", "trainer"):
        old = found.get(group, {})
        for key in {**now[group], **old}:
            if now[group].get(key) != old.get(key):
                names.append(f"{group}.{key} (was {old.get(key)}, now {now[group].get(key)})")
    names += [key for key in ("data", "weights") if now[key] != found.get(key)]
    return names


def _precision(config: TrainerConfig, device: str) -> str:
    """Lightning's name of the precision. bf16 on the CPU is only taken when asked for: with the
    default student it was slower than fp32 (docs/results.md, training)."""
    if config.precision == "auto":
        good = device == "cuda" and torch.cuda.is_bf16_supported()
        return "bf16-mixed" if good else "32-true"
    return {"fp32": "32-true", "bf16": "bf16-mixed"}[config.precision]


def _teach(
    lesson: Lesson, data: DataModule, folder: Path, identity: dict[str, Any]
) -> dict[str, Any]:
    """Run the lesson to its end, or to a signal."""
    config = lesson.config
    if config.device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFailure("trainer.device=cuda: torch sees no CUDA device; use device=auto")
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    if (folder / STATE).exists():
        load_state(lesson, folder / STATE)
    conductor = Conductor(lesson, data, folder, identity)
    with warnings.catch_warnings():
        # Lightning advises on loaders and loggers that are ours on purpose.
        warnings.filterwarnings("ignore", module="lightning")
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        runner = L.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            precision=_precision(config, device),  # type: ignore[arg-type]
            max_epochs=1,  # one pass over the planned steps
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[conductor],
            plugins=[LightningEnvironment()],  # never SLURM's requeue inside a signal handler
        )
        batches = data.train_batches(steps=config.steps, start=lesson.step_number)
        with conductor:
            if lesson.progress() < 1:
                runner.fit(lesson, train_dataloaders=batches)
            return conductor.finish()
