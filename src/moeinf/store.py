"""The models on this disk: their names and places, which are whole, who may use them, and how they come and go.

    $MOEINF_HOME/
      locks/<name>.lock
      models/<name>/             a whole model; nothing else ever has this place
      models/.incoming/<name>/   a pull that is not finished, see incoming.py
      models/.trash/             models on their way out

Owns that tree. Knows nothing of tensors, networks, or what a model computes. Cleaning up after a crash is the next
start's work (`recover`), can be done again and again, and leaves alone what another process holds.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from . import catalog
from .errors import IntegrityError, ModelNotFoundError, MoeinfError, UsageError
from .files import DENIED, FULL, FileSystem, explained
from .incoming import Incoming, is_safe_path
from .locks import exclusive_lock, shared_lock
from .manifest import EXPERT_ALIGNMENT, MANIFEST_NAME, FileRecord, Manifest, expert_path
from .progress import NO_PROGRESS, Progress
from .reference import Reference, read_reference
from .settings import home_path
from .units import MIB, format_bytes

__all__ = ["Problem", "Store", "StoredModel", "is_valid_name"]

TRACES_FOLDER = "traces"
"""The one folder in a model's folder that others write to; no file of it is in the manifest."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_HASH_THREADS = 2
_READ_BYTES = 4 * MIB


