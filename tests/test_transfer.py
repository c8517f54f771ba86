"""Reading experts: every byte in its place, and every failure told to whoever waits."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from ctypes import POINTER, Structure, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from moeinf import shared_library, transfer
from moeinf.errors import IntegrityError, MoeinfError
from moeinf.manifest import ExpertLayout, TensorSpec
from moeinf.native_reader import NativeReader, open_reader
from moeinf.shared_library import NotNativeError
from moeinf.steps import Arrival
from moeinf.transfer import PIECE_BYTES, FileReader, Reader, SlotPool, Urgency, allocate_buffer, can_read_direct
from readers import count_threads
from test_native import LIBRARY

DEMAND, GUESS, WARM_UP = Urgency
MakeReader = Callable[..., FileReader]

LAYOUT = ExpertLayout(
    4096, (TensorSpec("gate_up_proj", "BF16", (6, 100), 0), TensorSpec("down_proj", "F32", (3, 7), 1200))
)


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def direct(request: pytest.FixtureRequest, tmp_path: Path) -> bool:
    (tmp_path / "probe").write_bytes(b"x")
    if request.param and not can_read_direct(tmp_path / "probe"):
        pytest.skip("this file system has no direct reads")
    return bool(request.param)


@pytest.fixture(autouse=True)
def _the_library_to_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_library, "built_library", lambda: LIBRARY)


NATIVE = pytest.param("native", marks=pytest.mark.skipif(LIBRARY is None, reason="the native library is not built"))


@pytest.fixture(params=["python", NATIVE])
def make_reader(request: pytest.FixtureRequest) -> MakeReader:
    return {"python": Reader, "native": NativeReader}[request.param]


def write_random(path: Path, size: int) -> bytes:
    data = os.urandom(size)
    path.write_bytes(data)
    return data


@pytest.mark.parametrize("size", [1, 4095, 4096, 3 * 4096 + 17])
def test_reads_bring_exactly_the_bytes(
    tmp_path: Path, direct: bool, size: int, make_reader: MakeReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", 4096)
    reader = make_reader(threads=3, direct=direct)
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


def test_a_slot_shows_its_bytes_as_tensors(tmp_path: Path, direct: bool, make_reader: MakeReader) -> None:
    gate_up, down = torch.randn(6, 100, dtype=torch.bfloat16), torch.randn(3, 7)
    data = b"".join(bytes(tensor.view(torch.uint8).flatten().tolist()) for tensor in (gate_up, down))
    (tmp_path / "expert").write_bytes(b" " * 4096 + data)
    pool = SlotPool(LAYOUT, 3)
    reader = make_reader(threads=2, direct=direct)
    reader.fetch(9, tmp_path / "expert", 4096, 4096 + len(data), pool.memory(2))
    assert reader.wait() == Arrival(9, len(data))
    reader.close()
    assert pool.slot_bytes == 4096
    assert torch.equal(pool.tensors(2)["gate_up_proj"], gate_up)
    assert torch.equal(pool.tensors(2)["down_proj"], down)
    assert not pool.tensors(1)["down_proj"].any()


def test_a_short_file_is_an_integrity_error(tmp_path: Path, direct: bool, make_reader: MakeReader) -> None:
    write_random(tmp_path / "short", 4096 + 5000)
    reader = make_reader(threads=2, direct=direct)
    reader.fetch(1, tmp_path / "short", 4096, 4096 + 9000, memoryview(allocate_buffer(12288)))
    arrival = reader.wait()
    reader.close()
    assert isinstance(arrival.error, IntegrityError)
    assert "short ends at byte 9096, and should hold 13096" in str(arrival.error)


def test_a_missing_file_is_an_integrity_error(tmp_path: Path, direct: bool, make_reader: MakeReader) -> None:
    reader = make_reader(threads=1, direct=direct)
    reader.fetch(1, tmp_path / "gone", 0, 100, memoryview(allocate_buffer(4096)))
    arrival = reader.wait()
    reader.close()
    assert isinstance(arrival.error, IntegrityError)
    assert str(arrival.error) == f"{tmp_path / 'gone'} is missing"


def test_what_cannot_be_read_is_told_once_and_other_reads_go_on(
    tmp_path: Path, make_reader: MakeReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", 4096)
    (tmp_path / "bad").mkdir()
    data = write_random(tmp_path / "good", 8192)
    reader = make_reader(threads=2, direct=False)
    memory = memoryview(allocate_buffer(8192))
    reader.fetch(1, tmp_path / "bad", 0, 8192, memoryview(allocate_buffer(8192)))
    reader.fetch(2, tmp_path / "good", 0, 8192, memory)
    arrivals = {arrival.key: arrival for arrival in (reader.wait(), reader.wait())}
    assert reader.poll() is None
    reader.close()
    assert memory[:] == data
    assert arrivals[2] == Arrival(2, 8192)
    assert str(arrivals[1].error) == f"{tmp_path / 'bad'} cannot be read: Is a directory"
    assert arrivals[1].read_bytes == 0


@pytest.mark.skipif(LIBRARY is None, reason="the native library is not built")
def test_many_fetches_by_many_threads_all_arrive(tmp_path: Path, direct: bool) -> None:
    """Promoted, cancelled and left alone, at random; whatever is not cancelled has its bytes."""
    chance = random.Random(3)
    contents = [write_random(tmp_path / f"{number}", chance.randint(1, 50_000)) for number in range(8)]
    reader = NativeReader(threads=8, direct=direct, piece_bytes=4096)
    under_way: dict[int, tuple[bytes, memoryview]] = {}
    whole = cancelled = 0
    for key in range(3000):
        number, urgency = chance.randrange(8), chance.choice(list(Urgency))
        memory = memoryview(allocate_buffer(len(contents[number]) + 4096))
        under_way[key] = contents[number], memory
        reader.fetch(key, tmp_path / f"{number}", 0, len(contents[number]), memory, urgency)
        if chance.random() < 0.3:
            chance.choice([reader.promote, reader.cancel])(chance.choice(list(under_way)))
        while len(under_way) > chance.randint(0, 40):
            arrival = reader.wait()
            content, memory = under_way.pop(arrival.key)
            assert arrival.error is None
            if arrival.cancelled:
                cancelled += 1
                assert arrival.read_bytes < len(content)
            else:
                whole += 1
                assert arrival.read_bytes == len(content)
                assert memory[: len(content)] == content
    while under_way:
        under_way.pop(reader.wait().key)
    assert reader.poll() is None
    reader.close()
    assert whole > 2000
    assert cancelled


def test_a_wait_can_be_interrupted(tmp_path: Path, make_reader: MakeReader) -> None:
    os.mkfifo(tmp_path / "stuck")
    reader = make_reader(threads=1, direct=False)
    reader.fetch(1, tmp_path / "stuck", 0, 10, memoryview(allocate_buffer(10)))
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
    before = signal.signal(signal.SIGUSR1, _interrupt)
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            reader.wait()
    finally:
        signal.signal(signal.SIGUSR1, before)
        os.close(os.open(tmp_path / "stuck", os.O_WRONLY))  # who opened it to read goes on
    assert reader.wait().error is not None
    reader.close()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(LIBRARY is None, reason="the native library is not built")
def test_what_arrives_as_a_wait_is_interrupted_is_told_again(tmp_path: Path) -> None:
    write_random(tmp_path / "file", 100)
    reader = NativeReader(threads=1, direct=False)
    reader.fetch(1, tmp_path / "file", 0, 100, memoryview(allocate_buffer(100)))
    library: Any = reader._library
    waits = library.moe_await

    def interrupted(*args: Any) -> int:
        assert waits(*args)
        library.moe_await = waits
        raise KeyboardInterrupt

    library.moe_await = interrupted
    with pytest.raises(KeyboardInterrupt):
        reader.wait()
    assert reader.wait() == Arrival(1, 100)
    assert reader.poll() is None
    reader.close()


def test_without_the_library_python_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_library, "built_library", lambda: None)
    with pytest.raises(NotNativeError, match="not built"):
        NativeReader(threads=1, direct=False)
    reader = open_reader(threads=2, direct=False)
    assert type(reader) is Reader
    reader.close()


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


def test_closing_drops_what_has_not_begun(tmp_path: Path, make_reader: MakeReader) -> None:
    write_random(tmp_path / "file", 4096)
    before = int(psutil.Process().num_threads())
    reader = make_reader(threads=1, direct=False)
    for key in range(200):
        reader.fetch(key, tmp_path / "file", 0, 4096, memoryview(allocate_buffer(4096)))
    reader.close()
    assert count_threads(before) <= before


def test_what_is_read_in_part_when_the_reader_closes_is_closed_too(tmp_path: Path, make_reader: MakeReader) -> None:
    write_random(tmp_path / "file", 16 * PIECE_BYTES)
    memory = memoryview(allocate_buffer(16 * PIECE_BYTES))
    before = psutil.Process().num_fds()
    for _ in range(5):
        reader = make_reader(threads=1, direct=False)
        reader.fetch(1, tmp_path / "file", 0, len(memory), memory)
        time.sleep(0.001)
        reader.close()
        reader.close()
    assert psutil.Process().num_fds() == before
    with pytest.raises(MoeinfError, match="closed"):
        reader.fetch(2, tmp_path / "file", 0, len(memory), memory)


@pytest.mark.skipif(LIBRARY is None, reason="the native library is not built")
def test_a_native_reader_that_nobody_closed_ends_before_its_memory_does(tmp_path: Path) -> None:
    size = 64 * PIECE_BYTES
    (tmp_path / "file").write_bytes(b"\xaa" * size)
    before = int(psutil.Process().num_threads())

    def begin() -> None:
        reader = NativeReader(threads=4, direct=False)
        reader.fetch(1, tmp_path / "file", 0, size, memoryview(allocate_buffer(size)), Urgency.WARM_UP)

    begin()
    assert count_threads(before) <= before
    others = [bytearray(allocate_buffer(size)) for _ in range(2)]
    assert not any(map(any, others))


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

    def finish(self) -> None:
        """Let everything be read."""
        for _ in range(100):
            self.turns.release()

    def settle(self, count: int) -> list[int]:
        """The keys of what is read when as many reads as that began, and no more do."""
        while len(self.order) < count:
            time.sleep(0.001)
        time.sleep(0.02)
        return [key for key, _ in self.order]


class GatedNativeReader(NativeReader):
    """Its threads are the test's."""

    def __init__(self, threads: int = 1) -> None:
        super().__init__(threads=threads, direct=False, started=0)
        self.order: list[tuple[int, int]] = []
        self._idle = threads
        self._taken: deque[Piece] = deque()
        self._library.moe_take_piece.argtypes = self._library.moe_read_piece.argtypes = (c_void_p, POINTER(Piece))

    def fetch(self, *what: Any) -> None:
        super().fetch(*what)
        self._take()

    def promote(self, key: int) -> None:
        super().promote(key)
        self._take()

    def begin(self) -> None:
        piece = self._taken.popleft()
        self._library.moe_read_piece(self._reader, piece)
        self._idle += 1
        self._take()

    def finish(self) -> None:
        while self._taken:
            self.begin()

    def settle(self, count: int) -> list[int]:
        assert len(self.order) == count
        return [key for key, _ in self.order]

    def _take(self) -> None:
        while self._idle and self._library.moe_take_piece(self._reader, piece := Piece()):
            self.order.append((piece.key, piece.begin))
            self._taken.append(piece)
            self._idle -= 1


