"""What a lesson can do beside learning: patience, captures, features, init=, precision, report."""

import csv
import dataclasses
import json
import math
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from analytic_scenes import analytic_label, write_analytic_set
from safetensors import safe_open
from safetensors.torch import save_file
from test_train import STUDENT, TRAINER
from timm.optim import muon

from distill import capture, conductor, module, precision
from distill.capture import replay
from distill.conductor import Conductor, Stopped
from distill.data import in_validation
from distill.features import TOLERANCE, feature_loss, frozen
from distill.journal import Journal, judge, validate
from distill.lesson_report import curve, read_rows, write_report
from distill.module import FP16_GROW, Diverged, Lesson, layers_of, lr_factor, parameter_groups
from distill.precision import DepthwiseInFloat32
from distill.resume import load_state, save_state
from distill.start import start_from, told
from distill.train import train
from distill.trainer import trainer_config
from student.checkpoint import load_student, save_student
from student.model import Student
from teacher.errors import UsageError
from teacher.generators.runtime import has_bfloat16
from teacher.label import Label, Task
from teacher.store import LabelSet, write_label_set

SHORT = {**TRAINER, "steps": 4, "val_every": 2, "checkpoint_every": 1}
NAN = float("nan")


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("sets") / "analytic"
    write_analytic_set(out, n=12, height=32, width=48)
    return str(out)


@pytest.fixture
def lesson(tmp_path, monkeypatch) -> Lesson:
    """A lesson outside Lightning."""
    student = Student(**{**STUDENT, "tasks": ["depth"]})
    made = Lesson(student, trainer_config({**TRAINER, "accumulate": 2}), folder=tmp_path)
    optimizer = made.configure_optimizers()
    monkeypatch.setattr(made, "optimizers", lambda: optimizer)
    monkeypatch.setattr(made, "manual_backward", lambda loss: loss.backward())
    monkeypatch.setattr(Lesson, "device", torch.device("cpu"))
    return made


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "image": torch.rand(4, 3, 32, 64),
        "depth": torch.rand(4, 1, 32, 64) + 1,
        "depth_uncertainty": torch.full((4, 1, 32, 64), NAN),
    }


def test_accumulated_gradients_are_the_mean_of_the_passes(lesson):
    from distill.losses import all_losses

    whole = batch()
    lesson._backward(whole)
    got = [p.grad.clone() for p in lesson.student.parameters()]
    lesson.student.zero_grad()
    for part in (0, 1):
        piece = {k: v[2 * part : 2 * part + 2] for k, v in whole.items()}
        (all_losses(lesson.student(piece["image"]), piece)["total"] / 2).backward()
    for a, b in zip(got, lesson.student.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-4, atol=1e-6)


def test_half_precision_scales_the_loss_and_an_overflow_costs_one_step(lesson):
    lesson.set_precision("fp16")
    assert lesson.loss_scale == 2.0**14
    before = {k: v.clone() for k, v in lesson.student.state_dict().items()}
    lesson.training_step(batch(), 0)
    norm = float(lesson.last["grad_norm"])
    assert 0 < norm < 1e3 and lesson.skipped == 0  # unscaled again
    assert any(not torch.equal(before[k], v) for k, v in lesson.student.state_dict().items())
    before = {k: v.clone() for k, v in lesson.student.state_dict().items()}
    lesson.loss_scale = 2.0**126
    lesson.training_step(batch(), 1)
    assert lesson.loss_scale == 2.0**125 and lesson.skipped == 0 and lesson.skipped_in_a_row == 0
    assert all(torch.equal(before[k], v) for k, v in lesson.student.state_dict().items())
    assert not list(lesson.folder.glob("bad-step-*"))
    lesson.loss_scale = 1.0
    lesson.set_precision("fp16")  # as a resumed lesson does
    assert lesson.loss_scale == 1.0


def test_the_loss_scale_doubles_after_enough_good_steps_and_halves_at_a_bad_one(lesson):
    def after(count: int, good: bool) -> float:
        for _ in range(count):
            lesson._rescale(good)
        return lesson.loss_scale

    lesson.set_precision("fp16")
    assert after(FP16_GROW - 1, True) == 2.0**14
    assert after(1, False) == 2.0**13
    assert after(FP16_GROW - 1, True) == 2.0**13  # counted anew since the bad one
    assert after(1, True) == 2.0**14
    assert after(2 * FP16_GROW, True) == after(FP16_GROW, True) == 2.0**16  # its largest
    assert after(16, False) == after(1, False) == 1.0  # its smallest
    lesson.set_precision("bf16")
    assert after(FP16_GROW, True) == 1.0


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_a_gradient_is_clipped_and_its_norm_is_told_as_it_was(lesson, monkeypatch, share):
    def norm() -> float:
        found = [p.grad.norm() for p in lesson.student.parameters() if p.grad is not None]
        return torch.stack(found).norm().item()

    lesson._backward(batch())
    before = norm()
    config = dataclasses.replace(lesson.config, grad_clip=share * before)
    monkeypatch.setattr(lesson, "config", config)
    assert lesson._gradient_norm().item() == pytest.approx(before, rel=1e-4)
    assert norm() == pytest.approx(min(1.0, share) * before, rel=1e-4)


