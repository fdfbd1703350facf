"""What all attacks share: how many cases each has, the command, what a refusal is, and how a file is damaged."""

import contextlib
import io
import json

from hypothesis import settings
from hypothesis import strategies as st

from pyro_nbvae.study.cli import main

# A run of a second.
TINY = [
    *("--data", "digits", "--latents", "4", "--encoder", "linear", "--decoder", "linear"),
    *("--epochs", "2", "--train-size", "100", "--batch-size", "50", "--variant", "EX-I"),
]
# What a message must not say: the words of a programming language.
PYTHON = ("NoneType", "<class", "Got errors", "type matching", "object at 0x", "Errno", "literal for int")


def share(number):
    """Settings of a test that has this many of the 2,000 cases; other profiles than "attack" have as large a part."""
    return settings(max_examples=max(1, number * settings.default.max_examples // 2000))


def call(*arguments):
    """Exit code, output and errors of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(a) for a in arguments])
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def check_refused(code, err):
    """A refusal is code 2 and the parser's box, or a plain message: one line, or one for each place in a tree."""
    assert code == 2 and "Traceback" not in err
    err = err.rpartition("\r")[2]  # a progress bar that was wiped away
    if "For full helptext" not in err:
        check_message(err.removeprefix("nbvae: ").removesuffix("\n"))
        assert err.startswith("nbvae: ")


def check_message(text):
    first, *others = str(text).splitlines()
    assert first and all(": " in line for line in others)
    assert not [word for word in PYTHON if word in str(text)]


def same(*trees):
    """Equal as JSON, in which a boolean is no number and a whole number is the float of its value."""
    texts = {json.dumps(json.loads(json.dumps(tree), parse_int=float), sort_keys=True) for tree in trees}
    return len(texts) == 1


# A place in a file (from its beginning or its end) and bytes to write there; without any the file ends there.
damages = st.tuples(st.integers(0, 1 << 20) | st.integers(-300, 300), st.binary(max_size=20))


def damage(path, place, new):
    content = path.read_bytes()
    at = place % len(content)
    path.write_bytes(content[:at] + new + content[at + len(new) :] if new else content[:at])
