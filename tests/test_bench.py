"""`distill bench`: what it measures, what it says, and what it refuses to compare."""

import json

import pytest
from export_cases import hand_made

from export.bench_probe import operators, picture, probe
from export.benchmark import accuracy, bench, conditions, measure, race, same_conditions
from export.runtimes import open_runtime
from teacher.errors import UsageError
from teacher.store import hash_file


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    hand_made(folder / "a.onnx")
    hand_made(folder / "b.onnx", batch=2)
    return folder, bench(export=str(folder), threads=1, batches=[1, 2], rounds=3)


def test_every_number_is_there_and_makes_sense(measured):
    folder, result = measured
    report = json.loads((folder / "bench" / "bench.json").read_text())
    assert set(report["artefacts"]) == {"a.onnx", "b.onnx"} == set(result["artefacts"])
    row = report["artefacts"]["a.onnx"]
    assert set(row["batches"]) == {"1", "2"} and row["precision"] == "fp32"
    for n, times in row["batches"].items():
        assert 0 < times["best_ms"] <= times["p50_ms"] <= times["p90_ms"] <= times["p99_ms"]
        assert times["images_per_s"] == pytest.approx(int(n) * 1e3 / times["p50_ms"], rel=1e-6)
    assert row["first_call_ms"] > 0 and row["open_ms"] > 0 and row["memory_kib"] > 100
    assert row["batches"]["1"]["cpu_p50_ms"] > 0
    assert row["bytes"] == (folder / "a.onnx").stat().st_size
    assert row["sha256"] == hash_file(folder / "a.onnx")
    assert row["runtime"]["providers"] == ["CPUExecutionProvider"]
    assert (folder / "bench" / "bench.png").read_bytes()[:4] == b"\x89PNG"
    text = (folder / "bench" / "bench.md").read_text()
    assert f"{row['batches']['1']['p50_ms']:.2f}" in text and "threads 1" in text


def test_time_by_operator_adds_up(measured):
    folder, _ = measured
    rows = operators(folder / "a.onnx", (16, 24), provider="cpu", threads=1)
    assert sum(r["share"] for r in rows) == pytest.approx(1)
    assert {r["operator"] for r in rows} <= {"Cast", "ReduceMean", "Mul", "Add", "Unsqueeze"}
    assert [r["ms"] for r in rows] == sorted((r["ms"] for r in rows), reverse=True)


def test_artefacts_take_turns(measured):
    """Each round calls every artefact once: the order of calls, as they see it."""
    folder, _ = measured
    called = []
    with open_runtime(folder / "a.onnx", threads=1) as one:

        class Watched:
            largest, card = None, one.card

            def __init__(self, name):
                self.name = name

            def __call__(self, images):
                called.append(self.name)
                return one(images)

        measure({n: Watched(n) for n in "xyz"}, (16, 24), 1, rounds=4)
    rounds = [called[i : i + 3] for i in range(0, len(called), 3)]
    assert all(sorted(r) == ["x", "y", "z"] for r in rounds) and len(rounds) == 4 + 3
    assert len({tuple(r) for r in rounds}) > 1  # and not always in the same order


def test_numbers_of_other_conditions_are_not_compared(measured):
    folder, _ = measured
    earlier = folder / "bench" / "bench.json"
    same = bench(
        export=str(folder / "a.onnx"),
        out=str(folder / "again"),
        threads=1,
        batches=[1],
        rounds=3,
        against=str(earlier),
    )
    assert (
        "p50 as a multiple of the earlier run's: batch 1:"
        in (folder / "again" / "bench.md").read_text()
    )
    assert set(same["artefacts"]) == {"a.onnx"}
    with pytest.raises(UsageError, match=r"other conditions \(rounds: 3 then, 4 now\)"):
        bench(export=str(folder), threads=1, batches=[1], rounds=4, against=str(earlier))
    now = conditions(provider="cpu", threads=1, rounds=3, size=(16, 24))
    with pytest.raises(UsageError, match="cpu: 'an abacus' then"):
        same_conditions(now | {"cpu": "an abacus"}, now, "x")
    (folder / "other.json").write_text('{"format": "x"}')
    with pytest.raises(UsageError, match=r"no bench\.json of `distill bench`"):
        bench(export=str(folder), against=str(folder / "other.json"))


