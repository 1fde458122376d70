"""`distill label`: sources -> plan -> teacher -> label set, resumable at every shard."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from teacher.errors import UsageError
from teacher.generators import load_teacher
from teacher.jobs.commit import replace_atomically
from teacher.jobs.plan import make_plan
from teacher.jobs.processes import Recipe, run_processes
from teacher.jobs.sources import open_source
from teacher.label import Task
from teacher.store import open_folder, sealed_shards, write_index


def parse_tasks(tasks: Sequence[str], offered: Sequence[Task]) -> list[Task]:
    """Task names -> tasks in the fixed order, checked against what the teacher can answer."""
    known = [str(t) for t in offered]
    strange = [t for t in tasks if t not in known]
    if strange or not tasks:
        raise UsageError(
            f"tasks={list(tasks)}: this teacher answers {known}; ask for some of them."
        )
    return [t for t in Task if t in tasks]


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
    workers: int = 1,
    shard: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Label every image of a source; started again, it does only what is missing.

    Args:
        teacher: ``name`` and that teacher's own keys (`teacher.generators.load_teacher`).
        images: folder, glob, text list, image, or label set (`teacher.jobs.sources`).
        out: folder of the label set; new, empty, or of the very same job.
        tasks: what to ask for.
        max_side: longer side of the stored image in pixels; larger images are scaled down before
            the teacher sees them, smaller ones stay. None: the teacher's own working size.
        shard_size: inputs per shard, the unit of work and of commit.
        batch_size: images per call of the teacher; part of the plan.
        keep_pictures: also store the teacher's raw RGB answers.
        threads: decoding and encoding threads.
        video: which frames of videos: ``fps``, or the first of each scene (``scene_change``).
        workers: processes on this machine, one GPU each.
        shard: ``index`` of ``count`` array tasks (SLURM, Kubernetes, SkyPilot): this task takes the
            shards whose number leaves ``index`` when divided by ``count``.
    """
    sizes = {"shard_size": shard_size, "batch_size": batch_size, "workers": workers}
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"{name}={value}: expected at least 1.")
    index, count = (shard or {}).get("index", 0), (shard or {}).get("count", 1)
    if not 0 <= index < count:
        raise UsageError(
            f"shard.index={index} shard.count={count}: expected 0 <= index < count, one index for "
            "each task of the array."
        )
    source = open_source(images, video=video)
    oracle = load_teacher(**teacher)
    wanted = parse_tasks(tasks, oracle.tasks)
    own_side = getattr(oracle, "max_side", None)
    side = min((s for s in (max_side, own_side) if s is not None), default=None)
    about = oracle.describe()
    facts = {"teacher": about, "tasks": [str(t) for t in wanted], "max_side": side}
    facts["keep_pictures"] = keep_pictures
    plan = make_plan(source, shard_size=shard_size, batch_size=batch_size, facts=facts)
    dataset = facts | {
        "plan_hash": plan.hash(),
        "inputs": len(plan.entries),
        "shards": plan.shards,
        "shard_size": shard_size,
        "batch_size": batch_size,
        "classes": {str(k): v for k, v in about.get("classes", {}).items()},
    }
    folder = open_folder(out, dataset)
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
    )
    if workers > 1:
        tally = run_processes(recipe, todo, workers=workers)
    else:
        # an array task leaves shards that others have leased to them
        tally = recipe.build(teacher=oracle, source=source).run(todo, wait=count == 1)
    complete = len(sealed_shards(folder)) == plan.shards
    if complete:
        write_index(folder)
    rate = (tally.labelled + tally.rejected) / max(tally.wall_s, 1e-9)
    facts_of_run = {
        "labelled": tally.labelled,
        "rejected": tally.rejected,
        "duplicates": tally.duplicates,
        "shards_done_before": len(done),
        "wall_s": round(tally.wall_s, 3),
        "images_per_s": round(rate, 3),
        "teacher_share": round(tally.teacher_s / max(tally.wall_s, 1e-9), 4),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    replace_atomically(folder / "run.json", json.dumps(facts_of_run, indent=1).encode() + b"\n")
    facts_of_run["complete"] = complete
    missing = "" if complete else ", other shards still missing"
    before = f", {len(done)} of {plan.shards} shards were already done" if done else ""
    summary = (
        f"{out}: {tally.labelled} labelled, {tally.rejected} rejected, {tally.duplicates} "
        f"duplicates{before}{missing}; {tally.wall_s:.1f} s, {rate:.1f} images/s, "
        f"{facts_of_run['teacher_share']:.0%} of it inside the teacher"
    )
    empty = not todo or tally.labelled > 0
    return facts_of_run | {"summary": summary, "exit": 0 if empty else 1, "out": out}
