"""Sources beyond folders: tars (hostile ones too), tables, videos, URLs; and the key cache."""

import io
import os
import shutil
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from teacher.errors import EnvironmentFailure, UsageError
from teacher.images import ImageError, decode, encode_png
from teacher.jobs.containers import TableSource, TarSource
from teacher.jobs.plan import HashCache, content_keys, make_plan
from teacher.jobs.sources import open_source
from teacher.jobs.videos import VideoSource
from teacher.store import content_key

RNG = np.random.default_rng(5)
PICTURES = [RNG.integers(0, 255, (8, 12, 3), dtype=np.uint8) for _ in range(5)]
PNGS = [encode_png(p) for p in PICTURES]


def add(tar, name, data=b"", **facts):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in facts.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def test_tar_members_are_read_by_offset_and_never_unpacked(tmp_path):
    path = tmp_path / "part.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "b.png", PNGS[0])
        add(tar, "b.json", b"{}")
        add(tar, "../../escape.png", PNGS[1])
        add(tar, "/etc/absolute.png", PNGS[2])
        add(tar, "link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard.png", type=tarfile.LNKTYPE, linkname="b.png")
        add(tar, "device.png", type=tarfile.CHRTYPE)
        add(tar, "b.png", PNGS[3])
    source = TarSource(path)
    strange = ["../../escape.png", "/etc/absolute.png", "link.png", "hard.png", "device.png"]
    assert source.list() == sorted(["b.png", "b.png#2", *strange])
    assert source.read("b.png") == PNGS[0]
    assert source.read("b.png#2") == PNGS[3]
    assert source.read("../../escape.png") == PNGS[1]
    for name in ("link.png", "hard.png", "device.png"):
        with pytest.raises(ImageError, match="not a regular file"):
            source.read(name)
        assert len(source.key(name)) == 24
    assert [p.name for p in tmp_path.iterdir()] == ["part.tar"]


def test_other_planes_of_a_webdataset_sample_are_no_inputs(tmp_path):
    """A tar of labels is a tar of their images; dots in names alone leave nothing out."""
    names = ["a.png", "a.depth.png", "a.normals.PNG", "a.json", "b/a.x.png", "c.1.jpg", "c.2.jpg"]
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name in [*names, "a.png"]:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    source = TarSource(tmp_path / "set.tar")
    assert source.list() == ["a.png", "a.png#2", "b/a.x.png", "c.1.jpg", "c.2.jpg"]
    assert source.left_out == {".depth.png": 1, ".normals.png": 1}


def test_a_cut_tar_is_refused_with_what_was_found(tmp_path):
    path = tmp_path / "cut.tar"
    with tarfile.open(path, "w") as tar:
        for i, png in enumerate(PNGS):
            add(tar, f"{i}.png", png * 3)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UsageError, match=r"not a whole tar file .* found \d+ images"):
        TarSource(path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda tar, at: tar[:at], "without the closing zeros"),
        (lambda tar, at: tar[: at + 100], "without the closing zeros"),
        (lambda tar, at: tar[:at] + b"?" + tar[at + 1 :], r"damaged header at byte \d+"),
        (lambda tar, at: tar + tar, "data after its end"),
    ],
)
def test_a_tar_that_only_seems_to_end_is_refused(tmp_path, harm, message):
    """Python's tarfile would list fewer members and say nothing."""
    path = tmp_path / "part.tar"
    with tarfile.open(path, "w") as tar:
        for i, png in enumerate(PNGS):
            add(tar, f"{i}.png", png)
    with tarfile.open(path) as tar:
        at = tar.getmember("3.png").offset
    whole = path.read_bytes()
    path.write_bytes(harm(whole, at))
    with pytest.raises(UsageError, match=rf"not a whole tar file .*{message}.* found [35] images"):
        TarSource(path)
    path.write_bytes(whole.rstrip(b"\0") + bytes(1024 + 512))  # any number of zeros will do
    assert len(TarSource(path).list()) == 5


def test_a_tar_with_very_many_members_is_listed_in_order(tmp_path):
    path = tmp_path / "many.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(20_000):
            add(tar, f"{i:06d}.jpg", b"x")
    assert len(TarSource(path).list()) == 20_000


@pytest.mark.parametrize("layout", ["hugging face", "bytes", "arrow", "arrow file", "capitals"])
def test_tables(tmp_path, layout):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"bytes": png, "path": f"{i}.png"} for i, png in enumerate(PNGS)]
    column = {"image": rows} if layout == "hugging face" else {"jpg": PNGS}
    table = pa.table(column | {"label": list(range(5))})
    suffix = "arrow" if "arrow" in layout else "parquet"
    path = tmp_path / (f"T.{suffix.upper()}" if layout == "capitals" else f"t.{suffix}")
    if suffix == "arrow":
        new = pa.ipc.new_file if layout == "arrow file" else pa.ipc.new_stream
        with new(path, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, path, row_group_size=2)
    source = TableSource(path)
    assert [source.read(uri) for uri in source.list()] == PNGS
    assert source.key("000000003") == content_key(PNGS[3])


