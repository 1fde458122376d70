"""How fast a student is and learns, side by side in one run.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.student_speed graph
    OMP_NUM_THREADS=2 python -m tests.benchmarks.student_speed teacher \\
        [students=a/student.safetensors,...]
    OMP_NUM_THREADS=1 python -m tests.benchmarks.student_speed loader labels=labels/x
    OMP_NUM_THREADS=1 python -m tests.benchmarks.student_speed plot \\
        students=a/student.safetensors,b/student.safetensors held=truth/held-out \\
        once=answers/once six=answers/six out=docs/img/student-speed.png

graph: ``student=tiny`` (depth + normals, 256x320) in ONNX Runtime on one thread against the graph
of Depth-Anything-V2-Small with random weights at the nearest size it takes (14 px steps), called
in turns, best and median of N. teacher: ``tiny`` and ``small`` for 96x128, and the ``students`` of
that size, against the shipped mini teacher's depth and normals, one asking and six (the default
consensus), as many threads as OMP_NUM_THREADS. plot: time per megapixel against accuracy on truth,
of trained students of one size and of the teacher's stored answers (`distill label
images=truth/held-out`). loader: the loader alone against the training step, and the share of a real
run that is spent outside forward, backward and optimiser.
"""

import functools
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import yaml

from export.onnx_graph import card_of, to_onnx
from student.checkpoint import load_student
from student.model import Student
from teacher.generators import Query, load_teacher
from teacher.label import Camera, Task
from teacher.score import score
from teacher.store import LabelSet
from tests.benchmarks.student_heads import per_image, predictor

ROUNDS = 7


