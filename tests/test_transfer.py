"""Reading experts: every byte in its place, and every failure told to whoever waits."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moeinf import transfer
from moeinf.errors import IntegrityError, MoeinfError
from moeinf.manifest import ExpertLayout, TensorSpec
from moeinf.steps import Arrival
from moeinf.transfer import Reader, SlotPool, Urgency, allocate_buffer, can_read_direct

DEMAND, GUESS, WARM_UP = Urgency

LAYOUT = ExpertLayout(
    4096, (TensorSpec("gate_up_proj", "BF16", (6, 100), 0), TensorSpec("down_proj", "F32", (3, 7), 1200))
)


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def direct(request: pytest.FixtureRequest, tmp_path: Path) -> bool:
    (tmp_path / "probe").write_bytes(b"x")
    if request.param and not can_read_direct(tmp_path / "probe"):
        pytest.skip("this file system has no direct reads")
    return bool(request.param)


def write_random(path: Path, size: int) -> bytes:
    data = os.urandom(size)
    path.write_bytes(data)
    return data


@pytest.mark.parametrize("size", [1, 4095, 4096, 3 * 4096 + 17])
def test_reads_bring_exactly_the_bytes(
    tmp_path: Path, direct: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", 4096)
    reader = Reader(threads=3, direct=direct)
    contents = {key: write_random(tmp_path / f"{key}", 4096 + size) for key in range(5)}
    buffers = {key: memoryview(allocate_buffer(size + 4096)) for key in contents}
    for key in contents:
        reader.fetch(key, tmp_path / f"{key}", 4096, 4096 + size, buffers[key])
    arrivals = [reader.wait() for _ in contents]
    reader.close()
    assert sorted(arrival.key for arrival in arrivals) == [0, 1, 2, 3, 4]
    assert all(arrival.error is None for arrival in arrivals)
    for key, content in contents.items():
        assert buffers[key][:size] == content[4096:]
    assert reader.poll() is None


@pytest.mark.parametrize(
    ("size", "pieces"),
    [(100, [100]), (3 * 8192, [8192] * 3), (3 * 8192 + 100, [12288, 12288, 100]), (20000, [12288, 7712])],
)
def test_the_pieces_of_a_file_are_alike(
    tmp_path: Path, direct: bool, size: int, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the last one, since each begins where a page does."""
    read: list[int] = []
    exactly = transfer._read_exactly

    def note(descriptor: int, memory: memoryview, offset: int, wanted: int, path: Path) -> None:
        read.append(wanted)
        exactly(descriptor, memory, offset, wanted, path)

    monkeypatch.setattr(transfer, "_read_exactly", note)
    content = write_random(tmp_path / "file", size)
    buffer = memoryview(allocate_buffer(size + 4096))
    reader = Reader(threads=1, direct=direct, piece_bytes=8192)
    reader.fetch(1, tmp_path / "file", 0, size, buffer)
    assert reader.wait() == Arrival(1, size)
    reader.close()
    assert read == pieces
    assert buffer[:size] == content


def test_a_slot_shows_its_bytes_as_tensors(tmp_path: Path, direct: bool) -> None:
    gate_up, down = torch.randn(6, 100, dtype=torch.bfloat16), torch.randn(3, 7)
    data = b"".join(bytes(tensor.view(torch.uint8).flatten().tolist()) for tensor in (gate_up, down))
    (tmp_path / "expert").write_bytes(b" " * 4096 + data)
    pool = SlotPool(LAYOUT, 3)
    reader = Reader(threads=2, direct=direct)
    reader.fetch(9, tmp_path / "expert", 4096, 4096 + len(data), pool.memory(2))
    assert reader.wait() == Arrival(9, len(data))
    reader.close()
    assert pool.slot_bytes == 4096
    assert torch.equal(pool.tensors(2)["gate_up_proj"], gate_up)
    assert torch.equal(pool.tensors(2)["down_proj"], down)
    assert not pool.tensors(1)["down_proj"].any()


