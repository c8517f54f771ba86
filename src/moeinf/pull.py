"""From a checkpoint, at the hub or in a folder, to a model in the store.

Owns the order of the work, and what of it is refused beforehand. Knows nothing of what may be asked for (wanted), how
bytes travel (origins, hub), what becomes of tensors (conversion, sharding), or how files become durable (incoming).
torch and transformers are imported inside functions: they take seconds, and many calls end before they are needed.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import demo
from .checkpoint import CONFIG_NAME, Checkpoint
from .errors import (
    CapacityError,
    IntegrityError,
    ModelNotFoundError,
    UnpackableError,
    UnsupportedError,
    UsageError,
)
from .files import Bytes, explained
from .forms import name_plain, name_precision
from .incoming import DenseWriter, Incoming
from .interrupts import kept_interrupt
from .manifest import MANIFEST_NAME, SCHEMA, ExpertLayout, Manifest, Source, expert_path, lossless_gain
from .origins import Download, Origin, find_origin
from .progress import NO_PROGRESS, Progress, Task
from .settings import check_transformers
from .store import Store, StoredModel
from .tensorfile import encode_expert_header
from .units import MIB, format_bytes
from .wanted import Packs, Wanted, find_existing, never, read_wanted, require_pullable

if TYPE_CHECKING:
    from .conversion import Plan
    from .quantized import Encoder

__all__ = ["Preview", "PullPlan", "plan_pull", "preview", "pull", "resolve"]

_COPY_BYTES = 4 * MIB
_DEMO_PATIENCE_S = 60.0
"""For another process that brings the demo: whoever runs it has asked for no pull, and it takes seconds."""


@dataclass(frozen=True, slots=True)
class PullPlan:
    """What a pull would do: download `files`, and take `needed_bytes` of the `free_bytes` of disk at its height.

    `is_stored` says that there is nothing to do. With `is_estimate`, tensors will be known only after the download:
    `store_bytes` is a guess then, and `architecture`, `dtype` and `precision` are None.
    """

    name: str
    source: Source
    is_stored: bool
    files: tuple[Download, ...]
    store_bytes: int
    needed_bytes: int
    free_bytes: int
    is_estimate: bool = False
    architecture: str | None = None
    dtype: str | None = None
    precision: str | None = None

    @property
    def download_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def has_room(self) -> bool:
        return self.needed_bytes <= self.free_bytes


@dataclass(frozen=True, slots=True)
class Preview:
    """What a pull would store: the manifest, but for its records of files, and the text of config.json."""

    name: str
    manifest: Manifest
    config: str


def pull(
    source: str,
    *,
    store: Store,
    name: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    experts: str | None = None,
    group: int | None = None,
    packs: Packs = never,
    force: bool = False,
    progress: Progress = NO_PROGRESS,
    notify: Callable[[str], None] = lambda _: None,
) -> StoredModel:
    """Bring a model into the store, and return it.

    `source` is a folder, an alias, a hub id with or without `@revision`, or the name of a model that is here. What is
    here already from the same source is returned as it is, unless `force` asks for it anew. A pull that did not finish
    is continued if its source is still the same. `experts` "lossless" writes them packed, if they are bfloat16
    (docs/lossless.md); "int8" or "int4" quantised, in groups of `group` (docs/quantization.md); "bf16" plain, in a
    model that is bfloat16; None as they were released, but packed without loss if `packs()` and they can be. Beside
    packed experts, dense weights are packed without loss. `notify` gets a sentence about what one might not expect.

    Raises UsageError when the name is taken by another model, CapacityError when the disk is too small (before any
    weights are downloaded, where that can be known), MoeinfError while another process pulls or uses the model, and
    what hub, checkpoint, conversion and sharding raise.
    """
    wanted = read_wanted(source, store, name, revision, dtype, experts, group, packs)
    if not force and (model := find_existing(wanted, store)):
        notify(f"{model.name} is here already, from {model.manifest.source.repo}")
        return model
    require_pullable(wanted, source, store)
    origin = find_origin(wanted.reference, store.disk)
    require_room = partial(_require_room, wanted.name, store.models)
    patience_s = _DEMO_PATIENCE_S if wanted.reference.is_demo else 0.0
    with store.incoming(wanted.name, patience_s=patience_s) as incoming:
        if not force and (model := find_existing(wanted, store)):
            return model  # another process pulled it meanwhile
        _begin(incoming, origin, wanted, force, notify)
        # the download and, at the least, as much again in the store, or half of it where four bytes become two
        least_bytes = origin.blind_bytes * 2 if wanted.dtype == "auto" else origin.blind_bytes * 3 // 2
        if (form := wanted.form or wanted.form_if_packable) is not None:
            least_bytes = origin.blind_bytes * (32 + form.bits) // 32
        require_room(least_bytes - _bytes_in(incoming.source))
        checkpoint = origin.read(incoming.source, progress)
        plan = _plan(checkpoint, wanted.dtype)
        _check_dtype(plan, experts)
        stored = _Stored.of(plan, wanted)
        if stored.precision != plan.dtype:
            notify(f"precision: {stored.precision}")
        _copy_companions(incoming, checkpoint, plan)
        if stored.is_unpacked_in(incoming):
            stored = _unpack(incoming, stored)
        _require_readable(_manifest(origin.source, stored))
        try:
            _shard(incoming, origin, checkpoint, stored, require_room, progress)
        except UnpackableError as error:
            notify(f"experts are stored as they are: {error}")
            stored = _unpack(incoming, stored)
            _shard(incoming, origin, checkpoint, stored, require_room, progress)
        try:
            origin.require_unchanged()
        except IntegrityError:
            incoming.give_up()  # parts of it may be of another version than a later run's identity says
            raise
        incoming.publish(_pack_dense(incoming, _manifest(origin.source, stored), stored, progress))
    return store.open(wanted.name)


def plan_pull(
    source: str,
    *,
    store: Store,
    name: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    experts: str | None = None,
    group: int | None = None,
    packs: Packs = never,
    force: bool = False,
) -> PullPlan:
    """What `pull` would do, from the start; what an unfinished pull has already is not taken off.

    Nothing in the store changes; from the hub, configuration and index are fetched, but no weights. Raises what `pull`
    raises before it writes, except for CapacityError.
    """
    wanted = read_wanted(source, store, name, revision, dtype, experts, group, packs)
    if not force and (model := find_existing(wanted, store)):
        return _plan_of_stored(model, _free_bytes(store.models))
    require_pullable(wanted, source, store)
    origin = find_origin(wanted.reference, store.disk)
    with tempfile.TemporaryDirectory(prefix="moeinf-") as folder, explained(Path(folder)):
        checkpoint = origin.peek(Path(folder))
        plan = None if checkpoint is None else _plan(checkpoint, wanted.dtype)
    if plan is not None:
        _check_dtype(plan, experts)
    stored = None if plan is None else _Stored.of(plan, wanted)
    if stored is not None:
        _require_readable(_manifest(origin.source, stored))
    files = origin.downloads(None if checkpoint is None else checkpoint.weight_files)
    sizes = [file.size for file in files]
    form = wanted.form or wanted.form_if_packable
    guess = sum(sizes) if form is None else sum(sizes) * form.bits // 15
    in_flight_bytes = _in_flight_bytes(sizes)
    return PullPlan(
        name=wanted.name,
        source=origin.source,
        is_stored=False,
        files=files,
        store_bytes=stored.nbytes if stored else guess,
        needed_bytes=stored.height_bytes(in_flight_bytes) if stored else guess + in_flight_bytes,
        free_bytes=_free_bytes(store.models),
        is_estimate=stored is None,
        architecture=stored.plan.architecture if stored else None,
        dtype=stored.plan.dtype if stored else None,
        precision=stored.precision if stored else None,
    )


def preview(source: str, *, store: Store, packs: Packs = never) -> Preview:
    """What `pull` would write, known without weights, as if all dense weights could be packed that are to be: from the
    hub, configuration and index are fetched, no more.

    Raises UnsupportedError for a repo whose tensors only its weights tell, and what `plan_pull` raises.
    """
    from .densefile import as_packed

    wanted = read_wanted(source, store, None, None, "auto", None, None, packs)
    origin = find_origin(wanted.reference, store.disk)
    with tempfile.TemporaryDirectory(prefix="moeinf-") as folder, explained(Path(folder)):
        checkpoint = origin.peek(Path(folder))
        if checkpoint is None:
            raise UnsupportedError(
                f"{source} has its weights in one file without an index: nothing can be said of it before it is pulled",
                hint=f"moeinf pull {source}",
            )
        plan = _plan(checkpoint, wanted.dtype)
    stored = _Stored.of(plan, wanted)
    manifest = _manifest(origin.source, stored)
    _require_readable(manifest)
    if stored.packed_dense:
        manifest = as_packed(manifest, stored.packed_dense)
    return Preview(wanted.name, manifest, plan.config)


def resolve(argument: str, store: Store, progress: Progress = NO_PROGRESS) -> StoredModel:
    """The stored model that a person means, as `Store.resolve` finds it. `demo` needs no pull: it is brought into the
    store when it is not there in this program's version.
    """
    if argument == demo.NAME:
        with suppress(ModelNotFoundError):
            if store.open(argument).manifest.source.repo != demo.NAME:
                return store.open(argument)  # somebody's own, of that name
        return pull(argument, store=store, progress=progress)
    return store.resolve(argument)


# What it takes


def _plan(checkpoint: Checkpoint, dtype: str) -> Plan:
    check_transformers()
    with kept_interrupt():
        from .conversion import plan_conversion

        return plan_conversion(checkpoint, dtype)


def _plan_of_stored(model: StoredModel, free_bytes: int) -> PullPlan:
    there = model.manifest
    return PullPlan(
        name=model.name,
        source=there.source,
        is_stored=True,
        files=(),
        store_bytes=there.stored_bytes,
        needed_bytes=0,
        free_bytes=free_bytes,
        architecture=there.architecture,
        dtype=there.dtype,
        precision=there.precision,
    )


@dataclass(frozen=True, slots=True)
class _Stored:
    """What is stored of a plan: experts in its layout, or in that of the encoder. `is_on_request`: they were released
    packed, and are not to be; `is_not_packable`: they were to be packed without loss.
    """

    plan: Plan
    encoder: Encoder | None
    is_on_request: bool = False
    is_not_packable: bool = False

    @classmethod
    def of(cls, plan: Plan, wanted: Wanted) -> _Stored:
        if wanted.form is not None:
            return cls(plan, wanted.form.encoder(plan.layout, is_transposed=plan.is_transposed))
        if plan.packing is not None and not wanted.is_plain:
            from .quantized import Packer

            return cls(plan, Packer(plan.layout, plan.is_transposed, plan.packing, plan.pieces))
        if (form := wanted.form_if_packable) is not None:
            with suppress(UnsupportedError):
                return cls(plan, form.encoder(plan.layout, is_transposed=plan.is_transposed))
        return cls(plan, None, is_on_request=plan.packing is not None)

    @property
    def expert_paths(self) -> Iterator[str]:
        for index, layer in enumerate(self.plan.layers):
            yield from (expert_path(index, expert) for expert in range(layer.num_experts))

    def is_unpacked_in(self, incoming: Incoming) -> bool:
        """Whether an earlier run found that experts cannot be packed without loss."""
        made = self.layout.quantization
        if made is None or not made.is_lossless:
            return False
        return any(incoming.size(path) == self.plan.layout.file_bytes for path in self.expert_paths)

    @property
    def layout(self) -> ExpertLayout:
        return self.encoder.layout if self.encoder else self.plan.layout

    @property
    def precision(self) -> str:
        before = self.plan.precision
        plain = name_plain(before, on_request=self.is_on_request, not_packable=self.is_not_packable)
        return name_precision(plain, self.layout)

    @property
    def packed_dense(self) -> dict[str, tuple[int, int]]:
        """The dense weights that are packed, if their numbers let them, and their sides: where experts are packed, in
        whatever form.
        """
        return {} if self.layout.quantization is None else self.plan.packable

    @property
    def nbytes(self) -> int:
        """Bytes of all experts and of the dense part."""
        return self.sharded_bytes - lossless_gain(self.packed_dense.values())

    @property
    def sharded_bytes(self) -> int:
        """The same while the dense part is plain."""
        return sum(layer.num_experts for layer in self.plan.layers) * self.layout.file_bytes + self.plan.dense_bytes

    def height_bytes(self, in_flight_bytes: int) -> int:
        """Disk that is taken at most, with so many bytes of downloads, which are gone when the dense part is packed."""
        packed = self.plan.dense_bytes - lossless_gain(self.packed_dense.values()) if self.packed_dense else 0
        return self.sharded_bytes + max(in_flight_bytes, packed)

    def done_bytes(self, incoming: Incoming) -> int:
        """Bytes of these that are written."""
        from .sharding import DENSE_NAME

        plan = self.plan
        experts = sum(map(incoming.is_done, self.expert_paths))
        if _is_done(incoming, DENSE_NAME):
            dense_bytes = plan.dense_bytes
        else:
            dense_bytes = sum(tensor.nbytes for tensor in plan.dense if incoming.has_tensor(DENSE_NAME, tensor.name))
        return experts * self.layout.file_bytes + dense_bytes


def _require_readable(manifest: Manifest) -> None:
    """Raise IntegrityError for a configuration of which nobody could read what would be stored."""
    try:
        Manifest.from_json(manifest.to_json())
    except IntegrityError as error:
        what = str(error).removeprefix(f"{MANIFEST_NAME} is damaged: ")
        raise IntegrityError(f"config.json of {manifest.source.repo} cannot be: {what}", hint="check it") from error


def _check_dtype(plan: Plan, experts: str | None) -> None:
    if experts == "bf16" and plan.dtype != "bfloat16":
        raise UsageError(f"--experts bf16: the model is {plan.dtype}", hint="add --dtype bfloat16")


def _in_flight_bytes(sizes: Iterable[int]) -> int:
    """Disk that downloads take at most: one file that is used, and one that is on its way."""
    return sum(sorted(sizes)[-2:])


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _free_bytes(folder: Path) -> int:
    """Bytes that are free on the disk where `folder` is or will be."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def _require_room(name: str, folder: Path, needed_bytes: int) -> None:
    free_bytes = _free_bytes(folder)
    if needed_bytes > free_bytes:
        raise CapacityError(
            f"{name} needs {format_bytes(needed_bytes)} more disk, and {format_bytes(free_bytes)} are free at {folder}",
            hint=f"free {format_bytes(needed_bytes - free_bytes)}, or set MOEINF_HOME to a folder on a larger disk",
        )


