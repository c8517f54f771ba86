"""Where a checkpoint's files come from: a folder on this machine (that of `demo` too), or the hub.

Owns which files are fetched and which copies are removed. Knows nothing of stores or tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from . import demo, hub
from .checkpoint import INDEX_NAME, Checkpoint
from .errors import IntegrityError
from .files import FileSystem, explained
from .hub import HubRepo, RemoteFile
from .manifest import Source
from .progress import Progress, Task
from .reference import Reference

__all__ = ["Download", "FolderOrigin", "HubOrigin", "Origin", "find_origin"]

_LAST_WORDS_S = 2.0
"""How long a download that nobody wants any more may take to notice it."""


@dataclass(frozen=True, slots=True)
class Download:
    """A file that is fetched, and its bytes."""

    path: str
    size: int


class Origin(Protocol):
    """Where one checkpoint comes from. Copies go into the `folder` of each call, always the same one."""

    @property
    def source(self) -> Source:
        """What the manifest says of it."""

    @property
    def identity(self) -> object:
        """JSON that is another one when the bytes of the files are."""

    @property
    def blind_bytes(self) -> int:
        """Bytes of weights that `read` fetches, because nothing else tells which tensors they hold."""

    def downloads(self, weight_files: Sequence[str] | None) -> tuple[Download, ...]:
        """All that is fetched if `weight_files` are asked for, or, without them, every weight file that there is."""

    def peek(self, folder: Path) -> Checkpoint | None:
        """The checkpoint, if it can be known without weights."""

    def read(self, folder: Path, progress: Progress) -> Checkpoint:
        """The checkpoint. Its weight files need not be there yet."""

    def fetch(self, names: Sequence[str], folder: Path, progress: Progress) -> Generator[Path, None, None]:
        """Weight files in this order, each as soon as it is whole. To be closed when that is enough."""

    def require_unchanged(self) -> None:
        """Raise IntegrityError unless all that was read is as it was when this origin was found."""

    def forget(self, names: Iterable[str], folder: Path) -> None:
        """Remove the copies of these weight files, where they are copies and can be spared."""


def find_origin(reference: Reference, disk: FileSystem) -> Origin:
    """The folder, or what the hub has. Raises what `Checkpoint.from_folder` and `hub.resolve` raise."""
    if reference.is_demo:
        return FolderOrigin(Checkpoint.from_folder(demo.CHECKPOINT), Source(demo.NAME, demo.VERSION))
    if not reference.is_folder:
        return HubOrigin(hub.resolve(reference.repo, reference.revision), reference.text, disk)
    with explained(Path(reference.repo)):
        return FolderOrigin(Checkpoint.from_folder(Path(reference.repo)))


class FolderOrigin:
    """A checkpoint on this machine. It is read where it lies, and left as it is."""

    blind_bytes = 0

    def __init__(self, checkpoint: Checkpoint, source: Source | None = None) -> None:
        self._checkpoint = checkpoint
        self.source = source or Source(str(checkpoint.folder))
        self.identity = self._identify()

    def _identify(self) -> object:
        folder, there = self._checkpoint.folder, self._checkpoint
        return [
            [name, found.st_size, found.st_mtime_ns]
            for name in (*there.weight_files, *there.other_files, INDEX_NAME)
            if (folder / name).is_file() and (found := (folder / name).stat())
        ]

    def downloads(self, weight_files: Sequence[str] | None) -> tuple[Download, ...]:
        return ()

    def peek(self, folder: Path) -> Checkpoint | None:
        return self._checkpoint

    def read(self, folder: Path, progress: Progress) -> Checkpoint:
        return self._checkpoint

    def fetch(self, names: Sequence[str], folder: Path, progress: Progress) -> Generator[Path, None, None]:
        yield from (self._checkpoint.folder / name for name in names)

    def require_unchanged(self) -> None:
        if self._identify() != self.identity:
            raise IntegrityError(
                f"{self._checkpoint.folder} was changed while it was read", hint="run the same command again"
            )

    def forget(self, names: Iterable[str], folder: Path) -> None:
        """A folder is somebody's own: nothing in it is a copy."""


