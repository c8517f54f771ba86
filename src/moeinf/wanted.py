"""What a pull is asked for: a model, its name in the store, and what its experts are to be; and the model that is here
already and is just that. Changes nothing.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from . import catalog, demo
from .errors import IntegrityError, ModelNotFoundError, MoeinfError, UsageError
from .forms import (
    ExpertForm,
    is_expanded_on_request,
    is_not_packable,
    name_calibration,
    quantize_again,
    released_dtype,
)
from .manifest import LOSSLESS, Manifest
from .reference import MAX_NAME, Reference, read_reference
from .store import Store, StoredModel, is_valid_name

__all__ = ["Packs", "Wanted", "find_existing", "never", "read_wanted", "require_pullable"]

Packs = Callable[[], bool]
"""Whether to pack without loss what was released plain. Asked late, if at all: to know, torch may have to be loaded."""

_DTYPES = ("auto", "bfloat16", "float16", "float32")


def never() -> bool:
    """A `Packs` that leaves what was released plain as it is."""
    return False


@dataclass(frozen=True, slots=True)
class Wanted:
    """`form`: of packed experts; others are stored as they were released, or plain if `is_plain`. Those that were
    released plain are packed without loss if `packs()`. With a `calibration`, a model can only be found here: a pull
    makes none.
    """

    reference: Reference
    name: str
    dtype: str
    form: ExpertForm | None
    is_plain: bool
    packs: Packs
    calibration: str

    @property
    def form_if_packable(self) -> ExpertForm | None:
        """What experts become that were released plain, if they can."""
        return ExpertForm.read(LOSSLESS, None) if self.packs() else None

    def is_met_by(self, there: Manifest) -> bool:
        """Whether this has its experts as is asked for."""
        quantization = there.layout.quantization
        if name_calibration(there.precision) != self.calibration:
            return False
        if self.is_plain:
            return quantization is None
        if quantization is None and self.form is not None:
            return self.form.kind == LOSSLESS and is_not_packable(there)
        if self.form is None and quantization is not None and quantization.is_lossless:
            return True
        return ExpertForm.of(quantization) == self.form and not is_expanded_on_request(there)


def read_wanted(
    source: str,
    store: Store,
    name: str | None,
    revision: str | None,
    dtype: str,
    experts: str | None,
    group: int | None,
    packs: Packs,
) -> Wanted:
    """What these options of `pull` ask for; without a `name`, that of the model that is here and is just that, or else
    one after the source. Raises UsageError, ModelNotFoundError, and IntegrityError for a model here that is damaged.
    """
    form = None if experts in (None, "bf16") else ExpertForm.read(experts, group)
    if form is None and group is not None:
        raise UsageError("--group says how int8 experts are grouped", hint="add --experts int8, or leave it out")
    if dtype not in _DTYPES:
        raise UsageError(f"--dtype {dtype} is not known", hint=f"choose one of: {', '.join(_DTYPES)}")
    if name is not None:
        store.path(name)
    reference, stored = _read_source(source, store)
    is_plain, calibration = experts == "bf16", ""
    if stored is not None and experts is None:
        calibration = name_calibration(stored.manifest.precision)
        form = ExpertForm.of(stored.manifest.layout.quantization)
        is_plain = is_expanded_on_request(stored.manifest)
    if stored is not None and dtype == "auto":
        dtype = released_dtype(stored.manifest)
    if revision is not None:
        reference = _at_revision(reference, revision)
    if experts is not None or stored is not None or reference.is_demo:
        packs = never
    default_name = _default_name(reference, form)
    wanted = Wanted(reference, name or default_name, dtype, form, is_plain, packs, calibration)
    if name is not None:
        return wanted
    found = (model for model in store.find(reference) if reference.is_source_of(model.manifest.source))
    same = (model.name for model in ([stored] if stored else found) if wanted.is_met_by(model.manifest))
    return dataclasses.replace(wanted, name=next(same, wanted.name))


def _default_name(reference: Reference, form: ExpertForm | None) -> str:
    suffix = f"-{form.kind}" if form else ""
    return f"{reference.default_name[: MAX_NAME - len(suffix)]}{suffix}"


def _read_source(source: str, store: Store) -> tuple[Reference, StoredModel | None]:
    """Where the model comes from, and the model if it is here and was called by its name."""
    reference = read_reference(source)
    if is_valid_name(source) and source in store.names():
        try:
            stored = store.open(source)
            return Reference.of(stored.manifest.source), stored
        except MoeinfError:
            if reference is None:
                raise
    if reference is None:
        near = catalog.suggest(source)
        raise ModelNotFoundError(
            f"{source!r} is no alias, no hub id and no folder",
            hint=f"did you mean {' or '.join(near)}?" if near else "write a hub id as org/name, and a folder as ./name",
        )
    return reference, None


def _at_revision(reference: Reference, revision: str) -> Reference:
    if not revision:
        raise UsageError("the revision is empty", hint="leave --revision out, or name one")
    if reference.is_demo:
        raise UsageError("demo ships with the program, and has no revisions", hint="leave out --revision")
    if reference.is_folder:
        raise UsageError(f"{reference.repo} is a folder, and has no revisions", hint="leave out --revision")
    if reference.revision not in (None, revision):
        raise UsageError(f"two revisions are asked for, {reference.revision} and {revision}", hint="give one of them")
    return dataclasses.replace(reference, revision=revision)


def find_existing(wanted: Wanted, store: Store) -> StoredModel | None:
    """The model that is asked for, if it is here. Raises UsageError if its name is taken by another one."""
    try:
        model = store.open(wanted.name)
    except ModelNotFoundError:
        return None
    except IntegrityError as error:
        raise IntegrityError(str(error), hint="add --force to pull it again") from error
    there = model.manifest
    if wanted.reference.is_demo and there.source.repo == demo.NAME and there.source.commit != demo.VERSION:
        return None  # of an older program: it is replaced
    if (
        wanted.is_met_by(there)
        and wanted.reference.is_source_of(there.source)
        and wanted.dtype in ("auto", there.dtype)
    ):
        return model
    experts = f", {there.layout.quantization.text}" if there.layout.quantization else ""
    raise UsageError(
        f"{model.name} is here already, and is {there.source.repo} in {there.dtype}{experts}",
        hint="add --name to keep both, or --force to replace it",
    )


def require_pullable(wanted: Wanted, source: str, store: Store) -> None:
    """Raise UsageError for what no pull makes; `source` is then a model that is here."""
    if wanted.calibration:
        raise UsageError(
            f"{source} is calibrated on {wanted.calibration}, and a pull cannot do that",
            hint=shlex.join(quantize_again(wanted.name, store.open(source).manifest)),
        )
