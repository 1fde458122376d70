"""Depth codec: closed forms, the ends of the code, the package hilbertmap, edges, torch."""

import json

import hilbertmap
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from teacher.codecs.curves import hilbert_places
from teacher.codecs.depth import PRESETS, DepthCodec, PlainPower, PowerTransform
from teacher.codecs.differentiable import decode_depth
from teacher.codecs.edges import colour_noise
from teacher.errors import UsageError

NAN, INF = np.nan, np.inf
ALL = [
    DepthCodec(),
    DepthCodec(transform=PowerTransform(lam=-4.0, c=120.0)),
    DepthCodec(transform=PowerTransform(lam=-2.3, c=5.0)),
    DepthCodec(transform=PlainPower(gamma=0.5, near_m=0.2, far_m=60.0)),
    DepthCodec(transform=PlainPower(gamma=-1.0, near_m=0.2, far_m=60.0)),
    *(DepthCodec(curve="hilbert", order=n) for n in (1, 2, 3, 5, 7, 8)),
    DepthCodec(curve="hilbert", order=4, transform=PlainPower(gamma=1.0)),
    PRESETS["plain-hilbert"],
]
names = [f"{c.curve}-{c.order}-{type(c.transform).__name__}" for c in ALL]


def closed_form(transform, depth_m):
    if isinstance(transform, PowerTransform):
        return 1 - (1 - depth_m / (transform.lam * transform.c)) ** (transform.lam + 1)
    low, high = (e**transform.gamma for e in (transform.near_m, transform.far_m))
    return (depth_m**transform.gamma - low) / (high - low)


def test_walk_hits_the_corners_where_the_paper_says():
    # u = k / 7 at d = 10 ((1 - k/7)^-1/2 - 1): red 0.801 m, yellow 1.832, ..., magenta 16.458
    corners_m = np.array([10 * ((1 - k / 7) ** -0.5 - 1) for k in range(1, 7)])
    assert corners_m[[0, 1, 5]] == pytest.approx([0.801, 1.832, 16.458], abs=1e-3)
    red, yellow, green, cyan, blue, magenta = DepthCodec().encode(corners_m).tolist()
    assert [red, yellow, green] == [[255, 0, 0], [255, 255, 0], [0, 255, 0]]
    assert [cyan, blue, magenta] == [[0, 255, 255], [0, 0, 255], [255, 0, 255]]


def test_encode_agrees_with_hilbertmap():
    depth_m = np.exp(np.random.default_rng(0).uniform(np.log(0.05), np.log(99), 100_000))
    ours = DepthCodec().encode(depth_m).astype(int)
    theirs = np.rint(hilbertmap.depth_to_rgb(depth_m) * 255)
    assert np.abs(ours - theirs).max() <= 1
    assert (ours != theirs).mean() < 1e-4  # only exact halves may round differently


def test_decode_agrees_with_hilbertmap_on_any_colour():
    rgb = np.random.default_rng(1).integers(0, 256, (50_000, 3), dtype=np.uint8)
    rgb = rgb[(hilbertmap.project(rgb / 255) * 1785 > 1) & (rgb != 255).all(1)]
    expected_m = np.minimum(hilbertmap.rgb_to_depth(rgb / 255), 100)
    depth_m, _ = DepthCodec(far_m=1e6).decode(rgb, edges="nearest")
    ties = np.abs(np.minimum(depth_m, 100) / expected_m - 1) > 1e-5  # equally near points
    assert ties.mean() < 0.02


@pytest.mark.parametrize("codec", ALL, ids=names)
def test_round_trip_is_within_half_a_code(codec):
    near_m, far_m, *_ = codec.ends()
    depth_m = np.geomspace(max(near_m, 0.3), far_m * 0.95, 20_001).astype(np.float32)
    rgb = codec.encode(depth_m)
    decoded_m, residual = codec.decode(rgb)
    u, v = (closed_form(codec.transform, d.astype(np.float64)) for d in (depth_m, decoded_m))
    steps = np.abs(u - v)[u < 1 - 1 / codec.path.length] * codec.path.length
    float32 = 2e-7 * codec.path.length
    whole = codec.path.step == round(codec.path.step)  # else lattice points fall between bytes
    assert np.quantile(steps, 0.999) <= (0.51 if whole else 1.1) + float32
    assert steps.max() <= (0.51 if codec.curve == "cube-walk" else 1.6) + float32  # beside white
    assert residual.max() <= np.sqrt(0.75)  # bytes beside a lattice that is no multiple of 1
    floats_m, _ = codec.decode(rgb.astype(np.float32) / 255)
    # Beside a lattice that falls between bytes, two edges can be equally near to a byte.
    assert (np.abs(floats_m / decoded_m - 1) > 1e-4).mean() < (1e-9 if whole else 0.005)


