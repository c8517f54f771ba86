"""Tokens out of a loaded model: one conversation's KV cache, sampling, stopping. What a generation config means is
transformers' `generate`, and so is the loop itself, but for models whose single tokens take little (`token_forward`).

Knows nothing of text, terminals or how experts are found.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from operator import index
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import torch
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .device import is_out_of_memory
from .draw import QuickDraw, draws_as_torch_does
from .errors import UsageError
from .hooks import quiet
from .kvcache import can_crop, make_cache
from .metamodel import CACHE
from .runtime import StepStopped
from .stats import Stats
from .token_forward import takes_tokens

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["Completion", "FinishReason", "Sampling", "Session", "make_generation_config"]

FinishReason = Literal["stop", "length", "interrupted"]

_LOWEST_TEMPERATURE, _HIGHEST_TEMPERATURE = 0.001, 1000
"""Beyond these, logits become infinite or all alike."""
_LARGEST_SEED = (1 << 63) - 1
_ROOM = (
    "shorten it, or start afresh (/clear in a chat), or give a larger --context, which takes memory from the experts"
)
_NO_MORE_ROOM = "shorten it, or start afresh (/clear in a chat): the model was made for no longer context"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy; None leaves `temperature`, `top_p` and `top_k` to the model's own
    generation config. Without `max_tokens` an answer may fill the context.

    With a `seed` the same request gives the same tokens again; without one, each time others.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        limits = {
            "max_tokens": (1, None),
            "temperature": (0, _HIGHEST_TEMPERATURE),
            "top_p": (0, 1),
            "top_k": (0, None),
            "seed": (0, _LARGEST_SEED),
        }
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            is_number = isinstance(value, Real if name in ("temperature", "top_p") else Integral)
            if value is not None and (isinstance(value, bool) or not is_number):
                kind = "a number" if name in ("temperature", "top_p") else "a whole number"
                raise UsageError(f"{name.replace('_', ' ')} must be {kind}, not {value!r}")
            if value is not None and not (value >= least and (most is None or value <= most)):
                span = f"{least} or more" if most is None else f"from {least} to {most}"
                raise UsageError(f"{name.replace('_', ' ')} must be {span}, not {value}")
        if self.temperature is not None and 0 < self.temperature < _LOWEST_TEMPERATURE:
            raise UsageError(
                f"temperature must be 0, or {_LOWEST_TEMPERATURE} or more, not {self.temperature}",
                hint="0 takes the likeliest token",
            )


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer: its `tokens` (a stop token included), why it ended, and what it cost. `prompt_tokens` counts the
    whole input.
    """

    prompt_tokens: int
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats


