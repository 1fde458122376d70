"""The report's files: coded planes read back by hand, order, damage, strange folders."""

import base64
import io
import json
import math
import shutil

import numpy as np
import pytest
from conftest import make_label, write_balls
from PIL import Image

from teacher.errors import UsageError
from teacher.label import Task
from teacher.report import inspect, numeric_columns, worst_first
from teacher.report_planes import WIDE_LEVELS, nearest, planes, scalar, small_size
from teacher.shard_writer import ShardWriter
from teacher.store import DamagedLabelSetError, LabelSet


def values_of(path):
    """The arguments of a data script's one call."""
    text = path.read_text()
    assert text.startswith("report.") and text.endswith(");\n")
    return json.loads(f"[{text[text.index('(') + 1 : -3]}]")


def decoded(uri):
    head, _, data = uri.partition(",")
    assert head.endswith(";base64")
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))))


def read_back(plane):
    """A scalar plane's values, by the words of the module docstring."""
    codes = decoded(plane["src"]).astype(np.int64)
    codes = codes[..., 0] * 256 + codes[..., 1] if plane["wide"] else codes
    t = (codes - 1) / (plane["levels"] - 1)
    low, high = plane["low"], plane["high"]
    values = low * (high / low) ** t if plane["scale"] == "log" else low + t * (high - low)
    return np.where(codes == 0, np.nan, np.where(codes == plane["levels"] + 1, np.inf, values))


def test_depth_in_the_page_is_within_the_stated_error():
    depth_m = np.geomspace(0.3, 90, 4000, dtype=np.float32).reshape(50, 80)
    depth_m[0, :3] = np.nan, np.inf, 90
    plane = scalar(depth_m, scale="log", levels=WIDE_LEVELS)
    back = read_back(plane)
    bound = (plane["high"] / plane["low"]) ** (0.5 / (WIDE_LEVELS - 1)) - 1
    assert bound < 1e-3
    known = np.isfinite(depth_m)
    assert np.abs(back[known] / depth_m[known] - 1).max() <= bound * 1.01
    assert np.isnan(back[0, 0]) and np.isposinf(back[0, 1])


@pytest.mark.parametrize("values", [[np.nan, np.nan], [2.0, 2.0], [np.inf, 3.0], [0.0, 0.0]])
def test_planes_without_a_range(values):
    array = np.array([values], np.float32)
    for scale in ("log", "linear"):
        back = read_back(scalar(array, scale=scale, levels=254) | {"scale": scale})
        known = np.isfinite(array) & ((array > 0) | (scale == "linear"))
        np.testing.assert_allclose(back[known], array[known])
        assert (np.isinf(back) == np.isinf(array)).all()


def test_small_pictures_pick_labels_and_keep_the_shape():
    assert small_size(480, 640, 192) == (144, 192)
    assert small_size(20, 30, 192) == (20, 30)
    label = make_label(1, height=96, width=128)
    label.uncertainty[Task.NORMALS] = np.full((96, 128), 12.5, np.float32)
    found = planes(label, side_px=64)
    small = nearest(label.values[Task.SEMANTIC], 48, 64)
    np.testing.assert_array_equal(decoded(found["semantic"]["src"]), small)
    assert (small == label.values[Task.SEMANTIC][1::2, 1::2]).all()
    assert decoded(found["image"]["src"]).shape == (48, 64, 3)
    normals = decoded(found["normals"]["src"]).astype(float) / 127.5 - 1
    ball = small == 2
    truth = nearest(label.values[Task.NORMALS], 48, 64)
    cosine = (normals * truth).sum(-1) / np.linalg.norm(normals, axis=-1)
    assert np.degrees(np.arccos(np.median(cosine[ball]).clip(-1, 1))) < 6  # a lossy picture
    assert read_back(found["normals_uncertainty"])[0, 0] == pytest.approx(12.5)