@pytest.mark.parametrize("codec", ALL, ids=names)
def test_ends_of_the_code(codec):
    near_m, far_m, *_ = codec.ends()
    depth_m = np.array([NAN, INF, -1, 0, -INF, far_m * 1.01, far_m, near_m * 0.99, 1e30])
    rgb = codec.encode(depth_m)
    black, white = [0, 0, 0], [255, 255, 255]
    assert rgb[[0, 2, 3, 4]].tolist() == [black] * 4
    assert rgb[[1, 5, 8]].tolist() == [white] * 3
    decoded_m, _ = codec.decode(rgb)
    assert np.isnan(decoded_m[[0, 2, 3, 4, 7]]).all()
    assert np.isposinf(decoded_m[[1, 5, 8]]).all()
    assert 0.85 * far_m < decoded_m[6] <= np.float32(far_m)
    assert np.isfinite(codec.decode(codec.encode(np.array([max(near_m, 1e-6)])))[0]).all()
    floats = np.array([[0, 0, 0], [1, 1, 1], [NAN, 0.5, 0.5]])
    decoded_m, residual = codec.decode(floats)
    np.testing.assert_array_equal(decoded_m, [NAN, INF, NAN])
    assert np.isnan(residual[2]) and (residual[:2] < 1e-3).all()


def test_no_known_depth_is_painted_black_or_white():
    for codec in ALL:
        near_m, far_m, *_ = codec.ends()
        depth_m = np.geomspace(max(near_m, 1e-4), far_m, 400_000)
        total = codec.encode(depth_m).astype(int).sum(-1)
        assert 0 < total.min() and total.max() < 765, codec


def test_near_white_on_the_walk_is_sky_beyond_far_m():
    codec = DepthCodec()
    assert codec.far_m == pytest.approx(100) and codec.ends()[3] == pytest.approx(1770.75, abs=0.01)
    rgb = np.array([[255, 240, 255], [255, 241, 255], [250, 252, 249]], np.uint8)
    depth_m, _ = codec.decode(rgb)
    np.testing.assert_array_equal(depth_m, [np.float32(codec.decode(rgb[:1])[0][0]), INF, INF])
    assert depth_m[0] == pytest.approx(10 * ((1 - 1770 / 1785) ** -0.5 - 1), rel=1e-5)


def test_near_m_turns_near_black_into_unknown():
    depth_m, _ = DepthCodec(near_m=0.05).decode(np.array([[17, 2, 1], [18, 0, 2]], np.uint8))
    assert np.isnan(depth_m[0]) and depth_m[1] == pytest.approx(0.0508, abs=1e-4)
    assert DepthCodec(near_m=0.05).encode(np.array([0.049])).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("order", [0, 2, 3, 5, 7, 8])
def test_the_bounds_of_the_range_survive_a_round_trip(order):
    for bound_m in np.random.default_rng(order).uniform(0.3, 60, 300).astype(np.float32).tolist():
        curve = {"curve": "hilbert", "order": order} if order else {}
        first = DepthCodec(**curve, near_m=bound_m)
        last = DepthCodec(**curve, far_m=bound_m)
        at = np.array([bound_m], np.float32)
        near, far = first.decode(first.encode(at))[0][0], last.decode(last.encode(at))[0][0]
        assert near >= bound_m and near == pytest.approx(bound_m, rel=0.02)
        assert far <= bound_m and far == pytest.approx(bound_m, rel=0.02)
    assert np.isnan(first.decode(first.encode(at * 0.9))[0][0])
    assert np.isinf(last.decode(last.encode(at * 1.1))[0][0])
    tiny = DepthCodec(transform=PlainPower(gamma=-1.0), near_m=0.0)  # 0 m has no disparity
    assert np.isnan(tiny.decode(np.zeros((1, 3), np.uint8))[0]).all()