def is_valid_name(name: str) -> bool:
    """Whether a model may be called that: letters, digits, `.`, `_`, `-`, at most 96 of them, and no dot or dash in
    front: a command line would take `-x` for an option.
    """
    return _NAME.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A whole model in the store."""

    name: str
    path: Path
    manifest: Manifest

    @contextmanager
    def use(self) -> Iterator[None]:
        """While this is open, no process can replace or remove the model. Raises MoeinfError if one is at it, or has
        been since the model was opened.
        """
        with shared_lock(_lock_path(self.path.parents[1], self.name), "using"):
            if _read_manifest(self.name, self.path) != self.manifest:
                raise MoeinfError(f"{self.name} was replaced meanwhile", hint="run the same command again")
            yield

    def require_whole(self, path: str) -> None:
        """Raises IntegrityError if a file has not the bytes that were written."""
        problem = _check_file(self.path, path, self.manifest.files[path], lambda _: None)
        if problem is not None:
            raise IntegrityError(f"{self.name}: {problem}", hint=f"check the model with `moeinf verify {self.name}`")


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one file of a stored model; `path` is relative to the model's folder."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


class Store:
    """The models under `home`; nothing is read or written before it is asked for."""

    def __init__(self, home: Path | None = None, *, disk: FileSystem | None = None) -> None:
        self.home = (home_path() if home is None else home).absolute()
        self.disk = disk or FileSystem()

    @property
    def models(self) -> Path:
        return self.home / "models"

    def names(self) -> list[str]:
        """The models that can be opened or say why not, sorted."""
        self.recover()
        return [name for name in _folders(self.models) if self._has_manifest(name)]

    def without_manifest(self) -> list[str]:
        """The folders that have a model's place and no manifest, sorted: they take disk, and cannot be opened."""
        self.recover()
        return [name for name in _folders(self.models) if not self._has_manifest(name)]

    def misnamed(self) -> list[Path]:
        """The folders of models and unfinished pulls whose names no model may have, sorted: they are left alone."""
        models = (path.parent for path in self.models.glob(f"*/{MANIFEST_NAME}"))
        return sorted(path for path in (*models, *self._incoming.glob("*/")) if not is_valid_name(path.name))

    def unfinished(self) -> list[str]:
        """The pulls that were begun and are neither finished nor removed, sorted."""
        self.recover()
        return _folders(self._incoming)

    def path(self, name: str) -> Path:
        """Where the model of this name lies or would lie. Raises UsageError for what cannot be a name."""
        if not is_valid_name(name):
            raise UsageError(
                f"{name!r} cannot be a model's name",
                hint="use up to 96 letters, digits, '.', '_' and '-', and no dot or dash in front",
            )
        return self.models / name

    def open(self, name: str) -> StoredModel:
        """The model of this name. Raises ModelNotFoundError, or IntegrityError if its manifest is damaged."""
        path = self.path(name)
        self.recover()
        manifest = _read_manifest(name, path)
        if manifest is None:
            raise self._not_found(name)
        _check(name, manifest)
        return StoredModel(name, path, manifest)

    def hold(self, name: str) -> AbstractContextManager[None]:
        """`StoredModel.use` by name."""
        return self.open(name).use()

    def resolve(self, argument: str) -> StoredModel:
        """The stored model that a person means by a name, an alias, a hub id with or without `@revision`, or a folder.

        A stored name comes first, unless the argument is spelled like a path (`./x`). A slash behind a name, which
        shells add, is of no meaning where no such folder is. Raises ModelNotFoundError, or UsageError for empty text.
        """
        self.recover()
        if is_valid_name(argument) and os.path.lexists(self.path(argument)):
            return self.open(argument)
        reference = read_reference(argument)
        if reference is None and argument.endswith("/"):
            return self.resolve(argument.rstrip("/"))
        if reference is None:
            raise self._not_found(argument)
        found = self.find(reference)
        plain = [model for model in found if model.manifest.layout.is_exact]
        match plain or found:  # quantised experts are taken where they are named, or are all there is
            case [model]:
                return model
            case []:
                state = "only partly pulled" if reference.default_name in self.unfinished() else "not pulled"
                raise ModelNotFoundError(f"{argument} is {state}", hint=f"moeinf pull {argument}")
            case models:
                names = ", ".join(model.name for model in models)
                raise UsageError(f"{argument} is here under more than one name: {names}", hint="use one of these names")

    def find(self, reference: Reference) -> list[StoredModel]:
        """The stored models that came from there. Without a revision, any will do if the default one is not here."""
        models = []
        for name in self.names():
            with suppress(MoeinfError):
                models.append(self.open(name))
        exact = [model for model in models if reference.is_source_of(model.manifest.source)]
        if exact or reference.revision is not None:
            return exact
        return [model for model in models if model.manifest.source.repo.startswith(f"{reference.repo}@")]

    def verify(self, name: str, progress: Progress = NO_PROGRESS) -> list[Problem]:
        """Read every file of a model and say what is wrong: missing, unexpected, another size, other bytes."""
        model = self.open(name)
        files = model.manifest.files
        with (
            explained(model.path),
            model.use(),
            progress.task(f"verify {name}", model.manifest.stored_bytes, "bytes") as task,
            ThreadPoolExecutor(_HASH_THREADS, thread_name_prefix="moeinf-verify") as pool,
        ):
            checks = [
                pool.submit(_check_file, model.path, path, record, task.advance) for path, record in files.items()
            ]
            try:
                problems = [problem for check in checks if (problem := check.result())]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
            strays = [path for path in _tree(model.path) if path not in files]
        return problems + [Problem(path, "does not belong to the model") for path in strays]

    def remove(self, name: str) -> None:
        """Remove a model, and what an unfinished pull of it left. Raises MoeinfError while a process uses it."""
        places = [self._incoming / name, self.path(name)]
        if not any(map(os.path.lexists, places)):
            raise self._not_found(name)
        with explained(self.home), exclusive_lock(_lock_path(self.home, name), "removing"):
            for place in filter(os.path.lexists, places):
                self._discard(place)
            self._empty_trash()

    @contextmanager
    def incoming(self, name: str, doing: str = "pulling", *, patience_s: float = 0.0) -> Iterator[Incoming]:
        """Make or replace the model of this name: nobody else can pull, remove or use it until the context closes, and
        who tries is told what this process is `doing`. Raises MoeinfError if somebody else does, and still does after
        `patience_s`.

        If `Incoming.publish` was called, the model is in its place afterwards. If not, what is written stays for the
        next try.
        """
        self.path(name)
        with explained(self.models), exclusive_lock(_lock_path(self.home, name), doing, patience_s=patience_s):
            self._install(name)
            incoming = Incoming(self._incoming / name, self.disk)
            try:
                yield incoming
            finally:
                incoming.close()
            self._install(name)
            self._empty_trash()

    def recover(self) -> None:
        """Finish what a killed process left half done: move whole models into place, empty the trash.

        In a home that cannot be written, nothing happens. What stays in the trash is tried again later.
        """
        try:
            for name in _folders(self._incoming):
                if _is_settled(self._incoming / name):
                    with suppress(MoeinfError, OSError), exclusive_lock(_lock_path(self.home, name), "recovering"):
                        self._install(name)
            self._empty_trash()
        except UsageError:  # who may not look there has nothing to finish there
            return
        except OSError as error:
            if error.errno not in DENIED:
                raise

    @property
    def _incoming(self) -> Path:
        return self.models / ".incoming"

    @property
    def _trash(self) -> Path:
        return self.models / ".trash"

    def _install(self, name: str) -> None:
        """Move a published model into place, the old one away, and what is left of the pull too; the lock is held."""
        folder, target = self._incoming / name, self.path(name)
        fresh = folder / "model"
        if not _is_settled(folder):
            return
        if fresh.exists():
            if os.path.lexists(target):
                if (target / TRACES_FOLDER).is_dir():
                    self._move_traces(target / TRACES_FOLDER, fresh / TRACES_FOLDER)
                self._discard(target)
            self.disk.rename(fresh, target)
            self.disk.sync_folder(self.models)
        self.disk.remove_tree(folder)

    def _move_traces(self, source: Path, target: Path) -> None:
        try:
            self.disk.rename(source, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.copytree(source, target, dirs_exist_ok=True)  # the model's folder is a link to another disk

    def _discard(self, path: Path) -> None:
        """Take a folder out of sight at once; its bytes go with the trash. A disk without room for the trash has the
        manifest go first, which makes a model one no more.
        """
        try:
            self.disk.make_folder(self._trash)
        except OSError as error:
            if error.errno not in FULL:
                raise
            if path.is_dir() and not path.is_symlink():
                for folder in (path / "model", path):  # a published pull, or a model in its place
                    if folder.is_dir():
                        self.disk.remove_tree(folder / MANIFEST_NAME)
            self.disk.remove_tree(path)
            return
        self.disk.rename(path, self._trash / f"{path.name}.{uuid.uuid4().hex}")
        self.disk.sync_folder(path.parent)

    def _empty_trash(self) -> None:
        """As far as that can be had."""
        with suppress(OSError):
            for path in sorted(self._trash.iterdir()):
                with suppress(OSError):
                    self.disk.remove_tree(path)

    def _has_manifest(self, name: str) -> bool:
        try:
            (self.path(name) / MANIFEST_NAME).stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            pass  # `open` says why it cannot be read
        return True

    def _not_found(self, name: str) -> MoeinfError:
        """What to raise for a name that cannot be opened, or for text that cannot even be one."""
        if not name:
            return UsageError("the name of the model is empty", hint="moeinf list shows the models here")
        if is_valid_name(name) and os.path.lexists(self._incoming / name):
            return ModelNotFoundError(
                f"{name} is only partly here", hint="run the command that makes it again to go on"
            )
        if is_valid_name(name) and os.path.lexists(self.models / name):
            return IntegrityError(f"{name} has no {MANIFEST_NAME}: it is no whole model", hint=f"moeinf rm {name}")
        stored = self.names()
        alike = difflib.get_close_matches(name.lower(), map(str.lower, stored), n=3)
        near = [other for lower in alike for other in stored if other.lower() == lower]
        near = list(dict.fromkeys([*near, *catalog.suggest(name)]))[:3]
        return ModelNotFoundError(
            f"no model is called {name!r}",
            hint=f"did you mean {' or '.join(near)}?" if near else "moeinf list shows the models here",
        )


def _lock_path(home: Path, name: str) -> Path:
    return home / "locks" / f"{name}.lock"


def _folders(parent: Path) -> list[str]:
    """The folders in `parent` whose names a model may have, sorted."""
    with explained(parent):
        try:
            return sorted(path.name for path in parent.iterdir() if is_valid_name(path.name) and path.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []


def _is_settled(folder: Path) -> bool:
    """Whether a pull's folder has nothing left to pull: the model is whole, or it has gone to its place."""
    return folder.is_dir() and ((folder / "model" / MANIFEST_NAME).exists() or not (folder / "model").exists())


def _read_manifest(name: str, folder: Path) -> Manifest | None:
    """That of the model in `folder`; None if there is none."""
    path = folder / MANIFEST_NAME
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError:
        raise _damaged(name, "it is no text") from None
    except OSError as error:
        raise MoeinfError(f"{path} cannot be read: {error.strerror}") from error
    except MoeinfError as error:
        raise type(error)(f"{name}: {error}", hint=error.hint) from error


def _check(name: str, manifest: Manifest) -> None:
    """Raise IntegrityError for a manifest that contradicts itself or leads out of the model's folder."""
    bad = [path for path in manifest.files if not is_safe_path(path)]
    if bad:
        raise _damaged(name, f"{bad[0]!r} is no path inside a model")
    if manifest.layout.data_offset % EXPERT_ALIGNMENT:
        raise _damaged(name, f"expert data at {manifest.layout.data_offset} is not aligned to {EXPERT_ALIGNMENT}")
    for path in manifest.dense_files:
        if path not in manifest.files:
            raise _damaged(name, f"no record of {path}")
    file_bytes = manifest.layout.file_bytes
    for index, layer in enumerate(manifest.layers):
        for expert in range(layer.num_experts):
            record = manifest.files.get(expert_path(index, expert))
            if record is None or record.size != file_bytes:
                raise _damaged(name, f"no fitting record of {expert_path(index, expert)}")


def _damaged(name: str, why: str) -> IntegrityError:
    return IntegrityError(f"the manifest of {name} is damaged: {why}", hint=f"moeinf rm {name}, then pull it again")


def _check_file(folder: Path, path: str, record: FileRecord, advance: Callable[[int], None]) -> Problem | None:
    try:
        with (folder / path).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != record.size:
                return Problem(path, f"{format_bytes(size)} ({size} bytes) instead of {record.size} bytes")
            digest = hashlib.sha256()
            while chunk := stream.read(_READ_BYTES):
                digest.update(chunk)
                advance(len(chunk))
    except FileNotFoundError:
        return Problem(path, "is missing")
    except OSError as error:
        return Problem(path, f"cannot be read: {error.strerror}")
    return None if digest.hexdigest() == record.sha256 else Problem(path, "has other bytes than were written")


def _tree(folder: Path) -> list[str]:
    """Every file in a model's folder but the manifest and what traces are kept, as the manifest would call it."""
    paths = []
    for parent, folders, names in os.walk(folder):
        if Path(parent) == folder:
            folders[:] = [name for name in folders if name != TRACES_FOLDER]
            names = [name for name in names if name != MANIFEST_NAME]
        paths += [Path(parent, name).relative_to(folder).as_posix() for name in names]
    return sorted(paths)
