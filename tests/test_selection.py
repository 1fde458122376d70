"""Selections: limits, worst shares, near-duplicates by definition, and files that fit one set."""

import io
import json

import numpy as np
import pytest
from conftest import write_balls
from PIL import Image

from teacher.errors import UsageError
from teacher.jobs.selection import (
    apply_selections,
    identity,
    judge,
    load_selection,
    near_duplicates,
    picture_hash,
    read_selection,
    select,
)
from teacher.store import LabelSet


def rows_of(**columns):
    names = list(columns)
    values = zip(*columns.values(), strict=True)
    return [{"key": f"k{i}", **dict(zip(names, row, strict=True))} for i, row in enumerate(values)]


def test_limits_and_worst_shares_by_hand():
    rows = rows_of(u=[0.1, 0.4, None, 0.2, 0.3], cover=[None, 0.5, 0.2, 0.9, 1.0])
    found = judge(rows, at_least={"cover": 0.5}, at_most={"u": 0.3}, drop_worst={"u": 0.5})
    assert sorted(found) == ["k1", "k2", "k4"]  # of 4 numbers the worst 2: 0.4 and 0.3
    assert found["k1"] == ["u 0.4 > 0.3", "u 0.4 is among the worst 0.5 of all"]
    assert found["k2"] == ["cover 0.2 < 0.5"]
    assert found["k4"] == ["u 0.3 is among the worst 0.5 of all"]


def brute_force(hashes, distance, rank):
    """The definition: in order of rank, an image goes when a kept one is near."""
    kept, dropped = [], {}
    for i in sorted(range(len(hashes)), key=lambda k: (rank[k], k)):
        near = [j for j in kept if bin(hashes[i] ^ hashes[j]).count("1") <= distance]
        if near:
            dropped[i] = min(near)
        else:
            kept.append(i)
    return dropped


@pytest.mark.parametrize("distance", [0, 1, 5, 9])
def test_near_duplicates_are_those_of_the_definition(distance):
    rng = np.random.default_rng(distance)
    centres = rng.integers(0, 1 << 63, 30)
    hashes = []
    for _ in range(200):
        code = int(rng.choice(centres))
        for bit in rng.choice(64, rng.integers(0, 9), replace=False):
            code ^= 1 << int(bit)
        hashes.append(code)
    rank = rng.integers(0, 5, 200).tolist()
    keys = [str(i) for i in range(200)]
    found = near_duplicates(keys, hashes, distance=distance, rank=rank)
    assert found == {str(i): str(j) for i, j in sorted(brute_force(hashes, distance, rank).items())}
    assert distance == 0 or found


def test_many_equal_images_are_no_burden():
    found = near_duplicates(
        [str(i) for i in range(20000)], [7] * 20000, distance=5, rank=[0] * 20000
    )
    assert len(found) == 19999 and set(found.values()) == {"0"}