def test_depth_beyond_float32_is_sky_and_below_it_unknown():
    rgb = DepthCodec().encode(np.array([1e300, 1e-320]))
    assert rgb.tolist() == [[255, 255, 255], [0, 0, 0]]


def test_order_8_depth_is_the_closed_form_of_the_place_and_tables_are_read_only():
    codec = DepthCodec(curve="hilbert", order=8)
    rgb = np.random.default_rng(0).integers(0, 256, (3000, 3), dtype=np.uint8)
    bytes_m, _ = codec.decode(rgb)
    expected_m = np.minimum(10 * ((1 - hilbert_places(rgb, order=8) / 16777215) ** -0.5 - 1), 100)
    finite = np.isfinite(bytes_m)
    assert finite.mean() > 0.9
    np.testing.assert_allclose(bytes_m[finite], expected_m[finite], rtol=1e-5)
    with pytest.raises(ValueError, match="read-only"):
        DepthCodec(curve="hilbert", order=2).path.table()[0] = 1


def test_max_residual_turns_colours_off_the_curve_into_nan():
    rgb = np.array([[[128, 0, 0], [128, 30, 40], [128, 30, 41]]], np.uint8)
    for edges in ("snap", "nearest"):
        depth_m, residual = DepthCodec().decode(rgb, max_residual=50, edges=edges)
        np.testing.assert_allclose(residual, [[0, 50, np.hypot(30, 41)]], rtol=1e-6)
        np.testing.assert_array_equal(np.isnan(depth_m), [[False, False, True]])
    lattice = DepthCodec(curve="hilbert", order=1)
    turned = rgb[..., ::-1]  # order 1 starts along blue
    unknown = np.isnan(lattice.decode(turned, max_residual=1.0)[0])
    assert unknown.tolist() == [[False, True, True]]


def test_residual_of_random_colours_on_the_walk_is_86_on_average():
    rgb = np.random.default_rng(0).integers(0, 256, (300_000, 3), dtype=np.uint8)
    assert DepthCodec().decode(rgb)[1].mean() == pytest.approx(86, abs=0.5)


@settings(max_examples=60, deadline=None)
@given(
    arrays(
        np.float32,
        st.tuples(st.integers(0, 9), st.integers(1, 9)),
        elements=st.floats(0.125, 90, width=32) | st.just(float("nan")) | st.just(float("inf")),
    ),
    st.sampled_from(ALL[:1] + ALL[5:8]),
)
def test_any_painted_picture_decodes_to_itself(depth_m, codec):
    rgb = codec.encode(depth_m)
    assert rgb.shape == (*depth_m.shape, 3)
    decoded_m, _ = codec.decode(rgb)  # edges="snap" must not touch colours of the curve
    np.testing.assert_array_equal(np.isnan(decoded_m), np.isnan(depth_m))
    np.testing.assert_array_equal(np.isinf(decoded_m), np.isinf(depth_m))
    known = np.isfinite(depth_m)
    np.testing.assert_allclose(decoded_m[known], depth_m[known], rtol=0.03)


def blended(ratio, sigma, seed=0):
    """Two planes meeting at a disk's rim, whose pixels mix both colours with random weights."""
    rng, codec = np.random.default_rng(seed), DepthCodec()
    y, x = np.mgrid[:96, :96]
    radius = np.hypot(x - 47.5, y - 47.5)
    weight = np.where(np.abs(radius - 30) < 0.8, rng.uniform(0, 1, x.shape), radius < 30)
    near_m, far_m = 2.0 + 0 * x, 2.0 * ratio + 0 * x
    near, far = (codec.encode(d).astype(float) for d in (near_m, far_m))
    rgb = weight[..., None] * near + (1 - weight[..., None]) * far
    rgb = np.clip(np.rint(rgb + rng.normal(0, sigma, rgb.shape)), 0, 255).astype(np.uint8)
    rim = (weight > 0) & (weight < 1)
    return rgb, rim, np.where(weight > 0.5, near_m, far_m)


