"""Strategies for configurations, made from the types and the limits of the dataclasses' fields."""

import dataclasses
import functools
from types import UnionType
from typing import Annotated, TypeVar, Union, get_args, get_origin, get_type_hints

from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from pyro_nbvae.study.variants import KINDS


def _made(part, options):
    try:
        return part(**options)
    except ValueError:  # options that exclude each other
        return None


def parts(part, small):
    """Instances of a dataclass; ``small`` has strategies for fields by name that come before those of their types."""
    hints = get_type_hints(part, include_extras=True)
    fields = {
        f.name: small[f.name] if f.name in small else values(hints[f.name], small) for f in dataclasses.fields(part)
    }
    # a filter draws this part alone again, and gives up the whole example only after three times
    made = st.fixed_dictionaries(fields).map(functools.partial(_made, part))
    return made.filter(lambda built: built is not None)


def values(hint, small):
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(hint, TypeVar):  # the variant of a run
        return st.one_of(parts(kind, small) for kind in KINDS.values())
    if dataclasses.is_dataclass(hint):
        return parts(hint, small)
    if origin in (Union, UnionType):
        return st.one_of(values(each, small) for each in arguments)
    if origin is Annotated:
        limits = [limit for each in arguments[1:] if isinstance(each, FieldInfo) for limit in each.metadata]
        return st.from_type(Annotated[(arguments[0], *limits)]) if limits else values(arguments[0], small)
    return st.from_type(hint)
