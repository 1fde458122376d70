"""`distill train`: label sets -> ``student.safetensors``, interruptible at any moment.

A run's folder:

* ``train.json``: what is trained on what (written first), and the result once finished;
* ``student.safetensors``: the moving average of the weights, replaced atomically (DESIGN 7);
* ``state.safetensors``: what resuming needs (`distill.resume`); gone when finished;
* ``metrics.csv``, ``validation.csv``, ``validation.png``, ``tensorboard/``, ``report.html``;
* ``bad-step-*.safetensors``: steps that were not finite (`distill.capture`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from tqdm import tqdm

from distill.conductor import BEST, STATE, Conductor
from distill.data import DataModule, merged_classes
from distill.masked import world
from distill.module import Lesson
from distill.parallel import (
    companions,
    joined,
    rank,
    said_by_first,
    share_norms,
    started_as_companion,
)
from distill.precision import chosen
from distill.resume import alone_in, load_state
from distill.run_folder import FORMAT, RUN, already, ancestors, identity_of, open_run
from distill.samples import Frame, claimed_space
from distill.start import start_from, told
from distill.trainer import TrainerConfig, trainer_config
from student.checkpoint import write_atomic
from student.model import Student
from teacher.cores import usable_cores
from teacher.errors import EnvironmentFailure, UsageError
from teacher.generators.runtime import has_bfloat16
from teacher.jobs.licences import entry, merged, of_student, refuse
from teacher.jobs.selection import apply_selections
from teacher.label import Task
from teacher.store import LabelSet


def train(
    *,
    data: str | Sequence[str],
    out: str,
    student: dict[str, Any],
    trainer: dict[str, Any],
    weights: Sequence[float] | None = None,
    selection: str | Sequence[str] | None = None,
    licence: dict[str, Any] | None = None,
    features: dict[str, Any] | None = None,
    init: str | None = None,
) -> dict[str, Any]:
    """Train a student on one or several label sets; started again, it goes on where it stopped.

    Args:
        data: a label set's folder, or several.
        out: the run's folder: new, empty, or of the same run.
        student: arguments of `student.model.Student`; the classes come from the label sets.
        trainer: fields of `distill.trainer.TrainerConfig`.
        weights: how often each label set is drawn, relative; None: by its number of images. An
            image that several sets have is answered by one of them at a time, never by a mean.
        selection: selection file(s) of those label sets (`teacher.jobs.selection`); None: all.
        licence: ``refuse``: terms that no ancestor may have (`teacher.jobs.licences.TERMS`).
        features: a frozen network whose features are learnt too: ``name`` (a `timm` backbone, or
            "mini"), ``weights``, ``pretrained``, ``weight`` (`distill.features`); no name: none.
        init: a ``student.safetensors`` to start from, as for fine-tuning on one's own images.

    Returns:
        ``summary``, ``student`` (path), ``steps``, ``skipped``, ``bad_pixels``, ``seconds``,
        ``outside_steps`` (share of the time not spent in forward, backward, optimiser),
        ``images_per_s``, ``validation``, ``objective`` (held-out loss, for sweeps); the same stands
        in ``train.json``.

    Raises:
        UsageError: a wrong key or value, a damaged label set, an ``out`` with something else in it.
        distill.conductor.Stopped: SIGTERM or SIGINT; the same command goes on.
    """
    config = trainer_config(trainer)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFailure("trainer.device=cuda: torch sees no CUDA device; use device=auto")
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    if device == "cuda" and config.devices > torch.cuda.device_count():
        raise EnvironmentFailure(
            f"trainer.devices={config.devices}: torch sees {torch.cuda.device_count()} CUDA "
            "device(s), and every process needs its own"
        )
    arguments: dict[str, Any] = {
        "data": [data] if isinstance(data, str) else list(data),
        "out": out,
        "student": dict(student),
        "trainer": dict(trainer),
        "weights": None if weights is None else list(weights),
        "selection": [selection] if isinstance(selection, str) else list(selection or ()),
        "licence": licence,
        "features": features if (features or {}).get("name") else None,
        "init": init,
    }
    with contextlib.ExitStack() as stack:
        if config.devices > 1 and not started_as_companion():
            stack.enter_context(companions(config.devices, arguments))
        stack.enter_context(joined(device))
        config = dataclasses.replace(config, devices=world())  # torchrun brings its own number
        return _train(config, device, **arguments)


def _train(
    config: TrainerConfig,
    device: str,
    *,
    data: list[str],
    out: str,
    student: dict[str, Any],
    trainer: dict[str, Any],
    weights: list[float] | None,
    selection: list[str],
    licence: dict[str, Any] | None,
    features: dict[str, Any] | None,
    init: str | None,
) -> dict[str, Any]:
    """`train` in one of its processes."""
    if not data:
        raise UsageError("data=[]: expected at least one label set")
    sets = [LabelSet(folder) for folder in data]
    for labels, keys in zip(sets, apply_selections(selection, sets), strict=True):
        labels.keys = keys
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))  # in a small container
    torch.manual_seed(config.seed)
    model = _build(student, sets)
    begun, ledger = start_from(model, init) if init else (None, [])
    lesson = Lesson(model, config, folder=Path(out))
    if features is not None:
        lesson.learn_features(features)
        assert lesson.features is not None
        frozen = lesson.features.teacher[0]
        own = entry("feature teacher", str(features["name"]), frozen.licence)
        ledger = merged(ledger, [own], getattr(frozen, "licences", []))
    levels: Any = [*model.backbone.sizes, *model.decoder.sizes]  # type: ignore[misc]
    if config.batch_size == config.accumulate and (1, 1) in levels:
        raise UsageError(
            f"trainer.batch_size={config.batch_size} in {config.accumulate} pass(es): one image a "
            "pass, whose coarsest features are a single cell at this size, has no batch "
            "statistics. Give a pass two images, or larger pictures"
        )
    identity = identity_of(config, model, student, sets) | {
        "weights": weights,
        "features": features,
        "init": begun,
        "licences": ledger,
    }
    refuse(of_student(ancestors(identity, model)), (licence or {}).get("refuse", []), what=out)
    lessons = _lessons(config, model, sets, weights, clean=features is not None)
    if Task.DEPTH in model.tasks:
        _need_metres(sets, lessons.weights)
    folder = Path(out)
    finished = said_by_first(open_run(out, identity) if rank() == 0 else None)
    if finished:
        return already(folder, finished)
    if rank() == 0:
        if begun is not None:
            tqdm.write(told(begun, str(init)), file=sys.stderr)
        for labels in tqdm(sets, desc="verify labels", unit="set", leave=False, disable=None):
            labels.verify()
    if rank() != 0:
        return _teach(lesson, lessons, folder, identity, device)
    with alone_in(folder):
        result = _teach(lesson, lessons, folder, identity, device)
        document = {"format": FORMAT, **identity, "result": result}
        write_atomic(folder / RUN, json.dumps(document, indent=1, sort_keys=True).encode())
        for name in (STATE, BEST):
            (folder / name).unlink(missing_ok=True)
    return result


def _lessons(
    config: TrainerConfig,
    model: Student,
    sets: Sequence[LabelSet],
    weights: list[float] | None,
    *,
    clean: bool,
) -> DataModule:
    frame = Frame(
        height=model.config["height"],
        width=model.config["width"],
        canonical_focal_px=model.canonical_focal_px,
        tasks=model.tasks,
        class_ids=tuple(model.class_ids),
        clean=clean,
    )
    return DataModule(
        sets,
        frame=frame,
        weights=weights,
        val_share=config.val_share,
        batch_size=config.batch_size,
        seed=config.seed,
        augment=config.augment,
        threads=config.threads,
    )


def _build(student: dict[str, Any], sets: Sequence[LabelSet]) -> Student:
    """The student asked for, on the tasks that the label sets have."""
    ours = ("self", "classes", "calibration")  # what the label sets say, and `distill calibrate`
    known = [n for n in inspect.signature(Student.__init__).parameters if n not in ours]
    unknown = sorted(set(student) - set(known))
    if unknown:
        raise UsageError(f"student: no key {', '.join(unknown)}; the keys are {', '.join(known)}")
    missing = sorted({"height", "width"} - set(student))
    if missing:
        raise UsageError(f"student: {' and '.join(missing)} must be given")
    offered = sorted({str(task) for labels in sets for task in labels.tasks})
    tasks = student.get("tasks", ("depth", "normals"))
    tasks = list(tasks) if isinstance(tasks, (list, tuple)) else []  # else `Student` refuses it
    absent = [task for task in tasks if task not in offered and task in list(Task)]
    if absent:
        raise UsageError(
            f"student.tasks={tasks}: no label set in data has {', '.join(absent)}; they have "
            f"{', '.join(offered)}"
        )
    return Student(**student, classes=merged_classes(sets) if "semantic" in tasks else None)


def _need_metres(sets: Sequence[LabelSet], weights: Sequence[float]) -> None:
    """Refuse depth that is affine in every set that is drawn from; its first sample speaks for it.

    Such labels teach shape alone (`distill.losses_depth`), so nothing would hold the magnitude.
    """
    drawn = [s for s, w in zip(sets, weights, strict=True) if w]
    with_depth = [labels for labels in drawn if Task.DEPTH in labels.tasks and len(labels)]
    if with_depth and all(claimed_space(labels[labels.keys[0]]) for labels in with_depth):
        raise UsageError(
            f"data: the depth of {', '.join(str(labels.path) for labels in with_depth)} was made "
            "metric by an assumed range (anchor=range), which teaches shape and no magnitude: the "
            "student's metres would mean nothing. Add a set with metric depth (another anchor, a "
            "sensor's: data=[affine,metric] weights=[9,1]) with images that val_share leaves for "
            "training, or leave depth out of student.tasks"
        )


def _teach(
    lesson: Lesson, data: DataModule, folder: Path, identity: dict[str, Any], device: str
) -> dict[str, Any]:
    """Run the lesson to its end, or to a signal."""
    config = lesson.config
    if (folder / STATE).exists():
        load_state(lesson, folder / STATE)
    precision = chosen(config.precision, device)
    lesson.set_precision(precision)
    if rank() == 0 and precision == "bf16" and not has_bfloat16(torch.device(device)):
        tqdm.write(
            f"trainer.precision=bf16: this {device.upper()} has no instructions for bfloat16 and "
            "takes several times as long in it as in fp32; auto would choose fp32",
            file=sys.stderr,
        )
    if config.sync_norms:
        share_norms(lesson.student)
    conductor = Conductor(lesson, data, folder, identity)
    number = int(os.environ.get("LOCAL_RANK", "0")) if world() > 1 else 0
    with warnings.catch_warnings():
        # Lightning advises on loaders and loggers that are ours on purpose.
        warnings.filterwarnings("ignore", module="lightning")
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        runner = L.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=[number] if device == "cuda" else 1,
            precision="32-true",  # autocast is the lesson's own
            max_epochs=1,  # one pass over the planned steps
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[conductor],
            plugins=[Alone()],
        )
        batches = data.train_batches(
            steps=config.steps, start=lesson.step_number, rank=rank(), world=world()
        )
        with conductor:
            if lesson.progress() < 1 and not lesson.out_of_patience():
                runner.fit(lesson, train_dataloaders=batches)
            return conductor.finish()


class Alone(LightningEnvironment):
    """To Lightning every process is the only one: sharing is ours (`distill.parallel`), and SLURM's
    requeue inside a signal handler nobody's."""

    def world_size(self) -> int:
        """One."""
        return 1

    def global_rank(self) -> int:
        """The first."""
        return 0

    def local_rank(self) -> int:
        """The first."""
        return 0
