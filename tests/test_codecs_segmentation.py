"""Palettes and the instance decoder: hand-worked pixels, brute force, drawn scenes with truth."""

import itertools

import numpy as np
import pytest

from teacher.codecs.colours import parse_colour, smallest_distance, spread_colours
from teacher.codecs.segmentation import InstanceCodec, PaletteCodec, merge_passes
from teacher.errors import UsageError

CITYSCAPES = [
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
    (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
    (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
    (0, 80, 100), (0, 0, 230), (119, 11, 32),
]  # fmt: skip


def test_colours_by_tuple_hex_and_name():
    codec = PaletteCodec({"menu": "#80C000", "dessert": "rebecca purple", "rest": (125, 0, 125)})
    assert codec.colours == ((128, 192, 0), (102, 51, 153), (125, 0, 125))
    with pytest.raises(UsageError, match="did you mean lightblue"):
        parse_colour("lihgtblue")
    for bad in ((0, 0, 256), (0, 0), [0, -1, 0]):
        with pytest.raises(UsageError, match="three whole numbers"):
            parse_colour(bad)


def test_palette_decodes_to_the_nearest_colour_by_brute_force():
    codec = PaletteCodec({str(i): c for i, c in enumerate(CITYSCAPES)}, max_distance=40)
    rgb = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    apart = np.linalg.norm(rgb[..., None, :].astype(float) - np.array(CITYSCAPES), axis=-1)
    expected = np.where(apart.min(-1) <= 40, apart.argmin(-1), 255)
    for picture in (rgb, rgb.astype(np.float32) / 255):
        ids, distance = codec.decode(picture)
        assert ids.dtype == np.uint8
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_allclose(distance, apart.min(-1), rtol=1e-5, atol=1e-3)
    assert codec.decode(np.full((1, 3), np.nan))[0].tolist() == [255]


def test_palette_round_trip_with_unknown():
    codec = PaletteCodec.automatic(["a", "b", "c", "d", "e"], fixed={"c": "yellow"})
    ids = np.random.default_rng(0).choice([0, 1, 2, 3, 4, 255], (40, 40)).astype(np.uint8)
    np.testing.assert_array_equal(codec.decode(codec.encode(ids))[0], ids)
    assert codec.colours[2] == (255, 255, 0)
    assert PaletteCodec.from_json(codec.to_json()) == codec
    many = PaletteCodec.automatic([str(i) for i in range(300)], min_distance=10, max_distance=12)
    ids = np.arange(300, dtype=np.uint16)
    decoded, _ = many.decode(many.encode(ids))
    assert decoded.dtype == np.uint16 and (decoded == ids).all()


def test_palette_refuses_neighbours_and_proposes_a_colour():
    with pytest.raises(
        UsageError, match=r"'cat' \(255, 0, 0\) and 'dog' \(250, 5, 5\) are 9 apart"
    ) as e:
        PaletteCodec({"cat": "red", "dog": (250, 5, 5), "sky": "blue"})
    assert "less than 16; give 'dog' another colour, (" in str(e.value)
    with pytest.raises(UsageError, match=r"ids \[7\] are no class of 1; allowed are 0..0 and 255"):
        PaletteCodec({"a": "red"}).encode(np.array([0, 7]))
    with pytest.raises(UsageError, match="leave no colour farther than"):
        PaletteCodec({"a": "red"}, max_distance=500).encode(np.array([255]))


@pytest.mark.parametrize(("n", "best"), [(2, 3**0.5 * 255), (4, 2**0.5 * 255), (8, 255.0)])
def test_automatic_colours_reach_the_known_optima(n, best):
    # the corners of the cube: both ends of a diagonal, a tetrahedron, all eight
    assert smallest_distance(spread_colours(n)) == pytest.approx(best, abs=0.01)
    np.testing.assert_array_equal(spread_colours(n), spread_colours(n))
    assert smallest_distance(spread_colours(19)) > 125


def test_one_more_colour_is_the_farthest_of_all_by_brute_force():
    steps = np.arange(0, 256, 15)
    grid = np.array(list(itertools.product(steps, repeat=3)))
    apart = np.linalg.norm(grid[:, None] - np.array(CITYSCAPES), axis=-1).min(1)
    found = spread_colours(1, keep=CITYSCAPES)
    assert smallest_distance(np.concatenate([found, CITYSCAPES])) <= apart.max()
    assert np.linalg.norm(found - np.array(CITYSCAPES), axis=-1).min() == pytest.approx(apart.max())
    with pytest.raises(UsageError, match="730 colours are too many to be told apart"):
        spread_colours(730)


def scene(objects, size=128, background=0):
    """Ids [H, W] with each (mask function) drawn in order."""
    y, x = np.mgrid[:size, :size]
    ids = np.full((size, size), background, np.uint16)
    for i, inside in enumerate(objects, start=1):
        ids[inside(x, y)] = i
    return ids


def same_partition(found, truth, min_iou):
    for i in np.unique(truth[truth > 0]):
        mine = truth == i
        other = found == np.bincount(found[mine]).argmax()
        if (mine & other).sum() < min_iou * (mine | other).sum() or not found[mine].any():
            return False
    return len(np.unique(found[found > 0])) == len(np.unique(truth[truth > 0]))


DISKS = [
    lambda x, y, c=c: (x - c[0]) ** 2 + (y - c[1]) ** 2 < c[2] ** 2
    for c in [(30, 30, 20), (90, 35, 25), (35, 95, 22), (95, 95, 12), (64, 64, 9)]
]


def test_clean_instances_come_back_exactly():
    ids = scene(DISKS)
    codec = InstanceCodec(background="white")
    found, table = codec.decode(codec.encode(ids))
    np.testing.assert_array_equal(found, relabel(ids))
    assert [row["area_px"] for row in table] == [int((found == r["id"]).sum()) for r in table]
    first = np.argwhere(found == 1)
    assert table[0]["box"] == [*first.min(0)[::-1].tolist(), *first.max(0)[::-1].tolist()]
    assert all(row["score"] == 1.0 for row in table)
    floats, _ = codec.decode(codec.encode(ids).astype(np.float32) / 255)
    np.testing.assert_array_equal(floats, found)


def relabel(ids):
    """1, 2, ... in order of first appearance."""
    _, first = np.unique(ids[ids > 0], return_index=True)
    order = ids[ids > 0][np.sort(first)]
    table = np.zeros(ids.max() + 1, np.uint16)
    table[order] = np.arange(1, len(order) + 1)
    return table[ids]


@pytest.mark.parametrize("sigma", [4, 8])
def test_noise_and_blended_rims(sigma):
    from scipy.ndimage import uniform_filter

    ids, rng = scene(DISKS), np.random.default_rng(0)
    codec = InstanceCodec.for_noise(sigma)
    soft = uniform_filter(codec.encode(ids).astype(float), (3, 3, 0))
    rgb = np.clip(np.rint(soft + rng.normal(0, sigma, soft.shape)), 0, 255).astype(np.uint8)
    found, table = codec.decode(rgb)
    assert same_partition(found, ids, 0.7)  # a rim 1 px wide is half blended: (8 / 9)^2 = 0.79
    assert all(0.3 < row["score"] < 1 for row in table)


def test_a_halo_is_dropped_and_a_thin_object_lives():
    ids = scene([DISKS[0], lambda x, y: (x == 80) & (y > 10)])  # a disk and a pole, 1 px wide
    codec = InstanceCodec()
    rgb = codec.encode(ids)
    y, x = np.mgrid[:128, :128]
    ring = np.abs(np.hypot(x - 30, y - 30) - 20.5) < 0.8
    rgb[ring & (ids == 0)] = (rgb[30, 30] * 0.5).astype(np.uint8)  # half background
    found, table = codec.decode(rgb)
    assert len(table) == 2
    assert (found[11:, 80] == found[60, 80]).all() and found[60, 80] > 0
    assert (found[ring & (ids == 0)] == 0).all()


def test_one_object_behind_another_is_merged_and_far_twins_are_not():
    bar = [lambda x, y: (np.abs(y - 40) < 8) & (x > 10) & (x < 118) & (np.abs(x - 64) > 10)]
    rgb = InstanceCodec().encode(scene(bar))  # one bar, hidden in its middle
    assert len(InstanceCodec().decode(rgb)[1]) == 1
    twins = [lambda x, y: ((x < 12) & (y < 12)) | ((x > 115) & (y > 115))]
    _, table = InstanceCodec().decode(InstanceCodec().encode(scene(twins)))
    assert len(table) == 2  # their common box is far larger than both


@pytest.mark.parametrize("spread", [1.5, 5.0, 1e9])
def test_merging_is_the_closest_allowed_pair_first(spread):
    # Many squares in few, slightly different colours: against the procedure spelt out.
    rng, size = np.random.default_rng(int(spread)), 200
    rgb = np.zeros((size, size, 3), np.uint8)
    boxes = [(8 + 20 * i, 8 + 20 * j) for i in range(9) for j in range(9)]
    base = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200)])
    pieces = []
    for x, y in boxes:
        colour = base[rng.integers(3)] + rng.integers(-5, 6, 3)
        rgb[y : y + 10, x : x + 10] = colour
        pieces.append([[100.0, *(100.0 * colour)], [x, y, x + 9, y + 9]])
    codec = InstanceCodec(max_spread=spread)

    def area(b):
        return (b[2] - b[0] + 1) * (b[3] - b[1] + 1)

    def join(a, b):
        return [min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])]

    while True:
        best = None
        for (s, a), (t, b) in itertools.combinations(pieces, 2):
            means = [np.array(v[1:]) / v[0] for v in (s, t)]
            apart = ((means[0] - means[1]) ** 2).sum()
            fits = area(join(a, b)) <= spread * (area(a) + area(b)) and apart <= codec.tau**2
            if fits and (best is None or apart < best[0]):
                best = apart, [s, a], [t, b]
        if best is None:
            break
        _, (s, a), (t, b) = best
        pieces = [p for p in pieces if p[0] is not s and p[0] is not t]
        pieces.append([[u + v for u, v in zip(s, t, strict=True)], join(a, b)])
    _, table = codec.decode(rgb)
    assert 3 <= len(pieces) < len(boxes)
    assert sorted(row["box"] for row in table) == sorted(b for _, b in pieces)


