"""Counts of a recording: likelihoods with and without latents, and what else is used, on held-out trials and neurons.

    python -m experiments.spikes RECORDING.npz --labels orientation

The file is one of ``nbvae train --data``: counts (trials, bins, neurons), and a label of each trial. Trials are divided
into five folds, stratified by label; a quarter of the neurons is held out from all encoders. Tables are written to
results/spikes.md; the fits are kept in --out, and a run that is killed goes on where it was. Several processes may run
at once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
import tyro
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from pyro_nbvae import likelihoods
from pyro_nbvae.batching import Recording
from pyro_nbvae.distributions.elementwise import double
from pyro_nbvae.errors import InputError
from pyro_nbvae.guides import ConwayMaxwellPoissonGuide, GaussianGuide, PoissonGuide
from pyro_nbvae.infer import AnalyticKL_ELBO
from pyro_nbvae.likelihoods import fit_dispersion
from pyro_nbvae.metrics import (
    Score,
    bits_per_spike,
    co_smoothing,
    compare_likelihoods,
    condition_rates,
    held_out,
    leave_one_out_rates,
    nlb_bits,
    null_rates,
    poisson_log_mass,
)
from pyro_nbvae.models import NegativeBinomialModel, PoissonModel, ScaledGaussianModel
from pyro_nbvae.networks.initialization import Encoder
from pyro_nbvae.networks.outputs import CountOutput, Decoder
from pyro_nbvae.study.commandline import script
from pyro_nbvae.study.data.arrays import fold_of, read_npz
from pyro_nbvae.study.errors import check_member
from pyro_nbvae.study.files import write_atomically, write_text
from pyro_nbvae.study.tree import Reading

LIKELIHOODS: dict[str, Callable[[], likelihoods.CountLikelihood]] = {
    "Poisson": likelihoods.Poisson,
    "NB": likelihoods.NegativeBinomial,
    "COM-Poisson": likelihoods.ConwayMaxwellPoisson,
}
LATENTS: dict[str, tuple[Any, Any]] = {
    "CMP": (NegativeBinomialModel, ConwayMaxwellPoissonGuide),
    "P-VAE": (PoissonModel, PoissonGuide),
    "GS-VAE": (ScaledGaussianModel, GaussianGuide),
}
FOLDS, HELD_OUT_NEURONS, SEEDS = 5, 0.25, (0, 1, 2)
UNITS, HIDDEN, BATCH = 32, 256, 40
# The same budget for every model: rates and dropouts, of which an inner fold chooses one, and the number of steps.
RATES, DROPOUTS, MOST_STEPS, EVERY, WARMUP = (5e-4, 2e-3), (0.3, 0.6), 1200, 60, 100
PATIENCE, TUNING_SAMPLES, SAMPLES, IMPORTANCE_SAMPLES = 4, 20, 200, 300
COMPONENTS = (4, 8, 12, 16)


class SmallEncoder(Encoder):
    """A linear encoder of log counts with dropout; counts are centred and not scaled, so that rare spikes weigh little.

    Args:
        dropout: probability with which a neuron is absent in training.
        *arguments, **options: as :class:`~pyro_nbvae.networks.initialization.Encoder`.
    """

    def __init__(self, dropout: float, *arguments: Any, **options: Any) -> None:
        self.dropout = dropout
        super().__init__(*arguments, **options)

    def build_features(self, event_shape: tuple[int, ...]) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(self.dropout))

    def _featured(self, x: Tensor, *given: Tensor | None) -> Tensor:
        mask, exposure, covariates = given
        deviation = self.inputs.deviation
        h = self.features(self.inputs(x, mask, exposure) * deviation / deviation.square().mean().sqrt())
        return h if covariates is None else torch.cat([h, covariates], -1)


class SmallDecoder(Decoder):
    """A dense layer with dropout and one to all counts."""

    def __init__(self, event_shape: tuple[int, ...], inputs: int, dropout: float) -> None:
        super().__init__(CountOutput(event_shape))
        self.layers = nn.Sequential(
            nn.Linear(inputs, HIDDEN),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(HIDDEN, math.prod(event_shape)),
            nn.Unflatten(1, event_shape),
        )


@dataclass(frozen=True)
class Trials:
    """The data of one fold.

    Args:
        train, test: recordings, with the label as one-hot covariates.
        train_labels, test_labels: labels.
        reads: the neurons that encoders read, bool (neurons,).
    """

    train: Recording
    test: Recording
    train_labels: Tensor
    test_labels: Tensor
    reads: Tensor

    @property
    def null(self) -> Tensor:
        """Rates of the null."""
        return null_rates(self.train)


@dataclass(frozen=True)
class Setting:
    """What is fitted: a likelihood, latents, and whether the model is given the stimulus."""

    likelihood: str
    latents: str
    stimulus: bool

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.likelihood}_{self.latents}{'_stimulus' * self.stimulus}"


SETTINGS = [Setting(likelihood, latents, False) for latents in LATENTS for likelihood in LIKELIHOODS]
SETTINGS += [Setting(likelihood, "CMP", True) for likelihood in LIKELIHOODS]
Pair = tuple[Any, Any]
Features = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def fit(
    setting: Setting,
    data: Trials,
    rate: float,
    dropout: float,
    seed: int,
    steps: int,
    watch: Callable[[int, Pair], bool],
) -> Pair:
    """Train a pair; ``watch`` is called every ``EVERY`` steps and ends the training by returning False."""
    pyro.set_rng_seed(seed)
    train = data.train if setting.stimulus else Recording(data.train.x)
    shape, conditions = tuple(train.event_shape), train.given["covariates"].shape[1] if setting.stimulus else 0
    make_model, make_guide = LATENTS[setting.latents]
    likelihood = LIKELIHOODS[setting.likelihood]()
    decoder = SmallDecoder(shape, UNITS + conditions, dropout)
    model = make_model(shape, UNITS, decoder=decoder, likelihood=likelihood, covariates=conditions)
    scale = 0.5 if setting.latents == "CMP" else 1.0
    encoder = SmallEncoder(dropout, shape, UNITS, make_guide.heads, scale, True, conditions)
    guide = make_guide(model, encoder=encoder, reads=data.reads.expand(shape).clone())
    model.initialize(train)
    guide.initialize(train)
    prior = [*model.prior.parameters(), *model.likelihood.parameters()]
    own = {id(p) for p in prior}
    networks = [p for part in (model, guide) for p in part.parameters() if id(p) not in own]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(dict.fromkeys(networks)), "weight_decay": 0.1},
            {"params": prior, "lr": 10 * rate, "weight_decay": 0.0},
        ],
        lr=rate,
    )
    elbo = AnalyticKL_ELBO()
    for step in range(1, steps + 1):
        model.train()
        guide.train()
        elbo.kl_weight = min(1.0, step / WARMUP)
        batch = train[torch.randint(len(train), (BATCH,))]
        optimizer.zero_grad()
        loss = elbo.differentiable_loss(model, guide, batch.x, **batch.given) / BATCH
        loss.backward()
        nn.utils.clip_grad_norm_(networks, 250.0)
        optimizer.step()
        if step % EVERY == 0 and not watch(step, (model, guide)):
            break
    return model, guide


def tuned(setting: Setting, data: Trials) -> dict[str, float]:
    """Return the rate, the dropout and the number of steps that are best on an inner fold of the training trials."""
    inner = torch.from_numpy(fold_of(len(data.train), Reading(folds=FOLDS), data.train_labels.numpy())) == 0
    labels = data.train_labels
    inside = Trials(data.train[~inner], data.train[inner], labels[~inner], labels[inner], data.reads)
    null, test = inside.null, inside.test if setting.stimulus else Recording(inside.test.x)
    best: dict[str, float] = {"bits": -math.inf}
    for rate in RATES:
        for dropout in DROPOUTS:
            found: list[float] = []

            def watch(step: int, pair: Pair, found: list[float] = found) -> bool:
                found.append(co_smoothing(*pair, test, null, samples=TUNING_SAMPLES)[0].bits)
                return len(found) - 1 - int(np.argmax(found)) < PATIENCE

            fit(setting, inside, rate, dropout, 0, MOST_STEPS, watch)
            if max(found) > best["bits"]:
                steps = EVERY * (1 + int(np.argmax(found)))
                best = {"bits": max(found), "rate": rate, "dropout": dropout, "steps": steps}
    return best


def scored(setting: Setting, data: Trials, chosen: dict[str, float], seed: int) -> dict[str, Any]:
    """Train a pair as chosen and return its scores on held-out trials."""
    # as many epochs as in the inner fold, which has fewer trials
    steps = round(chosen["steps"] * FOLDS / (FOLDS - 1))
    pair = fit(setting, data, chosen["rate"], chosen["dropout"], seed, steps, lambda step, pair: True)
    test = data.test if setting.stimulus else Recording(data.test.x)
    score, rates = co_smoothing(*pair, test, data.null, samples=SAMPLES, seed=seed)
    bits = bits_per_spike(*pair, test, data.null, samples=IMPORTANCE_SAMPLES, seed=seed)
    found = held_out(*pair, test, seed=seed)
    assert found.collapsed_units is not None
    return {
        "co_nats": score.nats,
        "co_spikes": score.spikes,
        "nlb": nlb_bits(rates[..., ~data.reads], data.test.x[..., ~data.reads]),
        "nats": bits.nats,
        "spikes": bits.spikes,
        "active": UNITS - found.collapsed_units,
    }


# --- what else is used ------------------------------------------------------------------------------------------------


def by_regression(
    data: Trials, features: Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
) -> Any:
    """Return rates of held-out neurons on training and held-out trials: a Poisson regression on features.

    The number of features and the penalty are those that are best on an inner fold.

    Args:
        data: the trials.
        features: maps held-in counts, training and held-out, and a number to features of both.
    """
    from sklearn.linear_model import PoissonRegressor

    out = ~data.reads
    train, test = (np.asarray(x.x.flatten(1, -2).sum(1) if x.x.dim() == 3 else x.x) for x in (data.train, data.test))
    inner = fold_of(len(train), Reading(folds=FOLDS), data.train_labels.numpy()) == 0

    def predicted(fitted: np.ndarray, asked: np.ndarray, number: int, alpha: float) -> list[np.ndarray]:
        a, b = features(fitted[:, data.reads], asked[:, data.reads], number)
        scale = a.std(0).max()
        each = [PoissonRegressor(alpha=alpha, max_iter=300).fit(a / scale, y) for y in fitted[:, out].T]
        return [np.stack([r.predict(part / scale) for r in each], 1) for part in (a, b)]

    def log_mass(rates: np.ndarray, counts: np.ndarray) -> float:
        return float(poisson_log_mass(torch.from_numpy(counts), torch.from_numpy(rates).clamp_min(1e-4)).sum())

    choices = [(number, alpha) for number in COMPONENTS for alpha in (0.01, 0.03, 0.1)]
    best = max(choices, key=lambda c: log_mass(predicted(train[~inner], train[inner], *c)[1], train[inner][:, out]))
    # rates of training trials, to which dispersions are fitted, are those of regressions on the other trials
    fold = fold_of(len(train), Reading(folds=FOLDS), data.train_labels.numpy())
    of_train = np.empty_like(train[:, out], dtype=np.float64)
    for k in range(FOLDS):
        of_train[fold == k] = predicted(train[fold != k], train[fold == k], *best)[1]
    return [torch.from_numpy(rates).clamp_min(1e-4) for rates in (of_train, predicted(train, test, *best)[1])]


def _decomposed(kind: str) -> Features:
    from sklearn.decomposition import NMF, PCA, FactorAnalysis

    def features(train: np.ndarray, test: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
        model: Any
        if kind == "NMF":
            model = NMF(number, beta_loss="kullback-leibler", solver="mu", init="nndsvda", max_iter=500, random_state=0)
            return model.fit_transform(train), model.transform(test)
        model = PCA(number, random_state=0) if kind == "PCA" else FactorAnalysis(number, random_state=0)
        return model.fit(np.sqrt(train)).transform(np.sqrt(train)), model.transform(np.sqrt(test))

    return features


def _by_stimulus(data: Trials) -> list[Tensor]:
    train, labels = Recording(data.train.x), data.train_labels
    rates = leave_one_out_rates(train, labels), condition_rates(train, labels, data.test_labels)
    return [r[..., ~data.reads] for r in rates]


_MEANS = "means by stimulus"
BASELINES: dict[str, Callable[[Trials], list[Tensor]]] = {
    _MEANS: _by_stimulus,
    "PCA + Poisson GLM": lambda data: by_regression(data, _decomposed("PCA")),
    "FactorAnalysis + Poisson GLM": lambda data: by_regression(data, _decomposed("FA")),
    "KL-NMF + Poisson GLM": lambda data: by_regression(data, _decomposed("NMF")),
}


def of_rates(data: Trials, rates: list[Tensor]) -> dict[str, Any]:
    """Return co-smoothing scores of rates under each likelihood, with a dispersion of each neuron on top of them."""
    out = ~data.reads
    counts = [double(x.x[..., out]) for x in (data.train, data.test)]
    of_null = poisson_log_mass(counts[1], data.null[..., out])
    found: dict[str, Any] = {"co_spikes": counts[1], "nlb": nlb_bits(rates[1], counts[1])}
    for name, make in LIKELIHOODS.items():
        likelihood = make()
        if name == "Poisson":
            nats = poisson_log_mass(counts[1], rates[1])
        else:
            a = fit_dispersion(likelihood, counts[0], rates[0])
            nats = likelihood.of_mean(rates[1], a).log_prob(counts[1])
        found[name] = nats - of_null
    return found


# --- the tables -------------------------------------------------------------------------------------------------------


def folds_of(counts: Tensor, labels: Tensor) -> Iterator[Trials]:
    """Iterate over the folds."""
    number = counts.shape[-1]
    reads = torch.ones(number, dtype=torch.bool)
    reads[torch.randperm(number, generator=torch.Generator().manual_seed(0))[: round(HELD_OUT_NEURONS * number)]] = (
        False
    )
    fold = torch.from_numpy(fold_of(len(counts), Reading(folds=FOLDS), labels.numpy()))
    covariates = one_hot(labels).float()
    for k in range(FOLDS):
        test = fold == k
        train, held = (Recording(counts[where], covariates=covariates[where]) for where in (~test, test))
        yield Trials(train, held, labels[~test], labels[test], reads)


def _of_setting(setting: Setting, data: Trials, path: Path, seed: int) -> dict[str, Any]:
    if not path.exists():
        write_text(path, json.dumps(tuned(setting, data)))
    return scored(setting, data, json.loads(path.read_text()), seed)


def cells(counts: Tensor, labels: Tensor, out: Path) -> Iterator[tuple[Path, Callable[[], dict[str, Any]]]]:
    """Iterate over what is fitted: the file of each result, and the function that computes it."""
    folds = list(folds_of(counts, labels))
    for name, baseline in BASELINES.items():
        for k, data in enumerate(folds):
            yield out / f"{name}_{k}.pt", partial(lambda data, of: of_rates(data, of(data)), data, baseline)
    for seed, setting in itertools.product(SEEDS, SETTINGS):  # every setting with one seed first
        for k, data in enumerate(folds):
            path = out / f"{setting.name}_{k}"
            compute = partial(_of_setting, setting, data, path.with_suffix(".json"), seed)
            yield out / f"{setting.name}_{k}_{seed}.pt", compute


def run(counts: Tensor, labels: Tensor, out: Path) -> None:
    """Compute the results that are missing; other processes may do the same."""
    out.mkdir(parents=True, exist_ok=True)
    for path, compute in tqdm(list(cells(counts, labels, out)), desc="fits"):
        # one process for a setting and fold, since its seeds share what was tuned
        lock = FileLock(path.with_name(path.stem.rsplit("_", 1)[0] + ".lock"), blocking=False)
        try:
            with lock:
                if not path.exists():
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # of scikit-learn, that it has not converged
                        found = compute()
                    write_atomically(path, lambda file, found=found: torch.save(found, file))  # type: ignore[misc]
        except Timeout:
            continue


def _read(out: Path, name: str, folds: int) -> list[list[dict[str, Any]]]:
    """Return the results of a setting or a baseline: of each fold, those of its seeds; empty unless all are there."""
    found = []
    for k in range(folds):
        paths = sorted(out.glob(f"{name}_{k}_[0-9].pt")) or sorted(out.glob(f"{name}_{k}.pt"))
        found.append([torch.load(path, weights_only=True) for path in paths])
    return found if all(found) else []


def _pooled(results: list[list[dict[str, Any]]], nats: str, spikes: str) -> Score:
    """Return the score of all folds, averaged over seeds."""
    each = [Score(torch.stack([r[nats] for r in seeds]).mean(0), seeds[0][spikes].double()) for seeds in results]
    return Score.pooled(each)


def _plain(score: Score) -> str:
    return f"{score.bits:.4f} ± {score.over_trials:.4f}"


def _paired(score: Score) -> str:
    return f"{score.bits:+.4f} ± {score.over_trials:.4f} ({score.over_neurons:.4f})"


def without_latents(counts: Tensor, labels: Tensor) -> str:
    """Return the table of likelihoods without latents: means by stimulus, random folds and the last trials."""
    rows = []
    number = len(counts)
    for what, split, folds in (
        ("five random folds", "random", range(FOLDS)),
        ("last fifth of each stimulus", "blocks", [FOLDS - 1]),
    ):
        fold = torch.from_numpy(fold_of(number, Reading(folds=FOLDS, split=split), labels.numpy()))  # type: ignore[arg-type]
        for shared in (False, True):
            scores = compare_likelihoods(counts, labels, [fold == k for k in folds], shared=shared)
            lead = scores["com_poisson"] - scores["negative_binomial"]
            rows.append(
                {
                    "held out": what,
                    "dispersion": "shared" if shared else "by neuron",
                    "NB": _plain(scores["negative_binomial"]),
                    "COM-Poisson": _plain(scores["com_poisson"]),
                    "COM-Poisson minus NB (over neurons)": _paired(lead),
                }
            )
    return markdown(rows)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return rows as a table."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def of_models(out: Path, stimulus: bool) -> tuple[str, dict[str, Score]]:
    """Return the table of models, and baselines, that know the stimulus or not, and the co-smoothing scores."""
    rows, scores = [], {}
    groups: dict[str, tuple[Callable[[str], str], str | None]]
    groups = {latents: (_of_setting_name(latents, stimulus), "co_nats") for latents in LATENTS}
    groups |= {name: (_always(name), None) for name in BASELINES if (name == _MEANS) == stimulus}
    for group, (file, key) in groups.items():
        own: list[Score] = []
        for likelihood in LIKELIHOODS:
            results = _read(out, file(likelihood), FOLDS)
            if not results:
                continue
            score = _pooled(results, key or likelihood, "co_spikes")
            each = [r for seeds in results for r in seeds]
            scores[f"{likelihood}, {group}"] = score
            rows.append(
                {
                    "likelihood, latents": f"{likelihood}, {group}",
                    "co-smoothing": _plain(score),
                    "minus those above (over neurons)": "; ".join(_paired(score - other) for other in own) or "-",
                    "whole trials": _plain(_pooled(results, "nats", "spikes")) if key else "-",
                    "NLB": f"{np.mean([r['nlb'] for r in each]):.4f}",
                    "active units": f"{np.mean([r['active'] for r in each]):.1f}" if key else "-",
                    "seeds": min(map(len, results)) if key else "-",
                }
            )
            own.append(score)
    return (markdown(rows) if rows else "no finished fits"), scores


def _always(name: str) -> Callable[[str], str]:
    return lambda likelihood: name


def _of_setting_name(latents: str, stimulus: bool) -> Callable[[str], str]:
    return lambda likelihood: Setting(likelihood, latents, stimulus).name


def draw(scores: dict[str, Score], path: Path) -> Path:
    """Draw the co-smoothing scores by likelihood."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    kinds = list(dict.fromkeys(name.partition(", ")[2] for name in scores))
    for k, likelihood in enumerate(LIKELIHOODS):
        named = [(at, f"{likelihood}, {kind}") for at, kind in enumerate(kinds)]
        there = [(at, scores[name]) for at, name in named if name in scores]
        x = [at + 0.2 * (k - 1) for at, _ in there]
        y, error = [s.bits for _, s in there], [s.over_trials for _, s in there]
        axes.errorbar(x, y, yerr=error, fmt="o", capsize=3, label=f"{likelihood} likelihood")
    axes.set_xticks(range(len(kinds)), [kind.replace(" + ", "\n+ ") for kind in kinds], fontsize=9)
    axes.set_ylabel("co-smoothing, bits per spike")
    axes.legend(frameon=False)
    axes.grid(axis="y", alpha=0.3)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
    return path


