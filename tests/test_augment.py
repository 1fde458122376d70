import io

import numpy as np
import pytest
from PIL import Image

from distill.augment import (
    GREY,
    Window,
    cutmix,
    letterbox,
    mirrored_normals,
    photometric,
    random_window,
    sample_rng,
)
from distill.samples import Frame, compact, make_sample
from export.letterbox import GREY as EXPORT_GREY
from export.letterbox import Letterbox
from teacher.label import Camera, Label, Task


def test_half_size_takes_the_source_pixel_under_each_centre():
    values = np.arange(16, dtype=np.float32).reshape(4, 4)
    window = Window(left=0, top=0, factor=0.5, height=2, width=2)
    # the centre of output pixel 0 lies at source border coordinate 1.0: pixel 1
    assert window.labels(values, np.nan).tolist() == [[5, 7], [13, 15]]


def test_double_size_repeats_every_pixel():
    values = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    window = Window(left=0, top=0, factor=2, height=4, width=4)
    assert window.labels(values, np.nan).tolist() == np.kron(values, np.ones((2, 2))).tolist()


def test_outside_the_source_is_grey_and_unknown():
    image = np.full((2, 2, 3), 200, np.uint8)
    window = Window(left=-1, top=0, factor=1, height=2, width=4)
    assert (window.image(image)[:, 1:3] == 200).all()
    assert (window.image(image)[:, [0, 3]] == GREY).all()
    depth = window.labels(np.ones((2, 2), np.float32), np.nan)
    assert np.isnan(depth).tolist() == [[True, False, False, True]] * 2
    far = Window(left=50, top=50, factor=1, height=2, width=2)
    assert (far.image(image) == GREY).all()
    assert np.isnan(far.labels(np.ones((2, 2)), np.nan)).all()


def test_labels_are_never_mixed():
    rng = np.random.default_rng(0)
    values = np.where(rng.random((37, 53)) < 0.5, 1.0, 100.0).astype(np.float32)
    for _ in range(50):
        window = random_window(rng, (37, 53), (32, 48))
        got = np.unique(window.labels(values, np.nan))
        assert set(got[~np.isnan(got)].tolist()) <= {1.0, 100.0}


def test_image_labels_and_camera_move_together():
    rng = np.random.default_rng(1)
    h, w = 60, 90
    ramp_x = np.tile(np.arange(w, dtype=np.float32), (h, 1))
    image = np.repeat((ramp_x * 2)[..., None], 3, -1).astype(np.uint8)
    camera = Camera(fx=80, fy=82, cx=41, cy=27, width=w, height=h)
    for _ in range(50):
        window = random_window(rng, (h, w), (48, 64))
        moved = window.camera(camera)
        labels, picture = window.labels(ramp_x, np.nan), window.image(image)[..., 0] / 2.0
        inside = ~np.isnan(labels)
        inside[:, :1] = inside[:, -1:] = False  # the picture's border is replicated
        # nearest label: at most half a source pixel from the true centre
        assert np.abs(labels - picture)[inside].max() <= 0.5 + 0.5 + 0.3
        # a ray through a pixel of the sample is the ray through the source pixel under it
        x = np.arange(64)
        source_x = (x + 0.5) / window.factor + window.left - 0.5
        np.testing.assert_allclose((x - moved.cx) / moved.fx, (source_x - camera.cx) / camera.fx)
        y = np.arange(48)
        source_y = (y + 0.5) / window.factor + window.top - 0.5
        np.testing.assert_allclose((y - moved.cy) / moved.fy, (source_y - camera.cy) / camera.fy)


def plane_depth(camera: Camera, normal: np.ndarray, distance_m: float) -> np.ndarray:
    """z-depth of the plane n . X = -distance in the frame x right, y up, z to the viewer."""
    rays = camera.rays().astype(np.float64) * [1, -1, -1]
    return -distance_m / (rays @ normal)