def jpeg(image, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def test_the_picture_hash_forgives_scale_and_coding_and_tells_pictures_apart():
    y, x = np.mgrid[:240, :320] / 240
    first = (127 + 120 * np.sin(7 * x + 3 * y * y))[..., None] * [1, 0.8, 0.6]
    other = (127 + 120 * np.cos(9 * y + 5 * x * y))[..., None] * [1, 0.8, 0.6]
    first, other = first.clip(0, 255).astype(np.uint8), other.clip(0, 255).astype(np.uint8)
    small = np.array(Image.fromarray(first).resize((128, 96)))
    reference = picture_hash(jpeg(first, quality=95))
    assert (reference ^ picture_hash(jpeg(small, quality=40))).bit_count() <= 3
    assert (reference ^ picture_hash(jpeg((first * 0.7).astype(np.uint8)))).bit_count() <= 3
    assert (reference ^ picture_hash(jpeg(other))).bit_count() > 15


def test_select_writes_what_training_reads_and_touches_nothing_else(tmp_path, balls):
    labels = LabelSet(balls)
    before = {p.name: p.stat().st_mtime_ns for p in balls.iterdir()}
    medians = sorted(row["depth_m_p50"] for row in labels.rows)
    out = tmp_path / "deep" / "s.json"
    result = select(labels=str(balls), out=str(out), at_most={"depth_m_p50": medians[6]})
    assert (result["kept"], result["dropped"], result["exit"]) == (7, 3, 0)
    assert result["reasons"] == {"depth_m_p50": 3}
    chosen = read_selection(out, labels)
    assert chosen == {r["key"] for r in labels.rows if r["depth_m_p50"] <= medians[6]}
    assert {p.name: p.stat().st_mtime_ns for p in balls.iterdir()} == before
    written = json.loads(out.read_text())
    assert len(written["dropped"]) == 3 and written["criteria"]["at_most"]
    assert apply_selections([str(out)], [labels]) == [[k for k in labels.keys if k in chosen]]


def test_each_file_finds_its_own_set(tmp_path, balls):
    other = LabelSet(write_balls(tmp_path / "other", 6, first=50))
    labels = LabelSet(balls)
    file = tmp_path / "s.json"
    select(labels=str(other.path), out=str(file), drop_worst={"depth_m_p95": 0.5})
    kept = apply_selections([str(file)], [labels, other])
    assert kept[0] == labels.keys
    assert len(kept[1]) == 3
    with pytest.raises(UsageError, match=r"which is none of the label sets given"):
        apply_selections([str(file)], [labels])
    with pytest.raises(UsageError, match=r"speaks of the same label set"):
        apply_selections([str(file), str(file)], [other])
    with pytest.raises(UsageError, match=r"made for another label set .*Select anew"):
        read_selection(file, labels)


def test_nothing_left_is_exit_1_and_refused_by_training(tmp_path, balls):
    file = tmp_path / "s.json"
    result = select(labels=str(balls), out=str(file), at_least={"width": 1000})
    assert (result["exit"], result["kept"]) == (1, 0)
    with pytest.raises(UsageError, match="keeps no image"):
        apply_selections([str(file)], [LabelSet(balls)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"at_most": {"blur": 1}}, r"at_most\.blur: no such column .*depth_coverage"),
        ({"drop_worst": {"depth_m_p50": 2}}, "expected a share from 0 to 1"),
        ({"near_duplicate_bits": 40}, "expected 0 to 16"),
        ({"at_most": {"depth_m_p50": "far"}}, r"at_most\.depth_m_p50=far: expected a number"),
        ({"near_duplicate_bits": 3, "threads": 0}, "threads=0: expected at least 1"),
    ],
)
def test_bad_criteria_are_explained(tmp_path, balls, change, message):
    with pytest.raises(UsageError, match=message):
        select(labels=str(balls), out=str(tmp_path / "s.json"), **change)


def test_a_selection_replaces_nothing_but_a_selection(tmp_path, balls):
    from teacher.jobs.check import check

    labels = write_balls(tmp_path / "set", 4)
    before = {p.name: p.read_bytes() for p in labels.iterdir()}
    own = "the label set's own files"
    foreign = r"out=.*found .*a new file or an earlier"
    for name in ("dataset.json", "shard-000000.json", "shard-000000.tar", "."):
        for verb in (select, check):
            with pytest.raises(UsageError, match=foreign if name == "." else own):
                verb(labels=str(labels), out=str(labels / name))
    assert {p.name: p.read_bytes() for p in labels.iterdir()} == before
    for verb, other in ((select, check), (check, select)):
        out = tmp_path / f"{verb.__name__}.json"
        assert verb(labels=str(labels), out=str(out))["exit"] == 0
        assert verb(labels=str(labels), out=str(out))["exit"] == 0
        with pytest.raises(UsageError, match="found other content"):
            other(labels=str(labels), out=str(out))
    with pytest.raises(UsageError, match=r"cannot be written .*an out= elsewhere"):
        select(labels=str(labels), out=str(labels / "dataset.json" / "s.json"))


def test_names_of_a_label_sets_own_files_are_refused_before_they_exist(tmp_path):
    """Else the next shard of the set, or its index, would find its name taken."""
    from teacher.jobs.check import check
    from teacher.jobs.commit import Lease, temporary_beside

    labels = write_balls(tmp_path / "set", 4)
    (labels / "dataset.json").rename(tmp_path / "about.json")  # also of a set that lost it
    hidden = Lease(labels, "shard-000007").path, temporary_beside(labels / "shard-000007.tar")
    own = ["dataset.json", "index.parquet", "run.json", "shard-000007.tar", "shard-1000000.json"]
    paths = [*hidden, *(labels / name for name in own)]
    with pytest.raises(UsageError, match="the label set's own files"):
        check(labels=str(labels), out=str(labels / "dataset.json"))
    (tmp_path / "about.json").rename(labels / "dataset.json")
    (labels / "index.parquet").unlink()
    before = sorted(labels.iterdir())
    for path in paths:
        for verb in (select, check):
            with pytest.raises(UsageError, match=r"out=.*own files; expected another.*out="):
                verb(labels=str(labels), out=str(path))
    assert sorted(labels.iterdir()) == before
    for name in ("shard-7.csv.json", "my-run.json"):
        assert select(labels=str(labels), out=str(labels / name))["exit"] == 0
    elsewhere = tmp_path / "run.json"
    assert select(labels=str(labels), out=str(elsewhere))["exit"] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a selection file"),
        ('{"format": "coco"}', "not a selection file"),
        ('{"format": "dense-selection", "version": 9}', "format version 9"),
        (
            '{"format": "dense-selection", "version": 1, "keep": [3], "labels": {}}',
            "not a selection",
        ),
    ],
)
def test_strange_files_are_explained(tmp_path, text, message):
    file = tmp_path / "s.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_selection(file)
    with pytest.raises(UsageError, match="no such file"):
        load_selection(tmp_path / "none.json")