class Session:
    """One conversation with an engine: what was said stays in the KV cache, and only what is new is computed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._cache: Cache | None = None
        self._tokens: list[int] = []

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are held."""
        return len(self._tokens)

    def clear(self) -> None:
        """Forget everything, and give the memory back."""
        self._cache, self._tokens = None, []

    def generate(
        self,
        input_ids: Iterable[SupportsIndex],
        sampling: Sampling | None = None,
        *,
        on_token: Callable[[int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Completion:
        """Continue `input_ids`, the whole sequence so far; a prefix that the session holds already is not computed
        again.

        `on_token` gets each token as it is made. `should_stop` is asked once per token, and between the layers of a
        long prompt; when it says yes, the token being made is the last. While another thread's answer is made, this one
        waits. Raises UsageError for an empty input or one that does not fit the context.
        """
        sampling = sampling or Sampling()
        try:
            ids = [index(token) for token in input_ids]
        except TypeError as error:
            raise UsageError(f"a prompt is a sequence of token numbers: {error}") from error
        room = self._engine.plan.context - len(ids)
        if not ids:
            raise UsageError("there is nothing to continue: the prompt has no tokens")
        if room < 1:
            raise UsageError(
                f"what is to be continued has {len(ids)} tokens and the context holds {self._engine.plan.context}",
                hint=_ROOM if self._engine.plan.context < self._engine.manifest.max_context else _NO_MORE_ROOM,
            )
        words = getattr(self._engine.model.get_input_embeddings(), "num_embeddings", None)
        if words is not None and not 0 <= min(ids) <= max(ids) < words:
            raise UsageError(f"the prompt has tokens that are none of the model's {words:,}")
        with self._engine.turn():
            return self._answer(ids, sampling, min(sampling.max_tokens or room, room), on_token, should_stop)

    def _answer(
        self,
        ids: list[int],
        sampling: Sampling,
        max_tokens: int,
        on_token: Callable[[int], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> Completion:
        clock = _Clock(on_token, should_stop)
        self._engine.runtime.reset_counters()
        self._engine.runtime.should_stop = should_stop
        try:
            while (new := self._continue(ids, sampling, max_tokens, clock)) is None:
                self._engine.make_room()
                clock.tries += 1
        except StepStopped:
            clock.is_interrupted = True
            self.clear()
            new = list(clock.tokens)
        except BaseException:
            self.clear()  # a step that ended midway has left some layers longer than others
            raise
        finally:
            self._engine.runtime.should_stop = None
            self._engine.runtime.begin_prompt(0)
        stats = self._engine.finished(clock.timing(len(ids) - clock.reused))
        return Completion(len(ids), tuple(new), self._finish_reason(new, clock), stats)

    def _continue(self, ids: list[int], sampling: Sampling, max_tokens: int, clock: _Clock) -> list[int] | None:
        """The new tokens, those included that there are already; None if a GPU's memory ran out meanwhile."""
        made = list(clock.tokens)
        try:
            with torch.inference_mode(), quiet():
                return made + self._generate([*ids, *made], sampling, max_tokens - len(made), clock)
        except RuntimeError as error:  # until this is left, the step's tensors are held
            if not is_out_of_memory(error):
                raise
            self.clear()
            return None

    def _generate(self, ids: list[int], sampling: Sampling, max_tokens: int, clock: _Clock) -> list[int]:
        model: Any = self._engine.model
        if sampling.seed is not None and not clock.tokens:
            torch.manual_seed(sampling.seed)
        config = make_generation_config(self._engine.generation_config, sampling, max_tokens)
        clock.begin()
        clock.reused = self._reuse(ids)
        if clock.tries:
            self._engine.runtime.begin_prompt(len(ids) - clock.reused)
        else:
            self._engine.runtime.begin_request(clock.reused, len(ids) - clock.reused)
        self._prefill(ids, clock)
        prompt = torch.tensor([ids], device=model.device)
        output: Any = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=config,
            logits_processor=_draw(config, model.device),
            streamer=clock,
            stopping_criteria=StoppingCriteriaList([clock.criterion()]),
            return_dict_in_generate=True,
            custom_generate=_loop(clock, config.do_sample) if takes_tokens(model, self._cache) else None,
            **{CACHE: self._cache},
        )
        self._cache = getattr(output, CACHE)
        sequence: list[int] = output.sequences[0].tolist()
        self._tokens = sequence[:-1]  # the last token was made, and not yet read
        return sequence[len(ids) :]

    def _reuse(self, ids: list[int]) -> int:
        """Cut the cache back to what it shares with `ids`, less the last token, whose logits are needed; returns what
        is left.
        """
        shared = 0
        for held, asked in zip(self._tokens, ids[:-1], strict=False):
            if held != asked:
                break
            shared += 1
        if shared < len(self._tokens):
            if shared and self._cache is not None and can_crop(self._cache):
                self._cache.crop(shared - len(self._tokens))  # negative: how many to remove
                self._tokens = self._tokens[:shared]
            else:
                self.clear()
        if self._cache is None and self._engine.uses_dynamic_cache:
            config = self._engine.model.config.get_text_config(decoder=True)
            self._cache = make_cache(config, self._engine.plan.context)
        return len(self._tokens)

    def _prefill(self, ids: list[int], clock: _Clock) -> None:
        """Put a long prompt through the model in pieces that the workspace has room for, which have a single token
        where the model goes on with no more; `generate` does the last piece.
        """
        most = self._engine.plan.prefill_tokens(self._engine.runtime.lendable_slots, len(ids))
        while self._cache is not None and (left := len(ids) - len(self._tokens)) > 1:
            begin = len(self._tokens)
            step = most if begin == 0 or self._engine.continues else 1
            if left <= step:
                break
            if clock.is_stopped():
                raise StepStopped
            piece = torch.tensor([ids[begin : begin + step]], device=self._engine.model.device)
            self._engine.model(input_ids=piece, use_cache=True, **{CACHE: self._cache}, **self._engine.last_logits_only)
            self._tokens = ids[: begin + step]

    def _finish_reason(self, new: list[int], clock: _Clock) -> FinishReason:
        if new and new[-1] in self._engine.stop_tokens:
            return "stop"
        if clock.is_interrupted or not new:
            return "interrupted"
        return "length"


class _Clock(BaseStreamer):
    """Watches one `generate`: hands tokens on, asks whether to stop, and takes the times."""

    def __init__(self, on_token: Callable[[int], None] | None, should_stop: Callable[[], bool] | None) -> None:
        self.reused = self.tries = 0
        self.is_interrupted = False
        self.tokens: list[int] = []
        self._on_token = on_token
        self._should_stop = should_stop
        self._begin = time.perf_counter()
        self._times: list[float] = []
        self._saw_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if not self._saw_prompt:  # the first thing that `generate` streams is the prompt
            self._saw_prompt = True
            return
        self._times.append(time.perf_counter())
        for token in value.reshape(-1).tolist():
            self.tokens.append(token)
            if self._on_token is not None:
                self._on_token(token)

    def end(self) -> None:
        pass

    def begin(self) -> None:
        """`generate` begins, perhaps once more."""
        self._saw_prompt = False

    def is_stopped(self) -> bool:
        if self._should_stop is not None and self._should_stop():
            self.is_interrupted = True
        return self.is_interrupted

    def criterion(self) -> StoppingCriteria:
        clock = self

        class _Stop(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
                return torch.full((len(input_ids),), clock.is_stopped(), dtype=torch.bool, device=input_ids.device)

        return _Stop()

    def timing(self, prefilled: int) -> Stats:
        """Times alone; `prefilled` prompt tokens were computed."""
        if not self._times:
            return Stats()
        first = self._times[0] - self._begin
        rest = self._times[-1] - self._times[0]
        steps = len(self._times) - 1
        return Stats(
            ttft_s=first,
            tpot_s=rest / steps if steps else 0.0,
            prefill_tokens_per_s=prefilled / first if first else 0.0,
            decode_tokens_per_s=steps / rest if steps and rest else 0.0,
        )


def _loop(clock: _Clock, draws: bool) -> Callable[..., Any]:
    """The loop of `generate` for one sequence, without what it does for several, and for masks and positions that are
    the usual ones. `clock` is told of each token.
    """

    def loop(model: Any, ids: Any, logits_processor: Any, stopping_criteria: Any, **given: Any) -> Any:
        cache = given[CACHE]
        asked = {name: given[name] for name in (CACHE, "use_cache", "logits_to_keep") if name in given}
        new, is_done = ids[:, cache.get_seq_length() :], False
        while not is_done:
            scores = model(input_ids=new, **asked).logits[:, -1].to(torch.float32, copy=True)
            for processor in logits_processor:
                scores = processor(ids, scores)
            new = torch.multinomial(scores.softmax(-1), num_samples=1) if draws else scores.argmax(-1, keepdim=True)
            ids = torch.cat([ids, new], dim=-1)
            is_done = bool(stopping_criteria(ids, None))
            clock.put(new)
        return GenerateDecoderOnlyOutput(sequences=ids, **{CACHE: cache})

    return loop


def _draw(config: GenerationConfig, place: torch.device) -> LogitsProcessorList:
    draws = config.do_sample and place.type == "cpu" and draws_as_torch_does()
    return LogitsProcessorList([QuickDraw()] if draws else [])


def make_generation_config(base: GenerationConfig, sampling: Sampling, max_tokens: int) -> GenerationConfig:
    """What transformers' `generate` is told: the model's own config, with `sampling` in place of what it says."""
    config = copy.deepcopy(base)
    config.max_length, config.max_new_tokens, config.use_cache = None, max_tokens, True
    if sampling.temperature is not None:
        config.do_sample = sampling.temperature > 0
        config.temperature = float(sampling.temperature) or None
    elif sampling.top_p is not None or sampling.top_k is not None:
        config.do_sample = True
    if config.do_sample:
        config.top_p = sampling.top_p if sampling.top_p is not None else config.top_p
        config.top_k = sampling.top_k if sampling.top_k is not None else config.top_k
    else:
        config.temperature = config.top_p = config.top_k = config.min_p = config.typical_p = None
    return config
