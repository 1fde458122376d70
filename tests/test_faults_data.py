"""Damaged shards, full disks, lost ledgers, changed inputs and plans, hostile images and tars."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from faults import assert_whole, options
from image_cases import P3_XYZ, WHOLE, encoded, orientation_tag, png, profile, textured
from PIL import Image
from test_faults import jobs, photos, place, reference  # noqa: F401 - fixtures

from teacher import shard_writer, shards
from teacher.errors import EnvironmentFailure, UsageError
from teacher.images import decode
from teacher.jobs.commit import Lease
from teacher.jobs.containers import TarSource
from teacher.jobs.redo import set_aside_damaged
from teacher.jobs.run import label
from teacher.store import LabelSet, problems_of, read_rows


@pytest.fixture
def whole_set(jobs, photos, place, reference):  # noqa: F811
    """A finished label set of its own, to be broken."""
    assert jobs.run(options(photos, place / "set"))["code"] == 0
    return place / "set"


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("shard-*")}


def damage(data: bytes, rng: np.random.Generator, trial: int) -> bytes:
    """A cut in every fourth trial, else one flipped bit."""
    if trial % 4 == 0:
        return data[: int(rng.integers(len(data)))]
    broken = bytearray(data)
    broken[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    return bytes(broken)


def redo(jobs, photos, folder, number, reference):  # noqa: F811
    """Start the job again: the damaged shard comes back, no other file is touched."""
    before = stamps(folder)
    done = jobs.run(options(photos, folder))
    assert done["code"] == 0, done["text"]
    assert_whole(folder, reference)
    touched = {n for n, stamp in stamps(folder).items() if before.get(n) != stamp}
    assert touched == {f"shard-{number:06d}.tar", f"shard-{number:06d}.json"}


@pytest.mark.parametrize("suffix", ["tar", "json"])
def test_200_cuts_and_flipped_bits_are_all_found(whole_set, suffix):
    rng = np.random.default_rng(3)
    for trial in range(100):
        number = int(rng.integers(3))
        path = whole_set / f"shard-{number:06d}.{suffix}"
        data = path.read_bytes()
        path.write_bytes(damage(data, rng, trial))
        assert list(problems_of(whole_set)) == [number], trial
        path.write_bytes(data)
    assert problems_of(whole_set) == {}


def redo_trials(jobs, photos, folder, reference, trials):  # noqa: F811
    rng = np.random.default_rng(4)
    for trial in range(trials):
        number = int(rng.integers(3))
        path = folder / f"shard-{number:06d}.{'tar' if trial % 3 else 'json'}"
        path.write_bytes(damage(path.read_bytes(), rng, trial))
        redo(jobs, photos, folder, number, reference)


def test_only_a_damaged_shard_is_labelled_again(jobs, photos, reference, whole_set):  # noqa: F811
    redo_trials(jobs, photos, whole_set, reference, 6)
    (whole_set / "shard-000001.tar").unlink()
    redo(jobs, photos, whole_set, 1, reference)


def test_a_shard_on_a_bad_sector_is_labelled_again(whole_set, monkeypatch):
    monkeypatch.setattr("teacher.jobs.commit.time.sleep", lambda _: None)
    meta = json.loads((whole_set / "dataset.json").read_text())
    real, number = shards.hash_file, errno.ESTALE

    def hashed(path):
        if path.name == "shard-000001.tar":
            raise OSError(number, os.strerror(number))
        return real(path)

    monkeypatch.setattr(shards, "hash_file", hashed)
    with pytest.raises(EnvironmentFailure, match=r"Stale file handle .*five times"):
        set_aside_damaged(whole_set, range(3), meta, threads=1)  # may pass: nothing is deleted
    number = errno.EIO
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", lambda *_: (_ for _ in ()).throw(OSError(5, "I/O")))
        with pytest.raises(EnvironmentFailure, match=r"moved away .*salvage=NEW.*another out="):
            set_aside_damaged(whole_set, range(3), meta, threads=1)
    assert len(stamps(whole_set)) == 6
    found = set_aside_damaged(whole_set, range(3), meta, threads=1)
    assert found == {1: "shard-000001: cannot be read: Input/output error"}
    assert len(stamps(whole_set)) == 4


def test_an_unsealed_tar_on_a_bad_sector_is_replaced(photos, reference, whole_set, monkeypatch):  # noqa: F811
    """Left by a dead worker. Nothing of it is trusted, and nothing that is sealed is touched."""
    monkeypatch.setattr("teacher.jobs.commit.time.sleep", lambda _: None)
    tar = whole_set / "shard-000001.tar"
    tar.with_suffix(".json").unlink()
    real, number, bad = shard_writer.hash_file, errno.ESTALE, tar.stat().st_ino

    def hashed(path):
        if path.stat().st_ino == bad:
            raise OSError(number, os.strerror(number))
        return real(path)

    monkeypatch.setattr(shard_writer, "hash_file", hashed)
    before = stamps(whole_set)
    with pytest.raises(EnvironmentFailure, match=r"shard-000001\.tar: Stale .*five times"):
        label(**options(photos, whole_set))  # may pass: it stays
    assert stamps(whole_set) == before
    number = errno.EIO
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", lambda *_: (_ for _ in ()).throw(OSError(5, "I/O")))
        with pytest.raises(EnvironmentFailure, match=r"I/O .*5 times in a row"):
            label(**options(photos, whole_set))
    assert stamps(whole_set) == before
    label(**options(photos, whole_set))
    assert_whole(whole_set, reference)
    after = stamps(whole_set)
    assert {n for n in after if after[n] != before.get(n)} == {tar.name, "shard-000001.json"}


@pytest.mark.slow
def test_200_damaged_shards_are_labelled_again(jobs, photos, reference, whole_set):  # noqa: F811
    redo_trials(jobs, photos, whole_set, reference, 200)


def test_a_damaged_tar_that_lost_its_seal_is_never_adopted(jobs, photos, reference, whole_set):  # noqa: F811
    rng = np.random.default_rng(5)
    for trial in range(4):
        path = whole_set / "shard-000000.tar"
        path.write_bytes(damage(path.read_bytes(), rng, trial))
        path.with_suffix(".json").unlink()
        done = jobs.run(options(photos, whole_set))
        assert done["code"] == 0, done["text"]
        assert_whole(whole_set, reference)


@pytest.mark.parametrize(
    "lost", [["index.parquet", "run.json"], ["dataset.json"], ["broken index"], ["key cache"]]
)
def test_what_can_be_rebuilt_is_rebuilt(jobs, photos, reference, whole_set, lost):  # noqa: F811
    before = stamps(whole_set)
    for name in lost:
        if name == "broken index":
            (whole_set / "index.parquet").write_bytes(b"PAR1 no")
        elif name == "key cache":
            cache = Path(os.environ["XDG_CACHE_HOME"], "dense-distill", "keys.sqlite")
            cache.write_bytes(b"not a database" * 99)
        else:
            (whole_set / name).unlink()
    assert jobs.run(options(photos, whole_set))["code"] == 0
    assert_whole(whole_set, reference)
    assert stamps(whole_set) == before


@pytest.mark.parametrize("function", ["append", "_name", "write_index"])
def test_a_file_size_limit_in_shard_seal_and_ledger(jobs, photos, place, reference, function):  # noqa: F811
    """The kernel itself refuses the bytes (EFBIG); the second shard is hit, or the index."""
    fault = {"kind": "limit", "function": function, "bytes": 150}
    fault["call"] = {"append": 4, "_name": 2, "write_index": 1}[function]
    first = jobs.run(options(photos, place / "set"), fault)
    assert first["code"] == 3, first["text"]
    assert "File too large" in first["text"] and str(place / "set") in first["text"]
    assert len(list((place / "set").glob("shard-*.json"))) == (3 if function[0] == "w" else 1)
    assert jobs.run(options(photos, place / "set"))["code"] == 0
    assert_whole(place / "set", reference)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system that is full soon; `resize` mounts it anew."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def resize(what: str) -> None:
        mounted = "remount," if disk.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{mounted}{what}", "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small file system needs root")

    yield disk, resize
    if disk.is_mount():
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("pages", [2, 4, 6, 7, 9, 11])
def test_a_full_and_a_read_only_disk(jobs, photos, small_disk, reference, pages):  # noqa: F811
    disk, resize = small_disk
    resize(f"size={4 * pages}k")
    first = jobs.run(options(photos, disk / "set"))
    assert first["code"] == 3, first["text"]
    assert "No space left on device" in " ".join(first["text"].split())
    resize("size=9m,ro")
    if (disk / "set" / "dataset.json").exists():
        assert "Read-only" in jobs.run(options(photos, disk / "set"))["text"]
    resize("size=9m,rw")
    assert jobs.run(options(photos, disk / "set"))["code"] == 0
    assert_whole(disk / "set", reference)


def test_two_jobs_on_one_folder_at_once(jobs, photos, place, reference):  # noqa: F811
    both = [jobs.start(options(photos, place / "set")) for _ in range(2)]
    for pid in both:
        done = jobs.wait(pid)
        assert done["code"] == 0, done["text"]
    assert_whole(place / "set", reference, litter=True)


def test_a_lease_of_a_clock_that_was_set_back_is_free(tmp_path):
    lease = Lease(tmp_path, "shard-000000")
    lease.path.write_text("another-machine 1 alive")
    assert not lease.take()
    ahead = time.time() + 3600  # written before the clock went back an hour; no beat since
    os.utime(lease.path, (ahead, ahead))
    assert lease.take()


def test_elsewhere_with_two_workers_whose_parent_loads_no_teacher(
    jobs, photos, place, reference, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    at = reference["lines"] // 2
    jobs.run(options(photos, place / "set"), {"kind": "kill", "at": at})
    assert not (place / "set" / "index.parquet").exists()
    shutil.copytree(photos, place / "moved photos")
    shutil.move(place / "set", place / "moved set")
    log = tmp_path / "loaded"
    job = options(place / "moved photos", place / "moved set", workers=2)
    label(**job | {"teacher": {"name": "faults:Logged", "log": str(log)}})
    assert_whole(place / "moved set", reference)
    loaded = log.read_text().split()
    assert len(loaded) == len(set(loaded)) == 3 and str(os.getpid()) not in loaded


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(photos, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    teacher = {"name": "faults:Logged", "log": str(tmp_path / "log"), "pause_s": 1.0}
    job = options(photos, tmp_path / "set", workers=2, teacher=teacher)
    code = f"from teacher.jobs.run import label\nif __name__ == '__main__': label(**{job!r})"
    (tmp_path / "main.py").write_text(code)
    parent = subprocess.Popen([sys.executable, tmp_path / "main.py"], stderr=subprocess.DEVNULL)
    while not list((tmp_path / "set").glob("*.lease")):
        time.sleep(0.05)
        assert parent.poll() is None
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 2
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs(children, timeout=60)[1]


def refused(job: dict, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        label(**job)


@pytest.mark.parametrize("change", ["added", "removed", "changed", "renamed"])
def test_changed_inputs_never_mix(photos, reference, whole_set, place, change):  # noqa: F811
    other = place / "photos"
    shutil.copytree(photos, other)
    if change == "added":
        (other / "new.png").write_bytes((other / "3.png").read_bytes())
    elif change == "removed":
        (other / "3.png").unlink()
    elif change == "changed":
        Image.fromarray(np.full((6, 8, 3), 7, np.uint8)).save(other / "3.png")
    else:
        (other / "3.png").rename(other / "33.png")
    before = stamps(whole_set)
    refused(options(other, whole_set), r"another job's label set .*inputs")
    assert stamps(whole_set) == before
    assert_whole(whole_set, reference)


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": {"name": "faults:Flat", "prompt": "How far?"}},
        {"teacher": {"name": "faults:Flat", "scale": 2.0}},
        {"batch_size": 3},
        {"shard_size": 4},
        {"keep_pictures": True},
        {"max_side": 7},
    ],
)
def test_changed_plans_never_mix(photos, whole_set, change):  # noqa: F811
    before = stamps(whole_set)
    refused(options(photos, whole_set, **change), r"another job's label set .*different: ")
    assert stamps(whole_set) == before


def test_a_change_that_hides_behind_size_and_time_is_found_and_hashed_anew(photos, place):  # noqa: F811
    other = place / "photos"
    shutil.copytree(photos, other)
    old = time.time() - 999
    for path in other.iterdir():
        os.utime(path, (old, old))
    label(**options(other, place / "one"))
    page = other / "page.jpg"
    page.write_text("<html>went</html>")  # as long as before
    os.utime(page, (old, old))
    refused(options(other, place / "two"), r"page\.jpg: the file changed after it was planned")
    label(**options(other, place / "three"))
    assert LabelSet(place / "three").verify() == 7


def turned() -> dict[str, bytes]:
    """The same upright picture stored in all eight EXIF orientations."""
    up = textured(6, 9)
    stored = {1: up, 2: up[:, ::-1], 3: up[::-1, ::-1], 4: up[::-1], 5: up.swapaxes(0, 1)}
    stored |= {6: np.rot90(up, 1), 7: np.rot90(up, 2).swapaxes(0, 1), 8: np.rot90(up, -1)}
    return {
        f"exif-{o}.png": encoded(np.ascontiguousarray(a), "PNG", exif=orientation_tag(o))
        for o, a in stored.items()
    }


def zoo() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """(good, bad) files by name: every kind of image, and everything that only looks like one."""
    small = Image.fromarray(textured(12, 16))
    good = {f"{kind}.img.png": make() for kind, make in WHOLE.items() if kind not in ("heif",)}
    good |= {
        "one-row.png": encoded(textured(1, 300), "PNG"),
        "one-column.png": encoded(textured(300, 1), "PNG"),
        "grey16.png": png((4, 2), 16, 0, bytes(range(16))),
        "palette.png": encoded(small.convert("P"), "PNG"),
        "cmyk.jpg": encoded(small.convert("CMYK"), "JPEG"),
        "alpha.png": encoded(small.convert("RGBA"), "PNG"),
        "grey.jpg": encoded(small.convert("L"), "JPEG"),
        "wide.png": encoded(small, "PNG", icc_profile=profile(P3_XYZ)),
        "moving.gif": encoded(
            small, "GIF", save_all=True, append_images=[small.rotate(90)], duration=100
        ),
    } | turned()
    bad = {"empty.jpg": b"", "page.jpg": b"<!doctype html><p>404", "text.png": b"hello" * 99}
    bad["bomb.png"] = png((60_000, 60_000), 8, 2, b"\0" * 60_000)
    for kind in ("jpeg", "png", "webp", "tiff", "gif"):
        data = WHOLE[kind]()
        for share in (0.3, 0.6, 0.95, 0.999):
            bad[f"{kind}-{share}.jpg"] = data[: min(int(len(data) * share), len(data) - 1)]
    return good, bad


def test_the_image_zoo_through_a_whole_job(place):  # noqa: F811
    good, bad = zoo()
    (place / "zoo").mkdir()
    for name, data in (good | bad).items():
        (place / "zoo" / name).write_bytes(data)
    label(**options(place / "zoo", place / "set", shard_size=16))
    stored = LabelSet(place / "set")
    stored.verify()
    states = {row["uri"]: row["state"] for row in stored.rows}
    assert {n for n, s in states.items() if s == "labelled"} == set(good)
    assert {n for n, s in states.items() if s == "rejected"} == set(bad)
    assert all(row["reason"] for row in stored.rows if row["state"] == "rejected")
    for row in stored.rows:
        if row["state"] == "labelled":
            members = stored.members(row["key"])
            seen = Image.open(io.BytesIO(members.get("jpg") or members["png"])).convert("RGB")
            np.testing.assert_array_equal(np.asarray(seen), decode(good[row["uri"]]), row["uri"])
            if row["uri"].startswith("exif"):
                np.testing.assert_array_equal(np.asarray(seen), textured(6, 9))


def test_a_hostile_tar_through_a_whole_job(place):  # noqa: F811
    photo = encoded(textured(5, 6), "PNG")
    kinds = {"link.png": tarfile.SYMTYPE, "hard.png": tarfile.LNKTYPE, "dev.png": tarfile.CHRTYPE}
    (place / "in").mkdir()
    with tarfile.open(place / "in" / "part.tar", "w") as tar:
        for name in ("../../up.png", "/etc/abs.png", "a.png", "A.png", *kinds):
            info = tarfile.TarInfo(name)
            data = photo + name.encode() if name not in kinds else b""
            info.size, info.type = len(data), kinds.get(name, tarfile.REGTYPE)
            info.linkname = "/etc/passwd" if name in kinds else ""
            tar.addfile(info, io.BytesIO(data))
    label(**options(place / "in", place / "set"))
    states = {row["uri"].partition("::")[2]: row for row in read_rows(place / "set")}
    assert {n for n, r in states.items() if r["state"] == "rejected"} == set(kinds)
    assert all("not a regular file" in states[n]["reason"] for n in kinds)
    assert {p.name for p in place.iterdir()} == {"in", "set"}
    assert {p.name for p in (place / "in").iterdir()} == {"part.tar"}
    names = json.loads((place / "set" / "shard-000000.json").read_bytes())
    assert len(names["rows"]) == 3


@pytest.mark.slow
def test_a_tar_of_a_million_entries_is_listed_in_bounded_memory(tmp_path):
    """Half of them under one name, which must not take quadratic time."""
    with (tmp_path / "huge.tar").open("wb") as file:
        for i in range(1_000_000):
            info = tarfile.TarInfo(f"{i:07d}.jpg" if i % 2 else "same.jpg")
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.write(bytes(10240))
    before = psutil.Process().memory_info().rss
    source = TarSource(tmp_path / "huge.tar")
    assert len(source.list()) == 1_000_000
    assert psutil.Process().memory_info().rss - before < 600 << 20
    (tmp_path / "huge.tar").unlink()
