"""Pairs for tuning: answers decode to the truth, prompts name what is painted, draws repeat."""

import re

import numpy as np
import pytest
import torch
from mini_rooms import room, write_rooms

from distill.tune.adapter import reading_lesson
from distill.tune.look import Look
from distill.tune.pairs import Pairs, colour_table, instance_colours, swap_sides
from distill.tune.readings import framed
from distill.tune.scenes_cache import (
    SKY_CODE,
    Scenes,
    depth_codes,
    depth_of_codes_m,
    load_scenes,
)
from teacher import wordings
from teacher.codecs.depth import DepthCodec
from teacher.errors import UsageError
from teacher.generators.mini_generator import to_pictures
from teacher.generators.mini_text import parse_colour, words
from teacher.label import Task
from teacher.prompts import KINDS


@pytest.fixture(scope="module")
def rooms(tmp_path_factory) -> Scenes:
    path = tmp_path_factory.mktemp("rooms")
    labels = write_rooms(path / "set", n=8, height=32, width=48)
    return load_scenes(labels, cache=str(path / "cache"))


def source(rooms, kind, **more):
    options = {"batch": 4, "prompts_per_image": 1, "colour_map_share": 0.0} | more
    return Pairs(rooms, weights={kind: 1.0}, **options)


def test_the_walk_of_training_is_the_codecs_walk():
    depth_m = np.array([[0.4, 1.0, 2.5, 7.0, 39.0, np.inf, np.nan]], np.float32)
    painted = colour_table("cube-walk")[depth_codes(depth_m)]
    ours = np.rint((painted + 1) * 127.5)
    assert np.abs(ours - DepthCodec().encode(depth_m).astype(float)).max() <= 1


def test_cached_values_are_the_labels_values(rooms):
    label = room(int(rooms.keys[3][4:]), height=32, width=48)
    scale = rooms.focal_px / label.camera.fx
    decoded = DepthCodec().decode(
        to_pictures(
            torch.from_numpy(colour_table("cube-walk")[rooms.depth[3]]).permute(2, 0, 1)[None]
        )
    )[0][0]
    assert np.abs(decoded / (label.values[Task.DEPTH] * scale) - 1).max() < 0.01
    assert np.abs(rooms.normals[3] / 127 - label.values[Task.NORMALS]).max() < 0.01
    assert (rooms.semantic[3] == label.values[Task.SEMANTIC]).all()
    for i in np.unique(rooms.instances[3])[1:]:
        mask = rooms.instances[3] == i
        assert set(label.values[Task.SEMANTIC][mask]) == {rooms.instance_class[3, i]}


def test_several_sets_are_one_lesson_in_their_order(rooms, tmp_path):
    first = write_rooms(tmp_path / "a", n=3, height=32, width=48)
    second = write_rooms(tmp_path / "b", n=2, height=32, width=48, start=3)
    both = load_scenes([first, second], cache=str(tmp_path / "cache"))
    assert both.keys == rooms.keys[:5]
    for name in ("image", "depth", "normals", "semantic", "instances"):
        assert (getattr(both, name) == getattr(rooms, name)[:5]).all(), name
    with pytest.raises(UsageError, match="is in two of them"):
        load_scenes([first, first], cache=str(tmp_path / "cache"))
    with pytest.raises(UsageError, match="at least one label set"):
        load_scenes([], cache=str(tmp_path / "cache"))


def test_halving_averages_pictures_and_picks_labels(rooms):
    small = rooms.halved()
    block = rooms.image[0, 4:6, 10:12].astype(float).mean((0, 1))
    assert np.abs(small.image[0, 2, 5] - block).max() <= 0.5
    assert small.depth[0, 2, 5] == rooms.depth[0, 4, 10]
    assert small.focal_px == rooms.focal_px / 2


