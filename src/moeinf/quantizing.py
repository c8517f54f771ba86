"""From a stored model to another one, whose experts are packed otherwise and whose other weights are the same.

Owns the order of the work. Knows nothing of how numbers are chosen (quantized), how dense weights are packed
(densefile), or how files become durable (incoming).
torch and transformers are imported inside functions: what is refused is refused before they are.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .errors import CapacityError, ModelNotFoundError, UnsupportedError, UsageError
from .files import Bytes
from .forms import ExpertForm, name_calibration, name_precision
from .incoming import Incoming
from .manifest import DENSE_SCHEMA, LOSSLESS, Manifest, expert_path, lossless_gain
from .progress import NO_PROGRESS, Progress
from .store import Store, StoredModel
from .tensorfile import encode_expert_header
from .units import format_bytes

if TYPE_CHECKING:
    import torch

    from .metamodel import MetaModel
    from .quantized import Encoder

__all__ = ["Calibration", "MomentsOf", "quantize_model"]

MomentsOf = Callable[[int, int, "Mapping[str, torch.Tensor]"], "Mapping[str, torch.Tensor]"]
"""For a layer, one of its experts, and its weights as the module has them, the second moments [in, in] of what each
matrix is multiplied with, by name."""


class Calibration(Protocol):
    """Texts by which numbers are chosen (`calibrated`): `text` is what people call them, and other ones have another
    `digest`.
    """

    @property
    def text(self) -> str: ...

    @property
    def digest(self) -> str: ...

    def scratch_bytes(self, model: StoredModel, meta: MetaModel, layers: Sequence[int]) -> int:
        """What `moments` takes of the disk for a while."""

    def moments(
        self, model: StoredModel, meta: MetaModel, folder: Path, layers: Sequence[int], progress: Progress
    ) -> AbstractContextManager[MomentsOf]:
        """What the experts of `layers` are given when `model` reads the texts; a file in `folder` has it meanwhile."""


def quantize_model(
    model: StoredModel,
    name: str,
    form: ExpertForm,
    *,
    store: Store,
    calibration: Calibration | None = None,
    force: bool = False,
    progress: Progress = NO_PROGRESS,
    notify: Callable[[str], None] = lambda _: None,
) -> StoredModel:
    """Write `model` to the store once more as `name`, its experts in `form`, and return it. With a `calibration` their
    numbers are chosen by what they are multiplied with.

    One expert at a time is in memory, or one dense matrix: these are packed without loss, whatever `form` is. What
    stays as it is is linked where the disk can, and copied elsewhere. What is here already is returned as it is, unless
    `force` asks for it anew; a run that did not finish is continued.

    Raises UsageError when the name is taken by another model, or what loses nothing is to be calibrated,
    UnsupportedError for a model that is quantised already, CapacityError when the disk is too small, IntegrityError for
    weights that are not finite, or for damaged files.
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
    if calibration is not None and form.kind == LOSSLESS:
        raise UsageError("lossless experts lose nothing that a calibration could save", hint="leave --calibrate out")
    if not force and (existing := _existing(model, name, form, calibration, store)):
        notify(f"{name} is here already, made of {model.manifest.source.repo}")
        return existing
    with model.use(), store.incoming(name, "quantizing") as incoming:
        if not force and (existing := _existing(model, name, form, calibration, store)):
            return existing  # another process made it meanwhile
        key = {"schema": DENSE_SCHEMA, "of": model.manifest.digest, "experts": dataclasses.asdict(form)}
        if calibration is not None:
            key["calibration"] = calibration.digest
        if not force:
            incoming.require_same("of", key)
        if incoming.begin(key):
            notify(f"going on with {name}: {format_bytes(incoming.written_bytes)} are written")
        meta = _meta_model(model)
        is_transposed = meta.is_transposed(model.manifest.layers[0].module)
        encoder = form.encoder(model.manifest.layout.unpacked, is_transposed=is_transposed)
        manifest = dataclasses.replace(
            model.manifest,
            layout=encoder.layout,
            precision=name_precision(model.manifest.precision, encoder.layout, calibration.text if calibration else ""),
        )
        left = [expert for expert in _experts(manifest) if not incoming.is_done(expert_path(*expert))]
        layers = sorted({layer for layer, _ in left})
        scratch_bytes = 0
        if calibration is not None and layers:
            scratch_bytes = calibration.scratch_bytes(model, meta, layers)
            notify(f"calibrating on {calibration.text}, which takes {format_bytes(scratch_bytes)} of disk for a while")
        stored_bytes = len(left) * manifest.layout.file_bytes + _dense_bytes(manifest, meta, incoming)
        _require_room(store, name, stored_bytes, scratch_bytes)
        _take_over_files(model, incoming, _other_files(model.manifest).keys() - set(manifest.dense_files))
        manifest = _write_dense(model, manifest, meta, incoming, progress)
        with ExitStack() as stack:
            moments_of = None
            if calibration is not None and layers:
                moments_of = stack.enter_context(calibration.moments(model, meta, store.models, layers, progress))
            _write_experts(model, encoder, left, moments_of, incoming, progress)
        incoming.publish(manifest)
    return store.open(name)


