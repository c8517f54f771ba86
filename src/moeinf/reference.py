"""What a person means by a model argument: a folder, an alias of the catalog, a repository at the hub, or `demo`.

One reading for all commands. Looks at the disk only to see whether a folder is there; knows nothing of what is stored.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from . import catalog, demo
from .errors import UsageError
from .manifest import Source

__all__ = ["MAX_NAME", "Reference", "read_reference"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
MAX_NAME = 96


@dataclass(frozen=True, slots=True)
class Reference:
    """`repo` is `org/name`, the absolute path of a folder, or `demo`; `alias` is what it was called if that was one."""

    repo: str
    revision: str | None = None
    alias: str | None = None

    @classmethod
    def of(cls, source: Source) -> Reference:
        """Where a stored model came from."""
        if source.commit is None:
            return cls(source.repo)
        repo, _, revision = source.repo.partition("@")
        return cls(repo, revision or None)

    @property
    def is_folder(self) -> bool:
        return Path(self.repo).is_absolute()

    @property
    def is_demo(self) -> bool:
        """Whether it is the model that ships with the program."""
        return self.repo == demo.NAME

    @property
    def text(self) -> str:
        """How a manifest and a command line spell it: the folder, `org/name` or `org/name@revision`."""
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    @property
    def default_name(self) -> str:
        """The stored name when none is given: the alias, else the repository's or folder's last part in lower case."""
        last_part = self.repo.rsplit("/", 1)[-1].lower()
        name = self.alias or re.sub(r"[^a-z0-9._-]+", "-", last_part).strip(".-")[:MAX_NAME]
        if not name:
            raise UsageError(f"no name can be made from {self.repo}", hint="choose one with --name")
        return name

    def is_source_of(self, source: Source) -> bool:
        """Whether a stored model came from here: the same repository, and the revision by name or by commit."""
        if source.repo == self.text:
            return True
        if self.is_folder or self.revision is None or not _COMMIT.fullmatch(self.revision):
            return False
        return source.repo.partition("@")[0] == self.repo and (source.commit or "").startswith(self.revision)


def read_reference(argument: str) -> Reference | None:
    """The reference that `argument` spells, or None. `./x`, `/x` and `~/x` are folders; otherwise an alias comes first,
    then a folder that is there, then a hub id; alias and hub id may have `@revision` behind them."""
    if argument.startswith(("/", "./", "../", "~")) or argument in (".", ".."):
        return _folder(argument)
    base, at, revision = argument.partition("@")
    if at and not revision:
        raise UsageError(f"{argument!r} names no revision after the @", hint=f"write {base}@REVISION, or {base} alone")
    entry = catalog.lookup(base)
    if entry is not None and entry.repo == demo.NAME:
        if at:
            raise UsageError(f"{base} ships with the program, and has no revisions", hint=f"write {base} alone")
        return Reference(demo.NAME, alias=base)
    if entry is not None:
        return Reference(entry.repo, revision or None, alias=base)
    if os.path.isdir(argument):
        return _folder(argument)
    if _HUB_ID.fullmatch(base):
        return Reference(base, revision or None)
    return None


def _folder(argument: str) -> Reference:
    return Reference(str(Path(os.path.expanduser(argument)).resolve()))  # as it is, for a ~user whom nobody knows
