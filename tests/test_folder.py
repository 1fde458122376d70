"""Labels on disk: each data set in its true layout, written here; jobs with folder and anchors."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from teacher.errors import UsageError
from teacher.generators import Query, load_teacher
from teacher.generators.layouts import LAYOUTS
from teacher.jobs.run import label
from teacher.jobs.sources import open_source
from teacher.label import Answer, Camera, Space, Task
from teacher.store import LabelSet, read_rows

ROOT = Path(__file__).parents[1]
RGBD = ROOT.parent / "shared" / "rgbd"


def photo(path, size=(40, 30), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def deep(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint16)).save(path)


def ramp(size=(40, 30), lowest=1000, step=10):
    """uint16 [h, w]: grows along the row, one hole."""
    values = np.tile(lowest + step * np.arange(size[0]), (size[1], 1))
    values[3, 4] = 0
    return values


def answer_of(layout, root, uri=None):
    """(metres, camera, image names) of one image, as a label job would see it."""
    source = open_source(f"{layout}:{root}")
    names = source.list()
    uri = uri or names[0]
    image = np.asarray(Image.open(root / uri).convert("RGB"))
    height, width = image.shape[:2]
    camera = source.camera(uri) or Camera.assumed(width, height)
    oracle = load_teacher(name="folder", layout=layout, root=str(root))
    found = oracle.answer([Query(key="k", image=image, camera=camera, uri=uri)], [Task.DEPTH])
    assert found[0][Task.DEPTH].space is Space.METRIC
    return found[0][Task.DEPTH].values, camera, names


def check_ramp(depth_m, *, first_m, step_m):
    assert np.isnan(depth_m[3, 4]) and np.isnan(depth_m).sum() == 1
    np.testing.assert_allclose(depth_m[0], first_m + step_m * np.arange(40), rtol=1e-6)


def test_nyu(tmp_path):
    photo(tmp_path / "bathroom" / "rgb_00045.jpg")
    deep(tmp_path / "bathroom" / "sync_depth_00045.png", ramp())
    depth_m, camera, names = answer_of("nyu", tmp_path)
    assert names == ["bathroom/rgb_00045.jpg"]
    check_ramp(depth_m, first_m=1.0, step_m=0.01)
    assert camera.fx == 518.8579 and camera.cy == 253.7362 and camera.source == "known"


def test_the_documented_script_unpacks_nyus_mat_file(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    page = (ROOT / "docs" / "anchors.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (2, 3, 40, 30), dtype=np.uint8)  # HDF5 shows MATLAB transposed
    with h5py.File(tmp_path / "nyu.mat", "w") as file:
        file["images"] = images
        file["depths"] = np.stack([(ramp() / 1000.0).T, 2 + 0 * ramp().T]).astype(np.float32)
        names = [np.array([[ord(c)] for c in name], np.uint16) for name in ("attic", "bath_2")]
        found = [file.create_dataset(f"#refs#/{i}", data=name) for i, name in enumerate(names)]
        file.create_dataset("scenes", (1, 2), dtype=h5py.ref_dtype)[0] = [d.ref for d in found]
    monkeypatch.setattr("sys.argv", ["nyu_mat.py", str(tmp_path / "nyu.mat"), str(tmp_path / "to")])
    exec(compile(code, "nyu_mat.py", "exec"), {"__name__": "__main__"})
    depth_m, _, uris = answer_of("nyu", tmp_path / "to")
    assert uris == ["attic/rgb_00000.png", "bath_2/rgb_00001.png"]
    check_ramp(depth_m, first_m=1.0, step_m=0.01)
    shown = np.asarray(Image.open(tmp_path / "to" / uris[1]))
    np.testing.assert_array_equal(shown, images[1].transpose(2, 1, 0))


@pytest.mark.parametrize("split", ["train", "val", "."])
def test_kitti(tmp_path, split):
    drive = "2011_09_26_drive_0002_sync"
    photo(tmp_path / "2011_09_26" / drive / "image_02" / "data" / "0000000069.png")
    inner = Path(drive) / "proj_depth" / "groundtruth" / "image_02" / "0000000069.png"
    deep(tmp_path / split / inner, ramp(lowest=256, step=128))
    line = "7.215377e+02 0.0 6.095593e+02 4.485728e+01 0.0 7.3e+02 1.728540e+02 2.1e-01 0 0 1 2e-3"
    calibration = f"calib_time: 09-Jan-2012\nP_rect_00: 1 2 3\nP_rect_02: {line}\n"
    (tmp_path / "2011_09_26" / "calib_cam_to_cam.txt").write_text(calibration)
    depth_m, camera, names = answer_of("kitti", tmp_path)
    assert names == [f"2011_09_26/{drive}/image_02/data/0000000069.png"]
    check_ramp(depth_m, first_m=1.0, step_m=0.5)
    assert (camera.fx, camera.fy, camera.cx, camera.cy) == (721.5377, 730, 609.5593, 172.854)


def test_diode(tmp_path):
    scan = tmp_path / "indoors" / "scene_00021" / "scan_00189"
    photo(scan / "00021_00189_indoors_200_010.png")
    metres = (ramp() / 1000.0).astype(np.float32)[..., None]
    np.save(scan / "00021_00189_indoors_200_010_depth.npy", metres)
    mask = np.ones((30, 40))
    mask[9, 9] = 0
    np.save(scan / "00021_00189_indoors_200_010_depth_mask.npy", mask)
    depth_m, camera, _ = answer_of("diode", tmp_path)
    assert np.isnan(depth_m[9, 9]) and np.isnan(depth_m[3, 4]) and np.isnan(depth_m).sum() == 2
    assert depth_m[0, 10] == pytest.approx(1.1)
    assert (camera.fx, camera.fy, camera.cx, camera.cy) == (886.81, 927.06, 512, 384)


def test_hypersim_ray_distance_becomes_depth_to_the_plane(tmp_path):
    h5py = pytest.importorskip("h5py")
    images = tmp_path / "ai_001_001" / "images"
    photo(images / "scene_cam_00_final_preview" / "frame.0007.tonemap.jpg", size=(64, 48))
    folder = images / "scene_cam_00_geometry_hdf5"
    folder.mkdir()
    # a wall 3 m away, facing the camera: its distance grows toward the corners
    focal_px = 886.81 * 64 / 1024
    rows, columns = np.mgrid[:48, :64]
    ray_m = 3 * np.sqrt(((columns - 31.5) ** 2 + (rows - 23.5) ** 2) / focal_px**2 + 1)
    ray_m[5, 6] = np.nan
    with h5py.File(folder / "frame.0007.depth_meters.hdf5", "w") as file:
        file["dataset"] = ray_m.astype(np.float16)
    depth_m, camera, _ = answer_of("hypersim", tmp_path)
    assert np.isnan(depth_m[5, 6]) and np.isnan(depth_m).sum() == 1
    np.testing.assert_allclose(depth_m[~np.isnan(depth_m)], 3, rtol=1e-3)  # float16 on disk
    assert ray_m[0, 0] > 3.6 and camera.fx == pytest.approx(focal_px)


def test_virtual_kitti_2_and_its_sky(tmp_path):
    clone = tmp_path / "Scene01" / "clone"
    photo(clone / "frames" / "rgb" / "Camera_1" / "rgb_00012.jpg")
    values = ramp(lowest=500, step=50)
    values[:2, :3] = 65535
    values[3, 4] = 65534
    deep(clone / "frames" / "depth" / "Camera_1" / "depth_00012.png", values)
    table = (
        "frame cameraID K[0,0] K[1,1] K[0,2] K[1,2]\n12 0 1 1 1 1\n12 1 725.0087 725 620.5 187\n"
    )
    (clone / "intrinsic.txt").write_text(table)
    depth_m, camera, _ = answer_of("vkitti2", tmp_path)
    assert np.isposinf(depth_m[:2, :3]).all() and np.isposinf(depth_m).sum() == 6
    assert depth_m[3, 4] == pytest.approx(655.34) and depth_m[5, 2] == pytest.approx(6.0)
    assert (camera.fx, camera.fy, camera.cx, camera.cy) == (725.0087, 725, 620.5, 187)
    (clone / "intrinsic.txt").write_text(table.replace("12 1", "13 1"))
    with pytest.raises(UsageError, match="no row for frame 12, camera 1"):
        answer_of("vkitti2", tmp_path)


def test_scannet_colour_and_depth_are_two_cameras(tmp_path):
    scan = tmp_path / "scene0000_00"
    photo(scan / "color" / "0.jpg", size=(130, 97))
    # a depth picture whose columns are a known function of the direction: x/z = (u - cx) / fx
    own, colour = (58.0, 57.0, 32.0, 23.5), (117.0, 116.5, 64.8, 48.3)
    deep(scan / "depth" / "0.png", np.tile(1000 + 10 * np.arange(64), (48, 1)))
    (scan / "intrinsic").mkdir()
    for name, (fx, fy, cx, cy) in (("color", colour), ("depth", own)):
        matrix = np.array([[fx, 0, cx, 0], [0, fy, cy, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
        np.savetxt(scan / "intrinsic" / f"intrinsic_{name}.txt", matrix)
    depth_m, camera, _ = answer_of("scannet", tmp_path)
    assert (camera.fx, camera.cy) == (117.0, 48.3)
    for column in (0, 10, 64, 100, 129):
        u = (column - 64.8) / 117.0 * 58.0 + 32.0  # where that direction falls in the depth image
        if u < -0.5 or u > 63.5:
            assert np.isnan(depth_m[50, column])
        else:
            assert abs(depth_m[50, column] - (1 + 0.01 * u)) <= 0.00501


def test_tum_pairs_by_time(tmp_path):
    folder = tmp_path / "rgbd_dataset_freiburg3_office"
    photo(folder / "rgb" / "1341847980.722988.png")
    photo(folder / "rgb" / "1341847990.000000.png", seed=1)
    deep(folder / "depth" / "1341847980.700000.png", ramp() + 77)
    deep(folder / "depth" / "1341847980.730000.png", ramp(lowest=5000, step=500))
    deep(folder / "depth" / "1341847990.030000.png", ramp())
    depth_m, camera, names = answer_of("tum", tmp_path)
    check_ramp(depth_m, first_m=1.0, step_m=0.1)
    assert camera.fx == 535.4
    lone, _, _ = answer_of("tum", tmp_path, uri=names[1])
    assert np.isnan(lone).all()  # 30 ms off


def test_sun_rgbd_turns_its_bits_back(tmp_path):
    room = tmp_path / "kv2" / "kinect2data" / "000002_2014-05-26"
    photo(room / "image" / "0000103.jpg")
    millimetres = ramp(lowest=1000, step=400)  # beyond 8191 all 16 bits are in use
    stored = np.array(
        [[int(f"{v:016b}"[3:] + f"{v:016b}"[:3], 2) for v in row] for row in millimetres]
    )
    deep(room / "depth" / "other-name.png", stored)
    (room / "intrinsics.txt").write_text("529.5 0 365 \n0 529.6 265 \n0 0 1 \n")
    depth_m, camera, _ = answer_of("sunrgbd", tmp_path)
    check_ramp(depth_m, first_m=1.0, step_m=0.4)
    assert (camera.fx, camera.fy, camera.cx, camera.cy) == (529.5, 529.6, 365, 265)


def write_pairs(folder, size=(40, 30)):
    photo(folder / "a.jpg", size=size)
    deep(folder / "a.depth.png", ramp(size=size))
    facts = {"a*": {"units_per_m": 1000, "camera": [50, 50, 19.5, 14.5]}}
    (folder / "pairs.json").write_text(json.dumps(facts))
    return folder


def test_pairs_png_npy_and_points(tmp_path):
    write_pairs(tmp_path)
    photo(tmp_path / "sub" / "b.png", seed=1)
    metres = np.full((30, 40), 2.0, np.float64)
    metres[0, :4] = np.inf, 0, -1, np.nan
    np.save(tmp_path / "sub" / "b.depth.npy", metres)
    photo(tmp_path / "sub" / "c.png", seed=2)
    (tmp_path / "sub" / "c.points.txt").write_text("0 0 1.5\n39 29 4\n10.4 5 3\n10 5 2.5\n7 7 0\n")
    depth_m, camera, names = answer_of("pairs", tmp_path)
    assert names == ["a.jpg", "sub/b.png", "sub/c.png"] and camera.fx == 50
    check_ramp(depth_m, first_m=1.0, step_m=0.01)
    depth_m, camera, _ = answer_of("pairs", tmp_path, uri="sub/b.png")
    assert np.isposinf(depth_m[0, 0]) and np.isnan(depth_m[0, 1:4]).all() and depth_m[9, 9] == 2
    assert camera.source == "assumed"
    depth_m, _, _ = answer_of("pairs", tmp_path, uri="sub/c.png")
    points = {(int(r), int(c)): float(depth_m[r, c]) for r, c in np.argwhere(~np.isnan(depth_m))}
    assert points == {(0, 0): 1.5, (29, 39): 4.0, (5, 10): 2.5}


def test_a_scaled_image_gets_stored_depths_only(tmp_path):
    write_pairs(tmp_path)
    oracle = load_teacher(name="folder", layout="pairs", root=str(tmp_path))
    camera = Camera.assumed(20, 15)
    query = Query(key="k", image=np.zeros((15, 20, 3), np.uint8), camera=camera, uri="a.jpg")
    depth_m = oracle.answer([query], [Task.DEPTH])[0][Task.DEPTH].values
    # pixel i covers stored 2i and 2i + 1, its centre lies between: the later one is taken
    np.testing.assert_allclose(depth_m[0], 1.01 + 0.02 * np.arange(20), rtol=1e-6)
    tall = Query(key="k", image=np.zeros((20, 15, 3), np.uint8), camera=camera, uri="a.jpg")
    answer = oracle.answer([tall], [Task.DEPTH])[0][Task.DEPTH]
    assert np.isnan(answer.values).all() and "depth is 40x30, the image 15x20" in str(answer.extras)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "pairs.json").unlink(), "16-bit depth of unknown unit. Write"),
        (lambda p: (p / "pairs.json").write_text("[1]"), "expected JSON, pattern -> facts"),
        (lambda p: (p / "pairs.json").write_text('{"*": {"unit": 1}}'), r"unknown \['unit'\]"),
        (lambda p: photo(p / "a.depth.png"), "PNG of mode RGB, expected depth as 16-bit grey"),
    ],
)
def test_spoilt_pairs_are_named(tmp_path, spoil, message):
    spoil(write_pairs(tmp_path))
    with pytest.raises(UsageError, match=message):
        answer_of("pairs", tmp_path)


def test_points_outside_the_image_and_wrong_folders(tmp_path):
    photo(tmp_path / "c.png")
    (tmp_path / "c.points.txt").write_text("40 0 1.5\n")
    with pytest.raises(UsageError, match="points outside the image of 40x30"):
        answer_of("pairs", tmp_path)
    with pytest.raises(
        UsageError, match=r"layout='kity': there are \['diode', 'hypersim', 'kitti'"
    ):
        load_teacher(name="folder", layout="kity", root=str(tmp_path))
    with pytest.raises(UsageError, match="no such folder"):
        load_teacher(name="folder", layout="kitti", root=str(tmp_path / "none"))
    with pytest.raises(UsageError, match="no image in this layout"):
        open_source(f"kitti:{tmp_path}")
    with pytest.raises(UsageError, match="no image with depth in the layout 'kitti'"):
        load_teacher(name="folder", layout="kitti", root=str(tmp_path)).describe()


# -- jobs --------------------------------------------------------------------------------------


class WarpTeacher:
    """Answers with the red channel as affine disparity: detail without a scale."""

    tasks = (Task.DEPTH,)

    def __init__(self, *, space="affine disparity", told=False, sign=1.0):
        self.space, self.sign = Space(space), sign
        if told:
            self.spaces = {Task.DEPTH: self.space}

    def describe(self):
        return {"name": "warp", "space": str(self.space), "sign": self.sign}

    def answer(self, queries, tasks):
        answers = []
        for query in queries:
            values = self.sign * query.image[..., 0].astype(np.float32) / 255
            answers.append({Task.DEPTH: Answer(task=Task.DEPTH, space=self.space, values=values)})
        return answers


WARP = {"name": "test_folder:WarpTeacher"}


def run(images, out, teacher, **changes):
    values = yaml.safe_load((ROOT / "conf" / "label.yaml").read_text())
    del values["defaults"]
    given = {"images": str(images), "out": str(out), "tasks": ["depth"], "teacher": teacher}
    return label(**(values | given | changes))


def reddish(folder, n=3):
    """Photos whose red is an affine disparity of the depth beside them: 1/z = 0.8 red + 0.1."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        pixels = rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        depth_m = 1 / (0.8 * pixels[..., 0] / 255.0 + 0.1)
        np.save(folder / f"{i}.depth.npy", depth_m.astype(np.float32))
    return folder


