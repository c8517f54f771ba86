"""The hub: which files a model or a data set is made of, and how they get here whole.

Owns every request that moeinf sends, and a download's `.part` file while it grows. Knows nothing of stores, of what is
inside a checkpoint or a data set, or of terminals.

Addresses, tokens, proxies and settings are huggingface_hub's, so HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and
HF_HUB_DOWNLOAD_TIMEOUT mean here what they mean elsewhere. The transfer is not: it goes on inside a file after a kill,
and a file gets its name only when its hash is the one that the hub announced. huggingface_hub is imported inside
functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .checkpoint import is_companion
from .errors import HubError, IntegrityError, ModelNotFoundError, MoeinfError, UnsupportedError, UsageError
from .files import FileSystem, explained
from .units import MIB

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

__all__ = ["HubRepo", "RemoteFile", "download", "resolve", "resolve_dataset"]

Kind = Literal["model", "dataset"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
_UNSAFE_NAME = re.compile(r"[\x00-\x1f\x7f\\]|^[A-Za-z]:|(^|/)\.{0,2}(/|$)")

_CHUNK_BYTES = 1 * MIB
_SYNC_BYTES = 64 * MIB
"""At most this much is lost, and downloaded again, when the power goes; a killed process loses one chunk."""
_RESOLVE_WAITS_S = (1.0, 2.0)
_DOWNLOAD_WAITS_S = (1.0, 2.0, 4.0, 8.0)
"""Seconds after one failed attempt before the next. The attempt after the last wait is the last one."""
_LONGEST_WAIT_S = 300.0
"""The hub counts requests in windows of five minutes: it has no reason to ask for a longer wait."""

_LOGIN = "run `hf auth login` or set HF_TOKEN"

_log = logging.getLogger(__name__)
_sleep = time.sleep


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file at the hub. Large files (LFS) have a `sha256`, the others a `blob_id`, git's hash of the content."""

    path: str
    size: int
    sha256: str | None
    blob_id: str | None = None


@dataclass(frozen=True, slots=True)
class HubRepo:
    """What moeinf reads of `repo` at `commit`, in order of the names."""

    repo: str
    commit: str
    files: tuple[RemoteFile, ...]
    kind: Kind = "model"

    @property
    def download_bytes(self) -> int:
        return sum(file.size for file in self.files)


def resolve(repo: str, revision: str | None = None, *, offline: bool = False) -> HubRepo:
    """Ask the hub what `repo` has at `revision`: a branch, a tag, a commit, or None for its main branch.

    The answer lists weights in safetensors, configuration and tokenizer; never a pickle, a program, or a file of a
    sub-folder. With `offline`, as with HF_HUB_OFFLINE, nothing is asked and HubError raised.

    Raises ModelNotFoundError for an unknown (or private) repo or revision, UnsupportedError for a repo without weights
    that moeinf reads, IntegrityError for names and hashes that no honest repo has, UsageError for what is no id of a
    repo, HubError when the hub cannot be asked.
    """
    if offline:
        raise _offline(repo)
    address = _Address(repo, revision)
    commit, files = _listed(address)
    return HubRepo(repo, commit, _select(repo, files))


def resolve_dataset(repo: str, revision: str | None, suffixes: Collection[str], max_bytes: int) -> HubRepo:
    """Ask the hub which files of the data set `repo` have a name that ends so and are no larger than `max_bytes`.

    They may lie in sub-folders. Raises what `resolve` raises; there may be no such file.
    """
    commit, listed = _listed(_Address(repo, revision, "dataset"))
    _check_names(repo, listed)
    files = [file for file in listed if file.path.endswith(tuple(suffixes))]
    for file in files:
        _check_hash(repo, file)
    files = sorted((file for file in files if file.size <= max_bytes), key=lambda file: file.path)
    return HubRepo(repo, commit, tuple(files), "dataset")


