"""Data sets: what a person means by `--dataset`, and the prompts in it.

A name of the sets that ship (`prompts`), a file, or a data set of the hub by its id. Owns the formats that are read,
and the copies of the hub's files under `$MOEINF_HOME/datasets`, which are kept for the next time. Runs nothing of what
a data set brings along. Knows nothing of models.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import hub
from .errors import IntegrityError, ModelNotFoundError, UnsupportedError, UsageError
from .files import explained
from .hub import HubRepo, RemoteFile
from .locks import exclusive_lock
from .progress import NO_PROGRESS, Progress
from .prompts import SHIPPED, Prompt, shipped_prompts, text_digest
from .settings import home_path
from .units import GIB, format_bytes

__all__ = ["MAX_BYTES", "read_prompts", "short_name"]

MAX_BYTES = GIB
"""Of one file: it is read as a whole."""

_TEXT_FIELDS = ("text", "prompt", "question", "instruction")
_TURN_FIELDS = ("messages", "conversations", "conversation")
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\S+))?", re.ASCII)
_METADATA = ("dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json")
"""Files of data sets that describe them."""
_SPLITS = ("train|training", "", "val|valid|validation|dev", "test|testing")
"""What the names of the files to take have in them, best first."""
_LONGEST_NAME = 96

Notify = Callable[[str], None]


def read_prompts(
    dataset: str,
    limit: int | None = None,
    *,
    progress: Progress = NO_PROGRESS,
    notify: Notify = lambda _: None,
) -> list[Prompt]:
    """The first `limit` prompts of a data set, or all.

    `dataset` is a name of `prompts.SHIPPED`; a file: .txt (a prompt per paragraph), .jsonl, .json, .csv or .parquet (a
    prompt per row); or, where no such file is, the id of a data set of the hub, `org/name` or `org/name@revision`, the
    only one for which a connection is opened. Of the hub, one file is read, and the next ones only while there are
    fewer than `limit` prompts; `notify` gets a sentence about which. docs/datasets.md says what is read of a row.

    Raises ModelNotFoundError for what is none of these, UsageError for what cannot be read, IntegrityError for a data
    set without prompts or a damaged one, UnsupportedError for .parquet where pyarrow is not installed, and what `hub`
    raises.
    """
    if dataset in SHIPPED:
        return shipped_prompts(dataset)[:limit]
    match = _HUB_ID.fullmatch(dataset)
    path = Path(dataset)
    if match and not os.path.exists(path) and path.suffix not in _READERS:
        return _read_hub(match[1], match[2], limit, progress, notify)[:limit]
    return _read_file(path, dataset)[:limit]


def short_name(dataset: str, prompts: Sequence[Prompt]) -> str:
    """What a file that is made from these prompts of the data set may be called: letters, digits, `.`, `_` and `-`.
    Behind the name of a set that does not ship stand 8 digits of a hash of the texts, since two may be called alike.
    """
    if dataset in SHIPPED:
        return dataset
    path = Path(dataset)
    text = path.stem if os.path.exists(path) or path.suffix in _READERS else dataset
    name = re.sub(r"[^\w.-]+", "--", text).strip(".-").encode()[:_LONGEST_NAME].decode(errors="ignore") or "dataset"
    digest = text_digest("".join(text_digest(prompt.text) for prompt in prompts))
    return f"{name}-{digest[:8]}"


# The hub


def _read_hub(repo: str, revision: str | None, limit: int | None, progress: Progress, notify: Notify) -> list[Prompt]:
    listing = hub.resolve_dataset(repo, revision, tuple(_READERS), MAX_BYTES)
    files = _choose(listing.files)
    if not files:
        raise IntegrityError(
            f"{repo} has no file that is read as prompts: {', '.join(_READERS)}, up to {format_bytes(MAX_BYTES)}",
            hint="its revision refs/convert/parquet may have one; or save what you need as a file and give its path",
        )
    folder = home_path() / "datasets" / repo.replace("/", "--")
    prompts: list[Prompt] = []
    taken: list[str] = []
    with explained(folder), exclusive_lock(folder.with_name(f"{folder.name}.lock"), "downloading"):
        while len(taken) < len(files) and len(prompts) < (limit or 1):
            file = files[len(taken)]
            prompts += _read_file(_fetch(listing, file, folder / listing.commit, progress), f"{file.path} of {repo}")
            taken.append(file.path)
    notify(f"{repo} at {listing.commit[:12]}: {', '.join(taken)} ({len(taken)} of {len(files)} such files)")
    return prompts


def _choose(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Files that belong together: of one format, one split and one folder."""
    files = [file for file in files if Path(file.path).name not in _METADATA]
    for suffix in _READERS:
        for split in _SPLITS:
            found = [file for file in files if file.path.endswith(suffix) and _split_of(file.path) == split]
            if found:
                return [file for file in found if Path(file.path).parent == Path(found[0].path).parent]
    return []