@pytest.mark.parametrize("mirror", [False, True])
def test_after_every_window_depth_and_camera_still_give_the_labelled_normal(mirror):
    rng = np.random.default_rng(2)
    normal = np.array([0.3, 0.8, 0.5])
    normal /= np.linalg.norm(normal)
    camera = Camera(fx=70, fy=70, cx=30, cy=-200, width=64, height=48)  # looks down: no horizon
    depth_m = plane_depth(camera, normal, 2.0)
    assert (depth_m > 0).all()
    normals = np.tile(normal.astype(np.float32), (48, 64, 1))
    for _ in range(20):
        window = random_window(rng, (48, 64), (48, 64))
        d, n, c = window.labels(depth_m, np.nan), window.labels(normals, np.nan), camera
        c = window.camera(c)
        if mirror:
            d, n, c = d[:, ::-1], mirrored_normals(n), c.mirrored()
        points = (c.rays().astype(np.float64) * [1, -1, -1]) * d[..., None]
        offset = (points * n).sum(-1)
        # nearest labels are off by up to half a source pixel of the plane's slope
        assert np.nanmax(np.abs(offset / -2.0 - 1)) < 0.02


def test_mirror_negates_x_only():
    normals = np.array([[[0.6, 0.0, 0.8], [0.0, 1.0, 0.0]]], np.float32)
    assert mirrored_normals(normals).tolist() == [[[0, 1, 0], pytest.approx([-0.6, 0, 0.8])]]


@pytest.mark.parametrize("source", [(48, 64), (96, 128), (100, 37), (31, 200), (480, 640), (7, 5)])
def test_letterbox_is_the_one_that_predict_uses(source):
    image = np.random.default_rng(0).integers(0, 256, (*source, 3), np.uint8)
    ours, theirs = letterbox(source, (48, 64)), Letterbox.fit(source, (48, 64))
    assert GREY == EXPORT_GREY
    assert ours.factor == theirs.factor
    got, want = ours.image(image).astype(int), theirs.apply(image).astype(int)
    assert ((got == GREY).all(-1) == (want == GREY).all(-1)).mean() > 0.99
    assert np.abs(got - want).max() <= 1
    inside = ~np.isnan(ours.labels(np.ones(source, np.float32), np.nan))
    assert (inside == theirs.inside()).all()


def test_random_windows_cover_zoom_and_border_but_never_leave_the_picture():
    rng = np.random.default_rng(3)
    windows = [random_window(rng, (60, 90), (64, 64)) for _ in range(300)]
    fit, fill = 64 / 90, 64 / 60
    factors = np.array([w.factor for w in windows])
    assert fit <= factors.min() < fill < 1.5 * fill < factors.max() <= 1.6 * fill
    assert (factors == fill).mean() > 0.05
    whole = letterbox((60, 90), (64, 64))
    shown = [w for w in windows if (w.factor, w.left, w.top) == (fit, whole.left, whole.top)]
    assert 0.4 < len(shown) / 300 < 0.6  # every second sample is what predict shows
    for w in windows:
        if w.factor >= fill:  # no border needed, so none taken
            assert 0 <= w.left <= 90 - 64 / w.factor + 1e-9
            assert 0 <= w.top <= 60 - 64 / w.factor + 1e-9


