"""Which code for which generator? Noise, JPEG, blur and edges: ``python study_codecs.py OUT``.

Prints the Markdown tables of docs/results.md and writes OUT/codec_study.png and codec_study.json.
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from teacher.codecs.depth import DepthCodec, PlainPower, PowerTransform
from teacher.metrics import boundary_f1

BANDS_M = ((0.3, 2), (2, 10), (10, 30), (30, 80))
SIGMAS = (1, 2, 4, 8, 16)
CODES = {
    "walk": DepthCodec(),
    "walk, lam -4 c 120": DepthCodec(transform=PowerTransform(lam=-4.0, c=120.0)),
    "walk, d^0.5, 0.1-100 m": DepthCodec(transform=PlainPower()),
    **{f"hilbert {n}": DepthCodec(curve="hilbert", order=n) for n in range(1, 9)},
}


def noisy(rgb: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.rint(rgb + rng.normal(0, sigma, rgb.shape)), 0, 255).astype(np.uint8)


def score(depth_m: np.ndarray, truth_m: np.ndarray) -> tuple[float, float, float]:
    """(mean, 99 % point of the relative error, delta1) in per cent; NaN or sky: error 100 %."""
    good = np.isfinite(depth_m)
    error = np.where(good, np.abs(np.where(good, depth_m, truth_m) / truth_m - 1), 1.0)
    safe = np.where(good, depth_m, 1e-9)
    right = np.maximum(safe / truth_m, truth_m / safe) < 1.25
    return 100 * float(error.mean()), 100 * float(np.quantile(error, 0.99)), 100 * right.mean()


def noise_table() -> dict[str, dict[str, list[tuple[float, float, float]]]]:
    """code -> band -> one score per sigma; depth log-uniform in the band, independent pixels."""
    table: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for name, codec in CODES.items():
        table[name] = {}
        for low, high in BANDS_M:
            rng = np.random.default_rng(0)
            truth = np.exp(rng.uniform(np.log(low), np.log(high), 20_000)).astype(np.float32)
            rgb = codec.encode(truth)
            decoded = [codec.decode(noisy(rgb, s, rng))[0] for s in SIGMAS]
            table[name][f"{low:g}-{high:g} m"] = [score(d, truth) for d in decoded]
    return table


def steps_table() -> dict[str, list[float]]:
    """code -> the size of one 8-bit step along it, in per cent of depth, at DEPTHS_M."""
    table = {}
    for name, codec in CODES.items():
        slope = [(codec.level(d * 1.0001) - codec.level(d * 0.9999)) / (2e-4 * d) for d in DEPTHS_M]
        table[name] = [100 / s / d for s, d in zip(slope, DEPTHS_M, strict=True)]
    return table


DEPTHS_M = (0.25, 0.5, 1, 2, 5, 10, 20, 40, 80)


def room_depth_m(size: int = 256) -> np.ndarray:
    """A floor, a back wall at 12 m and 14 objects in front: smooth surfaces, sharp silhouettes."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:size, :size] / size - 0.5
    depth = np.minimum(12.0, 1.5 / np.maximum(y, 1e-6))
    for _ in range(14):
        z, u, v = np.exp(rng.uniform(np.log(1), np.log(9))), *rng.uniform(-0.45, 0.45, 2)
        r = rng.uniform(0.03, 0.09)
        box = (np.abs(x - u) < r) & (np.abs(y - v) < 0.8 * r)
        inside = box if rng.random() < 0.5 else (x - u) ** 2 + (y - v) ** 2 < r * r
        depth = np.where(inside & (z < depth), z * (1 + 0.3 * (x - u)), depth)
    return depth.astype(np.float32)


def picture_table() -> dict[str, dict[str, tuple[float, float, float]]]:
    """code -> JPEG quality, or blur of the whole picture, -> score on the room."""
    truth = room_depth_m()
    table: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name, codec in CODES.items():
        rgb = codec.encode(truth)
        table[name] = {}
        for quality in (95, 90, 75):
            for subsampling, tag in ((0, "444"), (2, "420")):
                buffer = io.BytesIO()
                Image.fromarray(rgb).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
                decoded = np.asarray(Image.open(buffer))
                table[name][f"JPEG {quality} {tag}"] = score(codec.decode(decoded)[0], truth)
        for blur_px in (0.5, 1.0):
            soft = gaussian_filter(rgb.astype(np.float64), (blur_px, blur_px, 0))
            soft = np.rint(soft).astype(np.uint8)
            table[name][f"blur {blur_px:g} px"] = score(codec.decode(soft)[0], truth)
    return table


