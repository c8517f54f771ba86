"""What quantised experts cost in quality: the figures, and the file that keeps them beside the model.

The file names the two models by the digests of their manifests, and says nothing of a model that was replaced since.
It is no part of the manifest, which is the commit point of a model and is never written twice.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from .errors import IntegrityError, MoeinfError
from .files import publish
from .manifest import Manifest

__all__ = ["QUALITY_FILE", "Quality", "read_quality", "write_quality"]

QUALITY_FILE = "quality.json"
"""Its name in the folder of what was learned about a model."""
_SCHEMA = 1
_MAX_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Quality:
    """A model beside the one that it was made of, `against`, over `tokens` tokens of `prompts` texts of `dataset`, both
    computing in `dtype`.

    `agreement` is the share of tokens after which both find the same next one likeliest. `mean_kl` and `worst_kl` are
    Kullback-Leibler divergences of the next-token distribution from that of `against`, in nats.
    """

    against: str
    dataset: str
    prompts: int
    tokens: int
    perplexity: float
    against_perplexity: float
    mean_kl: float
    worst_kl: float
    agreement: float
    dtype: str

    @property
    def text(self) -> str:
        """The figures in a line."""
        return (
            f"{self.agreement:.1%} of likeliest tokens are those of {self.against} · KL {self.mean_kl:.4f} on average,"
            f" {self.worst_kl:.2f} at worst · perplexity {self.perplexity:.2f} against {self.against_perplexity:.2f}"
            f" · {self.tokens:,} tokens of {self.dataset} in {self.dtype}"
        )


def read_quality(path: Path, manifest: Manifest) -> Quality | None:
    """What was measured of the model with this manifest; None if nothing was, or if the model was another one then.

    Raises IntegrityError for a file that is damaged, MoeinfError if it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise MoeinfError(f"{path} cannot be read: {error.strerror}") from error
    try:
        raw = json.loads(data)
        if (raw.pop("schema"), raw.pop("model")) != (_SCHEMA, manifest.digest):
            return None
        raw.setdefault("dtype", manifest.dtype)  # files had none while no other was to be had
        return _checked(Quality(**raw))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{path} is damaged: {error}", hint="remove the file, or measure again") from error


def write_quality(quality: Quality, path: Path, manifest: Manifest) -> None:
    """Keep what was measured of the model with this manifest. All or nothing; raises what `files.publish` raises."""
    raw = {"schema": _SCHEMA, "model": manifest.digest, **dataclasses.asdict(quality)}
    publish(path, [json.dumps(raw, indent=1).encode() + b"\n"])


_TYPES: dict[object, type] = {"str": str, "int": int, "float": float}


def _checked(quality: Quality) -> Quality:
    for field in dataclasses.fields(quality):
        value = getattr(quality, field.name)
        if type(value) is not _TYPES[field.type] or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{field.name} is {value!r}")
    return quality
