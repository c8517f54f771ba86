"""JSON as dataclasses, by the types of their fields: no other JSON becomes one.

A field's type is str, int, a dataclass, `X | None`, `tuple[X, ...]`, `tuple[X, Y]`, `dict[str, X]`, or one of the first
two with what has all values that it can have behind it: `Annotated[int, range(9)]`, `Annotated[str, ("a", "b")]`. What
does not fit is named by the field. Knows nothing of what the dataclasses are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING
from functools import cache
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

__all__ = ["FieldError", "Reader", "reader_of", "unfit"]

Reader = Callable[[Any], Any]
_KINDS = {dict: "an object", list: "a list", str: "text", int: "a whole number"}
_LONGEST_SHOWN = 40


class FieldError(ValueError):
    """A field does not hold what it must. Its name grows from within outwards, and only when something is wrong:
    a manifest has thousands of records.
    """

    def __init__(self, what: str, name: str = "") -> None:
        super().__init__(f"{name.lstrip('.') or 'it'} {what}")
        self.what = what
        self.name = name

    def within(self, outer: str) -> FieldError:
        return FieldError(self.what, outer + self.name)


@cache
def _object_reader(kind: type[Any]) -> Reader:
    """What makes a dataclass out of an object with its fields and no others, or raises FieldError."""
    hints = get_type_hints(kind, include_extras=True)
    fields = dataclasses.fields(kind)
    readers = [(each.name, reader_of(hints[each.name])) for each in fields]
    defaults = {each.name: each.default for each in fields if each.default is not MISSING}
    defaults |= {each.name: each.default_factory() for each in fields if each.default_factory is not MISSING}

    def read(value: Any) -> Any:
        if type(value) is not dict:
            raise unfit(value, dict)
        if defaults:
            value = defaults | value
        made = []
        for name, read_field in readers:
            try:
                made.append(read_field(value[name]))
            except KeyError:
                raise FieldError("is missing", f".{name}") from None
            except FieldError as error:
                raise error.within(f".{name}") from None
        if len(value) > len(made):
            raise FieldError("is no field that this program knows", f".{min(value.keys() - hints.keys())}")
        return kind(*made)

    return read


def reader_of(hint: Any) -> Reader:
    """What makes a value of the type `hint`, one that a field above has, out of one of JSON, or raises FieldError."""
    origin, inner = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _object_reader(hint)
    if origin is None or origin is Annotated:
        return _plain_reader(*(inner or (hint,)))
    read_inner = reader_of(inner[1] if origin is dict else inner[0])
    if origin is UnionType:
        return lambda value: None if value is None else read_inner(value)

    def read_object(value: Any) -> Any:
        if type(value) is not dict:
            raise unfit(value, dict)
        return _read_each(value.items(), read_inner)

    def read_list(value: Any) -> Any:
        if type(value) is not list:
            raise unfit(value, list)
        if inner[1] is not ... and len(value) != len(inner):
            raise FieldError(f"has {len(value)} entries, not {len(inner)}")
        return tuple(_read_each(enumerate(value), read_inner).values())

    return read_object if origin is dict else read_list


def _read_each(items: Iterable[tuple[str | int, Any]], read: Reader) -> dict[Any, Any]:
    made = {}
    for key, item in items:
        try:
            made[key] = read(item)
        except FieldError as error:
            raise error.within(f"[{json.dumps(key)}]") from None
    return made


def _plain_reader(kind: type[Any], allowed: Sequence[Any] | None = None) -> Reader:
    """What lets through a `kind`, and no bool for an int, that is one of `allowed`, or raises FieldError."""

    def read(value: Any) -> Any:
        if type(value) is not kind:
            raise unfit(value, kind)
        if allowed is not None and value not in allowed:
            others = f"one of {', '.join(allowed)}" if kind is str else f"from {allowed[0]} to {allowed[-1]}"
            raise FieldError(f"is {_shown(value)}, not {others}")
        return value

    return read


def unfit(value: Any, kind: type[Any]) -> FieldError:
    """What to raise for a value that is no `kind`: dict, list, str or int."""
    return FieldError(f"is {_shown(value)}, not {_KINDS[kind]}")


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return _KINDS[type(value)]
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
