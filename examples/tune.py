"""Search for a learning rate, a number of latents and a prior with Optuna, which stops bad trials early.

Every trial is a run folder of its own. Its objective is the ELBO on a tenth of the training data, never on held-out
data; the search is saved after each trial, and the same command continues it. It needs Optuna:

    pip install optuna
    python -m examples.tune --data digits --trials 20
"""

from pathlib import Path

import optuna
import tyro

from pyro_nbvae.study.config import configure
from pyro_nbvae.study.training import train


def objective(trial, data, epochs, out):
    """Train one trial and return its best ELBO on the tenth of the training data that it does not see."""
    config = configure(
        trial.suggest_categorical("variant", ["CMP", "P-VAE"]),
        data=data,
        epochs=epochs,
        validate=True,
        lr=trial.suggest_float("lr", 3e-4, 1e-2, log=True),
        latents=trial.suggest_categorical("latents", [16, 32, 64]),
        prior_lr_multiplier=trial.suggest_float("prior_lr_multiplier", 1, 100, log=True),
    )

    def stop_if_bad(row):
        trial.report(row["validation_elbo"], row["epoch"])
        if trial.should_prune():
            raise optuna.TrialPruned

    run = train(config, out / f"trial-{trial.number}", resume=True, progress=False, on_epoch=stop_if_bad)
    return run.read_checkpoint()["best"]["validation_elbo"]


def main(data: str = "digits", trials: int = 20, epochs: int = 20, out: Path = Path("runs/examples/tune")) -> None:
    """Run trials and print the best configuration.

    Args:
        data: a data set, as for nbvae train.
        trials: number of trials.
        epochs: number of epochs of a trial that is not stopped.
        out: folder of the run folders and of the saved search.
    """
    out.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{out / 'search.db'}",
        study_name=data,
        load_if_exists=True,
        direction="maximize",
        # the KL weight rises during the first tenth of the epochs: bounds before that say little
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=epochs // 4),
    )
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))  # goes on, and does not repeat
    study.optimize(lambda trial: objective(trial, data, epochs, out), n_trials=trials, show_progress_bar=True)
    stopped = sum(trial.state == optuna.trial.TrialState.PRUNED for trial in study.trials)
    print(f"{len(study.trials)} trials, {stopped} stopped early")
    print(f"best: {study.best_value:.1f} nats in {out / f'trial-{study.best_trial.number}'} with {study.best_params}")


if __name__ == "__main__":
    tyro.cli(main)