# The work


def _begin(incoming: Incoming, origin: Origin, wanted: Wanted, force: bool, notify: Callable[[str], None]) -> None:
    had_something = incoming.folder.exists()
    key = {"schema": SCHEMA, "source": origin.source.repo, "identity": origin.identity, "dtype": wanted.dtype}
    if wanted.form is not None:
        key["experts"] = dataclasses.asdict(wanted.form)
    elif wanted.form_if_packable is not None:
        key["experts"] = "packed without loss, or as released"
    elif not wanted.is_plain:
        key["experts"] = "as released"
    if not force:
        incoming.require_same("source", key)
    if incoming.begin(key):
        notify(f"going on with an unfinished pull of {wanted.name}: {format_bytes(incoming.written_bytes)} are written")
    elif had_something:
        notify(f"an unfinished pull of {wanted.name} was of another source, version or precision, and starts afresh")


def _copy_companions(incoming: Incoming, checkpoint: Checkpoint, plan: Plan) -> None:
    """Configuration as the plan has it; tokenizer and chat template as they are."""
    if not incoming.is_done(CONFIG_NAME):
        incoming.write(CONFIG_NAME, [plan.config.encode()])
    for name in checkpoint.other_files:
        if not incoming.is_done(name):
            incoming.write(name, _chunks(checkpoint.folder / name))


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(_COPY_BYTES):
            yield chunk


