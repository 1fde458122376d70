"""Does a student know where it is wrong: error AUROC and calibration, before and after its fit.

    python tests/benchmarks/student_uncertainty.py checkpoint=student.safetensors \\
        fit=truth/a held=truth/b,truth/c out=out/fit

The images of ``fit`` fit scale and uncertainties (`distill.fit_student`), those of ``held`` judge.
Wrong: depth ratio of 1.25 or more, angle of 11.25 degrees or more. The confidence is that of the
fit's table, and before it that of the losses' law: 1 - exp(-ln 1.25 / b) for a Laplace scale b of
log depth, 1 - exp(-11.25 / u) for a mean angle u.
Calibration error: 15 equal bins, pooled over pixels; edges: a depth step of 10 % to a neighbour;
far: beyond 10 m; flat: the rest.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import torch

from distill.fit_student import fit_student
from distill.samples import Frame, compact, make_sample
from export.onnx_graph import card_of
from student.checkpoint import load_student
from teacher.metrics import angles_deg, calibration_error
from teacher.metrics_confidence import auroc
from teacher.store import LabelSet


def strata(depth: np.ndarray, focal_ratio: float) -> dict[str, np.ndarray]:
    """Masks [H, W] of a true depth map in canonical metres."""
    padded = np.pad(depth, 1, mode="edge")
    sides = np.stack([padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1]])
    with np.errstate(invalid="ignore"):
        edge = (np.fmax(sides / depth, depth / sides) > 1.1).any(0)
    far = (depth * focal_ratio > 10) & ~edge
    return {"edges": edge, "far": far, "flat": ~edge & ~far, "all": np.ones_like(edge)}


@torch.inference_mode()
def judge(path: str, sets: list[LabelSet]) -> None:
    """Print the numbers of one checkpoint."""
    model = load_student(path)
    card = card_of(model)
    frame = Frame(
        height=model.config["height"], width=model.config["width"],
        canonical_focal_px=model.canonical_focal_px, tasks=("depth", "normals"),
    )  # fmt: skip
    found: dict[str, list[tuple[np.ndarray, ...]]] = {}
    for label in itertools.chain(*sets):
        sample = make_sample(compact(label, frame), frame, rng=None, mode="none")
        said = {k: v[0].numpy() for k, v in model(torch.from_numpy(sample["image"])[None]).items()}
        truth = sample["depth"][0]
        regions = strata(truth, float(sample["focal_px"]) / model.canonical_focal_px)
        error = np.abs(np.log(said["depth"][0] / truth))
        angle, _ = angles_deg(*(v["normals"].transpose(1, 2, 0) for v in (said, sample)))
        b, u = said["depth_uncertainty"][0], said["normals_uncertainty"][0]
        for name, mask in regions.items():
            at = mask & np.isfinite(truth)
            sure = card.confidence("depth", b[at])
            if sure is None:
                sure = 1 - np.exp(-np.log(1.25) / b[at])
            found.setdefault(f"depth {name}", []).append((b[at], sure, error[at] >= np.log(1.25)))
            at = mask & ~np.isnan(angle)
            sure = card.confidence("normals", u[at])
            if sure is None:
                sure = 1 - np.exp(-11.25 / u[at])
            found.setdefault(f"normals {name}", []).append((u[at], sure, angle[at] >= 11.25))
    for name, parts in found.items():
        size, sure, wrong = (np.concatenate(p) for p in zip(*parts, strict=True))
        ece = calibration_error(sure, ~wrong)["ece"]
        area = auroc(size, wrong)
        print(f"{Path(path).name} {name}: AUROC {area:.3f}, calibration error {ece:.3f}, wrong "
              f"{wrong.mean():.3f}, pixels {len(wrong)}", flush=True)  # fmt: skip


def main() -> None:
    """Fit on one set, judge on the others."""
    options = dict(a.split("=", 1) for a in sys.argv[1:])
    sets = [LabelSet(path) for path in options["held"].split(",")]
    out = Path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    fitted = str(out / "fitted.safetensors")
    result = fit_student(
        checkpoint=options["checkpoint"], labels=options["fit"], out=fitted, limit=None
    )
    print(result["summary"])
    judge(options["checkpoint"], sets)
    judge(fitted, sets)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
