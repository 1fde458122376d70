import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from analytic_scenes import CLASSES, analytic_label, write_analytic_set

from distill.cli import run_verb
from distill.fit_student import fit_student, measured
from distill.run_folder import learnt_from, may_hold, seen_filter, set_identity
from distill.scale_fit import (
    fit_affine,
    fit_confidence,
    fit_powers,
    fit_scale,
    fit_uncertainty,
    fitted_uncertainty,
)
from export.artefact import ArtefactError, card_from_metadata, card_to_metadata
from export.onnx_graph import card_of
from export.predict import predict
from student.checkpoint import load_student, save_student
from student.model import Student
from teacher.errors import UsageError
from teacher.jobs.licences import of_label_set
from teacher.label import Task
from teacher.store import LabelSet, write_label_set

KEYS = [f"image{i}" for i in range(12)]


def test_an_exact_line_comes_back_and_so_does_a_scale():
    truth = np.array([1.0, 2.0, 5.0, 9.0])
    assert fit_affine((truth - 0.5) / 1.25, truth) == pytest.approx((1.25, 0.5))
    assert fit_affine(truth / 3, truth, shift=False) == pytest.approx((3.0, 0.0))
    assert fit_affine(np.full(4, 2.0), np.full(4, 3.0)) == pytest.approx((1.5, 0.0))


def test_the_closed_form_is_the_least_squares_of_symmetric_relative_errors():
    rng = np.random.default_rng(0)
    d = rng.uniform(1, 10, 50)
    t = (1.3 * d + 0.4) * np.exp(rng.normal(0, 0.05, 50))
    root = 1 / np.sqrt(d * t)
    want, *_ = np.linalg.lstsq(np.stack([d * root, root], 1), t * root, rcond=None)
    assert fit_affine(d, t) == pytest.approx(tuple(want), rel=1e-9)
    wild = np.append(d, 80.0), np.append(t, 0.5)  # one near pixel taken for far
    assert fit_affine(*wild) == pytest.approx(tuple(want), rel=1e-9)


def test_a_line_by_hand():
    """d = 1, 2, 4 and t = 1, 3, 4: weights 1 / (d t) = 1, 1/6, 1/16.

    Sums, times 48: w d^2 = 48 + 32 + 48, w d = 48 + 16 + 12, w = 48 + 8 + 3, w d t = 3 x 48,
    w t = 48 + 24 + 12. So a = (144 59 - 84 76) / (128 59 - 76 76) = 2112 / 1776 and
    b = (84 128 - 144 76) / 1776 = -192 / 1776. The ratios are 1, 1.5, 1: all within a factor of
    1.5 of the median (the middle one by a hair less than that).
    """
    d, t = np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0 - 1e-9, 4.0])
    assert fit_affine(d, t) == pytest.approx((2112 / 1776, -192 / 1776), rel=1e-6)
    assert fit_affine(d, t, shift=False) == pytest.approx((1.0, 0.0))


def test_a_line_that_turns_near_and_far_around_is_no_scale():
    d, t = np.array([2.0, 2.2]), np.array([2.2, 2.0])  # slope -1, intercept 4.2
    assert fit_affine(d, t) == pytest.approx((1.0, 0.0))
    # a wall that seems to be 0.9 m deep instead of 0.1, slope 9: then 1.1 m lies behind the camera
    d, t = np.repeat([2.0, 2.1, 1.1], [999, 999, 1]), np.repeat([1.7, 2.6, 1.0], [999, 999, 1])
    assert fit_affine(d, t) == pytest.approx((1 / 1.1, 0.0))


def test_cross_validation_by_hand():
    """Two images, each judged by the other's fit, |ln| of what is left."""
    keys, e = ["a", "b"], math.e
    one, other = np.full(3, e**0.5), np.full(3, e**0.4)
    truth = np.ones(3)
    found = fit_scale(keys, [(one, truth), (other, truth)])
    # before 0.5 and 0.4, after 0.1 and 0.1: gains 0.4 and 0.3, mean 0.35 > 2 x 0.05
    assert (found.before, found.after) == pytest.approx((0.45, 0.1)) and found.kept
    assert found.values == pytest.approx((e**-0.45, 0.0))
    # before 0.5 and 0.1, after 0.4 and 0.4: gains 0.1 and -0.3, so it is left alone
    found = fit_scale(keys, [(one, truth), (np.full(3, e**0.1), truth)])
    assert (found.before, found.after) == pytest.approx((0.3, 0.4)) and not found.kept
    assert found.values == (1.0, 0.0)


