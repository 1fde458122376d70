"""Signs of doubt by hand; calibrated confidence against a teacher whose mistakes are planned."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from mini_rooms import room, write_rooms
from PIL import Image

from teacher import doubt, metrics
from teacher.calibrate import calibrate, truth_of
from teacher.confidence import Calibration, Domain
from teacher.errors import UsageError
from teacher.generators import Query
from teacher.jobs import run as jobs
from teacher.jobs.helpers import Helper
from teacher.label import Answer, Camera, Label, Space, Task
from teacher.store import LabelSet, write_label_set

SIZE = {"height": 24, "width": 32}


class PlannedTeacher:
    """Knows the rooms; where its residual is high it errs, by ever more."""

    tasks = (Task.DEPTH, Task.NORMALS, Task.SEMANTIC)

    def __init__(self, *, wrong: float = 1.0, device: str = "cpu") -> None:
        self.wrong, self.device = wrong, device

    def describe(self):
        return {"name": "planned", "wrong": self.wrong, "device": self.device}

    def answer(self, queries, tasks):
        return [self._one(q, tasks) for q in queries]

    def _one(self, query: Query, tasks):
        seed = int(query.key.removeprefix("room"))
        rng = np.random.default_rng(seed + 10_000)
        truth = room(seed, **SIZE)
        found = {}
        for task in tasks:
            values = truth.values[task].copy()
            residual = rng.gamma(2.0, 10.0, values.shape[:2]).astype(np.float32)
            doubtful = residual / 60
            if task is Task.DEPTH:
                values = values * np.exp(self.wrong * rng.laplace(0, doubtful)).astype(np.float32)
                space = Space.METRIC
            elif task is Task.NORMALS:
                values = (
                    values + self.wrong * rng.normal(0, 0.3, values.shape) * doubtful[..., None]
                )
                values = (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(
                    np.float32
                )
                space = Space.UNIT_NORMALS
            else:
                lost = rng.random(values.shape) < np.clip(doubtful, 0, 0.9)
                values = np.where(lost, 5, values).astype(np.uint8)
                space = Space.CLASS_IDS
            found[task] = Answer(task=task, space=space, values=values, residual=residual)
        return found


class AffineTeacher(PlannedTeacher):
    def _one(self, query, tasks):
        values = np.ones(query.image.shape[:2], np.float32)
        return {t: Answer(task=t, space=Space.AFFINE_DEPTH, values=values) for t in tasks}


PLANNED, AFFINE = "test_calibrate:PlannedTeacher", "test_calibrate:AffineTeacher"


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    return write_rooms(tmp_path_factory.mktemp("rooms") / "set", n=40, **SIZE)


@pytest.fixture(scope="module")
def made(rooms, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibration") / "calibration.json"
    result = calibrate(
        teacher={"name": PLANNED}, labels=rooms, out=str(out),
        tasks=["depth", "normals", "semantic"], domain="rooms",
    )  # fmt: skip
    return out, result


def labelled(seed: int, teacher: PlannedTeacher) -> tuple[Label, dict, Label]:
    """A new room: what a job would store, the answers, and the truth."""
    truth = room(seed, **SIZE)
    query = Query(key=truth.key, image=truth.image, camera=truth.camera)
    answers = teacher.answer([query], teacher.tasks)[0]
    values = {t: a.values for t, a in answers.items()}
    label = Label(key=truth.key, image=truth.image, values=values, camera=truth.camera)
    return label, answers, truth


# -- signs --------------------------------------------------------------------------------------


def camera(width=16, height=12, focal_px=20.0):
    return Camera(fx=focal_px, fy=focal_px, cx=(width - 1) / 2, cy=(height - 1) / 2,
                  width=width, height=height)  # fmt: skip


def test_normals_of_planes_are_exact_and_never_span_a_silhouette():
    """A wall facing the camera, one turned by 30 degrees, a floor; a step between two walls."""
    rays = camera().rays()
    facing = np.full((12, 16), 3.0, np.float32)
    assert doubt.normals_of_depth(facing, camera()) == pytest.approx(
        np.broadcast_to([0, 0, 1], (12, 16, 3)), abs=1e-5
    )
    for normal in ([np.sin(0.5), 0, np.cos(0.5)], [0, 0.8, 0.6], [-0.6, 0, 0.8]):
        own = np.array(normal) * (1, -1, -1)  # x right, y down, forward
        depth = (-4.0 / (rays @ own)).astype(np.float32)
        assert (depth > 0).all()
        found = doubt.normals_of_depth(depth, camera())
        assert found == pytest.approx(np.broadcast_to(normal, found.shape), abs=1e-3)
    step = facing.copy()
    step[:, 8:] = 6.0
    assert doubt.normals_of_depth(step, camera())[..., 2].min() > 0.999
    with pytest.raises(UsageError, match="depth is 16x12, the camera 8x6"):
        doubt.normals_of_depth(facing, camera(8, 6))


def test_surface_is_the_angle_between_depth_and_normals():
    facing = np.full((12, 16), 3.0, np.float32)
    tilted = np.broadcast_to([np.sin(0.4), 0, np.cos(0.4)], (12, 16, 3)).astype(np.float32)
    assert doubt.surface(facing, tilted, camera()) == pytest.approx(np.degrees(0.4), abs=0.05)


def test_an_outline_is_doubtful_where_no_class_ends():
    depth = np.full((12, 32), 2.0, np.float32)
    depth[:, 16:] = 4.0
    classes = np.zeros((12, 32), np.uint8)
    assert doubt.outline(depth, classes)[:, 15:17] == pytest.approx(np.log(2), rel=1e-5)
    assert (doubt.outline(depth, classes)[:, :14] == 0).all()
    classes[:, 16:] = 1  # an object ends there: explained
    assert (doubt.outline(depth, classes) == 0).all()
    classes[:] = 0
    classes[:, 20:] = 1  # ends 4 px away: half explained
    at = doubt.outline(depth, classes)[:, 15:17]
    assert (at > 0).all() and (at < np.log(2)).all()


def test_zoom_takes_each_window_at_its_own_scale():
    whole = np.full((8, 8), 2.0, np.float32)
    window = np.full((8, 8), np.nan, np.float32)
    window[:, :6] = 3.0  # another scale, the same shape
    assert np.nanmax(doubt.zoom(whole, [window])) < 1e-6
    window[0, 0] = 6.0
    found = doubt.zoom(whole, [window])
    assert found[0, 0] == pytest.approx(np.log(2), rel=1e-5)
    assert np.isnan(found[:, 6:]).all()
    assert np.isnan(doubt.zoom(whole, [])).all()


def test_signs_are_finite_cross_tasks_and_tell_of_the_neighbourhood_and_the_image():
    """One spot of doubt about the classes is a sign for depth: there, around it, not elsewhere."""
    still = np.zeros((12, 16), np.float32)
    spot = still.copy()
    spot[6, 4] = 40.0
    spot[0, 0] = np.nan  # unknown: most doubtful
    depth, classes = np.full((12, 16), 2.0, np.float32), np.ones((12, 16), np.uint8)
    answers = {
        Task.DEPTH: Answer(task=Task.DEPTH, space=Space.METRIC, values=depth, residual=still + 3),
        Task.SEMANTIC: Answer(
            task=Task.SEMANTIC, space=Space.CLASS_IDS, values=classes, residual=spot,
            uncertainty=(spot == 40).astype(np.float32),
        ),
    }  # fmt: skip
    of_depth = doubt.signs(answers, Task.DEPTH, camera())
    of_classes = doubt.signs(answers, Task.SEMANTIC, camera())
    assert np.isfinite(np.stack(list(of_depth.values()))).all()
    assert (of_depth["residual"] == 3).all() and (of_depth["image_residual"] == 3).all()
    assert of_depth["residual_semantic"][6, 4] == 40 and of_depth["residual_semantic"][0, 0] == 255
    assert (of_classes["residual"] == of_depth["residual_semantic"]).all()
    assert of_classes["image_residual"] == pytest.approx((40 + 255) / 192)
    near = of_depth["near_residual_semantic"]
    assert 40 > near[6, 4] > near[6, 5] > near[6, 10] == 0
    assert near[:3, :3].sum() < 61  # an outlier counts as 60
    spread, near = of_depth["spread_semantic"], of_depth["near_spread_semantic"]
    assert spread[6, 4] == 1 and spread.sum() == 1
    assert 1 > near[6, 4] > near[6, 5] > near[6, 10] == 0


def test_auroc_by_hand():
    """Pairs (wrong, right): 0.9 beats both, 0.4 beats one and ties one: (2 + 1.5) / 4."""
    doubts, wrong = np.array([0.9, 0.4, 0.4, 0.1]), np.array([True, True, False, False])
    assert metrics.auroc(doubts, wrong) == pytest.approx(3.5 / 4)
    assert metrics.auroc(np.array([np.nan, 1.0]), np.array([True, False])) == 1.0
    assert np.isnan(metrics.auroc(doubts, np.ones(4, bool)))


# -- calibration --------------------------------------------------------------------------------


def test_confidence_is_the_share_of_right_pixels_on_new_images(made):
    """On rooms never seen: confidence bins hold, and uncertainty is the mean error."""
    calibration = Calibration.load(made[0])
    teacher = PlannedTeacher()
    calibration.fits(teacher.describe(), teacher.tasks)
    bins = {t: metrics.CalibrationBins() for t in teacher.tasks}
    errors, spreads, used = [], [], 0
    for seed in range(100, 130):
        label, answers, truth = labelled(seed, teacher)
        calibration.apply(label, answers)
        if label.provenance["calibration"]["used"] == "none":
            continue
        used += 1
        depth, right = label.values[Task.DEPTH], truth.values[Task.DEPTH]
        ratio = np.exp(np.abs(np.log(depth / right)))
        bins[Task.DEPTH].add(label.confidence[Task.DEPTH], ratio < 1.25)
        angle, _ = metrics.angles_deg(label.values[Task.NORMALS], truth.values[Task.NORMALS])
        bins[Task.NORMALS].add(label.confidence[Task.NORMALS], angle < 11.25)
        bins[Task.SEMANTIC].add(
            label.confidence[Task.SEMANTIC],
            label.values[Task.SEMANTIC] == truth.values[Task.SEMANTIC],
        )
        errors.append(np.log(ratio).mean())
        spreads.append(label.uncertainty[Task.DEPTH].mean())
    assert used >= 24
    for task, tally in bins.items():
        assert tally.result()["ece"] < 0.05, task
    assert np.mean(spreads) == pytest.approx(np.mean(errors), rel=0.1)


def test_the_report_judges_on_the_other_half(made):
    out, result = made
    depth = result["tasks"]["depth"]
    assert depth["right"] < depth["right_of_kept"] < 1
    assert depth["error_auroc"] > 0.75 and depth["brier_skill"] > 0.1 and depth["ece"] < 0.05
    assert depth["sign_auroc"]["residual"] > 0.75
    assert {"ece_flat", "ece_edges"} <= set(depth)
    assert json.loads(out.read_text())["report"]["images"] == 40
    assert "Brier skill" in result["summary"] and "domain 'rooms'" in result["summary"]


def test_all_of_one_set_is_fitted_and_another_judged(made, rooms, tmp_path):
    """The share that is right is the judged set's; the domain is the fitted one's."""
    held = write_rooms(tmp_path / "held", n=8, **SIZE, start=60)
    about = {"teacher": {"name": PLANNED}, "tasks": ["depth", "normals", "semantic"]}
    both = calibrate(labels=rooms, held=held, out=str(tmp_path / "c.json"), **about)
    fitted = Calibration.load(tmp_path / "c.json")
    assert fitted.report["images"] == 40 and fitted.report["held"] == held
    half = Calibration.load(made[0])
    assert fitted.domain.limit == half.domain.limit  # every image of rooms, in both
    assert not np.allclose(fitted.heads[Task.DEPTH].right, half.heads[Task.DEPTH].right)
    shares = []
    for seed in range(60, 68):
        label, _, truth = labelled(seed, PlannedTeacher())
        depth = [x.values[Task.DEPTH] for x in (label, truth)]
        _, right = truth_of(Task.DEPTH, *depth)
        shares.append(right[np.isfinite(depth[1])].mean())
    assert both["tasks"]["depth"]["right"] == pytest.approx(np.mean(shares), abs=0.02)
    for bad, message in (
        ({"held": rooms}, "are in labels="),
        ({"limit": 4}, "expected at least 8"),
    ):
        with pytest.raises(UsageError, match=message):
            calibrate(labels=rooms, out=str(tmp_path / "x.json"), **about, **bad)


def test_the_file_comes_back_as_it_was(made):
    calibration = Calibration.load(made[0])
    assert calibration.to_json() == json.loads(made[0].read_text())


def test_another_teacher_is_refused_and_another_device_or_list_of_wordings_is_not(made):
    calibration = Calibration.load(made[0])
    calibration.fits(PlannedTeacher(device="cuda").describe(), PlannedTeacher.tasks)
    of_before = dataclasses.replace(
        calibration, teacher=calibration.teacher | {"prompts_version": 3}
    )
    of_before.fits(PlannedTeacher().describe() | {"prompts_version": 5}, PlannedTeacher.tasks)
    with pytest.raises(UsageError, match=r"another teacher \(wrong: 0.5 here, 1.0 there\)"):
        calibration.fits(PlannedTeacher(wrong=0.5).describe(), PlannedTeacher.tasks)


def test_outside_its_domain_nothing_is_claimed(made):
    calibration = Calibration.load(made[0])
    label, answers, _ = labelled(200, PlannedTeacher())
    rng = np.random.default_rng(0)
    label.image = rng.integers(0, 255, label.image.shape).astype(np.uint8)
    calibration.apply(label, answers)
    said = label.provenance["calibration"]
    assert said["used"] == "none" and said["nearest"] == "rooms"
    assert said["distance"] > said["limit"]
    assert not label.confidence and not label.uncertainty


def test_fewer_tasks_than_calibrated_are_refused_with_advice(made):
    """Before a job starts: the signs of depth come from the answers to all three."""
    calibration, about = Calibration.load(made[0]), PlannedTeacher().describe()
    with pytest.raises(
        UsageError, match=r"semantic is not asked. Give tasks=\[depth,normals,semantic\]"
    ):
        calibration.fits(about, [Task.DEPTH, Task.NORMALS])
    calibration.fits(about, list(Task))  # more than it was made with is fine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["instances"]}, r"tasks is \['instances'\], expected some of"),
        ({"limit": 3}, "has 3 images, expected at least 8"),
        ({"teacher": {"name": AFFINE}, "tasks": ["depth"]}, "depth comes in affine depth; only"),
        ({"labels": "/nowhere"}, "/nowhere"),
    ],
)
def test_bad_requests_say_what_to_do(rooms, tmp_path, change, message):
    given = {"teacher": {"name": PLANNED}, "labels": rooms, "out": str(tmp_path / "c.json"),
             "tasks": ["depth"], **change}  # fmt: skip
    with pytest.raises(UsageError, match=message):
        calibrate(**given)
    assert not (tmp_path / "c.json").exists()


def test_a_file_that_is_no_calibration_is_named(tmp_path):
    path = tmp_path / "c.json"
    with pytest.raises(UsageError, match=r"c\.json: no calibration there; `distill calibrate`"):
        Calibration.load(path)
    path.write_text("{}")
    with pytest.raises(UsageError, match=r"not a calibration file, expected format"):
        Calibration.load(path)
    path.write_text('{"format": "dense-distill calibration", "version": 9}')
    with pytest.raises(UsageError, match="version 9, this release reads up to 1"):
        Calibration.load(path)


# -- in a label job -----------------------------------------------------------------------------


class GreyTeacher:
    """Depth is 1 m + 5 m times the grey value, with errors where its residual is high."""

    tasks = (Task.DEPTH,)

    def __init__(self, *, wrong: float = 1.0) -> None:
        self.wrong = wrong

    def describe(self):
        return {"name": "grey", "wrong": self.wrong}

    def answer(self, queries, tasks):
        return [{Task.DEPTH: self._one(q.image)} for q in queries]

    def _one(self, image):
        rng = np.random.default_rng(int(image.astype(np.int64).sum()))
        residual = rng.gamma(2.0, 10.0, image.shape[:2]).astype(np.float32)
        noise = self.wrong * rng.laplace(0, residual / 60)
        values = (grey_depth(image) * np.exp(noise)).astype(np.float32)
        return Answer(task=Task.DEPTH, space=Space.METRIC, values=values, residual=residual)


GREY = "test_calibrate:GreyTeacher"


def grey_depth(image):
    return (1 + 5 * image.mean(-1) / 255).astype(np.float32)


def grey_label(seed: int) -> Label:
    rng = np.random.default_rng(seed)
    image = rng.integers(40, 220, (16, 24, 3)).astype(np.uint8)
    cam = camera(24, 16)
    return Label(
        key=f"grey{seed:03d}", image=image, values={Task.DEPTH: grey_depth(image)}, camera=cam
    )


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """Calibration of the grey teacher, and a folder of new pictures of its domain."""
    root = tmp_path_factory.mktemp("grey")
    about = {"tasks": ["depth"], "licences": {"images": "CC-BY-NC-4.0"}}
    write_label_set(root / "truth", n=24, make=grey_label, dataset=about)
    calibrate(teacher={"name": GREY}, labels=str(root / "truth"), out=str(root / "c.json"),
              tasks=["depth"], domain="grey")  # fmt: skip
    (root / "photos").mkdir()
    for i in range(6):
        Image.fromarray(grey_label(100 + i).image).save(root / "photos" / f"{i}.png")
    Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(root / "photos" / "night.png")
    return root


def job(root, out, **more):
    given = {
        "teacher": {"name": GREY}, "images": str(root / "photos"), "out": str(out),
        "tasks": ["depth"], "max_side": None, "shard_size": 4, "batch_size": 2,
        "keep_pictures": False, "threads": 1, "calibration": str(root / "c.json"),
    }  # fmt: skip
    return jobs.label(**given | more)


def test_a_label_job_stores_confidence_and_where_it_holds(grey, tmp_path):
    """Pictures of the domain carry a confidence that is right; the black one carries none."""
    job(grey, tmp_path / "labels")
    labels = LabelSet(tmp_path / "labels")
    stated = json.loads((tmp_path / "labels" / "dataset.json").read_text())["calibration"]
    assert stated["domain"] == "grey" and len(stated["sha256"]) == 64
    bins, used = metrics.CalibrationBins(), 0
    for one in labels:
        said = one.provenance["calibration"]
        if said["used"] == "none":
            assert not one.confidence and said["nearest"] == "grey"
            continue
        assert one.image.any(), "the black picture lies in no domain of grey ones"
        used += 1
        ratio = np.exp(np.abs(np.log(one.values[Task.DEPTH] / grey_depth(one.image))))
        bins.add(np.clip(one.confidence[Task.DEPTH], 0, 1), ratio < 1.25)
        assert one.uncertainty[Task.DEPTH].min() > 0
    assert 4 <= used <= 6
    assert bins.result()["ece"] < 0.06


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"licence": {"images": "MIT", "refuse": ["non-commercial"]}},
            r"calibration images images: CC-BY-NC-4\.0",
        ),
        ({"teacher": {"name": GREY, "wrong": 2.0}}, r"another teacher \(wrong: 2.0 here, 1.0"),
        ({"calibration": "/nowhere.json"}, r"/nowhere\.json: no calibration there"),
        (
            {"anchor": {"name": "range", "near_m": 1.0, "far_m": 9.0}},
            "calibration and anchor exclude",
        ),
    ],
)
def test_a_job_refuses_a_calibration_that_cannot_hold(grey, tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        job(grey, tmp_path / "labels", **change)
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize("how", ["workers", "helpers"])
def test_other_processes_give_the_calibrated_bytes_of_one(grey, tmp_path, monkeypatch, how):
    """``workers`` load teacher and calibration themselves; helpers are sent the calibration."""
    job(grey, tmp_path / "one")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    asked = []
    if how == "helpers":
        ask = Helper.ask
        for place, value in (("engines.HELPED_FROM", 1), ("helpers.WORTH_BYTES", 0),
                             ("helpers.START_WAIT_S", 60.0)):  # fmt: skip
            monkeypatch.setattr(f"teacher.jobs.{place}", value)
        monkeypatch.setattr(Helper, "ask", lambda *a: (asked.append(1), ask(*a))[1])
    done = job(grey, tmp_path / "more", workers=2 if how == "workers" else 1)
    assert done["labelled"] == 7 and len(asked) == (7 if how == "helpers" else 0)
    shards = sorted(p.name for p in (tmp_path / "one").glob("*.tar"))
    assert len(shards) == 2
    for name in shards:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "more" / name).read_bytes()
    assert sum(bool(x.confidence) for x in LabelSet(tmp_path / "more")) >= 4


def test_the_domains_limit_is_that_of_images_left_out():
    """Against thirty covariances computed one by one without the image."""
    facts = np.random.default_rng(0).normal(size=(30, 4))
    domain = Domain.of("d", [dict(zip("abcd", row, strict=True)) for row in facts])
    distances = []
    for i, row in enumerate(facts):
        others = np.delete(facts, i, 0)
        gap = row - others.mean(0)
        distances.append(np.sqrt(gap @ np.linalg.inv(np.cov(others.T)) @ gap))
    assert domain.limit == pytest.approx(np.quantile(distances, 0.95), rel=1e-3)
