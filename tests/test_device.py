"""A device is found, or refused with a reason; its memory is kept to; and what fails in the middle leaves all well."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moeinf
import moeinf.device as device_module
from families import make_checkpoint
from moeinf.cli.answers import describe_plan, describe_stats
from moeinf.device import CudaDevice, find_device
from moeinf.engine import Engine
from moeinf.errors import CapacityError, MoeinfError, UnsupportedError, UsageError
from moeinf.misses import HostStep, MissChoice, Way
from moeinf.pull import pull
from moeinf.stats import Stats
from moeinf.store import Store
from moeinf.tiers import DevicePool, HostTier
from readers import FailingReader, RecordingReader, use_reader
from standin import PLACE, StandIn, use_device
from test_exact import PROMPT, reference

GREEDY = moeinf.Sampling(max_tokens=12, temperature=0)
IDS = PROMPT[0].tolist()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with use_device(monkeypatch) as found:
        yield found


@pytest.fixture(scope="module")
def tokens(tiny_home: Path) -> list[int]:
    """What `tiny` answers to IDS."""
    return reference(tiny_home.parent / "checkpoint", torch.bfloat16)[1][:12]


def run(engine: Engine) -> list[int]:
    engine.generation_config.eos_token_id = None
    return list(engine.session().generate(IDS, GREEDY).tokens)


def check_integrity(engine: Engine) -> None:
    engine.runtime.cache.check_integrity()
    engine.runtime._settle(())  # what was foreseen for a token that did not come
    while engine.runtime._prefetcher.unsettled:
        engine.runtime.wait()
    assert not any(engine.runtime.cache._leases)
    tier = engine.runtime._fetcher
    assert isinstance(tier, HostTier)
    tier.check_integrity()


class FakeDriver:
    """CUDA's way to register host memory, of which it takes so many calls."""

    def __init__(self, takes: int) -> None:
        self.takes = takes
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, _flags: int) -> int:  # noqa: N802  # CUDA's name
        if len(self.registered) == self.takes:
            return 2
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        return 0 if self.registered.pop(address, None) else 1


