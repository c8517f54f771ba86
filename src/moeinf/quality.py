"""What a model costs in quality beside the one that it was made of: both read the same texts, and their next-token
distributions are compared.

One model at a time is in memory; the logits of the first wait on disk, in the dtype of its maths. Knows nothing of how
either came about.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import IO

import torch
import torch.nn.functional as F

from .engine import Engine
from .errors import CapacityError, IntegrityError, UsageError
from .files import explained
from .hooks import quiet
from .progress import NO_PROGRESS, Progress, Task
from .prompts import Prompt
from .qualityfile import Quality
from .store import Store, StoredModel
from .units import format_bytes

__all__ = ["compare"]

_ROWS = 64
"""Distributions that are compared at once."""

Load = Callable[[str], AbstractContextManager[Engine]]


def compare(
    model: StoredModel,
    against: StoredModel,
    prompts: Sequence[Prompt],
    dataset: str,
    load: Load,
    *,
    store: Store,
    max_tokens: int = 256,
    progress: Progress = NO_PROGRESS,
) -> Quality:
    """Let `against` and then `model`, each of which `load` loads, read the first `max_tokens` of every prompt.

    Raises UsageError for models whose vocabularies differ, and for texts of no more than a token; CapacityError when
    the disk has no room for the logits, which take tokens x vocabulary x the bytes of a number; and what loading and
    running raise.
    """
    with explained(store.home), tempfile.TemporaryFile(dir=store.home) as file:
        with load(against.name) as engine, progress.task(against.name, len(prompts), "prompts") as task:
            vocabulary = engine.tokenizer.get_vocab()
            texts = _tokenize(engine, prompts, max_tokens)
            _require_room(store, engine, texts)
            _keep_logits(engine, texts, file, task)
        file.seek(0)
        with load(model.name) as engine, progress.task(model.name, len(prompts), "prompts") as task:
            if engine.tokenizer.get_vocab() != vocabulary or _tokenize(engine, prompts, max_tokens) != texts:
                raise UsageError(
                    f"{model.name} and {against.name} do not have the same vocabulary, and cannot be compared",
                    hint="compare a model with the one that it was made of",
                )
            sums = _Sums()
            dtype = str(engine.model.dtype).removeprefix("torch.")
            for ids in texts:
                logits = _logits(engine, ids)
                sums.add(_read_logits(file, logits), logits, ids)
                task.advance(1)
    return sums.quality(against.name, dataset, len(texts), dtype)


def _tokenize(engine: Engine, prompts: Sequence[Prompt], max_tokens: int) -> list[list[int]]:
    """The token ids of the prompts that have two or more, as many as are asked for and the context holds."""
    most = min(max_tokens, engine.plan.context)
    with quiet():
        texts = [engine.tokenizer(prompt.text)["input_ids"][:most] for prompt in prompts]
    texts = [ids for ids in texts if len(ids) > 1]
    if not texts:
        raise UsageError("no text has two tokens, so there is nothing to predict", hint="give longer texts")
    return texts


def _logits(engine: Engine, ids: Sequence[int]) -> torch.Tensor:
    """What the model makes of the text, [tokens - 1, vocabulary]: nothing comes after the last token."""
    engine.runtime.begin_request(0)
    with torch.inference_mode():
        logits: torch.Tensor = engine.model(input_ids=torch.tensor([list(ids)], device=engine.model.device)).logits
    return logits[0, :-1].cpu().contiguous()


def _require_room(store: Store, engine: Engine, texts: Sequence[Sequence[int]]) -> None:
    width = engine.model.config.get_text_config(decoder=True).vocab_size
    needed_bytes = sum(len(ids) - 1 for ids in texts) * width * engine.model.dtype.itemsize
    free_bytes = shutil.disk_usage(store.home).free
    if needed_bytes > free_bytes:
        raise CapacityError(
            f"the logits take {format_bytes(needed_bytes)} of disk for a while, and {format_bytes(free_bytes)} are free"
            f" at {store.home}",
            hint="give fewer --max-prompts or --max-tokens",
        )


def _keep_logits(engine: Engine, texts: Sequence[Sequence[int]], file: IO[bytes], task: Task) -> None:
    for ids in texts:
        file.write(_logits(engine, ids).view(torch.uint8).numpy().data)
        task.advance(1)


def _read_logits(file: IO[bytes], like: torch.Tensor) -> torch.Tensor:
    """The next logits of the file, which have the shape and dtype of `like`."""
    data = bytearray(like.nbytes)
    if file.readinto(data) != like.nbytes:  # type: ignore[attr-defined]  # every file that can be read has it
        raise UsageError("the two models give logits of different shapes or dtypes, and cannot be compared")
    return torch.frombuffer(data, dtype=like.dtype).view(like.shape)


class _Sums:
    """What is compared, token by token, added up in float64."""

    def __init__(self) -> None:
        self._tokens = self._agreed = 0
        self._loss = self._against_loss = self._kl = self._worst_kl = 0.0

    def add(self, against: torch.Tensor, model: torch.Tensor, ids: Sequence[int]) -> None:
        """The logits of one text, [tokens - 1, vocabulary] each."""
        following = torch.tensor(ids[1:])[:, None]
        for part in zip(*(torch.split(tensor, _ROWS) for tensor in (against, model, following)), strict=True):
            wanted, found, token = part
            p, q = (F.log_softmax(logits.double(), -1) for logits in (wanted, found))
            kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
            self._tokens += len(token)
            self._agreed += int((wanted.argmax(-1) == found.argmax(-1)).sum())
            self._against_loss -= float(p.gather(1, token).sum())
            self._loss -= float(q.gather(1, token).sum())
            self._kl += float(kl.sum())
            self._worst_kl = max(self._worst_kl, float(kl.max()))

    def quality(self, against: str, dataset: str, prompts: int, dtype: str) -> Quality:
        if not all(map(math.isfinite, (self._loss, self._against_loss, self._kl))):
            raise IntegrityError(
                f"logits of the model, or of {against}, are no numbers: there is nothing to compare",
                hint="check both with `moeinf verify`",
            )
        loss, against_loss = (torch.tensor(total / self._tokens).double() for total in (self._loss, self._against_loss))
        return Quality(
            against=against,
            dataset=dataset,
            prompts=prompts,
            tokens=self._tokens,
            perplexity=float(loss.exp()),
            against_perplexity=float(against_loss.exp()),
            mean_kl=self._kl / self._tokens,
            worst_kl=self._worst_kl,
            agreement=self._agreed / self._tokens,
            dtype=dtype,
        )
