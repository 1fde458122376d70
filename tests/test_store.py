"""Label sets: stated precision, determinism, seals, damage, and a foreign WebDataset reader."""

import io
import json
import math
import shutil
import tarfile
import warnings

import numpy as np
import pytest
from conftest import make_label, write_balls
from PIL import Image

from teacher import shards
from teacher.codecs.planes import RANGES, decode_plane, encode_plane
from teacher.errors import UsageError
from teacher.jobs.commit import create_exclusive, publish, temporary_beside
from teacher.label import LabelError, Task, validate
from teacher.shard_writer import ShardWriter
from teacher.store import DamagedLabelSetError, LabelSet, read_rows, write_index, write_label_set


def test_depth_plane_keeps_the_promised_precision_over_the_whole_range():
    depth_m = np.geomspace(0.05, 2000, 65536 * 2, dtype=np.float32).reshape(256, -1)
    back = decode_plane("depth", encode_plane("depth", depth_m))
    worst = np.abs(back / depth_m.astype(np.float64) - 1).max()
    half_step = math.exp(math.log(2000 / 0.05) / 65533 / 2) - 1  # closed form: 8.09e-5
    assert half_step < 8.1e-5
    assert worst == pytest.approx(half_step, rel=0.02)
    assert math.log2(65534) > 14  # at least 14 significant bits


def test_depth_plane_codes_are_those_of_the_format():
    depth_m = np.array([[np.nan, np.inf, 0.05, 2000.0, 10.0]], np.float32)
    data = encode_plane("depth", depth_m)
    codes = np.array(Image.open(io.BytesIO(data)))
    by_hand = 1 + round(math.log(10 / 0.05) / math.log(2000 / 0.05) * 65533)
    assert codes.tolist() == [[0, 65535, 1, 65534, by_hand]]
    text = Image.open(io.BytesIO(data)).text
    assert (text["low"], text["high"], text["scale"]) == ("0.05", "2000.0", "log")


def test_depth_outside_the_standard_range_widens_it_instead_of_being_clamped():
    depth_m = np.array([[0.001, 1.0, 9000.0]], np.float32)
    back = decode_plane("depth", encode_plane("depth", depth_m))
    np.testing.assert_allclose(back, depth_m, rtol=2e-4)


def test_normals_plane_is_within_0_39_degrees_and_keeps_unknown():
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(200, 200, 3)).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals[0] = np.nan
    back = decode_plane("normals", encode_plane("normals", normals))
    cosine = (normals[1:].astype(np.float64) * back[1:]).sum(-1)
    assert np.degrees(np.arccos(cosine.clip(-1, 1))).max() <= 0.39
    assert np.isnan(back[0]).all()


@pytest.mark.parametrize("name", [n for n in RANGES if n != "depth"])
def test_uncertainty_and_confidence_planes(name):
    low, high, scale = RANGES[name]
    values = np.array([[np.nan, low, high, (low + high) / 3]], np.float32)
    back = decode_plane(name, encode_plane(name, values))
    tolerance = (high - low) / 65533 if scale == "linear" else 2e-4 * values[0, 3]
    np.testing.assert_allclose(back, values, atol=tolerance)


def test_a_label_comes_back_in_the_units_it_went_in(tmp_path):
    labels = [make_label(i) for i in range(5)]
    for label in labels:
        label.uncertainty[Task.DEPTH] = np.full(label.image.shape[:2], 0.07, np.float32)
        label.confidence[Task.DEPTH] = np.full(label.image.shape[:2], 0.5, np.float32)
        label.pictures[Task.DEPTH] = label.image
    with ShardWriter(tmp_path, 0, plan_hash="x") as writer:
        for label in labels:
            writer.add(label)
        assert writer.commit({"host": "h"})
    (tmp_path / "dataset.json").write_text(
        json.dumps(
            {"format": "dense-label-set", "version": 1, "plan_hash": "x", "shards": 1, "tasks": []}
        )
    )
    stored = LabelSet(tmp_path)
    assert stored.verify() == 5
    for label in labels:
        back = validate(stored[label.key])
        np.testing.assert_array_equal(back.image, label.image)
        np.testing.assert_allclose(back.values[Task.DEPTH], label.values[Task.DEPTH], rtol=1e-4)
        for task in (Task.SEMANTIC, Task.INSTANCES):
            np.testing.assert_array_equal(back.values[task], label.values[task])
        assert back.camera == label.camera
        np.testing.assert_allclose(back.uncertainty[Task.DEPTH], 0.07, rtol=2e-4)
        np.testing.assert_allclose(back.confidence[Task.DEPTH], 0.5, atol=1e-5)
        np.testing.assert_array_equal(back.pictures[Task.DEPTH], label.image)