def report(counts: Tensor, labels: Tensor, out: Path, results: Path, picture: Path, name: str) -> str:
    """Write the tables of the finished fits, and the plot."""
    known, _ = of_models(out, True)
    unknown, scores = of_models(out, False)
    neurons, bins = counts.shape[-1], counts.shape[1] if counts.dim() == 3 else 1
    hidden = round(HELD_OUT_NEURONS * neurons)
    text = f"""`{name}`: {len(counts)} trials, {bins} bins, {neurons} neurons, {len(labels.unique())} stimuli.
Bits per spike ± the standard error over trials (in brackets, over neurons), pooled over {FOLDS} folds and averaged over
seeds.

Likelihoods without latents, over a Poisson: means by stimulus, dispersions by neuron or shared.

{without_latents(counts, labels)}

Models that do not know the stimulus. Co-smoothing: {hidden} neurons that encoders do not read, relative to a Poisson at
training means. Whole trials: bound with {IMPORTANCE_SAMPLES} samples, relative to the same.

{unknown}

Models that know the stimulus.

{known}
"""
    write_text(results, text)
    draw(scores, picture)
    return text


def check_data(counts: Tensor, labels: Tensor, out: Path) -> None:
    """Raise InputError if a folder has the fits of other counts or labels; if it is new, say whose they will be."""
    digest = hashlib.sha256(repr(tuple(counts.shape)).encode() + counts.numpy().tobytes() + labels.numpy().tobytes())
    path = out / "data.txt"
    if not path.exists() and any(out.glob("*.pt")):
        raise InputError(f"{out} has fits of data that are not known: choose another --out")
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, digest.hexdigest())
    elif path.read_text() != digest.hexdigest():
        raise InputError(f"{out} has the fits of other counts, labels or bins: choose another --out")


