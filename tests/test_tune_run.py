"""`distill tune`: resumes bit by bit, survives NaN, refuses bad use; and the schedule by hand."""

import json
import shutil

import numpy as np
import pytest
import torch
from mini_rooms import CLASSES, TINY, room, write_rooms
from safetensors.torch import load_file

from distill.tune.adapter import MiniAdapter
from distill.tune.module import TuneModule, learning_rate
from distill.tune.run import tune
from distill.tune.stream import Plan
from teacher.errors import EnvironmentFailure, UsageError
from teacher.generators.mini import MiniTeacher
from teacher.generators.mini_generator import MiniGenerator
from teacher.jobs.licences import LicenceRefusedError, for_label_job, of_teacher, refuse
from teacher.store import write_label_set


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    return write_rooms(tmp_path_factory.mktemp("rooms") / "set", n=14, height=16, width=32)


def options(rooms, out, **more):
    return {
        "teacher": "mini", "data": rooms, "out": str(out), "steps": 6, "generate_steps": 2,
        "small_steps": 3, "batch": 4, "warmup": 2, "decay": 2, "held_back": 0.3, "network": TINY,
        "validate_every": 0, "threads": 1, **more,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_run_in_slices_equals_one_run(rooms, tmp_path, monkeypatch):
    """Stopped after every second step and started again: the same weights, moments and average."""
    whole = tune(**options(rooms, tmp_path / "whole"))
    assert whole["step"] == 6 and whole["bad_steps"] == 0

    from distill.tune import stream

    class Clock:
        now = 0.0

        @classmethod
        def monotonic(cls):
            cls.now += 25.0  # each look at the clock costs 25 s: two steps per minute
            return cls.now

    monkeypatch.setattr(stream, "time", Clock)
    slices = 0
    while slices < 9:
        slices += 1
        monkeypatch.setattr("distill.tune.run.time.monotonic", lambda: Clock.now)
        done = tune(**options(rooms, tmp_path / "sliced", max_minutes=1.0))["step"]
        if done == 6:
            break
    assert 2 <= slices < 9
    first = load_file(tmp_path / "whole" / "state.safetensors")
    second = load_file(tmp_path / "sliced" / "state.safetensors")
    assert first.keys() == second.keys()
    assert any(k.startswith("adam.") for k in first)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_it_writes_a_loadable_generator_and_a_sheet(rooms, tmp_path):
    result = tune(**options(rooms, tmp_path, steps=2))
    assert json.loads((tmp_path / "tune.json").read_text())["step"] == 2
    assert {"delta1", "normals_mean_deg"} <= set(result["validation"])
    generator = MiniGenerator.from_pretrained(result["weights"])
    assert generator.card["steps_trained"] == 2
    assert generator.card["size"] == [16, 32]
    assert generator.card["things"] == ["ball", "globe"]
    assert list((tmp_path / "sheets").glob("step-*.png"))
    again = tune(**options(rooms, tmp_path / "next", steps=1, init=result["weights"], network=None))
    assert again["step"] == 1


def test_the_card_carries_the_ledger_of_data_and_start_weights(rooms, tmp_path):
    """Non-commercial scenes -> generator -> generator -> label job, named at each step."""
    shutil.copytree(rooms, tmp_path / "nc")
    about = json.loads((tmp_path / "nc" / "dataset.json").read_text())
    about |= {"teacher": {"name": "truth"}, "licences": {"images": "CC-BY-NC-4.0"}}
    (tmp_path / "nc" / "dataset.json").write_text(json.dumps(about))
    free = about | {"licences": {"images": "Apache-2.0 (scenes)"}}
    shutil.copytree(tmp_path / "nc", tmp_path / "free")
    (tmp_path / "free" / "dataset.json").write_text(json.dumps(free))
    barred = {"licence": {"refuse": ["non-commercial"]}}
    with pytest.raises(LicenceRefusedError, match=r"(?s)generator .*training images images"):
        tune(**options(str(tmp_path / "nc"), tmp_path / "a", steps=1), **barred)
    assert not (tmp_path / "a").exists()
    first = tune(**options(str(tmp_path / "nc"), tmp_path / "a", steps=1))["weights"]
    card = MiniGenerator.from_pretrained(first).card
    assert card["license"] == "not stated: see licences"
    begun = options(str(tmp_path / "free"), tmp_path / "b", steps=1, network=None)
    second = tune(**begun, init=first)["weights"]
    tune(**begun | {"steps": 2, "network": TINY})  # resumed without init
    with pytest.raises(LicenceRefusedError, match=r"training images images: CC-BY-NC"):
        tune(**begun | {"steps": 3, "network": TINY}, **barred)
    found = of_teacher(MiniTeacher(weights=second).describe())
    assert ("training images", "CC-BY-NC-4.0") in [(e["role"], e["licence"]) for e in found]
    with pytest.raises(LicenceRefusedError, match=r"training images images: CC-BY-NC-4\.0"):
        refuse(for_label_job(MiniTeacher(weights=second).describe(), images_licence="MIT"),
               ["non-commercial"], what="x")  # fmt: skip
    clean = tune(**options(str(tmp_path / "free"), tmp_path / "c", steps=1), **barred)["weights"]
    assert MiniGenerator.from_pretrained(clean).card["license"] == "Apache-2.0"
    shipped = of_teacher(MiniTeacher().describe())  # made of our own scenes
    assert ("training images", "Apache-2.0 (made by this project)") in [
        (e["role"], e["licence"]) for e in shipped
    ]
    assert not any(e["terms"] for e in shipped)


def test_training_learns(rooms, tmp_path):
    """The loss of a fixed batch falls well below that of the untrained network."""
    from distill.tune.pairs import Pairs
    from distill.tune.scenes_cache import load_scenes

    scenes = load_scenes(rooms, cache=str(tmp_path / "cache"))
    batch = Pairs(scenes, weights={"depth": 1, "normals": 1}, batch=8).draw(10**6)
    torch.manual_seed(0)
    before = float(MiniAdapter(TINY).losses(batch, step=0).per_pair.mean())
    result = tune(**options(rooms, tmp_path / "run", steps=60, generate_steps=0, small_steps=0,
                            batch=16, lr=5e-3, warmup=5, decay=20, ema=0.9))  # fmt: skip
    adapter = MiniAdapter(TINY)
    adapter.net.load_state_dict(MiniGenerator.from_pretrained(result["weights"]).net.state_dict())
    assert float(adapter.losses(batch, step=0).per_pair.mean()) < 0.6 * before


def test_a_step_that_is_not_finite_changes_nothing(rooms, tmp_path, monkeypatch):
    """NaN in every loss: no weight moves, and after twenty in a row it stops with advice."""
    original = MiniAdapter.losses

    def broken(self, batch, *, step):
        losses = original(self, batch, step=step)
        return losses._replace(total=losses.total * float("nan"))

    monkeypatch.setattr(MiniAdapter, "losses", broken)
    result = tune(**options(rooms, tmp_path / "a", steps=3))
    state = load_file(tmp_path / "a" / "state.safetensors")
    torch.manual_seed(0)
    untouched = MiniAdapter(TINY).network.state_dict()
    assert result["bad_steps"] == 3
    for name, value in untouched.items():
        assert torch.equal(state[f"net.{name}"], value), name
    with pytest.raises(EnvironmentFailure, match=r"not finite for 20 steps in a row.*Lower lr"):
        tune(**options(rooms, tmp_path / "b", steps=40))


def test_learning_rate_by_hand():
    rates = [learning_rate(i, peak=1.0, warmup=4, steps=10, decay=4) for i in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_the_plan_mixes_by_stage():
    plan = Plan(2, 0, 10, 0.1, {"depth": 3.0, "normals": 1.0})
    assert plan.mixture(1) == {"generate": 1.0}
    assert plan.mixture(2) == pytest.approx({"depth": 0.675, "normals": 0.225, "generate": 0.1})


@pytest.mark.parametrize(
    ("ema", "average_from", "shares"),
    [
        (0.5, 0, {100: 0.5}),  # of the step up by 1, how much the average has taken
        # at the change of size a tenth of the old average is left, then 2/11 of that
        (0.999, 500, {500: 0.9, 501: 1 - 0.1 * 2 / 11}),
    ],
)
def test_the_average_follows_the_formula_and_starts_anew_at_the_change_of_size(
    ema, average_from, shares
):
    torch.manual_seed(0)
    module = TuneModule(MiniAdapter(TINY), peak_lr=1e-3, warmup=1, steps=900, decay=0, ema=ema,
                        average_from=average_from)  # fmt: skip
    name = "net.image.stem.weight"
    first = module.averaged[name].clone()
    with torch.no_grad():
        module.network.state_dict()[name].add_(1.0)
    for module.step, share in shares.items():
        module._average()
        assert torch.allclose(module.averaged[name], first + share, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"teacher": "flux"}, "teacher='flux' cannot be tuned here"),
        ({"batch": 5}, "batch=5 must be a multiple of prompts_per_image=2"),
        ({"retention": 1.5}, r"retention=1.5 must lie in \[0, 1\)"),
        ({"task_weights": {"flow": 1.0}}, "must be shares >= 0 of"),
    ],
)
def test_bad_use_is_refused(rooms, tmp_path, wrong, text):
    with pytest.raises(UsageError, match=text):
        tune(**options(rooms, tmp_path, **wrong))