def download(
    model: HubRepo,
    file: RemoteFile,
    destination: Path,
    *,
    advance: Callable[[int], None] = lambda _: None,
    disk: FileSystem | None = None,
) -> Path:
    """Bring `file` to `destination`. Bytes that are there already, or in its `.part` file, are not asked for again.

    `advance` is called with numbers of bytes, found here or received, that add up to `file.size`. Threads may download
    different files at the same time.

    Raises IntegrityError when the bytes are wrong twice (nothing is kept), CapacityError when the disk is full and
    HubError when the hub refuses or stays out of reach (what has arrived is kept for the next call).
    """
    disk = disk or FileSystem()
    path = destination.with_name(f"{destination.name}.part")
    meter = _Meter(advance)
    with explained(path):
        disk.make_folder(destination.parent)
        if destination.exists():
            disk.rename(destination, path)
    for _ in range(2):
        with _PartFile(path, file, disk, meter) as part:
            _fill(part, model, file)
            if part.is_good:
                part.publish(destination)
                return destination
            part.remove()
        _log.info("%s of %s has the wrong hash", file.path, model.repo)
    raise IntegrityError(
        f"{file.path} of {model.repo} arrived damaged, twice: its hash is not the one that the hub announced",
        hint="run the same command again; if it fails again, something between here and the hub changes the bytes",
    )


@dataclass(frozen=True, slots=True)
class _Address:
    """Which repo the hub is asked for."""

    repo: str
    revision: str | None
    kind: Kind = "model"

    @property
    def noun(self) -> str:
        return "model" if self.kind == "model" else "data set"

    @property
    def page(self) -> str:
        """Where a person can look at it."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'' if self.kind == 'model' else 'datasets/'}{self.repo}"


class _BadAnswerError(Exception):
    """The hub answered with something that cannot be meant. It may do better next time."""


class _RangeRefusedError(_BadAnswerError):
    """The server does not give the rest of the file that it was asked for."""


# What the hub has


def _listed(address: _Address) -> tuple[str, list[RemoteFile]]:
    """The commit that the revision stands for, and every file in it."""
    _check_id(address)
    retry = _Retry(address, _RESOLVE_WAITS_S)
    while True:
        try:
            return _ask(address)
        except _failures() as error:
            retry.after(error)


def _check_id(address: _Address) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, not marked as exported

    try:
        validate_repo_id(address.repo)
    except HFValidationError:
        raise UsageError(
            f"{address.repo!r} cannot be a {address.noun} at the hub",
            hint="write it as ORG/NAME, like allenai/OLMoE-1B-7B-0924",
        ) from None


def _ask(address: _Address) -> tuple[str, list[RemoteFile]]:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    _check_token()
    try:
        api = HfApi(library_name="moeinf")
        ask: Any = api.model_info if address.kind == "model" else api.dataset_info
        info = ask(address.repo, revision=address.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        files = [_remote_file(sibling) for sibling in info.siblings or ()]
    except HfHubHTTPError:  # some of them are ValueErrors too
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _BadAnswerError(f"its answer describes no {address.noun}: {error}") from error
    if not re.fullmatch(r"[0-9a-f]{40}", str(info.sha)):
        raise _BadAnswerError("its answer names no commit")
    return str(info.sha), files


def _check_token() -> None:
    """Refuse a token that cannot stand in a header here: deeper down, it would end up in an error message."""
    from huggingface_hub import get_token

    if not re.fullmatch(r"[!-~]*", get_token() or ""):
        raise HubError("the hub's access token has characters that no token has", hint=f"check HF_TOKEN, or {_LOGIN}")


def _remote_file(sibling: Any) -> RemoteFile:
    sibling.rfilename.encode()  # a name is text that can be written: anything else raises what `_ask` explains
    if sibling.lfs is None:
        return RemoteFile(sibling.rfilename, sibling.size, None, sibling.blob_id)
    return RemoteFile(sibling.rfilename, sibling.lfs.size, sibling.lfs.sha256)


def _select(repo: str, listed: Iterable[RemoteFile]) -> tuple[RemoteFile, ...]:
    """The files that moeinf reads, of all that the repo has."""
    files = {file.path: file for file in listed}
    _check_names(repo, files.values())
    names = {path for path in files if "/" not in path}
    weights = _weights(names)
    if not weights or "config.json" not in names:
        raise _unsupported(repo, names)
    wanted = sorted(weights | {name for name in names if is_companion(name)})
    if len({name.casefold() for name in wanted}) < len(wanted):
        raise IntegrityError(f"{repo} has files whose names differ only in case", hint="do not trust this repo")
    for name in wanted:
        _check_hash(repo, files[name])
    return tuple(files[name] for name in wanted)


def _check_names(repo: str, files: Iterable[RemoteFile]) -> None:
    for file in files:
        if _UNSAFE_NAME.search(file.path):
            raise IntegrityError(f"{repo} has a file with an unsafe name, {file.path!r}", hint="do not trust this repo")


def _weights(names: set[str]) -> set[str]:
    """The files that transformers would load weights from: the single file, else the index and all that it may name.

    Some repos hold the weights once more for other programs, in `consolidated*.safetensors`.
    """
    if _SINGLE in names:
        return {_SINGLE}
    shards = {name for name in names if name.endswith(".safetensors") and not name.startswith("consolidated")}
    return shards | {_INDEX} if shards and _INDEX in names else set()


def _unsupported(repo: str, names: set[str]) -> UnsupportedError:
    """Why nothing of this repo can be read."""
    if _weights(names):
        return UnsupportedError(f"{repo} has no config.json, so nothing says what model its weights belong to")
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        return UnsupportedError(
            f"{repo} has its weights only as pickles ({pickles[0]}), and opening a pickle may run any program",
            hint="look for a safetensors version among its pull requests, then: moeinf pull --revision refs/pr/NUMBER",
        )
    if any(name.endswith(".gguf") for name in names):
        return UnsupportedError(f"{repo} has its weights only as GGUF", hint="pull the model that they were made from")
    return UnsupportedError(
        f"{repo} has neither {_SINGLE} nor {_INDEX} with its weights: no checkpoint of transformers"
    )


def _check_hash(repo: str, file: RemoteFile) -> None:
    value, digits = (file.blob_id, 40) if file.sha256 is None else (file.sha256, 64)
    is_known = isinstance(file.size, int) and file.size >= 0 and re.fullmatch(rf"[0-9a-f]{{{digits}}}", str(value))
    if not is_known:
        raise IntegrityError(f"the hub gives no size and hash for {file.path} of {repo}: it could not be checked")


# One file


class _Meter:
    """Reports every byte of a file once, however often it is fetched."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._reported = 0

    def reach(self, position: int) -> None:
        if position > self._reported:
            self._advance(position - self._reported)
            self._reported = position


