"""`distill bench`: how long, how much, how large, side by side and under stated conditions.

Artefacts take turns within every round, in an order shuffled anew, so that whatever else the
machine does hits all of them. First call and peak memory are taken in a process of their own.
Numbers of two runs are compared only if their conditions are the same (`export.conditions`).
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from export.artefact import ArtefactError, plain
from export.bench_probe import Entrant, operators, picture, probe
from export.bench_report import draw, markdown
from export.conditions import conditions, others_running, same_conditions
from export.precision import HALF
from export.runtimes import Runtime
from teacher.cores import usable_cores
from teacher.errors import UsageError
from teacher.jobs.commit import replace_atomically
from teacher.store import hash_file

FORMAT, REPORT = "dense-distill/bench", "bench.json"
WARM = 3  # rounds that are not counted
PERCENTILES = (50, 90, 99)
OWN = {REPORT, "bench.md", "bench.png"}


def bench(
    *,
    export: str | Sequence[str],
    out: str | None = None,
    provider: str = "cpu",
    threads: int | None = None,
    batches: Sequence[int] = (1, 4),
    rounds: int = 50,
    against: str | None = None,
) -> dict[str, Any]:
    """Measure every artefact of a folder; writes ``bench.json``, ``bench.md``, ``bench.png``.

    Args:
        export: folder that `distill export` wrote, or one model of ours; or several, whose
            artefacts then all take turns.
        out: folder of the report; None: ``export``/bench.
        provider: where ``.onnx`` must run: cpu, cuda, tensorrt. On a GPU the student itself runs
            there as well, in fp32 and in torch's fp16 and bf16.
        threads: CPU threads; None: all cores of this process.
        batches: images per call, each measured.
        rounds: calls of each artefact per batch size; p99 of fewer than 100 is its maximum.
        against: an earlier ``bench.json``; refused if it was made under other conditions.
    """
    sources = [Path(s) for s in ([export] if isinstance(export, str) else export)]
    threads = usable_cores() if threads is None else threads
    entrants = find_entrants(sources, provider=provider, threads=threads)
    if rounds < 1 or not batches or min(batches) < 1:
        raise UsageError(f"rounds={rounds} batches={list(batches)}: expected at least 1.")
    if out is None and len(sources) > 1:
        raise UsageError(f"export={export}: of several folders, so out=FOLDER must be given.")
    earlier = _read_earlier(against) if against is not None else None
    folder = Path(out) if out is not None else _folder_of(sources[0]) / "bench"
    judged = accuracy(entrants)
    _open_folder(folder)  # before an hour of measuring, not behind it
    with ExitStack() as stack:
        runtimes: dict[str, Runtime] = {}
        failed: dict[str, str] = {}
        for name, entrant in entrants.items():
            try:
                runtimes[name] = stack.enter_context(entrant.open())
            except ArtefactError as error:
                failed[name] = str(error)
        if not runtimes:
            raise UsageError(f"export={export}: nothing there runs: {failed}")
        size = _one_size(runtimes)
        refuse_all_too_large(runtimes, batches)
        load, others = [os.getloadavg()[0]], others_running()
        where = conditions(
            provider=provider, threads=threads, rounds=rounds, size=size, others=others
        )
        if earlier is not None:
            same_conditions(earlier["conditions"], where, str(against))
        times = {str(n): measure(runtimes, size, n, rounds=rounds) for n in batches}
        load.append(os.getloadavg()[0])
        facts = {name: r.facts for name, r in runtimes.items()}
    table = {
        name: {
            "precision": r.card.precision,
            "bytes": _bytes(entrants[name].path),
            "sha256": hash_file(entrants[name].path),
            "runtime": facts[name],
            "batches": {n: told[name] for n, told in times.items() if name in told},
            **probe(entrants[name]),
            "operators": operators(entrants[name], size),
        }
        for name, r in runtimes.items()
    }
    result: dict[str, Any] = {
        "format": FORMAT,
        "version": 1,
        "summary": summary(table, str(min(batches))),
        "conditions": where,
        "load": dict(zip(("start", "end"), load, strict=True)),
        "artefacts": table,
        "failed": failed,
        "notes": notes(runtimes, batches, provider=provider),
        "accuracy": judged,
    }
    if where["busy"]:
        result["notes"].append(
            f"{others:g} other threads were running on {where['cores']} core(s): wall times are "
            "those of a busy machine; CPU ms is what the artefact itself took"
        )
    if earlier is not None:
        result["against"] = ratios(earlier, table)
    replace_atomically(folder / REPORT, json.dumps(plain(result), indent=1).encode() + b"\n")
    replace_atomically(folder / "bench.md", markdown(result).encode())
    replace_atomically(folder / "bench.png", draw(result))
    return {"summary": result["summary"], "report": str(folder / "bench.md"), "artefacts": table}


def find_entrants(sources: Sequence[Path], *, provider: str, threads: int) -> dict[str, Entrant]:
    """Name -> what is timed; of several folders the names begin with the folder's."""
    entrants: dict[str, Entrant] = {}
    for source in sources:
        prefix = f"{_folder_of(source).resolve().name}/" if len(sources) > 1 else ""
        for path in _find(source):
            halves = HALF if path.suffix == ".safetensors" and provider != "cpu" else ()
            for precision in ("", *halves):
                name = f"{prefix}{path.name}" + (f" in {precision}" if precision else "")
                if name in entrants:
                    raise UsageError(f"export={source}: two of the name {name}; rename a folder.")
                entrants[name] = Entrant(
                    path=path, provider=provider, threads=threads, precision=precision or "fp32"
                )
    return entrants


