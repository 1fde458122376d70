"""What a label job costs beside its teacher: overhead, memory over 20 000 images, a million inputs.

    python tests/benchmarks/label_jobs.py overhead [n]   wall and CPU time against a bare loop
    python tests/benchmarks/label_jobs.py overhead n mini    with the shipped mini teacher
    python tests/benchmarks/label_jobs.py soak [n]       memory, rate; docs/img/label-soak.png
    python tests/benchmarks/label_jobs.py listing [n]    list and plan n files, keys known

Times are wall times of this machine as it is: each line also says its load and the CPU seconds of
this process, which other processes disturb less. Label sets go to the folder of $TMPDIR.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from teacher.generators import Query, load_teacher
from teacher.images import read
from teacher.jobs.plan import HashCache, make_plan
from teacher.jobs.run import label
from teacher.jobs.sources import open_source
from teacher.label import Answer, Space, Task

BATCH = 4


class Sleeper:
    """Sleeps 50 ms for each image; answers depth and normals that compress like a generator's."""

    tasks = (Task.DEPTH, Task.NORMALS)

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        y, x = np.mgrid[0:480, 0:640].astype(np.float32)
        self.depth_m = (2 + y / 200 + np.sin(x / 90)) * rng.normal(1, 0.002, y.shape)
        normals = np.stack([np.sin(x / 50), np.cos(y / 70), np.full_like(x, 1.5)], -1)
        normals += rng.normal(0, 0.01, normals.shape)
        self.normals = (normals / np.linalg.norm(normals, axis=-1, keepdims=True)).astype("f4")
        self.depth_m = self.depth_m.astype("f4")

    def describe(self) -> dict:
        return {"name": "sleeper"}

    def answer(self, queries, tasks):
        time.sleep(0.05 * len(queries))
        depth = Answer(task=Task.DEPTH, space=Space.METRIC, values=self.depth_m)
        normals = Answer(task=Task.NORMALS, space=Space.UNIT_NORMALS, values=self.normals)
        return [{Task.DEPTH: depth, Task.NORMALS: normals} for _ in queries]


