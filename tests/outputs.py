"""What a stored model says to one prompt, for tests that hold two of them against each other."""

from __future__ import annotations

from typing import Any

import torch

import moeinf

__all__ = ["NEW_TOKENS", "PROMPT", "outputs"]

PROMPT = torch.randint(5, 100, (1, 21), generator=torch.Generator().manual_seed(1))
NEW_TOKENS = 24


def outputs(name: str, **options: Any) -> tuple[torch.Tensor, list[int]]:
    """Logits and greedy tokens of a model in the store, loaded with these options."""
    with moeinf.load(name, **options) as engine, torch.inference_mode():
        logits = engine.model(PROMPT.to(engine.model.device)).logits.cpu()
        engine.generation_config.eos_token_id = None
        sampling = moeinf.Sampling(max_tokens=NEW_TOKENS, temperature=0)
        tokens = list(engine.session().generate(PROMPT[0].tolist(), sampling).tokens)
        engine.runtime.cache.check_integrity()
        return logits, tokens
