import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from analytic_scenes import write_analytic_set
from shared_lesson import batch_of, learn

from distill import parallel
from distill.parallel import agreed, rank, said_by_first, share_norms
from distill.train import train
from student.checkpoint import load_student
from student.model import Student


def test_two_processes_learn_what_one_learns_and_skip_and_stop_together(tmp_path, monkeypatch):
    """Losses with means over all, gradients added up, batch norm over all: equal to 1e-5."""
    from distill.module import Lesson

    monkeypatch.setattr(Lesson, "device", Lesson.device)  # restored afterwards
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(parallel._free_port())
    script = Path(__file__).with_name("shared_lesson.py")
    others = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env={**os.environ, **shared, "RANK": str(r), "LOCAL_RANK": str(r)},
            cwd=script.parents[1],
        )
        for r in (0, 1)
    ]
    try:
        lesson, losses = learn(batch_of(8), share=False)
        assert [p.wait(560) for p in others] == [0, 0]
    finally:
        for process in others:
            process.kill()
            process.wait()
    facts = [json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1)]
    states = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1)]
    for fact in facts:
        assert fact["losses"] == pytest.approx(losses, rel=1e-5)
        assert fact["skipped"] == 1 and fact["untouched"]
        assert fact["agreed"] == [15, False, 11.0]
    torch.manual_seed(0)  # as `learn` does
    start = Student(**lesson.student.config).state_dict()
    for name, value in lesson.student.state_dict().items():
        assert torch.equal(states[0][name], states[1][name]), name
        torch.testing.assert_close(states[0][name], value, rtol=1e-4, atol=2e-6, msg=name)
    moved = [k for k, v in start.items() if not torch.equal(v, states[0][k])]
    assert len(moved) > len(start) / 2


def test_one_process_needs_nobody():
    assert rank() == 0 and said_by_first(3) == 3
    assert agreed(2.0, 5.0, device=torch.device("cpu")) == [2.0, 5.0]
    student = Student(backbone="test_efficientnet", height=32, width=64)
    before = [m.forward.__func__ for m in student.modules()]
    share_norms(student)
    assert [m.forward.__func__ for m in student.modules()] == before


@pytest.mark.slow
def test_devices_2_gives_the_curve_of_one(tmp_path):
    write_analytic_set(tmp_path / "set", n=12, height=32, width=48)
    student = {"backbone": "test_efficientnet", "height": 32, "width": 64}
    curves = []
    for devices, sync in ((1, True), (2, True), (2, False)):
        out = tmp_path / f"run{devices}{sync}"
        trainer = {"steps": 3, "batch_size": 4, "device": "cpu", "devices": devices}
        trainer["sync_norms"] = sync
        train(data=str(tmp_path / "set"), out=str(out), student=student, trainer=trainer)
        load_student(out / "student.safetensors")
        with (out / "metrics.csv").open() as file:
            curves.append([float(row["total"]) for row in csv.DictReader(file)])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4) and len(curves[0]) == 3
    # norms that see a share each learn the same from it, not to the digit
    assert curves[2] != pytest.approx(curves[0], rel=1e-4)
    assert curves[2] == pytest.approx(curves[0], rel=0.3)
    assert "WORLD_SIZE" not in os.environ
