"""`distill label`: sources -> plan -> teacher -> label set, resumable at every shard."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from teacher.anchors import check_anchor, load_anchor
from teacher.errors import EnvironmentFailure, UsageError
from teacher.generators import Teacher, load_teacher
from teacher.jobs.commit import replace_atomically
from teacher.jobs.engines import Tally, Worker
from teacher.jobs.licences import for_label_job, refuse
from teacher.jobs.plan import Plan, make_plan
from teacher.jobs.processes import Recipe, run_processes
from teacher.jobs.sources import open_source
from teacher.label import Task
from teacher.store import open_folder, seal_path, sealed_shards, write_index

PROBE_FROM_BATCHES = 50  # smaller jobs start at once: the probe would be a visible part of them


def label(
    *,
    teacher: dict[str, Any],
    images: str,
    out: str,
    tasks: list[str],
    max_side: int | None,
    shard_size: int,
    batch_size: int,
    keep_pictures: bool,
    threads: int,
    video: dict[str, Any] | None = None,
    engine: str = "local",
    workers: int = 1,
    shard: dict[str, int] | None = None,
    licence: dict[str, Any] | None = None,
    anchor: dict[str, Any] | None = None,
    align: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Label every image of a source; started again, it does only what is missing.

    Args:
        teacher: ``name`` and that teacher's own keys (`teacher.generators.load_teacher`).
        images: what to label (`teacher.jobs.sources.open_source`).
        out: folder of the label set; new, empty, or of the very same job.
        tasks: what to ask for.
        max_side: longer side of the stored image in pixels; larger images are scaled down before
            the teacher sees them, smaller ones stay. None: the teacher's own working size.
        shard_size: inputs per shard, the unit of work and of commit.
        batch_size: images per call of the teacher; part of the plan.
        keep_pictures: also store the teacher's raw RGB answers.
        threads: decoding and encoding threads.
        video: which frames of videos: ``fps``, or the first of each scene (``scene_change``).
        engine: ``local`` (this machine) or ``ray`` (a Ray cluster).
        workers: processes on this machine, or at most so many Ray actors; one GPU each.
        shard: ``index`` of ``count`` array tasks (SLURM, Kubernetes, SkyPilot): this task takes the
            shards whose number leaves ``index`` when divided by ``count``.
        licence: ``images``, the licence of the images; ``refuse``, terms that stop the job, such as
            ``non-commercial`` (`teacher.jobs.licences`).
        anchor: what makes affine depth metric: ``name`` and its own keys (`teacher.anchors`).
        align: ``method`` (ransac, least-squares, truncated-l1) and ``max_residual``, the median
            |ln(depth / anchor)| above which an image is rejected.
    """
    sizes = {"shard_size": shard_size, "batch_size": batch_size, "workers": workers}
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"{name}={value}: expected at least 1.")
    if engine not in ("local", "ray"):
        raise UsageError(f"engine={engine}: expected local or ray.")
    index, count = array_task(shard or {})
    images = as_layout(images, teacher, anchor or {})
    source = open_source(images, video=video)
    oracle = load_teacher(**teacher)
    wanted = parse_tasks(tasks, oracle.tasks)
    scale = load_anchor(anchor, align)
    check_anchor(oracle, scale, wanted)
    own_side = getattr(oracle, "max_side", None)
    side = min((s for s in (max_side, own_side) if s is not None), default=None)
    facts: dict[str, Any] = {"teacher": oracle.describe(), "max_side": side}
    facts["tasks"] = [str(t) for t in wanted]
    facts["keep_pictures"] = keep_pictures
    if scale is not None:
        facts["anchor"] = scale.describe()
    asked = licence or {}
    ledger = for_label_job(
        facts["teacher"] | {"anchor": facts.get("anchor")},
        images=images,
        images_licence=asked.get("images"),
        source=source,
    )
    refuse(ledger, asked.get("refuse", []), what=f"label set {out}")
    plan = make_plan(source, shard_size=shard_size, batch_size=batch_size, facts=facts)
    folder = open_folder(out, dataset_of(plan, oracle) | {"licences": ledger})
    done = sealed_shards(folder)
    todo = [n for n in range(index, plan.shards, count) if n not in done]
    recipe = Recipe(
        teacher=teacher,
        images=images,
        video=video,
        plan=plan,
        folder=folder,
        tasks=wanted,
        max_side=side,
        keep_pictures=keep_pictures,
        threads=threads,
        anchor=anchor,
        align=align,
    )
    worker = recipe.build(teacher=oracle, source=source, anchor=scale)
    announce(worker, todo, workers=workers)
    if engine == "ray":
        from teacher.jobs.ray_engine import run_ray

        tally = run_ray(recipe, todo, workers=workers) if todo else Tally()
    elif workers > 1:
        tally = run_processes(recipe, todo, workers=workers)
    else:
        # an array task leaves shards that others have leased to them
        tally = worker.run(todo, wait=count == 1)
    complete = len(sealed_shards(folder)) == plan.shards
    if complete:
        write_index(folder)
    result = report(folder, tally, todo, done_before=len(done), shards=plan.shards)
    return result | {"exit": 1 if todo and not tally.labelled and complete else 0}