def test_accuracy_is_taken_from_the_verdict_on_this_very_file(measured, tmp_path):
    folder, _ = measured
    (tmp_path / "verify").mkdir()
    (tmp_path / "a.onnx").write_bytes((folder / "a.onnx").read_bytes())
    mean = {"depth": {"delta1": 0.5}, "normals": {"mean_deg": 20.0}}
    report = {
        "scores": {"a.onnx": {"truth": {"mean": mean, "set": {"semantic": {"miou": 0.3}}}}},
        "runs": {"a.onnx": {"sha256": hash_file(tmp_path / "a.onnx")}},
    }
    (tmp_path / "verify" / "report.json").write_text(json.dumps(report))
    told = accuracy(tmp_path)["a.onnx"]
    assert told == {
        "against": "truth",
        "depth.delta1": 0.5,
        "normals.mean_deg": 20.0,
        "semantic.miou": 0.3,
    }
    (tmp_path / "a.onnx").write_bytes(b"another file")
    assert accuracy(tmp_path) == {}


def test_what_the_numbers_do_not_say_is_written_beside_them(tmp_path, monkeypatch):
    hand_made(tmp_path / "fixed.onnx", batch=2)
    hand_made(tmp_path / "half.onnx", precision="fp16")
    given = {"export": str(tmp_path), "threads": 1, "rounds": 1}
    bench(**given, batches=[4])
    text = (tmp_path / "bench" / "bench.md").read_text()
    assert "fixed.onnx: batches [4] not measured, it takes 2 at most" in text
    assert "half.onnx: ONNX Runtime computes fp16 in float32 on a CPU" in text
    monkeypatch.setattr("export.benchmark.measure", None)  # all of these come before measuring
    with pytest.raises(UsageError, match=r"batches=\[4\]: none takes 4 images at once"):
        bench(**given | {"export": str(tmp_path / "fixed.onnx")}, batches=[4])
    (tmp_path / "bench" / "thesis.doc").write_text("x")
    with pytest.raises(UsageError, match=r"found thesis\.doc"):
        bench(**given, batches=[1])
    (tmp_path / "verify").mkdir()
    for broken in ("{", "{}", "[]"):
        (tmp_path / "verify" / "report.json").write_text(broken)
        with pytest.raises(UsageError, match=r"report\.json: not a report of `distill verify`"):
            bench(**given, batches=[1], out=str(tmp_path / "other"))
    (tmp_path / "b.json").write_text('{"format": "dense-distill/bench"}')
    with pytest.raises(UsageError, match=r"no bench\.json of .*without \['artefacts', 'condit"):
        bench(**given, batches=[1], against=str(tmp_path / "b.json"))


def test_race_and_probe(measured):
    folder, _ = measured
    paths = {"a": folder / "a.onnx", "b": folder / "a.onnx"}
    import numpy as np

    feed = {"image": picture((16, 24), 1), "focal_px": np.array([100], np.float32)}
    times = race(paths, feed, threads=1, rounds=5)
    assert set(times) == {"a", "b"} and min(times.values()) > 0
    assert set(probe(folder / "a.onnx", provider="cpu", threads=1)) == {
        "open_ms",
        "first_call_ms",
        "memory_kib",
    }


def test_bad_use(tmp_path):
    with pytest.raises(UsageError, match="found no model there"):
        bench(export=str(tmp_path))
    hand_made(tmp_path / "a.onnx")
    with pytest.raises(UsageError, match=r"rounds=0 batches=\[1\]: expected at least 1"):
        bench(export=str(tmp_path), rounds=0, batches=[1])
    hand_made(tmp_path / "b.onnx", size=(8, 8))
    with pytest.raises(UsageError, match="artefacts of several image sizes"):
        bench(export=str(tmp_path), rounds=1, batches=[1])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("x")
    with pytest.raises(UsageError, match=r"found thesis\.doc"):
        bench(export=str(tmp_path / "a.onnx"), out=str(tmp_path / "out"), rounds=1, batches=[1])