@pytest.mark.parametrize("sigma", [0, 4])
@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_snap_puts_blended_pixels_on_a_surface(ratio, sigma):
    rgb, rim, truth_m = blended(ratio, sigma)

    def neither(depth_m):
        off = np.minimum(np.abs(np.log(depth_m / 2)), np.abs(np.log(depth_m / 2 / ratio)))
        return (off > np.log(1.1))[rim].mean()

    nearest_m, snapped_m = (DepthCodec().decode(rgb, edges=e)[0] for e in ("nearest", "snap"))
    assert neither(nearest_m) > 0.25
    assert neither(snapped_m) < 0.08
    right = np.abs(np.log(snapped_m / truth_m)) < np.log(1.25)
    assert right[rim].mean() > 0.93
    np.testing.assert_array_equal(snapped_m[~rim], nearest_m[~rim]) if sigma == 0 else None
    floats_m, _ = DepthCodec().decode(rgb.astype(np.float32) / 255)
    # At a corner of the walk bytes are often equally near to two edges; floats hardly ever.
    assert (np.abs(floats_m / snapped_m - 1) > 1e-3).mean() < (1e-3 if sigma == 0 else 0.03)
    pair_m, _ = DepthCodec().decode(np.stack([rgb, rgb[::-1]]))  # a batch is its pictures
    np.testing.assert_array_equal(pair_m[0], snapped_m)


def test_snap_knows_sky_and_unknown_as_surfaces():
    codec = DepthCodec()
    depth_m = np.full((16, 16), 3.0)
    for side, test in ((INF, np.isinf), (NAN, np.isnan)):
        depth_m[:, 8:] = side
        rgb = codec.encode(depth_m).astype(float)
        rgb[:, 8] = 0.3 * rgb[:, 7] + 0.7 * rgb[:, 9]  # mostly the right side
        rgb[:, 7] = 0.7 * rgb[:, 6] + 0.3 * rgb[:, 9]  # mostly the left
        decoded_m, _ = codec.decode(np.rint(rgb).astype(np.uint8))
        assert test(decoded_m[:, 8:]).all()
        np.testing.assert_allclose(decoded_m[:, :8], 3.0, rtol=0.01)


def test_colour_noise_is_read_from_all_columns():
    residual = np.zeros((512, 512), np.float32)
    residual[:, ::64] = 100.0  # a stride of size / 4096 = 64 would see nothing else
    assert colour_noise(residual) == 0


def test_colour_noise_is_read_from_the_residual():
    rng = np.random.default_rng(0)
    depth_m = np.exp(rng.uniform(np.log(0.5), np.log(20), (200, 200)))
    for sigma in (2, 8):
        noisy = DepthCodec().encode(depth_m) + rng.normal(0, sigma, (200, 200, 3))
        rgb = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
        found = colour_noise(DepthCodec().decode(rgb)[1])
        assert found == pytest.approx(sigma, rel=0.15)


TORCH = [c for c in ALL if c.order <= 7]


@pytest.mark.parametrize(
    "codec", TORCH, ids=[n for n, c in zip(names, ALL, strict=True) if c in TORCH]
)
def test_torch_decode_equals_the_kernels(codec):
    rng = np.random.default_rng(3)
    rgb = rng.uniform(-0.1, 1.1, (2, 40, 50, 3))
    painted = codec.encode(np.exp(rng.uniform(np.log(0.3), np.log(200), (40, 50))))
    rgb[0] = painted / 255 + rng.normal(0, 0.004, (40, 50, 3))
    rgb[0, 0, :3] = [[0, 0, 0], [1, 1, 1], [NAN, 0, 0]]
    rgb = rgb.astype(np.float32)
    expected_m, expected_off = codec.decode(rgb, edges="nearest")
    depth_m, residual = decode_depth(torch.from_numpy(rgb).movedim(-1, 1).double(), codec)
    np.testing.assert_allclose(residual, expected_off, rtol=1e-4, atol=1e-3)
    same = np.isclose(depth_m.numpy(), expected_m, rtol=1e-4, equal_nan=True)
    assert same.mean() > 0.999  # equally near points may differ in the last bit
    assert same[0, 0, :3].all()