def array_task(shard: dict[str, int]) -> tuple[int, int]:
    """(index, count) of this task of an array job; (0, 1) for a job that is none."""
    index, count = shard.get("index", 0), shard.get("count", 1)
    if not 0 <= index < count:
        raise UsageError(
            f"shard.index={index} shard.count={count}: expected 0 <= index < count, one index for "
            "each task of the array."
        )
    return index, count


def as_layout(images: str, *options: dict[str, Any]) -> str:
    """``LAYOUT:FOLDER`` for a folder that teacher or anchor are told to be a data set."""
    for one in options:
        if one.get("name") != "folder":
            continue
        root, layout = Path(one["root"]).expanduser(), one["layout"]
        if root.is_dir() and Path(images).is_dir() and root.samefile(images):
            return f"{layout}:{images}"
    return images


def parse_tasks(tasks: Sequence[str], offered: Sequence[Task]) -> list[Task]:
    """Task names -> tasks in the fixed order, checked against what the teacher can answer."""
    known = [str(t) for t in offered]
    strange = [t for t in tasks if t not in known]
    if strange or not tasks:
        raise UsageError(f"tasks={list(tasks)}: this teacher answers {known}; ask for those.")
    return [t for t in Task if t in tasks]


def dataset_of(plan: Plan, teacher: Teacher) -> dict[str, Any]:
    """The content of ``dataset.json``."""
    classes = teacher.describe().get("classes", {})
    return plan.facts | {
        "plan_hash": plan.hash(),
        "inputs": len(plan.entries),
        "shards": plan.shards,
        "shard_size": plan.shard_size,
        "batch_size": plan.batch_size,
        "classes": {str(k): v for k, v in classes.items()},
    }


def announce(worker: Worker, todo: Sequence[int], *, workers: int) -> None:
    """Say what the job will cost before it starts; refuse one that cannot fit on the disk."""
    images = sum(1 for n in todo for e in worker.plan.shard(n) if not e.duplicate_of)
    tqdm.write(f"{images} images in {len(todo)} shards to label")
    if images < PROBE_FROM_BATCHES * worker.plan.batch_size:
        return
    seconds, size = (per_image * images for per_image in worker.probe(todo[0]))
    free = shutil.disk_usage(worker.folder).free
    tqdm.write(
        f"about {duration(seconds / workers)} with {workers} worker(s), {seconds / 3600:.2f} "
        f"teacher hours, {size / 1e9:.2f} GB of {free / 1e9:.1f} GB free"
    )
    if size > free:
        raise EnvironmentFailure(
            f"{worker.folder}: the labels will need about {size / 1e9:.1f} GB, {free / 1e9:.1f} GB "
            "are free. Free some space, choose another out=, or lower max_side."
        )


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def report(
    folder: Path, tally: Tally, todo: Sequence[int], *, done_before: int, shards: int
) -> dict[str, Any]:
    """Facts of the run, written to ``run.json``, and the one-line summary with the cost."""
    images, wall_s = tally.labelled + tally.rejected, max(tally.wall_s, 1e-9)
    missing = shards - len(sealed_shards(folder))
    facts: dict[str, Any] = {
        "out": str(folder),
        "labelled": tally.labelled,
        "rejected": tally.rejected,
        "duplicates": tally.duplicates,
        "shards_done_before": done_before,
        "complete": not missing,
        "wall_s": round(tally.wall_s, 3),
        "images_per_s": round(images / wall_s, 3),
        "teacher_share": round(tally.teacher_s / wall_s, 4),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    summary = (
        f"{folder}: {tally.labelled} labelled, {tally.rejected} rejected, "
        f"{tally.duplicates} duplicates"
        + (f", {done_before} of {shards} shards were already done" if done_before else "")
        + (f", {missing} shards still missing" if missing else "")
        + f"; {tally.wall_s:.1f} s, {images / wall_s:.1f} images/s, "
        f"{facts['teacher_share']:.0%} of it inside the teacher"
    )
    if images:
        sealed = [seal_path(folder, n) for n in todo if seal_path(folder, n).exists()]
        written = sum(path.with_suffix(".tar").stat().st_size for path in sealed)
        facts["teacher_hours_per_million"] = round(tally.teacher_s / images * 1e6 / 3600, 2)
        facts["gb_per_million"] = round(written / images * 1e6 / 1e9, 2)
        summary += (
            f"; a million images would cost {facts['teacher_hours_per_million']} teacher hours and "
            f"{facts['gb_per_million']} GB"
        )
    replace_atomically(folder / "run.json", json.dumps(facts, indent=1).encode() + b"\n")
    return facts | {"summary": summary}