def test_the_average_is_what_is_saved_and_what_is_validated(lesson):
    def numbers() -> dict[str, float]:
        return validate(lesson, SimpleNamespace(val_batches=lambda: [held], val=[(0, "a")] * 4))[0]

    held = batch() | {"focal_px": torch.full((4,), 50.0), "depth_space": torch.zeros(4).int()}
    average = {k: v.clone() for k, v in lesson.average.student.state_dict().items()}
    before = numbers()
    with torch.no_grad():
        for parameter in lesson.student.parameters():
            parameter.fill_(NAN)
    assert numbers() == before and math.isfinite(before["loss"]) and "abs_rel" in before
    names = ("trainer", "data", "weights", "features", "init", "licences")
    Conductor(lesson, None, lesson.folder, {key: [] for key in names}).save_student()
    saved = load_student(lesson.folder / conductor.STUDENT).state_dict()
    assert all(torch.equal(saved[k], v) for k, v in average.items())


def test_bf16_on_a_cpu_leaves_depthwise_convolutions_in_float32(lesson):
    """Their bfloat16 gradient is several times slower there (docs/results.md)."""

    def types() -> dict[bool, set[torch.dtype]]:
        """Depthwise or not -> what the student's convolutions return in a training step."""
        found: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
        hooks = [
            layer.register_forward_hook(
                lambda m, _, out: found[m.groups == m.in_channels > 1].add(out.dtype)
            )
            for layer in lesson.student.modules()
            if isinstance(layer, torch.nn.Conv2d)
        ]
        lesson.training_step(batch(), 0)
        for hook in hooks:
            hook.remove()
        return found

    lesson.set_precision("bf16")
    assert types() == {True: {torch.bfloat16}, False: {torch.bfloat16}}
    lesson.on_fit_start()
    assert types() == {True: {torch.float32}, False: {torch.bfloat16}}
    assert not any(isinstance(m, DepthwiseInFloat32) for m in lesson.average.student.modules())


def test_a_processor_without_the_instructions_has_no_bfloat16(monkeypatch):
    flags = Path("/proc/cpuinfo")
    if flags.exists() and "avx2" in flags.read_text():
        assert has_bfloat16(torch.device("cpu")) == ("avx512_bf16" in flags.read_text())
    for native in (True, False):  # a GPU that emulates it is one without
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, n=native: (
                n or including_emulation
            )
        )  # fmt: skip
        assert has_bfloat16(torch.device("cuda")) is native
        assert precision.chosen("auto", "cuda") == ("bf16" if native else "fp32")


@pytest.mark.parametrize("native", [True, False])
def test_bf16_without_instructions_for_it_is_said(labels, tmp_path, monkeypatch, capsys, native):
    monkeypatch.setattr("distill.train.has_bfloat16", lambda device: native)
    run = {"student": STUDENT, "trainer": {**SHORT, "steps": 1, "precision": "bf16"}}
    train(data=[labels], out=str(tmp_path / "run"), **run)
    said = "trainer.precision=bf16: this CPU has no instructions for bfloat16"
    assert (said in capsys.readouterr().err) is not native


@pytest.mark.parametrize("native", [True, False])
def test_muon_orthogonalises_in_what_the_device_has(monkeypatch, native):
    """In float32 where bfloat16 would be emulated, and timm's own is in its place afterwards."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: native)
    usual, seen = muon.zeropower_via_newtonschulz, []

    def watched(matrix, *args, dtype=torch.bfloat16, **kwargs):
        seen.append(dtype)
        if len(seen) == 2:
            raise RuntimeError("out of memory")
        return usual(matrix, *args, dtype=dtype, **kwargs)

    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", watched)
    weight = torch.nn.Parameter(torch.zeros(8, 24))
    optimizer = precision.Muon(
        [weight], lr=1.0, momentum=0.0, nesterov=False, adjust_lr_fn="original"
    )
    weight.grad = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    left = torch.linalg.svdvals(weight.detach()).sub(1).abs().max()
    assert left < 0.5  # after five iterations
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert seen == [torch.bfloat16 if native else torch.float32] * 2
    assert muon.zeropower_via_newtonschulz is watched


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_other_precisions_leave_depthwise_convolutions_alone(lesson, name):
    lesson.set_precision(name)
    lesson.on_fit_start()
    assert not any(isinstance(m, DepthwiseInFloat32) for m in lesson.student.modules())


def test_overflows_of_half_precision_never_end_a_lesson(lesson, monkeypatch):
    """Each halves the scale and ends of itself; steps that are bad at a scale of 1 count."""
    monkeypatch.setattr(lesson, "config", dataclasses.replace(lesson.config, bad_steps_limit=2))
    lesson.set_precision("fp16")
    real = lesson._gradient_norm

    def overflowing() -> torch.Tensor:
        return real() * (math.inf if lesson.loss_scale > 2.0**10 else 1)

    monkeypatch.setattr(lesson, "_gradient_norm", overflowing)
    for number in range(6):
        lesson.training_step(batch(), number)
    assert lesson.loss_scale == 2.0**10 and lesson.skipped == 0 and lesson.good_steps == 2
    lesson.loss_scale = 1.0
    monkeypatch.setattr(lesson, "_gradient_norm", lambda: real() * NAN)
    lesson.training_step(batch(), 6)
    with pytest.raises(Diverged, match="2 steps in a row"):
        lesson.training_step(batch(), 7)


def test_of_a_bad_step_every_process_keeps_its_share(tmp_path):
    """The batch that was at fault may be anybody's."""
    student = Student(**{**STUDENT, "tasks": ["depth"]})
    for step in (1, 2, 3, 4):
        for number in range(5):
            suffix = f"-process{number}" if number else ""
            facts = {"step": step, "seed": 0, "precision": "fp32"}
            capture.save_capture(tmp_path, student, batch(), {}, facts, suffix=suffix)
    found = [p.name for p in tmp_path.iterdir()]
    for step in (1, 2, 3):
        assert sum(name.startswith(f"bad-step-000000{step}") for name in found) == 5
    assert len(found) == 15