RATIOS = (1.3, 2, 4, 8)


def silhouettes(ratio: float, kind: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(near [m], far [m], share of near) of slanted planes, disks, boxes and bars; 192x192.

    ``uniform``: pixels at a silhouette get independent weights from U(0, 1); ``coverage``: exact
    area coverage (4x4 samples); ``blur``: coverage blurred by 1 px.
    """
    rng, size, fine = np.random.default_rng([seed, int(10 * ratio)]), 192, 4
    y, x = np.mgrid[: size * fine, : size * fine] / fine - size / 2
    mask = np.zeros(x.shape, bool)
    for _ in range(6):
        u, v, r, angle = *rng.uniform(-size / 2, size / 2, 2), rng.uniform(6, 28), rng.uniform(0, 3)
        shape = rng.integers(3)
        along = np.abs((x - u) * np.cos(angle) + (y - v) * np.sin(angle))
        across = np.abs((y - v) * np.cos(angle) - (x - u) * np.sin(angle))
        disk, box = along**2 + across**2 < r * r, (along < r) & (across < 0.7 * r)
        mask |= (disk, box, (along < 40) & (across < r / 6))[shape]
    slopes = rng.uniform(-0.0015, 0.0015, (2, 2))
    near = np.exp(rng.uniform(np.log(0.5), np.log(10)))
    y, x = np.mgrid[:size, :size] - size / 2
    planes = [
        near * k * np.exp(s[0] * x + s[1] * y) for k, s in zip((1, ratio), slopes, strict=True)
    ]
    share = mask.reshape(size, fine, size, fine).mean((1, 3))
    if kind == "uniform":
        hard = share >= 0.5
        rim = np.zeros_like(hard)
        for axis in (0, 1):
            for step in (-1, 1):
                rim |= np.roll(hard, step, axis) != hard
        share = np.where(rim, rng.uniform(0, 1, share.shape), hard)
    elif kind == "blur":
        share = gaussian_filter(share, 1.0)
        share = np.where(share < 0.02, 0, np.where(share > 0.98, 1, share))
    return planes[0], planes[1], share


def edge_table(
    codec: DepthCodec, *, kinds: tuple[str, ...], sigmas: tuple[int, ...]
) -> list[dict[str, object]]:
    """Both decoders on blended silhouettes: share on neither surface, delta1 there, boundary F1."""
    rows: list[dict[str, object]] = []
    for kind in kinds:
        for sigma in sigmas:
            for ratio in RATIOS:
                found: dict[str, list[list[float]]] = {"nearest": [], "snap": []}
                for seed in range(4):
                    near, far, share = silhouettes(ratio, kind, seed)
                    rng = np.random.default_rng(seed)
                    a, b = (codec.encode(d).astype(np.float64) for d in (near, far))
                    rgb = noisy(share[..., None] * a + (1 - share[..., None]) * b, sigma, rng)
                    truth, rim = np.where(share > 0.5, near, far), (share > 0) & (share < 1)
                    for edges, results in found.items():
                        depth = codec.decode(rgb, edges=edges)[0].astype(np.float64)
                        depth = np.where(np.isfinite(depth), depth, 1000.0)
                        off = [np.maximum(depth / s, s / depth)[rim] for s in (near, far, truth)]
                        neither = float(((off[0] > 1.1) & (off[1] > 1.1)).mean())
                        f1 = boundary_f1(depth.astype(np.float32), truth.astype(np.float32))
                        results.append([100 * neither, 100 * float((off[2] < 1.25).mean()), f1])
                means = {k: np.mean(v, axis=0).tolist() for k, v in found.items()}
                rows.append({"kind": kind, "sigma": sigma, "ratio": ratio, **means})
    return rows


def hilbert_edge_tables() -> dict[str, list[dict[str, object]]]:
    """`edge_table` of the Hilbert orders whose residual can exceed the decoder's trigger."""
    tables = {}
    for order in (2, 3, 4, 5):
        codec = CODES[f"hilbert {order}"]
        tables[f"hilbert {order}"] = edge_table(codec, kinds=("uniform", "blur"), sigmas=(0, 4))
        print_edges(f"hilbert {order}", tables[f"hilbert {order}"])
    return tables


def print_edges(code: str, edges: list[dict[str, object]]) -> None:
    """One Markdown table of an `edge_table`."""
    print(f"\n| {code} | σ | decoder | " + " | ".join(f"ratio {r:g}" for r in RATIOS) + " |")
    print("|---" * (len(RATIOS) + 3) + "|")
    for start in range(0, len(edges), len(RATIOS)):
        group = edges[start : start + len(RATIOS)]
        for decoder in ("nearest", "snap"):
            cells = " | ".join("{:.1f} / {:.1f} / {:.3f}".format(*g[decoder]) for g in group)
            print(f"| {group[0]['kind']} | {group[0]['sigma']} | {decoder} | {cells} |")


def plot(noise: dict, steps: dict, path: Path) -> None:
    """Mean error against noise in four bands, and the step against depth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5), constrained_layout=True)
    colours = plt.colormaps["turbo"](np.linspace(0.05, 0.95, len(CODES)))
    for axis, band in zip(axes.flat, noise["walk"], strict=False):
        for colour, (name, bands) in zip(colours, noise.items(), strict=True):
            axis.loglog(SIGMAS, [s[0] for s in bands[band]], "o-", color=colour, label=name, ms=3)
        axis.set(title=f"depth {band}", xlabel="colour noise σ (of 255)", ylabel="mean error [%]")
        axis.set_ylim(1e-2, 2e3)
        axis.set_xticks(SIGMAS, [str(s) for s in SIGMAS], minor=False)
        axis.set_xticks([], minor=True)
    for colour, (name, values) in zip(colours, steps.items(), strict=True):
        axes[1, 1].loglog(DEPTHS_M, values, "o-", color=colour, label=name, ms=3)
    axes[1, 1].set(title="one 8-bit step", xlabel="depth [m]", ylabel="step [% of depth]")
    axes[1, 2].axis("off")
    axes[1, 2].legend(*axes[0, 0].get_legend_handles_labels(), loc="center", fontsize=11)
    for axis in axes.flat[:5]:
        axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=70)


def main(out: Path) -> None:
    """Measure, print the tables, write the plot and the numbers."""
    out.mkdir(parents=True, exist_ok=True)
    steps, noise = steps_table(), noise_table()
    print("| step, % of depth | " + " | ".join(f"{d:g} m" for d in DEPTHS_M) + " |")
    print("|---" * (len(DEPTHS_M) + 1) + "|")
    for name, values in steps.items():
        print(f"| {name} | " + " | ".join(f"{v:.2g}" for v in values) + " |")
    for band in noise["walk"]:
        print(f"\n| {band} | " + " | ".join(f"σ {s}" for s in SIGMAS) + " |")
        print("|---" * (len(SIGMAS) + 1) + "|")
        for name, bands in noise.items():
            cells = " | ".join(f"{m:.3g} / {p:.3g} / {d:.1f}" for m, p, d in bands[band])
            print(f"| {name} | {cells} |")
    pictures = picture_table()
    kinds = list(pictures["walk"])
    print("\n| room | " + " | ".join(kinds) + " |\n" + "|---" * (len(kinds) + 1) + "|")
    for name, row in pictures.items():
        cells = " | ".join(f"{m:.3g} / {p:.3g} / {d:.1f}" for m, p, d in row.values())
        print(f"| {name} | {cells} |")
    edges = edge_table(DepthCodec(), kinds=("uniform", "coverage", "blur"), sigmas=(0, 2, 4, 8))
    print_edges("walk", edges)
    hilbert_edges = hilbert_edge_tables()
    plot(noise, steps, out / "codec_study.png")
    found = {"steps": steps, "noise": noise, "pictures": pictures, "edges": edges}
    found["hilbert_edges"] = hilbert_edges
    (out / "codec_study.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
