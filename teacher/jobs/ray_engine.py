"""The same plan on a Ray cluster: one row = one shard, an actor pool with one teacher per GPU.

Ray Data schedules, restarts and scales; what is done is decided by our seals alone, never by the
engine's checkpoint (which Ray ignores for some sources and which counts blocks, not shards). A row
that Ray runs twice finds the shard sealed and does nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from teacher.errors import EnvironmentFailure
from teacher.jobs.engines import Tally
from teacher.jobs.processes import missing, outcome, value_of
from teacher.jobs.recipe import About, Job, Recipe, survey
from teacher.shards import seal_path


class ShardActor:
    """Lives in a Ray worker: builds its teacher once, then labels the shards it is handed."""

    def __init__(self, recipe: Recipe, folder: str) -> None:
        """``folder``: where the job was started, for relative paths."""
        settle(folder)
        self.built = outcome(lambda: recipe.build(quiet=True))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list]:
        """Shard numbers -> an `outcome` each, as JSON; waits for a shard that another actor holds.

        An error is an answer: Ray would end the whole job for it, other shards may well succeed.
        """
        return {"outcome": [json.dumps(self._labelled(int(n))) for n in batch["shard"]]}

    def _labelled(self, number: int) -> tuple[str, Any]:
        kind, value = self.built
        if kind != "done":
            return kind, value
        return outcome(lambda: dataclasses.asdict(value.run([number], wait=True)))


def settle(folder: str) -> None:
    """Relative paths mean the same as for the driver, where its folder is known to this node."""
    with contextlib.suppress(OSError):
        os.chdir(folder)


def start_ray() -> tuple[Any, int]:
    """The cluster of ``RAY_ADDRESS``, or one started here; ``(ray, GPUs of one teacher)``."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise EnvironmentFailure(
            "engine=ray: Ray is not installed: pip install 'dense-distill[ray]'"
        ) from error
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, include_dashboard=False)
        except Exception as error:  # Ray's own kinds are many, the plainest among them
            where = os.environ.get("RAY_ADDRESS") or "this machine"
            raise EnvironmentFailure(
                f"engine=ray: no Ray on {where} ({' '.join(str(error).split())}). RAY_ADDRESS "
                "names a cluster; without it one is started here, which needs a free core."
            ) from error
    return ray, 1 if ray.cluster_resources().get("GPU", 0) else 0


def survey_on_ray(job: Job) -> About:
    """`survey` on a node of the cluster: the driver needs neither a GPU nor the models."""
    ray, gpus = start_ray()

    def there(folder: str) -> tuple[str, Any]:
        settle(folder)
        return outcome(lambda: survey(job))

    ask = ray.remote(num_gpus=gpus, num_cpus=0 if gpus else 1)(there)
    return value_of(ray.get(ask.remote(str(Path.cwd()))))


def run_ray(recipe: Recipe, numbers: Sequence[int], *, workers: int) -> Tally:
    """Label the given shards on the cluster.

    ``workers`` is the largest number of actors; the pool starts with one and grows with the queue.
    """
    ray, gpus = start_ray()
    started = time.monotonic()
    rows = ray.data.from_items([{"shard": n} for n in numbers], override_num_blocks=len(numbers))
    done = rows.map_batches(
        ShardActor,
        fn_constructor_args=(recipe, str(Path.cwd())),
        batch_size=1,
        num_gpus=gpus,
        num_cpus=0 if gpus else 1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
    )
    tally, errors = Tally(), []
    images = sum(len(recipe.plan.shard(n)) for n in numbers)
    with tqdm(total=images, desc="label on ray", unit="img", mininterval=1) as bar:
        for row in done.iter_rows():
            kind, value = json.loads(row["outcome"])
            if kind == "done":
                tally += Tally(**value)
            elif kind == "failed":
                errors.append((value[0], value[1]))
            bar.update(tally.labelled + tally.rejected + tally.duplicates - bar.n)
            busy_s = workers * (time.monotonic() - started)
            bar.set_postfix_str(f"teacher {tally.teacher_s / busy_s:.0%}", refresh=False)
    left = [n for n in numbers if not seal_path(recipe.folder, n).exists()]
    if left:
        raise missing(f"engine=ray: {len(left)} of {len(numbers)} shards", "all actors", errors)
    for _, text in errors:
        tqdm.write(f"an actor failed, others took over: {text}", file=sys.stderr)
    tally.wall_s = time.monotonic() - started
    return tally