def test_a_scale_is_the_median_ratio():
    d, t = np.array([1.0, 2.0, 3.0]), np.array([2.0, 6.0, 3.0])
    assert fit_affine(d, t, shift=False) == pytest.approx((2.0, 0.0))


def pairs(change, *, noise: float, images: int = 12, seed: int = 0):
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(images):
        truth = rng.uniform(1, 8, 40)
        out.append((change(truth) * np.exp(rng.normal(0, noise, 40)), truth))
    return out


def test_a_wrong_scale_is_mended_and_a_right_one_left_alone():
    wrong = fit_scale(KEYS, pairs(lambda t: t / 1.5, noise=0.05))
    assert wrong.kept and wrong.values[0] == pytest.approx(1.5, rel=0.03)
    assert wrong.after < 0.25 * wrong.before and wrong.images == 12
    right = fit_scale(KEYS, pairs(lambda t: t, noise=0.05))
    assert not right.kept and right.values == (1.0, 0.0)


def test_a_shift_is_taken_where_only_a_shift_helps():
    found = fit_scale(KEYS, pairs(lambda t: (t - 0.6) / 1.1, noise=0.01))
    assert found.kept and found.values == pytest.approx((1.1, 0.6), abs=0.05)


def test_a_scale_that_differs_from_image_to_image_is_not_fitted():
    rng = np.random.default_rng(3)
    wild = [(t * np.exp(rng.normal(0, 0.5)), t) for t in rng.uniform(1, 8, (12, 40))]
    assert not fit_scale(KEYS, wild).kept


def test_one_image_is_too_few():
    found = fit_scale(["a", "b"], [(np.ones(3), np.full(3, 2.0)), (np.empty(0), np.empty(0))])
    assert not found.kept and found.images == 1 and math.isnan(found.before)


def test_gain_and_power_of_an_uncertainty_come_back():
    rng = np.random.default_rng(0)
    u = np.exp(rng.uniform(-4, 0, (200_000, 1)))
    errors = rng.exponential(0.7 * u[:, 0] ** 1.6)
    assert fit_powers(np.log(u), errors) == pytest.approx((0.7, 1.6), rel=0.02)
    images = [(p, q) for p, q in zip(np.split(np.log(u), 10), np.split(errors, 10), strict=True)]
    found = fit_uncertainty(KEYS[:10], images)
    assert found.kept and found.values == pytest.approx((0.7, 1.6), rel=0.02)
    right = [(np.log(v)[:, None], rng.exponential(v)) for v in np.exp(rng.uniform(-3, 0, (10, 50)))]
    assert not fit_uncertainty(KEYS[:10], right).kept


def test_powers_by_hand():
    """One factor: the best p of log mean(e / u^p) + p mean(log u).

    u = 1/2, 2 and e = 1/2, 8, so with x = 2^p it is log((x / 2 + 8 / x) / 2), least at x = 4: p = 2
    and g = 2. Two factors of which the other is always 3: no power of it changes anything, so it
    stays 0. And errors that fall with the uncertainty: p ends at its limit of 1/4.
    """
    u, errors = np.log([[0.5], [2.0]]), np.array([0.5, 8.0])
    assert fit_powers(u, errors) == pytest.approx((2.0, 2.0), rel=1e-4)
    both = np.hstack([u, np.full((2, 1), math.log(3.0))])
    assert fit_powers(both, errors) == pytest.approx((2.0, 2.0, 0.0), rel=1e-4, abs=1e-6)
    assert fit_powers(u, errors[::-1])[1] == 0.25
    np.testing.assert_allclose(fitted_uncertainty(both, (2.0, 2.0, 1.0)), [1.5, 24.0])
    np.testing.assert_allclose(fitted_uncertainty(both, (2.0, 2.0)), [0.5, 8.0])


def test_other_factors_are_taken_where_they_help_and_only_there():
    rng = np.random.default_rng(0)
    logs = rng.uniform(-2, 2, (12, 3000, 3))
    u, depth, _ = np.moveaxis(np.exp(logs), -1, 0)
    images = list(zip(logs, rng.exponential(0.5 * u**0.8 * depth**-0.4), strict=True))
    found = fit_uncertainty(KEYS, images)
    assert found.kept and found.values == pytest.approx((0.5, 0.8, -0.4, 0.0), abs=0.03)
    few = [(log[:12], rng.exponential(2 * np.exp(log[:12, 0]))) for log in logs]
    found = fit_uncertainty(KEYS, few)
    assert found.kept and len(found.values) == 2 and found.values[0] == pytest.approx(2, rel=0.3)
    own = fit_uncertainty(KEYS, [(log[:, :1], e) for log, e in few])
    assert own == found


