"""Command lines: a flag with any value is taken as that value, or refused in a message that names it."""

import pytest
from hypothesis import example, given, note
from hypothesis import strategies as st

from pyro_nbvae.study import training
from pyro_nbvae.study.cli import COMMANDS
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.folder import Run
from pyro_nbvae.study.tree import options
from pyro_nbvae.study.variants import VARIANTS

from .common import call, check_refused, share

ODD = ["", " ", "-", "--", "None", "[1]", "1,5", "0x1", "1 2", "%s", "\x00", "~nobody-here/x.npy", "A" * 3000, "1e400"]
NUMBERS = st.integers().map(str) | st.floats().map(str) | st.integers(-1, 2).map(str)
TEXT = st.text(st.characters(exclude_characters="/"))  # which may be the folder of everything
VALUES = st.sampled_from(ODD) | NUMBERS | TEXT
DEFAULTS = {"preset": "default", "nonsense": 1} | {
    k: v for name in VARIANTS for k, v in options(configure(name)).items()
}
FLAGS = st.sampled_from(sorted(DEFAULTS.keys() - {"loss", "shared_dispersion"}))


@pytest.fixture(scope="module")
def empty(new_folder):
    """The working folder, in which nothing may be written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := new_folder())
        yield folder


def flag(name, value, joined):
    name = f"--{name.replace('_', '-')}"
    return [f"{name}={value}"] if joined else [name, value]


def check(empty, names, words):
    """Run a command: it works, or it is refused in a message with one of these names; nothing is written."""
    code, out, err = call(*words)
    note(err)
    if code:
        check_refused(code, err)
        plain, *known = (" ".join(text.replace("-", "_").split()) for text in (err, *names))
        assert any(name in plain for name in known)
    assert not list(empty.iterdir())
    return code == 0 and "usage" not in out


@share(250)
@given(st.sampled_from(sorted(VARIANTS)), FLAGS, VALUES, st.booleans())
def test_flags_of_train(empty, variant, name, value, joined):
    trained, switch = [], isinstance(DEFAULTS[name], bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train", lambda config, out, resume: trained.append(config) or Run(out))
        if check(
            empty,
            [name, *([value] * switch)],
            ["train", "--out", "run", "--variant", variant, *flag(name, value, joined)],
        ):
            found = options(trained[0]).get(name)
            assert found is True if switch else name == "preset" or str(found) == value or found == float(value)


COMMAND_FLAGS = {
    "evaluate": "samples importance-samples seed sampler features device data",
    "generate": "count seed sampler device",
    "reconstruct": "count seed input device data",
}
# values that take no time: numbers are small or out of range
QUICK = st.sampled_from(ODD) | st.integers(-3, 3).map(str) | st.integers(min_value=10**12).map(str) | TEXT


@share(150)
@given(
    st.sampled_from([(c, name) for c, names in COMMAND_FLAGS.items() for name in names.split()]), QUICK, st.booleans()
)
def test_flags_of_commands_on_runs(trained, empty, new_folder, command, value, joined):
    command, name = command
    check(empty, [name, value, "data"], [command, new_folder(trained), *flag(name, value, joined)])


WORDS = st.sampled_from([*COMMANDS, "train", "check", "--import", "--version", "--help", "--out", "main"])


@share(60)
@example([])
@given(st.lists(WORDS | VALUES, max_size=4))
def test_words(empty, words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train", lambda config, out, resume: Run(out))
        patch.setattr("pyro_nbvae.study.report.reproduce", lambda table, options: "")
        check(empty, [""], words)