def test_a_bad_step_is_kept_and_runs_again(lesson, monkeypatch):
    monkeypatch.setattr(capture, "KEPT", 2)
    bad = batch()
    bad["image"][1, 0, 3, 3] = NAN
    lesson.training_step(batch(), 0)
    weights = {k: v.clone() for k, v in lesson.student.state_dict().items()}
    for number in (1, 2, 3):
        lesson.training_step(bad, number)
    found = sorted(p.name for p in lesson.folder.iterdir())
    assert found == ["bad-step-0000002.safetensors", "bad-step-0000003.safetensors"]
    again = replay(lesson.folder / found[0])
    assert again["step"] == 2 and math.isnan(again["losses"]["total"])
    assert {"batch image", "loss total, pass 1"} <= set(again["not_finite"])
    assert "loss total" in again["then"]
    assert not [n for n in again["not_finite"] if n.startswith("weight")]
    from safetensors import safe_open

    with safe_open(lesson.folder / found[0], framework="pt") as file:
        for name, value in weights.items():
            assert torch.equal(file.get_tensor(f"student.{name}"), value)
    with pytest.raises(UsageError, match="no captured step"):
        replay(__file__)


def test_a_bad_step_of_several_passes_runs_again_in_as_many(lesson, monkeypatch):
    """The norms' statistics are those of a pass, so in one pass the losses would be others."""
    monkeypatch.setattr(lesson, "config", dataclasses.replace(lesson.config, accumulate=2))
    real = lesson._gradient_norm
    monkeypatch.setattr(lesson, "_gradient_norm", lambda: real() * NAN)
    lesson.training_step(batch(), 0)
    again = replay(lesson.folder / "bad-step-0000001.safetensors")
    for name, value in again["losses"].items():
        assert value == pytest.approx(lesson.last[name].item(), rel=1e-5), name
    assert again["not_finite"] == [] and again["then"] == []
    bad = batch()
    bad["image"][3, 0, 3, 3] = NAN  # in the second pass
    lesson.training_step(bad, 1)
    found = replay(lesson.folder / "bad-step-0000002.safetensors")["not_finite"]
    assert "loss total, pass 2" in found and "loss total, pass 1" not in found


def test_a_capture_of_another_process_holds_the_seed_it_ran_with(lesson, monkeypatch):
    monkeypatch.setattr("distill.module.rank", lambda: 1)
    seeds: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    bad = batch()
    bad["image"][1, 0, 3, 3] = NAN
    lesson.training_step(bad, 0)
    from safetensors import safe_open

    with safe_open(lesson.folder / "bad-step-0000001-process1.safetensors", "pt") as file:
        assert json.loads(file.metadata()["facts"])["seed"] == seeds[-1] != 0


def test_layers_are_counted_from_the_stem_and_slow_down_towards_it():
    names = ["s.weight", "b.0.w", "b.0.n.w", "b.1.0.w", "b.1.1.w", "norm.w"]
    want = dict(zip(names, [0, 1, 1, 2, 3, 3], strict=True))
    assert layers_of(names) == want
    names = ["s_0.b.0.w", "s_1.downsample.0.w", "s_1.downsample.1.w", "s_1.b.0.w"]  # ConvNeXt
    assert layers_of(names) == dict(zip(names, [1, 1, 1, 2], strict=True))
    names = ["l1.0.w", "l1.0.downsample.0.w", "l1.0.downsample.1.w", "l1.1.w"]  # ResNet
    assert layers_of(names) == dict(zip(names, [1, 1, 1, 2], strict=True))
    student = Student(backbone="test_vit", height=32, width=32, tasks=["depth"])
    config = trainer_config({"layer_decay": 0.5, "backbone_lr_factor": 0.2})
    groups = parameter_groups(student, config)
    factor = {id(p): g["factor"] for g in groups for p in g["params"]}
    named = dict(student.named_parameters())
    assert len(factor) == len(named)
    depth = max(layers_of([n for n in named if n.startswith("backbone.")]).values())
    blocks = [n for n in named if ".blocks." in n]
    assert factor[id(named[blocks[-1]])] == pytest.approx(0.2)
    patch = next(n for n in named if "patch_embed" in n)
    assert factor[id(named[patch])] == pytest.approx(0.2 * 0.5**depth)
    assert factor[id(named["decoder.where.weight"])] == 1.0


def test_weights_decay_and_biases_and_norms_do_not():
    student = Student(backbone="test_vit", height=32, width=32, tasks=["depth"])
    extra = torch.nn.Conv2d(3, 2, 1)
    groups = parameter_groups(student, trainer_config({"weight_decay": 0.3}), extra)
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    named = [*student.named_parameters(), *extra.named_parameters()]
    assert len(decay) == len(named)
    places = ("pos_embed", "cls_token")
    assert all(any(n.endswith(place) for n, _ in named) for place in places)
    for name, p in named:
        assert decay[id(p)] == (0.3 if p.ndim > 1 and not name.endswith(places) else 0.0), name
    assert {p.ndim for n, p in named if n.endswith("bias") or ".norm" in n} == {1}


