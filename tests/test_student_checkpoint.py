import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from student.checkpoint import CheckpointError, load_student, save_student, write_atomic
from student.model import Student


def small_student() -> Student:
    torch.manual_seed(1)
    return Student(backbone="test_efficientnet", height=32, width=64).eval()


def test_round_trip_is_exact_and_describes_itself(tmp_path):
    model, path = small_student(), tmp_path / "student.safetensors"
    save_student(model, path, {"data": [{"images": 2}], "steps": 3})
    again = load_student(path)
    image = torch.rand(1, 3, 32, 64)
    for name, value in model(image).items():
        assert torch.equal(again(image)[name], value)
    assert again.config == model.config and not again.training
    assert again.provenance == {"data": [{"images": 2}], "steps": 3}
    first = path.read_bytes()
    save_student(model, path, {"steps": 3, "data": [{"images": 2}]})
    assert path.read_bytes() == first


def with_config(**changes):
    return lambda about: about | {"config": about["config"] | changes}


CHANGES = {
    "other config": with_config(decoder_channels=40),
    "fetches": with_config(pretrained=True),
    "opens": with_config(backbone_weights="/etc/passwd.safetensors"),
    "calibration nan": with_config(calibration={"depth": [float("nan"), 0.0]}),
    "no table": lambda about: about | {"provenance": ["x"]},
    "config none": lambda about: about | {"config": None},
    "data text": lambda about: about | {"provenance": {"data": "y"}},
    "init text": lambda about: about | {"provenance": {"init": "y"}},
    "init data": lambda about: about | {"provenance": {"init": {"data": None}}},
    "data null": lambda about: about | {"provenance": {"data": None}},
    "calibration text": lambda about: about | {"provenance": {"calibration": "x"}},
}


def damaged(path: Path, tmp_path: Path, kind: str) -> Path:
    out = tmp_path / "other.safetensors"
    data = path.read_bytes()
    if kind == "pickle":
        torch.save({"a": torch.zeros(2)}, out)
    elif kind == "raw pickle":
        out.write_bytes(b"\x80\x04}.")
    elif kind == "empty":
        out.write_bytes(b"")
    elif kind == "truncated":
        out.write_bytes(data[:-10])
    elif kind == "foreign":
        save_file({"a": torch.zeros(2)}, out)
    elif kind in ("torn json", "a list"):
        save_file(
            {"a": torch.zeros(2)}, out, metadata={"student": "[1]" if kind[0] == "a" else "{"}
        )
    elif kind in CHANGES:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        about = json.loads(header["__metadata__"]["student"])
        about = CHANGES[kind](about)
        header["__metadata__"]["student"] = json.dumps(about)
        text = json.dumps(header).encode()
        out.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    elif kind == "deep json":
        save_file({"a": torch.zeros(2)}, out, metadata={"student": "[" * 100_000})
    elif kind == "weight nan":
        with safe_open(path, "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}
            tensors["decoder.where.weight"][0, 0] = torch.nan
            save_file(tensors, out, metadata=file.metadata())
    elif kind == "folder":
        out.mkdir()
    return out


@pytest.mark.parametrize(
    "kind, text",
    [
        ("pickle", "pickle or a zip archive"),
        ("raw pickle", "pickle or a zip archive"),
        ("empty", "it is empty"),
        ("truncated", "truncated or another format"),
        ("foreign", "a safetensors file without our metadata"),
        ("torn json", "a safetensors file without our metadata"),
        ("a list", "a safetensors file without our metadata"),
        ("other config", "its config and its weights do not fit"),
        ("deep json", "a safetensors file without our metadata"),
        ("fetches", "its config has pretrained, which only a training may say"),
        ("opens", "its config has backbone_weights, which only a training may say"),
        ("no table", "its provenance is no table"),
        ("config none", "its config is no table"),
        ("data text", "its provenance's data is no list of tables"),
        ("init text", "its provenance's init is no table"),
        ("init data", "its provenance's data is no list of tables"),
        ("data null", "its provenance's data is no list of tables"),
        ("calibration text", "its provenance's calibration is no table"),
        ("calibration nan", "expected two finite numbers"),
        ("weight nan", r"not finite: decoder\.where\.weight"),
        ("folder", "a folder; expected RUN/student.safetensors"),
        ("missing", "no such file; expected RUN/student.safetensors"),
    ],
)
def test_a_checkpoint_that_is_not_ours_gets_one_paragraph(tmp_path, kind, text):
    path = tmp_path / "student.safetensors"
    save_student(small_student(), path, {})
    with pytest.raises(CheckpointError, match=text) as caught:
        load_student(damaged(path, tmp_path, kind))
    assert caught.value.exit_code == 2
    assert "\n\n" not in str(caught.value)


def test_a_file_with_the_stem_that_older_students_had_without_use_says_the_same(tmp_path):
    model = Student(backbone="mobilenetv4_conv_small", height=64, width=96, decoder_stride=4)
    save_student(model, tmp_path / "student.safetensors", {})
    with safe_open(tmp_path / "student.safetensors", framework="pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    state["decoder.stem.0.0.weight"] = torch.ones(32, 3, 3, 3)
    save_file(state, tmp_path / "old.safetensors", metadata)
    image = torch.rand(1, 3, 64, 96)
    old, new = (load_student(tmp_path / f"{n}.safetensors")(image) for n in ("old", "student"))
    assert all(torch.equal(old[name], new[name]) for name in new)


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    model, path = small_student(), tmp_path / "student.safetensors"
    with torch.no_grad():
        model.decoder.where.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"not finite: decoder\.where\.weight"):
        save_student(model, path, {})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]