def _find(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    found = [
        p for p in sorted(source.glob("*")) if p.suffix in (".onnx", ".engine", ".safetensors")
    ]
    if not found:
        raise UsageError(f"export={source}: found no model there, expected `distill export`'s out.")
    return found


def _folder_of(source: Path) -> Path:
    return source.parent if source.is_file() else source


def _open_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    strangers = sorted(p.name for p in folder.iterdir() if p.name not in OWN and p.name[0] != ".")
    if strangers:
        raise UsageError(
            f"out={folder}: found {', '.join(strangers[:3])}, expected a new or empty folder or an "
            "earlier bench. Choose another out=."
        )


def _one_size(runtimes: Mapping[str, Runtime]) -> tuple[int, int]:
    sizes = {(r.card.height, r.card.width) for r in runtimes.values()}
    if len(sizes) > 1:
        raise UsageError(f"artefacts of several image sizes {sorted(sizes)}: bench them apart.")
    return sizes.pop()


def refuse_all_too_large(runtimes: Mapping[str, Runtime], batches: Sequence[int]) -> None:
    """A batch size that no artefact takes would leave a table without a number."""
    takes = {name: r.largest for name, r in runtimes.items()}
    for n in batches:
        if all(most is not None and n > most for most in takes.values()):
            raise UsageError(f"batches={list(batches)}: none takes {n} images at once: {takes}.")


def notes(runtimes: Mapping[str, Runtime], batches: Sequence[int], *, provider: str) -> list[str]:
    """What the numbers do not say by themselves."""
    told = []
    for name, runtime in runtimes.items():
        large = [n for n in batches if runtime.largest is not None and n > runtime.largest]
        if large:
            told.append(f"{name}: batches {large} not measured, it takes {runtime.largest} at most")
        if name.endswith(".onnx") and provider == "cpu" and runtime.card.precision in HALF:
            told.append(
                f"{name}: ONNX Runtime computes {runtime.card.precision} in float32 on a CPU; "
                "these times say nothing about a device that has it"
            )
    return told


def _bytes(path: Path) -> int:
    """The file and, for a graph with external tensors, those beside it."""
    beside = path.with_name(path.name + ".data")
    return path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)


def measure(
    runtimes: Mapping[str, Runtime], size: tuple[int, int], batch: int, *, rounds: int
) -> dict[str, dict[str, float]]:
    """Per artefact: p50, p90, p99 [ms] of a call with ``batch`` images, and images per second.

    ``cpu_p50_ms``: processor time of the median call, all threads; other processes do not count.
    """
    images = picture(size, batch)
    names = [n for n, r in runtimes.items() if r.largest is None or batch <= r.largest]
    order = random.Random(batch)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    busy: dict[str, list[float]] = {name: [] for name in names}
    for i in tqdm(range(WARM + rounds), desc=f"batch {batch}", unit="round", disable=None):
        for name in order.sample(names, len(names)):
            begun, used = time.perf_counter(), time.process_time()
            runtimes[name](images)
            if i >= WARM:
                seconds[name].append(time.perf_counter() - begun)
                busy[name].append(time.process_time() - used)
    return {
        name: {
            **{f"p{p}_ms": float(np.percentile(took, p) * 1e3) for p in PERCENTILES},
            "best_ms": min(took) * 1e3,
            "cpu_p50_ms": float(np.median(busy[name])) * 1e3,
            "images_per_s": batch / float(np.median(took)),
        }
        for name, took in seconds.items()
    }