def test_small_components_go_and_specks_are_filled():
    ids = scene([DISKS[1]])
    rgb = InstanceCodec().encode(ids)
    rgb[35, 90] = (10, 200, 30)  # a speck inside the object
    rgb[100, 20] = (200, 10, 30)  # and one on the background: 1 px < 2e-4 of 128 x 128
    found, table = InstanceCodec().decode(rgb)
    assert len(table) == 1
    np.testing.assert_array_equal(found, ids)


@pytest.mark.parametrize("size", [(64, 64), (1, 1), (3, 200)])
def test_no_instance_is_a_legal_answer(size):
    found, table = InstanceCodec().decode(np.zeros((*size, 3), np.uint8))
    assert found.shape == size and found.dtype == np.uint16 and not found.any() and table == []
    found, table = InstanceCodec().decode(np.full((*size, 3), 200, np.uint8))
    assert (found == 1).all() and table[0]["area_px"] == size[0] * size[1]


def test_passes_are_joined_by_score():
    a, b = np.zeros((2, 10, 10), np.uint16)
    a[:, :6], b[:, 4:], b[0, :2] = 1, 1, 2
    row = {"colour": [0, 0, 0], "box": [0, 0, 9, 9]}
    first = ("cup", a, [{"id": 1, "score": 0.7, "area_px": 60, **row}])
    second = (
        "mug",
        b,
        [
            {"id": 1, "score": 0.9, "area_px": 60, **row},
            {"id": 2, "score": 0.6, "area_px": 2, **row},
        ],
    )
    ids, table = merge_passes([first, second])
    assert [(r["id"], r["class"], r["area_px"]) for r in table] == [(1, "mug", 60), (2, "cup", 40)]
    assert (ids[:, 4:] == 1).all() and (ids[:, :4] == 2).all()  # mug 2 was all under the cup
    assert table[1]["box"] == [0, 0, 3, 9]
    for passes in itertools.permutations([first, second]):
        np.testing.assert_array_equal(merge_passes(list(passes))[0], ids)


def test_instance_errors():
    with pytest.raises(UsageError, match="needs tau > 0"):
        InstanceCodec(tau=0)
    with pytest.raises(UsageError, match="needs erosion_px >= 1 or None"):
        InstanceCodec(erosion_px=0)
    with pytest.raises(UsageError, match="ids are 0 or more, got -1"):
        InstanceCodec().encode(np.array([[-1, 0]]))
    with pytest.raises(UsageError, match="split the picture or lower tau"):
        InstanceCodec(tau=120).encode(np.arange(20).reshape(4, 5))
    with pytest.raises(UsageError, match="needs at least one pass"):
        merge_passes([])
