"""What `distill bench` measured, as Markdown and as a plot of accuracy against latency."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

# metric -> heading; the least height of its axis, so that noise is not drawn as a difference
AXES = {
    "depth.delta1": ("depth δ1", 0.02),
    "normals.mean_deg": ("normals, mean error °", 2.0),
    "semantic.miou": ("mIoU", 0.02),
}
LONGEST = 40  # letters of an operator's name; TensorRT's are those of all that it fused


def markdown(result: Mapping[str, Any]) -> str:
    """Conditions, latency and throughput by batch, first call, memory, size, operators."""
    told = "; ".join(f"{k} {v}" for k, v in result["conditions"].items() if v is not None)
    load = result["load"]
    parts = [
        f"# Bench\n\n{result['summary']}",
        f"Conditions: {told}. Load {load['start']:.1f} to {load['end']:.1f}.",
    ]
    rows = [
        "| artefact | precision | batch | p50 ms | p90 | p99 | CPU ms | images/s | first call ms | "
        "memory MiB | GPU MiB | size MB |",
        "|" + "---|" * 12,
    ]
    for name, row in result["artefacts"].items():
        for batch, times in row["batches"].items():
            numbers = [f"{times[k]:.2f}" for k in ("p50_ms", "p90_ms", "p99_ms", "cpu_p50_ms")]
            rows.append(
                f"| {name} | {row['precision']} | {batch} | {' | '.join(numbers)} | "
                f"{times['images_per_s']:.1f} | {row['first_call_ms']:.1f} | "
                f"{_mebibytes(row['memory_kib'])} | {_mebibytes(row['gpu_memory_kib'])} | "
                f"{row['bytes'] / 1e6:.1f} |"
            )
    parts.append("\n".join(rows))
    if result["accuracy"]:
        parts.append(_accuracy(result["accuracy"]))
    for name, ratio in result.get("against", {}).items():
        pairs = ", ".join(f"batch {n}: {r:.2f}" for n, r in ratio.items())
        parts.append(f"{name}: p50 as a multiple of the earlier run's: {pairs}.")
    for name, row in result["artefacts"].items():
        spent = ", ".join(
            f"{o['operator'][:LONGEST]} {o['share']:.0%}" for o in row["operators"][:6]
        )
        if spent:
            parts.append(f"Time of {name} by operator: {spent}.")
    parts += [f"Note: {note}." for note in result["notes"]]
    for name, why in result["failed"].items():
        parts.append(f"Not measured: {name}: {why}")
    return "\n\n".join(parts) + "\n"


def _mebibytes(kib: float | None) -> str:
    return "–" if kib is None else f"{kib / 1024:.0f}"


def _accuracy(judged: Mapping[str, Any]) -> str:
    metrics = [m for m in AXES if any(m in told for told in judged.values())]
    rows = [
        "| accuracy of `distill verify` | against | images | "
        + " | ".join(AXES[m][0] for m in metrics)
        + " |",
        "|---" * (3 + len(metrics)) + "|",
    ]
    for name, told in judged.items():
        numbers = " | ".join(f"{told[m]:.3f}" if m in told else "–" for m in metrics)
        rows.append(f"| {name} | {told['against']} | {told['images']} | {numbers} |")
    return "\n".join(rows)


def points(result: Mapping[str, Any], metric: str) -> dict[str, tuple[float, float]]:
    """Name -> (p50 at the smallest batch [ms], accuracy) of all that have both."""
    first = smallest_batch(result)
    return {
        name: (row["batches"][first]["p50_ms"], result["accuracy"][name][metric])
        for name, row in result["artefacts"].items()
        if first in row["batches"] and metric in result["accuracy"].get(name, {})
    }


def smallest_batch(result: Mapping[str, Any]) -> str:
    """The smallest batch size that was measured, as the key that it is."""
    return str(min(int(n) for r in result["artefacts"].values() for n in r["batches"]))


def draw(result: Mapping[str, Any]) -> bytes:
    """PNG: accuracy (of `distill verify`, where it judged) against p50; better is up and left."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = [m for m in AXES if points(result, m)]
    figure, _ = plt.subplots(1, max(1, len(metrics)), figsize=(5.5 * max(1, len(metrics)), 4.2))
    for axis, metric in zip(figure.axes, metrics, strict=False):
        heading, least = AXES[metric]
        told = points(result, metric)
        colour = {name: f"C{i}" for i, name in enumerate(result["artefacts"])}
        for i, (name, (x, y)) in enumerate(sorted(told.items(), key=lambda p: p[1])):
            axis.scatter([x], [y], s=36, color=colour[name])
            axis.annotate(
                short(name),
                (x, y),
                fontsize=8,
                xytext=(6, (5, -11)[i % 2]),  # neighbours: one above, one below
                textcoords="offset points",
            )
        axis.set_xlim(0, max(x for x, _ in told.values()) * 1.35)
        low, high = min(y for _, y in told.values()), max(y for _, y in told.values())
        half = max(least, 1.5 * (high - low)) / 2
        axis.set_ylim((low + high) / 2 - half, (low + high) / 2 + half)
        if metric.endswith("_deg"):
            axis.invert_yaxis()
        axis.set_xlabel(f"p50 at batch {smallest_batch(result)} [ms]")
        references = sorted({a["against"] for a in result["accuracy"].values()})
        axis.set_ylabel(f"{heading} against the {' or '.join(references)} (up: better)", size=9)
        axis.grid(alpha=0.25)
    if not metrics:
        figure.axes[0].set_axis_off()
        figure.axes[0].text(0.5, 0.5, "not judged yet: run distill verify first", ha="center")
    figure.tight_layout()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    plt.close(figure)
    return stream.getvalue()


def short(name: str) -> str:
    """``tiny/student.int8-cpu.onnx`` -> ``tiny/int8-cpu``; plain ``student.onnx`` is fp32."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.removeprefix("student.").rpartition(".")
    if suffix.startswith("safetensors"):
        return folder + slash + "torch" + suffix.removeprefix("safetensors")
    return folder + slash + (stem or "fp32") + (" engine" if suffix == "engine" else "")