def test_worst_first_whatever_worst_means():
    rows = [
        {"key": "a", "depth_coverage": 0.9, "width": 4, "depth_uncertainty": None, "uri": "x"},
        {"key": "b", "depth_coverage": 0.2, "width": 4, "depth_uncertainty": 0.1, "uri": "y"},
        {"key": "c", "depth_coverage": 0.5, "width": 4, "depth_uncertainty": 0.7, "uri": "z"},
    ]
    columns = numeric_columns(rows)
    assert [c["name"] for c in columns] == ["depth_uncertainty", "depth_coverage", "width"]
    ranked, column = worst_first(rows, columns)
    assert column["name"] == "depth_uncertainty"
    assert [r["key"] for r in ranked] == ["c", "b", "a"]  # no number: last
    for row in rows:
        del row["depth_uncertainty"]
    ranked, column = worst_first(rows, numeric_columns(rows))
    assert [r["key"] for r in ranked] == ["b", "c", "a"]


def test_the_page_holds_every_input_once(tmp_path, balls):
    result = inspect(labels=str(balls), out=str(tmp_path / "page"), side_px=48, threads=2)
    assert (result["exit"], result["labelled"]) == (0, 10)
    data = tmp_path / "page" / "data"
    (table, others) = values_of(data / "rows.js")
    labels = LabelSet(balls)
    assert sorted(table["key"]) == sorted(labels.keys) and others == []
    (meta,) = values_of(data / "meta.js")
    assert meta["planes"] == ["image", "depth", "normals", "semantic", "instances"]
    (number, samples) = values_of(data / "part-00000.js")
    assert (number, len(samples)) == (0, 10)
    for key, sample in zip(table["key"], samples, strict=True):
        height, width = small_size(48, 64, 48)
        truth = nearest(labels[key].values[Task.DEPTH], height, width)
        np.testing.assert_allclose(read_back(sample["planes"]["depth"]), truth, rtol=1e-3)
        assert sample["camera"]["width"] == 64
    coverage = table["columns"]["depth_coverage"]
    assert coverage == sorted(coverage)


def test_nothing_in_the_page_comes_from_elsewhere(tmp_path, balls):
    inspect(labels=str(balls), out=str(tmp_path / "page"), side_px=48)
    for path in (tmp_path / "page").glob("*.*"):
        text = path.read_text()
        assert "http://" not in text and "https://" not in text and "innerHTML" not in text
    html = (tmp_path / "page" / "index.html").read_text()
    assert "default-src 'none'" in html


def test_parts_and_rejects(tmp_path):
    folder = write_balls(tmp_path / "set", 36, shard_size=18)
    result = inspect(labels=str(folder), side_px=32)
    names = sorted(p.name for p in (folder / "report" / "data").glob("part*"))
    assert names == ["part-00000.js", "part-00001.js", "part-00002.js"]
    assert len(values_of(folder / "report" / "data" / "part-00002.js")[1]) == 4
    assert LabelSet(folder).verify() == 36  # a report inside the set harms nobody
    assert result["page"].endswith("report/index.html")


def test_a_damaged_sample_is_shown_as_such_and_is_exit_1(tmp_path, balls):
    folder = tmp_path / "set"
    shutil.copytree(balls, folder)
    labels = LabelSet(folder)
    row = labels.rows[5]
    tar = folder / f"shard-{row['shard']:06d}.tar"
    data = bytearray(tar.read_bytes())
    start = data.index(labels.members(row["key"])["depth.png"], row["offset"])
    data[start + 60 : start + 90] = bytes(30)
    tar.write_bytes(data)
    result = inspect(labels=str(folder), side_px=32)
    assert result["exit"] == 1
    assert list(result["damaged"]) == [row["key"]]
    assert "1 cannot be read" in result["summary"]


def test_an_unfinished_set_is_shown_as_far_as_it_is(tmp_path, balls):
    folder = tmp_path / "set"
    shutil.copytree(balls, folder)
    (folder / "shard-000001.json").unlink()
    result = inspect(labels=str(folder), side_px=32)
    assert (result["labelled"], result["exit"]) == (6, 0)
    assert "not complete" in result["summary"]


