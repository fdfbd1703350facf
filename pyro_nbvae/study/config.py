"""Configurations from names of parts and options, and as JSON; config.json in a run folder is the tree of its parts."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Annotated, Any, Union

from pydantic import TypeAdapter, ValidationError

from pyro_nbvae.errors import InputError
from pyro_nbvae.study.errors import check_member
from pyro_nbvae.study.tree import BY_KIND, TrainConfig, choices, replace, with_options
from pyro_nbvae.study.variants import DEFAULT, KINDS, variant_of

# Options that a preset sets where the chosen parts have them; KIND.OPTION is an option of one kind of part only.
PRESETS: dict[str, dict[str, Any]] = {
    # For a user's own data.
    "default": {},
    # The settings of our tables.
    "published": {
        "encoder": "released",
        "decoder": "released",
        "latents": 256,
        "epochs": 20,
        "batch_size": 512,
        "lr": 1e-3,
        "lr_schedule": "constant",
        "loss": "squared_error",
        "clip": 25.0,
        "kl_warmup": 2.0,
        "prior_lr_multiplier": 30.0,
    },
}
# As in the paper's code: schedules over 250 epochs, of which 200 are run; its clip of 1.0 is in units of its loss.
PRESETS["paper"] = {
    **PRESETS["published"],
    "epochs": 200,
    "kl_warmup": 50.0,
    "temperature_start": 1.0,
    "gumbel.temperature": 1.0,
    "anneal_epochs": 250.0,
    "clip": None,
    "prior_lr_multiplier": 1.0,
    "prior_mean": 1.0,
}


def configure(variant: str = DEFAULT, *, preset: str = "default", **changes: Any) -> TrainConfig[Any]:
    """Return the configuration of a run: a variant, the defaults of a preset, and what is given.

    Args:
        variant: a registered name (:data:`~pyro_nbvae.study.variants.VARIANTS`).
        preset: ``default``, ``published`` (the settings and networks of the tables, with losses in squared errors) or
            ``paper`` (the paper's schedules and 200 epochs).
        **changes: options by name, and parts by their kind (``relaxation="gumbel"``).

    Raises:
        InputError: for an unknown name, an option that no part of the configuration has, and a value out of range.

    Example::

        >>> configure("P-VAE", relaxation="gumbel", temperature=0.5, data="mnist").vae.relaxation.temperature
        0.5
    """
    check_member("preset", preset, PRESETS)
    config: TrainConfig[Any] = TrainConfig(variant=variant, vae=variant_of(variant))
    chosen = {name: changes.pop(name) for name in choices(config) if name in changes}
    config = replace(config, **chosen)
    settings = PRESETS[preset]
    if config.likelihood.kind != "gaussian":  # the others have no squared errors
        settings = {name: value for name, value in settings.items() if name not in ("loss", "clip")}
    try:
        return checked(replace(with_options(config, settings)[0], **changes))
    except TypeError as error:  # a value of a type that cannot be compared
        raise InputError(str(error)) from None


def to_json(config: TrainConfig[Any]) -> dict[str, Any]:
    """Return a configuration as plain values."""
    return dataclasses.asdict(config)


@functools.cache
def _adapter(*kinds: Any) -> TypeAdapter[TrainConfig[Any]]:
    one_of: Any = Annotated[Union[kinds], BY_KIND]  # noqa: UP007
    return TypeAdapter(TrainConfig[one_of])


def _key(key: str | int) -> str:
    """Return a key as text in one line."""
    return str(key) if str(key).isprintable() and key != "" else repr(key)


def from_json(stored: object) -> TrainConfig[Any]:
    """Read a configuration of :func:`to_json` by type.

    Raises:
        InputError: for a missing or unknown key, and for a value of the wrong type or out of range; one line for each,
            ``location: message``.
    """
    try:
        adapter = _adapter(*KINDS.values())  # type: ignore[arg-type]
        config = adapter.validate_json(json.dumps(stored, default=str), strict=True, extra="forbid")
    except ValidationError as error:
        lines = [f"{'.'.join(map(_key, each['loc'])) or 'config'}: {each['msg']}" for each in error.errors()]
        if any(each["type"] == "union_tag_invalid" and each["loc"] == ("vae",) for each in error.errors()):
            lines.append(
                "vae: a variant of your own is known after --import MODULE, or with an entry point of its package"
            )
        raise InputError("\n".join(lines)) from None
    if left_out := list(_left_out(to_json(config), stored)):
        raise InputError("\n".join(f"{place}: Field required" for place in left_out))
    return config


def _left_out(tree: dict[str, Any], stored: Any, above: str = "") -> Iterator[str]:
    """Iterate over the places of a tree that are not in what it was read from."""
    for name, value in tree.items():
        if name not in stored:
            yield above + name
        elif isinstance(value, dict):
            yield from _left_out(value, stored[name], f"{above}{name}.")


def checked(config: TrainConfig[Any]) -> TrainConfig[Any]:
    """Return a configuration if all its values are in range, else raise InputError as :func:`from_json`."""
    return from_json(to_json(config))
