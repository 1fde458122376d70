import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from analytic_scenes import analytic_label, write_analytic_set

from distill import conductor, module
from distill.conductor import Stopped
from distill.data import in_validation
from distill.journal import Journal
from distill.lesson_report import read_rows
from distill.module import Diverged, lr_factor
from distill.resume import alone_in
from distill.train import train
from distill.trainer import trainer_config
from student.checkpoint import load_student
from teacher.errors import EnvironmentFailure, UsageError
from teacher.store import LabelSet, write_label_set

STUDENT = {
    "backbone": "test_efficientnet",
    "height": 32,
    "width": 64,
    "decoder_channels": 16,
    "tasks": ["depth", "normals", "semantic"],
}
TRAINER = {
    "steps": 12,
    "batch_size": 4,
    "warmup_steps": 2,
    "val_every": 5,
    "checkpoint_every": 4,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sets") / "analytic"
    write_analytic_set(out, n=24, height=32, width=48)
    return out


@pytest.fixture(scope="module")
def whole_run(labels, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, train(data=str(labels), out=str(out), student=STUDENT, trainer=TRAINER)


def curve(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def largest_difference(a: Path, b: Path) -> float:
    rows = list(zip(curve(a), curve(b), strict=True))
    assert [x["step"] for x, _ in rows] == list(range(1, len(rows) + 1))
    return max(abs(x[k] - y[k]) for x, y in rows for k in x)


def test_a_run_leaves_a_student_its_logs_and_nothing_to_resume(whole_run, labels):
    out, result = whole_run
    assert sorted(p.name for p in out.iterdir()) == [
        "metrics.csv",
        "report.html",
        "student.safetensors",
        "tensorboard",
        "train.json",
        "validation.csv",
        "validation.png",
    ]
    assert result["steps"] == 12 and result["skipped"] == 0 and len(curve(out)) == 12
    assert set(result["validation"]) == {
        "loss", "abs_rel", "delta1", "boundary_f1", "mean_deg", "pixel_accuracy", "miou"
    }  # fmt: skip
    assert 0 <= result["outside_steps"] < 1 and result["bad_pixels"] == {}
    student = load_student(out / "student.safetensors")
    assert student.config["classes"] == {"0": "floor", "1": "wall", "2": "ball"}
    plan_hash = json.loads((labels / "dataset.json").read_text())["plan_hash"]
    assert student.provenance["data"][0]["plan_hash"] == plan_hash
    assert student.provenance["data"][0]["teacher"] == {"name": "analytic"}
    assert json.loads((out / "train.json").read_text())["result"] == result
    with (out / "validation.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["5", "10", "12"]
    assert list((out / "tensorboard").glob("events*"))


def test_a_finished_run_started_again_says_so_and_touches_nothing(whole_run, labels):
    out, result = whole_run
    before = (out / "student.safetensors").stat().st_mtime_ns
    again = train(data=str(labels), out=str(out), student=STUDENT, trainer=TRAINER)
    assert "already trained" in again["summary"] and again["steps"] == result["steps"]
    assert (out / "student.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "number, code, step",
    [(signal.SIGTERM, 143, 6), (signal.SIGINT, 130, 5)],  # a validation is due after step 5
)
def test_a_signal_ends_the_step_and_the_next_start_is_the_same_lesson(
    whole_run, labels, tmp_path, monkeypatch, number, code, step
):
    out, note = tmp_path / "run", Journal.step
    before = signal.getsignal(number)

    def note_and_signal(journal: Journal, lesson: module.Lesson) -> None:
        note(journal, lesson)
        if lesson.step_number == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Journal, "step", note_and_signal)
    with pytest.raises(Stopped, match=f"after step {step}; the same command goes on") as caught:
        train(data=str(labels), out=str(out), student=STUDENT, trainer=TRAINER)
    assert caught.value.exit_code == code and signal.getsignal(number) == before
    assert load_student(out / "student.safetensors").provenance["steps"] == step
    monkeypatch.undo()
    train(data=str(labels), out=str(out), student=STUDENT, trainer={**TRAINER, "threads": 3})
    assert largest_difference(whole_run[0], out) <= 1e-6
    held = [read_rows(f / "validation.csv") for f in (whole_run[0], out)]
    for a, b in zip(*held, strict=True):  # patience counts them: none is left out
        assert a == pytest.approx(b, abs=1e-5)
    want, got = (load_student(f / "student.safetensors") for f in (whole_run[0], out))
    for name, value in want.state_dict().items():
        torch.testing.assert_close(got.state_dict()[name], value, rtol=0, atol=1e-6)


def test_a_crash_between_checkpoints_repeats_the_lost_steps(
    whole_run, labels, tmp_path, monkeypatch
):
    out, note = tmp_path / "run", Journal.step

    def note_and_crash(journal: Journal, lesson: module.Lesson) -> None:
        note(journal, lesson)
        if lesson.step_number == 7:
            raise MemoryError("as if killed")

    monkeypatch.setattr(Journal, "step", note_and_crash)
    with pytest.raises(MemoryError):
        train(data=str(labels), out=str(out), student=STUDENT, trainer=TRAINER)
    monkeypatch.undo()
    with (out / "metrics.csv").open("a") as file:
        file.write("8,0.5")  # a torn line
    train(data=str(labels), out=str(out), student=STUDENT, trainer=TRAINER)
    assert largest_difference(whole_run[0], out) <= 1e-6


def test_a_crash_in_the_last_validation_repeats_no_step(whole_run, labels, tmp_path, monkeypatch):
    out, real = tmp_path / "run", conductor.validate

    def crash(lesson: module.Lesson, data: object) -> tuple:
        if lesson.step_number == 11:
            raise MemoryError("as if killed")
        return real(lesson, data)

    monkeypatch.setattr(conductor, "validate", crash)
    trainer = {**TRAINER, "steps": 11}
    with pytest.raises(MemoryError):
        train(data=str(labels), out=str(out), student=STUDENT, trainer=trainer)
    monkeypatch.setattr(conductor, "validate", real)
    monkeypatch.setattr(module.Lesson, "training_step", None)
    assert train(data=str(labels), out=str(out), student=STUDENT, trainer=trainer)["steps"] == 11
    (out / "student.safetensors").unlink()
    with pytest.raises(UsageError, match=r"finished, but student\.safetensors is gone"):
        train(data=str(labels), out=str(out), student=STUDENT, trainer=trainer)


def test_two_lessons_in_one_folder_are_refused_and_litter_goes(labels, tmp_path):
    out = tmp_path / "run"
    trainer = {**TRAINER, "steps": 1}
    arguments = {"data": str(labels), "out": str(out), "student": STUDENT, "trainer": trainer}
    out.mkdir()
    (out / ".state.safetensors.x.tmp").write_bytes(b"killed while writing")
    with alone_in(out), pytest.raises(UsageError, match="another process trains there"):
        train(**arguments)
    assert train(**arguments)["steps"] == 1
    assert not list(out.glob(".*"))


def test_a_slow_machine_is_saved_by_the_clock(labels, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(conductor, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(
        conductor, "save_state", lambda lesson, *_: saved.append(lesson.step_number)
    )
    trainer = {**TRAINER, "steps": 3, "checkpoint_every": 500}
    train(data=str(labels), out=str(tmp_path / "run"), student=STUDENT, trainer=trainer)
    assert saved == [1, 2, 3]


@pytest.mark.slow
def test_kill_9_at_any_time_resumes_to_the_same_curve(whole_run, labels, tmp_path):
    out = tmp_path / "run"
    code = (
        "import json, sys, torch; torch.set_num_threads(1)\n"
        "from distill.train import train\n"
        "train(**json.loads(sys.argv[1]))"
    )
    arguments = {"data": str(labels), "out": str(out), "student": STUDENT, "trainer": TRAINER}
    for wait_s in (0.0, 0.3, 0.6):
        process = subprocess.Popen([sys.executable, "-c", code, json.dumps(arguments)])
        while process.poll() is None and not (out / "state.safetensors").exists():
            time.sleep(0.05)
        time.sleep(wait_s)
        process.kill()
        process.wait()
    subprocess.run([sys.executable, "-c", code, json.dumps(arguments)], check=True)
    assert largest_difference(whole_run[0], out) <= 1e-5  # another thread count than here
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def poisoned(monkeypatch, bad: set[int]) -> list[int]:
    """From now on the loss of the given steps is NaN; returns the steps seen."""
    real, seen = module.all_losses, []

    def losses(answer, batch):
        seen.append(len(seen) + 1)
        out = real(answer, batch)
        return out | {"total": out["total"] * (math.nan if seen[-1] in bad else 1)}

    monkeypatch.setattr(module, "all_losses", losses)
    return seen


def test_a_bad_step_is_skipped_counted_and_leaves_no_trace(labels, tmp_path, monkeypatch):
    poisoned(monkeypatch, {3, 4, 9})
    out = tmp_path / "run"
    result = train(data=str(labels), out=str(out), student=STUDENT, trainer=TRAINER)
    assert result["skipped"] == 3
    rows = curve(out)
    assert [math.isnan(row["total"]) for row in rows] == [s in (3, 4, 9) for s in range(1, 13)]
    state = load_student(out / "student.safetensors").state_dict()
    assert all(torch.isfinite(v).all() for v in state.values())


def test_a_bad_step_moves_neither_weights_nor_statistics(monkeypatch):
    from student.model import Student

    student = Student(**{**STUDENT, "tasks": ["depth"]})
    lesson = module.Lesson(student, trainer_config({**TRAINER, "bad_steps_limit": 2}))
    optimizer = lesson.configure_optimizers()
    monkeypatch.setattr(lesson, "optimizers", lambda: optimizer)
    monkeypatch.setattr(lesson, "manual_backward", lambda loss: loss.backward())
    monkeypatch.setattr(type(lesson), "device", torch.device("cpu"), raising=False)
    batch = {
        "image": torch.rand(2, 3, 32, 64),
        "depth": torch.rand(2, 1, 32, 64) + 1,
        "depth_uncertainty": torch.full((2, 1, 32, 64), math.nan),
    }
    lesson.training_step(batch, 0)
    before = {k: v.clone() for k, v in lesson.state_dict().items()}
    batch["image"][0, 0, 0, 0] = math.nan  # poisons loss, gradients and batch statistics
    lesson.training_step(batch, 1)
    after = lesson.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert (lesson.skipped, lesson.step_number) == (1, 2)
    with pytest.raises(Diverged, match=r"2 steps in a row .* not finite"):
        lesson.training_step(batch, 2)
    assert Diverged.exit_code == 3


def test_schedule_warms_up_and_ends_at_a_hundredth():
    assert lr_factor(step=0, progress=0, warmup_steps=10) == pytest.approx(0.1)
    assert lr_factor(step=50, progress=0.5, warmup_steps=10) == pytest.approx(0.505)
    assert lr_factor(step=99, progress=1, warmup_steps=10) == pytest.approx(0.01)


def test_the_average_forgets_the_start_and_copies_statistics():
    from student.model import Student

    student = Student(**{**STUDENT, "tasks": ["depth"]})
    average = module.MovingAverage(student, decay=0.9)
    with torch.no_grad():
        for step in range(3):
            student.decoder.where.weight.fill_(float(step + 1))
            student.decoder.fuse[0][1].running_mean.fill_(float(step))
            average.update(student, step)
    # decays 1/10, 2/11, 3/12: w = ((0.1 w0 + 0.9) 2/11 + 2 * 9/11) 3/12 + 3 * 9/12, w0 ~ small
    got = average.student.decoder.where.weight.mean().item()
    assert got == pytest.approx((0.9 * 2 / 11 + 18 / 11) / 4 + 9 / 4, abs=2e-3)
    assert (average.student.decoder.fuse[0][1].running_mean == 2).all()


def test_minutes_end_a_lesson_and_its_schedule(labels, tmp_path):
    result = train(
        data=str(labels),
        out=str(tmp_path / "run"),
        student=STUDENT,
        trainer={**TRAINER, "steps": 100000, "minutes": 0.02},
    )
    assert 1 <= result["steps"] < 1000
    assert curve(tmp_path / "run")[-1]["lr"] < 1e-3


@pytest.mark.slow
def test_a_student_learns_the_analytic_scenes(tmp_path):
    """Measured 2026-11-23: delta1 0.805, abs_rel 0.169, 8.3 degrees, mIoU 0.868 in 25 CPU s."""
    write_analytic_set(tmp_path / "set", n=160)
    write_analytic_set(tmp_path / "more", n=40, first_seed=1000)
    student = {**STUDENT, "height": 64, "width": 64, "backbone": "test_resnet"}
    trainer = {"steps": 400, "batch_size": 8, "val_share": 0.1, "warmup_steps": 20}
    result = train(
        data=[str(tmp_path / "set"), str(tmp_path / "more")],
        weights=[1, 1],
        out=str(tmp_path / "run"),
        student=student,
        trainer={**trainer, "device": "cpu", "augment": "none", "val_every": 1000},
    )
    numbers = result["validation"]
    assert numbers["delta1"] > 0.65 and numbers["abs_rel"] < 0.25, numbers
    assert numbers["mean_deg"] < 11 and numbers["miou"] > 0.78, numbers


@pytest.mark.parametrize(
    "change, text",
    [
        ({"trainer": {**TRAINER, "stepss": 3}}, "trainer: no key stepss; the keys are steps, "),
        (
            {"trainer": {**TRAINER, "steps": "many"}},
            "trainer.steps='many' (str): expected a whole number",
        ),
        ({"trainer": {**TRAINER, "lr": -1.0}}, "trainer.lr=-1.0: expected more than 0"),
        ({"trainer": {**TRAINER, "precision": "fp8"}}, "expected one of auto, fp32, bf16, fp16"),
        (
            {"trainer": {**TRAINER, "batch_size": 6, "accumulate": 4}},
            "trainer.batch_size=6: expected",
        ),
        ({"trainer": {**TRAINER, "batch_size": 4, "accumulate": 4, "devices": 2}}, "= 4 x 2"),
        (
            {
                "student": {**STUDENT, "height": 32, "width": 32},
                "trainer": {**TRAINER, "batch_size": 2, "accumulate": 2},
            },
            "one image a pass, whose coarsest features are a single cell",
        ),
        (
            {
                "student": {**STUDENT, "backbone": "test_vit", "decoder": "dpt", "height": 32}
                | {"width": 32},
                "trainer": {**TRAINER, "batch_size": 1},
            },
            "one image a pass, whose coarsest features are a single cell",
        ),
        ({"student": {**STUDENT, "decodr": 3}}, "student: no key decodr; the keys are backbone"),
        ({"student": {**STUDENT, "calibration": {}}}, "student: no key calibration; the keys are"),
        ({"student": {"backbone": "test_resnet"}}, "student: height and width must be given"),
        ({"trainer": {**TRAINER, "augment": "wild"}}, "one of strong, geometry, none"),
        ({"trainer": {**TRAINER, "optimizer": "sgd"}}, "optimizer='sgd': expected one of adamw, m"),
        ({"trainer": {**TRAINER, "weight_decay": -0.1}}, "weight_decay=-0.1: expected at least 0"),
        ({"weights": [1, 2]}, "weights=[1, 2]: expected 1 number(s) >= 0"),
        ({"data": []}, "expected at least one label set"),
        ({"data": "/nowhere"}, "/nowhere: no such folder; expected a label set"),
    ],
)
def test_bad_uses_are_explained_before_anything_is_written(labels, tmp_path, change, text):
    arguments = {
        "data": str(labels),
        "out": str(tmp_path / "run"),
        "student": STUDENT,
        "trainer": TRAINER,
    }
    with pytest.raises(UsageError) as caught:
        train(**{**arguments, **change})
    assert text in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_more_processes_than_gpus_or_than_parts_of_a_batch_are_refused(
    labels, tmp_path, monkeypatch
):
    run = {"data": str(labels), "out": str(tmp_path / "run"), "student": STUDENT}
    monkeypatch.setattr("distill.train.world", lambda: 3)  # as torchrun would have it
    with pytest.raises(UsageError, match=r"batch_size=4: expected a multiple .* = 1 x 3"):
        train(**run, trainer=TRAINER)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(EnvironmentFailure, match=r"devices=2: torch sees 1 CUDA"):
        train(**run, trainer=TRAINER | {"device": "auto", "devices": 2})
    assert not (tmp_path / "run").exists()


def test_a_finished_run_that_knows_its_images_by_one_hash_only_is_the_same_run(
    whole_run, labels, tmp_path
):
    """Runs of before had no filter of single images; `keys` pins the set all the same."""
    out = tmp_path / "run"
    shutil.copytree(whole_run[0], out)
    document = json.loads((out / "train.json").read_text())
    assert document["data"][0].pop("seen")
    (out / "train.json").write_text(json.dumps(document))
    again = train(data=str(labels), out=str(out), student=STUDENT, trainer=TRAINER)
    assert "already trained" in again["summary"]
    document["data"][0]["keys"] = "0" * 64
    (out / "train.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match="another run; different: data"):
        train(data=str(labels), out=str(out), student=STUDENT, trainer=TRAINER)


def test_a_folder_with_something_else_or_another_run_is_refused(whole_run, labels, tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"found holiday\.jpg, expected a new or empty folder"):
        train(data=str(labels), out=str(tmp_path), student=STUDENT, trainer=TRAINER)
    with pytest.raises(UsageError, match=r"another run; different: trainer\.lr \(was 0\.001, now"):
        train(
            data=str(labels),
            out=str(whole_run[0]),
            student=STUDENT,
            trainer={**TRAINER, "lr": 0.01},
        )


def test_depth_without_any_metric_label_is_refused(labels, tmp_path):
    """Shape alone would let the magnitude drift; one metric set beside it is enough."""

    def affine(i):
        label = analytic_label(100 + i, height=32, width=48)
        label.provenance = {"alignment": {"anchor": "range", "space": "affine disparity"}}
        return label

    about = {"tasks": ["depth", "normals", "semantic"], "classes": LabelSet(labels).meta["classes"]}
    write_label_set(tmp_path / "affine", n=16, make=affine, dataset=about)
    lesson = {"out": str(tmp_path / "run"), "student": STUDENT}
    lesson["trainer"] = TRAINER | {"steps": 2}
    with pytest.raises(UsageError, match=r"affine was made metric by an assumed range"):
        train(data=str(tmp_path / "affine"), **lesson)
    assert not (tmp_path / "run").exists()
    both = [str(tmp_path / "affine"), str(labels)]
    with pytest.raises(UsageError, match="assumed range"):  # the metric set is never drawn from
        train(data=both, weights=[1, 0], **lesson)
    held = next(i for i in range(200, 300) if in_validation(analytic_label(i).key, 0.4))
    write_label_set(tmp_path / "held", n=1, make=lambda _: analytic_label(held), dataset=about)
    lesson["trainer"] |= {"val_share": 0.4}
    with pytest.raises(UsageError, match="assumed range"):  # all of the metric set is held out
        train(data=[str(tmp_path / "affine"), str(tmp_path / "held")], weights=[9, 1], **lesson)
    assert not (tmp_path / "run").exists()
    train(data=both, weights=[9, 1], **lesson)


def test_a_damaged_label_set_is_refused_and_the_shard_named(labels, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(labels, copy)
    shard = copy / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UsageError, match=r"shard-000001\.tar"):
        train(data=str(copy), out=str(tmp_path / "run"), student=STUDENT, trainer=TRAINER)


def test_a_damaged_resume_state_says_what_to_do(labels, tmp_path, monkeypatch):
    out = tmp_path / "run"
    poisoned(monkeypatch, set(range(5, 100)))
    with pytest.raises(Diverged):
        train(
            data=str(labels),
            out=str(out),
            student=STUDENT,
            trainer={**TRAINER, "bad_steps_limit": 2},
        )
    state = out / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-5])
    with pytest.raises(UsageError, match=r"cannot be resumed .* Delete the run's folder"):
        train(
            data=str(labels),
            out=str(out),
            student=STUDENT,
            trainer={**TRAINER, "bad_steps_limit": 2},
        )