def test_a_lesson_decodes_what_it_teaches_and_no_more(tmp_path, monkeypatch):
    label = make_label(1)
    label.uncertainty[Task.DEPTH] = np.full(label.image.shape[:2], 0.07, np.float32)
    label.confidence[Task.DEPTH] = np.full(label.image.shape[:2], 0.5, np.float32)
    label.pictures[Task.DEPTH] = label.image
    about = {"tasks": [str(t) for t in label.values]}
    write_label_set(tmp_path / "set", n=1, make=lambda i: label, dataset=about)
    stored = LabelSet(tmp_path / "set")
    decoded, real = [], shards.decode_plane
    monkeypatch.setattr(
        shards, "decode_plane", lambda name, data: decoded.append(str(name)) or real(name, data)
    )
    taught = stored.lesson(label.key, ("depth",))
    assert decoded == ["depth", "depth uncertainty"]
    assert set(taught.values) == set(taught.uncertainty) == {Task.DEPTH}
    assert not taught.confidence and not taught.pictures
    whole = stored[label.key]
    np.testing.assert_array_equal(taught.image, whole.image)
    np.testing.assert_array_equal(taught.values[Task.DEPTH], whole.values[Task.DEPTH])
    np.testing.assert_array_equal(taught.uncertainty[Task.DEPTH], whole.uncertainty[Task.DEPTH])
    assert (taught.camera, taught.provenance) == (whole.camera, whole.provenance)
    assert set(stored.lesson(label.key, ("semantic",)).values) == {Task.SEMANTIC}


def test_same_plan_gives_byte_identical_shards(tmp_path, balls):
    again = write_balls(tmp_path / "again", 10)
    for tar in balls.glob("*.tar"):
        assert (again / tar.name).read_bytes() == tar.read_bytes()
    assert len(list(balls.glob("*.tar"))) == 3


def test_nothing_of_this_machine_stands_in_a_shard(balls):
    with tarfile.open(balls / "shard-000000.tar") as tar:
        for info in tar:
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")


def test_an_interrupted_set_is_finished_by_the_same_call_and_no_other(tmp_path, balls):
    part = tmp_path / "part"
    shutil.copytree(balls, part)
    (part / "shard-000001.tar").unlink()
    (part / "shard-000001.json").unlink()
    with pytest.raises(DamagedLabelSetError, match=r"shard-000001: not sealed"):
        LabelSet(part).verify()
    untouched = (part / "shard-000002.tar").stat().st_mtime_ns
    write_balls(part, 10)
    assert LabelSet(part).verify() == 10
    assert (part / "shard-000002.tar").stat().st_mtime_ns == untouched
    assert (part / "shard-000001.tar").read_bytes() == (balls / "shard-000001.tar").read_bytes()
    with pytest.raises(UsageError, match=r"another job's label set .*first"):
        write_balls(part, 10, first=5)


def test_an_exception_leaves_no_shard_and_no_temporary_file(tmp_path):
    def make(i):
        if i == 6:
            raise RuntimeError("teacher died")
        return make_label(i)

    from teacher.store import write_label_set

    with pytest.raises(RuntimeError, match="teacher died"):
        write_label_set(tmp_path, n=8, make=make, dataset={"tasks": ["depth"]}, shard_size=4)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["dataset.json", "shard-000000.json", "shard-000000.tar"]


def test_a_shard_named_but_not_sealed_is_adopted_not_replaced(tmp_path, balls):
    """A worker died between naming the tar and sealing it; the next one seals the same bytes."""
    part = tmp_path / "part"
    shutil.copytree(balls, part)
    (part / "shard-000001.json").unlink()
    inode = (part / "shard-000001.tar").stat().st_ino
    write_balls(part, 10)
    assert (part / "shard-000001.tar").stat().st_ino == inode
    assert LabelSet(part).verify() == 10
    assert read_rows(part) == read_rows(balls)