def test_the_same_step_gives_the_same_batch_and_another_step_another(rooms):
    pairs = Pairs(rooms, weights={k: 1.0 for k in KINDS[:5]}, batch=8)
    a, b, c = pairs.draw(7), pairs.draw(7), pairs.draw(8)
    assert a.prompts == b.prompts
    for name in ("image", "answer", "noise", "s", "weight", "kinds"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert not torch.equal(a.noise, c.noise)


def test_semantic_answers_use_only_the_prompts_colours(rooms):
    for step in range(12):
        batch = source(rooms, "semantic").draw(step)
        for text, picture, weight in zip(
            batch.prompts, to_pictures(batch.answer), batch.weight[:, 0].numpy(), strict=True
        ):
            named = {parse_colour(w) for w in words(text)} - {None}
            seen = {tuple(int(v) for v in c) for c in np.unique(picture[weight > 0], axis=0)}
            assert seen <= named, text
            assert weight.mean() > 0.3


def test_the_palette_decides_the_colour_of_a_class(rooms):
    """Over many draws the floor's colour takes values all over the cube."""
    colours = []
    for step in range(20):
        batch = source(rooms, "semantic", batch=2).draw(step)
        for text, picture in zip(batch.prompts, to_pictures(batch.answer), strict=True):
            if "floor" in text:
                colours.append(picture[-1, 24])
    spread = np.std(np.array(colours), axis=0)
    assert (spread > 50).all()


def test_instances_are_distinct_and_away_from_the_background():
    masks = np.zeros((3, 24, 32), bool)
    masks[0, 2:8, 2:8], masks[1, 12:20, 4:12], masks[2, 5:15, 20:30] = True, True, True
    rng = np.random.default_rng(0)
    for background in ((0, 0, 0), (255, 255, 255)):
        seen = []
        for _ in range(50):
            colours = instance_colours(masks, mean=rng.normal(size=3), background=background)
            assert ((colours >= 0) & (colours <= 1)).all()
            everything = np.concatenate([colours, np.array([background]) / 255])
            gaps = np.linalg.norm(everything[:, None] - everything[None], axis=-1)
            assert (gaps + 9 * np.eye(4)).min() * 255 > 28  # twice the decoder's tau
            seen.append(colours[0])
        assert (np.std(seen, axis=0)[:2] > 0.1).all(), "a seed does not change the colours"


def test_an_absent_class_is_answered_with_nothing_but_background(rooms):
    pairs = source(rooms, "instances")
    empty = 0
    for step in range(80):
        batch = pairs.draw(step)
        for text, picture, owner in zip(
            batch.prompts, to_pictures(batch.answer), batch.owner.tolist(), strict=True
        ):
            del owner
            flat = len(np.unique(picture.reshape(-1, 3), axis=0)) == 1
            empty += flat
            named = [parse_colour(w) for w in words(text)]
            if flat:
                assert tuple(int(v) for v in picture[0, 0]) in named
    assert empty >= 5


def test_a_mirrored_pair_is_the_truth_of_the_mirrored_image(rooms):
    pairs = source(rooms, "normals")
    rng = np.random.default_rng(0)
    mean = np.zeros(3)
    plain = pairs.pair(2, "normals", Look.whole((32, 48), False), mean, rng)[1]
    mirrored = pairs.pair(2, "normals", Look.whole((32, 48), True), mean, rng)[1]
    known = np.asarray(rooms.normals[2]).any(-1)
    assert known.all()
    assert np.abs(mirrored[:, ::-1] * [-1, 1, 1] - plain).max() < 1e-6
    assert swap_sides("left of the right ball") == "right of the left ball"


@pytest.mark.parametrize("mirror", [False, True])
def test_a_window_is_the_truth_of_the_cropped_image_seen_by_its_own_lens(rooms, mirror):
    """Right half, rows 8 to 24, twice as large: f is doubled, so canonical depth is halved."""
    look = Look((32, 48), top=8, left=24, height=16, width=24, mirror=mirror)
    metres = depth_of_codes_m()
    at = (slice(8, 24), slice(24, 48))
    turned = (slice(None), slice(None, None, -1) if mirror else slice(None))
    seen = metres[look.depth(rooms.depth[1])]
    assert seen[::2, ::2] == pytest.approx(metres[rooms.depth[1]][at][turned] / 2, rel=2e-3)
    assert (seen[::2] == seen[1::2]).all() and (seen[:, ::2] == seen[:, 1::2]).all()
    normals = rooms.normals[1][at][turned] / np.float32(127) * ([-1, 1, 1] if mirror else 1)
    assert look.normals(rooms.normals[1])[::2, ::2] == pytest.approx(normals)
    assert (look.truth(rooms.semantic[1])[1::2, 1::2] == rooms.semantic[1][at][turned]).all()
    image = rooms.image[1][at][turned] / np.float32(255)
    large = look.image(rooms.image[1])
    assert large.shape == (32, 48, 3)
    assert large.reshape(16, 2, 24, 2, 3).mean((1, 3)) == pytest.approx(image, abs=0.12)
    sky = np.full((32, 48), SKY_CODE, np.uint16)
    assert (look.depth(sky) == SKY_CODE).all()


def test_windows_change_what_is_seen_and_asked_but_never_what_a_caption_draws(rooms):
    shares = {"depth": 1.0, "generate": 1.0}
    options = {"batch": 64, "prompts_per_image": 2, "colour_map_share": 0.0}
    plain = Pairs(rooms, weights=shares, **options).draw(1)
    windows = Pairs(rooms, weights=shares, window_share=1.0, **options).draw(1)
    drawn = windows.kinds == KINDS.index("generate")
    assert 16 < drawn.sum() < 48
    # mean depth code of a window is that of nearer things: its lens is longer
    assert windows.log_depth.nanmean() < plain.log_depth.nanmean() - 0.05
    whole = [Look.whole((32, 48), m).image(i) for i in rooms.image for m in (False, True)]

    def likeness(picture):
        seen = ((picture + 1) / 2).permute(1, 2, 0).numpy().ravel()
        return max(np.corrcoef(seen, w.ravel())[0, 1] for w in whole)

    of_captions = [likeness(picture) for picture in windows.answer[drawn]]
    of_windows = [likeness(picture) for picture in windows.image]
    assert min(of_captions) > 0.8 and np.median(of_captions) > np.median(of_windows) + 0.05


def test_generation_pairs_answer_with_the_image_and_see_none(rooms):
    batch = source(rooms, "generate").draw(0)
    assert not batch.has_image.any()
    assert torch.equal(batch.answer, batch.image)
    assert all("room" in text for text in batch.prompts)


def test_a_named_colour_map_is_painted(rooms):
    import matplotlib

    batch = source(rooms, "depth", colour_map_share=1.0).draw(3)
    assert all(any(n in t for n in ("plasma", "viridis", "grey")) for t in batch.prompts)
    for text, picture in zip(batch.prompts, to_pictures(batch.answer), strict=True):
        name = next(n for n in ("plasma", "viridis", "grey") if n in text)
        lut = matplotlib.colormaps[{"grey": "gray"}.get(name, name)](np.linspace(0, 1, 256))
        table = np.rint(lut[:, :3] * 255)
        gap = np.abs(picture.reshape(-1, 1, 3)[::7] - table[None]).max(-1).min(1)
        assert gap.max() <= 3, name


def test_two_readings_are_the_frame_s_two_depths_in_metres(rooms):
    """Light: a flat wall, or the scene at depth / 0.75 behind it. Dark: that, or that x 0.3."""
    metres = depth_of_codes_m()
    image = (rooms.image[0].transpose(2, 0, 1) / 127.5 - 1).astype(np.float32)
    codes = np.asarray(rooms.depth[0])
    shown, (flat, window) = framed(image, codes, style="light")
    assert metres[flat] == pytest.approx(np.ones((32, 48)), rel=1e-3)
    inside = (slice(4, 28), slice(6, 42))
    assert metres[window[4 + 11, 6 + 17]] == pytest.approx(metres[codes[15, 23]] / 0.75, rel=2e-3)
    outside = np.ones((32, 48), bool)
    outside[inside] = False
    assert (window[outside] == flat[outside]).all()
    assert shown[:, 16, 24] == pytest.approx(image[:, 15:18, 23:26].mean((1, 2)), abs=0.3)
    assert shown[:, 0, 0] == pytest.approx([0.2, 0.1, -0.1]) and (shown[:, 3, 24] == 0.75).all()
    shown, (window_again, dolls) = framed(image, codes, style="dark")
    assert (window_again == window).all() and (shown[:, 3, 24] == np.float32(-0.8)).all()
    assert metres[dolls] == pytest.approx(0.3 * metres[window], rel=5e-3)
    sky = np.full_like(codes, SKY_CODE)
    assert (framed(image, sky, style="dark")[1][1][inside] == SKY_CODE).all()


def test_framed_images_are_asked_for_depth_and_answered_with_either_reading(rooms):
    source = Pairs(rooms, weights={"depth": 1, "normals": 1}, batch=64, colour_map_share=0.0,
                   two_readings_share=1.0)  # fmt: skip
    batch = source.draw(0)
    assert (batch.kinds == KINDS.index("depth")).all()
    assert batch.log_depth.isnan().all() and (batch.semantic == 255).all()
    assert not batch.normals.any()
    wall = torch.from_numpy(colour_table("cube-walk")[depth_codes(np.array(1.0))])
    is_flat = (batch.answer - wall[None, :, None, None]).abs().amax((1, 2, 3)) < 1e-5
    assert 4 <= is_flat.sum() <= 30  # a quarter in the mean
    # the first of the readings of a light frame is flat, and the seed's noise chose it
    assert (batch.noise[is_flat, 0].mean((1, 2)) <= 0).all()
    plain = Pairs(rooms, weights={"normals": 1}, batch=8, two_readings_share=1.0).draw(0)
    assert (plain.kinds == KINDS.index("normals")).all()


def test_the_reading_lesson_tells_every_request_from_the_others():
    """Half foreign, half known; a wording that lost no word is one of its kind's."""

    def written_by(wording: str, text: str) -> bool:
        """Whether ``text`` is the wording with something in its slots, an opener before it."""
        parts = [re.escape(part.lower()) for part in re.split(r"\{\w+\}", wording)]
        return re.fullmatch(".*" + ".+?".join(parts), text.lower(), re.DOTALL) is not None

    texts, kinds = reading_lesson(np.random.default_rng(0), 400)
    assert (texts, kinds) == reading_lesson(np.random.default_rng(0), 400)
    names = [KINDS[k] for k in kinds]
    assert names.count("other") == 200 and "generate" not in names
    assert all(names.count(kind) > 25 for kind in KINDS[:4])
    whole = [(t, k) for n, (t, k) in enumerate(zip(texts, names, strict=True)) if n % 4 >= 2]
    assert len(whole) == 200
    for text, kind in whole:
        known = [*wordings.TEMPLATES[kind], *wordings.SENTENCES[kind]]
        assert any(written_by(w.replace("{map}", ""), text) for w in known if "{map}" in w) or any(
            written_by(w, text) for w in known
        ), (kind, text)
    lost = [t for n, t in enumerate(texts) if n % 4 < 2]
    mean = [sum(len(t.split()) for t in part) / 200 for part in (lost, [t for t, _ in whole])]
    assert mean[0] < 0.95 * mean[1]