class _PartFile:
    """The first bytes of a file, on disk, and their hash, which is computed anew from the disk when it is opened."""

    def __init__(self, path: Path, file: RemoteFile, disk: FileSystem, meter: _Meter) -> None:
        self._path = path
        self._file = file
        self._disk = disk
        self._meter = meter
        self._unsynced_bytes = 0

    def __enter__(self) -> _PartFile:
        with explained(self._path):
            self._descriptor = self._disk.reopen(self._path) if self._path.exists() else self._disk.create(self._path)
            try:
                self._read_back()
            except BaseException:
                os.close(self._descriptor)
                raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    @property
    def is_good(self) -> bool:
        return self._hash.hexdigest() == (self._file.sha256 or self._file.blob_id)

    def append(self, chunk: bytes) -> None:
        if self.size + len(chunk) > self._file.size:
            raise _BadAnswerError(f"it sends more than the {self._file.size} bytes of {self._file.path}")
        with explained(self._path):
            self._disk.write_at(self._descriptor, chunk, self.size)
            self._unsynced_bytes += len(chunk)
            if self._unsynced_bytes >= _SYNC_BYTES:
                self._disk.sync(self._descriptor)
                self._unsynced_bytes = 0
        self._count(chunk)

    def restart(self) -> None:
        """Drop all bytes."""
        with explained(self._path):
            self._disk.resize(self._descriptor, 0)
        self._forget()

    def publish(self, destination: Path) -> None:
        """Give the file its name, once its bytes are on the drive."""
        with explained(self._path):
            self._disk.commit(self._descriptor)
            self._disk.rename(self._path, destination)
            self._disk.sync_folder(destination.parent)

    def remove(self) -> None:
        with explained(self._path):
            self._disk.remove(self._path)

    def _read_back(self) -> None:
        self._forget()
        if os.fstat(self._descriptor).st_size > self._file.size:
            self._disk.resize(self._descriptor, 0)
        while chunk := os.pread(self._descriptor, _CHUNK_BYTES, self.size):
            self._count(chunk)

    def _forget(self) -> None:
        self.size = 0
        if self._file.sha256 is not None:
            self._hash = hashlib.sha256()
        else:
            self._hash = hashlib.sha1(b"blob %d\0" % self._file.size, usedforsecurity=False)

    def _count(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self.size += len(chunk)
        self._meter.reach(self.size)


def _fill(part: _PartFile, model: HubRepo, file: RemoteFile) -> None:
    """Receive what is missing, in as many requests as it takes; only those that bring nothing use up the patience."""
    retry = _Retry(_Address(model.repo, model.commit, model.kind), _DOWNLOAD_WAITS_S)
    is_ranged = True
    while part.size < file.size:
        start = part.size
        try:
            _receive(part, model, file, start if is_ranged else 0)
            if part.size < file.size:
                raise _BadAnswerError(f"it ended after {part.size} of the {file.size} bytes of {file.path}")
        except _failures() as error:
            is_ranged = is_ranged and not isinstance(error, _RangeRefusedError)
            if part.size - start >= _CHUNK_BYTES:
                retry.forget()
            retry.after(error)


def _receive(part: _PartFile, model: HubRepo, file: RemoteFile, start: int) -> None:
    """Ask once for the bytes from `start` on, and append what comes until the answer ends."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, not marked as exported
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    _check_token()
    headers = build_hf_headers(library_name="moeinf", headers={"Accept-Encoding": "identity"})
    if start:
        headers["Range"] = f"bytes={start}-"
    url = hf_hub_url(model.repo, file.path, repo_type=model.kind, revision=model.commit)
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        if response.status_code == 416:
            raise _RangeRefusedError(f"it has no bytes of {file.path} from {start} on")
        hf_raise_for_status(response)
        _check_origin(response, model, file)
        _check_extent(response, file, start)
        if part.size != (start if response.status_code == 206 else 0):
            part.restart()
        for chunk in response.iter_bytes(_CHUNK_BYTES):
            part.append(chunk)


def _check_origin(response: Any, model: HubRepo, file: RemoteFile) -> None:
    """Raise HubError if the hub, by its own word, gives another file than the one that it listed."""
    answers = (*response.history, response)
    for header, expected in (("X-Repo-Commit", model.commit), ("X-Linked-Etag", file.sha256)):
        found = next((answer.headers[header] for answer in answers if header in answer.headers), None)
        if found is not None and expected is not None and found.strip('W/"') != expected:
            raise HubError(
                f"{file.path} of {model.repo} changed at the hub during the download"
                f" ({header}: {found}, not {expected})",
                hint="run the same command again to fetch the new version",
            )


def _check_extent(response: Any, file: RemoteFile, start: int) -> None:
    """Check which bytes an answer says it has, before any byte of the part file is given up for it."""
    if response.status_code == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            raise _RangeRefusedError(f"it gives other bytes of {file.path} than those from {start} on")
        total = match[2]
    elif response.headers.get("Content-Type", "").lower().startswith("text/html"):
        raise _BadAnswerError(f"it is a web page, not {file.path}")
    else:
        total = "*" if "Content-Encoding" in response.headers else response.headers.get("Content-Length", "*")
    if total not in ("*", str(file.size)):
        raise _BadAnswerError(f"it has {total} bytes for {file.path}, not the {file.size} that it listed")


# What goes wrong


class _Retry:
    """Waits after a failed attempt, or says what the failure means when waiting does not help (any more)."""

    def __init__(self, address: _Address, waits_s: tuple[float, ...]) -> None:
        self._address = address
        self._waits_s = waits_s
        self._failures = 0

    def after(self, error: Exception) -> None:
        """Return when it is time for the next attempt. Raises the MoeinfError that `error` stands for."""
        if not _is_passing(error) or self._failures == len(self._waits_s):
            raise _explain(error, self._address) from error
        wait_s = min(max(self._waits_s[self._failures], _asked_wait_s(error)), _LONGEST_WAIT_S)
        self._failures += 1
        _log.info("%s: %s; trying again in %.0f s", self._address.repo, error, wait_s)
        _sleep(wait_s)

    def forget(self) -> None:
        """Be as patient as at the start: the last attempt got somewhere."""
        self._failures = 0


def _failures() -> tuple[type[Exception], ...]:
    """What a request may raise."""
    # httpx's root error in huggingface_hub 1.x, httpx2's in 2.x
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    return HTTPError, OfflineModeIsEnabled, _BadAnswerError


def _is_passing(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in (408, 429) or status >= 500
    return not isinstance(error, OfflineModeIsEnabled)


def _asked_wait_s(error: Exception) -> float:
    """How long the hub asks to wait: `Retry-After: 30`, or `RateLimit: "api";r=0;t=30`."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    match = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After", "")) or re.search(
        r";\s*r=0\s*;\s*t=(\d+)", headers.get("RateLimit", "")
    )
    return float(match[1]) if match else 0.0


