"""The mini teacher against truth: the bars of its issue, measured on a held-out label set.

python -m tests.benchmarks.mini_teacher LABELS [--weights W] [--limit N] [--steps 1] [--seeds 1]
    [--mirror] [--crops 0] [--zoom] [--decoder] [--signs] [--readings 8] [--sweep] [--base W]
    [--wordings] [--out report.json] [--sheet sheet.png]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from distill.tune.readings import STYLES, framed
from distill.tune.scenes_cache import depth_codes, depth_of_codes_m
from teacher import calibrate, doubt, metrics, prompts, wordings
from teacher.codecs.segmentation import InstanceCodec, PaletteCodec
from teacher.consensus import variants
from teacher.generators import Query
from teacher.generators.mini import CLASS_MAX_DISTANCE, MiniTeacher
from teacher.generators.mini_generator import MiniGenerator, key_seed, noise_for, text_batch
from teacher.generators.mini_net import MiniNet
from teacher.label import Label, Task
from teacher.store import LabelSet

BOUNDS = {"min_m": 0.3, "max_m": 40.0}
KEPT = 0.97


def query_of(label: Label) -> Query:
    return Query(key=label.key, image=label.image, camera=label.camera)


def judge_depth(rows: list[tuple[Label, Any]]) -> dict[str, Any]:
    """All valid pixels within the bounds, then the kept share of them with the least doubt."""
    per_image = [metrics.depth_metrics(clipped(a.values), t, **BOUNDS) for t, a in rows]
    edges = [metrics.boundary_f1(clipped(a.values), t) for t, a in rows]
    maps = {"residual": [a.residual for _, a in rows]}
    if rows[0][1].uncertainty is not None:
        maps["spread"] = [np.nan_to_num(a.uncertainty, nan=9.0) for _, a in rows]
    valid = [np.isfinite(t) & (t > BOUNDS["min_m"]) & (t < BOUNDS["max_m"]) for t, _ in rows]
    kept = {}
    for name, found in maps.items():
        doubted = np.concatenate([d[v] for d, v in zip(found, valid, strict=True)])
        limit = np.quantile(doubted, KEPT)
        scores = [
            metrics.depth_metrics(clipped(a.values), np.where(d <= limit, t, np.nan), **BOUNDS)
            for (t, a), d in zip(rows, found, strict=True)
        ]
        kept[name] = {k: mean(scores, k) for k in ("delta1", "abs_rel")} | {"limit": float(limit)}
    doubts: dict[str, list[np.ndarray]] = {name: [] for name in maps}
    wrong = []
    for at, (truth, answer) in enumerate(rows):
        _, ratio = metrics.depth_error_maps(clipped(answer.values), truth, **BOUNDS)
        known = np.isfinite(ratio)
        wrong.append(ratio[known] >= 1.25)
        for name, found in maps.items():
            doubts[name].append(found[at][known])
    errors = np.concatenate(wrong)
    return {
        "delta1": mean(per_image, "delta1"),
        "abs_rel": mean(per_image, "abs_rel"),
        "boundary_f1": float(np.nanmean(edges)),
        "kept": kept,
        "error_auroc": {
            k: metrics.auroc(np.concatenate(v), errors) for k, v in doubts.items() if v
        },
    }  # fmt: skip


def clipped(depth_m: np.ndarray) -> np.ndarray:
    """Unknown counts as the near bound, sky as the far one: an answer is always judged."""
    lo, hi = BOUNDS["min_m"], BOUNDS["max_m"]
    return np.clip(np.nan_to_num(depth_m, nan=lo, posinf=hi), lo, hi).astype(np.float32)


def mean(rows: list[dict[str, Any]], name: str) -> float:
    values = [r[name] for r in rows if np.isfinite(r[name])]
    return float(np.mean(values)) if values else float("nan")


def judge_normals(rows: list[tuple[np.ndarray, Any]]) -> dict[str, float]:
    """Missing directions count as facing the camera."""
    scores = []
    for truth, answer in rows:
        normals = answer.values.copy()
        normals[np.isnan(normals[..., 0])] = (0, 0, 1)
        scores.append(metrics.normal_metrics(normals, truth))
    return {k: mean(scores, k) for k in ("mean_deg", "median_deg", "within_11_25", "within_30")}


def judge_palettes(teacher: MiniTeacher, labels: list[Label], steps: int) -> dict[str, float]:
    """mIoU with a random palette per image over all classes, absent ones included."""
    confusion = metrics.SemanticConfusion(classes=teacher.classes)
    for label in tqdm(labels, desc="palettes", leave=False):
        rng = np.random.default_rng(key_seed(label.key, 77))
        names = list(rng.permutation(list(teacher.classes.values())))
        colours = prompts.distinct_colours(len(names), rng=rng)
        palette = dict(zip(names, colours, strict=True))
        size = teacher.generator.working_size(*label.image.shape[:2])
        features = teacher.generator.encode([label.image], size)
        notation = prompts.NOTATIONS[int(rng.integers(len(prompts.NOTATIONS)))]
        text = prompts.semantic(palette, notation=notation, rng=rng)
        picture = teacher.generator.pictures(
            features, [text], [key_seed(label.key, 0)], steps=steps
        )[0]
        codec = PaletteCodec(palette, max_distance=CLASS_MAX_DISTANCE)
        by_name = {n: i for i, n in teacher.classes.items()}
        table = np.full(256, 255, np.uint8)
        table[: len(names)] = [by_name[n] for n in names]
        confusion.add(table[codec.decode(picture)[0]], label.values[Task.SEMANTIC])
    return {"miou": float(confusion.result()["miou"])}


def judge_instances(rows: list[tuple[Label, Any]], classes: dict[int, str]) -> dict[str, float]:
    """PQ over thing classes: an instance counts with its class."""
    things = {i: n for i, n in classes.items()}
    tally = metrics.PanopticTally(classes=things)
    for label, answer in rows:
        pred_class = np.zeros(answer.values.shape, np.uint8)
        for row in answer.extras["instances"]:
            pred_class[answer.values == row["id"]] = row["class_id"]
        truth = label.values[Task.INSTANCES]
        true_class = np.where(truth > 0, label.values[Task.SEMANTIC], 0).astype(np.uint8)
        tally.add((pred_class, answer.values), (true_class, truth))
    per_class = tally.result()["per_class"]
    found = {
        n: r for n, r in per_class.items() if r["tp"] + r["fn"] > 0 and n in set(classes.values())
    }
    scores = [r["pq"] for n, r in found.items() if r["tp"] + r["fn"] >= 5]
    return {"pq": float(np.nanmean(scores)), "classes": len(scores)}


def judge_decoder(teacher: MiniTeacher, labels: list[Label]) -> list[dict[str, float]]:
    """PQ of the instance decoder over its colour noise and smallest instance."""
    found, shipped = [], teacher.instance_codec
    for noise, area in itertools.product((6.0, 12.0, 22.0), (2e-4, 1e-3)):
        teacher.instance_codec = InstanceCodec.for_noise(noise, background="black", min_area=area)
        rows = [(x, teacher.answer([query_of(x)], [Task.INSTANCES])[0][Task.INSTANCES])
                for x in tqdm(labels, desc="decoder", leave=False)]  # fmt: skip
        found.append({"noise": noise, "min_area": area, **judge_instances(rows, teacher.classes)})
        print(found[-1], flush=True)
    teacher.instance_codec = shipped
    return found


def judge_signs(teacher: MiniTeacher, labels: list[Label]) -> dict[str, dict[str, float]]:
    """Error AUROC of depth as more signs of doubt are used; every other image is judged."""
    parts = []
    for label in tqdm(labels, desc="signs", leave=False):
        answers = teacher.answer([query_of(label)], list(calibrate.TASKS))[0]
        parts.append(calibrate.sample(label, answers, Task.DEPTH))
    fitted, judged = calibrate.joined(parts[::2]), calibrate.joined(parts[1::2])
    others = [n for n in fitted.signs if n.startswith(("residual_", "spread_"))]
    groups = {
        "own": [n for n in fitted.signs
                if n not in others and not n.startswith(("near_", "image_"))],
        "and of other answers": others,
        "and image means": [n for n in fitted.signs if n.startswith("image_")],
        "and blurred": [n for n in fitted.signs if n.startswith("near_")],
    }  # fmt: skip
    used: list[str] = []
    found = {}
    for group, names in groups.items():
        used += names
        some = [dataclasses.replace(p, signs={n: p.signs[n] for n in used})
                for p in (fitted, judged)]  # fmt: skip
        head = calibrate.fit_head(some[0].signs, some[0].right, None, lowest=0.0)
        numbers = calibrate.judge(head, some[1])
        found[group] = {k: numbers[k] for k in ("error_auroc", "brier_skill")}
    return found


def sweep(labels: list[Label], weights: str | None) -> list[dict[str, float]]:
    """Depth delta1 and seconds per image over steps and seeds."""
    found = []
    for steps, seeds in itertools.product((1, 2, 4, 8), (1, 3, 8)):
        if steps * seeds > 16:
            continue
        teacher = MiniTeacher(weights=weights, steps=steps, seeds=seeds, mirror=False, crops=0)
        began = time.perf_counter()
        answers = [teacher.answer([query_of(x)], [Task.DEPTH])[0][Task.DEPTH] for x in labels]
        seconds = (time.perf_counter() - began) / len(labels)
        rows = [(x.values[Task.DEPTH], a) for x, a in zip(labels, answers, strict=True)]
        numbers = judge_depth(rows)
        found.append({"steps": steps, "seeds": seeds, "seconds": round(seconds, 4),
                      "delta1": numbers["delta1"], "abs_rel": numbers["abs_rel"],
                      "boundary_f1": numbers["boundary_f1"]})  # fmt: skip
        print(found[-1], flush=True)
    return found


@torch.inference_mode()
def judge_generation(
    teacher: MiniTeacher, labels: list[Label], base: str | None
) -> dict[str, float]:
    """Squared error of the estimate from captions, at five times, beside an untrained network.

    ``base``: weights from before instruction tuning, which had seen half the size only, so that
    all are judged there.
    """
    torch.manual_seed(0)
    card = teacher.generator.card
    nets = {
        "after_tuning": teacher.generator.net,
        "untrained": MiniNet(**card["network"]).eval(),
    }
    if base:
        nets["before_tuning"] = MiniGenerator.from_pretrained(base).net
    losses = dict.fromkeys(nets, 0.0)
    for label in labels:
        whole = torch.from_numpy(label.image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        clean = torch.nn.functional.avg_pool2d(whole, 2)
        noise = noise_for([key_seed(label.key, 3)], clean.shape[2:])
        text = text_batch([prompts.generate(label.provenance["caption"])], max_tokens=120,
                          device=torch.device("cpu"))  # fmt: skip
        for name, net in nets.items():
            nothing = net.no_image(tuple(clean.shape[2:]), 1)
            for s in (0.1, 0.3, 0.5, 0.7, 0.9):
                noisy = (1 - s) * clean + s * noise
                guess = net(noisy, torch.tensor([s]), net.text(text), nothing)
                losses[name] += float((guess - clean).square().mean()) / 5 / len(labels)
    return losses


def judge_zoom(teacher: MiniTeacher, labels: list[Label]) -> dict[str, float]:
    """AUROC of `doubt.zoom`: four corner windows of 80 %, each asked alone, against the whole."""
    doubts, wrong = [], []
    for label in tqdm(labels, desc="zoom", leave=False):
        h, w = label.image.shape[:2]
        depths = []
        for variant in variants(crops=4):
            query = variant.apply(query_of(label))
            answer = teacher.answer([query], [Task.DEPTH])[0][Task.DEPTH]
            depths.append(variant.undo(answer, height=h, width=w).values)
        _, ratio = metrics.depth_error_maps(clipped(depths[0]), label.values[Task.DEPTH], **BOUNDS)
        known = np.isfinite(ratio)
        wrong.append(ratio[known] >= 1.25)
        doubts.append(doubt.zoom(depths[0], depths[1:])[known])
    return {"error_auroc": metrics.auroc(np.concatenate(doubts), np.concatenate(wrong))}


def judge_readings(teacher: MiniTeacher, labels: list[Label], *, steps: int, seeds: int) -> Any:
    """Framed scenes have two valid depths: does each seed give one, and do the seeds give both?

    Distance is the mean |ln ratio|; ``gap`` that between the readings. A seed is ``near`` a reading
    if it is closer than a third of the gap.
    """
    metres, focal_px = depth_of_codes_m(), teacher.generator.card["focal_px"]
    found: dict[str, list[dict[str, float]]] = {style: [] for style in STYLES}
    for label, style in itertools.product(tqdm(labels, desc="readings", leave=False), STYLES):
        codes = depth_codes(label.values[Task.DEPTH], scale=focal_px / label.camera.fx)
        picture = np.ascontiguousarray(label.image.transpose(2, 0, 1)).astype(np.float32)
        image, readings = framed(picture / 127.5 - 1, codes, style=style)
        shown = np.ascontiguousarray(((image + 1) * 127.5).round().transpose(1, 2, 0))
        features = teacher.generator.encode([shown.astype(np.uint8)], codes.shape)
        truths = [np.where(np.isnan(metres[r]), 60.0, metres[r]) for r in readings]  # sky: far
        gap = float(np.abs(np.log(truths[0] / truths[1])).mean())
        distances = []
        for start in range(0, seeds, 8):
            some = [key_seed(label.key, s) for s in range(start, min(start + 8, seeds))]
            drawn = teacher.generator.pictures(
                features.select(torch.zeros(len(some), dtype=torch.long)),
                [prompts.depth()] * len(some), some, steps=steps,
            )  # fmt: skip
            for one in drawn:
                depth = teacher.depth_codec.decode(one)[0]
                depth = np.clip(np.nan_to_num(depth, nan=0.3, posinf=60.0), 0.05, 60.0)
                distances.append([np.abs(np.log(depth / t)).mean() for t in truths])
        d = np.array(distances)
        nearest = d.argmin(1)
        near = d.min(1) < gap / 3
        found[style].append({
            "covers_both": float(near[nearest == 0].any() and near[nearest == 1].any()),
            "share_of_first": float((nearest == 0).mean()),
            "near_one": float(near.mean()), "distance": float(d.min(1).mean()), "gap": gap,
        })  # fmt: skip
    return {style: {k: float(np.mean([r[k] for r in rows])) for k in rows[0]}
            for style, rows in found.items()} | {"steps": steps, "seeds": seeds}  # fmt: skip


def judge_wordings(teacher: MiniTeacher, labels: list[Label]) -> dict[str, dict[str, float]]:
    """The same scenes asked in the default words and in blind held-out ones, one after another.

    What is read as something else counts as no answer there, so ``read`` says how many are.
    """
    plain, found = teacher.prompt, {}
    names = dict(zip(teacher.palette.names, teacher.palette.colours, strict=True))
    palette = prompts.palette_text(names, notation="hex")
    for asked in ("default", "held-out"):
        rows: dict[Task, list[Any]] = {task: [] for task in Task}
        for n, label in enumerate(tqdm(labels, desc=f"{asked} wordings", leave=False)):

            def prompt(task: Task, *, name: str = "", n: int = n) -> str:
                texts = [text for part in wordings.HELD_OUT[2:] for text in part[str(task)]]
                words = {"name": name, "background": "black", "palette": palette, "map": ""}
                return prompts.fill(texts[n % len(texts)], **words)

            teacher.prompt = plain if asked == "default" else prompt  # type: ignore[method-assign]
            for task in Task:
                text = teacher.prompt(task, name="box")
                if teacher.generator.kind_of(text)[0] == str(task):
                    answer = teacher.answer([query_of(label)], [task])[0][task]
                    rows[task].append((label, answer))
        confusion = metrics.SemanticConfusion(classes=teacher.classes)
        for label, answer in rows[Task.SEMANTIC]:
            confusion.add(answer.values, label.values[Task.SEMANTIC])
        depth, normals = (
            [(x.values[t], a) for x, a in rows[t]] for t in (Task.DEPTH, Task.NORMALS)
        )
        found[asked] = {
            **{f"{task}_read": len(rows[task]) / len(labels) for task in Task},
            **{k: judge_depth(depth)[k] for k in ("delta1", "abs_rel", "boundary_f1")},
            "normals_mean_deg": judge_normals(normals)["mean_deg"],
            "miou": float(confusion.result()["miou"]),
            "pq": judge_instances(rows[Task.INSTANCES], teacher.classes)["pq"],
        }
        print(asked, found[asked], flush=True)
    teacher.prompt = plain  # type: ignore[method-assign]
    return found


def sheet(teacher: MiniTeacher, labels: list[Label], path: str) -> None:
    """Rows of scenes: image, depth, normals, classes, one class of things; then drawn captions."""
    rows = []
    for label in labels:
        h, w = label.image.shape[:2]
        features = teacher.generator.encode([label.image], (h, w))
        classes = label.values[Task.SEMANTIC][label.values[Task.INSTANCES] > 0]
        name = teacher.classes[int(np.bincount(classes).argmax())] if classes.size else "box"
        texts = [teacher.prompt(t, name=name) for t in Task]
        some = features.select(torch.zeros(len(texts), dtype=torch.long))
        seeds = [key_seed(label.key, 0)] * len(texts)
        answers = teacher.generator.pictures(some, texts, seeds, steps=teacher.steps)
        rows.append(np.concatenate([label.image, *answers], axis=1))
    captions = [prompts.generate(x.provenance["caption"]) for x in labels]
    count = len(rows[0][0]) // labels[0].image.shape[1]
    for caption in captions[:2]:
        drawn = [teacher.generator(None, caption, seed=s, steps=32) for s in range(count)]
        rows.append(np.concatenate(drawn, axis=1))
        print(caption)
    Image.fromarray(np.concatenate(rows)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("labels")
    parser.add_argument("--weights")
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--mirror", action="store_true")
    parser.add_argument("--crops", type=int, default=0)
    parser.add_argument("--zoom", action="store_true", help="how well windows find wrong pixels")
    parser.add_argument("--decoder", action="store_true", help="PQ over the decoder's settings")
    parser.add_argument("--signs", action="store_true", help="depth AUROC over the signs of doubt")
    parser.add_argument("--readings", type=int, default=0, help="scenes to frame, 32 seeds each")
    parser.add_argument("--base", help="weights from before instruction tuning")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--wordings", action="store_true", help="blind wordings beside the default")
    parser.add_argument("--sheet", help="a PNG of answers and of drawn captions, nothing else")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    label_set = LabelSet(given.labels)
    keys = label_set.keys[: given.limit or None]
    labels = [label_set[k] for k in keys]
    teacher = MiniTeacher(
        weights=given.weights,
        steps=given.steps,
        seeds=given.seeds,
        mirror=given.mirror,
        crops=given.crops,
    )
    if given.sheet:
        return sheet(teacher, labels[:4], given.sheet)
    teacher.answer([query_of(labels[0])], list(Task))  # compiled kernels, first allocations
    began, answers = time.perf_counter(), []
    for label in tqdm(labels, desc="answers"):
        answers.append(teacher.answer([query_of(label)], list(Task))[0])
    seconds = (time.perf_counter() - began) / len(labels)

    def rows(task: Task) -> list[Any]:
        return [(x.values[task], a[task]) for x, a in zip(labels, answers, strict=True)]

    report = {
        "labels": given.labels, "images": len(labels), "steps": given.steps, "seeds": given.seeds,
        "mirror": given.mirror, "crops": given.crops, "threads": given.threads,
        "weights": teacher.generator.sha256,
        "steps_trained": teacher.generator.card.get("steps_trained"),
        "seconds_per_image_four_tasks": seconds,
        "depth": judge_depth(rows(Task.DEPTH)),
        "normals": judge_normals(rows(Task.NORMALS)),
        "semantic": judge_palettes(teacher, labels, given.steps),
        "instances": judge_instances(
            [(x, a[Task.INSTANCES]) for x, a in zip(labels, answers, strict=True)], teacher.classes
        ),
        "generation": judge_generation(teacher, labels[:64], given.base),
    }  # fmt: skip
    if given.zoom:
        report["zoom"] = judge_zoom(teacher, labels)
    if given.decoder:
        report["decoder"] = judge_decoder(teacher, labels)
    if given.signs:
        report["signs"] = judge_signs(teacher, labels)
    if given.readings:
        report["readings"] = [
            judge_readings(teacher, labels[: given.readings], steps=steps, seeds=32)
            for steps in (1, 4, 8)
        ]
    if given.wordings:
        report["wordings"] = judge_wordings(teacher, labels)
    if given.sweep:
        report["sweep"] = sweep(labels[:100], given.weights)
    text = json.dumps(report, indent=1)
    print(text)
    if given.out:
        Path(given.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