@pytest.mark.parametrize("compression", ["gzip", "snappy"])
def test_a_damaged_part_of_a_table_costs_its_rows(tmp_path, compression):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"jpg": PNGS}), path, row_group_size=2, compression=compression)
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)  # the head of the first page
    path.write_bytes(data)
    source = TableSource(path)
    keys = [source.key(uri) for uri in source.list()]
    assert len(set(keys)) == 5 and keys[2:] == [content_key(png) for png in PNGS[2:]]
    for uri in source.list()[:2]:
        with pytest.raises(ImageError, match=rf"row {uri} of t\.parquet is damaged"):
            source.read(uri)
    path.unlink()
    with pytest.raises(FileNotFoundError):  # the disk's fault is not the image's
        TableSource.read(source, "000000000")


def test_two_inputs_of_one_name_are_refused(tmp_path):
    """One of them would be read for both."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "b.png", PNGS[0])
    (tmp_path / "a.tar::b.png").write_bytes(PNGS[1])
    with pytest.raises(UsageError, match=r"two inputs have the name 'a\.tar::b\.png'"):
        make_plan(open_source(str(tmp_path)), shard_size=4, batch_size=1, facts={})


def test_a_table_behind_a_url_is_not_taken_for_the_file_here_of_that_name(tmp_path, monkeypatch):
    import fsspec
    import pyarrow as pa

    for number, data in enumerate(PNGS[:2]):
        table = pa.table({"jpg": [data]})
        with pa.ipc.new_stream(tmp_path / f"{number}.arrow", table.schema) as writer:
            writer.write_table(table)
    fsspec.filesystem("memory").pipe("/tables/0.arrow", (tmp_path / "1.arrow").read_bytes())
    monkeypatch.chdir(tmp_path)
    source = open_source("memory://tables")
    assert source.read("0.arrow::000000000") == PNGS[1]


def test_a_table_without_images_lists_its_columns(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(UsageError, match=r"no image column; found \['text'\]"):
        TableSource(tmp_path / "t.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(UsageError, match="not a readable table"):
        TableSource(tmp_path / "bad.parquet")


def write_clip(path, *, seconds: int, rate: int = 10):
    """Grey level = 40 + 20 * second, so a frame tells its time; a hard cut to white at 3 s."""
    import av

    with av.open(str(path), "w") as clip:
        stream = clip.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(seconds * rate):
            level = 250 if i >= 3 * rate else 40 + 20 * (i // rate)
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8))
            clip.mux(stream.encode(frame))
        clip.mux(stream.encode())
    return path


def test_video_frames_by_rate_carry_their_time(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", seconds=5)
    source = VideoSource(clip, fps=1.0, scene_change=None)
    assert [float(uri[2:]) for uri in source.list()] == pytest.approx([0, 1, 2, 3, 4])
    for order in (source.list(), source.list()[::-1]):
        for uri in order:
            second = round(float(uri[2:]))
            expected = 250 if second >= 3 else 40 + 20 * second
            assert abs(float(decode(source.read(uri)).mean()) - expected) < 6
    copy = tmp_path / "elsewhere.mp4"
    copy.write_bytes(clip.read_bytes())
    again = VideoSource(copy, fps=1.0, scene_change=None)
    assert [again.key(u) for u in again.list()] == [source.key(u) for u in source.list()]
    assert len({source.key(u) for u in source.list()}) == 5


def test_video_frames_by_scene_change(tmp_path):
    source = VideoSource(write_clip(tmp_path / "c.mp4", seconds=5), fps=1.0, scene_change=0.2)
    assert [float(uri[2:]) for uri in source.list()] == pytest.approx([0, 3])


def test_a_broken_video_and_a_silly_rate_are_refused(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"\0" * 500)
    with pytest.raises(UsageError, match="not a readable video"):
        VideoSource(tmp_path / "x.mp4", fps=1.0, scene_change=None)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(UsageError, match=r"empty\.mp4: not a readable video \(it is empty"):
        VideoSource(tmp_path / "empty.mp4", fps=1.0, scene_change=None)
    with pytest.raises(UsageError, match="more than 0 frames"):
        VideoSource(tmp_path / "x.mp4", fps=0, scene_change=None)


def test_a_video_filmed_on_its_side_gives_upright_frames(tmp_path):
    import av

    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as clip:
        stream = clip.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        pixels = np.full((48, 64, 3), 30, np.uint8)
        pixels[:, 32:] = 220  # the right half is bright
        clip.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        clip.mux(stream.encode())
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44  # after version, times, id, duration, layer, volume
    turn = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # x' = -y, y' = x
    data[matrix : matrix + 36] = turn  # (1, 0), the right, goes to (0, 1), the bottom
    path.write_bytes(data)
    source = VideoSource(path, fps=1.0, scene_change=None)
    (uri,) = source.list()
    upright = decode(source.read(uri))
    assert upright.shape == (64, 48, 3)
    assert upright[:28].mean() < 60 and upright[36:].mean() > 190


def test_damage_inside_a_video_costs_its_frames_and_none_is_forgotten(tmp_path):
    import av

    path = write_clip(tmp_path / "c.mp4", seconds=5)
    with av.open(str(path)) as clip:
        places = [(p.pos, p.size) for p in clip.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    start, size = places[30]
    data[start : start + size] = bytes(size)
    path.write_bytes(data)
    source = VideoSource(path, fps=10.0, scene_change=None)
    assert len(source.list()) == 50
    wrong = []
    for uri in source.list():
        try:
            source.read(uri)
        except ImageError as error:
            wrong.append((round(float(uri[2:]), 1), str(error)))
    assert [t for t, _ in wrong][:1] == [3.0] and len(wrong) < 13, wrong
    assert all("c.mp4: " in text for _, text in wrong)


def test_a_video_without_pictures_and_several_broken_files_are_named(tmp_path):
    import av

    with av.open(str(tmp_path / "sound.mp4"), "w") as clip:
        stream = clip.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        clip.mux(stream.encode(frame))
        clip.mux(stream.encode())
    (tmp_path / "cut.tar").write_bytes(b"x" * 100)
    with pytest.raises(UsageError, match=r"(?s)cut\.tar: not a whole.*sound\.mp4: no picture"):
        open_source(str(tmp_path))
    with pytest.raises(UsageError, match=r"scene_change=-1: expected 0 to 1"):
        VideoSource(tmp_path / "sound.mp4", fps=1.0, scene_change=-1)


@pytest.mark.parametrize(
    "text", [b"a.png\nb \xe4.png", b"\xef\xbb\xbfa.png\r\n\r\n  \r\nb \xe4.png\r\n"]
)
def test_a_list_as_windows_or_an_old_disk_writes_it(tmp_path, text):
    """Marked UTF-8, CR LF, empty lines; a name that is no UTF-8."""
    (tmp_path / "a.png").write_bytes(PNGS[0])
    (tmp_path / os.fsdecode(b"b \xe4.png")).write_bytes(PNGS[1])
    (tmp_path / "LIST.TXT").write_bytes(text)
    source = open_source(str(tmp_path / "LIST.TXT"))
    assert source.list() == ["a.png", "b \\xe4.png"]
    assert [source.read(uri) for uri in source.list()] == PNGS[:2]
    (tmp_path / "LIST.TXT").write_bytes("a.png\n".encode("utf-16"))
    with pytest.raises(UsageError, match="of its lines name no file"):
        open_source(str(tmp_path / "LIST.TXT"))


def test_a_pattern_that_ends_in_two_stars_means_files(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("x.png", "a/y.png", "a/b/z.png"):
        (tmp_path / name).write_bytes(PNGS[0])
    assert open_source(f"{tmp_path}/**").list() == ["a/b/z.png", "a/y.png", "x.png"]


def test_a_folder_may_mix_everything(tmp_path):
    (tmp_path / "sub").mkdir()
    Image.fromarray(PICTURES[0]).save(tmp_path / "sub" / "a.png")
    with tarfile.open(tmp_path / "part.tar", "w") as tar:
        add(tar, "x.png", PNGS[1])
    write_clip(tmp_path / "sub" / "clip.mp4", seconds=2)
    source = open_source(str(tmp_path))
    assert source.list() == [
        "part.tar::x.png",
        "sub/a.png",
        "sub/clip.mp4::t=00000.000000",
        "sub/clip.mp4::t=00001.000000",
    ]
    assert [decode(source.read(u)).shape[2] for u in source.list()] == [3] * 4


def test_any_fsspec_url(monkeypatch):
    import fsspec

    memory = fsspec.filesystem("memory")
    for i, png in enumerate(PNGS[:3]):
        memory.pipe(f"/photos/{i}/p.png", png)
    memory.pipe("/photos/readme.txt", b"x")
    source = open_source("memory://photos")
    assert source.list() == ["0/p.png", "1/p.png", "2/p.png"]
    assert source.read("1/p.png") == PNGS[1]
    assert source.left_out == {".txt": 1}
    with pytest.raises(UsageError, match=r"nothing found; .* does it answer"):
        open_source("memory://nowhere-at-all")
    memory.pipe("/texts/readme.txt", b"x")
    with pytest.raises(UsageError, match="1 files, no image among them"):
        open_source("memory://texts")
    with pytest.raises(UsageError, match="cannot be listed"):
        open_source("nosuchprotocol://x")
    monkeypatch.setattr(memory, "find", lambda _: (_ for _ in ()).throw(RuntimeError("no route")))
    with pytest.raises(EnvironmentFailure, match=r"cannot be listed \(no route\)"):
        open_source("memory://photos")


def test_what_a_store_says_in_its_own_words_is_an_error_of_the_disk(monkeypatch):
    """Libraries of object stores raise exceptions of their own; 4 of 5 attempts may fail."""
    import fsspec

    class StoreError(Exception):
        status = 500

    memory = fsspec.filesystem("memory")
    memory.pipe("/flaky/a.png", PNGS[0])
    source, left = open_source("memory://flaky"), 4

    def flaky(path):
        nonlocal left
        left -= 1
        if left >= 0:
            raise StoreError("try again")
        return PNGS[0]

    monkeypatch.setattr("teacher.jobs.commit.WAITS_S", (0.0,) * 4)
    monkeypatch.setattr(source.files, "cat_file", flaky)
    assert content_keys(source, ["a.png"], threads=1) == [content_key(PNGS[0])]
    left, StoreError.status = 99, 403
    with pytest.raises(UsageError, match=r"'a\.png' cannot be read"):
        content_keys(source, ["a.png"], threads=1)


def test_a_store_that_fails_inside_an_open_tar_is_asked_again(monkeypatch, tmp_path):
    """Four reads of five may fail with an exception of the store's own; a refusal is said."""
    import fsspec
    from fsspec.implementations.memory import MemoryFile

    class StoreError(Exception):
        status = 500

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, png in enumerate(PNGS[:2]):
            info = tarfile.TarInfo(f"{i}.png")
            info.size = len(png)
            tar.addfile(info, io.BytesIO(png))
    memory = fsspec.filesystem("memory")
    memory.pipe("/cut/a.tar", (tmp_path / "a.tar").read_bytes())
    source, left, read = open_source("memory://cut"), 4, MemoryFile.read

    def flaky(self, *args):
        nonlocal left
        left -= 1
        if left >= 0:
            raise StoreError("connection lost")
        return read(self, *args)

    monkeypatch.setattr("teacher.jobs.commit.WAITS_S", (0.0,) * 4)
    monkeypatch.setattr(MemoryFile, "read", flaky)
    (_, second) = source.list()
    assert content_keys(source, [second], threads=1) == [content_key(PNGS[1])]
    left, StoreError.status = 99, 403
    with pytest.raises(UsageError, match=r"1\.png' cannot be read"):
        content_keys(source, [second], threads=1)
    left, StoreError.status = 4, 500
    assert len(open_source("memory://cut").list()) == 2
    left = 99
    with pytest.raises(EnvironmentFailure, match=r"reading a\.tar: connection lost .*five times"):
        open_source("memory://cut")


