"""What a sound trace is: everything else is refused, with the token and layer where it goes wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from moeinf import trace as trace_module
from moeinf.errors import IntegrityError, UnsupportedError, UsageError
from moeinf.manifest import ExpertLayout, Manifest, MoeLayer, Source
from moeinf.trace import MAX_EXPERTS, MAX_LAYERS, NO_EXPERT, ModelIdentity, Trace, concatenate
from traces import assert_same, make_identity, make_trace, random_trace


def changed(name: str, place: tuple[int, ...], value: object) -> Trace:
    """A sound trace with one number changed."""
    trace = make_trace(foreseen=True)
    values = getattr(trace, name).copy()
    values[place] = value
    return dataclasses.replace(trace, **{name: values})


@pytest.mark.parametrize(
    ("name", "place", "value", "complaint"),
    [
        ("experts", (3, 0, 1), 8, "token 3, layer 0: there is no expert 8 among 8"),
        ("experts", (3, 1, 1), 4, "token 3, layer 1: there is no expert 4 among 4"),
        ("experts", (3, 1, 1), -2, "token 3, layer 1: there is no expert -2 among 4"),
        ("experts", (2, 1, 2), 0, "token 2, layer 1: place 2 is not empty, although k is 2 here"),
        ("foreseen", (3, 1, 1), 4, "foreseen: token 3, layer 1: there is no expert 4 among 4"),
        ("foreseen", (2, 1, 2), 0, "foreseen: token 2, layer 1: place 2 is not empty, although k is 2 here"),
        ("weights", (2, 1, 0), np.nan, "token 2, layer 1: a weight is not a finite float16"),
        ("weights", (2, 1, 0), -np.inf, "token 2, layer 1: a weight is not"),
        ("weights", (2, 1, 2), 0.5, "token 2, layer 1: place 2 has a weight and no expert"),
        ("sequence_id", (4,), -1, "token 4: sequence_id is -1"),
        ("position", (0,), -1, "token 0: position is -1"),
        ("position", (2,), 1, "token 2: position 1 of sequence 0 comes after position 1"),
        ("position", (2,), 3, "token 3: position 3 of sequence 0 comes after position 3"),
        ("position", (1,), 9, "token 2: position 2 of sequence 0 comes after position 9"),
    ],
)
def test_a_wrong_number_is_named(name: str, place: tuple[int, ...], value: object, complaint: str) -> None:
    with pytest.raises(IntegrityError, match=complaint):
        changed(name, place, value)


def test_an_expert_is_named_once_per_token_and_layer() -> None:
    trace = make_trace()
    with pytest.raises(IntegrityError, match=rf"token 3, layer 0: expert {trace.experts[3, 0, 2]} is named twice"):
        changed("experts", (3, 0, 0), trace.experts[3, 0, 2])


def test_faults_are_found_beyond_the_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "_BLOCK_ENTRIES", 1)
    for name, value in (("experts", 8), ("weights", np.inf), ("foreseen", 8)):
        with pytest.raises(IntegrityError, match="token 4, layer 0"):
            changed(name, (4, 0, 0), value)


def test_places_may_be_empty_anywhere() -> None:
    trace = make_trace(weights=False)
    experts = trace.experts.copy()
    experts[1, 0] = [-1, 2, -1]
    experts[2, 1] = -1
    assert dataclasses.replace(trace, experts=experts).experts[1, 0].tolist() == [-1, 2, -1]


@pytest.mark.parametrize(
    ("name", "values", "complaint"),
    [
        ("experts", [[[0]]], "experts is not an array"),
        ("experts", np.zeros((5, 2, 3), np.int64), "experts has dtype int64, not int16"),
        ("experts", np.zeros((5, 6), np.int16), r"experts has shape \[5, 6\], not \[tokens, layers, k\]"),
        ("experts", np.zeros((5, 3, 3), np.int16), r"experts has shape \[5, 3, 3\], not \[5, 2, 3\]"),
        ("experts", np.zeros((5, 2, 4), np.int16), r"experts has shape \[5, 2, 4\], not \[5, 2, 3\]"),
        ("weights", np.zeros((5, 2, 3), np.float32), "weights has dtype float32, not float16"),
        ("weights", np.zeros((4, 2, 3), np.float16), r"weights has shape \[4, 2, 3\], not \[5, 2, 3\]"),
        ("sequence_id", np.zeros(5, np.int64), "sequence_id has dtype int64"),
        ("sequence_id", np.zeros(4, np.int32), r"sequence_id has shape \[4\], not \[5\]"),
        ("position", np.zeros((5, 1), np.int32), r"position has shape \[5, 1\], not \[5\]"),
        ("position", None, "position is not an array"),
        ("is_prefill", np.zeros(5, np.uint8), "is_prefill has dtype uint8, not bool"),
        ("is_prefill", np.zeros(6, np.bool_), r"is_prefill has shape \[6\]"),
    ],
)
def test_arrays_of_another_kind_or_shape_are_refused(name: str, values: Any, complaint: str) -> None:
    with pytest.raises(IntegrityError, match=complaint):
        dataclasses.replace(make_trace(), **{name: values})


def test_too_many_tokens_are_refused_before_they_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "MAX_ENTRIES", 29)
    with pytest.raises(UnsupportedError, match="5 tokens, 2 layers and 3 experts make more than 29") as caught:
        make_trace()
    assert caught.value.hint == "split it into several traces"


def test_the_arrays_of_a_trace_cannot_be_written_to_and_the_given_ones_can() -> None:
    given = np.zeros(5, np.int32)
    trace = dataclasses.replace(make_trace(), sequence_id=given)
    with pytest.raises(ValueError, match="read-only"):
        trace.sequence_id[0] = 1
    given[0] = 1


@pytest.mark.parametrize(
    ("sizes", "top_k", "complaint"),
    [
        ((), (), "0 MoE layers"),
        ((4,) * (MAX_LAYERS + 1), (1,) * (MAX_LAYERS + 1), f"{MAX_LAYERS + 1} MoE layers"),
        ((4, 4), (1,), "there are 2 layer sizes, and top_k for 1 layers"),
        ((4, 0), (1, 1), "layer 1: 0 experts"),
        ((4, MAX_EXPERTS + 1), (1, 1), f"layer 1: {MAX_EXPERTS + 1} experts"),
        ((4, 4), (1, 5), "layer 1: no token can ask for 5 of 4 experts"),
        ((4, 4), (0, 1), "layer 0: no token can ask for 0 of 4 experts"),
    ],
)
def test_a_model_has_layers_with_experts(sizes: tuple[int, ...], top_k: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(IntegrityError, match=complaint):
        make_identity(sizes, top_k)


def test_a_name_is_not_a_book() -> None:
    with pytest.raises(IntegrityError, match="5000 characters"):
        dataclasses.replace(make_identity(), model="x" * 5000)


def test_a_stored_model_has_an_identity() -> None:
    manifest = Manifest(
        source=Source("org/model@v1", "a" * 40),
        architecture="MixtralForCausalLM",
        model_type="mixtral",
        dtype="bfloat16",
        precision="bfloat16",
        layers=(MoeLayer("layers.0.mlp", 8, 2), MoeLayer("layers.1.mlp", 16, 4)),
        layout=ExpertLayout(4096, ()),
        dense_files=(),
        dense_bytes=0,
        kv_token_bytes=0,
        kv_fixed_bytes=0,
        max_context=1,
        files={},
    )
    identity = ModelIdentity.of("mine", manifest)
    assert identity == ModelIdentity("mine", "MixtralForCausalLM", manifest.source, (8, 16), (2, 4))
    assert identity.width == 4


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        ({"layer_sizes": (8, 4, 4), "top_k": (3, 2, 2)}, "its number of MoE layers is 3, not 2"),
        ({"layer_sizes": (8, 8)}, r"its number of experts per layer is 8, not \[8, 4\]"),
        ({"top_k": (3, 1)}, r"its number of experts per token is \[3, 1\], not \[3, 2\]"),
        ({"architecture": "OtherForCausalLM"}, "its architecture is OtherForCausalLM, not TinyForCausalLM"),
        ({"source": Source("org/other", "c")}, "its source is org/other, not org/tiny"),
        ({"source": Source("org/tiny", "d")}, "its commit is d, not c"),
    ],
)
def test_a_trace_of_another_model_is_refused(other: dict[str, Any], complaint: str) -> None:
    identity = make_identity()
    with pytest.raises(UsageError, match=f"another model than tiny: {complaint}") as caught:
        make_trace(dataclasses.replace(identity, **other)).check_model(identity)
    assert caught.value.hint


@pytest.mark.parametrize(
    "other",
    [
        {"model": "another name"},
        {"architecture": ""},
        {"source": Source("")},
        {"source": Source("org/tiny")},
        {"source": Source("org/tiny@main", "c")},
    ],
)
def test_what_is_not_known_of_a_model_does_not_tell_it_apart(other: dict[str, Any]) -> None:
    identity = make_identity()
    make_trace(dataclasses.replace(identity, **other)).check_model(identity)
    make_trace(identity).check_model(dataclasses.replace(identity, **other))


@pytest.mark.parametrize("seed", range(40))
def test_sequences_are_the_tokens_in_their_order(seed: int) -> None:
    trace = random_trace(seed)
    sequences = list(trace.sequences())
    ids = [int(sequence.sequence_id[0]) for sequence in sequences]
    assert ids == list(dict.fromkeys(trace.sequence_id.tolist()))
    assert sum(sequence.num_tokens for sequence in sequences) == trace.num_tokens
    for sequence in sequences:
        tokens = trace.sequence_id == sequence.sequence_id[0]
        assert np.array_equal(sequence.experts, trace.experts[tokens])
        assert np.array_equal(sequence.position, trace.position[tokens])
        assert np.array_equal(sequence.is_prefill, trace.is_prefill[tokens])
        if trace.weights is not None:
            assert sequence.weights is not None
            assert np.array_equal(sequence.weights, trace.weights[tokens])
        if trace.foreseen is not None:
            assert sequence.foreseen is not None
            assert np.array_equal(sequence.foreseen, trace.foreseen[tokens])


def test_concatenated_traces_keep_their_sequences_apart() -> None:
    one = dataclasses.replace(make_trace(seed=1), sequence_id=np.array([7, 7, 2, 2, 2], np.int32))
    two = make_trace(seed=2, tokens=3)
    both = concatenate([one, two, one])
    assert both.sequence_id.tolist() == [1, 1, 0, 0, 0, 2, 2, 2, 4, 4, 3, 3, 3]
    assert both.layer_sizes == (8, 4)
    for part, tokens in ((one, slice(0, 5)), (two, slice(5, 8)), (one, slice(8, 13))):
        for name in ("experts", "weights", "position", "is_prefill"):
            assert np.array_equal(getattr(both, name)[tokens], getattr(part, name))


def test_concatenated_traces_have_weights_if_all_have() -> None:
    with_weights, without, empty = make_trace(), make_trace(weights=False), make_trace(tokens=0, weights=False)
    assert concatenate([with_weights, without]).weights is None
    assert_same(concatenate([with_weights, empty]), with_weights)
    assert_same(concatenate([empty, with_weights]), with_weights)
    assert concatenate([empty, empty]).num_tokens == 0


def test_what_some_traces_have_foreseen_is_kept() -> None:
    foreseen, plain = make_trace(foreseen=True), make_trace()
    both = concatenate([plain, foreseen]).foreseen
    assert both is not None
    assert foreseen.foreseen is not None
    assert (both[:5] == NO_EXPERT).all()
    assert np.array_equal(both[5:], foreseen.foreseen)
    assert concatenate([plain, plain]).foreseen is None


def test_only_traces_of_one_model_are_concatenated() -> None:
    with pytest.raises(UsageError, match="there is no trace"):
        concatenate([])
    with pytest.raises(UsageError, match="its commit is d, not c"):
        concatenate([make_trace(), make_trace(make_identity(commit="d"))])
