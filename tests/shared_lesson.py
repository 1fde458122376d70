"""One process of a shared lesson: RANK and the like in the environment, a folder as argument."""

import json
import os
import sys
from pathlib import Path

import torch

from distill.module import Lesson
from distill.parallel import joined, rank, share_norms
from distill.trainer import trainer_config
from student.model import Student

CLASSES = {0: "a", 1: "b", 2: "c"}


def batch_of(count: int) -> dict[str, torch.Tensor]:
    """A batch in which every image knows something else."""
    torch.manual_seed(1)
    size = (32, 64)
    batch = {
        "image": torch.rand(count, 3, *size),
        "depth": torch.rand(count, 1, *size) * 5 + 1,
        "normals": torch.nn.functional.normalize(torch.randn(count, 3, *size), dim=1),
        "semantic": torch.randint(-1, 3, (count, *size)),
        "instances": torch.rand(count, 3, *size),
        "depth_uncertainty": torch.rand(count, 1, *size) * 0.3,
        "normals_uncertainty": torch.full((count, 1, *size), torch.nan),
        "semantic_uncertainty": torch.full((count, 1, *size), torch.nan),
        "depth_space": torch.tensor([0, 0, 0, 1] * (count // 4)),
        "camera_known": torch.tensor([True, False] * (count // 2)),
        "focal_px": torch.full((count,), 60.0),
        "centre_px": torch.full((count, 2), 30.0),
    }
    # borders are everywhere, but in some images of the second process (every other) at one place
    batch["depth"][5::2] = 3.0
    batch["depth"][5::2, :, :, 40:] = 4.0
    batch["normals"][5::2] = torch.tensor([0.0, 0.6, 0.8]).view(3, 1, 1)
    batch["normals"][5::2, :, 9:] = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1)
    batch["normals_uncertainty"][5::2, :, 20:] = 7.0
    batch["depth"][0, :, :, 20:] = torch.nan
    batch["depth"][1] = torch.nan
    batch["normals"][2] = torch.nan
    batch["semantic"][3] = -1
    batch["instances"][:, 0, ::7, ::9] = 1.0
    return batch


def learn(batch: dict[str, torch.Tensor], *, share: bool) -> tuple[Lesson, list[float]]:
    """Two steps of plain gradient descent on ``batch``; the lesson and its losses."""
    torch.manual_seed(0)
    tasks = ["depth", "normals", "semantic", "instances"]
    student = Student(
        backbone="test_efficientnet", height=32, width=64, tasks=tasks, classes=CLASSES
    )
    config = {"steps": 9, "warmup_steps": 1, "device": "cpu", "batch_size": 8, "accumulate": 2}
    lesson = Lesson(student, trainer_config(config))
    if share:
        share_norms(lesson.student)
    optimizer = torch.optim.SGD(
        [{"params": list(student.parameters()), "factor": 1.0}], lr=lesson.config.lr
    )
    Lesson.device = torch.device("cpu")  # type: ignore[assignment]
    lesson.optimizers = lambda: optimizer  # type: ignore[method-assign]
    lesson.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign]
    losses = []
    for step in range(2):
        lesson.training_step(batch, step)
        losses.append(float(lesson.last["total"]))
    return lesson, losses


def main(folder: Path) -> None:
    """Learn one's share, then a step that only the second process finds bad, then a signal."""
    torch.set_num_threads(1)
    with joined("cpu"):
        whole = batch_of(8)
        mine = {k: v[rank() :: 2] for k, v in whole.items()}
        lesson, losses = learn(mine, share=True)
        state = {k: v.clone() for k, v in lesson.student.state_dict().items()}
        if rank() == 1:
            mine["image"][0, 0, 0, 0] = torch.nan
        lesson.training_step(mine, 2)
        after = lesson.student.state_dict()
        untouched = all(torch.equal(after[k], v) for k, v in state.items())
        lesson.trained_s = 10.0 + rank()
        signal, tired = lesson.agree(signal=15 if rank() == 1 else 0)
    facts = {
        "losses": losses,
        "skipped": lesson.skipped,
        "untouched": untouched,
        "agreed": [signal, tired, lesson.trained_s],
    }
    torch.save(state, folder / f"{os.environ['RANK']}.pt")
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
