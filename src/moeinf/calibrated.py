"""Choosing the numbers of quantised experts by what their inputs are: texts go through the model, what enters its
experts is kept for a while, and says which errors matter.

Owns the scratch file, which has no name, and how the moments of an expert's inputs are made of it, one expert at a
time. Knows nothing of how numbers follow from moments (gptq), or of what becomes of them (quantizing).
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO

import numpy as np
import torch

from .dtypes import bytes_of
from .engine import Engine, load_tokenizer
from .errors import UsageError
from .files import explained
from .hooks import quiet
from .kernels import ExpertMaths, Tensors
from .manifest import Manifest
from .metamodel import MetaModel
from .progress import Progress
from .prompts import Prompt
from .quantizing import MomentsOf
from .store import StoredModel

__all__ = ["Calibration"]

_MOST_TOKENS = 512
"""Of a text."""

_DAMPING = 0.01
_TOKENS_PER_INPUT = 2
"""To the diagonal of an expert's moments so much of its mean is added, and as much more as this many tokens for each
input are of those that it saw: what few tokens say of many inputs is chance (docs/experiments.md).
"""

_ROWS = 4096
"""Tokens whose activations are in memory together."""

Load = Callable[[str], AbstractContextManager[Engine]]
_Part = tuple[torch.dtype, int]
"""Of what a token gives a layer: its dtype, and how many numbers."""


@dataclass(frozen=True)
class Calibration:
    """The texts, as token ids of the model that is to be quantised; `dataset` is what people call them."""

    dataset: str
    inputs: Sequence[Sequence[int]]
    load: Load

    @classmethod
    def read(cls, model: StoredModel, prompts: Sequence[Prompt], dataset: str, load: Load) -> Calibration:
        """Of `prompts` the first 512 tokens of each; `load` loads a model of the store by its name.

        Raises UsageError if there are no tokens.
        """
        tokenizer = load_tokenizer(model)
        most = min(_MOST_TOKENS, model.manifest.max_context)
        with quiet():
            inputs = [tokenizer(prompt.text)["input_ids"][:most] for prompt in prompts]
        inputs = [ids for ids in inputs if ids]
        if not inputs:
            raise UsageError(f"the texts of {dataset} have no tokens to calibrate with", hint="give longer texts")
        return cls(dataset, inputs, load)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.inputs))

    @property
    def text(self) -> str:
        """What people call it."""
        return f"{self.tokens:,} tokens of {self.dataset}"

    @property
    def digest(self) -> str:
        """Another one for other texts."""
        return hashlib.sha256(repr(self.inputs).encode()).hexdigest()

    def scratch_bytes(self, model: StoredModel, meta: MetaModel, layers: Sequence[int]) -> int:
        """What `moments` takes of the disk for a while."""
        return self.tokens * sum(sum(_row_bytes(part)) for part in _parts(model.manifest, meta, layers).values())

    @contextmanager
    def moments(
        self, model: StoredModel, meta: MetaModel, folder: Path, layers: Sequence[int], progress: Progress
    ) -> Iterator[MomentsOf]:
        """Let `model` read the texts, and keep what enters the experts of `layers` in `folder` as long as this is open.
        Raises what loading, running and a full disk raise.
        """
        with explained(folder), tempfile.TemporaryFile(dir=folder) as file:
            scratch = _Scratch(file, _parts(model.manifest, meta, layers), self.tokens)
            self._fill(scratch, model, progress)
            maths = {layer: ExpertMaths(meta.experts[model.manifest.layers[layer].module]) for layer in layers}

            def moments_of(layer: int, expert: int, weights: Tensors) -> Tensors:
                return _moments(maths[layer], *scratch.inputs(layer, expert), weights)

            yield moments_of

    def _fill(self, scratch: _Scratch, model: StoredModel, progress: Progress) -> None:
        with self.load(model.name) as engine, progress.task("read", len(self.inputs), "prompts") as task:
            engine.runtime.observer = scratch.write
            for ids in self.inputs:
                engine.runtime.begin_request(0)
                with torch.inference_mode():
                    engine.model(
                        input_ids=torch.tensor([list(ids)], device=engine.model.device), **engine.last_logits_only
                    )
                task.advance(1)


class _Scratch:
    """What entered the experts of some layers, one layer and one of its `_Part`s after the other."""

    def __init__(self, file: IO[bytes], parts: Mapping[int, Sequence[_Part]], tokens: int) -> None:
        self._file, self._parts, self._tokens = file, parts, tokens
        self._written = dict.fromkeys(parts, 0)
        sizes = [tokens * sum(_row_bytes(part)) for part in parts.values()]
        self._begins = dict(zip(parts, accumulate(sizes, initial=0), strict=False))

    def write(self, layer: int, *step: torch.Tensor) -> None:
        """Keep what a step of a layer is given: its parts [rows, width]. Nothing of layers that are not to be kept."""
        if layer not in self._parts:
            return
        row, begin = self._written[layer], self._begins[layer]
        for tensor, (dtype, _), size in zip(step, self._parts[layer], _row_bytes(self._parts[layer]), strict=True):
            self._file.seek(begin + row * size)
            self._file.write(bytes_of(tensor.to("cpu", dtype)))
            begin += self._tokens * size
        self._written[layer] += len(step[0])

    def inputs(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The states [n, H] of the tokens that chose the expert, and with which weights [n]."""
        self._file.flush()
        begin, found = self._begins[layer], []
        for (dtype, width), size in zip(self._parts[layer], _row_bytes(self._parts[layer]), strict=True):
            data = np.memmap(self._file, np.uint8, "r+", begin, (self._tokens * size,))
            found.append(torch.from_numpy(data).view(dtype).view(self._tokens, width))
            begin += self._tokens * size
        states, index, weights = found
        token, place = torch.nonzero(index == expert, as_tuple=True)
        return states[token], weights[token, place]