def test_a_key_that_the_set_lacks_is_refused(tmp_path, balls):
    file = tmp_path / "s.json"
    about = {"format": "dense-selection", "version": 1, "labels": identity(LabelSet(balls))}
    file.write_text(json.dumps(about | {"keep": ["f" * 24]}))
    with pytest.raises(UsageError, match=r"keeps 1 image.* does not have"):
        read_selection(file, LabelSet(balls))


def test_near_duplicates_keep_the_more_certain_one(tmp_path):
    from conftest import make_label

    from teacher.images import encode_png
    from teacher.label import Task
    from teacher.store import content_key, write_label_set

    def make(i):
        label = make_label(i // 2, height=96, width=128)
        if i % 2:  # the same scene with another noise, and more certain
            image = label.image.astype(int) + np.random.default_rng(i).integers(
                -2, 3, label.image.shape
            )
            label.image = image.clip(0, 255).astype(np.uint8)
            data = encode_png(label.image)
            label.encoded, label.key = (data, "png"), content_key(data)
        spread = 0.05 if i % 2 else 0.2
        label.uncertainty[Task.DEPTH] = np.full(label.image.shape[:2], spread, np.float32)
        return label

    write_label_set(tmp_path / "set", n=6, make=make, dataset={"tasks": ["depth"]}, shard_size=4)
    labels = LabelSet(tmp_path / "set")
    result = select(labels=str(labels.path), near_duplicate_bits=5)
    kept = read_selection(labels.path / "selection.json", labels)
    assert result["reasons"] == {"near-duplicate": 3}
    assert kept == {labels.keys[1], labels.keys[3], labels.keys[5]}


def test_the_command_takes_limits_as_the_yaml_shows_them(tmp_path, balls, capsys):
    from distill import cli

    command = ["select", f"labels={balls}", f"out={tmp_path}/s.json", "at_most={depth_m_p5:3.5}"]
    assert cli.main([*command, "drop_worst={sky_share:0.1}", "near_duplicate_bits=0"]) == 0
    assert "of 10 kept" in capsys.readouterr().out
    criteria = load_selection(tmp_path / "s.json")["criteria"]
    assert criteria["at_most"] == {"depth_m_p5": 3.5}
    assert criteria["drop_worst"] == {"sky_share": 0.1}


STUDENT = {"backbone": "test_efficientnet", "height": 32, "width": 64, "decoder_channels": 16}
STUDENT |= {"tasks": ["depth"]}
TRAINER = {"steps": 2, "batch_size": 2, "warmup_steps": 1, "device": "cpu", "threads": 1}


def test_training_learns_from_the_selected_images_only(tmp_path, balls):
    from distill.train import train
    from student.checkpoint import load_student
    from teacher.jobs.licences import LicenceRefusedError, of_student

    labels, file = LabelSet(balls), tmp_path / "s.json"
    medians = sorted(row["depth_m_p50"] for row in labels.rows)
    select(labels=str(balls), out=str(file), at_most={"depth_m_p50": medians[5]})
    options = {"data": str(balls), "student": STUDENT, "trainer": TRAINER}
    refused = {"licence": {"refuse": ["unknown"]}}
    train(**options, out=str(tmp_path / "run"), selection=str(file))
    provenance = load_student(tmp_path / "run" / "student.safetensors").provenance
    assert provenance["data"][0]["images"] == 6
    assert [e["role"] for e in of_student(provenance)] == ["teacher code"]
    with pytest.raises(UsageError, match=r"another run; different: data"):
        train(**options, out=str(tmp_path / "run"))
    other = write_balls(tmp_path / "other", 4, first=90)
    with pytest.raises(UsageError, match="none of the label sets given"):
        train(**options | {"data": str(other)}, out=str(tmp_path / "x"), selection=[str(file)])
    about = json.loads((other / "dataset.json").read_text())
    about["teacher"] = {"name": "mine:Painter"}
    (other / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(LicenceRefusedError, match="teacher code mine:Painter: licence unknown"):
        train(**options | {"data": str(other)}, out=str(tmp_path / "x"), **refused)
    assert not (tmp_path / "x").exists()