def test_two_runs_in_one_folder_are_refused(rooms, tmp_path):
    """The second is told so; once the first has let go, even by an error, the folder is free."""
    import fcntl

    with (tmp_path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match=r"another run is at work in .*choose another out"):
            tune(**options(rooms, tmp_path))
    with pytest.raises(UsageError, match="no such folder"):
        tune(**options(str(tmp_path / "nowhere"), tmp_path))
    with pytest.raises(UsageError, match=r"leave 0 to train on"):  # while it holds the lock
        tune(**options(rooms, tmp_path, held_back=1.0))
    assert tune(**options(rooms, tmp_path, steps=1))["step"] == 1


def test_a_set_without_truth_is_refused(tmp_path):
    def bare(i):
        label = room(i, height=16, width=32)
        label.values = {k: v for k, v in label.values.items() if k == "depth"}
        return label

    write_label_set(tmp_path / "set", n=2, make=bare, dataset={"tasks": ["depth"]})
    with pytest.raises(UsageError, match="has no normals, semantic, instances; tuning needs"):
        tune(**options(str(tmp_path / "set"), tmp_path / "run"))


def test_a_size_that_cannot_be_halved_is_refused(tmp_path):
    dataset = {"tasks": ["depth", "normals", "semantic", "instances"], "classes": {"0": "wall"}}
    dataset["classes"] = {str(k): v for k, v in CLASSES.items()}
    write_label_set(tmp_path / "set", n=2, make=lambda i: room(i, height=24, width=32),
                    dataset=dataset)  # fmt: skip
    with pytest.raises(
        UsageError, match=r"32x24, expected multiples of 16 \(8 with small_steps=0\)"
    ):
        tune(**options(str(tmp_path / "set"), tmp_path / "run"))