def _parts(manifest: Manifest, meta: MetaModel, layers: Sequence[int]) -> dict[int, list[_Part]]:
    """What is kept of a token in each of these layers: its state, the experts that it chose, and their weights."""
    (down,) = (spec.shape for spec in manifest.layout.unpacked.tensors if spec.name == "down_proj")
    parts: dict[int, list[_Part]] = {}
    for layer in layers:
        about = manifest.layers[layer]
        hidden = down[1 if meta.is_transposed(about.module) else 0]
        states = (getattr(torch, manifest.dtype), hidden)
        parts[layer] = [states, (torch.int32, about.top_k), (torch.float32, about.top_k)]
    return parts


def _row_bytes(parts: Sequence[_Part]) -> list[int]:
    return [dtype.itemsize * width for dtype, width in parts]


def _moments(maths: ExpertMaths, rows: torch.Tensor, weights: torch.Tensor, expert: Tensors) -> Tensors:
    """Of an expert that tokens with these states [n, H] chose with these routing `weights` [n]. A token counts as much
    as the square of its weight, as in the layer's output.
    """
    wide = {name: tensor.float() for name, tensor in expert.items()}
    sums: dict[str, torch.Tensor] = {}
    for some, theirs in zip(torch.split(rows, _ROWS), torch.split(weights[:, None], _ROWS), strict=True):
        some = some.float()
        for name, inputs in ((maths.up, some), ("down_proj", maths.inner(some, wide))):
            weighted = inputs * theirs
            product = weighted.t() @ weighted
            sums[name] = sums[name] + product if name in sums else product
    tokens = float(weights.square().sum() ** 2 / weights.pow(4).sum()) if len(weights) else 0.0
    return {name: _damped(each, tokens) for name, each in sums.items()}


def _damped(moments: torch.Tensor, tokens: float) -> torch.Tensor:
    """The same of a size that float32 can handle, and so that they are surely positive definite, and the nearer to
    those of inputs that all count alike the fewer `tokens` there were.
    """
    inputs, mean = len(moments), float(moments.diagonal().mean())
    if not (tokens and 0 < mean < float("inf")):
        return torch.eye(inputs)
    moments = moments / mean
    moments.diagonal().add_(_DAMPING + _TOKENS_PER_INPUT * inputs / tokens)
    return moments
