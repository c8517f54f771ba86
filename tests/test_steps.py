"""The order of leasing and waiting, where what is on its way arrives at a bad moment."""

from __future__ import annotations

import itertools

from moeinf.cache import ExpertCache, Outcome
from moeinf.policies.plain import LruPolicy
from moeinf.simulate import _Instantly
from moeinf.steps import Arrival, Step


class Mover(_Instantly):
    """Brings experts when somebody waits for them; those in `hasty` arrive while another one is leased."""

    def __init__(self, slots: int, hasty: set[int]) -> None:
        super().__init__(ExpertCache(10, slots, LruPolicy(())))
        self._hasty = hasty

    def foresee(self, key: int) -> None:
        assert self.cache.foresee(key) is not None
        self._coming.append(key)

    def lease(self, key: int, *, keep: bool) -> Outcome | None:
        for other in [each for each in self._coming if each in self._hasty]:
            self._coming.remove(other)
            self.cache.arrived(other)
        return super().lease(key, keep=keep)


def test_what_arrives_while_others_are_leased_is_here() -> None:
    mover = Mover(4, hasty={5})
    for key in (5, 6):
        mover.foresee(key)
    step = Step(mover)
    assert step.lease([1, 5, 6]) == [5]
    assert list(step.arriving()) == [6, 1]
    step.end()
    assert not any(mover.cache._leases)
    mover.cache.check_integrity()


def test_what_was_given_up_before_is_not_what_arrives() -> None:
    class Late(Mover):
        given_up = (1, 2)

        def wait(self) -> Arrival:
            if self.given_up:
                key, *self.given_up = self.given_up  # type: ignore[assignment]
                return Arrival(key, 0, cancelled=True)
            return super().wait()

    mover = Late(4, hasty=set())
    step = Step(mover)
    assert step.lease([1, 2, 3]) == []
    for key in itertools.islice(step.arriving(), 2):
        assert mover.cache.is_resident(key)
    step.end()
    assert not any(mover.cache._leases)