def test_pictures_of_the_target_aspect_also_meet_the_borders_of_predict():
    rng = np.random.default_rng(4)
    windows = [random_window(rng, (48, 64), (96, 128)) for _ in range(400)]
    shown = np.array([w.labels(np.ones((48, 64)), np.nan) for w in windows]) == 1
    bordered = ~shown.all((1, 2))
    assert 0.1 < bordered.mean() < 0.3
    tall = Letterbox.fit((400, 300), (96, 128)).inside().mean()  # a phone held upright
    assert shown.mean((1, 2)).min() < tall
    for w, s in zip(windows, shown, strict=True):
        rows, columns = w.hidden
        inside = np.zeros((96, 128), bool)
        inside[rows : 96 - rows, columns : 128 - columns] = True
        assert (s == inside).all()
        image = w.image(np.full((48, 64, 3), 200, np.uint8))
        assert ((image == GREY).all(-1) == ~inside).all()
        assert (w.with_grey(image // 2, (48, 64)) == np.where(s[..., None], 100, GREY)).all()


def test_photometric_changes_light_only_and_follows_its_generator():
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    runs = [photometric(sample_rng("k", v), image) for v in range(30)]
    assert all(r.shape == image.shape and r.dtype == np.uint8 for r in runs)
    assert (photometric(sample_rng("k", 4), image) == runs[4]).all()
    means = [r.mean() for r in runs]
    assert np.ptp(means) > 20
    # still the same picture in the same place
    grey = image.mean(-1).ravel()
    assert min(np.corrcoef(grey, r.mean(-1).ravel())[0, 1] for r in runs) > 0.4


def test_cutmix_pastes_image_and_labels_of_one_rectangle():
    def sample(value: float, number: int) -> dict[str, np.ndarray]:
        return {
            "image": np.full((3, 20, 30), value, np.float32),
            "clean": np.full((3, 20, 30), value / 4, np.float32),
            "depth": np.full((1, 20, 30), 10 * value, np.float32),
            "depth_uncertainty": np.full((1, 20, 30), value / 8, np.float32),
            "normals": np.full((3, 20, 30), -value, np.float32),
            "semantic": np.full((20, 30), number, np.int64),
            "instances": np.full((20, 30), number, np.int32),
            "focal_px": np.array(30.0, np.float32),
            "camera_known": np.array(True),
            "depth_space": np.array(0),
        }

    for seed in range(40):
        mixed = cutmix(np.random.default_rng(seed), sample(0.25, 1), sample(0.5, 2))
        pasted = mixed["depth"][0] == 5.0
        rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
        box = np.zeros((20, 30), bool)
        box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        assert (pasted == box).all() and 0.07 < box.mean() < 0.45
        assert (mixed["image"] == np.where(box, 0.5, 0.25)).all()
        assert (mixed["clean"] == np.where(box, 0.125, 0.0625)).all()
        assert (mixed["depth_uncertainty"] == np.where(box, 0.0625, 0.03125)).all()
        assert (mixed["normals"] == np.where(box, -0.5, -0.25)).all()
        assert (mixed["semantic"] == np.where(box, 2, 1)).all()
        assert (mixed["instances"] == np.where(box, 2 + 65536, 1)).all()
        assert not mixed["camera_known"] and mixed["focal_px"] == 30
    other = sample(0.5, 2) | {"depth_space": np.array(2)}
    alone = cutmix(np.random.default_rng(0), sample(0.25, 1), other)
    assert (alone["depth"] == 2.5).all() and alone["camera_known"]
    affine = [sample(v, n) | {"depth_space": np.array(2)} for v, n in ((0.25, 1), (0.5, 2))]
    alone = cutmix(np.random.default_rng(0), *affine)  # each has a scale and a shift of its own
    assert (alone["depth"] == 2.5).all() and alone["camera_known"]


def test_photometric_changes_are_those_that_are_named(monkeypatch):
    """With every random number in the middle of its range one pixel can be worked out by hand."""

    class Middle:
        def normal(self, mean, sigma, size=None):
            return np.full(size, 0.1) if size else 0.1

        def uniform(self, low=0.0, high=1.0):
            return (low + high) / 2

    image = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    got = photometric(Middle(), image)
    x = np.array([200, 100, 50]) / 255 * np.exp(0.2)  # exposure 0.1 and white balance 0.1
    x = np.clip(x, 0, 1) ** 1.05  # contrast 1, saturation 1, gamma 1.05; no noise, blur, JPEG
    assert np.abs(got[0, 0] - x * 255).max() <= 1


class Scripted:
    """Gives the uniform numbers that `photometric` asks for, in its order; no change by default."""

    def __init__(self, *, contrast=1.0, grey=0.9, saturation=1.0, gamma=1.0, then=(0.9, 0.9, 0.9)):
        self.numbers = [contrast, grey, *([saturation] if grey >= 0.05 else []), gamma, *then]

    def normal(self, mean, sigma, size=None):
        return np.zeros(size) if size else 0.0

    def uniform(self, low=0.0, high=1.0):
        return self.numbers.pop(0)

    def standard_normal(self, shape, dtype):
        return np.where(np.arange(shape[1]) % 2, 1, -1)[None, :, None] * np.ones(shape, dtype)

    def integers(self, low, high):
        assert (low, high) == (30, 95)
        return 30


def test_contrast_and_saturation_by_hand():
    image = np.full((4, 8, 3), 51, np.uint8)
    image[:, 4:] = 153  # 0.2 and 0.6: contrast 1.4 around 0.4 gives 0.12 and 0.68
    got = photometric(Scripted(contrast=1.4), image)
    assert (got[:, :4] == 31).all() and (got[:, 4:] == 173).all()
    image = np.full((4, 8, 3), (204, 102, 51), np.uint8)
    # luma 0.299 0.8 + 0.587 0.4 + 0.114 0.2 = 0.4968; half way there 0.6484, 0.4484, 0.3484
    assert photometric(Scripted(saturation=0.5), image)[2, 3].tolist() == [165, 114, 89]
    assert photometric(Scripted(grey=0.049), image)[2, 3].tolist() == [127, 127, 127]
    assert photometric(Scripted(gamma=2.0), image)[2, 3].tolist() == [163, 41, 10]  # squares
    assert (photometric(Scripted(), image) == image).all()


def test_noise_blur_and_jpeg_by_hand():
    image = np.full((4, 8, 3), 100, np.uint8)
    image[2:] = 250
    got = photometric(Scripted(then=(0.49, 0.04, 0.9, 0.9)), image)  # +- 0.04 x 255 = 10.2
    assert (got[:2, ::2] == 90).all() and (got[:2, 1::2] == 110).all()
    assert (got[2:, ::2] == 240).all() and (got[2:, 1::2] == 255).all()
    assert (photometric(Scripted(then=(0.5, 0.9, 0.9)), image) == image).all()
    edge = np.zeros((100, 40, 3), np.uint8)
    edge[:, 20:] = 200
    got = photometric(Scripted(then=(0.9, 0.19, 1.0, 0.9)), edge)  # half a pixel per 100 rows
    assert (got == got[:1, :, :1]).all()
    rise, at = np.diff(got[0, :, 0].astype(float)), np.arange(39) + 0.5
    assert rise.sum() == 200 and rise @ at / 200 == pytest.approx(19.5, abs=0.02)
    assert np.sqrt(rise @ (at - 19.5) ** 2 / 200) == pytest.approx(0.5, abs=0.05)
    picture = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=30)
    got = photometric(Scripted(then=(0.9, 0.9, 0.19)), picture)
    assert (got == np.asarray(Image.open(file))).all() and (got != picture).mean() > 0.5
    assert (photometric(Scripted(then=(0.9, 0.2, 0.2)), picture) == picture).all()


FRAME = Frame(
    height=4,
    width=6,
    canonical_focal_px=24.0,
    tasks=("depth", "normals", "semantic", "instances"),
    class_ids=(5, 9),
)


def small_label(height: int = 4, width: int = 6) -> Label:
    """Depth 1 m and 100 m, classes 5 and 9, ids 3 and 700, left and right of an edge."""
    right = np.arange(width) >= width // 2 + 1
    right = np.repeat(right[None], height, 0)
    normals = np.tile(np.array([0.6, 0.0, 0.8], np.float32), (height, width, 1))
    return Label(
        key="a",
        image=np.repeat(np.arange(width, dtype=np.uint8)[None, :, None] * 40, height, 0).repeat(
            3, 2
        ),
        values={
            Task.DEPTH: np.where(right, 100, 1).astype(np.float32),
            Task.NORMALS: normals,
            Task.SEMANTIC: np.where(right, 9, 5).astype(np.uint8),
            Task.INSTANCES: np.where(right, 700, 3).astype(np.uint16),
        },
        uncertainty={
            Task.DEPTH: np.where(right, 0.5, 0.25).astype(np.float32),
            Task.NORMALS: np.where(right, 16, 8).astype(np.float32),
            Task.SEMANTIC: np.where(right, 0.75, 0.125).astype(np.float32),
        },
        camera=Camera(fx=6, fy=6, cx=2.5, cy=1.5, width=width, height=height),
    )


@pytest.mark.parametrize("mirror", [False, True])
def test_a_crop_twice_as_large_and_its_mirror_by_hand(monkeypatch, mirror):
    """Columns 2, 3, 4 and rows 1, 2 of 4 x 6, each twice; the edge lies behind column 3."""
    window = Window(left=2, top=1, factor=2, height=4, width=6)
    monkeypatch.setattr("distill.samples.random_window", lambda *_: window)
    chance = Scripted()
    chance.numbers = [0.4 if mirror else 0.6]
    sample = make_sample(compact(small_label(), FRAME), FRAME, rng=chance, mode="geometry")
    right = np.array([0, 0, 0, 0, 1, 1], bool)[:: -1 if mirror else 1]
    # f = 12, so canonical metres are twice the metres
    assert (sample["depth"][0] == np.where(right, 200, 2)).all() and sample["focal_px"] == 12
    assert (sample["semantic"] == right).all()
    assert (sample["instances"] == np.where(right, 700, 3)).all()
    assert (sample["depth_uncertainty"][0] == np.where(right, 0.5, 0.25)).all()
    assert (sample["normals_uncertainty"][0] == np.where(right, 16, 8)).all()
    assert (sample["semantic_uncertainty"][0] == np.where(right, 0.75, 0.125)).all()
    normal = sample["normals"].reshape(3, -1)
    want = np.array([-0.6 if mirror else 0.6, 0, 0.8])[:, None]
    np.testing.assert_allclose(normal, np.repeat(want, 24, 1), atol=1e-3)
    # (2.5 + 0.5 - 2) 2 - 0.5 = 1.5, seen from the other side 6 - 1 - 1.5; (1.5 + 0.5 - 1) 2 - 0.5
    assert sample["centre_px"].tolist() == [3.5 if mirror else 1.5, 1.5]
    # columns 2, 3, 4 are 80, 120, 160; in between a quarter and three quarters of the way
    row = np.array([70, 90, 110, 130, 150, 170])[:: -1 if mirror else 1]
    np.testing.assert_allclose(sample["image"][0] * 255, np.tile(row, (4, 1)), atol=1)


def test_light_and_sensor_leave_labels_and_camera_alone():
    record = compact(small_label(48, 64), FRAME)
    for seed in range(12):
        plain, strong = (
            make_sample(record, FRAME, rng=np.random.default_rng(seed), mode=mode)
            for mode in ("geometry", "strong")
        )
        assert set(plain) == set(strong)
        for name in plain:
            same = np.array_equal(plain[name], strong[name], equal_nan=name != "camera_known")
            assert same == (name != "image"), name


def test_no_window_mixes_depths_classes_ids_or_uncertainties():
    record = compact(small_label(37, 53), FRAME)
    for seed in range(30):
        sample = make_sample(record, FRAME, rng=np.random.default_rng(seed), mode="strong")
        metres = sample["depth"][0] * sample["focal_px"] / 24
        near = np.isclose(metres, 1, rtol=1e-5)
        unknown = np.isnan(metres)
        assert (near | unknown | np.isclose(metres, 100, rtol=1e-5)).all()
        for name, values in (
            ("semantic", (-1, 0, 1)),
            ("instances", (-1, 3, 700)),
            ("depth_uncertainty", (np.nan, 0.25, 0.5)),
        ):
            want = np.where(unknown, values[0], np.where(near, values[1], values[2]))
            assert np.array_equal(sample[name].reshape(4, 6), want, equal_nan=True), name
