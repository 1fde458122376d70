"""Does `distill verify` refuse what is wrong and pass what is right? Faults planted by the hundred.

    python tests/benchmarks/mutation_campaign.py EXPORT LABELS OUT [faults] [benign] [stale ...]

EXPORT: folder of `distill export` of a trained student; LABELS: a label set with truth; stale:
checkpoints of earlier students. Half of the images are judged by the code that `distill verify`
runs, with the budgets of ``conf/task`` as they are; on the other half the damage is measured by
ONNX Runtime and the formulas below alone: what a fault costs in delta1, degrees and mIoU against
the truth in batches of four; faults of batches also in batches of two, and faults of the dark also
at night (light x 0.1): the worst of them.
With BACKWARD=1 in the environment the plan is worked through from its end, beside another process.
Writes OUT/mutants.jsonl (one line each, resumable), OUT/campaign.json and OUT/campaign.png.
"""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mutations import FAULTS, stale
from rewrites import rewritten

from export.answers import run_artefact, save_inputs
from export.budgets import default_budgets
from export.delivery import REFERENCE
from export.judge import Judge
from export.letterbox import Letterbox, to_label_space
from export.onnx_graph import card_of, to_onnx
from export.references import find_references
from export.runtimes import open_runtime
from export.verdict import integrity, judge_one
from student.checkpoint import load_student
from teacher.store import LabelSet, hash_file

IMAGES = 8  # for judging, and as many others for the damage
STEP = {"delta1": 0.01, "degrees": 1.0, "miou": 0.01}  # what counts as damage
ALSO = {
    "wrong_when_two": ((2, 1.0),),
    "wrong_every_kth_image": ((2, 1.0),),
    "nan_in_the_dark": ((4, 0.1),),
}
TASK_METRICS = ("score", "strata", "image")


class Damage:
    """Costs against the truth, computed without the code under test (its letterbox excepted)."""

    def __init__(self, labels, keys, size):
        self.labels = [labels[key] for key in keys]
        boxes = [Letterbox.fit(label.image.shape[:2], size) for label in self.labels]
        self.boxes = boxes
        self.image = np.stack([b.apply(x.image) for b, x in zip(boxes, self.labels, strict=True)])
        focal = [
            b.focal_px(x.camera.fx, x.camera.fy) for b, x in zip(boxes, self.labels, strict=True)
        ]
        self.focal_px = np.array(focal, np.float32)
        self.clean = {}

    def answers(self, path, size, light):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [o.name for o in session.get_outputs()]
        image = (self.image * light).astype(np.uint8)
        parts = [
            session.run(
                names, {"image": image[i : i + size], "focal_px": self.focal_px[i : i + size]}
            )
            for i in range(0, len(image), size)
        ]
        return {n: np.concatenate([p[j] for p in parts]) for j, n in enumerate(names)}

    def numbers(self, path, size, light):
        answers = self.answers(path, size, light)
        delta1, degrees, confusion = [], [], np.zeros((256, 256))
        for i, (label, box) in enumerate(zip(self.labels, self.boxes, strict=True)):
            own = to_label_space({n: a[i] for n, a in answers.items()}, box)
            truth = {str(t): v for t, v in label.values.items()}
            known = (truth["depth"] > 0.3) & (truth["depth"] < 40)
            with np.errstate(all="ignore"):
                ratio = np.maximum(own["depth"] / truth["depth"], truth["depth"] / own["depth"])
                delta1.append(np.mean(ratio[known] < 1.25))
                cosine = (own["normals"] * truth["normals"]).sum(-1)
                cosine /= np.linalg.norm(own["normals"], axis=-1)
            seen = np.isfinite(truth["normals"]).all(-1)
            angle = np.degrees(np.arccos(np.clip(np.nan_to_num(cosine), -1, 1)))
            degrees.append(angle[seen].mean())
            judged = truth["semantic"] != 255
            np.add.at(
                confusion, (truth["semantic"][judged], np.clip(own["semantic"], 0, 255)[judged]), 1
            )
        hit = np.diag(confusion)
        union = confusion.sum(0) + confusion.sum(1) - hit
        there = confusion.sum(1) > 0
        return {
            "delta1": float(np.mean(delta1)),
            "degrees": float(np.mean(degrees)),
            "miou": float(np.mean(hit[there] / union[there])),
        }

    def of(self, path, clean, kind):
        """The worst cost of each number, and ``damage``: in units of `STEP`."""
        worst = dict.fromkeys(STEP, -np.inf)
        for size, light in ((4, 1.0), *ALSO.get(kind, ())):
            if (size, light) not in self.clean:
                self.clean[size, light] = self.numbers(clean, size, light)
            base, found = self.clean[size, light], self.numbers(path, size, light)
            for name in STEP:
                way = -1 if name == "degrees" else 1
                worst[name] = max(worst[name], way * (base[name] - found[name]))
        return worst | {"damage": max(worst[n] / STEP[n] for n in STEP)}


