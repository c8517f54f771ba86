"""A session: what it keeps, how it ends, and that it never changes the tokens."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import moeinf
from families import make_checkpoint
from moeinf import Sampling
from moeinf.engine import Engine
from moeinf.errors import MoeinfError, UsageError
from moeinf.generation import make_generation_config
from moeinf.metamodel import CACHE
from moeinf.pull import pull
from moeinf.store import Store

GREEDY = Sampling(max_tokens=10, temperature=0)
PROMPT = torch.randint(5, 100, (40,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture
def engine(tiny: str) -> Iterator[Engine]:
    with moeinf.load(tiny, experts="50%", context=128) as loaded:
        loaded.generation_config.eos_token_id = None
        yield loaded


def count_positions(engine: Engine) -> list[int]:
    """How many positions each forward pass from now on computes."""
    computed: list[int] = []
    engine.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: computed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return computed


def test_only_what_is_new_is_computed(engine: Engine) -> None:
    session = engine.session()
    first = session.generate(PROMPT, GREEDY)
    assert session.cached_tokens == 40 + 10 - 1
    computed = count_positions(engine)
    longer = [*PROMPT, *first.tokens, 7, 8, 9]
    second = session.generate(longer, GREEDY)
    assert computed == [4] + [1] * 9  # the last answer's last token was made, and not yet read
    assert second.tokens == engine.session().generate(longer, GREEDY).tokens
    assert second.prompt_tokens == 53


def test_a_changed_past_is_computed_again_from_where_it_differs(engine: Engine) -> None:
    session = engine.session()
    session.generate(PROMPT, GREEDY)
    changed = [*PROMPT[:30], 99, *PROMPT[31:]]
    computed = count_positions(engine)
    answer = session.generate(changed, GREEDY)
    assert computed[0] == 10
    assert answer.tokens == engine.session().generate(changed, GREEDY).tokens


def test_the_same_prompt_again_computes_its_last_token_alone(engine: Engine) -> None:
    session = engine.session()
    first = session.generate(PROMPT, GREEDY)
    computed = count_positions(engine)
    assert session.generate(PROMPT, GREEDY).tokens == first.tokens
    assert computed[0] == 1


def test_clearing_forgets(engine: Engine) -> None:
    session = engine.session()
    session.generate(PROMPT, GREEDY)
    session.clear()
    assert session.cached_tokens == 0
    computed = count_positions(engine)
    session.generate(PROMPT, GREEDY)
    assert computed[0] == 40


@pytest.mark.parametrize(("most", "pieces"), [(16, [16, 16, 8]), (20, [20, 20])])
def test_a_prompt_in_pieces_gives_the_same_tokens(tiny: str, engine: Engine, most: int, pieces: list[int]) -> None:
    whole = engine.session().generate(PROMPT, GREEDY)
    engine.plan = dataclasses.replace(engine.plan, step_tokens=most, token_workspace=1 << 40)
    computed = count_positions(engine)
    session = engine.session()
    assert session.generate(PROMPT, GREEDY).tokens == whole.tokens
    assert computed == pieces + [1] * 9
    assert session.cached_tokens == 49


def test_a_seed_makes_sampling_repeatable(engine: Engine) -> None:
    def sample(seed: int) -> tuple[int, ...]:
        return engine.session().generate(PROMPT, Sampling(max_tokens=20, temperature=1.5, seed=seed)).tokens

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_top_k_of_one_is_greedy(engine: Engine) -> None:
    greedy = engine.session().generate(PROMPT, GREEDY).tokens
    sampled = engine.session().generate(PROMPT, Sampling(max_tokens=10, temperature=2.0, top_k=1, seed=5)).tokens
    assert sampled == greedy


def test_a_stop_token_ends_the_answer(engine: Engine) -> None:
    tokens = engine.session().generate(PROMPT, GREEDY).tokens
    engine.generation_config.eos_token_id = [tokens[4]]
    stopped = engine.session().generate(PROMPT, GREEDY)
    first = tokens.index(tokens[4])
    assert stopped.tokens == tokens[: first + 1]
    assert stopped.finish_reason == "stop"


def test_tokens_are_handed_on_one_by_one(engine: Engine) -> None:
    seen: list[int] = []
    completion = engine.session().generate(PROMPT, GREEDY, on_token=seen.append)
    assert tuple(seen) == completion.tokens
    assert completion.finish_reason == "length"


def test_stopping_keeps_what_was_said_and_the_session_goes_on(engine: Engine) -> None:
    seen: list[int] = []
    session = engine.session()
    completion = session.generate(PROMPT, GREEDY, on_token=seen.append, should_stop=lambda: len(seen) == 2)
    assert completion.finish_reason == "interrupted"
    assert completion.tokens == tuple(seen)
    assert len(seen) == 3
    more = session.generate([*PROMPT, *seen], GREEDY)
    assert more.tokens == engine.session().generate([*PROMPT, *seen], GREEDY).tokens


def test_stopping_in_a_prompt_ends_at_the_next_layer(engine: Engine) -> None:
    session = engine.session()
    asked = iter([False, True])
    completion = session.generate(PROMPT, GREEDY, should_stop=lambda: next(asked))
    assert completion.tokens == ()
    assert completion.finish_reason == "interrupted"
    assert session.cached_tokens == 0
    engine.model(torch.tensor([PROMPT]))  # who asked to stop asks no more
    assert session.generate(PROMPT, GREEDY).tokens == engine.session().generate(PROMPT, GREEDY).tokens


def test_the_rest_of_a_prompt_that_was_given_up_is_no_prompt(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(engine.plan), "prefill_tokens", lambda *_: 16)
    asked = itertools.chain([False], itertools.repeat(True))
    engine.session().generate(PROMPT, GREEDY, should_stop=lambda: next(asked))
    engine.runtime.reset_counters()
    with torch.inference_mode():
        engine.model(torch.tensor([[5]]))
    assert (engine.runtime.prefill.requests, engine.runtime.decode.requests) == (0, engine.plan.token_experts)


def test_what_was_guessed_before_the_first_new_token_counts(tiny: str) -> None:
    with moeinf.load(tiny, experts="3", prefetch="gate") as engine:
        engine.generation_config.eos_token_id = None
        engine.session().generate(PROMPT, GREEDY)
        read: list[int] = []
        foresee = engine.runtime.cache.foresee

        def note(expert: int) -> int | None:
            slot = foresee(expert)
            read.extend([expert] * (slot is not None))
            return slot

        engine.runtime.cache.foresee = note  # type: ignore[method-assign]
        stats = engine.session().generate(PROMPT[:1], GREEDY).stats.experts
        assert stats.prefetched == len(read) > 0


def test_what_an_error_left_half_written_is_forgotten(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    session = engine.session()
    first = session.generate(PROMPT, GREEDY)
    forward = engine.runtime.forward

    def fail(layer: int, *step: torch.Tensor) -> torch.Tensor:
        if layer == 1:
            raise MoeinfError("the disk failed")
        return forward(layer, *step)

    with monkeypatch.context() as patch:
        patch.setattr(engine.runtime, "forward", fail)
        with pytest.raises(MoeinfError, match="the disk failed"):
            session.generate([*PROMPT, *first.tokens, 7, 8], GREEDY)
    assert session.cached_tokens == 0
    assert session.generate(PROMPT, GREEDY).tokens == first.tokens


def test_stopping_while_a_prompt_is_computed_anew_is_told(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU ran out of memory after some tokens; what was said by then stays said."""
    stopping = False
    forward = engine.runtime.forward
    steps = 0

    def run_out(*step: torch.Tensor) -> torch.Tensor:
        nonlocal stopping, steps
        steps += 1
        if steps == 10:
            stopping = True
            raise torch.OutOfMemoryError
        return forward(*step)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.runtime, "forward", run_out)
    monkeypatch.setattr(engine, "make_room", lambda: None)
    completion = engine.session().generate(PROMPT, GREEDY, should_stop=lambda: stopping)
    assert 0 < len(completion.tokens) < 10
    assert completion.finish_reason == "interrupted"