def test_folder_makes_a_truth_set_with_known_cameras(tmp_path):
    (tmp_path / "data").mkdir()
    write_pairs(tmp_path / "data")
    folder = {"name": "folder", "layout": "pairs", "root": str(tmp_path / "data")}
    done = run(tmp_path / "data", tmp_path / "set", folder)
    assert (done["labelled"], done["rejected"]) == (1, 0)  # a.depth.png is no image
    (one,) = LabelSet(tmp_path / "set")
    check_ramp(one.values[Task.DEPTH].astype(np.float64).round(3), first_m=1.0, step_m=0.01)
    assert one.camera.fx == 50 and one.camera.source == "known"
    photo(tmp_path / "data" / "z.jpg", seed=3)
    done = run(tmp_path / "data", tmp_path / "again", folder)
    assert (done["labelled"], done["rejected"]) == (1, 1)
    reasons = [row["reason"] for row in read_rows(tmp_path / "again") if row.get("reason")]
    assert reasons and "no depth file z.depth.png" in reasons[0]


def test_affine_answers_become_metres_with_depth_files_as_anchor(tmp_path):
    photos = reddish(tmp_path / "photos")
    anchor = {"name": "folder", "layout": "pairs", "root": str(photos)}
    done = run(photos, tmp_path / "set", {"name": "test_folder:WarpTeacher"}, anchor=anchor)
    assert (done["labelled"], done["rejected"]) == (3, 0)
    stored = LabelSet(tmp_path / "set")
    assert stored.meta["anchor"]["teacher"]["layout"] == "pairs"
    for one in stored:
        red = one.image[..., 0] / 255.0
        np.testing.assert_allclose(one.values[Task.DEPTH], 1 / (0.8 * red + 0.1), rtol=1e-3)
        kept = one.provenance["alignment"]
        assert kept["anchor"] == "folder" and kept["space"] == "affine disparity"
        assert (kept["a"], kept["b"]) == pytest.approx((0.8, 0.1), rel=1e-4)
        assert kept["points"] == 1200 and len(kept["covariance"]) == 3
        assert Task.DEPTH in one.uncertainty
    rows = [row for row in stored.rows if row["state"] == "labelled"]
    assert all(row["alignment_residual"] < 1e-3 for row in rows)
    with pytest.raises(UsageError, match="another job's label set"):  # the anchor is in the plan
        align = {"method": "truncated-l1", "max_residual": 0.1}
        teacher = {"name": "test_folder:WarpTeacher"}
        run(photos, tmp_path / "set", teacher, anchor=anchor, align=align)


