"""Hooks that watch, and change nothing: whoever computes a module in another way can call them as the module would."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["Hooks", "Watching", "all_watch", "hooks_of", "silenced"]

Hooks = dict[int, Any]
"""What torch keeps of those who want to be told when a module is called, by the numbers of their handles."""


class Watching:
    """A hook on a module, of any kind."""

    def __init__(self, hook: Callable[..., None]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> None:
        self._hook(*args)


def hooks_of(modules: Iterable[nn.Module]) -> list[Hooks]:
    """What somebody has registered who wants to be told when these are called."""
    return [hooks for each in modules for hooks in (each._forward_hooks, each._forward_pre_hooks)]


def all_watch(hooks: Iterable[Hooks]) -> bool:
    """Whether none of these does anything else."""
    return all(isinstance(hook, Watching) for each in hooks if each for hook in each.values())


@contextmanager
def silenced(hooks: Iterable[Hooks]) -> Iterator[None]:
    """While this is open, none of these is told."""
    kept = [(each, dict(each)) for each in hooks if each]
    for each, _ in kept:
        each.clear()
    try:
        yield
    finally:
        for each, own in kept:
            each.update(own)