def test_a_short_file_is_an_integrity_error(tmp_path: Path, direct: bool) -> None:
    write_random(tmp_path / "short", 4096 + 5000)
    reader = Reader(threads=2, direct=direct)
    reader.fetch(1, tmp_path / "short", 4096, 4096 + 9000, memoryview(allocate_buffer(12288)))
    arrival = reader.wait()
    reader.close()
    assert isinstance(arrival.error, IntegrityError)
    assert "short ends at byte 9096, and should hold 13096" in str(arrival.error)


def test_a_missing_file_is_an_integrity_error(tmp_path: Path, direct: bool) -> None:
    reader = Reader(threads=1, direct=direct)
    reader.fetch(1, tmp_path / "gone", 0, 100, memoryview(allocate_buffer(4096)))
    arrival = reader.wait()
    reader.close()
    assert isinstance(arrival.error, IntegrityError)
    assert str(arrival.error) == f"{tmp_path / 'gone'} is missing"


def test_a_failing_disk_is_told_once_and_other_reads_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece of a bad file fails; the waiter hears of the file once, and of the good one as ever."""
    monkeypatch.setattr(transfer, "PIECE_BYTES", 4096)
    bad, good = tmp_path / "bad", tmp_path / "good"
    data = write_random(good, 8192)
    write_random(bad, 8192)

    class FailingReader(Reader):
        def _read_piece(self, job: transfer._Job, start: int) -> None:
            if job.path == bad:
                raise OSError(errno.EIO, "Input/output error")
            super()._read_piece(job, start)

    reader = FailingReader(threads=2, direct=False)
    memory = memoryview(allocate_buffer(8192))
    reader.fetch(1, bad, 0, 8192, memoryview(allocate_buffer(8192)))
    reader.fetch(2, good, 0, 8192, memory)
    arrivals = {arrival.key: arrival.error for arrival in (reader.wait(), reader.wait())}
    reader.close()
    assert reader.poll() is None
    assert memory[:] == data
    assert arrivals[2] is None
    assert type(arrivals[1]) is MoeinfError
    assert str(arrivals[1]) == f"{bad} cannot be read: Input/output error"


def test_a_bug_in_a_worker_reaches_the_waiter(tmp_path: Path) -> None:
    class BrokenReader(Reader):
        def _read_piece(self, job: transfer._Job, start: int) -> None:
            raise ZeroDivisionError("bug")

    reader = BrokenReader(threads=1, direct=False)
    reader.fetch(1, tmp_path / "any", 0, 1, memoryview(allocate_buffer(1)))
    assert "ZeroDivisionError('bug')" in str(reader.wait().error)
    reader.close()


def test_closing_drops_what_has_not_begun(tmp_path: Path) -> None:
    write_random(tmp_path / "file", 4096)
    reader = Reader(threads=1, direct=False)
    for key in range(200):
        reader.fetch(key, tmp_path / "file", 0, 4096, memoryview(allocate_buffer(4096)))
    reader.close()
    assert not any(thread.is_alive() for thread in reader._threads)


class GatedReader(Reader):
    """One thread or some, which read a piece whenever the test lets them, and note which."""

    def __init__(self, threads: int = 1) -> None:
        self.turns = threading.Semaphore(0)
        self.order: list[tuple[int, int]] = []
        super().__init__(threads=threads, direct=False)

    def _read_piece(self, job: transfer._Job, start: int) -> None:
        self.order.append((job.key, start))
        self.turns.acquire()
        super()._read_piece(job, start)

    def begin(self) -> None:
        """Let the piece in hand be read, and wait until the next one is."""
        before = len(self.order)
        self.turns.release()
        while len(self.order) == before:
            time.sleep(0.001)


@pytest.fixture
def gated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., GatedReader]]:
    """`gated(fetch, …)`: a gated reader that fetches (key, urgency) in this order, two pieces each."""
    monkeypatch.setattr(transfer, "PIECE_BYTES", 4096)
    reader = GatedReader()

    def start(*fetches: tuple[int, Urgency]) -> GatedReader:
        for key, urgency in fetches:
            write_random(tmp_path / f"{key}", 8192)
            memory = memoryview(allocate_buffer(8192))
            reader.fetch(key, tmp_path / f"{key}", 0, 8192, memory, urgency)
            while not reader.order:
                time.sleep(0.001)
        return reader

    yield start
    for _ in range(100):
        reader.turns.release()
    reader.close()


def test_what_nobody_waits_for_is_read_last(gated: Callable[..., GatedReader]) -> None:
    reader = gated((1, GUESS), (5, WARM_UP), (2, DEMAND), (3, GUESS), (4, DEMAND))
    for _ in range(9):
        reader.begin()
    assert [key for key, _ in reader.order] == [1, 2, 2, 4, 4, 1, 3, 3, 5, 5]


def test_a_promoted_guess_is_no_guess(gated: Callable[..., GatedReader]) -> None:
    reader = gated((1, DEMAND), (2, GUESS), (3, GUESS), (4, WARM_UP))
    reader.promote(3)
    reader.promote(4)
    reader.promote(9)  # nobody's
    for _ in range(7):
        reader.begin()
    assert [key for key, _ in reader.order] == [1, 1, 3, 3, 4, 4, 2, 2]


def test_a_cancelled_guess_reads_no_more_and_says_so(gated: Callable[..., GatedReader]) -> None:
    reader = gated((1, GUESS), (2, GUESS), (3, DEMAND))
    reader.cancel(2)
    assert reader.wait() == Arrival(2, 0, cancelled=True)
    reader.cancel(1)  # half of it is being read
    assert reader.poll() is None
    reader.begin()
    assert reader.wait() == Arrival(1, 4096, cancelled=True)
    reader.begin()
    reader.cancel(3)  # no guess
    reader.turns.release()
    assert reader.wait() == Arrival(3, 8192)
    assert [key for key, _ in reader.order] == [1, 3, 3]


@pytest.mark.parametrize(("pieces", "reading"), [(3, 3), (4, 2), (9, 2)])
def test_a_guess_that_could_keep_all_threads_busy_has_half_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int, reading: int
) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", 4096)
    reader = GatedReader(threads=4)
    size = 4096 * pieces

    def fetch(key: int, urgency: Urgency) -> None:
        write_random(tmp_path / f"{key}", size)
        reader.fetch(key, tmp_path / f"{key}", 0, size, memoryview(allocate_buffer(size)), urgency)

    def settle(count: int) -> list[int]:
        """The keys of what is read when as many reads as that began, and no more do."""
        while len(reader.order) < count:
            time.sleep(0.001)
        time.sleep(0.02)
        return [key for key, _ in reader.order]

    try:
        fetch(1, GUESS)
        assert settle(reading) == [1] * reading
        fetch(2, DEMAND)
        assert settle(4)[reading:] == [2] * (4 - reading)
    finally:
        for _ in range(100):
            reader.turns.release()
    assert {reader.wait().key, reader.wait().key} == {1, 2}
    reader.close()
    assert len(reader.order) == 2 * pieces


def test_a_promoted_guess_gets_the_threads_that_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", 4096)
    reader = GatedReader(threads=4)
    write_random(tmp_path / "file", 8 * 4096)
    reader.fetch(1, tmp_path / "file", 0, 8 * 4096, memoryview(allocate_buffer(8 * 4096)), GUESS)
    while len(reader.order) < 2:
        time.sleep(0.001)
    reader.promote(1)
    deadline = time.monotonic() + 10
    while len(reader.order) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(reader.order) == 4
    for _ in range(100):
        reader.turns.release()
    assert reader.wait() == Arrival(1, 8 * 4096)
    reader.close()