def main(
    recording: tyro.conf.Positional[Path],
    labels: str = "labels",
    out: Path = Path("runs/spikes"),
    results: Path = Path("results/spikes.md"),
    picture: Path = Path("docs/spikes.png"),
    summed: bool = True,
    fits: bool = True,
) -> None:
    """Fit and score.

    Args:
        recording: a .npz file with counts and labels.
        labels: name of the labels in it.
        out: folder of the fits.
        results: the page of the tables.
        picture: the plot of the scores.
        summed: sum the counts over the bins of a trial.
        fits: make the fits that are missing; without, write the tables of what is there.
    """
    arrays = read_npz(recording)
    for name in ("counts", labels):
        check_member(f"array of {recording}", name, arrays)
    for name in ("mask", "exposure", "covariates", "trial"):
        if name in arrays:
            raise InputError(f"{recording} has the array {name}, which is not used here: nbvae train uses it")
    counts = torch.from_numpy(arrays["counts"].astype(np.float32))
    counts = counts.sum(1) if summed and counts.dim() == 3 else counts
    codes = torch.from_numpy(np.unique(arrays[labels], return_inverse=True)[1])
    torch.set_num_threads(1)
    check_data(counts, codes, out)
    if fits:
        run(counts, codes, out)
    print(report(counts, codes, out, results, picture, recording.name))


if __name__ == "__main__":
    script(main)