def test_a_set_in_which_everything_was_rejected(tmp_path):
    about = {"format": "dense-label-set", "version": 1, "plan_hash": "x", "shards": 1}
    (tmp_path / "dataset.json").write_text(json.dumps(about | {"tasks": ["depth"]}))
    with ShardWriter(tmp_path, 0, plan_hash="x") as writer:
        writer.reject("k", uri="a.jpg", reason="HTML")
        writer.commit({})
    result = inspect(labels=str(tmp_path), out=str(tmp_path / "page"))
    assert (result["labelled"], result["rejected"]) == (0, 1)
    (_, others) = values_of(tmp_path / "page" / "data" / "rows.js")
    assert others[0]["reason"] == "HTML"


def test_out_is_new_or_an_earlier_report(tmp_path, balls):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"thesis\.tex.*Choose another out="):
        inspect(labels=str(balls), out=str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    page = tmp_path / "page"
    inspect(labels=str(balls), out=str(page), side_px=32)
    stale = page / "data" / "part-00099.js"
    stale.write_text("old")
    inspect(labels=str(balls), out=str(page), side_px=32)
    assert not stale.exists()
    with pytest.raises(UsageError, match="side_px=4"):
        inspect(labels=str(balls), side_px=4)
    with pytest.raises(UsageError, match="found a file"):
        inspect(labels=str(balls), out=str(tmp_path / "thesis.tex"))


@pytest.mark.parametrize("files", [["data/photo.jpg"], ["data/rows.js", "index.html", "style.css"]])
def test_a_folder_that_only_looks_like_a_report_is_left_alone(tmp_path, balls, files):
    page = tmp_path / "page"
    (page / "data").mkdir(parents=True)
    for name in files:
        (page / name).write_text("mine")
    with pytest.raises(UsageError, match=r"found \['data/.*data/meta\.js tells"):
        inspect(labels=str(balls), out=str(page), side_px=32)
    assert all((page / name).read_text() == "mine" for name in files)


def test_a_stranger_among_the_data_of_a_report_stays_and_a_broken_off_report_is_made_anew(
    tmp_path, balls, monkeypatch
):
    page = tmp_path / "page"
    with monkeypatch.context() as patch:
        patch.setattr("teacher.report.page_rows", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            inspect(labels=str(balls), out=str(page), side_px=32)
    inspect(labels=str(balls), out=str(page), side_px=32)
    (page / "data" / "album").mkdir()
    (page / "data" / "album" / "photo.jpg").write_text("mine")
    with pytest.raises(UsageError, match="data/album"):
        inspect(labels=str(balls), out=str(page), side_px=32)
    assert (page / "data" / "album" / "photo.jpg").read_text() == "mine"


def test_a_damaged_seal_is_named_and_the_rest_of_the_set_is_shown(tmp_path, balls):
    folder = tmp_path / "set"
    shutil.copytree(balls, folder)
    seal = folder / "shard-000001.json"
    seal.write_bytes(seal.read_bytes()[:-30])
    result = inspect(labels=str(folder), side_px=32)
    assert (result["labelled"], result["exit"]) == (6, 1)
    assert "shard-000001.json: not a whole seal" in result["damaged_seals"][0]
    assert "1 shard(s) left out" in result["summary"] and "not complete" in result["summary"]
    (meta,) = values_of(folder / "report" / "data" / "meta.js")
    assert dict(meta["facts"])["damaged seals, left out"] == result["damaged_seals"][0]
    assert (meta["sealed"], meta["shards"]) == (2, 3)
    with pytest.raises(DamagedLabelSetError, match="not a whole seal"):
        LabelSet(folder)


def test_the_bound_in_the_docstring_is_the_closed_form():
    half_step = math.exp(math.log(100) / (WIDE_LEVELS - 1) / 2) - 1
    assert half_step == pytest.approx(100 ** (0.5 / (WIDE_LEVELS - 1)) - 1)
    assert half_step < 6e-4  # what the help text calls a fraction of a percent
