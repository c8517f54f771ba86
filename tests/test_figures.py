"""Pictures: that they can be decoded, show something, and bear every shape and name."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from matplotlib.axes import Axes
from numpy.typing import NDArray

from moeinf import analysis, figures
from moeinf.analysis import Floats
from moeinf.policies import POLICIES
from moeinf.scores import Spread
from moeinf.settings import DEFAULT_POLICY
from moeinf.simulate import BELADY, Replay

ALL = [BELADY, *sorted(POLICIES)]
ODD = ["$x^$", "naïve", "日本語", "two\nlines", "", "x" * 300, "<b>&", "\ud800"]


def colours(png: bytes) -> tuple[tuple[int, int], int]:
    """((width, height), how many different bytes its pixels have) of a PNG, checked chunk by chunk."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    place, data, size = 8, b"", (0, 0)
    while place < len(png):
        (length,) = struct.unpack_from(">I", png, place)
        kind, content = png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        assert struct.unpack_from(">I", png, place + 8 + length) == (zlib.crc32(kind + content),)
        if kind == b"IHDR":
            size = struct.unpack_from(">II", content)
        data += content if kind == b"IDAT" else b""
        place += 12 + length
    assert kind == b"IEND"
    return size, len(set(zlib.decompress(data)))


def check(png: bytes) -> None:
    (width, height), different = colours(png)
    assert 300 < width < 2000
    assert 200 < height < 3000
    assert different > 20


def order_of(shares: Floats) -> NDArray[np.intp]:
    return np.argsort(-shares, axis=1, kind="stable")


def some_shares(*shape: int) -> Floats:
    shares: Floats = np.random.default_rng(0).random(shape) ** 3
    return analysis.shares(shares)


def replays(policies: list[str], sizes: tuple[int, ...] = (2, 5, 8)) -> list[Replay]:
    return [
        Replay(policy, slots, slots / 10, 100, 90 - 5 * len(policy) % 40, 0) for policy in policies for slots in sizes
    ]


@pytest.mark.parametrize("shape", [(24, 32), (1, 1), (1, 256), (94, 512), (2, 3)])
def test_activation_of_models_of_all_shapes(shape: tuple[int, int]) -> None:
    shares = some_shares(*shape)
    check(figures.activation(shares, [shape[1]] * shape[0], order_of(shares)))


def test_experts_that_a_layer_does_not_have_are_left_blank() -> None:
    shares = np.array([[0.5, 0.3, 0.2], [1, 0, 0]])
    even = figures.activation(shares, [3, 3], order_of(shares))
    uneven = figures.activation(shares, [3, 1], order_of(shares))
    check(uneven)
    assert even != uneven


def test_nothing_at_all_can_be_drawn() -> None:
    shares = np.zeros((2, 4))
    check(figures.activation(shares, [4, 4], order_of(shares)))


@pytest.mark.parametrize("number", [1, 3, 8, 16])
def test_any_number_of_domains_with_any_names(number: int) -> None:
    names = (ODD * 2)[:number]
    shares = some_shares(number, 4, 6)
    check(figures.activation_by_domain(shares, names, [6, 6, 2, 6], order_of(shares[0])))
    check(figures.distances(np.random.default_rng(1).random((number, number)), names))


def test_distances_that_do_not_exist_are_left_blank() -> None:
    check(figures.distances(np.array([[np.nan, 0.3], [0.3, np.nan]]), ["a", "b"]))
    check(figures.distances(np.full((2, 2), np.nan), ["a", "b"]))
    check(figures.distances(np.zeros((2, 2)), ["a", "b"]))


def test_bars_of_what_is_known() -> None:
    named = [("this request", 0.4), ("chance", 0.1)]
    check(figures.reuse([(1, 0.3, 0.1), (4, 0.6, 0.4), (16, 0.9, 0.8)], named))
    check(figures.reuse([(1, 0.3, 0.1)], named))
    check(figures.reuse([], named))


def test_hit_rates_of_every_policy_with_a_size_marked() -> None:
    found = replays(ALL)
    mark = Replay(DEFAULT_POLICY, 6, 0.6, 100, 90, 0)
    marked = figures.hit_rates([("a trace", found)], ALL, mark)
    check(marked)
    assert marked != figures.hit_rates([("a trace", found)], ALL)


def test_a_size_beyond_all_others_is_still_in_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    edges = []
    point_at = figures._point_at

    def spy(axes: Axes, mark: Replay) -> None:
        edges.append(axes.get_xlim()[1])
        point_at(axes, mark)

    monkeypatch.setattr(figures, "_point_at", spy)
    check(figures.hit_rates([("a", replays(["lru"]))], ["lru"], Replay("lru", 10, 1.0, 100, 90, 0)))
    assert edges == [1.02]


def test_a_panel_for_every_trace() -> None:
    one, two = (figures.hit_rates([(title, replays(["lru"])) for title in titles], ["lru"]) for titles in ("a", "ab"))
    assert colours(two)[0][1] > 1.8 * colours(one)[0][1]


def test_one_size_and_policies_that_one_trace_has_not() -> None:
    check(figures.hit_rates([("a", replays(["lru"], (3,))), ("b", replays([BELADY], (3,)))], [BELADY, "lru"]))


def test_no_two_policies_look_alike() -> None:
    looks = [figures._line(policy) for policy in ALL]
    assert len({(look["color"], str(look["linestyle"]), look["marker"]) for look in looks}) == len(ALL)
    assert len({(str(look["linestyle"]), look["marker"]) for look in looks}) == len(ALL)
    assert max(look["linewidth"] for look in looks) == figures._line(DEFAULT_POLICY)["linewidth"]


@pytest.mark.parametrize(("kind", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF-")])
def test_every_kind_of_file_is_the_same_each_time(kind: str, begin: bytes) -> None:
    one, two = (figures.hit_rates([("t", replays(ALL))], ALL, kind=kind) for _ in range(2))
    assert one.startswith(begin)
    assert one == two


def test_the_user_s_own_settings_have_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    before = figures.distances(np.eye(2), ["a", "b"])
    monkeypatch.setitem(matplotlib.rcParams, "figure.facecolor", "red")
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    assert figures.distances(np.eye(2), ["a", "b"]) == before
    assert matplotlib.rcParams["figure.facecolor"] == "red"


@pytest.mark.parametrize("kind", figures.FORMATS)
def test_speeds(kind: str) -> None:
    bars = [(f"moeinf, {name}", Spread(2, 1, 3), 0.5) for name in ODD[:3]]
    others = [("mmap", Spread(0.1, 0.1, 0.1), None)]
    picture = figures.speeds([("10%", [*bars, *others]), ("25%", others), ("50%", [])], "title " * 40, kind)
    if kind == "png":
        check(picture)
    assert len(picture) > 2000
