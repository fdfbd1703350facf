"""Names of a user's own in plots: every letter is shown as it is."""

import inspect

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from pyro_nbvae.study import plots as plotting
from pyro_nbvae.study.plots import (
    Panel,
    plot_bias_and_noise,
    plot_curves,
    plot_dispersion,
    plot_images,
    plot_lines,
    plot_pairs,
    plot_recordings,
    plot_spikes,
)

X, UNITS = torch.rand(4, 1, 5, 5), (torch.ones(3), torch.arange(1.0, 4.0))
COUNTS = torch.arange(12).reshape(4, 3)
ROW = {"posterior": "p", "temperature": None, "bias": 1.0, "± bias": 0.1, "noise": 1.0}
PLOTS = {
    plot_images: lambda name, path: plot_images(X, path, title=name, columns=4, rows=[name]),
    plot_pairs: lambda name, path: plot_pairs(X, X, path, title=name),
    plot_lines: lambda name, path: plot_lines({name: X}, path, title=name),
    plot_recordings: lambda name, path: plot_recordings({name: X}, path, title=name),
    plot_dispersion: lambda name, path: plot_dispersion({name: UNITS}, path, title=name),
    plot_curves: lambda name, path: plot_curves([Panel({name: ([1, 2], [1, 2])}, "x", "y", "log")], path, title=name),
    plot_spikes: lambda name, path: plot_spikes({name: COUNTS}, path, title=name),
    plot_bias_and_noise: lambda name, path: plot_bias_and_noise([{**ROW, "case": name, "way": name}], path),
}
# how often a plot shows the name
NUMBER = {plot_pairs: 1, plot_spikes: 3}


def test_every_plot_is_tested_here():
    assert {f for name, f in inspect.getmembers(plotting, inspect.isfunction) if name.startswith("plot_")} == set(PLOTS)


@pytest.mark.parametrize(
    "name", ["$5", "a$b", "$x_1$", r"$\nothing{$", r"a\$b_{", "_hidden", "100 % ^2", "50$ and 60$"]
)
@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.__name__)
def test_names_are_shown_letter_by_letter(plot, name, tmp_path, monkeypatch):
    """What matplotlib draws is what its own parser leaves of each text, which must be plain and equal to the name."""
    shown, parse = [], Text._preprocess_math

    def seen(self, text):
        result = parse(self, text)
        shown.append((self, result))
        return result

    monkeypatch.setattr(Text, "_preprocess_math", seen)
    PLOTS[plot](name, tmp_path / "plot.png")
    texts = {of for of, (text, math) in shown if name in text.splitlines() and not math}
    assert len(texts) == NUMBER.get(plot, 2)


def test_images_are_drawn_between_the_limits(tmp_path, monkeypatch):
    """Of three images of one value each, the darkest is black, the lightest white, and the middle grey."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self.axes[0].images[0].get_array()))
    x = torch.tensor([-1.0, 1.0, 3.0, 9.0]).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
    plot_images(x, tmp_path / "a.png", title="x", limits=(-1.0, 3.0))
    plot_images(x[:3], tmp_path / "a.png", title="x")
    plot_pairs(x, x, tmp_path / "a.png", title="x", limits=(-1.0, 3.0))
    for array in drawn:
        values = np.unique(np.asarray(array))
        np.testing.assert_allclose(values, [0, 0.5, 1])
    assert drawn[0][1, 1, 0] == 0 and drawn[0][4, 4, 0] == 1  # the first and the last, which is clamped