def test_torch_gradient_is_the_slope_of_depth_along_the_curve():
    # Green to cyan: only B moves. d = 10 ((1 - u)^-1/2 - 1), u = (3 + B) / 7, so dd/dB = 5/7 w^-3/2
    rgb = torch.tensor([0.0, 1.0, 0.4], dtype=torch.float64).reshape(1, 3, 1, 1).requires_grad_()
    depth_m, residual = decode_depth(rgb, DepthCodec())
    depth_m.sum().backward()
    expected = 5 / 7 * (1 - 3.4 / 7) ** -1.5
    assert rgb.grad.flatten().tolist() == pytest.approx([0, 0, expected])
    assert residual.item() == pytest.approx(0)
    off = torch.tensor([0.1, 0.9, 0.4], dtype=torch.float64).reshape(1, 3, 1, 1).requires_grad_()
    decode_depth(off, DepthCodec())[1].sum().backward()
    assert off.grad.flatten().tolist() == pytest.approx([255 * 0.5**0.5, -255 * 0.5**0.5, 0])


def test_torch_gradients_stay_finite_beside_unknown_and_sky():
    rgb = torch.tensor([[0.0, 0, 0], [1, 1, 1], [NAN, 0, 0], [0.5, 0, 0]])
    rgb = rgb.T.reshape(1, 3, 1, 4).clone().requires_grad_()
    depth_m, residual = decode_depth(rgb, DepthCodec())
    assert depth_m.isfinite().flatten().tolist() == [False, False, False, True]
    (depth_m[depth_m.isfinite()].sum() + residual[residual.isfinite()].sum()).backward()
    assert rgb.grad.isfinite().all() and rgb.grad[0, 0, 0, 3] > 0
    with pytest.raises(UsageError, match="order 8 > 7"):
        decode_depth(rgb.detach(), DepthCodec(curve="hilbert", order=8))


@pytest.mark.parametrize("codec", ALL, ids=names)
def test_parameters_survive_json(codec):
    assert DepthCodec.from_json(json.loads(json.dumps(codec.to_json()))) == codec


def test_presets_and_errors():
    assert DepthCodec.preset("vision-banana") == DepthCodec()
    assert DepthCodec.preset("vision-banana-long").far_m == pytest.approx(1894.1, abs=0.1)
    with pytest.raises(UsageError, match=r"there are.*'vision-banana'"):
        DepthCodec.preset("banana")
    with pytest.raises(UsageError, match=r"cannot read.*expected the keys"):
        DepthCodec.from_json({"curve": "cube-walk", "transform": {"kind": "log"}})
    with pytest.raises(UsageError, match="expected the keys"):
        DepthCodec.from_json({**DepthCodec().to_json(), "gamma": 1})
    with pytest.raises(UsageError, match="needs lam < -1 and c > 0"):
        PowerTransform(lam=-1.0)
    with pytest.raises(UsageError, match="gamma must be finite and not 0"):
        PlainPower(gamma=0.0)
    with pytest.raises(UsageError, match="0 < near_m < far_m"):
        PlainPower(near_m=3.0, far_m=2.0)
    with pytest.raises(UsageError, match="0 <= near_m < far_m < inf"):
        DepthCodec(near_m=101.0)
    with pytest.raises(UsageError, match=r"1.0 at full brightness, found a maximum of 255"):
        DepthCodec().decode(np.full((2, 2, 3), 255.0))
    with pytest.raises(UsageError, match="found a minimum of -inf"):
        DepthCodec().decode(np.array([[-INF, 0, 0]]))
    with pytest.raises(UsageError, match="cannot read"):
        DepthCodec.from_json({**DepthCodec().to_json(), "transform": "power"})
    with pytest.raises(UsageError, match="expected uint8 or floats"):
        DepthCodec().decode(np.zeros((2, 2, 3), np.int32))
    with pytest.raises(UsageError, match="must be float metres, got uint16"):
        DepthCodec().encode(np.zeros((2, 2), np.uint16))
    with pytest.raises(UsageError, match=r"curve='hilbert' needs an order, 1..8"):
        DepthCodec(curve="hilbert")
    assert DepthCodec().order == 1 and DepthCodec(order=1) == DepthCodec()
    with pytest.raises(UsageError, match="edges='sharp', choose one of"):
        DepthCodec().decode(np.zeros((2, 2, 3), np.uint8), edges="sharp")
