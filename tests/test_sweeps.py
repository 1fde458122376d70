"""The examples of docs/training.md: Hydra's multirun, and Optuna."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from analytic_scenes import write_analytic_set

from distill.module import Diverged
from teacher.errors import UsageError

ROOT = Path(__file__).parents[1]
TINY = [
    "student.backbone=test_efficientnet", "student.height=32", "student.width=64",
    "student.decoder_channels=16", "trainer.steps=2", "trainer.batch_size=4", "trainer.device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sets") / "analytic"
    write_analytic_set(out, n=12, height=32, width=48)
    return out


@pytest.mark.slow
def test_multirun_trains_one_student_per_value(labels, tmp_path):
    sweep = ["--multirun", f"data={labels}", "out=runs/lr-${trainer.lr}", "trainer.lr=0.001,0.002"]
    subprocess.run(
        [sys.executable, "-m", "distill.cli", "train", *sweep, *TINY], cwd=tmp_path, check=True
    )
    for rate in ("0.001", "0.002"):
        about = json.loads((tmp_path / "runs" / f"lr-{rate}" / "train.json").read_text())
        assert about["trainer"]["lr"] == float(rate) and about["result"]["steps"] == 2


@pytest.mark.slow
def test_optuna_searches_and_goes_on(labels, tmp_path, monkeypatch):
    pytest.importorskip("optuna", reason="optuna is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "examples"))
    from optuna_search import main

    arguments = [f"data={labels}", f"out={tmp_path}/search", *TINY]
    assert len(main(["trials=2", *arguments]).trials) == 2
    assert len(main(["trials=2", *arguments]).trials) == 2  # that many there are already
    study = main(["trials=3", *arguments])
    assert len(study.trials) == 3 and study.best_value > 0
    assert (tmp_path / "search" / "trial-2" / "student.safetensors").is_file()


def test_a_mistake_uses_up_no_trial_and_all_may_diverge(tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna", reason="optuna is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "examples"))
    import optuna_search

    def raising(error):
        def run(*_):
            raise error

        return run

    arguments = ["trials=2", f"out={tmp_path}/search"]
    monkeypatch.setattr(optuna_search, "run_verb", raising(UsageError("no such folder")))
    for _ in range(3):
        with pytest.raises(UsageError, match="no such folder"):
            optuna_search.main(arguments)
    monkeypatch.setattr(optuna_search, "run_verb", raising(Diverged("nan")))
    study = optuna_search.main(arguments)
    assert optuna_search.finished(study) == 2 and len(study.trials) == 5
    assert "none of 2 trials came to an end: all diverged" in capsys.readouterr().out
    monkeypatch.setattr(optuna_search, "run_verb", lambda *_: pytest.fail("a third trial"))
    optuna_search.main(arguments)


def test_a_search_without_held_out_images_says_what_is_missing(tmp_path, monkeypatch):
    pytest.importorskip("optuna", reason="optuna is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "examples"))
    import optuna_search

    monkeypatch.setattr(optuna_search, "run_verb", lambda *_: {"objective": None})
    with pytest.raises(UsageError, match=r"val_share=0: found no held-out image.* give trainer\."):
        optuna_search.main(["trials=1", f"out={tmp_path}/search", "trainer.val_share=0"])