def test_a_foreign_unsealed_shard_of_the_same_plan_is_described_by_its_own_content(tmp_path):
    """On a GPU two workers' bytes may differ; the tar that has the name is the one that counts."""
    first, second = make_label(1), make_label(2)
    with ShardWriter(tmp_path, 0, plan_hash="x") as writer:
        writer.add(first, uri="a")
        writer.reject(second.key, uri="b", reason="no depth")
        writer.commit({})
    (tmp_path / "shard-000000.json").unlink()
    with ShardWriter(tmp_path, 0, plan_hash="x") as writer:
        writer.add(first, uri="a")
        writer.add(second, uri="b")
        assert writer.commit({})
    rows = read_rows(tmp_path)
    assert [(r["uri"], r["state"]) for r in rows] == [("a", "labelled"), ("b", "rejected")]
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        last = tar.getmembers()[-1]
    assert rows[0]["offset"] + rows[0]["size"] == last.offset_data + 512 * -(-last.size // 512)


def test_publish_never_overwrites(tmp_path):
    final = tmp_path / "shard.tar"
    final.write_bytes(b"first")
    late = temporary_beside(final)
    late.write_bytes(b"late")
    assert publish(late, final) is False
    late.unlink()
    assert final.read_bytes() == b"first"
    assert create_exclusive(final, b"other") is False
    assert [p.name for p in tmp_path.iterdir()] == ["shard.tar"]


@pytest.mark.parametrize("damage", ["flip", "delete", "truncate", "grow"])
def test_damage_of_one_byte_names_the_shard(tmp_path, balls, damage):
    copy = tmp_path / "copy"
    shutil.copytree(balls, copy)
    tar = copy / "shard-000002.tar"
    data = bytearray(tar.read_bytes())
    rng = np.random.default_rng(7)
    if damage == "flip":
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    elif damage == "delete":
        del data[rng.integers(len(data))]
    elif damage == "truncate":
        del data[-1]
    else:
        data += b"\0"
    tar.write_bytes(data)
    problems = LabelSet(copy).problems()
    assert len(problems) == 1
    assert "shard-000002.tar" in problems[0]
    with pytest.raises(DamagedLabelSetError, match=r"shard-000002\.tar"):
        LabelSet(copy).verify()


def test_a_damaged_seal_is_named(tmp_path, balls):
    copy = tmp_path / "copy"
    shutil.copytree(balls, copy)
    seal = copy / "shard-000000.json"
    seal.write_bytes(seal.read_bytes()[:-40])
    with pytest.raises(DamagedLabelSetError, match=r"shard-000000\.json: not a whole seal"):
        LabelSet(copy)


def test_not_a_label_set(tmp_path):
    with pytest.raises(DamagedLabelSetError, match="no such folder"):
        LabelSet(tmp_path / "nowhere")
    with pytest.raises(DamagedLabelSetError, match=r"no dataset\.json"):
        LabelSet(tmp_path)
    (tmp_path / "dataset.json").write_text('{"format": "coco"}')
    with pytest.raises(DamagedLabelSetError, match="not the description"):
        LabelSet(tmp_path)
    (tmp_path / "dataset.json").write_text('{"format": "dense-label-set", "version": 99}')
    with pytest.raises(DamagedLabelSetError, match="format version 99"):
        LabelSet(tmp_path)


def test_a_set_without_its_description_says_how_it_comes_back(tmp_path, balls):
    shutil.copytree(balls, tmp_path / "set")
    (tmp_path / "set" / "dataset.json").unlink()
    with pytest.raises(DamagedLabelSetError, match=r"lost its dataset.json. Start the same job"):
        LabelSet(tmp_path / "set")


def test_out_with_something_else_in_it(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        write_balls(tmp_path, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_index_has_one_row_per_input_and_is_rebuilt_from_the_seals(tmp_path, balls):
    import pyarrow.parquet as pq

    copy = tmp_path / "copy"
    shutil.copytree(balls, copy)
    (copy / "index.parquet").unlink()
    assert write_index(copy) == {"labelled": 10, "rejected": 0, "duplicate_of": 0}
    rebuilt, original = (
        pq.read_table(copy / "index.parquet"),
        pq.read_table(balls / "index.parquet"),
    )
    assert rebuilt.equals(original)
    assert set(rebuilt["state"].to_pylist()) == {"labelled"}
    for row in rebuilt.to_pylist():
        with tarfile.open(copy / f"shard-{row['shard']:06d}.tar") as tar:
            first = next(m for m in tar if m.name.startswith(row["key"]))
        assert first.offset == row["offset"]


def test_any_webdataset_reader_opens_it(balls):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import webdataset as wds

        urls = [str(p) for p in sorted(balls.glob("*.tar"))]
        samples = list(wds.WebDataset(urls, shardshuffle=False))
    stored = LabelSet(balls)
    assert [s["__key__"] for s in samples] == stored.keys
    depth = decode_plane("depth", samples[3]["depth.png"])
    np.testing.assert_array_equal(depth, stored[samples[3]["__key__"]].values[Task.DEPTH])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v[Task.DEPTH].__setitem__((0, 0), -1), "smallest depth is -1 m"),
        (lambda v: v[Task.DEPTH].__setitem__((0, 0), 0), "smallest depth is 0 m"),
        (lambda v: v[Task.NORMALS].__imul__(0.9), "the length of a normal is 0.9"),
        (lambda v: v[Task.SEMANTIC].__setitem__((0, 0), 9), r"class ids is \[9\]"),
        (lambda v: v.update({Task.DEPTH: v[Task.DEPTH][1:]}), "depth shape"),
        (lambda v: v.update({Task.DEPTH: v[Task.DEPTH].astype("f8")}), "depth dtype is float64"),
    ],
)
def test_what_breaks_the_contract_is_refused(change, message):
    label = make_label(1)
    change(label.values)
    with pytest.raises(LabelError, match=message):
        validate(label, classes={0: "", 1: "", 2: ""})
