"""The same plan on a Ray cluster: one row = one shard, an actor pool with one teacher per GPU.

Ray Data schedules, restarts and scales; what is done is decided by our seals alone, never by the
engine's checkpoint (which Ray ignores for some sources and which counts blocks, not shards). A row
that Ray runs twice finds the shard sealed and does nothing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from teacher.errors import EnvironmentFailure
from teacher.jobs.engines import Tally
from teacher.jobs.processes import Recipe
from teacher.store import seal_path


class ShardActor:
    """Lives in a Ray worker: builds its teacher once, then labels the shards it is handed."""

    def __init__(self, recipe: Recipe) -> None:
        """Load teacher and source in this process."""
        self.worker = recipe.build(quiet=True)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list]:
        """Shard numbers -> one tally each; waits for a shard that another actor holds."""
        tallies = [dataclasses.asdict(self.worker.run([int(n)], wait=True)) for n in batch["shard"]]
        return {name: [t[name] for t in tallies] for name in tallies[0]}


def run_ray(recipe: Recipe, numbers: Sequence[int], *, workers: int) -> Tally:
    """Label the given shards on the Ray cluster of ``RAY_ADDRESS``, or on one started here.

    ``workers`` is the largest number of actors; the pool starts with one and grows with the queue.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise EnvironmentFailure(
            "engine=ray: Ray is not installed: pip install 'dense-distill[ray]'"
        ) from error
    started = time.monotonic()
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    rows = ray.data.from_items([{"shard": n} for n in numbers], override_num_blocks=len(numbers))
    done = rows.map_batches(
        ShardActor,
        fn_constructor_args=(recipe,),
        batch_size=1,
        num_gpus=gpus,
        num_cpus=0 if gpus else 1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
    )
    tally = Tally()
    for row in done.iter_rows():
        tally += Tally(**row)
    left = [n for n in numbers if not seal_path(recipe.folder, n).exists()]
    if left:
        raise EnvironmentFailure(
            f"engine=ray: {len(left)} of {len(numbers)} shards are missing after the last actor "
            "ended. What is sealed stays; the same command goes on."
        )
    tally.wall_s = time.monotonic() - started
    return tally
