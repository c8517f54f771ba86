"""From a stored model to another one, whose experts are packed otherwise and whose other weights are the same.

Owns the order of the work. Knows nothing of how numbers are chosen (quantized), how dense weights are packed
(densefile), or how files become durable (incoming).
torch and transformers are imported inside functions: what is refused is refused before they are.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from .errors import CapacityError, ModelNotFoundError, UnsupportedError, UsageError
from .files import Bytes
from .forms import ExpertForm, name_precision
from .incoming import Incoming
from .manifest import DENSE_SCHEMA, LOSSLESS, QUANTIZED_SCHEMA, Manifest, expert_path, lossless_gain
from .progress import NO_PROGRESS, Progress
from .store import Store, StoredModel
from .tensorfile import encode_expert_header
from .units import format_bytes

if TYPE_CHECKING:
    from .metamodel import MetaModel
    from .quantized import Encoder

__all__ = ["quantize_model"]


def quantize_model(
    model: StoredModel,
    name: str,
    form: ExpertForm,
    *,
    store: Store,
    force: bool = False,
    progress: Progress = NO_PROGRESS,
    notify: Callable[[str], None] = lambda _: None,
) -> StoredModel:
    """Write `model` to the store once more as `name`, its experts in `form`, and return it.

    One expert at a time is in memory, or one dense matrix: these are packed beside lossless experts, and plain beside
    others. What stays as it is is linked where the disk can, and copied elsewhere. What is here already is returned as
    it is, unless `force` asks for it anew; a run that did not finish is continued.

    Raises UsageError when the name is taken by another model, UnsupportedError for a model that is quantised already,
    CapacityError when the disk is too small, IntegrityError for weights that are not finite, or for damaged files.
    """
    there = model.manifest.layout.quantization
    if there is not None and (not there.is_lossless or form.kind == there.kind):
        pulling = shlex.join(["moeinf", "pull", model.manifest.source.repo, "--experts", form.kind, "--name", name])
        raise UnsupportedError(
            f"{model.name} has {there.text} already",
            hint=pulling if there.is_released else "quantize the model that it was made of, or pull that again",
        )
    if name == model.name:
        raise UsageError(f"{name} is the model itself", hint=f"choose another --name, like {name}-{form.kind}")
    if not force and (existing := _existing(model, name, form, store)):
        notify(f"{name} is here already, made of {model.manifest.source.repo}")
        return existing
    with model.use(), store.incoming(name, "quantizing") as incoming:
        schema = DENSE_SCHEMA if form.kind == LOSSLESS else QUANTIZED_SCHEMA
        key = {"schema": schema, "of": model.manifest.digest, "experts": dataclasses.asdict(form)}
        if incoming.begin(key):
            notify(f"going on with {name}: {format_bytes(incoming.written_bytes)} are written")
        meta = _meta_model(model)
        is_transposed = meta.is_transposed(model.manifest.layers[0].module)
        encoder = form.encoder(model.manifest.layout.unpacked, is_transposed=is_transposed)
        manifest = dataclasses.replace(
            model.manifest,
            layout=encoder.layout,
            precision=name_precision(model.manifest.precision, encoder.layout),
        )
        _require_room(store, name, _needed_bytes(manifest, meta, incoming))
        _take_over_files(model, incoming, _other_files(model.manifest).keys() - set(manifest.dense_files))
        manifest = _write_dense(model, manifest, meta, incoming, progress)
        _write_experts(model, encoder, incoming, progress)
        incoming.publish(manifest)
    return store.open(name)


def _existing(model: StoredModel, name: str, form: ExpertForm, store: Store) -> StoredModel | None:
    """The model that is asked for, if it is here. Raises UsageError if its name is taken by another one."""
    try:
        existing = store.open(name)
    except ModelNotFoundError:
        return None
    there = existing.manifest
    if ExpertForm.of(there.layout.quantization) == form and _has_same_others(existing, model):
        return existing
    raise UsageError(
        f"{name} is here already, and is {there.source.repo} in {there.precision}",
        hint="choose another --name to keep both, or add --force to replace it",
    )


def _has_same_others(one: StoredModel, other: StoredModel) -> bool:
    """Whether all is the same but for experts, whatever dense weights are packed as."""
    from .densefile import DenseFiles

    files, others = _other_files(one.manifest), _other_files(other.manifest)
    if files == others:
        return True
    for model, records in ((one, files), (other, others)):
        for name in model.manifest.dense_files:
            del records[name]
    if files != others:
        return False
    with DenseFiles(one.path, one.manifest) as dense, DenseFiles(other.path, other.manifest) as other_dense:
        return dense.has_same_weights(other_dense)


def _meta_model(model: StoredModel) -> MetaModel:
    from .metamodel import MetaModel, choose_dtype, load_config

    loaded = load_config(model.path)
    return MetaModel(loaded, choose_dtype(model.manifest.dtype, loaded.dtype))


def _needed_bytes(manifest: Manifest, meta: MetaModel, incoming: Incoming) -> int:
    """Disk for the experts that are not written yet, and for a dense part that is not taken over."""
    from .densefile import PACKED_NAME
    from .sharding import DENSE_NAME

    left = sum(not incoming.is_done(expert_path(*expert)) for expert in _experts(manifest))
    dense_bytes = 0
    if not incoming.is_done(PACKED_NAME) and not incoming.is_done(DENSE_NAME):
        if _is_lossless(manifest) and (packable := meta.packable):
            dense_bytes = manifest.dense_bytes - lossless_gain(packable.values())
        elif manifest.packed_dense:
            dense_bytes = manifest.unpacked.dense_bytes
    return left * manifest.layout.file_bytes + dense_bytes


def _is_lossless(manifest: Manifest) -> bool:
    made = manifest.layout.quantization
    return made is not None and made.is_lossless


def _require_room(store: Store, name: str, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(store.home).free
    if needed_bytes > free_bytes:
        raise CapacityError(
            f"{name} needs {format_bytes(needed_bytes)} more disk, and {format_bytes(free_bytes)} are free at"
            f" {store.home}",
            hint=f"free {format_bytes(needed_bytes - free_bytes)}",
        )


def _experts(manifest: Manifest) -> Iterator[tuple[int, int]]:
    """(layer, expert) of every expert file."""
    return ((layer, expert) for layer, about in enumerate(manifest.layers) for expert in range(about.num_experts))


def _other_files(manifest: Manifest) -> dict[str, object]:
    """What the manifest says of the files that hold no expert."""
    experts = {expert_path(*expert) for expert in _experts(manifest)}
    return {path: record for path, record in manifest.files.items() if path not in experts}


def _take_over_files(model: StoredModel, incoming: Incoming, paths: Iterable[str]) -> None:
    for path in sorted(paths):
        if not incoming.is_done(path):
            incoming.link(path, model.path / path, model.manifest.files[path])


def _write_dense(
    model: StoredModel, manifest: Manifest, meta: MetaModel, incoming: Incoming, progress: Progress
) -> Manifest:
    """Pack dense weights beside lossless experts, unpack them beside others, or take them over; returns the manifest
    of what is there then.
    """
    from .densefile import DenseFiles, pack_dense, plain_chunks
    from .sharding import DENSE_NAME

    if _is_lossless(manifest):
        manifest = pack_dense(incoming, model.path, manifest, meta.packable, progress)
    elif manifest.packed_dense:
        if not incoming.is_done(DENSE_NAME):
            with DenseFiles(model.path, manifest) as files:
                incoming.write(DENSE_NAME, plain_chunks(files, meta.shapes))
        manifest = dataclasses.replace(manifest.unpacked, dense_files=(DENSE_NAME,))
    _take_over_files(model, incoming, set(manifest.dense_files) & model.manifest.files.keys())
    return manifest


def _write_experts(model: StoredModel, encoder: Encoder, incoming: Incoming, progress: Progress) -> None:
    manifest = model.manifest
    paths = {expert_path(layer, expert): (layer, expert) for layer, expert in _experts(manifest)}
    left = [path for path in paths if not incoming.is_done(path)]
    with progress.task("quantize", len(paths), "experts", done=len(paths) - len(left)) as task:
        for path in left:
            layer, expert = paths[path]
            what = f"expert {expert} of {manifest.layers[layer].module}"
            incoming.write(path, _expert_chunks(model, path, encoder, what))
            task.advance(1)


def _expert_chunks(model: StoredModel, path: str, encoder: Encoder, what: str) -> Iterator[Bytes]:
    from .lossless import read_expert

    yield encode_expert_header(encoder.layout.tensors)
    yield from encoder.encode(read_expert(model.path / path, model.manifest.layout), what)