def test_an_answer_that_is_begun_anew_is_one_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, steps = engine.runtime.forward, itertools.count()

    def run_out(*step: torch.Tensor) -> torch.Tensor:
        if next(steps) == 10:
            raise torch.OutOfMemoryError
        return forward(*step)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.runtime, "forward", run_out)
    monkeypatch.setattr(engine, "make_room", lambda: None)
    engine.save_collection()
    learned = engine.learned_requests
    engine.session().generate(PROMPT, GREEDY)
    engine.save_collection()
    assert engine.learned_requests == learned + 1


def test_the_context_is_kept(engine: Engine) -> None:
    for asked in (None, 1000):
        full = engine.session().generate(PROMPT, Sampling(max_tokens=asked, temperature=0))
        assert (len(full.tokens), full.finish_reason) == (128 - 40, "length")
    with pytest.raises(UsageError, match="has 128 tokens and the context holds 128"):
        engine.session().generate(PROMPT * 3 + PROMPT[:8], GREEDY)


@pytest.mark.parametrize("token", [-1, 10**6])
def test_tokens_that_the_model_does_not_have_are_refused(engine: Engine, token: int) -> None:
    with pytest.raises(UsageError, match="none of the model's"):
        engine.session().generate([5, token], GREEDY)


def test_an_empty_prompt_is_refused(engine: Engine) -> None:
    with pytest.raises(UsageError, match="nothing to continue"):
        engine.session().generate([], GREEDY)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": 1e-300},
        {"temperature": float("inf")},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"top_k": -2},
        {"max_tokens": 0},
        {"seed": -1},
        {"seed": 1 << 63},
        {"seed": True},
        {"seed": 1.5},
        {"max_tokens": 1.5},
        {"max_tokens": "5"},
        {"temperature": "1"},
    ],
)
def test_impossible_sampling_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be"):
        Sampling(**bad)


