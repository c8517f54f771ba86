from __future__ import annotations

import pytest

from moeinf.errors import UsageError
from moeinf.policies import LruPolicy, make_policy


def nobody(_: int) -> bool:
    return False


def test_lru_evicts_what_was_used_longest_ago() -> None:
    policy = LruPolicy()
    for expert in (1, 2, 3):
        policy.insert(expert, keep=True)
    policy.use(1)
    assert policy.victim(nobody) == 2
    assert policy.victim(lambda expert: expert == 2) == 3
    policy.remove(2)
    assert policy.victim(nobody) == 3
    assert policy.victim(lambda _: True) is None


def test_lru_evicts_first_what_only_passes_through() -> None:
    policy = LruPolicy()
    policy.insert(1, keep=True)
    policy.insert(2, keep=False)
    policy.insert(3, keep=False)
    assert policy.victim(nobody) == 3
    policy.use(3)
    assert policy.victim(nobody) == 2


def test_an_unknown_policy_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="policy 'psychic' is not known") as caught:
        make_policy("psychic")
    assert caught.value.hint == "choose one of: lru"
