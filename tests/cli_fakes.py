"""What tests of conversations and of the command line stand on: tokenizers, an engine that says its lines, a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moeinf.errors import MoeinfError, UsageError
from moeinf.generation import Completion, Sampling
from moeinf.ledger import MemoryPlan
from moeinf.manifest import ExpertLayout, Manifest, MoeLayer, Source, TensorSpec, expert_path
from moeinf.stats import ByteStats, ExpertStats, Stats
from moeinf.store import Store

__all__ = ["CHAT_TEMPLATE", "STATS", "FakeEngine", "make_byte_tokenizer", "make_piece_tokenizer", "store_model"]

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

STATS = Stats(
    load_s=1.5,
    ttft_s=0.25,
    tpot_s=0.125,
    prefill_tokens_per_s=48.0,
    decode_tokens_per_s=8.0,
    stall_s=0.5,
    experts=ExpertStats(slots=3, requests=40, hits=25, misses=15, hit_rate=0.625, decode_requests=24, decode_hits=15),
    bytes=ByteStats(disk_to_host=3840),
)


def make_byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """One token per byte, as in byte-level BPE without merges: outside ASCII, a character is several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer, chat_template)


def make_piece_tokenizer(words: Sequence[str]) -> Any:
    """Words that carry their leading space as "▁", and bytes for the rest, decoded as sentencepiece models are."""
    vocabulary = ["<unk>", "▁", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finish(tokenizer, None)


def _finish(tokenizer: Tokenizer, chat_template: str | None) -> Any:
    tokenizer.add_special_tokens(["<user>", "<assistant>", "<system>", "<end>"])
    make: Any = PreTrainedTokenizerFast
    wrapped = make(tokenizer_object=tokenizer, eos_token="<end>", clean_up_tokenization_spaces=False)
    wrapped.chat_template = chat_template
    return wrapped


class FakeEngine:
    """Answers with `replies`, one after the other and round again.

    `prompts` is what was asked, as text; `on_step` is called before each token with the number of tokens there are.
    """

    def __init__(
        self,
        replies: Sequence[str] = ("Hello.",),
        *,
        tokenizer: Any = None,
        context: int = 200,
        max_context: int = 400,
        slots: int = 5,
        on_step: Callable[[int], None] = lambda _: None,
        notes: tuple[str, ...] = (),
        save_error: MoeinfError | None = None,
    ) -> None:
        self.notes = notes
        self.learned_requests = 2
        self.save_error = save_error
        self.tokenizer = tokenizer or make_byte_tokenizer()
        self.plan = MemoryPlan(
            budget=slots, dense=0, kv_cache=0, workspace=0, slots=slots, slot_bytes=1, all_experts=5, token_experts=4,
            context=context, token_workspace=0,
        )  # fmt: skip
        self.manifest = SimpleNamespace(max_context=max_context)
        self.replies = list(replies)
        self.prompts: list[str] = []
        self.samplings: list[Sampling] = []
        self.sessions = 0
        self.is_closed = False
        self.on_step = on_step

    @property
    def stop_tokens(self) -> frozenset[int]:
        return frozenset([self.tokenizer.eos_token_id])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed = True

    def save_collection(self) -> None:
        if self.save_error is not None:
            raise self.save_error

    def session(self) -> FakeSession:
        self.sessions += 1
        return FakeSession(self)


class FakeSession:
    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    def generate(
        self,
        input_ids: Sequence[int],
        sampling: Sampling,
        *,
        on_token: Callable[[int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Completion:
        engine = self._engine
        room = engine.plan.context - len(input_ids)
        if room < 1:
            raise UsageError(
                f"the conversation has {len(input_ids)} tokens and the context holds {engine.plan.context}"
            )
        reply = engine.replies[len(engine.prompts) % len(engine.replies)]
        engine.prompts.append(str(engine.tokenizer.decode(list(input_ids))))
        engine.samplings.append(sampling)
        wanted = [*engine.tokenizer.encode(reply, add_special_tokens=False), engine.tokenizer.eos_token_id]
        made: list[int] = []
        for token in wanted[: min(sampling.max_tokens or room, room)]:
            engine.on_step(len(made))
            if should_stop and should_stop():
                return Completion(len(input_ids), tuple(made), "interrupted", STATS)
            made.append(token)
            if on_token:
                on_token(token)
        return Completion(len(input_ids), tuple(made), "stop" if len(made) == len(wanted) else "length", STATS)


def store_model(home: Path, name: str = "tiny", source: str = "org/tiny") -> Manifest:
    """Put a model of 5 experts and 1.3 kB into the store, which can do everything but compute."""
    layout = ExpertLayout(4096, (TensorSpec("up", "F32", (4, 8), 0), TensorSpec("down", "F32", (8, 4), 128)))
    manifest = Manifest(
        source=Source(source, "c" * 40),
        architecture="TinyForCausalLM",
        model_type="tiny",
        dtype="float32",
        precision="float32",
        layers=(MoeLayer("model.layers.0.mlp", 3, 2), MoeLayer("model.layers.1.mlp", 2, 2)),
        layout=layout,
        dense_files=("dense.safetensors",),
        dense_bytes=440,
        kv_token_bytes=16,
        kv_fixed_bytes=0,
        max_context=128,
        files={},
    )
    with Store(home).incoming(name) as incoming:
        incoming.begin({"source": source})
        incoming.write("config.json", [b"{}"])
        for index, layer in enumerate(manifest.layers):
            for expert in range(layer.num_experts):
                incoming.write(expert_path(index, expert), [bytes([expert]) * layout.file_bytes])
        writer = incoming.dense("dense.safetensors", b"{}".ljust(64), 504)
        writer.write_at(64, b"d" * 440)
        writer.mark_done("embed")
        incoming.sync()
        writer.close()
        incoming.publish(manifest)
    return Store(home).open(name).manifest
