"""Search a student's learning rate, decay and augmentation with Optuna.

    pip install optuna
    python docs/examples/optuna_search.py trials=20 data=labels/x out=runs/search trainer.steps=2000

Every trial is a `distill train` run in ``OUT/trial-NUMBER``; the held-out loss decides. Further
arguments are overrides of `distill train`. The study is kept in ``OUT/study.db``: the same command
goes on with it, to as many finished trials as it says in all, and several processes may share it. A
trial that diverges counts as failed, and as finished.
"""

import sys
from pathlib import Path

import optuna
from optuna.trial import TrialState

from distill.cli import run_verb
from distill.module import Diverged
from teacher.errors import UsageError


def main(arguments: list[str]) -> optuna.Study:
    """Run the trials; returns the study."""
    options = dict(a.split("=", 1) for a in arguments)
    trials, out = int(options.pop("trials", "20")), Path(options.pop("out"))
    out.mkdir(parents=True, exist_ok=True)

    def objective(trial: optuna.Trial) -> float:
        chosen = {
            "trainer.lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True),
            "trainer.weight_decay": trial.suggest_float("weight_decay", 1e-4, 0.1, log=True),
            "trainer.augment": trial.suggest_categorical("augment", ["strong", "geometry", "none"]),
            "out": out / f"trial-{trial.number}",
        }
        overrides = [f"{k}={v}" for k, v in (options | chosen).items()]
        try:
            loss = run_verb("train", overrides)["objective"]
        except Diverged:
            trial.set_user_attr("diverged", True)
            raise
        if loss is None:
            raise UsageError(
                f"trainer.val_share={options.get('trainer.val_share')}: found no held-out image, "
                "expected some, for their loss decides; give trainer.val_share=0.05."
            )
        return float(loss)

    study = optuna.create_study(
        study_name="distill", storage=f"sqlite:///{out}/study.db", load_if_exists=True
    )
    while finished(study) < trials:  # by all processes together
        study.optimize(objective, n_trials=1, catch=(Diverged,))
    if study.get_trials(states=[TrialState.COMPLETE]):
        print(f"best of {finished(study)}: {study.best_value:.4f} with {study.best_params}")
    else:
        print(f"none of {finished(study)} trials came to an end: all diverged")
    return study


def finished(study: optuna.Study) -> int:
    """Trials that came to an end or diverged; not those that a mistake or a kill ended."""
    return sum(
        t.state is TrialState.COMPLETE or "diverged" in t.user_attrs
        for t in study.get_trials(deepcopy=False)
    )


if __name__ == "__main__":
    main(sys.argv[1:])