def test_a_state_of_another_network_is_refused(rooms, tmp_path):
    tune(**options(rooms, tmp_path, steps=1))
    with pytest.raises(UsageError, match="belongs to another network"):
        tune(**options(rooms, tmp_path, network={**TINY, "width": 64}))


def test_numbers_of_validation_are_those_of_the_truth_itself(rooms, tmp_path):
    """A generator that draws the truth scores perfectly: decode and metric agree with the coder."""
    from distill.tune.pairs import Pairs
    from distill.tune.scenes_cache import load_scenes
    from distill.tune.sheets import validate

    class Oracle(MiniAdapter):
        def draw(self, batch, *, steps):
            return batch.answer

    scenes = load_scenes(rooms, cache=str(tmp_path / "cache"))
    kinds = ("depth", "normals", "semantic", "instances")
    pairs = {
        k: Pairs(scenes, weights={k: 1}, batch=4, prompts_per_image=1, colour_map_share=0)
        for k in kinds
    }
    numbers = validate(Oracle(TINY), pairs, steps=1, batches=1)
    assert numbers["delta1"] == 1 and numbers["abs_rel"] < 0.005
    assert numbers["normals_mean_deg"] < 0.5
    assert numbers["semantic_pixels_right"] == numbers["instances_pixels_right"] == 1
    assert np.isfinite(list(numbers.values())).all()
