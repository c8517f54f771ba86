"""The exported demo model, loaded by plain transformers: greedy answers in batches, and what its routers choose.

Weights are bfloat16 in the file and float32 here, so that an answer does not depend on what else is in its batch.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

__all__ = ["Checkpoint", "Traced", "complete", "load", "question_tokens", "random_control", "token_bytes", "trace"]

BATCH = 50
Tokens = list[int]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded model with its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def experts(self) -> int:
        """Experts per layer."""
        return int(self.model.config.num_experts)


@dataclass(frozen=True, slots=True)
class Traced:
    """One text seen by a model: experts chosen [tokens, layers, top-k], losses of all tokens but the first, in nats."""

    choices: NDArray[np.int64]
    losses: NDArray[np.float32]


def load(folder: Path) -> Checkpoint:
    """Model and tokenizer of a checkpoint folder, set to temperature 0."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.update(do_sample=False, temperature=None, top_k=None, top_p=None)
    return Checkpoint(model.eval(), AutoTokenizer.from_pretrained(folder))


def random_control(checkpoint: Checkpoint, seed: int) -> Checkpoint:
    """A model of the same shape with random weights, as transformers initialises them."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    factory: Any = AutoModelForCausalLM
    return Checkpoint(factory.from_config(checkpoint.model.config, dtype=torch.float32).eval(), checkpoint.tokenizer)


def question_tokens(checkpoint: Checkpoint, question: str) -> Tokens:
    """A question in the chat template, ready for the answer."""
    messages = [{"role": "user", "content": question}]
    text = checkpoint.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(checkpoint.tokenizer.encode(text, add_special_tokens=False))


def complete(checkpoint: Checkpoint, prompts: Sequence[Tokens], new_tokens: int) -> list[Tokens]:
    """What the model adds to each prompt by its own generation config, up to the end of its turn."""
    answers: list[Tokens] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(by_length), BATCH):
        chosen = by_length[start : start + BATCH]
        for index, answer in zip(chosen, _batch(checkpoint, [prompts[i] for i in chosen], new_tokens), strict=True):
            answers[index] = answer
    return answers


@torch.inference_mode()
def _batch(checkpoint: Checkpoint, prompts: list[Tokens], new_tokens: int) -> list[Tokens]:
    config = copy.deepcopy(checkpoint.model.generation_config)
    config.max_new_tokens = new_tokens
    width = max(map(len, prompts))
    # The padding repeats a token that the prompt has anyway, so that a repetition penalty sees nothing new in it.
    padded = torch.tensor([[prompt[0]] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    rows = checkpoint.model.generate(padded, attention_mask=mask, generation_config=config)[:, width:].tolist()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]


def trace(checkpoint: Checkpoint, texts: Iterable[Tokens]) -> list[Traced]:
    """Choices and losses of each text, read from its first token on."""
    everything = list(texts)
    traced: dict[int, Traced] = {}
    for indices in _same_length(everything):
        batch = torch.tensor([everything[index] for index in indices])
        traced.update(zip(indices, _trace_batch(checkpoint, batch), strict=True))
    return [traced[index] for index in range(len(everything))]


def _same_length(texts: Sequence[Tokens], rows: int = 8) -> Iterator[list[int]]:
    """Indices in batches of texts of one length."""
    by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for _, group in itertools.groupby(by_length, key=lambda index: len(texts[index])):
        indices = list(group)
        for start in range(0, len(indices), rows):
            yield indices[start : start + rows]


@torch.inference_mode()
def _trace_batch(checkpoint: Checkpoint, batch: torch.Tensor) -> list[Traced]:
    chosen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _module, _inputs, outputs: chosen.append(outputs[2]))
        for layer in checkpoint.model.model.layers
    ]
    try:
        logits = checkpoint.model(input_ids=batch, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")
    choices = torch.stack(chosen, 1).view(*batch.shape, len(chosen), -1)
    return [
        Traced(choice.numpy(), loss.numpy()) for choice, loss in zip(choices, losses.view(len(batch), -1), strict=True)
    ]


def token_bytes(checkpoint: Checkpoint) -> NDArray[np.int64]:
    """Bytes of text that each token stands for; special tokens stand for none."""
    tokenizer = checkpoint.tokenizer
    sizes = np.array([len(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])
    sizes[tokenizer.all_special_ids] = 0
    return sizes