def test_the_confidence_of_errors_with_a_long_tail_is_what_was_found():
    """Mean u, but by many small angles and a few of 45 degrees: oftener right than by the law."""
    rng = np.random.default_rng(0)
    u = rng.uniform(4, 16, (12, 5000))
    outlier = rng.random(u.shape) < u / 45
    errors = np.where(outlier, 45.0, 0.0)
    found = fit_confidence(KEYS, list(zip(u, errors, strict=True)), right_below=11.25)
    assert found.kept and found.after < found.before - 0.005
    x, p = found.values
    assert (np.diff(x) > 0).all() and (np.diff(p) <= 0).all()
    np.testing.assert_allclose(p, 1 - x / 45, atol=0.02)


def test_equal_uncertainties_have_one_confidence():
    """Half of all pixels have the largest one; a fifth of them is right in four images, two fifths
    in four others."""
    u = np.full(400, 9.0)
    u[:200] = np.linspace(1, 5, 200)
    place = np.arange(400) % 10
    errors = [np.where((u < 9) | (place < 10 * s), 0.0, 20.0) for s in 4 * [0.2] + 4 * [0.4]]
    found = fit_confidence(KEYS[:8], [(u, e) for e in errors], right_below=11.25)
    assert found.kept and np.interp(9.0, *found.values) == pytest.approx(0.3, abs=0.02)


def test_the_confidence_of_exponential_errors_stays_that_of_the_law():
    rng = np.random.default_rng(1)
    u = rng.uniform(2, 30, (12, 40))
    pairs = list(zip(u, rng.exponential(u), strict=True))
    found = fit_confidence(KEYS[:12], pairs, right_below=11.25)
    assert not found.kept
    asked = np.array([3.0, 11.25, 25.0])
    np.testing.assert_allclose(
        np.interp(asked, *found.values), 1 - np.exp(-11.25 / asked), atol=2e-3
    )


def test_a_fitted_students_answers_say_how_likely_they_are_right(tmp_path):
    """Through the checkpoint, the exported file's metadata and `distill predict`."""
    write_analytic_set(tmp_path / "truth", n=8, height=32, width=48)
    student = Student(backbone="test_efficientnet", height=32, width=64).eval()
    save_student(student, tmp_path / "a.safetensors", {})
    plain = {"model": str(tmp_path / "a.safetensors"), "images": str(tmp_path / "truth")}
    predict(**plain, out=str(tmp_path / "plain"))
    assert not list((tmp_path / "plain").rglob("*_confidence.npy"))
    found = fit_student(
        checkpoint=str(tmp_path / "a.safetensors"),
        labels=str(tmp_path / "truth"),
        out=str(tmp_path / "b.safetensors"),
    )
    fitted = load_student(tmp_path / "b.safetensors")
    card = card_from_metadata(card_to_metadata(card_of(fitted)), where="here")
    predict(
        model=str(tmp_path / "b.safetensors"),
        images=str(tmp_path / "truth"),
        out=str(tmp_path / "said"),
    )
    for task in ("depth", "normals"):
        files = sorted((tmp_path / "said").rglob(f"*{task}_confidence.npy"))
        assert len(files) == 8
        sure = np.load(files[0])
        if task == "depth":
            sky = np.isposinf(np.load(str(files[0]).replace("depth_confidence", "depth")))
            assert (np.isnan(sure) == sky).all()
            sure = np.where(sky, 0.5, sure)
        u = np.load(str(files[0]).replace("_confidence", "_uncertainty"))
        assert sure.dtype == np.float32 and sure.shape == (32, 48)
        want = np.interp(u, *found["confidence"][task]["values"])
        want = np.where(sky, 0.5, want) if task == "depth" else want
        np.testing.assert_allclose(sure, want, atol=1e-6)
        np.testing.assert_allclose(card.confidence(task, u)[sure != 0.5], sure[sure != 0.5])
    assert card.confidence("semantic", u) is None
    turned = {"confidence": {"depth": {"values": [[2, 1], [0, 1]]}}}
    damaged = {**fitted.provenance, "calibration": turned}
    metadata = card_to_metadata(dataclasses.replace(card, provenance=damaged))
    with pytest.raises(ArtefactError, match="confidence of depth: expected probabilities"):
        card_from_metadata(metadata, where="here")
    metadata = card_to_metadata(dataclasses.replace(card, provenance={"calibration": [1]}))
    with pytest.raises(ArtefactError, match="metadata is damaged"):
        card_from_metadata(metadata, where="here")
    with pytest.raises(ArtefactError, match="the student's calibration is damaged: confidence of"):
        dataclasses.replace(card, provenance=damaged).confidence("depth", u)
    predict(**plain, out=str(tmp_path / "said"))  # an unfitted student's: nothing old stays
    assert not list((tmp_path / "said").rglob("*_confidence.npy"))
    assert len(list((tmp_path / "said").rglob("*.depth.npy"))) == 8