def _split_of(path: str) -> str:
    named = (split for split in _SPLITS if split and re.search(rf"(?<![a-z])({split})(?![a-z])", path.lower()))
    return next(named, "")


def _fetch(listing: HubRepo, file: RemoteFile, folder: Path, progress: Progress) -> Path:
    with progress.task(f"download {file.path}", file.size, "bytes") as task:
        return hub.download(listing, file, folder / file.path, advance=task.advance)


# A file


def _read_file(path: Path, name: str) -> list[Prompt]:
    """All prompts of a file; `name` is what messages call it."""
    if name and os.path.isdir(path):
        raise UsageError(f"{name} is a folder", hint=f"give a file in it: {', '.join(_READERS)}")
    read = _READERS.get(path.suffix)
    if read is None:
        names = ", ".join(SHIPPED)
        raise ModelNotFoundError(
            f"{name!r} is no data set", hint=f"give {names}, a file ({', '.join(_READERS)}), or ORG/NAME of the hub"
        )
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{name} is larger than {format_bytes(MAX_BYTES)}", hint="split it, and give a part")
        rows = read(path.read_bytes())
    except FileNotFoundError:
        raise ModelNotFoundError(f"there is no file {name}", hint="look at its path") from None
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise IntegrityError(
            f"{name} is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}", hint="save it as UTF-8"
        ) from error
    except (ValueError, RecursionError, csv.Error) as error:
        raise IntegrityError(f"{name} is not a valid {path.suffix[1:]} file: {error}") from error
    prompts = [prompt for prompt in map(_prompt_of, rows) if prompt.text.strip()]
    if not prompts:
        raise _without_prompts(name, rows)
    return prompts


def _without_prompts(name: str, rows: Sequence[dict[Any, Any]]) -> IntegrityError:
    fields = [str(field) for field in rows[0] if field is not None] if rows else []
    if not fields or any(field in fields for field in (*_TEXT_FIELDS, *_TURN_FIELDS)):
        return IntegrityError(f"{name} holds no prompts", hint="give it text")
    return IntegrityError(
        f"{name} holds no prompts: its rows have {', '.join(fields[:8])}",
        hint=f"call the field with the text one of: {', '.join(_TEXT_FIELDS)}",
    )


def _prompt_of(row: dict[Any, Any]) -> Prompt:
    text = next((row[name] for name in _TEXT_FIELDS if isinstance(row.get(name), str)), None)
    if text is None:
        text = next((_joined(row[name]) for name in _TURN_FIELDS if isinstance(row.get(name), list)), "")
    return Prompt(str(row.get("domain") or ""), text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def _joined(turns: Iterable[Any]) -> str:
    """The turns of a conversation, one after the other: `{"role", "content"}` or `{"from", "value"}`."""
    said = (turn.get("content", turn.get("value")) for turn in turns if isinstance(turn, dict))
    return "\n".join(text for text in said if isinstance(text, str))


# Formats: the rows in the bytes of a file. They raise ValueError for what is none.


def _read_text(data: bytes) -> list[dict[Any, Any]]:
    return [{"text": part.strip()} for part in re.split(r"\n\s*\n", _decoded(data).replace("\r\n", "\n"))]


def _read_json_lines(data: bytes) -> list[dict[Any, Any]]:
    rows = []
    for number, line in enumerate(_decoded(data).split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return _objects(rows)


def _read_json(data: bytes) -> list[dict[Any, Any]]:
    """A list of objects, or lines of them."""
    text = _decoded(data)
    return _objects(json.loads(text)) if text.lstrip().startswith("[") else _read_json_lines(data)


def _read_csv(data: bytes) -> list[dict[Any, Any]]:
    csv.field_size_limit(max(len(data), csv.field_size_limit()))
    return list(csv.DictReader(io.StringIO(_decoded(data), newline=""), strict=True))


def _read_parquet(data: bytes) -> list[dict[Any, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UnsupportedError(
            "reading .parquet needs pyarrow, which is not installed", hint="pip install pyarrow, or give a .jsonl file"
        ) from None
    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        wanted = [name for name in table.schema_arrow.names if name in (*_TEXT_FIELDS, *_TURN_FIELDS, "domain")]
        rows: list[dict[Any, Any]] = table.read(columns=wanted or None).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(error) from error
    return rows


def _decoded(data: bytes) -> str:
    """The text of a file, without the mark that some programs put in front."""
    return data.removeprefix(b"\xef\xbb\xbf").decode()


def _objects(rows: Iterable[Any]) -> list[dict[Any, Any]]:
    found = list(rows)
    if not all(isinstance(row, dict) for row in found):
        raise ValueError("a row is no object")
    return found


_READERS: dict[str, Callable[[bytes], list[dict[Any, Any]]]] = {
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
"""By the ending of a file, in the order in which a data set that has several is read: its .txt may be a licence."""
