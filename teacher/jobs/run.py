"""`distill label`: sources -> plan -> teacher -> label set, resumable at every shard."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from teacher.errors import EnvironmentFailure, UsageError
from teacher.jobs.commit import RUN, replace_atomically
from teacher.jobs.engines import Tally, Worker
from teacher.jobs.licences import for_label_job, read_ledger, refuse
from teacher.jobs.plan import Plan, make_plan
from teacher.jobs.processes import run_processes, survey_in_process
from teacher.jobs.recipe import PROBE_FROM_BATCHES, About, Job, Models, Recipe
from teacher.jobs.redo import set_aside_damaged
from teacher.jobs.sources import Source
from teacher.shards import seal_path
from teacher.store import DATASET, open_folder, read_dataset, sealed_shards, write_index


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
    calibration: str | None = None,
    verify: bool = True,
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
        calibration: file of `distill calibrate`, made for this very teacher, or ``shipped`` (of the
            mini teacher as it is); labels get a confidence per pixel.
        verify: hash what earlier runs sealed before going on; damaged shards are labelled again.
    """
    sizes = {"shard_size": shard_size, "batch_size": batch_size, "workers": workers}
    for name, value in (sizes | {"threads": threads, "max_side": max_side}).items():
        if not _is_whole(value) and not (name == "max_side" and value is None):
            raise UsageError(f"{name}={value}: expected a whole number from 1.")
    for name, value in {"keep_pictures": keep_pictures, "verify": verify}.items():
        if not isinstance(value, bool):
            raise UsageError(f"{name}={value}: expected true or false.")
    for name, value in {
        "tasks": tasks,
        "licence.refuse": (licence or {}).get("refuse", []),
    }.items():
        if not isinstance(value, list):
            raise UsageError(f"{name}={value}: expected a list, {name}=[{value}].")
    if engine not in ("local", "ray"):
        raise UsageError(f"engine={engine}: expected local or ray.")
    index, count = array_task(shard or {})
    job = Job(
        teacher=teacher,
        images=as_layout(images, teacher, anchor or {}),
        video=video,
        tasks=list(tasks),
        max_side=max_side,
        keep_pictures=keep_pictures,
        threads=threads,
        batch_size=batch_size,
        anchor=anchor,
        align=align,
        calibration=calibration,
    )
    check_apart(job.images, out)
    source = job.source()
    if not source.list():
        raise UsageError(f"images={job.images}: there is no image in it.")
    if left_out := getattr(source, "left_out", None):
        most = ", ".join(f"{n} x {suffix}" for suffix, n in left_out.most_common(5))
        say(f"left out, no images by their names: {most}")
    models, about = meet(job, engine=engine, workers=workers)
    ledger = licences(job, about, source, licence or {}, out=out)
    plan = make_plan(source, shard_size=shard_size, batch_size=batch_size, facts=job.facts(about))
    dataset = dataset_of(plan, about) | {"licences": ledger, "software": about.software}
    folder = open_folder(out, dataset)
    keep_statement(folder, ledger, licence or {})
    mine = range(index, plan.shards, count)
    done = sorted(set(sealed_shards(folder)) & set(mine))
    damaged = set_aside_damaged(folder, done, dataset, threads=threads) if verify else {}
    for problem in damaged.values():
        say(f"{problem.rstrip('.')}: labelled again")
    done_before = len(sealed_shards(folder))
    todo = [n for n in mine if not seal_path(folder, n).exists()]
    recipe = Recipe(job=job, plan=plan, folder=folder.absolute())
    worker = recipe.build(models=models, source=source) if models else None
    announce(plan, folder, todo, worker or about, workers=workers)
    if worker is not None:
        with contextlib.closing(worker):
            # an array task leaves shards that others have leased to them
            tally = worker.run(todo, wait=count == 1)
    elif not todo:
        tally = Tally()
    elif engine == "ray":
        from teacher.jobs.ray_engine import run_ray

        tally = run_ray(recipe, todo, workers=workers)
    else:
        tally = run_processes(recipe, todo, workers=workers)
    result = report(folder, tally, workers=workers, done_before=done_before, shards=plan.shards)
    nothing = result["complete"] and not result["in_set"]["labelled"]
    return result | {"redone": damaged, "exit": 1 if nothing else 0}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def meet(job: Job, *, engine: str, workers: int) -> tuple[Models | None, About]:
    """What the plan must know of the models, and the models where this process is the worker."""
    if engine == "ray":
        from teacher.jobs.ray_engine import survey_on_ray

        return None, survey_on_ray(job)
    if workers > 1:
        return None, survey_in_process(job)
    models = job.load()
    return models, models.about


def check_apart(images: str, out: str) -> None:
    """Refuse labels inside the folder of the images: the next run would take them for images."""
    folder, target = Path(images.removeprefix("file://")).expanduser(), Path(out)
    if folder.is_dir() and target.resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            f"out={out} lies inside images={images}, where a label set would be taken for images; "
            "choose a folder outside."
        )