def test_the_fit_measures_the_factors_that_the_student_multiplies(tmp_path):
    write_analytic_set(tmp_path / "truth", n=2, height=32, width=48)
    torch.manual_seed(0)
    plain = Student(backbone="test_efficientnet", height=32, width=64).eval()
    torch.nn.init.normal_(plain.heads["depth"].maps.out.weight, std=0.1)
    constants = {
        "depth_uncertainty": (1.5, 0.8, -0.2, 0.3, 0.4),
        "normals_uncertainty": (3.0, 0.9, 0.2, 0.4, 0.3),
    }
    fitted = Student(**{**plain.config, "calibration": constants}).eval()
    fitted.load_state_dict(plain.state_dict())
    truth = LabelSet(tmp_path / "truth")
    before, after = (measured(model, truth, truth.keys) for model in (plain, fitted))
    for logs, said in zip(before["depth_logs"], after["depth_logs"], strict=True):
        want = fitted_uncertainty(logs, constants["depth_uncertainty"])
        np.testing.assert_allclose(np.exp(said[:, 0]), want, rtol=1e-4)
        assert logs.std(0).min() > 1e-3
    for (logs, _), (said, _) in zip(before["normals"], after["normals"], strict=True):
        want = fitted_uncertainty(logs, constants["normals_uncertainty"])
        np.testing.assert_allclose(np.exp(said[:, 0]), want, rtol=1e-4)


def test_a_student_twice_too_near_is_mended_in_its_file(tmp_path):
    write_analytic_set(tmp_path / "truth", n=8, height=32, width=48)
    student = Student(backbone="test_efficientnet", height=32, width=64, tasks=["depth"]).eval()
    save_student(student, tmp_path / "a.safetensors", {"steps": 3})
    arguments = {"labels": str(tmp_path / "truth"), "checkpoint": str(tmp_path / "a.safetensors")}
    first = fit_student(**arguments, out=str(tmp_path / "b.safetensors"))
    fitted = load_student(tmp_path / "b.safetensors")
    assert json.loads((tmp_path / "b.calibration.json").read_text()) == first
    assert first["images"] == 8 and first["depth"]["after"] <= first["depth"]["before"] + 1e-9
    assert fitted.provenance["steps"] == 3
    assert fitted.provenance["calibration"]["depth"] == first["depth"]
    fits = {k: v for k, v in first.items() if isinstance(v, dict) and k != "confidence"}
    wanted = {k: v["values"] for k, v in fits.items() if v["kept"]}
    assert fitted.config["calibration"] == wanted
    arguments["checkpoint"] = str(tmp_path / "b.safetensors")
    again = fit_student(**arguments, out=str(tmp_path / "c.safetensors"))
    assert again["depth"] == first["depth"]  # the first fit is undone, not doubled
    with pytest.raises(UsageError, match=r"ends in \.safetensors"):
        fit_student(**arguments, out=str(tmp_path / "d.pt"))
    truth = of_label_set(LabelSet(tmp_path / "truth").meta)
    assert truth and all(e in fitted.provenance["licences"] for e in truth)


def test_a_student_is_not_fitted_to_what_it_learnt_from_nor_in_place_nor_judged_by_one(tmp_path):
    write_analytic_set(tmp_path / "truth", n=3, height=32, width=48)
    student = Student(backbone="test_efficientnet", height=32, width=64).eval()
    save_student(student, tmp_path / "a.safetensors", {})
    learnt = {"data": [set_identity(LabelSet(tmp_path / "truth"))]}
    save_student(student, tmp_path / "learnt.safetensors", learnt)
    one = {"labels": str(tmp_path / "truth"), "checkpoint": str(tmp_path / "a.safetensors")}
    out = str(tmp_path / "b.safetensors")
    with pytest.raises(UsageError, match=r"the very images that .*learnt\.safetensors learnt from"):
        fit_student(**one | {"checkpoint": str(tmp_path / "learnt.safetensors")}, out=out)
    with pytest.raises(UsageError, match="that is the checkpoint itself"):
        fit_student(**one, out=str(tmp_path / "." / "a.safetensors"))
    for limit in (0, -5):
        with pytest.raises(UsageError, match=f"limit={limit}: expected at least one image"):
            fit_student(**one, out=out, limit=limit)
    apart = {"labels": str(tmp_path / "classes"), "checkpoint": one["checkpoint"]}
    label = analytic_label(0, height=32, width=48)
    label.values = {Task.SEMANTIC: label.values[Task.SEMANTIC]}
    about = {"tasks": ["semantic"], "classes": {str(k): v for k, v in CLASSES.items()}}
    write_label_set(tmp_path / "classes", n=1, make=lambda i: label, dataset=about)
    with pytest.raises(UsageError, match="has semantic, the student answers depth, normals"):
        fit_student(**apart, out=out)
    assert not (tmp_path / "b.safetensors").exists()
    out = str(tmp_path / "new" / "b.safetensors")
    found = fit_student(**one, out=out, limit=1)
    assert "depth as it was (too few images: 1, two are needed" in found["summary"]
    about = load_student(out).provenance["calibration"]
    json.dumps(about, allow_nan=False)
    assert about["depth"]["before"] is None and not about["depth"]["kept"]