def _offline(repo: str) -> HubError:
    return HubError(
        f"offline mode is on (HF_HUB_OFFLINE), so the hub is not asked for {repo}",
        hint="unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE to ask it",
    )


def _explain(error: Exception, address: _Address) -> MoeinfError:
    """What a failed request means to a person."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return _explain_status(error, address)
    if isinstance(error, OfflineModeIsEnabled):
        return _offline(address.repo)
    if isinstance(error, _BadAnswerError):
        return HubError(
            f"the hub's answer for {address.repo} makes no sense: {error}",
            hint=f"check that {constants.ENDPOINT} is the hub and that no proxy answers for it, then try again",
        )
    return HubError(
        f"the hub at {constants.ENDPOINT} cannot be reached: {str(error) or type(error).__name__}",
        hint="check the network, HTTPS_PROXY and HF_ENDPOINT; the same command goes on where it stopped",
    )


def _explain_status(error: HfHubHTTPError, address: _Address) -> MoeinfError:
    from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RevisionNotFoundError

    repo, page = address.repo, address.page
    status = error.response.status_code
    said = error.response.headers.get("X-Error-Message") or error.response.reason_phrase
    if isinstance(error, GatedRepoError):
        return HubError(
            f"{repo} is gated: the hub gives it only to those who accepted its terms",
            hint=f"accept the terms at {page}, then {_LOGIN} with that account's token",
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFoundError(
            f"{repo} has no revision {address.revision!r}", hint=f"its branches and tags are at {page}/tree/main"
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return HubError(f"{repo} changed at the hub during the download: {said}", hint="run the same command again")
    if status == 401 and "invalid credentials" in said.lower():
        return HubError("the hub does not accept the access token", hint=f"{_LOGIN} with a valid token")
    if status in (401, 404):
        return ModelNotFoundError(
            f"{repo} is not at the hub, or it is private",
            hint=f"check the name at {page}; for a private {address.noun}, {_LOGIN}",
        )
    if status == 403:
        return HubError(
            f"the hub refuses {repo}: {said}", hint=f"see {page}; {_LOGIN} with an account that may read it"
        )
    if status == 429:
        return HubError("the hub asks to slow down (status 429)", hint=f"try again in some minutes, or {_LOGIN}")
    return HubError(
        f"the hub failed with status {status}: {said}", hint="try again later; https://status.huggingface.co"
    )