class HubOrigin:
    """A checkpoint at the hub. While one weight file is used, the next one is on its way in the background."""

    def __init__(self, model: HubRepo, text: str, disk: FileSystem) -> None:
        self._model = model
        self._disk = disk
        self._files = {file.path: file for file in model.files}
        self._weights = [path for path in self._files if path.endswith(".safetensors")]
        self._has_index = INDEX_NAME in self._files
        self._fetched: set[str] = set()
        self.source = Source(text, model.commit)
        self.identity = model.commit

    @property
    def blind_bytes(self) -> int:
        return 0 if self._has_index else sum(self._files[path].size for path in self._weights)

    def downloads(self, weight_files: Sequence[str] | None) -> tuple[Download, ...]:
        wanted = {*self._companions, *(self._weights if weight_files is None else weight_files)}
        return tuple(Download(path, file.size) for path, file in self._files.items() if path in wanted)

    def peek(self, folder: Path) -> Checkpoint | None:
        if not self._has_index:
            return None
        for path in self._companions:
            self._download(path, folder, lambda _: None)
        checkpoint = Checkpoint.from_index(folder)
        absent = [name for name in checkpoint.weight_files if name not in self._files]
        if absent:
            raise IntegrityError(f"{self._model.repo} lacks {absent[0]}, which its {INDEX_NAME} names")
        return checkpoint

    def read(self, folder: Path, progress: Progress) -> Checkpoint:
        paths = self._companions if self._has_index else list(self._files)
        with progress.task("download", sum(self._files[path].size for path in paths), "bytes") as task:
            for path in paths:
                self._download(path, folder, task.advance)
        return self.peek(folder) or Checkpoint.from_folder(folder)

    def fetch(self, names: Sequence[str], folder: Path, progress: Progress) -> Generator[Path, None, None]:
        to_come = [name for name in names if name not in self._fetched]
        yield from (folder / name for name in names if name in self._fetched)
        if not to_come:
            return
        with progress.task("download", sum(self._files[name].size for name in to_come), "bytes") as task:
            running = _Background(self._download, to_come[0], folder, task)
            try:
                for following in to_come[1:]:
                    path, running = running.wait(), _Background(self._download, following, folder, task)
                    yield path
                yield running.wait()
            finally:
                running.stop()

    def require_unchanged(self) -> None:
        """A commit stays what it is, and each file's hash was checked."""

    def forget(self, names: Iterable[str], folder: Path) -> None:
        """Without an index, the only weight file stays to the end: it says which tensors there are."""
        if self._has_index:
            for name in names:
                self._disk.remove(folder / name)

    @property
    def _companions(self) -> list[str]:
        return [path for path in self._files if path not in self._weights]

    def _download(self, path: str, folder: Path, advance: Callable[[int], None]) -> Path:
        file: RemoteFile = self._files[path]
        if path not in self._fetched:
            hub.download(self._model, file, folder / path, advance=advance, disk=self._disk)
            self._fetched.add(path)
        return folder / path


class _Background(threading.Thread):
    """A download that runs by itself. A daemon thread: a program that ends does not wait for the network."""

    def __init__(
        self, download: Callable[[str, Path, Callable[[int], None]], Path], name: str, folder: Path, task: Task
    ) -> None:
        super().__init__(name=f"moeinf-download-{name}", daemon=True)
        self._arguments = (name, folder, self._advance)
        self._download = download
        self._task = task
        self._is_unwanted = threading.Event()
        self._outcome: Path | BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._outcome = self._download(*self._arguments)
        except BaseException as error:  # the top of a thread: it is raised again where somebody waits
            self._outcome = error

    def wait(self) -> Path:
        """The file, when it is whole. Raises what the download raised."""
        self.join()
        if isinstance(self._outcome, Path):
            return self._outcome
        assert self._outcome is not None, "a thread that has ended has an outcome"
        raise self._outcome

    def stop(self) -> None:
        """Let the download end at its next bytes; what has arrived stays for the next time."""
        self._is_unwanted.set()
        self.join(_LAST_WORDS_S)

    def _advance(self, received_bytes: int) -> None:
        if self._is_unwanted.is_set():
            raise _UnwantedError
        self._task.advance(received_bytes)


class _UnwantedError(Exception):
    """Nobody waits for this download any more."""