def session(data: bytes | str, threads: int = 1) -> onnxruntime.InferenceSession:
    """On the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def depth_anything_small(folder: Path, height: int, width: int) -> onnxruntime.InferenceSession:
    """The published architecture (ViT-S/14, DPT 64, 48..384), random weights, opset 18."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518,
        patch_size=14, out_features=["stage3", "stage6", "stage9", "stage12"],
        reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=384, patch_size=14,
        neck_hidden_sizes=[48, 96, 192, 384], fusion_hidden_size=64, head_hidden_size=32,
    )  # fmt: skip
    model = DepthAnythingForDepthEstimation(config).eval()
    print(f"Depth-Anything-V2-Small: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M")

    class Depth(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return model(pixel_values=x).predicted_depth

    path = folder / "da.onnx"
    image = torch.zeros(1, 3, height, width)
    torch.onnx.export(Depth(), (image,), str(path), dynamo=True, opset_version=18, verbose=False)
    return session(str(path))


def graph() -> None:
    """Latency of the two graphs in turns."""
    preset = Path(__file__).parents[2] / "conf" / "student" / "tiny.yaml"
    student = Student(**yaml.safe_load(preset.read_text())).eval()
    height, width = student.config["height"], student.config["width"]
    print(f"tiny: {sum(p.numel() for p in student.parameters()) / 1e6:.2f} M, {height}x{width}")
    card = card_of(student, batch=1, focal_input=False)
    ours = session(to_onnx(student, card).SerializeToString())
    near = [round(v / 14) * 14 for v in (height, width)]
    with tempfile.TemporaryDirectory() as folder:
        theirs = depth_anything_small(Path(folder), near[0], near[1])
    pairs = {
        "tiny": (ours, {"image": np.zeros((1, height, width, 3), np.uint8)}),
        "theirs": (theirs, {theirs.get_inputs()[0].name: np.zeros((1, 3, *near), np.float32)}),
    }
    in_turns(
        {n: functools.partial(runtime.run, None, feed) for n, (runtime, feed) in pairs.items()},
        repeat={"tiny": 5},
        against=["theirs"],
    )


def in_turns(
    calls: dict[str, Callable[[], Any]], *, repeat: dict[str, int], against: Sequence[str]
) -> dict[str, float]:
    """Call everything in turns; print wall and CPU ms, and how many times faster each is.

    Returns the best wall time of each [ms].
    """
    wall: dict[str, list[float]] = {name: [] for name in calls}
    busy: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(ROUNDS + 1):
        for name, call in calls.items():
            for _ in range(repeat.get(name, 1)):
                at, cpu = time.perf_counter(), time.process_time()
                call()
                if round_number:
                    wall[name].append(1000 * (time.perf_counter() - at))
                    busy[name].append(1000 * (time.process_time() - cpu))
    for name in calls:
        print(
            f"{name}: wall best {min(wall[name]):.1f} median {statistics.median(wall[name]):.1f}"
            f" ms; CPU best {min(busy[name]):.1f} median {statistics.median(busy[name]):.1f} ms"
        )
    for slow, name in itertools.product(against, calls):
        for kind, times in (("wall", wall), ("CPU", busy)):
            if name not in against:
                best = min(times[slow]) / min(times[name])
                middle = statistics.median(times[slow]) / statistics.median(times[name])
                print(f"{slow} / {name} ({kind}): best {best:.1f}x, median {middle:.1f}x")
    return {name: min(times) for name, times in wall.items()}


def graph_call(student: Student, image: np.ndarray) -> Callable[[], Any]:
    """The student's ONNX graph on one picture, as many threads as torch has."""
    card = card_of(student.eval(), batch=1, focal_input=False)
    runtime = session(to_onnx(student, card).SerializeToString(), torch.get_num_threads())
    return functools.partial(runtime.run, None, {"image": image[None]})


def asking_calls(image: np.ndarray) -> dict[str, Callable[[], Any]]:
    """The mini teacher's depth and normals of one picture, asked once and six times."""
    height, width = image.shape[:2]
    query = Query(key="0" * 24, image=image, camera=Camera.assumed(width, height))
    once = load_teacher(name="mini", mirror=False, crops=0)
    six = load_teacher(name="mini")
    tasks = [Task.DEPTH, Task.NORMALS]
    return {
        name: functools.partial(teacher.answer, [query], tasks)
        for name, teacher in (("one asking", once), ("six askings", six))
    }


def against_teacher(options: dict[str, str]) -> None:
    """Students for 96x128 against the mini teacher on a picture of that size."""
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    calls: dict[str, Callable[[], Any]] = {}
    for name in ("tiny", "small"):
        preset = Path(__file__).parents[2] / "conf" / "student" / f"{name}.yaml"
        student = Student(**yaml.safe_load(preset.read_text()) | {"height": 96, "width": 128})
        calls[name] = graph_call(student, image)
    for path in filter(None, options.get("students", "").split(",")):
        calls[path] = graph_call(load_student(path), image)
    slow = asking_calls(image)
    repeat = dict.fromkeys(calls, 20) | {"one asking": 3}
    in_turns(calls | slow, repeat=repeat, against=list(slow))


def plot(options: dict[str, str]) -> None:
    """Milliseconds per megapixel against AbsRel, boundary F1 and normals on truth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    held = list(LabelSet(options["held"]))
    image = held[0].image
    measures = [("depth", "abs_rel"), ("depth", "boundary_f1"), ("normals", "mean_deg")]
    found: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for path in options["students"].split(","):
        student = load_student(path)
        name = Path(path).parent.name
        calls[name] = graph_call(student, image)
        found[name] = score(predictor(student), held, tasks=list(student.tasks))
    slow = asking_calls(image)
    for name, key in zip(slow, ("once", "six"), strict=True):
        answers = LabelSet(options[key])
        found[name] = score(
            functools.partial(lambda x, stored: stored[x.key].values, stored=answers),
            [x for x in held if x.key in set(answers.keys)],
            tasks=["depth", "normals"],
        )
    best = in_turns(
        calls | slow, repeat=dict.fromkeys(calls, 20) | {"one asking": 3}, against=list(slow)
    )
    megapixels = image.shape[0] * image.shape[1] / 1e6
    figure, axes = plt.subplots(1, len(measures), figsize=(10, 3.2), layout="constrained")
    for axis, (task, measure) in zip(axes, measures, strict=True):
        for name, report in found.items():
            if task not in report["rows"][0]:
                continue
            value = float(np.nanmean(per_image(report, task, measure)))
            x = best[name] / megapixels
            print(f"{name}: {x:.0f} ms per megapixel, {measure} {value:.4f}")
            axis.plot(x, value, "s" if name in slow else "o", color="C1" if name in slow else "C0")
            side = -1 if name in slow else 1  # the slow ones lie at the right
            axis.annotate(
                name, (x, value), xytext=(5 * side, 5), textcoords="offset points", fontsize=7,
                ha="right" if name in slow else "left",
            )  # fmt: skip
        axis.set(xscale="log", xlabel="ms per megapixel", ylabel=f"{task} {measure}")
        axis.margins(x=0.35, y=0.15)
    figure.savefig(options["out"], dpi=110)


def loader(labels: str) -> None:
    """CPU seconds per batch of the loader alone, of a step, and the share outside steps."""
    from distill.data import DataModule
    from distill.samples import Frame
    from distill.train import train
    from teacher.store import LabelSet

    student = {"backbone": "mobilenetv4_conv_small", "height": 96, "width": 128}
    frame = Frame(height=96, width=128, canonical_focal_px=110.0, tasks=("depth", "normals"))
    data = DataModule([LabelSet(labels)], frame=frame, threads=1, batch_size=16)
    for title in ("first visit, decoding", "from memory"):
        cpu, at = time.process_time(), time.perf_counter()
        many = sum(1 for _ in data.train_batches(steps=20))
        spent = (time.process_time() - cpu) / many, (time.perf_counter() - at) / many
        print(f"loader, {title}: {1000 * spent[0]:.0f} CPU ms, {1000 * spent[1]:.0f} ms a batch")
    with tempfile.TemporaryDirectory() as folder:
        cpu = time.process_time()
        result = train(
            data=labels, out=f"{folder}/run", student=student,
            trainer={"steps": 40, "device": "cpu", "threads": 1, "val_every": 1000,
                     "checkpoint_every": 1000},
        )  # fmt: skip
        print(
            f"run: {result['summary']}; {time.process_time() - cpu:.0f} CPU s; outside steps "
            f"{100 * result['outside_steps']:.1f} %"
        )


if __name__ == "__main__":
    options = dict(a.split("=", 1) for a in sys.argv[2:])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]) if sys.argv[1] == "teacher" else 1)
    match sys.argv[1]:
        case "teacher":
            against_teacher(options)
        case "graph":
            graph()
        case "plot":
            plot(options)
        case "loader":
            loader(options["labels"])
        case other:
            sys.exit(f"{other}: expected teacher, graph, plot or loader")