def licences(
    job: Job, about: About, source: Source, asked: dict[str, Any], *, out: str
) -> list[dict[str, Any]]:
    """The ledger of the job; raises where it holds what is refused."""
    ledger = for_label_job(
        about.teacher | {"anchor": about.anchor, "calibration": about.calibration},
        images_licence=asked.get("images"),
        origins=getattr(source, "origins", [{}]),
    )
    return refuse(ledger, asked.get("refuse", []), what=f"label set {out}")


def keep_statement(folder: Path, ledger: list[dict[str, Any]], asked: dict[str, Any]) -> None:
    """The ledger written when the set was begun holds; another ``licence.images`` raises."""
    meta = read_dataset(folder)
    if "licences" not in meta:
        return
    begun = read_ledger(meta["licences"])
    first, now = (
        [line["licence"] or "unknown" for line in lines if line["role"] == "images"]
        for lines in (begun, ledger)
    )
    if asked.get("images") is not None and first != now:
        raise UsageError(
            f"licence.images={asked['images']}: {folder / DATASET} says "
            f"{', '.join(first) or 'nothing'} of the images, as it was stated when the set was "
            "begun; expected the same. Leave licence.images out to go on under what was stated, "
            "or choose another out= for the new statement."
        )
    refuse(begun, asked.get("refuse", []), what=f"label set {folder}")


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


def dataset_of(plan: Plan, about: About) -> dict[str, Any]:
    """The content of ``dataset.json``."""
    classes = about.teacher.get("classes", {})
    return plan.facts | {
        "plan_hash": plan.hash,
        "inputs": len(plan.entries),
        "shards": plan.shards,
        "shard_size": plan.shard_size,
        "batch_size": plan.batch_size,
        "classes": {str(k): v for k, v in classes.items()},
    }


def say(text: str) -> None:
    """A line on stderr, above the progress bar."""
    tqdm.write(text, file=sys.stderr)


def announce(
    plan: Plan, folder: Path, todo: Sequence[int], how: Worker | About, *, workers: int
) -> None:
    """Say what the job will cost before it starts; refuse one that cannot fit on the disk.

    ``how``: the worker of this process, to be probed, or what a survey found out elsewhere.
    """
    images = sum(1 for n in todo for e in plan.shard(n) if not e.duplicate_of)
    say(f"{images} images in {len(todo)} shards to label")
    if images < PROBE_FROM_BATCHES * plan.batch_size:
        return
    cost = how.probe(todo[0]) if isinstance(how, Worker) else how.cost
    if cost is None:
        return
    seconds, size = (per_image * images for per_image in cost)
    free = shutil.disk_usage(folder).free
    say(
        f"about {duration(seconds / workers)} with {workers} worker(s), {seconds / 3600:.2f} "
        f"teacher hours, {size / 1e9:.2f} GB of {free / 1e9:.1f} GB free"
    )
    if size > free:
        raise EnvironmentFailure(
            f"{folder}: the labels will need about {size / 1e9:.1f} GB, {free / 1e9:.1f} GB "
            "are free. Free some space, choose another out=, or lower max_side."
        )


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def report(
    folder: Path, tally: Tally, *, workers: int, done_before: int, shards: int
) -> dict[str, Any]:
    """Facts of the run, written to ``run.json``, and the one-line summary with the cost.

    A complete set gets its index.
    """
    images, wall_s = tally.labelled + tally.rejected, max(tally.wall_s, 1e-9)
    missing = shards - len(sealed_shards(folder))
    in_set = write_index(folder) if not missing else {}
    facts: dict[str, Any] = {
        "out": str(folder),
        "labelled": tally.labelled,
        "rejected": tally.rejected,
        "reasons": tally.reasons,
        "duplicates": tally.duplicates,
        "shards_done_before": done_before,
        "complete": not missing,
        "in_set": in_set,
        "wall_s": round(tally.wall_s, 3),
        "images_per_s": round(images / wall_s, 3),
        "teacher_share": round(tally.teacher_s / (wall_s * workers), 4),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    whole = ", ".join(f"{n} {state}" for state, n in in_set.items() if n)
    why = Counter(tally.reasons).most_common(3)
    summary = (
        f"{folder}: {tally.labelled} labelled, {tally.rejected} rejected"
        + (f" ({'; '.join(f'{n} x {text}' for text, n in why)})" if why else "")
        + f", {tally.duplicates} duplicates"
        + (f", {done_before} of {shards} shards were already done" if done_before else "")
        + (f", in the whole set {whole}" if done_before and whole else "")
        + (f", {missing} shards still missing" if missing else "")
        + f"; {tally.wall_s:.1f} s, {images / wall_s:.1f} images/s, "
        f"{facts['teacher_share']:.0%} of it inside the teacher"
    )
    if images:
        facts["teacher_hours_per_million"] = round(tally.teacher_s / images * 1e6 / 3600, 2)
        facts["gb_per_million"] = round(tally.bytes / images * 1e6 / 1e9, 2)
        summary += (
            f"; a million images would cost {facts['teacher_hours_per_million']} teacher hours and "
            f"{facts['gb_per_million']} GB"
        )
    replace_atomically(folder / RUN, json.dumps(facts, indent=1).encode() + b"\n")
    return facts | {"summary": summary}
