"""Scenes: the truth against closed forms and against a second, independent ray caster."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from teacher.errors import UsageError
from teacher.label import Task, validate
from teacher.scene_layout import KINDS, SPLIT_SEEDS, Scene, View, kind_of_scene, sample_scene
from teacher.scene_materials import (
    OTHER_PATTERNS,
    PATTERNS,
    Material,
    Palette,
    color_name,
    linear,
    texture,
)
from teacher.scene_objects import BUILDERS, CLASS_ID, CLASSES, THINGS, Part

GREY = Material(color=(0.5, 0.5, 0.5))


def renderer():
    pytest.importorskip("mitsuba", reason="needs the extra [scenes]")
    from teacher.scenes import render

    return render


def viewing_rays(view: View, width: int, height: int) -> np.ndarray:
    """World directions of unit z-depth, [H, W, 3], from the angles alone (a turn after a nod)."""
    focal = width / 2 / math.tan(math.radians(view.fov_deg) / 2)
    v, u = np.mgrid[0:height, 0:width]
    x, y = (u - (width - 1) / 2) / focal, -(v - (height - 1) / 2) / focal
    roll, tilt, yaw = np.radians([view.roll_deg, view.tilt_deg, view.yaw_deg])
    x, y = x * np.cos(roll) - y * np.sin(roll), x * np.sin(roll) + y * np.cos(roll)
    y, z = y * np.cos(tilt) + np.sin(tilt), y * np.sin(tilt) - np.cos(tilt)
    return np.stack([x * np.cos(yaw) + z * np.sin(yaw), y, z * np.cos(yaw) - x * np.sin(yaw)], -1)


def hit(part: Part, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """Distance along each ray to the first hit with a solid, inf where it misses."""
    c, s = math.cos(math.radians(part.yaw_deg)), math.sin(math.radians(part.yaw_deg))
    turn = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    o, d = turn @ (origin - part.center), rays @ turn.T
    half = np.array(part.size) / 2
    if part.shape == "roller":  # swap the axes so that y is the axis of the cylinder
        o, d, half = o[[1, 0, 2]], d[..., [1, 0, 2]], half[[1, 0, 2]]
    with np.errstate(divide="ignore", invalid="ignore"):
        if part.shape in ("column", "roller", "sphere"):
            flat = [0, 1, 2] if part.shape == "sphere" else [0, 2]
            a, b = (d[..., flat] ** 2).sum(-1), d[..., flat] @ o[flat]
            root = np.sqrt(b * b - a * (o[flat] @ o[flat] - half[2] ** 2))
            enter, leave = (-b - root) / a, (-b + root) / a
            if part.shape != "sphere":
                t = np.stack([(-half[1] - o[1]) / d[..., 1], (half[1] - o[1]) / d[..., 1]])
                enter, leave = np.maximum(enter, t.min(0)), np.minimum(leave, t.max(0))
        else:
            t = np.stack([(-half - o) / d, (half - o) / d])
            enter, leave = t.min(0).max(-1), t.max(0).min(-1)
    return np.where((enter <= leave) & (enter > 0), enter, np.inf)


def cast(scene: Scene, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """z-depth [m] and index of the part that is seen, -1 for the sky."""
    rays, origin = viewing_rays(scene.view, width, height), np.array(scene.view.position)
    depths = np.stack([hit(part, origin, rays) for part in scene.parts])
    first = depths.argmin(0)
    depth_m = np.take_along_axis(depths, first[None], 0)[0]
    return depth_m, np.where(np.isinf(depth_m), -1, first)


def test_truth_of_a_sphere_on_a_plane_has_its_closed_form():
    view = View(position=(0, 1.5, 0), yaw_deg=0, tilt_deg=0, roll_deg=0, fov_deg=60)
    ball = Part(shape="sphere", center=(0, 1.5, -5), size=(2, 2, 2), material=GREY, label=13,
                instance=1)  # fmt: skip
    ground = Part(shape="sheet", center=(0, 0, 0), size=(400, 0, 400), material=GREY, label=2)
    things = {1: {"class": "ball", "color": (0.5, 0.5, 0.5)}}
    sky = sample_scene(0, split="train").sky
    scene = Scene(seed=1, split="train", kind="open", view=view, parts=[ball, ground],
                  things=things, sky=sky)  # fmt: skip
    label = validate(renderer()(scene, width=81, height=61, samples=1), classes=CLASSES)
    focal = 81 / 2 / math.tan(math.radians(30))
    assert label.camera.fx == pytest.approx(focal) and label.camera.cx == 40
    v, u = np.mgrid[0:61, 0:81]
    x, y = (u - 40) / focal, (v - 30) / focal
    a = 1 + x**2 + y**2  # |t (x, y, 1) - (0, 0, 5)| = 1
    root = 25 - a * 24
    on_ball = root >= 0
    with np.errstate(divide="ignore", invalid="ignore"):
        z_ball, z_ground = (5 - np.sqrt(root)) / a, 1.5 / y
    z_ground[(y <= 0) | (z_ground > 200)] = np.inf
    expected = np.where(on_ball, z_ball, z_ground)
    depth_m = label.values[Task.DEPTH]
    assert (np.isinf(depth_m) == np.isinf(expected)).all()
    finite = np.isfinite(expected)
    assert np.abs(depth_m / np.where(finite, expected, 1) - 1)[finite].max() < 2e-5
    assert (
        label.values[Task.SEMANTIC].tolist()
        == np.where(on_ball, 13, np.where(finite, 2, 0)).tolist()
    )
    assert (label.values[Task.INSTANCES] == on_ball).all()
    normal = label.values[Task.NORMALS]
    outward = np.stack([x * z_ball, -y * z_ball, 5 - z_ball], -1)
    assert np.abs(normal - outward)[on_ball].max() < 1e-4
    assert np.abs(normal[finite & ~on_ball] - [0, 1, 0]).max() < 1e-6
    assert np.isnan(normal[~finite]).all()


@pytest.mark.parametrize("seed", [0, 1, 3, 1_000_004, 2_000_001, 2_000_002])
def test_truth_agrees_with_a_second_ray_caster(seed):
    split = next(name for name, seeds in SPLIT_SEEDS.items() if seed in seeds)
    scene = sample_scene(seed, split=split)
    label = validate(renderer()(scene, width=64, height=48, samples=1), classes=CLASSES)
    depth_m, seen = cast(scene, 64, 48)
    sky = seen < 0
    labels = np.array([part.label for part in scene.parts] + [0])[seen]
    instances = np.array([part.instance for part in scene.parts] + [0])[seen]
    got = label.values[Task.DEPTH]
    off = np.full(depth_m.shape, np.inf)
    both = ~sky & np.isfinite(got)
    off[both] = np.abs(got[both] / depth_m[both] - 1)
    close = np.where(sky, np.isinf(got), off <= 1e-4)
    same = (label.values[Task.SEMANTIC] == labels) & (label.values[Task.INSTANCES] == instances)
    # a ray within float32 of a silhouette may fall to either side, and nothing else may differ
    assert (~close).sum() <= 2 and (~same).sum() <= 4
    normal = label.values[Task.NORMALS]
    rays = label.camera.rays() * [1, -1, -1]
    assert ((normal * rays).sum(-1)[~sky] <= 1e-6).all()


def test_a_seed_gives_the_same_bytes_on_one_and_on_two_threads():
    render = renderer()
    import drjit

    scene = sample_scene(5, split="train")
    before = drjit.thread_count()
    try:
        drjit.set_thread_count(1)
        one = render(scene, width=64, height=48, samples=4)
        drjit.set_thread_count(2)
        again = render(sample_scene(5, split="train"), width=64, height=48, samples=4)
    finally:
        drjit.set_thread_count(before)
    assert one.encoded == again.encoded and one.key == again.key
    for task, values in one.values.items():
        assert values.tobytes() == again.values[task].tobytes(), task
    other = render(sample_scene(6, split="train"), width=64, height=48, samples=4)
    assert other.key != one.key


def test_pictures_are_neither_black_nor_blown_out_and_have_colour():
    render = renderer()
    for seed in (1, 2, 8, 2_000_003):
        split = "train" if seed < 1_000_000 else "shifted"
        image = render(sample_scene(seed, split=split), width=64, height=48, samples=4).image
        light = image.mean(-1)
        assert 50 < light.mean() < 215 and light.std() > 12
        assert (light < 8).mean() < 0.2 and (light > 250).mean() < 0.35
        assert np.ptp(image.astype(int), axis=-1).mean() > 8


def test_row_medians_alone_do_not_solve_the_held_out_scenes():
    def depths(split: str) -> np.ndarray:
        start = SPLIT_SEEDS[split].start
        maps = [cast(sample_scene(start + i, split=split), 24, 18)[0] for i in range(80)]
        stack = np.stack(maps)
        return np.where((stack >= 0.3) & (stack <= 40), stack, np.nan)

    guess = np.nanmedian(depths("train"), axis=(0, 2))[None, :, None]
    for split in ("heldout", "shifted"):
        truth = depths(split)
        ratio = np.maximum(guess / truth, truth / guess)
        known = np.isfinite(truth)
        delta1 = ((ratio < 1.25) & known).sum((1, 2)) / known.sum((1, 2))
        assert 0.15 < delta1.mean() <= 0.45, split


def test_cameras_and_things_keep_their_promised_ranges():
    names: set[str] = set()
    for seed in range(120):
        scene = sample_scene(seed, split="train")
        view = scene.view
        assert 1.2 <= view.position[1] <= 1.8
        assert abs(view.tilt_deg) <= 10 and 55 <= view.fov_deg <= 75
        names |= {thing["class"] for thing in scene.things.values()}
        assert {part.instance for part in scene.parts} - {0} == set(scene.things)
    assert names == set(THINGS)
    assert {sample_scene(seed, split="train").kind for seed in range(20)} == {"room", "open"}


# lowest and highest overall height in metres, from furniture and traffic norms
HEIGHT_M = {"table": (0.7, 0.78), "chair": (0.8, 0.96), "shelf": (1.7, 2.05), "ball": (0.2, 0.7),
            "person": (1.55, 1.9), "car": (1.35, 1.55), "fence": (0.85, 1.2),
            "lamp": (1.4, 1.75), "tree": (2.5, 6.5), "bin": (0.95, 1.15)}  # fmt: skip


@pytest.mark.parametrize("name", sorted(HEIGHT_M))
def test_things_have_their_real_height_and_stand_on_the_ground(name):
    low, high = HEIGHT_M[name]
    for seed in range(20):
        parts = BUILDERS[name](Palette(np.random.default_rng(seed), other=False))
        tops = [part.center[1] + part.size[1] / 2 for part in parts]
        bottoms = [part.center[1] - part.size[1] / 2 for part in parts]
        assert low <= max(tops) <= high
        assert min(bottoms) == pytest.approx(0, abs=0.1)


def test_doors_are_two_metres_high():
    heights = []
    for seed in range(30):
        scene = sample_scene(seed, split="train")
        leaves = [p for p in scene.parts if p.label == CLASS_ID["door"] and p.size[0] > 0.5]
        heights += [p.size[1] for p in leaves if p.size[1] > 0.5]
    assert len(heights) > 20 and 1.98 <= min(heights) and max(heights) <= 2.05


@pytest.mark.parametrize("split", SPLIT_SEEDS)
def test_the_kind_of_a_scene_is_known_from_its_seed(split):
    for seed in SPLIT_SEEDS[split][:20]:
        assert kind_of_scene(seed) == sample_scene(seed, split=split).kind


@pytest.mark.parametrize("kind", KINDS)
def test_scenes_of_one_kind_are_the_next_of_it(kind: str, tmp_path: Path):
    pytest.importorskip("mitsuba", reason="needs the extra [scenes]")
    from teacher.scenes import make_scenes
    from teacher.store import LabelSet

    out = str(tmp_path / kind)
    told = make_scenes(out=out, n=3, seed=7, kind=kind, width=16, height=12, samples=1)["summary"]
    made = LabelSet(out)
    assert made.meta["teacher"]["kind"] == kind
    expected = [s for s in SPLIT_SEEDS["train"][7:60] if kind_of_scene(s) == kind][:3]
    assert sorted(label.provenance["seed"] for label in made) == expected
    assert told.endswith(
        f"3 train {kind} scenes of 16x12 in {out}; the next are from seed={expected[-1] + 1} on"
    )


def test_a_seed_of_another_split_is_refused():
    with pytest.raises(UsageError, match="seed 1000000 does not belong to split 'train'"):
        sample_scene(1_000_000, split="train")
    with pytest.raises(UsageError, match="seed 7 does not belong to split 'heldout'"):
        sample_scene(7, split="heldout")
    with pytest.raises(UsageError, match=r"split is 'test'; expected one of \['heldout'"):
        sample_scene(0, split="test")
    spans = sorted(SPLIT_SEEDS.values(), key=lambda seeds: seeds.start)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(spans))


def test_the_verb_refuses_what_it_cannot_do(tmp_path: Path):
    from teacher.scenes import make_scenes

    with pytest.raises(UsageError, match="seed=999999 with n=2: expected"):
        make_scenes(out=str(tmp_path), n=2, seed=999_999)
    with pytest.raises(UsageError, match="width=0: expected at least 1"):
        make_scenes(out=str(tmp_path), n=2, width=0)
    with pytest.raises(UsageError, match="split is 'val'"):
        make_scenes(out=str(tmp_path), n=2, split="val")
    with pytest.raises(UsageError, match="kind is 'street'; expected all, room or open"):
        make_scenes(out=str(tmp_path), n=2, kind="street")
    with pytest.raises(UsageError, match=r"kind=open, seed=999990: \d such scenes to the end"):
        make_scenes(out=str(tmp_path), n=10, seed=999_990, kind="open")
    assert not list(tmp_path.iterdir())


def test_the_verb_writes_a_label_set_that_verifies_and_resumes(tmp_path: Path):
    renderer()
    from teacher.scenes import make_scenes
    from teacher.store import LabelSet

    job = {"n": 3, "seed": 2, "split": "heldout", "width": 32, "height": 24, "samples": 1}
    first = make_scenes(out=str(tmp_path / "set"), shard_size=2, **job)
    assert first["inputs"] == 3 and first["shards"] == 2 and "3 heldout" in first["summary"]
    stored = LabelSet(tmp_path / "set")
    assert stored.verify() == 3 and stored.classes == CLASSES
    assert stored.meta["teacher"]["name"] == "truth"
    labels = list(stored)
    assert [x.provenance["seed"] for x in labels] == [1_000_002, 1_000_003, 1_000_004]
    for label in labels:
        ids = set(np.unique(label.values[Task.INSTANCES]).tolist()) - {0}
        assert ids == {int(k) for k in label.provenance["instances"]}
        start = "a room" if label.provenance["kind"] == "room" else "open ground"
        assert label.provenance["caption"].startswith(start)
        for number, thing in label.provenance["instances"].items():
            here = label.values[Task.INSTANCES] == int(number)
            assert set(label.values[Task.SEMANTIC][here]) == {CLASS_ID[thing["class"]]}
    assert make_scenes(out=str(tmp_path / "set"), shard_size=2, **job)["already_done"] == 2


def test_textures_are_seamless_pictures_of_their_two_colours():
    for pattern in (*PATTERNS, *OTHER_PATTERNS):
        surface = Material(color=(1, 0, 0), second=(0, 0, 1), pattern=pattern)
        picture = texture(surface)
        assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8
        assert picture[..., 1].max() == 0
        assert (picture == texture(surface)).all()
        assert picture[..., 0].std() > 10, pattern


def test_colours_have_their_names_and_their_linear_values():
    named = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.7, 0.2), "blue": (0.1, 0.2, 0.9),
             "white": (0.95, 0.95, 0.95), "black": (0.05, 0.05, 0.05), "grey": (0.5, 0.5, 0.5),
             "brown": (0.45, 0.3, 0.15), "yellow": (0.9, 0.85, 0.1)}  # fmt: skip
    assert {color_name(color): color for color in named.values()} == named
    assert linear((0.02, 1.0, 0.5)) == pytest.approx([0.001548, 1, 0.21404], abs=1e-5)