def prepare(export, labels, out):
    """The judge, the reference's answers and scores, and the damage meter."""
    keys = [k for i, k in enumerate(labels.keys[: 2 * IMAGES]) if i % 2 == 0]
    others = [k for i, k in enumerate(labels.keys[: 2 * IMAGES]) if i % 2]
    answers = out / f"answers-{os.getpid()}"  # a second process may work from the other end
    answers.mkdir(parents=True, exist_ok=True)
    with open_runtime(export / REFERENCE, threads=1) as runtime:
        card = runtime.card
        save_inputs(labels, keys, card, answers)
    run = run_artefact(
        export / REFERENCE, keys, answers, batch=4, provider="cpu", threads=1, question=False
    )
    judge = Judge(
        folder=answers,
        keys=keys,
        references=find_references(labels, keys, teacher=None, truth=None, folder=out),
        tasks=["depth", "normals", "semantic"],
        budgets=default_budgets(),
        min_m=0.3,
        max_m=40.0,
    )
    scores = {REFERENCE: judge.scores(REFERENCE, run["outputs"])}
    strata = judge.strata(REFERENCE, run["outputs"])
    damage = Damage(labels, others, (card.height, card.width))
    return judge, run, scores, strata, damage, keys, answers


def verdict(path, judge, student, scores, strata, keys, answers):
    """What `distill verify` says of one file: its findings."""
    run = run_artefact(path, keys, answers, batch=4, provider="cpu", threads=1)
    runs = {REFERENCE: student, path.name: run}
    promised = {REFERENCE: student["sha256"], path.name: hash_file(path)}  # its maker vouches
    findings = integrity(runs, promised, REFERENCE)
    if "error" not in run:
        found, _, _ = judge_one(judge, run, student, scores, strata, REFERENCE)
        findings += found
    shutil.rmtree(answers / path.name)
    return findings