def race(
    paths: Mapping[str, Path],
    feed: Mapping[str, np.ndarray],
    *,
    threads: int,
    rounds: int = 30,
) -> dict[str, float]:
    """Interleaved medians [ms] of plain ONNX Runtime sessions on the CPU.

    One thread is timed by the processor's clock, which other processes do not disturb; several by
    the wall's.
    """
    import onnxruntime as ort

    sessions = {}
    for name, path in paths.items():
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4
        sessions[name] = ort.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    order, clock = random.Random(0), time.process_time if threads == 1 else time.perf_counter
    for i in range(WARM + rounds):
        for name in order.sample(list(sessions), len(sessions)):
            begun = clock()
            sessions[name].run(None, dict(feed))
            if i >= WARM:
                seconds[name].append(clock() - begun)
    return {name: float(np.median(took)) * 1e3 for name, took in seconds.items()}


def _read_earlier(path: str) -> dict[str, Any]:
    try:
        table = json.loads(Path(path).read_bytes())
        if table["format"] != FORMAT:
            raise ValueError(f"format {table['format']!r}")
        if strange := {"conditions", "artefacts"} - set(table):
            raise ValueError(f"without {sorted(strange)}")
        table["conditions"] = dict(table["conditions"])
        for row in table["artefacts"].values():
            for told in row["batches"].values():
                if not 0 < float(told["p50_ms"]) < math.inf:
                    raise ValueError(f"p50_ms {told['p50_ms']}")
        return table
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"against={path}: no bench.json of `distill bench` ({error}).") from error


def ratios(earlier: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> batch -> p50 now as a multiple of p50 then, where both were measured."""
    found: dict[str, Any] = {}
    for name, row in table.items():
        before = earlier["artefacts"].get(name, {}).get("batches", {})
        for n, told in row["batches"].items():
            if n in before:
                found.setdefault(name, {})[n] = told["p50_ms"] / before[n]["p50_ms"]
    return found


def summary(table: Mapping[str, Any], batch: str) -> str:
    """One line: every artefact's median."""
    parts = [f"{n} {r['batches'][batch]['p50_ms']:.1f} ms" for n, r in table.items()
             if batch in r["batches"]]  # fmt: skip
    return f"p50 at batch {batch}: " + ", ".join(parts)


def accuracy(entrants: Mapping[str, Entrant]) -> dict[str, Any]:
    """Name -> headline numbers, of those that `distill verify` has judged in their folder."""
    reports: dict[Path, Any] = {}
    found: dict[str, Any] = {}
    for name, entrant in entrants.items():
        path = entrant.path.parent / "verify" / "report.json"
        if entrant.autocast or not path.is_file():
            continue
        try:
            if path not in reports:
                reports[path] = json.loads(path.read_bytes())
            if told := _accuracy(entrant.path, reports[path]):
                found[name] = told
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(
                f"{path}: not a report of `distill verify` ({error!r}); run it again, or move it "
                "away."
            ) from error
    return found


def _accuracy(file: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """What a report says of this very file; nothing if it judged another one of that name."""
    by_reference, run = report["scores"].get(file.name, {}), report["runs"].get(file.name, {})
    if run.get("sha256") != hash_file(file):
        return {}
    for reference in sorted(by_reference, key=lambda r: r != "truth"):
        told = by_reference[reference]
        return {"against": reference, "images": int(told["images"])} | {
            f"{block}.{number}": float(told[part][block][number])
            for part, block, number in (
                ("mean", "depth", "delta1"),
                ("mean", "normals", "mean_deg"),
                ("set", "semantic", "miou"),
            )
            if told[part].get(block, {}).get(number) is not None
        }
    return {}
