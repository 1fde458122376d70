"""`distill tune`: make or continue an instruction-tuned generator, in resumable slices."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from distill.tune.adapter import MiniAdapter
from distill.tune.keeper import Keeper, Moments
from distill.tune.module import TuneModule
from distill.tune.pairs import Pairs
from distill.tune.scenes_cache import Scenes, load_scenes
from distill.tune.stream import Plan, Stream, split
from teacher.errors import UsageError
from teacher.jobs.commit import replace_atomically
from teacher.jobs.licences import entry, inherited, merged, of_label_set, read_ledger, refuse
from teacher.prompts import KINDS
from teacher.store import read_dataset

DEFAULT_WEIGHTS = {"depth": 4.0, "normals": 3.0, "semantic": 2.0, "instances": 2.0}
TASKS = tuple(DEFAULT_WEIGHTS)
LICENCES = "licences.json"


def tune(
    *,
    teacher: str,
    data: str | Sequence[str],
    out: str,
    init: str | None = None,
    steps: int = 20000,
    generate_steps: int = 1500,
    small_steps: int = 4000,
    batch: int = 32,
    prompts_per_image: int = 2,
    lr: float = 1.2e-3,
    warmup: int = 200,
    decay: int = 2000,
    ema: float = 0.999,
    retention: float = 0.08,
    task_weights: dict[str, float] | None = None,
    colour_map_share: float = 0.1,
    two_readings_share: float = 0.05,
    window_share: float = 0.3,
    single_step_share: float = 0.5,
    held_back: float = 0.04,
    validate_every: int = 500,
    max_minutes: float = 0.0,
    threads: int = 2,
    device: str = "cpu",
    seed: int = 0,
    network: dict[str, int] | None = None,
    licence: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a generator on scenes with truth; call it again with the same ``out`` to continue.

    Args:
        teacher: the generator to tune: ``mini``.
        data: a label set with all four tasks (`distill scenes`), or several.
        out: run folder: state, log, sheets, ``generator.safetensors`` (averaged weights; its card
            carries the licence ledger of ``data`` and ``init``).
        init: weights to start from (``*.safetensors`` with its card); only for a new run.
        steps: total steps of the plan; the first ``generate_steps`` only draw from captions, the
            first ``small_steps`` work at half the size, the last ``decay`` lower the rate.
        batch: pairs per step, over ``batch / prompts_per_image`` images.
        lr, warmup, decay, ema: schedule and averaging per step.
        retention: share of caption-to-picture pairs during instruction tuning.
        task_weights: relative shares of depth, normals, semantic, instances.
        colour_map_share: depth answers in another colour map, named in the prompt.
        two_readings_share: images with two valid depths, each asked for either.
        window_share: images that show a window of their scene, at full size.
        single_step_share: pairs at pure noise, which train the single-step answer.
        held_back: share of the scenes kept for validation; which ones depends on their keys alone.
        validate_every: steps between sheets (0: never).
        max_minutes: length of this slice (0: no limit).
        threads, device: where to compute.
        seed: of everything random.
        network: `MiniNet` sizes that differ from its defaults.
        licence: ``refuse``: terms that no ancestor may have (`teacher.jobs.licences.TERMS`).
    """
    if teacher != "mini":
        raise UsageError(
            f"tune: teacher={teacher!r} cannot be tuned here, expected 'mini'; another generator"
            " joins by an adapter (distill/tune/adapter.py)"
        )
    weights = dict(task_weights or DEFAULT_WEIGHTS)
    _check(batch, prompts_per_image, retention, weights)
    began = time.monotonic()
    torch.set_num_threads(threads)
    folder = Path(out)
    sets = [data] if isinstance(data, str) else data
    begun = ancestors(folder, sets, init)
    refuse(begun, (licence or {}).get("refuse", []), what=f"generator {out}")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        scenes = load_scenes(data, cache=str(folder / "cache"))
        height, width = scenes.image.shape[1:3]
        unit = 16 if small_steps else 8
        if height % unit or width % unit:
            raise UsageError(
                f"{data}: scenes are {width}x{height}, expected multiples of {unit}"
                f"{' (8 with small_steps=0)' if small_steps else ''}"
            )
        train, back = split(scenes, held_back)
        if not len(train) or not len(back):
            raise UsageError(
                f"{data}: {len(scenes)} scenes leave {len(train)} to train on and {len(back)} to"
                f" validate with held_back={held_back}; render more scenes or change the share"
            )
        ledger = ancestors(folder, sets, init)  # again: another run may just have ended here
        replace_atomically(folder / LICENCES, json.dumps(ledger, indent=1).encode() + b"\n")
        plan = Plan(generate_steps, small_steps, steps, retention, weights)
        torch.manual_seed(seed)
        module = _module(network, init, plan, lr, warmup, decay, ema)
        start = resume(module, folder)
        options = {
            "batch": batch,
            "prompts_per_image": prompts_per_image,
            "single_step_share": single_step_share,
            "colour_map_share": colour_map_share,
            "two_readings_share": two_readings_share,
            "window_share": window_share,
            "seed": seed,
        }
        deadline = began + max_minutes * 60 if max_minutes else float("inf")
        stream = Stream(plan, train, train.halved() if start < small_steps else train, start,
                        deadline, options)  # fmt: skip
        keeper = Keeper(
            folder,
            plan,
            checks=_checks(back, plan, seed),
            every=validate_every,
            facts={
                "size": list(scenes.image.shape[1:3]),
                "focal_px": scenes.focal_px,
                "classes": {str(k): v for k, v in scenes.classes.items()},
                "things": [
                    scenes.classes[i] for i in Pairs(train, weights=weights, batch=2).things
                ],
                "scenes": len(train),
                "kinds": list(KINDS),
                "license": "not stated: see licences"
                if any(x["terms"] for x in ledger)
                else "Apache-2.0",
                "licences": ledger,
                "plan": {**vars(plan), "lr": lr, "batch": batch, "ema": ema, "seed": seed},
            },
        )
        _fit(module, stream, keeper, device)
        keeper.check(module)
        result = {
            "summary": f"tune: step {module.step + 1} of {steps}, {keeper.latest}",
            "step": module.step + 1,
            "steps": steps,
            "bad_steps": module.bad_steps,
            "minutes": round((time.monotonic() - began) / 60, 2),
            "validation": keeper.latest,
            "weights": str(folder / "generator.safetensors"),
        }
        (folder / "tune.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def ancestors(folder: Path, data: Sequence[str], init: str | None) -> list[dict[str, Any]]:
    """The licence ledger of the run, with that of its earlier slices from ``licences.json``.

    A start card without ``licences`` brings its ``license``; that of the shipped weights is ours.
    """
    kept = folder / LICENCES
    found = [read_ledger(json.loads(kept.read_text()))] if kept.exists() else []
    for labels in data:
        found.append(inherited(of_label_set(read_dataset(Path(labels))), images="training images"))
    if init:
        from teacher.generators.mini_generator import MiniGenerator

        card = MiniGenerator.from_pretrained(init).card
        found.append([entry("start weights", Path(init).name, card.get("license"))])
        found.append(read_ledger(card.get("licences")))
    return read_ledger(merged(*found))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the run folder's lock: two runs in one folder would overwrite each other's state."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"tune: another run is at work in {folder}; wait for it or choose another out"
            ) from None
        yield


