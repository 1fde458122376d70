"""`distill predict`: any aspect and size, metres right, nothing lost silently."""

import json

import numpy as np
import pytest
from export_cases import HEIGHT, WIDTH, make_student, picture
from PIL import Image

from export.pictures import depth_picture, depth_range, normals_picture, share_picture, with_scale
from export.predict import output_name, predict
from teacher.errors import UsageError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return str(make_student(folder / "student.safetensors", tasks=("depth", "normals", "semantic")))


def save(folder, name, image, **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


def test_a_mixed_folder_every_input_is_accounted_for(model, tmp_path):
    photos = tmp_path / "photos"
    save(photos, "wide.jpg", picture(0, 40, 200))
    save(photos, "tall.png", picture(1, 211, 50))
    save(photos, "sub/tall.png", picture(2, HEIGHT, WIDTH))
    save(photos, "cut.jpg", picture(3, 90, 90))
    data = (photos / "cut.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(data[: len(data) // 2])
    (photos / "notes.txt").write_text("no image")
    out = tmp_path / "out"
    result = predict(model=model, images=str(photos), out=str(out), batch=2)
    assert result["answered"] == 3 and result["rejected"] == 1
    assert "1 rejected (first: cut.jpg: truncated" in result["summary"]
    index = json.loads((out / "predictions.json").read_text())
    assert index["complete"] and index["classes"] == {"1": "floor", "3": "wall", "7": "thing"}
    rows = {row["uri"]: row for row in index["rows"]}
    assert list(rows) == ["cut.jpg", "sub/tall.png", "tall.png", "wide.jpg"]
    for uri, size in (("wide.jpg", (40, 200)), ("tall.png", (211, 50)), ("sub/tall.png", (64, 96))):
        row = rows[uri]
        depth_m = np.load(out / row["files"]["depth.npy"], allow_pickle=False)
        normals = np.load(out / row["files"]["normals.npy"], allow_pickle=False)
        ids = np.asarray(Image.open(out / row["files"]["semantic.png"]))
        assert depth_m.shape == size and depth_m.dtype == np.float32 and (depth_m > 0).all()
        assert normals.shape == (*size, 3)
        np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-4)
        assert ids.shape == size and set(np.unique(ids)) <= {1, 3, 7}
        view = np.asarray(Image.open(out / row["files"]["depth.png"]))
        assert view.shape[0] > size[0] and view.shape[1] == size[1]  # the scale is below
        assert row["camera"]["source"] == "assumed"
        for name in row["files"].values():
            assert (out / name).is_file()


def test_metres_do_not_depend_on_the_resize(model, tmp_path):
    """One flat grey wall photographed at two resolutions, focal length in proportion."""
    grey = np.full((HEIGHT, WIDTH, 3), 120, np.uint8)
    depths = {}
    for factor, focal_px in ((1, 80.0), (3, 240.0), (3, 80.0)):
        name = f"{factor}-{focal_px:g}"
        save(tmp_path / name, "wall.png", grey.repeat(factor, 0).repeat(factor, 1))
        out = tmp_path / f"out-{name}"
        predict(model=model, images=str(tmp_path / name), out=str(out), focal_px=focal_px)
        depths[factor, focal_px] = np.load(out / "wall.png.depth.npy")
    small = depths[1, 80.0]
    np.testing.assert_allclose(depths[3, 240.0], small.repeat(3, 0).repeat(3, 1), rtol=1e-5)
    # the same picture through a lens three times as wide shows everything three times as near
    np.testing.assert_allclose(depths[3, 80.0] * 3, depths[3, 240.0], rtol=1e-5)


def test_the_camera_in_the_file_is_used(model, tmp_path):
    image = picture(5, HEIGHT, WIDTH)
    save(tmp_path / "a", "x.png", image)
    exif = Image.Exif()
    exif[274] = 1  # Pillow writes no EXIF block without a tag of its own
    exif.get_ifd(0x8769)[0xA405] = 36  # focal length as on 35 mm film [mm]
    (tmp_path / "b").mkdir()
    Image.fromarray(image).save(tmp_path / "b" / "x.png", exif=exif)
    for name in "ab":
        predict(model=model, images=str(tmp_path / name), out=str(tmp_path / f"out-{name}"))
    rows = [
        json.loads((tmp_path / f"out-{n}" / "predictions.json").read_text())["rows"][0]
        for n in "ab"
    ]
    focal = [row["camera"]["fx"] for row in rows]
    assert [row["camera"]["source"] for row in rows] == ["assumed", "exif"]
    depth = [np.load(tmp_path / f"out-{n}" / "x.png.depth.npy") for n in "ab"]
    np.testing.assert_allclose(depth[1] / depth[0], focal[1] / focal[0], rtol=1e-5)


def test_a_second_run_replaces_and_strangers_are_respected(model, tmp_path):
    save(tmp_path / "in", "x.png", picture(0, 50, 50))
    for _ in range(2):
        predict(model=model, images=str(tmp_path / "in"), out=str(tmp_path / "out"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("x")
    with pytest.raises(UsageError, match=r"found \['thesis\.doc'\] and no predictions\.json"):
        predict(model=model, images=str(tmp_path / "in"), out=str(tmp_path / "mine"))


def test_answers_below_the_images_are_not_answered_again(model, tmp_path):
    save(tmp_path, "x.png", picture(0, 50, 50))
    for _ in range(2):
        result = predict(model=model, images=str(tmp_path), out=str(tmp_path / "out"))
    assert result["answered"] == 1 and result["rejected"] == 0


def test_folders_without_images_and_only_broken_ones(model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no image in this folder"):
        predict(model=model, images=str(tmp_path / "empty"), out=str(tmp_path / "o"))
    with pytest.raises(UsageError, match="no such file or folder"):
        predict(model=model, images=str(tmp_path / "gone"), out=str(tmp_path / "o"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"not a jpeg")
    with pytest.raises(UsageError, match=r"0 of 1 images answered.*no image could be read"):
        predict(model=model, images=str(tmp_path / "bad"), out=str(tmp_path / "o"))
    index = json.loads((tmp_path / "o" / "predictions.json").read_text())
    assert index["rows"][0]["state"] == "rejected" and index["rows"][0]["reason"]


def test_a_refused_model_leaves_no_folder_behind(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"nonsense")
    save(tmp_path / "in", "a.png", picture(0, 60, 90))
    with pytest.raises(UsageError, match="not a readable ONNX model"):
        predict(
            model=str(tmp_path / "broken.onnx"),
            images=str(tmp_path / "in"),
            out=str(tmp_path / "out"),
        )
    assert not (tmp_path / "out").exists()


def test_output_names_stay_inside():
    assert output_name("sub/a.jpg") == "sub/a.jpg"
    for outside in ("/etc/a.jpg", "../a.jpg", "x/../../a.jpg"):
        name = output_name(outside)
        assert name.endswith("-a.jpg") and "/" not in name
    assert output_name("/a/x.jpg") != output_name("/b/x.jpg")


def test_pictures_say_unknown_and_sky():
    depth_m = np.array([[1.0, 10.0, np.nan, np.inf]], np.float32)
    picture_ = depth_picture(depth_m, *depth_range(depth_m))
    assert picture_[0, 2].tolist() == [0, 0, 0] and picture_[0, 3].tolist() == [255] * 3
    red, blue = picture_[0, 0].astype(int), picture_[0, 1].astype(int)
    assert red[0] > red[2] and blue[2] > blue[0]  # near is warm
    facing = np.array([[[0, 0, 1], [np.nan] * 3]], np.float32)
    assert normals_picture(facing)[0].tolist() == [[128, 128, 255], [0, 0, 0]]
    errors = share_picture(np.array([[0.0, np.inf, np.nan]]), 0.5)
    assert errors[0, 0].sum() < 10 and errors[0, 1].sum() > 550 and np.ptp(errors[0, 2]) == 0
    barred = with_scale(picture_.repeat(40, 0).repeat(40, 1), ("1 m", "10 m"), "turbo_r")
    assert barred.shape[0] > 40 and barred.shape[1] == 160