def _shard(
    incoming: Incoming,
    origin: Origin,
    checkpoint: Checkpoint,
    stored: _Stored,
    require_room: Callable[[int], None],
    progress: Progress,
) -> None:
    """Fetch what is still needed, file by file, and write what becomes of it."""
    from .densefile import PACKED_NAME
    from .sharding import Sharder

    total_bytes, done_bytes = stored.sharded_bytes, stored.done_bytes(incoming)
    with (
        progress.task("shard", total_bytes, "bytes", done=done_bytes) as task,
        Sharder(stored.plan, _ReportingSink(incoming, task), stored.encoder) as sharder,
    ):
        finished = set(sharder.finished_files())
        origin.forget(finished, incoming.source)
        names = [file for file in checkpoint.weight_files if file not in finished]
        in_flight_bytes = _in_flight_bytes(file.size for file in origin.downloads(names))
        left_bytes = max(0, in_flight_bytes - _bytes_in(incoming.source))
        is_packed = not names and incoming.is_done(PACKED_NAME)
        height_bytes = stored.sharded_bytes if is_packed else stored.height_bytes(left_bytes)
        require_room(height_bytes - done_bytes)
        with closing(origin.fetch(names, incoming.source, progress)) as paths:
            for path in paths:
                sharder.add_file(path)
                incoming.sync()
                origin.forget(set(sharder.finished_files()) - finished, incoming.source)
                finished.update(sharder.finished_files())
        sharder.finish()