def test_images_that_a_student_learnt_from_are_left_out_of_its_fit(tmp_path):
    write_analytic_set(tmp_path / "learnt", n=40, height=32, width=48)
    write_analytic_set(tmp_path / "truth", n=12, first_seed=34, height=32, width=48)
    student = Student(backbone="test_efficientnet", height=32, width=64, tasks=["depth"]).eval()
    parts = [set_identity(LabelSet(tmp_path / "learnt"))]
    save_student(student, tmp_path / "a.safetensors", {"data": parts})
    arguments = {"labels": str(tmp_path / "truth"), "out": str(tmp_path / "b.safetensors")}
    found = fit_student(checkpoint=str(tmp_path / "a.safetensors"), **arguments)
    assert (found["images"], found["left_out"]) == (6, 6)
    assert "6 images left out, which it may have learnt from" in found["summary"]
    twice = {"data": parts, "init": {"data": parts}}  # which met the same set in two runs
    assert learnt_from(twice) == learnt_from({"data": parts}) and len(parts) == 1
    begun = {"data": [], "init": {"data": learnt_from({"data": parts})}}  # its ancestor did
    save_student(student, tmp_path / "c.safetensors", begun)
    again = fit_student(checkpoint=str(tmp_path / "c.safetensors"), **arguments)
    assert again["left_out"] == 6
    keys = LabelSet(tmp_path / "learnt").keys
    assert all(may_hold(parts[0]["seen"], keys))
    strangers = [f"stranger {i}" for i in range(4000)]
    many = [f"known {i}" for i in range(4000)]
    assert all(may_hold(seen_filter(many), many))
    taken = np.zeros(len(strangers), bool)
    for number in range(40):  # a student of forty sets
        few = seen_filter([f"known {number} {i}" for i in range(100)])
        taken |= may_hold(few, strangers)
    assert taken.mean() < 0.01
    save_student(student, tmp_path / "a.safetensors", {"data": [{"seen": "?"}]})
    with pytest.raises(UsageError, match="record of the images that it learnt from is damaged"):
        fit_student(checkpoint=str(tmp_path / "a.safetensors"), **arguments)


def test_a_limited_fit_sees_the_whole_set_and_metres_must_be_measured(tmp_path, monkeypatch):
    write_analytic_set(tmp_path / "truth", n=8, height=32, width=48)
    student = Student(backbone="test_efficientnet", height=32, width=64, tasks=["depth"]).eval()
    save_student(student, tmp_path / "a.safetensors", {})
    words = [f"checkpoint={tmp_path}/a.safetensors", f"labels={tmp_path}/truth", "limit=4"]
    said = run_verb("calibrate", [*words, f"out={tmp_path}/verb.safetensors"])
    assert said["images"] == 4 and (tmp_path / "verb.safetensors").exists()
    with pytest.raises(UsageError, match=r"domain=here: a student takes none"):
        run_verb("calibrate", [*words, f"out={tmp_path}/d.safetensors", "domain=here"])
    seen: list[str] = []
    monkeypatch.setattr(
        "distill.fit_student.fit_scale",
        lambda keys, pairs: seen.extend(keys) or fit_scale(keys, pairs),
    )
    arguments = {"labels": str(tmp_path / "truth"), "checkpoint": str(tmp_path / "a.safetensors")}
    fit_student(**arguments, out=str(tmp_path / "b.safetensors"), limit=5)
    keys = LabelSet(tmp_path / "truth").keys
    assert seen == [keys[i] for i in (0, 1, 3, 4, 6)]
    monkeypatch.setattr("distill.samples.claimed_space", lambda label: 1)
    with pytest.raises(UsageError, match="anchor=range"):
        fit_student(**arguments, out=str(tmp_path / "c.safetensors"))
    assert not (tmp_path / "c.safetensors").exists()