@pytest.mark.parametrize("takes", [3, 2, 0])
def test_host_memory_is_registered_in_parts_of_whole_slots_or_not_at_all(
    takes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, rows = FakeDriver(takes), torch.empty(5, 4096, dtype=torch.uint8)
    monkeypatch.setattr(device_module, "_REGISTERED_BYTES", 3 * 4096 - 1)
    monkeypatch.setattr(device_module, "_cuda", SimpleNamespace(cudart=lambda: driver))
    gpu = object.__new__(CudaDevice)  # which asks a driver for its stream
    gpu._forget_error = lambda: None  # type: ignore[method-assign]
    assert gpu.pin(rows) == (takes == 3)
    begin = rows.data_ptr()
    parts = {begin: 8192, begin + 8192: 8192, begin + 16384: 4096}
    assert driver.registered == (parts if takes == 3 else {})
    gpu.unpin(rows)
    assert driver.registered == {}


def test_a_gpu_that_is_full_while_the_model_is_loaded_is_no_crash(
    tiny: str, device: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def somebody_was_quicker(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("moeinf.hooks.move", somebody_was_quicker)
        with pytest.raises(CapacityError, match="ran out of memory while the model was loaded"):
            moeinf.load(tiny, device="cuda")
    with moeinf.load(tiny, device="cuda"):
        pass


def test_without_cuda_a_gpu_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert find_device("auto") is None
    assert find_device("cpu") is None
    with pytest.raises(UnsupportedError, match="--device cuda: this torch was built without CUDA"):
        find_device("cuda")
    monkeypatch.setattr(torch.cuda, "init", no_driver)
    for name in ("cuda", "hip"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.version, name, "13.0")
            with pytest.raises(UnsupportedError, match=r"--device cuda:1: Found no NVIDIA driver on your system\.$"):
                find_device("cuda:1")


def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="--device cuda:2 is not there") as caught:
        find_device("cuda:2")
    assert caught.value.hint == "the GPUs here: cuda:0, cuda:1; or give --device cpu to compute on the processor"
    for name in ("tpu", "cuda:", "cuda:-1", "cpu:0", "auto:1"):
        with pytest.raises(UsageError, match=f"--device {name} is not known"):
            find_device(name)


@pytest.mark.parametrize("at", ["CudaDevice", "_compute_something"])
def test_a_gpu_that_torch_cannot_use_is_left_alone_unless_it_was_asked_for(
    at: str, tiny: str, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which shows when it is first named, or when it first computes."""

    def cannot(_: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nPlease check")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(moeinf.device, "CudaDevice", lambda index: StandIn())
    monkeypatch.setattr(moeinf.device, at, cannot)
    with pytest.raises(UnsupportedError, match="--device cuda: CUDA error: no kernel image is available for execution"):
        moeinf.load(tiny, device="cuda")
    with moeinf.load(tiny, kernels="torch") as engine:
        assert engine.device is None
        assert engine.notes[0].startswith("the GPU is not used: --device auto: CUDA error: no kernel image")
        assert run(engine) == tokens


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kernels": "native"}, UnsupportedError, "--kernels native compute on the processor"),
        ({"device": "cpu", "kernels": "triton"}, UnsupportedError, "--kernels triton compute on a GPU, and none is"),
        ({"device": "cpu", "miss": "host"}, UsageError, "--miss host is about experts that a GPU lacks, and none is"),
        ({"device_memory": "2GiB"}, CapacityError, "--device-memory is 2.00 GiB, and 1.00 GiB of the GPU's memory are"),
        ({"device_memory": "1MB"}, CapacityError, "the budget is 977 KiB"),
        ({"host_memory": "1000TB"}, CapacityError, "of host memory, which a GPU's copies keep from being swapped out"),
        ({"host_memory": "1MB"}, CapacityError, "128 MiB of workspace"),
    ],
)
def test_what_cannot_be_is_refused(
    tiny: str, device: StandIn, options: dict[str, str], error: type[MoeinfError], message: str
) -> None:
    with pytest.raises(error, match=message):
        moeinf.load(tiny, **{"device": "cuda", **options})  # type: ignore[arg-type]
    assert not device.is_pinned
    with Store().hold(tiny):  # nobody holds it any more
        pass


def test_the_budget_that_is_named_would_do(tiny: str, device: StandIn) -> None:
    for option in ("device_memory", "host_memory"):
        with pytest.raises(CapacityError) as caught:
            moeinf.load(tiny, device="cuda", context=128, **{option: "1MB"})  # type: ignore[arg-type]
        assert caught.value.hint is not None
        words = caught.value.hint.split()
        assert words[2] == f"--{option.replace('_', '-')}"
        with moeinf.load(tiny, device="cuda", context=128, **{option: words[3]}) as engine:  # type: ignore[arg-type]
            assert run(engine)


def test_a_gpu_that_is_too_small_is_left_alone(tiny: str, device: StandIn, tokens: list[int]) -> None:
    device.size = 1 << 20
    with moeinf.load(tiny, kernels="torch") as engine:
        assert engine.device is None
        assert engine.plan.host is None
        assert engine.notes[0].startswith("a stand-in is not used: the model needs")
        assert run(engine) == tokens


def test_other_gpus_are_not_used_and_that_is_said(tiny: str, device: StandIn) -> None:
    device.others = 3
    with moeinf.load(tiny) as engine:
        assert engine.notes == ("a stand-in alone is used, and 3 more of this machine's GPUs are not",)


def test_memory_that_cannot_be_pinned_is_said(tiny: str, device: StandIn, tokens: list[int]) -> None:
    device.can_pin = False
    with moeinf.load(tiny) as engine:
        assert engine.notes[0].startswith("the system does not let the GPU reach host memory by itself")
        assert run(engine) == tokens


def test_a_gpu_without_bfloat16_computes_in_float32(home: Path, tmp_path: Path, device: StandIn) -> None:
    make_checkpoint("gpt_oss", tmp_path, "bfloat16")
    logits, tokens = reference(tmp_path, torch.float32)
    pull(str(tmp_path), store=Store(home), name="model")
    device.unsupported = {torch.bfloat16}
    with moeinf.load("model", experts="50%") as engine, torch.inference_mode():
        assert engine.notes[0].startswith("a stand-in does not compute in bfloat16: in float32")
        assert torch.equal(engine.model(PROMPT.to(PLACE)).logits.cpu(), logits)
        assert run(engine) == tokens[:12]
        assert engine.plan.dense == 2 * engine.manifest.dense_bytes


def test_a_device_with_less_room_than_it_says_holds_fewer_experts(
    tiny: str, device: StandIn, tokens: list[int]
) -> None:
    device.room = 7 * (4096 * 2)
    with moeinf.load(tiny) as engine:
        assert 2 <= engine.plan.slots <= 7
        assert engine.notes == (
            f"a stand-in has less room than it said: it holds {engine.plan.slots} experts instead of 16",
        )
        assert run(engine) == tokens
    device.room = 4096
    with pytest.raises(CapacityError, match="a stand-in has no room for 2 experts"):
        moeinf.load(tiny)
    assert not device.is_pinned


@pytest.mark.parametrize("prefetch", ["off", "eam"])
@pytest.mark.parametrize("at", [1, 12, 25])
def test_memory_that_runs_out_in_the_middle_costs_slots_and_not_the_answer(
    at: int, prefetch: str, tiny: str, device: StandIn, tokens: list[int]
) -> None:
    with moeinf.load(tiny, experts="12", prefetch=prefetch) as engine:
        run_out(engine, at)
        said: list[int] = []
        engine.generation_config.eos_token_id = None
        answer = engine.session().generate(IDS, GREEDY, on_token=said.append)
        assert list(answer.tokens) == said == tokens
        assert engine.notes == ("a stand-in ran out of memory: from now on it holds 6 experts",)
        assert (engine.plan.slots, engine.stats().experts.slots) == (6, 6)
        check_integrity(engine)
        assert engine.runtime.cache.num_resident + engine.runtime.cache.num_free == 6
        assert run(engine) == tokens


@pytest.mark.parametrize(
    "message",
    [
        "no memory",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    ],
)
def test_libraries_run_out_of_memory_in_words_of_their_own(
    message: str, tiny: str, device: StandIn, tokens: list[int]
) -> None:
    with moeinf.load(tiny, experts="12") as engine:
        run_out(engine, 5, error=RuntimeError(message))
        if message == "no memory":
            with pytest.raises(RuntimeError, match=message):
                run(engine)
        else:
            assert run(engine) == tokens
            assert engine.plan.slots == 6


def test_room_that_is_taken_at_once_costs_more_slots(tiny: str, device: StandIn, tokens: list[int]) -> None:
    with moeinf.load(tiny, experts="12") as engine:
        run_out(engine, 5)
        device.room = 5 * (4096 * 2)
        assert run(engine) == tokens
        assert engine.plan.slots == 3
        check_integrity(engine)


def test_closing_gives_the_device_s_memory_back(tiny: str, device: StandIn) -> None:
    with moeinf.load(tiny) as engine:
        run(engine)
        slots = engine.runtime._pool
        assert isinstance(slots, DevicePool)
        assert slots.weights
    assert not slots.weights
    assert not any(parameter.numel() for parameter in engine.model.parameters())
    assert not device.is_pinned


def test_memory_that_runs_out_for_good_ends_the_answer(tiny: str, device: StandIn, tokens: list[int]) -> None:
    with moeinf.load(tiny, experts="12") as engine:
        run_out(engine, *range(1000))
        with pytest.raises(CapacityError, match="memory ran out, and half of 3 experts"):
            run(engine)
        check_integrity(engine)
        del engine.runtime._maths[0].expert
        assert run(engine) == tokens


def run_out(engine: Engine, *at: int, error: RuntimeError | None = None) -> None:
    """Let the calls of these numbers for an expert of the first layer find no memory."""
    maths, numbers = engine.runtime._maths[0], iter(range(100_000))
    expert = maths.expert

    def short_of_memory(*args: Any) -> torch.Tensor:
        if next(numbers) in at:
            raise error or torch.OutOfMemoryError("no memory")
        return expert(*args)

    maths.expert = short_of_memory  # type: ignore[method-assign,assignment]


def test_what_fits_host_memory_is_read_once_and_crosses_the_link_once_per_step(
    tiny: str, device: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = use_reader(monkeypatch, RecordingReader)
    with moeinf.load(tiny, experts="2", prefetch="off") as engine, torch.inference_mode():
        assert engine.plan.regime == "host-cached"
        for expected in (0, 1):
            copies = device.copies
            engine.model(PROMPT.to(PLACE))
            fetched = readers[-1].fetched
            assert len(fetched) == len(set(fetched)) > 10
            assert len(fetched) - 2 <= device.copies - copies <= len(fetched)
            assert engine.runtime.traffic.unread >= expected * 10
        run(engine)
        stats = engine.stats()
        assert stats.bytes.disk_to_host == 0
        assert stats.experts.fetched_from_host == stats.experts.fetched == stats.experts.misses > 0
        assert stats.bytes.host_to_device == stats.experts.fetched * engine.manifest.layout.nbytes


@pytest.mark.parametrize("miss", ["fetch", "host"])
@pytest.mark.parametrize("prefetch", ["off", "gate", "eam"])
def test_every_read_may_fail_once(
    prefetch: str, miss: str, tiny: str, device: StandIn, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = use_reader(monkeypatch, FailingReader)
    device.host_slots = 3
    with moeinf.load(tiny, experts="4", prefetch=prefetch, miss=miss) as engine:
        reader = readers[-1]
        messages: list[tuple[str, str]] = []
        for number in range(0, 400, 9):
            reader.fail_at, reader.failed_path = number, None
            try:
                assert run(engine) == tokens
            except MoeinfError as error:
                messages.append((str(reader.failed_path), str(error)))
            is_over = reader.failed_path is None
            reader.fail_at, reader.failed_path = None, None
            check_integrity(engine)
            if is_over:
                break
        assert len(messages) > 2
        assert all(message == f"{path} cannot be read: Input/output error" for path, message in messages)
        assert run(engine) == tokens


def test_an_interrupt_in_the_maths_leaves_no_lease(tiny: str, device: StandIn, tokens: list[int]) -> None:
    with moeinf.load(tiny, experts="4") as engine:
        maths = engine.runtime._maths[1]

        def interrupted(*_: object) -> torch.Tensor:
            raise KeyboardInterrupt

        maths.expert = interrupted  # type: ignore[method-assign,assignment]
        with pytest.raises(KeyboardInterrupt):
            run(engine)
        del maths.expert
        check_integrity(engine)
        assert run(engine) == tokens


def run_twice(engine: Engine) -> Stats:
    """What an answer costs when host memory has all experts."""
    run(engine)
    run(engine)
    check_integrity(engine)
    return engine.stats()


def test_what_the_processor_computes_crosses_no_link_and_takes_no_slot(
    tiny: str, device: StandIn, tokens: list[int]
) -> None:
    with moeinf.load(tiny, experts="4", miss="host", prefetch="off") as engine, torch.inference_mode():
        assert run(engine) == tokens

        def decode() -> None:
            for token in tokens:
                engine.model(torch.tensor([[token]]).to(PLACE))

        decode()  # host memory has all that is asked for from now on
        cache, copies = engine.runtime.cache, device.copies
        before = [cache.slot(expert) for expert in range(engine.manifest.num_experts)]
        engine.runtime.reset_counters()
        decode()
        experts = engine.stats().experts
        assert experts.decode_requests == experts.hits + experts.misses == 2 * 2 * len(tokens)
        assert experts.computed_on_host == experts.misses > 0
        assert experts.fetched == experts.evictions == engine.stats().bytes.host_to_device == 0
        assert [cache.slot(expert) for expert in range(engine.manifest.num_experts)] == before
        assert device.copies == copies
        assert f", {experts.computed_on_host} computed by the processor · " in describe_stats(engine.stats())[1]
        check_integrity(engine)


@pytest.mark.parametrize("link_s", [0.0, 1e9])
def test_the_faster_way_is_gone(link_s: float, tiny: str, device: StandIn) -> None:
    """A link that takes no time, or for ever, beside a processor that takes some."""
    device.link_s = link_s
    with moeinf.load(tiny, experts="4", miss="auto", prefetch="off") as engine:
        experts = run_twice(engine).experts
        decode_misses = engine.runtime.decode.misses
        assert experts.computed_on_host == (decode_misses if link_s else 0)
        assert decode_misses > 0


@pytest.mark.parametrize("miss", ["auto", "host"])
def test_an_idle_link_brings_what_the_processor_computed(
    miss: str, tiny: str, device: StandIn, tokens: list[int]
) -> None:
    """With `auto`, which here leaves all to the processor: so that the next token finds it."""
    device.link_s = 1e9
    with moeinf.load(tiny, experts="4", miss=miss, prefetch="off") as engine, torch.inference_mode():
        assert run(engine) == tokens
        for _ in range(2):
            engine.runtime.reset_counters()
            for token in tokens:
                engine.model(torch.tensor([[token]]).to(PLACE))
        experts = engine.stats().experts
        assert experts.computed_on_host == experts.misses > 0
        assert (experts.fetched > 2) == (experts.evictions > 2) == (miss == "auto")
        assert experts.prefetched == 0
        check_integrity(engine)


def test_both_ways_are_gone_in_one_step(
    tiny: str, device: StandIn, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MissChoice, "on_host", lambda _, count: count // 2)
    with moeinf.load(tiny, experts="3", miss="auto", prefetch="off") as engine:
        experts = run_twice(engine).experts
        assert run(engine) == tokens
        assert 0 < experts.computed_on_host < engine.runtime.decode.misses
        assert experts.fetched + experts.computed_on_host == experts.misses
        choice = engine.runtime._misses._choice  # type: ignore[union-attr]
        assert choice is not None
        assert choice._link_s == pytest.approx(dict.fromkeys((Way.LINK, Way.BOTH), device.link_s))
        assert choice._host_s.keys() == {Way.BOTH}


@pytest.mark.parametrize("miss", ["host", "auto"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", ["moeinf.misses.HostStep.rows", "moeinf.misses.HostStep.__init__"])
def test_what_fails_on_the_processor_leaves_no_lease(
    at: str, error: type[BaseException], miss: str, tiny: str, device: StandIn, tokens: list[int]
) -> None:
    device.link_s = 1e9

    def fail(*_: object) -> None:
        raise error

    with moeinf.load(tiny, experts="4", miss=miss) as engine:
        assert run(engine) == tokens
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(at, fail)
            with pytest.raises(error):
                run(engine)
        check_integrity(engine)
        assert run(engine) == tokens


@pytest.mark.parametrize("miss", ["auto", "host"])
def test_memory_that_runs_out_for_the_processor_s_rows_costs_slots_and_not_the_answer(
    miss: str, tiny: str, device: StandIn, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    device.link_s = 1e9
    with moeinf.load(tiny, experts="6", miss=miss, prefetch="off") as engine:
        run(engine)
        rows, numbers = HostStep.rows, iter(range(100_000))

        def short_of_memory(step: HostStep) -> torch.Tensor:
            made = rows(step)
            if next(numbers) == 2:
                raise torch.OutOfMemoryError("no memory")
            return made

        monkeypatch.setattr(HostStep, "rows", short_of_memory)
        assert run(engine) == tokens
        assert engine.plan.slots == 3
        assert next(numbers) > 3
        check_integrity(engine)


def test_a_trace_recorded_on_a_device_is_that_of_the_processor(tiny: str, device: StandIn) -> None:
    from moeinf.recorder import Recorder
    from moeinf.trace import ModelIdentity

    traces = []
    for name in ("cpu", "cuda"):
        with moeinf.load(tiny, device=name, kernels="torch", experts="4") as engine:
            engine.runtime.recorder = Recorder(ModelIdentity.of(tiny, engine.manifest))
            run(engine)
            traces.append(engine.runtime.recorder.trace())
        shutil.rmtree(Store().path(tiny) / "traces", ignore_errors=True)
    for name in ("experts", "weights", "position", "is_prefill"):
        assert (getattr(traces[0], name) == getattr(traces[1], name)).all()


def test_auto_foresees_as_long_as_the_device_lacks_experts(tiny: str, device: StandIn) -> None:
    """Whether they come from the disk or from host memory."""
    for experts, device.host_slots in (("4", 16), ("4", 6), ("100%", 16)):
        with moeinf.load(tiny, experts=experts) as engine:
            engine.generation_config.eos_token_id = None
            engine.session().generate(IDS, moeinf.Sampling(max_tokens=60))
            assert (engine.runtime.prefetch.asked > 0) == (experts == "4")


def test_what_is_said_names_both_tiers(tiny: str, device: StandIn) -> None:
    with moeinf.load(tiny, experts="4", prefetch="off") as engine:
        assert describe_plan(engine.plan) == "4 of 16 experts in GPU memory, and all of them in host memory"
        run(engine)
        run(engine)
        stats = engine.stats()
        share = f"100.0% of {stats.experts.fetched} in 16 host slots"
        assert f"in 4 device slots, {share} · disk to host 0 B" in describe_stats(stats)[1]
    device.host_slots = 6
    with moeinf.load(tiny, experts="4") as engine:
        assert describe_plan(engine.plan) == (
            "4 of 16 experts in GPU memory, 6 in host memory, the others are read from disk when asked for"
        )
    with moeinf.load(tiny) as engine:
        assert describe_plan(engine.plan) == "all 16 experts in GPU memory"
