"""Normal codec: the conventions by hand-worked colours, the 8-bit error, wrong signs caught."""

import numpy as np
import pytest

from teacher.codecs.normals import AXES, NormalCodec
from teacher.errors import UsageError


def directions(n=20_000, seed=0):
    v = np.random.default_rng(seed).normal(size=(n, 3))
    v[:, 2] = np.abs(v[:, 2])  # visible surfaces face the viewer
    return (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)


def angle_deg(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.degrees(2 * np.arcsin(np.clip(np.linalg.norm(a - b, axis=-1) / 2, 0, 1)))


# What a wall facing left, up, or the camera looks like (teachers.md, section 0 and 1.3).
COLOURS = {
    "ours": ([0, 128, 128], [128, 255, 128], [128, 128, 255]),
    "marigold": ([0, 128, 128], [128, 255, 128], [128, 128, 255]),
    "vision-banana": ([255, 128, 128], [128, 255, 128], [128, 128, 255]),  # left is pinkish red
    "lotus": ([255, 128, 128], [128, 255, 128], [128, 128, 255]),
    "dsine": ([255, 128, 128], [128, 255, 128], [128, 128, 255]),
    "opencv": ([0, 128, 128], [128, 0, 128], [128, 128, 0]),
    "moge": ([0, 128, 128], [128, 0, 128], [128, 128, 0]),
}


@pytest.mark.parametrize("axes", AXES)
def test_every_convention_by_its_colours(axes):
    left_up_front = np.array([[-1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    assert NormalCodec(axes=axes).encode(left_up_front).tolist() == list(COLOURS[axes])


@pytest.mark.parametrize("axes", AXES)
def test_eight_bits_cost_less_than_0_39_degrees(axes):
    normals = directions(200_000)
    codec = NormalCodec(axes=axes)
    decoded, residual = codec.decode(codec.encode(normals))
    assert 0.37 < angle_deg(decoded, normals).max() <= 0.39
    assert np.abs(np.linalg.norm(decoded, axis=1) - 1).max() < 1e-6
    assert residual.max() < 0.9
    floats, _ = codec.decode((codec.to_teacher(normals) + 1) / 2)
    assert angle_deg(floats, normals).max() < 1e-3


def test_a_wrong_sign_of_x_is_seen():
    # Room-like normals, mostly floor, walls and what faces the camera: right 4 degrees (noise).
    rng = np.random.default_rng(1)
    faces = np.array([[0, 1, 0], [0, 0, 1], [0.5, 0, 0.87], [-0.5, 0, 0.87], [0.17, 0.1, 0.98]])
    truth = faces[rng.integers(0, len(faces), 5000)] + rng.normal(0, 0.03, (5000, 3))
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    answer = truth + rng.normal(0, 0.05, truth.shape)
    picture = NormalCodec(axes="vision-banana").encode(
        answer / np.linalg.norm(answer, axis=1, keepdims=True)
    )
    means = {a: angle_deg(NormalCodec(axes=a).decode(picture)[0], truth).mean() for a in AXES}
    assert means["vision-banana"] == means["lotus"] == means["dsine"] < 6
    assert means["marigold"] == means["ours"] > 25
    assert means["opencv"] > 90


def test_unknown_is_black_and_directionless_grey_is_unknown():
    codec = NormalCodec()
    normals = np.array([[np.nan] * 3, [0, 0, 1], [0, np.nan, 1]], np.float32)
    rgb = codec.encode(normals)
    assert rgb.tolist() == [[0, 0, 0], [128, 128, 255], [0, 0, 0]]
    assert np.isnan(codec.decode(rgb)[0]).all(1).tolist() == [True, False, True]
    grey, residual = codec.decode(np.full((1, 3), 0.5, np.float32))
    assert np.isnan(grey).all() and residual[0] == pytest.approx(127.5)
    assert np.isnan(codec.decode(np.array([[np.nan, 0.5, 1.0]]))[0]).all()
    for byte_grey in ([127, 128, 127], [128, 128, 128]):  # 127.5 does not exist in bytes
        assert np.isnan(codec.decode(np.array([byte_grey], np.uint8))[0]).all()
    assert np.isnan(codec.decode(codec.encode(np.zeros((1, 3))))[0]).all()


def test_residual_is_the_distance_to_the_sphere():
    # (255, 255, 255) is (1, 1, 1), sqrt(3) long: off by 0.732 * 127.5
    rgb = np.array([[255, 255, 255], [128, 128, 255]], np.uint8)
    _, residual = NormalCodec().decode(rgb)
    assert residual.tolist() == pytest.approx([(3**0.5 - 1) * 127.5, 0.0], abs=0.01)
    normals, _ = NormalCodec().decode(rgb, max_residual=50)
    assert np.isnan(normals).all(1).tolist() == [True, False]


def test_json_and_errors():
    codec = NormalCodec(axes="lotus")
    assert NormalCodec.from_json(codec.to_json()) == codec
    with pytest.raises(UsageError, match=r"axes 'dx' unknown, choose one of \['ours'"):
        NormalCodec(axes="dx")
    with pytest.raises(UsageError, match="expected the key axes"):
        NormalCodec.from_json({})
    with pytest.raises(UsageError, match=r"expected floats \[..., 3\], got uint8"):
        codec.encode(np.zeros((4, 3), np.uint8))