def _unpack(incoming: Incoming, stored: _Stored) -> _Stored:
    """Write what is packed already as it was, and let the rest follow: no download is needed twice."""
    from .dtypes import bytes_of
    from .lossless import read_expert

    layout, plain = stored.layout, stored.plan.layout.tensors
    for path in stored.expert_paths:
        if incoming.size(path) == layout.file_bytes:
            tensors = read_expert(incoming.model / path, layout)
            chunks: list[Bytes] = [encode_expert_header(plain), *(bytes_of(tensors[spec.name]) for spec in plain)]
            incoming.write(path, chunks)
    return _Stored(stored.plan, None, is_not_packable=True)


def _pack_dense(incoming: Incoming, manifest: Manifest, stored: _Stored, progress: Progress) -> Manifest:
    """Pack what is to be packed of the dense part, and return what the manifest is then."""
    from .densefile import pack_dense
    from .sharding import DENSE_NAME

    packed = pack_dense(incoming, incoming.model, manifest, stored.packed_dense, progress)
    if packed.packed_dense and incoming.is_done(DENSE_NAME):
        incoming.remove(DENSE_NAME)
    return packed


def _is_done(incoming: Incoming, path: str) -> bool:
    """Whether a file is written, or what was made of it."""
    from .densefile import PACKED_NAME
    from .sharding import DENSE_NAME

    return incoming.is_done(path) or (path == DENSE_NAME and incoming.is_done(PACKED_NAME))