def test_every_step_gives_each_group_its_share_of_the_scheduled_rate(lesson, monkeypatch):
    slow = {"layer_decay": 0.5, "backbone_lr_factor": 0.2}
    monkeypatch.setattr(lesson, "config", dataclasses.replace(lesson.config, **slow))
    optimizer = lesson.configure_optimizers()
    monkeypatch.setattr(lesson, "optimizers", lambda: optimizer)
    group = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    named = dict(lesson.student.named_parameters())
    layers = layers_of([n for n in named if n.startswith("backbone.")])
    for step in range(3):
        peak = 1e-3 * lr_factor(step=step, progress=step / TRAINER["steps"], warmup_steps=2)
        lesson.training_step(batch(), step)
        for name, p in named.items():
            share = 0.2 * 0.5 ** (max(layers.values()) - layers[name]) if name in layers else 1.0
            assert group[id(p)]["lr"] == pytest.approx(share * peak), name


def test_patience_ends_the_lesson_with_the_best_student(labels, tmp_path, monkeypatch):
    real, losses, judged = conductor.validate, [3.0, 1.0, 2.0, 1.0, 0.5], []

    def worse(*arguments):
        numbers, picture, worst = real(*arguments)
        judged.append({k: v.clone() for k, v in arguments[0].average.student.state_dict().items()})
        return numbers | {"loss": losses.pop(0)}, picture, worst

    monkeypatch.setattr(conductor, "validate", worse)
    out = tmp_path / "run"
    trainer = {**SHORT, "steps": 40, "val_every": 1, "patience": 2}
    result = train(data=labels, out=str(out), student=STUDENT, trainer=trainer)
    assert result["steps"] == 4 and "stopped early" in result["summary"]
    student = load_student(out / "student.safetensors")
    assert student.provenance["steps"] == 2  # of loss 1.0, seen first
    assert student.provenance["validation"]["loss"] == 1.0
    assert result["validation"]["loss"] == result["objective"] == 0.5  # judged again at the end
    assert all(torch.equal(judged[-1][k], v) for k, v in judged[1].items())  # and so is the report
    assert not all(torch.equal(judged[-2][k], v) for k, v in judged[1].items())
    assert not (out / "best.safetensors").exists() and not (out / "state.safetensors").exists()
    with pytest.raises(UsageError, match=r"patience needs held-out images"):
        trainer_config({"patience": 2, "val_share": 0.0})


def test_patience_that_a_signal_interrupted_is_out_after_the_same_step(
    labels, tmp_path, monkeypatch
):
    """The validation that was due then is made up for at the next start, and may end the lesson."""
    trainer = {**SHORT, "steps": 40, "val_every": 1, "patience": 2}
    arguments = {"data": labels, "out": str(tmp_path / "run"), "student": STUDENT}
    losses, real, note = [3.0, 1.0, 2.0, 1.5, 0.5], conductor.validate, Journal.step

    def worse(*given):
        numbers, picture, worst = real(*given)
        return numbers | {"loss": losses.pop(0)}, picture, worst

    def stop(journal, lesson):
        note(journal, lesson)
        if lesson.step_number == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(conductor, "validate", worse)
    monkeypatch.setattr(Journal, "step", stop)
    with pytest.raises(Stopped, match="after step 4"):
        train(**arguments, trainer=trainer)
    assert len(losses) == 2
    assert train(**arguments, trainer=trainer)["steps"] == 4
    rows = read_rows(tmp_path / "run" / "validation.csv")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_a_task_without_truth_among_the_held_out_images_leaves_no_nan_in_json(tmp_path):
    def depth_alone(number: int) -> Label:
        label = analytic_label(number, height=32, width=48)
        label.values = {Task.DEPTH: label.values[Task.DEPTH]}
        return label

    write_label_set(tmp_path / "depth", n=12, make=depth_alone, dataset={"tasks": ["depth"]})
    first = next(n for n in range(99) if not in_validation(depth_alone(n).key, 0.4))
    write_analytic_set(tmp_path / "classes", n=1, first_seed=first, height=32, width=48)
    assert any(in_validation(key, 0.4) for key in LabelSet(tmp_path / "depth").keys)
    result = train(
        data=[str(tmp_path / "depth"), str(tmp_path / "classes")],
        out=str(tmp_path / "run"),
        student={**STUDENT, "tasks": ["depth", "semantic"]},
        trainer={**SHORT, "val_share": 0.4},
    )
    assert "abs_rel" in result["validation"] and "miou" not in result["validation"]
    document = json.loads(
        (tmp_path / "run" / "train.json").read_text(), parse_constant=lambda text: pytest.fail(text)
    )
    assert document["result"]["objective"] == result["objective"]