def test_the_index_of_a_label_set_is_no_table_of_images(tmp_path, balls):
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    shutil.copytree(balls, tmp_path / "in" / "set")
    memory = fsspec.filesystem("memory")
    memory.put(str(balls), "/balls", recursive=True)
    for place in (str(tmp_path / "in"), "memory://balls"):
        assert len(open_source(place).list()) == 10
    pq.write_table(pa.table({"jpg": PNGS}), tmp_path / "in" / "index.parquet")
    assert len(open_source(str(tmp_path / "in")).list()) == 15


class CountingSource:
    def __init__(self, n):
        self.n, self.hashed = n, 0

    def list(self):
        return [f"{i:04d}" for i in range(self.n)]

    def stamp(self, uri):
        return f"/somewhere/{self.n}/{uri}|1|2" if uri != "0003" else ""

    def key(self, uri):
        self.hashed += 1
        return content_key(uri.encode())


def test_keys_are_hashed_once_and_again_when_a_file_may_have_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = CountingSource(10)
    first = content_keys(source, source.list(), threads=2)
    assert source.hashed == 10
    assert content_keys(source, source.list(), threads=2) == first
    assert source.hashed == 11  # only the one that has no stamp


def test_a_damaged_or_unwritable_cache_costs_time_only(tmp_path):
    (tmp_path / "keys.sqlite").write_bytes(b"garbage" * 100)
    for path in (tmp_path / "keys.sqlite", tmp_path / "keys.sqlite" / "below" / "a-file"):
        cache = HashCache(path)
        cache.add([("stamp", "key")])
        assert cache.known(["stamp", "other"]) == {"stamp": "key"}
        cache.close()