class Piece(Structure):
    """`moe_piece` of moe.h."""

    _fields_ = (("fetch", c_void_p), ("key", c_int64), ("begin", c_int64), ("is_guess", c_int32))


@pytest.fixture(params=["python", NATIVE])
def make_gated(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return {"python": GatedReader, "native": GatedNativeReader}[request.param]


@pytest.fixture
def gated(
    tmp_path: Path, make_gated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """`gated(fetch, …)`: a gated reader that fetches (key, urgency) in this order, two pieces each."""
    monkeypatch.setattr(transfer, "PIECE_BYTES", 4096)
    reader = make_gated()

    def start(*fetches: tuple[int, Urgency]) -> Any:
        for key, urgency in fetches:
            write_random(tmp_path / f"{key}", 8192)
            memory = memoryview(allocate_buffer(8192))
            reader.fetch(key, tmp_path / f"{key}", 0, 8192, memory, urgency)
            while not reader.order:
                time.sleep(0.001)
        return reader

    yield start
    reader.finish()
    reader.close()


def test_what_nobody_waits_for_is_read_last(gated: Callable[..., Any]) -> None:
    reader = gated((1, GUESS), (5, WARM_UP), (2, DEMAND), (3, GUESS), (4, DEMAND))
    for _ in range(9):
        reader.begin()
    assert [key for key, _ in reader.order] == [1, 2, 2, 4, 4, 1, 3, 3, 5, 5]


def test_a_promoted_guess_is_no_guess(gated: Callable[..., Any]) -> None:
    reader = gated((1, DEMAND), (2, GUESS), (3, GUESS), (4, WARM_UP))
    reader.promote(3)
    reader.promote(4)
    reader.promote(9)  # nobody's
    for _ in range(7):
        reader.begin()
    assert [key for key, _ in reader.order] == [1, 1, 3, 3, 4, 4, 2, 2]


def test_a_cancelled_guess_reads_no_more_and_says_so(gated: Callable[..., Any]) -> None:
    reader = gated((1, GUESS), (2, GUESS), (3, DEMAND))
    reader.cancel(2)
    assert reader.wait() == Arrival(2, 0, cancelled=True)
    reader.cancel(1)  # half of it is being read
    assert reader.poll() is None
    reader.begin()
    assert reader.wait() == Arrival(1, 4096, cancelled=True)
    reader.begin()
    reader.cancel(3)  # no guess
    reader.finish()
    assert reader.wait() == Arrival(3, 8192)
    assert [key for key, _ in reader.order] == [1, 3, 3]


@pytest.mark.parametrize(("pieces", "reading"), [(3, 3), (4, 2), (9, 2)])
def test_a_guess_that_could_keep_all_threads_busy_has_half_of_them(
    tmp_path: Path, make_gated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, pieces: int, reading: int
) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", 4096)
    reader = make_gated(threads=4)
    size = 4096 * pieces

    def fetch(key: int, urgency: Urgency) -> None:
        write_random(tmp_path / f"{key}", size)
        reader.fetch(key, tmp_path / f"{key}", 0, size, memoryview(allocate_buffer(size)), urgency)

    try:
        fetch(1, GUESS)
        assert reader.settle(reading) == [1] * reading
        fetch(2, DEMAND)
        assert reader.settle(4)[reading:] == [2] * (4 - reading)
    finally:
        reader.finish()
    assert {reader.wait().key, reader.wait().key} == {1, 2}
    reader.close()
    assert len(reader.order) == 2 * pieces


def test_a_promoted_guess_gets_the_threads_that_waited(
    tmp_path: Path, make_gated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", 4096)
    reader = make_gated(threads=4)
    write_random(tmp_path / "file", 8 * 4096)
    reader.fetch(1, tmp_path / "file", 0, 8 * 4096, memoryview(allocate_buffer(8 * 4096)), GUESS)
    assert reader.settle(2) == [1, 1]
    reader.promote(1)
    assert reader.settle(4) == [1] * 4
    reader.finish()
    assert reader.wait() == Arrival(1, 8 * 4096)
    reader.close()