def main():
    export, labels, out = Path(sys.argv[1]), LabelSet(sys.argv[2]), Path(sys.argv[3])
    faults, benign = int(sys.argv[4]), int(sys.argv[5])
    import torch

    torch.set_num_threads(1)
    judge, student, scores, strata, damage, keys, answers = prepare(export, labels, out)
    clean = export / "student.onnx"
    original = onnx.load(clean)
    earlier = [earlier_graph(Path(path), export, out) for path in sys.argv[6:]]
    log = out / "mutants.jsonl"
    kinds = [f.__name__ for f in FAULTS] + ["stale"] * bool(earlier)
    plan = [(f"fault-{i:03d}", kinds[i % len(kinds)]) for i in range(faults)]
    for i in range(benign):  # one after every few faults, so that an early end has both
        plan.insert(1 + i * (faults + benign) // benign, (f"benign-{i:03d}", "benign"))
    plan.insert(0, ("unchanged", "unchanged"))
    by_name = {f.__name__: f for f in FAULTS}
    for name, kind in plan[::-1] if os.environ.get("BACKWARD") else plan:
        if name in finished(log):
            continue
        rng = np.random.default_rng(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
        model = onnx.ModelProto.FromString(original.SerializeToString())
        if kind == "benign":
            what = rewritten(model, rng)
        elif kind == "stale":
            what = stale(model, earlier[int(rng.integers(len(earlier)))], rng)
        else:
            what = by_name[kind](model, rng) if kind in by_name else ""
        path = out / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        begun = time.process_time()
        row = {"name": name, "kind": kind, "what": what}
        row |= {
            "findings": summarised(verdict(path, judge, student, scores, strata, keys, answers))
        }
        row |= damage.of(path, clean, kind)
        row["cpu_s"] = round(time.process_time() - begun, 2)
        path.unlink()
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        refused = ",".join(sorted({f["check"] for f in row["findings"]})) or "passed"
        print(f"{name} {kind}: damage {row['damage']:.2f}, {refused} ({what})", flush=True)
    shutil.rmtree(answers)
    evaluate(log, out, export)


def finished(log):
    """Names of what is done, by whomever."""
    if not log.exists():
        return {}
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return {row["name"]: row for row in rows}


def earlier_graph(path, export, out):
    """An earlier student as a graph of the same nodes; kept, as exporting takes a while."""
    kept = out / f"{path.stem}.stale"
    if not kept.exists():
        student = load_student(path)
        card = card_of(student, student_sha256=hash_file(export / REFERENCE))
        kept.write_bytes(to_onnx(student, card).SerializeToString())
    return onnx.load_from_string(kept.read_bytes())


def summarised(findings):
    """Per check the first finding, and how many."""
    first = {}
    for f in findings:
        row = first.setdefault(f.check, {"check": f.check, "text": str(f), "count": 0})
        row["count"] += 1
    return list(first.values())


def evaluate(log, out, export):
    """The campaign's figures, and the curve."""
    rows = list(finished(log).values())
    faults = [r for r in rows if r["name"].startswith("fault")]
    benign = [r for r in rows if r["name"].startswith("benign")]
    hurting = [r for r in faults if r["damage"] >= 1]

    def by_tasks(row):
        return any(f["check"] in TASK_METRICS for f in row["findings"])

    edges = [-np.inf, 0, 0.03, 0.1, 0.3, 1, 3, 10, np.inf]
    curve = []
    for low, high in itertools.pairwise(edges):
        part = [r for r in faults if low <= r["damage"] < high]
        curve.append(
            {
                "damage": [str(low), str(high)],
                "faults": len(part),
                "refused": sum(bool(r["findings"]) for r in part),
                "by_task_metrics": sum(by_tasks(r) for r in part),
            }
        )
    first = {}
    for row in faults:
        for f in row["findings"]:
            first[f["check"]] = first.get(f["check"], 0) + 1
    result = {
        "faults": len(faults),
        "refused": sum(bool(r["findings"]) for r in faults),
        "hurting": len(hurting),
        "hurting_refused": sum(bool(r["findings"]) for r in hurting),
        "hurting_refused_by_task_metrics": sum(by_tasks(r) for r in hurting),
        "hurting_missed": [r for r in hurting if not r["findings"]],
        "benign": len(benign),
        "benign_passed": sum(not r["findings"] for r in benign),
        "benign_refused": [r for r in benign if r["findings"]],
        "caught_by": first,
        "curve": curve,
        "by_kind": {
            kind: [
                sum(bool(r["findings"]) for r in faults if r["kind"] == kind),
                sum(r["kind"] == kind for r in faults),
                sum(r["kind"] == kind and r["damage"] >= 1 for r in faults),
            ]
            for kind in dict.fromkeys(r["kind"] for r in faults)
        },
        "cpu_s": sum(r["cpu_s"] for r in rows),
        "budgets_sha256": hashlib.sha256(
            json.dumps(default_budgets(), sort_keys=True).encode()
        ).hexdigest(),
        "commit": subprocess.run(
            ["git", "log", "-1", "--format=%h", "--", "conf/task"], capture_output=True, text=True
        ).stdout.strip(),
        "student_sha256": hash_file(export / REFERENCE),
    }
    (out / "campaign.json").write_text(json.dumps(result, indent=1))
    draw(faults, out / "campaign.png")
    print(json.dumps({k: v for k, v in result.items() if k not in ("curve",)}, indent=1)[:4000])


def draw(faults, path):
    """Share refused against damage, in growing windows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ordered = sorted(faults, key=lambda r: r["damage"])
    x = np.array([max(r["damage"], 1e-3) for r in ordered])
    window = max(5, len(ordered) // 12)
    figure, axes = plt.subplots(figsize=(7, 4))
    for title, hit in (
        ("all checks", [bool(r["findings"]) for r in ordered]),
        (
            "task metrics alone",
            [any(f["check"] in TASK_METRICS for f in r["findings"]) for r in ordered],
        ),
    ):
        smooth = np.convolve(np.array(hit, float), np.ones(window) / window, "valid")
        axes.plot(np.convolve(np.log10(x), np.ones(window) / window, "valid"), smooth, label=title)
        axes.scatter(np.log10(x), np.array(hit) * 1.02 - 0.01, s=4, alpha=0.3)
    axes.axvline(0, color="grey", lw=0.8)
    axes.set_xlabel("log10 damage (1 = 0.01 delta1, 1 degree or 0.01 mIoU)")
    axes.set_ylabel("share refused")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
