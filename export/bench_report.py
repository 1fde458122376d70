"""What `distill bench` measured, as Markdown and as a plot of accuracy against latency."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

AXES = {"depth.delta1": "depth δ1 ↑", "normals.mean_deg": "normals ° ↓", "semantic.miou": "mIoU ↑"}


def markdown(result: Mapping[str, Any]) -> str:
    """Conditions, latency and throughput by batch, first call, memory, size, operators."""
    told = "; ".join(f"{k} {v}" for k, v in result["conditions"].items() if v is not None)
    parts = [f"# Bench\n\n{result['summary']}", f"Conditions: {told}. Load {result['load']}."]
    rows = [
        "| artefact | precision | batch | p50 ms | p90 | p99 | CPU ms | images/s | first call ms | "
        "memory MiB | size MB |",
        "|" + "---|" * 11,
    ]
    for name, row in result["artefacts"].items():
        for batch, times in row["batches"].items():
            numbers = [f"{times[k]:.2f}" for k in ("p50_ms", "p90_ms", "p99_ms", "cpu_p50_ms")]
            rows.append(
                f"| {name} | {row['precision']} | {batch} | {' | '.join(numbers)} | "
                f"{times['images_per_s']:.1f} | {row['first_call_ms']:.1f} | "
                f"{(row['memory_kib'] or 0) / 1024:.0f} | {row['bytes'] / 1e6:.1f} |"
            )
    parts.append("\n".join(rows))
    for name, ratio in result.get("against", {}).items():
        pairs = ", ".join(f"batch {n}: {r:.2f}" for n, r in ratio.items())
        parts.append(f"{name}: p50 as a multiple of the earlier run's: {pairs}.")
    for name, row in result["artefacts"].items():
        spent = ", ".join(f"{o['operator']} {o['share']:.0%}" for o in row["operators"][:6])
        if spent:
            parts.append(f"Time of {name} by operator: {spent}.")
    parts += [f"Note: {note}." for note in result["notes"]]
    for name, why in result["failed"].items():
        parts.append(f"Not measured: {name}: {why}")
    return "\n\n".join(parts) + "\n"


def draw(result: Mapping[str, Any]) -> bytes:
    """PNG: each artefact's accuracy (of `distill verify`, if it judged them) against its p50."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = min((int(n) for r in result["artefacts"].values() for n in r["batches"]), default=1)
    metrics = [m for m in AXES if any(m in a for a in result["accuracy"].values())]
    figure, axes = plt.subplots(1, max(1, len(metrics)), figsize=(5 * max(1, len(metrics)), 4))
    for axis, metric in zip(figure.axes, metrics or [""], strict=True):
        for name, row in result["artefacts"].items():
            if str(first) not in row["batches"]:
                continue
            x = row["batches"][str(first)]["p50_ms"]
            y = result["accuracy"].get(name, {}).get(metric) if metric else 0.0
            if y is not None:
                axis.scatter([x], [y])
                axis.annotate(name.removeprefix("student."), (x, y), fontsize=8)
        axis.set_xlabel(f"p50 at batch {first} [ms]")
        axis.set_ylabel(AXES.get(metric, "not judged yet: run distill verify first"))
        axis.margins(0.2)
    figure.tight_layout()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    plt.close(figure)
    del axes
    return stream.getvalue()
