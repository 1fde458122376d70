"""A label job as a SLURM array, through submitit; --local tries it out on this machine.

TASKS=16 python docs/clusters/slurm.py images=/shared/photos out=/shared/labels teacher=marigold
"""

import os
import subprocess
import sys

import submitit


class LabelTask:
    """One array task; at the time limit it is queued again and goes on with its unsealed shards."""

    def __call__(self, index: int, count: int, overrides: list[str]) -> int:
        """Label the shards of one index; a failure fails the task."""
        array = [f"shard.index={index}", f"shard.count={count}"]
        return subprocess.run(["distill", "label", *overrides, *array], check=True).returncode

    def checkpoint(self, *arguments: object) -> submitit.helpers.DelayedSubmission:
        """Called by submitit before the time limit; nothing to save, the seals are the progress."""
        return submitit.helpers.DelayedSubmission(self, *arguments)


def main(arguments: list[str]) -> None:
    """Submit the array and wait for it."""
    local = "--local" in arguments
    overrides = [a for a in arguments if a != "--local"]
    count = int(os.environ.get("TASKS", "16"))
    executor = submitit.AutoExecutor(folder="slurm-logs/%j", cluster="local" if local else None)
    executor.update_parameters(timeout_min=240, cpus_per_task=4)
    if not local:
        executor.update_parameters(gpus_per_node=1, slurm_array_parallelism=count)
    jobs = executor.map_array(LabelTask(), range(count), [count] * count, [overrides] * count)
    for job in jobs:
        job.result()


if __name__ == "__main__":
    main(sys.argv[1:])