def test_two_workers_align_as_one_does(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    photos = reddish(tmp_path / "photos", n=4)
    anchor = {"name": "folder", "layout": "pairs", "root": str(photos)}
    teacher = {"name": "test_folder:WarpTeacher"}
    for workers in (1, 2):
        out = tmp_path / f"set{workers}"
        run(photos, out, teacher, anchor=anchor, workers=workers, shard_size=2)
    for name in ("shard-000000.tar", "shard-000001.tar"):
        assert (tmp_path / "set1" / name).read_bytes() == (tmp_path / "set2" / name).read_bytes()


def test_images_that_do_not_fit_their_anchor_are_rejected(tmp_path):
    photos = reddish(tmp_path / "photos", n=4)
    rng = np.random.default_rng(1)
    np.save(photos / "0.depth.npy", rng.uniform(1, 20, (30, 40)).astype(np.float32))
    np.save(photos / "1.depth.npy", np.full((30, 40), 2, np.float32))
    (photos / "2.depth.npy").unlink()
    anchor = {"name": "folder", "layout": "pairs", "root": str(photos)}
    done = run(photos, tmp_path / "set", {"name": "test_folder:WarpTeacher"}, anchor=anchor)
    assert (done["labelled"], done["rejected"]) == (1, 3)
    why = {row["uri"]: row.get("reason") for row in read_rows(tmp_path / "set")}
    assert "is above align.max_residual=0.1" in why["0.png"] or "negative scale" in why["0.png"]
    assert "anchor is flat" in why["1.png"] and "no depth file 2.depth.png" in why["2.png"]
    assert why["3.png"] is None


def test_a_known_range_is_an_anchor_without_residual(tmp_path):
    photos = reddish(tmp_path / "photos", n=1)
    anchor = {"name": "range", "near_m": 1.0, "far_m": 10.0}
    run(photos, tmp_path / "set", {"name": "test_folder:WarpTeacher"}, anchor=anchor)
    (one,) = LabelSet(tmp_path / "set")
    low, high = np.nanquantile(one.values[Task.DEPTH], [0.02, 0.98])
    assert (low, high) == pytest.approx((1, 10), rel=0.02)
    assert one.provenance["alignment"]["residual"] is None
    assert Task.DEPTH not in one.uncertainty


def test_a_job_that_cannot_know_metres_refuses_to_start_and_lists_the_anchors(tmp_path):
    photos = reddish(tmp_path / "photos", n=1)
    anchors = r"anchor=folder.*anchor=truth.*anchor=range.*anchor=depth_pro.*anchor=depth_anything"
    with pytest.raises(UsageError, match=rf"affine disparity.*metric anchor.*{anchors}"):
        run(photos, tmp_path / "set", {"name": "test_folder:WarpTeacher", "told": True})
    assert not (tmp_path / "set").exists()
    with pytest.raises(UsageError, match=rf"affine disparity.*{anchors}"):
        run(photos, tmp_path / "set", {"name": "test_folder:WarpTeacher"})
    folder = {"name": "folder", "layout": "pairs", "root": str(photos)}
    with pytest.raises(UsageError, match="in metres already"):
        run(photos, tmp_path / "no", folder, anchor=folder)
    warp = {"name": "test_folder:WarpTeacher"}
    with pytest.raises(UsageError, match="an anchor must answer in metres"):
        run(photos, tmp_path / "no", warp, anchor=warp)
    with pytest.raises(UsageError, match="'affine disparity', and an anchor must answer in metr"):
        run(photos, tmp_path / "early", warp, anchor=warp | {"told": True})
    assert not (tmp_path / "early").exists()  # an anchor that tells its space is refused at once
    with pytest.raises(UsageError, match=r"anchor.name='marigold' gives no metres"):
        run(photos, tmp_path / "no2", warp, anchor={"name": "marigold"})
    with pytest.raises(UsageError, match="expected 0 < near_m < far_m"):
        run(photos, tmp_path / "no2", warp, anchor={"name": "range", "near_m": 3, "far_m": 2})
    with pytest.raises(UsageError, match=r"align.method='magic'"):
        align = {"method": "magic", "max_residual": 0.1}
        run(photos, tmp_path / "no2", warp, anchor=folder, align=align)


class FocalTeacher:
    """A metric model that estimates the focal length, as Depth Pro does."""

    tasks = (Task.DEPTH,)

    def __init__(self, *, always=False):
        self.always = always

    def describe(self):
        return {"name": "focal", "always": self.always}

    def answer(self, queries, tasks):
        def one(query):
            depth_m = np.full(query.image.shape[:2], 2.0, np.float32)
            known = query.camera.source != "assumed" and not self.always
            focal_px = query.camera.fx if known else 77.0
            about = {"focal_px": focal_px, "focal_source": "camera" if known else "model"}
            return Answer(task=Task.DEPTH, space=Space.METRIC, values=depth_m, extras=about)

        return [{Task.DEPTH: one(query)} for query in queries]


def test_known_and_estimated_cameras_reach_the_label(tmp_path):
    (tmp_path / "data").mkdir()
    write_pairs(tmp_path / "data")
    photo(tmp_path / "data" / "b.jpg", seed=4)
    for always in (False, True):
        teacher = {"name": "test_folder:FocalTeacher", "always": always}
        run(f"pairs:{tmp_path / 'data'}", tmp_path / f"set{always}", teacher)
        stored = LabelSet(tmp_path / f"set{always}")
        cameras = {row["uri"]: stored.camera(row["key"]) for row in stored.rows}
        assert (cameras["a.jpg"].source, cameras["a.jpg"].fx) == ("known", 50)
        assert (cameras["b.jpg"].source, cameras["b.jpg"].fx) == ("estimated", 77)
        assert cameras["b.jpg"].cx == 19.5


def test_every_anchor_and_layout_is_reachable_from_the_command(tmp_path):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        for name in ("folder", "truth", "depth_pro", "depth_anything", "range", "none"):
            given = ["teacher=lotus", f"anchor={name}", f"images={tmp_path}", "out=x"]
            values = compose("label", given)
            assert values.anchor.name == (None if name == "none" else name)
        values = compose(
            "label", ["teacher=folder", "teacher.layout=tum", "images=/data/x", "out=y"]
        )
        assert values.teacher.root == "/data/x" and values.teacher.layout in LAYOUTS


def test_the_terms_of_a_data_set_travel_and_can_be_refused(tmp_path):
    frames = tmp_path / "Scene01" / "clone" / "frames"
    photo(frames / "rgb" / "Camera_0" / "rgb_00001.jpg")
    deep(frames / "depth" / "Camera_0" / "depth_00001.png", ramp())
    anchor = {"name": "folder", "layout": "vkitti2", "root": str(tmp_path)}
    licence = {"images": "CC0-1.0", "refuse": ["non-commercial"]}
    for options in ({"teacher": anchor}, {"teacher": WARP, "anchor": anchor}):
        with pytest.raises(UsageError, match=r"vkitti2"):
            run(tmp_path, tmp_path / "set", licence=licence, **options)


FACTS = {
    "redwood_*": {"units_per_m": 1000, "camera": [525, 525, 319.5, 239.5]},
    "nyu_*": {"units_per_m": 1000, "camera": [518.858, 519.47, 325.582, 253.736]},
    "tum_*": {"units_per_m": 5000, "camera": [520.9, 521, 325.1, 249.7]},
    "kitti_*": {"units_per_m": 256, "camera": [707.049, 707.049, 604.081, 180.507]},
}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A truth set of the six real pairs, longer side 320 px, and the folder they lie in."""
    if not RGBD.is_dir():
        pytest.skip("no ../shared/rgbd on this machine")
    root = tmp_path_factory.mktemp("real")
    (root / "data").mkdir()
    for path in RGBD.glob("*.*g"):
        shutil.copyfile(path, root / "data" / path.name)
    (root / "data" / "pairs.json").write_text(json.dumps(FACTS))
    folder = {"name": "folder", "layout": "pairs", "root": str(root / "data")}
    done = run(root / "data", root / "truth", folder, max_side=320)
    assert (done["labelled"], done["rejected"]) == (6, 0)
    return root


def test_real_pairs_become_a_truth_set(real):
    truth = LabelSet(real / "truth")
    rows = {row["uri"]: row for row in truth.rows}
    assert 0.1 < rows["kitti_050.png"]["depth_coverage"] < 0.3
    assert 5 < rows["kitti_050.png"]["depth_m_p50"] < 30
    assert all(0.5 < rows[name]["depth_m_p50"] < 6 for name in rows if "kitti" not in name)
    assert {truth.camera(key).source for key in truth.keys} == {"known"}
    camera = truth.camera(rows["kitti_050.png"]["key"])
    assert camera.width == 320 and camera.fx == pytest.approx(707.049 * 320 / 1242)


class SensorTeacher:
    """The sensor's own disparity, bent by a smooth 3 % error and stripped of scale and shift."""

    tasks = (Task.DEPTH,)

    def __init__(self, *, root):
        self.sensor = load_teacher(name="folder", layout="pairs", root=root)

    def describe(self):
        return {"name": "sensor"}

    def answer(self, queries, tasks):
        answers = self.sensor.answer(queries, tasks)
        for one in answers:
            depth_m = one[Task.DEPTH].values
            rows, columns = np.indices(depth_m.shape) / 40
            bent = (1 + 0.03 * np.sin(rows) * np.cos(columns)) / depth_m
            values = (bent.astype(np.float32) - 0.05) / 3
            space = Space.AFFINE_DISPARITY
            one[Task.DEPTH] = Answer(task=Task.DEPTH, space=space, values=values)
        return answers


def test_detail_from_an_affine_teacher_and_scale_from_sensor_points(real, tmp_path):
    """300 sensor points per image, 40 % of them wrong, make the real images metric again."""
    rng = np.random.default_rng(0)
    photos = tmp_path / "photos"
    photos.mkdir()
    oracle = load_teacher(name="folder", layout="pairs", root=str(real / "data"))
    for name in open_source(f"pairs:{real / 'data'}").list():
        shutil.copyfile(real / "data" / name, photos / name)
        image = np.asarray(Image.open(photos / name).convert("RGB"))
        camera = Camera.assumed(image.shape[1], image.shape[0])
        query = Query(key="k", image=image, camera=camera, uri=name)
        depth_m = oracle.answer([query], [Task.DEPTH])[0][Task.DEPTH].values
        known = np.argwhere(np.isfinite(depth_m))
        rows, columns = known[rng.choice(len(known), 300, replace=False)].T
        z = depth_m[rows, columns].astype(np.float64)
        z[:120] *= rng.uniform(0.3, 3, 120)
        np.savetxt(photos / f"{Path(name).stem}.points.txt", np.stack([columns, rows, z], 1))
    anchor = {"name": "folder", "layout": "pairs", "root": str(photos)}
    teacher = {"name": "test_folder:SensorTeacher", "root": str(real / "data")}
    align = {"method": "ransac", "max_residual": 0.2}
    run(photos, tmp_path / "set", teacher, anchor=anchor, align=align, max_side=320)
    truth, stored = LabelSet(real / "truth"), LabelSet(tmp_path / "set")
    assert len(stored) == 6
    for one in stored:
        sensor_m = truth[one.key].values[Task.DEPTH]
        off = np.abs(one.values[Task.DEPTH] / sensor_m - 1)
        assert np.nanmean(off) < 0.04  # the bend itself is 1.2 % on average