def _manifest(source: Source, stored: _Stored) -> Manifest:
    from .sharding import DENSE_NAME

    plan = stored.plan
    return Manifest(
        source=source,
        architecture=plan.architecture,
        model_type=plan.model_type,
        dtype=plan.dtype,
        precision=stored.precision,
        layers=plan.layers,
        layout=stored.layout,
        dense_files=(DENSE_NAME,),
        dense_bytes=plan.dense_bytes,
        kv_token_bytes=plan.kv_token_bytes,
        kv_fixed_bytes=plan.kv_fixed_bytes,
        max_context=plan.max_context,
        files={},
    )


class _ReportingSink:
    """The sink, which also tells a progress bar what goes into it."""

    def __init__(self, incoming: Incoming, task: Task) -> None:
        self._incoming = incoming
        self._task = task

    def is_done(self, path: str) -> bool:
        return _is_done(self._incoming, path)

    def write(self, path: str, chunks: Iterable[Bytes]) -> None:
        self._incoming.write(path, map(self._report, chunks))

    def dense(self, path: str, header: bytes, size: int) -> _ReportingWriter:
        return _ReportingWriter(self._incoming.dense(path, header, size), self._task)

    def _report(self, chunk: Bytes) -> Bytes:
        self._task.advance(memoryview(chunk).nbytes)
        return chunk


class _ReportingWriter:
    def __init__(self, writer: DenseWriter, task: Task) -> None:
        self._writer = writer
        self._task = task
        self.is_done = writer.is_done
        self.mark_done = writer.mark_done
        self.close = writer.close

    def write_at(self, offset: int, data: Bytes) -> None:
        self._writer.write_at(offset, data)
        self._task.advance(memoryview(data).nbytes)