def _check(batch: int, per_image: int, retention: float, weights: dict[str, float]) -> None:
    if batch < 1 or per_image < 1 or batch % per_image:
        raise UsageError(f"tune: batch={batch} must be a multiple of prompts_per_image={per_image}")
    if not 0 <= retention < 1:
        raise UsageError(f"tune: retention={retention} must lie in [0, 1)")
    strange = sorted(set(weights) - set(TASKS))
    if strange or not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise UsageError(f"tune: task_weights {weights} must be shares >= 0 of {list(TASKS)}")


def _module(
    network: dict[str, int] | None,
    init: str | None,
    plan: Plan,
    lr: float,
    warmup: int,
    decay: int,
    ema: float,
) -> TuneModule:
    from teacher.generators.mini_generator import MiniGenerator

    sizes = dict(network or {})
    start = None
    if init:
        source = MiniGenerator.from_pretrained(init)
        sizes, start = dict(source.card["network"]), source.net.state_dict()
    adapter = MiniAdapter(sizes)
    if start is not None:
        adapter.net.load_state_dict(start)
    return TuneModule(adapter, peak_lr=lr, warmup=warmup, steps=plan.steps, decay=decay, ema=ema,
                      average_from=plan.small_steps)  # fmt: skip


def resume(module: TuneModule, folder: Path) -> int:
    """Step to start at; weights and average are restored now, moments once Lightning has them."""
    if not (folder / "state.safetensors").exists():
        return 0
    return module.load_state(folder)


def _checks(back: Scenes, plan: Plan, seed: int) -> dict[str, tuple[Pairs, Pairs]]:
    small = back.halved()
    kinds = [k for k in plan.task_weights if plan.task_weights[k] > 0]

    def source(scenes: Scenes, kind: str) -> Pairs:
        count = min(16, len(scenes))
        return Pairs(scenes, weights={kind: 1.0}, batch=count, prompts_per_image=1,
                     single_step_share=1.0, colour_map_share=0.0, seed=seed + 1)  # fmt: skip

    return {k: (source(small, k), source(back, k)) for k in (*kinds, "generate")}


def _fit(module: TuneModule, stream: Stream, keeper: Keeper, device: str) -> None:
    if stream.start >= stream.plan.steps:
        return
    accelerator, _, index = device.partition(":")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # Lightning asks for loader workers and a length; one process and a stream are intended
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*`__len__`.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 on torch 2.11
        trainer = L.Trainer(
            max_epochs=1,
            accelerator={"cuda": "gpu"}.get(accelerator, accelerator),
            devices=[int(index)] if index else 1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Moments(keeper.out), keeper],
        )
        trainer.fit(module, DataLoader(stream, batch_size=None))