@pytest.mark.parametrize("bad", ["abc", [1.5], [None], torch.ones(2, 2, dtype=torch.int64)], ids=str)
def test_a_prompt_that_is_no_list_of_tokens_is_refused(bad: Any, engine: Engine) -> None:
    with pytest.raises(UsageError, match="a prompt is a sequence of token numbers"):
        engine.session().generate(bad, GREEDY)


def test_tokens_may_be_of_any_whole_numbers(engine: Engine) -> None:
    tokens = engine.session().generate(PROMPT, GREEDY).tokens
    assert engine.session().generate(torch.tensor(PROMPT), GREEDY).tokens == tokens
    assert engine.session().generate(np.array(PROMPT), GREEDY).tokens == tokens


def test_threads_take_turns(engine: Engine) -> None:
    prompts = [PROMPT[number : number + 20] for number in range(4)]
    alone = [engine.session().generate(prompt, GREEDY).tokens for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        together = threads.map(lambda prompt: engine.session().generate(prompt, GREEDY).tokens, prompts)
        assert list(together) == alone
    engine.runtime.cache.check_integrity()


def test_an_answer_asks_for_no_other(engine: Engine) -> None:
    session = engine.session()

    def ask(_: int) -> None:
        session.generate(PROMPT, GREEDY)

    with pytest.raises(UsageError, match="an answer asks for another one of its engine"):
        session.generate(PROMPT, GREEDY, on_token=ask)
    assert session.generate(PROMPT, GREEDY).tokens == engine.session().generate(PROMPT, GREEDY).tokens


def test_a_forked_process_has_no_engine(engine: Engine) -> None:
    """Its threads are not there: it would wait for them."""
    if not (child := os.fork()):
        code = 1
        try:
            engine.session().generate(PROMPT, GREEDY)
        except MoeinfError as error:
            code = 0 if "belongs to the process that loaded it" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(engine.session().generate(PROMPT, GREEDY).tokens) == 10


def test_times_are_taken(engine: Engine) -> None:
    stats = engine.session().generate(PROMPT, GREEDY).stats
    assert 0 < stats.ttft_s < 60
    assert 0 < stats.tpot_s < 60
    assert stats.decode_tokens_per_s == pytest.approx(1 / stats.tpot_s)
    assert stats.prefill_tokens_per_s == pytest.approx(40 / stats.ttft_s)


@pytest.mark.parametrize("family", ["jamba", "qwen3_next"])
def test_recurrent_models_go_on_as_if_all_had_come_at_once(family: str, home: Path, tmp_path: Path) -> None:
    """In a second turn, and behind the first piece of a long prompt."""
    make_checkpoint(family, tmp_path, "float32")
    pull(str(tmp_path), store=Store(home), name="model")
    with moeinf.load("model", kernels="torch") as engine:
        engine.generation_config.eos_token_id = None
        assert engine.continues == (family != "jamba")
        session, prompt = engine.session(), [token % 100 for token in PROMPT]
        conversation = [*prompt, *session.generate(prompt, GREEDY).tokens, 7, 8, 9]
        wanted = engine.session().generate(conversation, GREEDY).tokens
        assert session.generate(conversation, GREEDY).tokens == wanted
        engine.plan = dataclasses.replace(engine.plan, step_tokens=16, token_workspace=1 << 40)
        computed = count_positions(engine)
        assert engine.session().generate(conversation, GREEDY).tokens == wanted
        assert computed[:2] == [16, 16 if engine.continues else 1]


def test_a_state_that_cannot_be_cut_back_is_made_anew(home: Path, tmp_path: Path) -> None:
    make_checkpoint("minimax", tmp_path, "bfloat16")
    pull(str(tmp_path), store=Store(home), name="model")
    with moeinf.load("model") as engine:
        session, prompt = engine.session(), [token % 100 for token in PROMPT]
        assert session.generate(prompt, GREEDY).tokens == session.generate(prompt, GREEDY).tokens


def test_what_a_generation_config_asks_for_that_a_conversation_cannot_have(
    tiny: str, tiny_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moeinf.load(tiny) as engine:
        wanted = engine.session().generate(PROMPT, GREEDY).tokens
    asked = {"use_cache": False, "cache_implementation": "static", "num_beams": 3}
    load_part = moeinf.engine._load_part

    def asking(auto: Any, folder: Path, what: str) -> Any:
        loaded = load_part(auto, folder, what)
        made: Any = GenerationConfig
        return made(**asked) if what == "generation config" else loaded

    monkeypatch.setattr(moeinf.engine, "_load_part", asking)
    with moeinf.load(tiny) as engine:
        assert engine.notes[0] == "the model's generation config asks for 3 beams, and answers are of one"
        engine.generation_config.eos_token_id = None
        assert engine.session().generate(PROMPT, GREEDY).tokens == wanted


def test_a_prompt_of_one_token_is_a_prompt(engine: Engine) -> None:
    """Also if it is the last of a longer one, and the only one that is new."""
    session = engine.session()
    for prompt in ([7], PROMPT, PROMPT):
        experts = session.generate(prompt, Sampling(max_tokens=4, temperature=0)).stats.experts
        assert experts.decode_requests == 3 * engine.manifest.token_experts
        assert experts.requests > experts.decode_requests


def test_what_a_person_leaves_open_is_as_the_model_has_it() -> None:
    untyped: Any = GenerationConfig
    base = untyped(do_sample=True, temperature=0.7, top_p=0.8, top_k=20)
    for sampling, wanted in (
        (Sampling(), (True, 0.7, 0.8, 20)),
        (Sampling(temperature=1.5), (True, 1.5, 0.8, 20)),
        (Sampling(top_p=0.5), (True, 0.7, 0.5, 20)),
        (Sampling(top_k=0), (True, 0.7, 0.8, 0)),
        (Sampling(temperature=0), (False, None, None, None)),
    ):
        made = make_generation_config(base, sampling, 5)
        assert (made.do_sample, made.temperature, made.top_p, made.top_k) == wanted
    assert make_generation_config(untyped(), Sampling(top_p=0.5), 5).do_sample


def test_a_temperature_may_be_a_whole_number(engine: Engine) -> None:
    assert engine.session().generate(PROMPT, Sampling(max_tokens=2, temperature=2, seed=1)).tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_default_dtype_is_of_no_matter(tiny: str, dtype: torch.dtype) -> None:
    sampling = Sampling(max_tokens=10, temperature=1.5, seed=3)
    with moeinf.load(tiny) as engine:
        wanted = engine.session().generate(PROMPT, sampling).tokens
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with moeinf.load(tiny) as engine:
            assert engine.session().generate(PROMPT, sampling).tokens == wanted
    finally:
        torch.set_default_dtype(before)


def test_models_that_are_called_with_gradients_leave_nothing_behind(tiny: str) -> None:
    with moeinf.load(tiny, experts="50%", prefetch="gate") as engine:
        for _ in range(3):
            engine.model(torch.tensor([PROMPT]))
        kept = [tensor for tensor in gc.get_objects() if type(tensor) is torch.Tensor and tensor.grad_fn is not None]
        assert not kept


def test_routers_that_are_asked_early_are_not_collected(tiny: str) -> None:
    found = []
    for prefetch in ("off", "gate"):
        with moeinf.load(tiny, experts="50%", prefetch=prefetch) as engine, torch.inference_mode():
            cache = getattr(engine.model(torch.tensor([PROMPT]), use_cache=True), CACHE)
            for _ in range(2):
                made = engine.model(torch.tensor([[5]]), output_router_logits=True, **{CACHE: cache})
            found.append(len(made.router_logits))
    assert found[0] == found[1]