def photos(folder: Path, n: int, *, height: int, width: int, kind: str) -> Path:
    """n pictures with some texture, all different."""
    folder.mkdir()
    rng = np.random.default_rng(2)
    for i in range(n):
        coarse = rng.integers(0, 256, (max(height // 16, 2), max(width // 16, 2), 3), np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / f"{i:06d}.{kind}")
    return folder


def job(images: Path, out: Path, teacher: dict, **changes) -> dict:
    plain = {"tasks": ["depth", "normals"], "max_side": None, "shard_size": 16, "threads": 2}
    plain |= {"batch_size": BATCH, "keep_pictures": False}
    return label(teacher=teacher, images=str(images), out=str(out), **plain | changes)


def overhead(folder: Path, n: int, name: str) -> dict:
    """Wall time of a job over the wall time of its teacher on preloaded batches, side by side."""
    source = photos(folder / "in", n, height=480, width=640, kind="jpg")
    about = {"name": name}
    teacher = load_teacher(**about)
    pictures = [read(p.read_bytes()) for p in sorted(source.iterdir())]
    queries = [
        Query(key=f"{i:024x}", image=p.image, camera=p.camera) for i, p in enumerate(pictures)
    ]
    tasks = [Task.DEPTH, Task.NORMALS]
    teacher.answer(queries[:BATCH], tasks)
    ratios = []
    for turn in range(2):
        before, cpu = time.monotonic(), time.process_time()
        for start in range(0, n, BATCH):
            teacher.answer(queries[start : start + BATCH], tasks)
        bare_s, bare_cpu_s = time.monotonic() - before, time.process_time() - cpu
        before, cpu = time.monotonic(), time.process_time()
        done = job(source, folder / f"out{turn}", about)
        job_s, job_cpu_s = time.monotonic() - before, time.process_time() - cpu
        ratios.append(
            {
                "bare_s": round(bare_s, 2),
                "job_s": round(job_s, 2),
                "ratio": round(job_s / bare_s, 3),
                "label_s": done["wall_s"],
                "teacher_share": done["teacher_share"],
                "cpu_ms_per_image_beside_teacher": round((job_cpu_s - bare_cpu_s) / n * 1e3, 1),
            }
        )
    return {"n": n, "teacher": about, "runs": ratios}


def soak(folder: Path, n: int) -> dict:
    """Resident memory and rate over n tiny images; the plot of the docs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    source = photos(folder / "in", n, height=24, width=32, kind="png")
    seen: list[tuple[float, int, float]] = []
    over = threading.Event()
    started = time.monotonic()

    def watch() -> None:
        while not over.wait(0.1):
            status = Path("/proc/self/status").read_text()
            rss = int(status.split("VmRSS:")[1].split()[0]) / 1024
            done = 64 * len(list((folder / "out").glob("shard-*.json")))
            seen.append((time.monotonic() - started, min(done, n), rss))

    threading.Thread(target=watch, daemon=True).start()
    cpu = time.process_time()
    flat = {"name": "faults:Flat"}
    result = job(source, folder / "out", flat, tasks=["depth"], shard_size=64, batch_size=8)
    over.set()
    data = np.array([row for row in seen if row[1] > 0])
    late = data[data[:, 1] > n / 10]
    figure, left = plt.subplots(figsize=(7, 3), layout="constrained")
    left.plot(data[:, 1], data[:, 2], color="tab:blue")
    left.set(xlabel="images sealed", ylabel="resident memory [MiB]", ylim=(0, None))
    right = left.twinx()
    rate = np.gradient(np.convolve(data[:, 1], np.ones(9) / 9, "same"), data[:, 0])[5:-5]
    right.plot(data[5:-5, 1], rate, color="tab:orange", linewidth=0.8)
    right.set(ylabel="images/s", ylim=(0, None))
    figure.savefig(Path(__file__).parents[2] / "docs" / "img" / "label-soak.png", dpi=90)
    return {
        "n": n,
        "labelled": result["labelled"],
        "wall_s": result["wall_s"],
        "cpu_ms_per_image": round((time.process_time() - cpu) / n * 1e3, 2),
        "rss_mib_at_a_tenth": round(late[0, 2], 1),
        "rss_mib_at_the_end": round(late[-1, 2], 1),
        "rss_mib_highest": round(data[:, 2].max(), 1),
    }


def listing(folder: Path, n: int) -> dict:
    """List and plan n files whose keys are in the cache; peak memory of the process."""
    for i in range(0, n, 1000):
        inside = folder / "in" / f"{i // 1000:04d}"
        inside.mkdir(parents=True)
        for k in range(i, min(i + 1000, n)):
            os.close(os.open(inside / f"photo-{k:07d}.jpg", os.O_CREAT | os.O_WRONLY))
    os.environ["XDG_CACHE_HOME"] = str(folder)
    time.sleep(2.5)
    child = os.fork()  # the cache is filled elsewhere: its memory is not the plan's
    if child == 0:
        source, cache = open_source(str(folder / "in")), HashCache()
        cache.add([(source.stamp(u), f"{i:024x}") for i, u in enumerate(source.list())])
        os._exit(0)
    os.waitpid(child, 0)
    before, cpu = time.monotonic(), time.process_time()
    source = open_source(str(folder / "in"))
    listed_s, listed_cpu_s = time.monotonic() - before, time.process_time() - cpu
    plan = make_plan(source, shard_size=64, batch_size=8, facts={})
    plan_hash = plan.hash
    status = Path("/proc/self/status").read_text()
    return {
        "n": len(plan.entries),
        "shards": plan.shards,
        "plan_hash": plan_hash[:12],
        "listed": {"wall_s": round(listed_s, 1), "cpu_s": round(listed_cpu_s, 1)},
        "all": {
            "wall_s": round(time.monotonic() - before, 1),
            "cpu_s": round(time.process_time() - cpu, 1),
        },
        "peak_mib": round(int(status.split("VmHWM:")[1].split()[0]) / 1024),
    }


def main(what: str, *rest: str) -> None:
    """Run one measurement in a folder of its own and print its JSON."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        if what == "overhead":
            n = int(rest[0]) if rest else 96
            found = overhead(folder, n, rest[1] if len(rest) > 1 else "label_jobs:Sleeper")
        elif what == "soak":
            found = soak(folder, int(rest[0]) if rest else 20_000)
        else:
            found = listing(folder, int(rest[0]) if rest else 1_000_000)
        print(json.dumps(found | {"load": [round(x, 1) for x in os.getloadavg()]}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