def test_features_by_hand():
    aim = torch.zeros(1, 2, 1, 4)
    aim[0, 0, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    aim[0, 1, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    aim = aim + 100  # what all places share does not count
    said = torch.tensor([[2.0, 2.0], [1.0, -1.0], [1.0, 0.0], [-1.0, -0.9]]).T.view(1, 2, 1, 4)
    # cosines: 1 (near enough), -1, 1 / sqrt 2, above the tolerance
    assert float(1.9 / math.sqrt(2 * 1.81)) > TOLERANCE
    want = (0 + 2 + (1 - 1 / math.sqrt(2)) + 0) / 4
    assert feature_loss(said, aim).item() == pytest.approx(want, rel=1e-5)


def test_the_feature_losses_gradient_is_exact():
    torch.manual_seed(0)
    aim = torch.randn(2, 4, 3, 4, dtype=torch.float64)
    said = torch.randn(2, 4, 2, 2, dtype=torch.float64).requires_grad_()  # brought to 3 x 4
    assert torch.autograd.gradcheck(lambda s: feature_loss(s, aim), (said,))
    near = (aim - aim.mean((0, 2, 3), keepdim=True)).detach()  # nothing is left to learn
    near = (near + 0.01 * torch.randn_like(near)).requires_grad_()
    loss = feature_loss(near, aim)
    assert loss.item() == 0 and (torch.autograd.grad(loss, near)[0] == 0).all()


def test_features_are_aimed_at_the_picture_before_it_was_changed(lesson, tmp_path, monkeypatch):
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    lesson.learn_features({"name": "test_vit", "weights": str(tmp_path / "vit.safetensors")})
    real, seen = lesson.features.aim, []
    monkeypatch.setattr(lesson.features, "aim", lambda x: real(seen.append(x) or x))
    whole = batch() | {"clean": torch.rand(4, 3, 32, 64)}
    lesson._backward(whole)
    assert len(seen) == 2 and torch.equal(torch.cat(seen), whole["clean"])


def crash_after(step: int, note, look=lambda lesson: None):
    """A `Journal.step` that dies after ``step``, at which one may ``look``."""

    def crash(journal, lesson):
        note(journal, lesson)
        if lesson.step_number == step:
            look(lesson)
            raise MemoryError("as if killed")

    return crash


def killed_and_resumed(arguments, out, monkeypatch, *, look=lambda lesson: None) -> None:
    """Train, but die after the third step, at which one may ``look``; then the same call again."""
    monkeypatch.setattr(Journal, "step", crash_after(3, Journal.step, look))
    with pytest.raises(MemoryError):
        train(**arguments, out=str(out))
    monkeypatch.undo()
    train(**arguments, out=str(out))


def same_curves(one, other) -> None:
    """Two runs' rows are equal to 1e-6."""
    for a, b in zip(*(read_rows(out / "metrics.csv") for out in (one, other)), strict=True):
        assert a == pytest.approx(b, abs=1e-6)


def test_a_lesson_with_muon_resumes_exactly(labels, tmp_path, monkeypatch):
    """Matrices and dense kernels by orthogonalised momentum, norms and depthwise kernels not."""
    arguments = {"data": labels, "student": STUDENT, "trainer": {**SHORT, "optimizer": "muon"}}
    train(**arguments, out=str(tmp_path / "run"))
    seen: dict[str, set[str]] = {}

    def look(lesson):
        state = lesson.optimizers().optimizer.state
        seen.update({n: set(state[p]) for n, p in lesson.student.named_parameters()})

    killed_and_resumed(arguments, tmp_path / "again", monkeypatch, look=look)
    same_curves(tmp_path / "run", tmp_path / "again")
    student = load_student(tmp_path / "run" / "student.safetensors")
    orthogonal = {n for n, entries in seen.items() if "momentum_buffer" in entries}
    dense = {n for n, p in student.named_parameters() if p.ndim > 1 and 1 not in p.shape[:2]}
    assert orthogonal and orthogonal <= dense
    assert {n for n, p in student.named_parameters() if p.ndim < 2}.isdisjoint(orthogonal)


def test_moments_follow_their_parameters_whatever_the_groups(labels, tmp_path, monkeypatch):
    """A state that knew them by number was read into other parameters after a regrouping."""
    arguments = {"data": labels, "student": STUDENT, "trainer": {**SHORT, "optimizer": "adamw"}}
    train(**arguments, out=str(tmp_path / "run"))
    real = module.parameter_groups

    def turned(*given):
        groups = list(reversed(real(*given)))
        return [group | {"params": group["params"][::-1]} for group in groups]

    note = Journal.step
    monkeypatch.setattr(Journal, "step", crash_after(3, note))
    with pytest.raises(MemoryError):
        train(**arguments, out=str(tmp_path / "again"))
    monkeypatch.setattr(Journal, "step", note)
    monkeypatch.setattr(module, "parameter_groups", turned)
    train(**arguments, out=str(tmp_path / "again"))
    same_curves(tmp_path / "run", tmp_path / "again")


@pytest.mark.parametrize("fault", ["shape", "name"])
def test_moments_that_fit_no_parameter_are_refused(lesson, tmp_path, fault):
    optimizer = lesson.configure_optimizers()
    save_state(lesson, optimizer, tmp_path / "whole")  # no moments yet
    with safe_open(tmp_path / "whole", "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}
        metadata = file.metadata()
    name = next(n for n, _ in lesson.student.named_parameters())
    strange = {"shape": f"optimizer.{name}.exp_avg", "name": "optimizer.nobody.exp_avg"}[fault]
    save_file(tensors | {strange: torch.zeros(7)}, tmp_path / "bad", metadata=metadata)
    with pytest.raises(UsageError, match=r"cannot be resumed \(moments of "):
        load_state(lesson, tmp_path / "bad")


def test_weights_that_are_not_finite_never_replace_a_whole_state(lesson, tmp_path):
    optimizer = lesson.configure_optimizers()
    save_state(lesson, optimizer, tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    with torch.no_grad():
        next(lesson.student.parameters())[0, 0, 0, 0] = NAN
    with pytest.raises(Diverged, match="weights are not finite after step 0"):
        save_state(lesson, optimizer, tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == before


def test_a_frozen_backbone_teaches_and_leaves_nothing_behind(labels, tmp_path, monkeypatch):
    weights = tmp_path / "vit.safetensors"
    torch.manual_seed(3)
    save_file(timm.create_model("test_vit").state_dict(), weights)
    arguments = {
        "data": labels,
        "student": {**STUDENT, "tasks": ["depth"]},
        "trainer": SHORT,
        "features": {"name": "test_vit", "weights": str(weights), "weight": 0.5},
    }
    result = train(**arguments, out=str(tmp_path / "run"))
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    assert all(0 < row["features"] < 2 for row in rows)
    terms = sum(row["total"] for row in rows)
    assert result["steps"] == 4 and math.isfinite(terms)
    student = load_student(tmp_path / "run" / "student.safetensors")
    assert student.provenance["features"]["name"] == "test_vit"
    assert [line["role"] for line in student.provenance["licences"]] == ["feature teacher"]

    killed_and_resumed(arguments, tmp_path / "again", monkeypatch)
    same_curves(tmp_path / "run", tmp_path / "again")
    with pytest.raises(UsageError, match="an untrained network has nothing to teach"):
        frozen({"name": "test_vit"}, height=32, width=64)
    with pytest.raises(UsageError, match="no such file"):
        frozen({"name": "test_vit", "weights": "/nowhere"}, height=32, width=64)


def test_the_mini_generators_encoder_teaches_too(tmp_path):
    from teacher.generators.mini_generator import MiniGenerator
    from teacher.generators.mini_net import MiniNet

    network = {"channels": 8, "width": 24, "image_blocks": 1, "blocks": 1, "heads": 2}
    network |= {"text_width": 16, "text_layers": 1}
    net = MiniNet(**network)
    card = {"network": network, "size": [48, 64]}
    path = MiniGenerator.save(tmp_path / "mini.safetensors", net.state_dict(), card)
    teacher = frozen({"name": "mini", "weights": str(path)}, height=32, width=64)
    with torch.no_grad():
        maps = teacher(torch.rand(2, 3, 32, 64))
    height, width = teacher.size
    assert maps.shape == (2, 24, height // 8, width // 8) and teacher.channels == 24
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_student_starts_from_another_and_says_what_is_new(labels, tmp_path, capsys):
    first = {**STUDENT, "tasks": ["depth", "normals"]}
    begun = train(data=labels, out=str(tmp_path / "a"), student=first, trainer=SHORT)
    start = begun["student"]
    still = {**SHORT, "steps": 1, "lr": 1e-12, "ema_decay": 0.0}
    result = train(data=labels, out=str(tmp_path / "b"), student=STUDENT, trainer=still, init=start)
    a, b = load_student(start), load_student(result["student"])
    for name, value in a.named_parameters():
        torch.testing.assert_close(dict(b.named_parameters())[name], value, rtol=0, atol=1e-6)
    assert b.provenance["init"]["fresh"] == ["heads.semantic"]
    assert f"init={start}: " in (said := capsys.readouterr().err)
    assert "tensors taken; start anew: heads.semantic\n" in said
    assert len(b.provenance["init"]["sha256"]) == 64
    other = {**STUDENT, "backbone": "test_resnet"}
    with pytest.raises(UsageError, match=r"init=.*its backbone is test_efficientnet"):
        train(data=labels, out=str(tmp_path / "c"), student=other, trainer=still, init=start)


def vit(height: int, width: int, **change) -> Student:
    made = {"backbone": "test_vit", "height": height, "width": width, "tasks": ["depth"]}
    return Student(**made | change).eval()


def likeness(a: torch.Tensor, b: torch.Tensor) -> float:
    """Correlation of two feature maps at the size of ``a``."""
    b = torch.nn.functional.interpolate(b, size=a.shape[-2:], mode="area")
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


@torch.no_grad()
def test_position_embeddings_follow_a_student_to_another_input_size(tmp_path, monkeypatch):
    """What it sees of a picture twice as large is what it saw (0.9996; without: 0.10)."""
    zoom = torch.nn.functional.interpolate
    torch.manual_seed(0)
    old, path = vit(64, 96), str(tmp_path / "old.safetensors")
    places = zoom(3 * torch.randn(1, 64, 2, 3), size=(4, 6), mode="bilinear")
    old.backbone.net.model.pos_embed[:, 1:] = places.flatten(2).transpose(1, 2)
    save_student(old, path, {})
    small = zoom(torch.rand(1, 3, 4, 6), size=(64, 96), mode="bilinear")
    large = zoom(small, size=(128, 192), mode="bilinear")
    new = vit(128, 192)
    about, _ = start_from(new, path)
    assert about["fresh"] == [] and about["taken"] == len(new.state_dict())
    assert about["resampled"] == ["backbone.net.model.pos_embed"]
    said = told(about, path)
    assert "161 tensors taken; resampled to this input size: backbone.net.model.pos_embed" in said
    assert likeness(old.backbone(small)[-1], new.backbone(large)[-1]) > 0.99
    # upright instead of wide: as many patches, so only the grid tells that they lie elsewhere
    upright = vit(96, 64)
    assert start_from(upright, path)[0]["resampled"] == ["backbone.net.model.pos_embed"]
    turned = zoom(places, size=(6, 4), mode="bicubic", antialias=True)
    got = upright.backbone.net.model.pos_embed
    torch.testing.assert_close(got[:, 1:], turned.flatten(2).transpose(1, 2))
    assert torch.equal(got[:, :1], old.backbone.net.model.pos_embed[:, :1])  # the class token
    monkeypatch.setattr("distill.start.resampled_positions", lambda *_: {})
    about, _ = start_from(new := vit(128, 192), path)
    assert about["fresh"] == ["backbone.net.model.pos_embed"] and about["resampled"] == []
    assert "start anew: backbone.net.model.pos_embed" in told(about, path)
    assert likeness(old.backbone(small)[-1], new.backbone(large)[-1]) < 0.5


def test_init_from_other_metres_is_refused_and_from_a_pure_resize_it_is_not(tmp_path):
    path = str(tmp_path / "old.safetensors")
    save_student(vit(64, 96, canonical_focal_px=120), path, {})
    with pytest.raises(UsageError, match=r"camera of 120 px .* this student's of 83\.1384 px") as e:
        start_from(vit(64, 96), path)
    assert "factor of 1.44. Set student.canonical_focal_px=120" in str(e.value)
    with pytest.raises(UsageError, match=r"Set student\.canonical_focal_px=240"):
        start_from(vit(128, 192), path)
    assert start_from(vit(128, 192, canonical_focal_px=240), path)[0]["fresh"] == []
    save_student(vit(64, 96), path, {})
    assert start_from(vit(128, 192), path)[0]["fresh"] == []  # both 60 degrees wide
    # normals have no metres, and a depth head that starts anew has nobody's
    about, _ = start_from(vit(64, 96, canonical_focal_px=99, tasks=["normals"]), path)
    assert about["fresh"] == ["heads.normals"]
    about, _ = start_from(vit(64, 96, canonical_focal_px=99, depth_head="bins"), path)
    assert about["fresh"] == ["heads.depth.maps.out.bias", "heads.depth.maps.out.weight"]


def test_init_takes_a_step_and_what_it_stands_on_together(tmp_path):
    path = str(tmp_path / "old.safetensors")
    out = ["heads.depth.maps.out.bias", "heads.depth.maps.out.weight"]
    step = ["heads.depth.step.bias", "heads.depth.step.weight"]
    save_student(vit(64, 96, depth_head="log"), path, {})
    log = load_student(path)
    model = vit(64, 96, depth_head="step").eval()
    assert start_from(model, path)[0]["fresh"] == step
    image = torch.rand(1, 3, 64, 96)
    assert torch.equal(model(image)["depth"], log(image)["depth"])
    torch.nn.init.normal_(model.heads["depth"].step.weight)
    save_student(model, path, {})
    assert start_from(vit(64, 96, depth_head="step"), path)[0]["fresh"] == []
    assert (
        start_from(vit(64, 96, depth_head="log"), path)[0]["fresh"] == out
    )  # else every step would be missing
    about, _ = start_from(vit(64, 96, depth_head="step", uncertainty=False), path)
    assert about["fresh"][:4] == [*out, *step]


@pytest.mark.parametrize("change", [{"decoder_stride": 2}, {"decoder": "dpt"}])
def test_init_gives_no_decoder_weight_to_another_level(tmp_path, change):
    """The decoder's parts are counted from its finest level, which is another one here."""
    path = str(tmp_path / "old.safetensors")
    save_student(vit(64, 96, decoder_stride=4), path, {})
    about, _ = start_from(vit(64, 96, **{"decoder_stride": 4} | change), path)
    fresh = [n for n in about["fresh"] if n.startswith("decoder.")]
    assert fresh and all(n.count(".") == 1 for n in fresh)  # every part of it, as a whole
    assert {"decoder.fuse", "decoder.lateral"} <= set(fresh)


def test_init_says_what_starts_anew_and_which_constants_stay_behind(tmp_path):
    path = str(tmp_path / "old.safetensors")
    save_student(vit(64, 96, calibration={"depth": [2.0, 0.1]}), path, {})
    new = vit(64, 96, decoder="dpt", tasks=["depth", "normals"], uncertainty=False)
    about, _ = start_from(new, path)
    parts = ["fuse", "lateral", "out", "project", "reassemble"]
    anew = [f"decoder.{part}" for part in parts] + ["heads.normals"]
    assert about["unfitted"] == ["depth"]
    depth = [f"heads.depth.{n}.{part}" for n in ("maps.out", "step") for part in ("bias", "weight")]
    assert about["fresh"] == sorted([*anew, *depth])
    said = told(about, path)
    assert "decoder.fuse" in said and "fitted constants left behind" in said
    assert said.startswith(f"init={path}: {about['taken']} tensors taken; start anew: decoder")


def test_the_outline_of_a_sky_that_was_seen_is_an_edge():
    student = Student(**{**STUDENT, "tasks": ["depth"]})
    depth = np.full((1, 1, 32, 64), 2.0, np.float32)
    sky = np.zeros((1, 1, 32, 64), bool)
    sky[..., :32] = True
    truth = {"depth": np.where(sky, np.inf, depth), "focal_px": np.array([50.0])}
    truth["depth_space"] = np.array([0])
    for seen in (True, False):
        answer = {"depth": depth, "sky": np.where(sky & seen, 1.0, -1.0)}
        assert judge(student, answer, truth, None, None)["boundary_f1"] == pytest.approx(
            float(seen)
        )


def test_metres_that_nobody_measured_are_not_judged_as_metres():
    """A label of anchor=range is affine: three times as far is as right as it is."""
    student = Student(**{**STUDENT, "tasks": ["depth"]})
    depth = np.where(np.arange(64) < 32, 2.0, 4.0) * np.ones((1, 1, 32, 1))
    answer = {"depth": 3 * depth, "sky": np.full(depth.shape, -1.0)}
    truth = {"depth": depth, "focal_px": np.array([student.canonical_focal_px])}
    metric = judge(student, answer, truth | {"depth_space": np.array([0])}, None, None)
    assert metric == pytest.approx({"abs_rel": 2.0, "delta1": 0.0, "boundary_f1": 1.0})
    affine = judge(student, answer, truth | {"depth_space": np.array([2])}, None, None)
    assert affine == {"boundary_f1": 1.0}


def test_a_curve_is_drawn_to_scale_and_skips_what_is_not_finite():
    rows = [{"step": s, "a": v} for s, v in ((0, 1.0), (5, NAN), (10, 3.0))]
    drawn = curve(rows, ["a", "absent"], title="a <b>")
    points = re.search(r'points="([^"]+)"', drawn).group(1).split()
    assert points == ["52.0,206.0", "480.0,8.0"]  # lowest left, highest right
    assert "a &lt;b&gt;" in drawn and ">2<" in drawn and "absent" not in drawn
    assert curve(rows[1:2], ["a"], title="nothing") == ""
    tiny = [{"step": s, "lr": v} for s, v in ((0, 0.000165), (9, 0.006))]
    assert {">1.6e-04<", ">0.006<"} <= set(re.findall(r">[^<>]+<", curve(tiny, ["lr"], title="")))
    long = [{"step": s, "a": float(s % 2)} for s in range(5000)]
    assert curve(long, ["a"], title="long").count(",") < 900


def test_the_report_of_a_lesson_that_goes_on_tells_of_skipped_steps(labels, tmp_path, monkeypatch):
    seen, real = [], conductor.write_report

    def told(*given, **facts):
        seen.append((facts["skipped"], "result" in facts))
        return real(*given, **facts)

    monkeypatch.setattr(conductor, "write_report", told)
    norms = iter([1.0, NAN, NAN, *[1.0] * 9])
    monkeypatch.setattr(Lesson, "_gradient_norm", lambda lesson: torch.tensor(next(norms)))
    train(
        data=labels,
        out=str(tmp_path / "run"),
        student={**STUDENT, "tasks": ["depth"]},
        trainer={**SHORT, "val_every": 2, "steps": 5},
    )
    assert seen == [(1, False), (2, False), (2, False), (2, True)]  # at 2, 4, 5 and the end


def test_the_report_shows_curves_and_the_worst_cases_and_needs_no_network(labels, tmp_path):
    trainer = {**SHORT, "val_share": 0.4}
    out = tmp_path / "run"
    result = train(data=labels, out=str(out), student=STUDENT, trainer=trainer)
    page = (out / "report.html").read_text()
    assert result["summary"] in page and "analytic" in page
    assert page.count("<svg") >= 8 and page.count("<img") == 9  # three cases of three tasks
    assert not re.search(r"<script|https?://", page)
    shown = re.findall(r"<b>depth: abs_rel ([0-9.]+)</b>", page)
    assert shown == sorted(shown, key=float, reverse=True) and len(shown) == 3
    with (out / "validation.csv").open() as file:
        assert "boundary_f1" in next(csv.reader(file))
    Path(out / "metrics.csv").write_text("step,total\n")
    identity = {"student": {}, "trainer": {"steps": 3}, "data": []}
    write_report(out, identity, worst=[], skipped=2)
    page = (out / "report.html").read_text()
    assert "step 0 of 3</p>" in page and "2 step(s) skipped, not finite" in page
    assert np.isnan(read_rows(out / "absent.csv") or [NAN]).all()
    write_report(out, identity | {"trainer": {"steps": 3, "minutes": 2.5}}, worst=[], skipped=0)
    page = (out / "report.html").read_text()
    assert "step 0 of 3 at most, in 2.5 minutes at most</p>" in page


def test_a_student_alone_is_judged_before_any_export(labels, tmp_path):
    from export.verify import verify

    student = {**STUDENT, "tasks": ["depth", "normals"]}
    made = train(
        data=labels, out=str(tmp_path / "run"), student=student, trainer={**SHORT, "steps": 1}
    )
    result = verify(export=made["student"], labels=labels, out=str(tmp_path / "verify"), limit=3)
    assert result["exit"] == 0 and result["findings"] == []
    (scores,) = result["scores"]["student.safetensors"].values()
    for name in ("report.html", "report.md"):  # no table of artefacts that are not there
        page = (tmp_path / "verify" / name).read_text()
        assert "boundary F1" in page and "Artefacts against" not in page and "TensorRT" not in page
    mean = scores["mean"]
    assert {"delta1", "abs_rel", "boundary_f1"} <= set(mean["depth"]) & set(mean["depth_aligned"])
    assert mean["depth"]["images"] == 3 and mean["normals"]["mean_deg"] > 0