def _existing(
    model: StoredModel, name: str, form: ExpertForm, calibration: Calibration | None, store: Store
) -> StoredModel | None:
    """The model that is asked for, if it is here. Raises UsageError if its name is taken by another one."""
    try:
        existing = store.open(name)
    except ModelNotFoundError:
        return None
    there = existing.manifest
    wanted = form, calibration.text if calibration else ""
    is_wanted = (ExpertForm.of(there.layout.quantization), name_calibration(there.precision)) == wanted
    if is_wanted and _has_same_others(existing, model):
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


def _dense_bytes(manifest: Manifest, meta: MetaModel, incoming: Incoming) -> int:
    """Disk for a dense part that is not taken over, and not written yet."""
    from .densefile import PACKED_NAME

    if manifest.packed_dense or incoming.is_done(PACKED_NAME):
        return 0
    packable = meta.packable
    return manifest.dense_bytes - lossless_gain(packable.values()) if packable else 0


def _require_room(store: Store, name: str, stored_bytes: int, scratch_bytes: int) -> None:
    needed_bytes = stored_bytes + scratch_bytes
    free_bytes = shutil.disk_usage(store.models).free
    if needed_bytes > free_bytes:
        for_a_while = f", {format_bytes(scratch_bytes)} of it for a while" if scratch_bytes else ""
        raise CapacityError(
            f"{name} needs {format_bytes(needed_bytes)} more disk{for_a_while}, and {format_bytes(free_bytes)} are free"
            f" at {store.models}",
            hint=f"free {format_bytes(needed_bytes - free_bytes)}"
            + (", or give fewer --max-prompts" if scratch_bytes else ""),
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
    """Pack the dense part, or take over one that is packed, or that cannot be; returns the manifest of what is there
    then.
    """
    from .densefile import pack_dense

    if not manifest.packed_dense:
        for path in manifest.dense_files:
            model.require_whole(path)
        manifest = pack_dense(incoming, model.path, manifest, meta.packable, progress)
    _take_over_files(model, incoming, set(manifest.dense_files) & model.manifest.files.keys())
    return manifest


def _write_experts(
    model: StoredModel,
    encoder: Encoder,
    left: Sequence[tuple[int, int]],
    moments_of: MomentsOf | None,
    incoming: Incoming,
    progress: Progress,
) -> None:
    total = model.manifest.num_experts
    with progress.task("quantize", total, "experts", done=total - len(left)) as task:
        for layer, expert in left:
            incoming.write(expert_path(layer, expert), _expert_chunks(model, layer, expert, encoder, moments_of))
            if moments_of is not None:
                incoming.sync()  # choosing took longer than this does, and an interrupted run keeps it
            task.advance(1)


def _expert_chunks(
    model: StoredModel, layer: int, expert: int, encoder: Encoder, moments_of: MomentsOf | None
) -> Iterator[Bytes]:
    from .lossless import read_expert
    from .quantized import Quantizer

    what, path = f"expert {expert} of {model.manifest.layers[layer].module}", expert_path(layer, expert)
    model.require_whole(path)
    weights = read_expert(model.path / path, model.manifest.layout)
    yield encode_expert_header(encoder.layout.tensors)
    if moments_of is None:
        yield from encoder.encode(weights, what)
    else:
        assert isinstance(encoder, Quantizer), "no other form has numbers to choose"
        yield from encoder.encode(weights, what, moments_of(layer, expert, weights))
