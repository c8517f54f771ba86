"""The hub: what it lists, how files arrive, and every way in which a network, a server or a disk can get in between."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from fakehub import FakeHub, blob_id, sha256
from faults import FailingDisk
from moeinf import hub
from moeinf.errors import (
    CapacityError,
    HubError,
    IntegrityError,
    ModelNotFoundError,
    MoeinfError,
    UnsupportedError,
    UsageError,
)
from moeinf.files import FileSystem
from moeinf.hub import HubRepo, RemoteFile
from moeinf.units import KIB, MIB

REPO = "org/model"
CHUNK = 64 * KIB
"""How much is received at a time, instead of 1 MiB, so that small files have many pieces."""
WEIGHTS = random.Random(0).randbytes(4 * CHUNK + 12_345)
CONFIG = b'{"model_type": "mixtral"}\n'
FILES = {"config.json": CONFIG, "tokenizer.json": b"{}", "model.safetensors": WEIGHTS}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "repo", FILES)


@pytest.fixture
def fake(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub({REPO: folder}) as fake:
        fake.connect(monkeypatch)
        yield fake


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waiting takes no time, and is noted."""
    waits: list[float] = []
    monkeypatch.setattr(hub, "_sleep", waits.append)
    return waits


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_CHUNK_BYTES", CHUNK)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where a download goes."""
    return tmp_path / "down" / "file"


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def part_of(place: Path) -> Path:
    return place.with_name(place.name + ".part")


def prepare_part(place: Path, data: bytes) -> None:
    place.parent.mkdir()
    part_of(place).write_bytes(data)


def names(model: HubRepo) -> list[str]:
    return [file.path for file in model.files]


def pick(model: HubRepo, path: str = "model.safetensors") -> RemoteFile:
    return next(file for file in model.files if file.path == path)


def fetch(place: Path, path: str = "model.safetensors") -> list[int]:
    """Download one file of the repo, check it, and return what `advance` was told."""
    model = hub.resolve(REPO)
    told: list[int] = []
    assert hub.download(model, pick(model, path), place, advance=told.append) == place
    assert place.read_bytes() == FILES[path]
    assert not part_of(place).exists()
    assert sum(told) == len(FILES[path])
    assert all(amount > 0 for amount in told)
    return told


def ranges(fake: FakeHub) -> list[str | None]:
    return [seen.headers.get("range") for seen in fake.seen("cdn")]


# What the hub has


def test_exports_are_sorted_and_exist() -> None:
    assert hub.__all__ == sorted(hub.__all__)
    assert all(hasattr(hub, name) for name in hub.__all__)


def test_importing_it_is_cheap() -> None:
    program = (
        "import sys, moeinf.hub; print(*sorted({'huggingface_hub', 'httpx', 'httpx2', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_lists_files_with_sizes_and_hashes(fake: FakeHub) -> None:
    model = hub.resolve(REPO)
    assert model == HubRepo(
        repo=REPO,
        commit=fake.commit(REPO),
        files=(
            RemoteFile("config.json", len(CONFIG), None, blob_id(CONFIG)),
            RemoteFile("model.safetensors", len(WEIGHTS), sha256(WEIGHTS)),
            RemoteFile("tokenizer.json", 2, None, blob_id(b"{}")),
        ),
    )
    assert model.download_bytes == len(CONFIG) + len(WEIGHTS) + 2


def test_lists_only_what_a_model_is_read_from(fake: FakeHub, folder: Path) -> None:
    wanted = {
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "qwen.tiktoken",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
    others = {
        ".gitattributes",
        "README.md",
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "metal/model.bin",
        "model.gguf",
        "model.onnx",
        "modeling_custom.py",
        "original/config.json",
        "original/model.safetensors",
        "preprocessor_config.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "training_args.pt",
        "weights.pth",
        "x.ckpt",
    }
    write(folder, dict.fromkeys(wanted | others, b"x"))
    assert names(hub.resolve(REPO)) == sorted(wanted)


def test_lists_the_shards_of_an_index_without_their_duplicates(fake: FakeHub, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    duplicates = ["consolidated-00001-of-00002.safetensors", "consolidated.safetensors.index.json"]
    write(folder, dict.fromkeys([*shards, *duplicates, "model.safetensors.index.json"], b"x"))
    assert names(hub.resolve(REPO)) == ["config.json", *shards, "model.safetensors.index.json", "tokenizer.json"]


def test_prefers_the_single_file_to_an_index(fake: FakeHub, folder: Path) -> None:
    write(folder, dict.fromkeys(["model-00001-of-00001.safetensors", "model.safetensors.index.json"], b"x"))
    assert names(hub.resolve(REPO)) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_finds_a_commit(fake: FakeHub) -> None:
    assert hub.resolve(REPO, fake.commit(REPO)) == hub.resolve(REPO, "main") == hub.resolve(REPO)


def test_unknown_revision(fake: FakeHub) -> None:
    with pytest.raises(ModelNotFoundError, match="org/model has no revision 'refs/pr/9'") as caught:
        hub.resolve(REPO, "refs/pr/9")
    assert f"{fake.url}/org/model/tree/main" in str(caught.value.hint)


@pytest.mark.parametrize("token", [None, "hf_good"])
def test_unknown_repo(fake: FakeHub, monkeypatch: pytest.MonkeyPatch, token: str | None, waits: list[float]) -> None:
    fake.tokens = {"hf_good"}
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ModelNotFoundError, match="org/other is not at the hub, or it is private") as caught:
        hub.resolve("org/other")
    assert "HF_TOKEN" in str(caught.value.hint)
    assert waits == []


def test_private_repo_is_there_with_a_token_only(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.private, fake.tokens = {REPO}, {"hf_good"}
    with pytest.raises(ModelNotFoundError):
        hub.resolve(REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert hub.resolve(REPO).repo == REPO


def test_token_that_the_hub_does_not_know(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    with pytest.raises(HubError, match="does not accept the access token") as caught:
        hub.resolve(REPO)
    assert "hf auth login" in str(caught.value.hint)


@pytest.mark.parametrize("token", ["hf_\x01secret", "hf_sécret", "hf secret"])
def test_malformed_token_is_not_repeated_in_the_message(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match="characters that no token has") as caught:
        hub.resolve(REPO)
    assert "cret" not in str(caught.value)
    assert fake.requests == []


@pytest.mark.parametrize("repo", ["", "a/b/c", "../model", "org/../model", "org/model?x=1", "org/mo del"])
def test_what_is_no_id(fake: FakeHub, repo: str) -> None:
    with pytest.raises(UsageError, match="cannot be a model at the hub"):
        hub.resolve(repo)
    assert fake.requests == []


def test_follows_a_renamed_repo(fake: FakeHub, place: Path) -> None:
    fake.renamed = {"old/name": REPO}
    model = hub.resolve("old/name")
    assert model.repo == "old/name"
    assert hub.download(model, pick(model), place).read_bytes() == WEIGHTS


def test_pickles_only(fake: FakeHub, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match=r"only as pickles \(pytorch_model\.bin\)") as caught:
        hub.resolve(REPO)
    assert "refs/pr/" in str(caught.value.hint)


def test_gguf_only(fake: FakeHub, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-q4.gguf")
    with pytest.raises(UnsupportedError, match="only as GGUF"):
        hub.resolve(REPO)


def test_no_config(fake: FakeHub, folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(UnsupportedError, match=r"no config\.json"):
        hub.resolve(REPO)


@pytest.mark.parametrize(
    "name", [None, "consolidated.safetensors", "model-00001-of-00002.safetensors", "original/model.safetensors"]
)
def test_no_checkpoint_of_transformers(fake: FakeHub, folder: Path, name: str | None) -> None:
    (folder / "model.safetensors").unlink()
    if name:
        write(folder, {name: b"x"})
    with pytest.raises(UnsupportedError, match="no checkpoint of transformers"):
        hub.resolve(REPO)


@pytest.mark.parametrize(
    "name",
    [
        "../config.json",
        "a/../../b",
        "/etc/passwd",
        "a\\b",
        "C:evil",
        "c:/evil",
        "a\0b",
        "a\nb",
        "a//b",
        "./a",
        "",
        "a/",
    ],
)
def test_hostile_name(fake: FakeHub, name: str) -> None:
    fake.faults.extra_files = [{"rfilename": name, "size": 1, "blobId": "0" * 40}]
    with pytest.raises(IntegrityError, match="unsafe name"):
        hub.resolve(REPO)


@pytest.mark.parametrize("name", [None, 5, "\ud800.model"], ids=["null", "number", "surrogate"])
def test_name_that_is_no_text(fake: FakeHub, name: object) -> None:
    fake.faults.extra_files = [{"rfilename": name, "size": 1, "blobId": "0" * 40}]
    with pytest.raises(HubError, match="makes no sense"):
        hub.resolve(REPO)


def test_names_that_one_disk_takes_for_one(fake: FakeHub, folder: Path) -> None:
    write(folder, {"tokenizer.model": b"x", "Tokenizer.model": b"y"})
    with pytest.raises(IntegrityError, match="only in case"):
        hub.resolve(REPO)


@pytest.mark.parametrize(
    "said",
    [
        {"size": 1},
        {"size": 1, "blobId": "xyz"},
        {"blobId": "0" * 40},
        {"size": -1, "blobId": "0" * 40},
        {"size": 1, "blobId": "0" * 40, "lfs": {"size": 1, "sha256": "0" * 40, "pointerSize": 1}},
    ],
)
def test_file_that_could_not_be_checked(fake: FakeHub, said: dict[str, object]) -> None:
    fake.faults.extra_files = [{"rfilename": "vocab.txt", **said}]
    with pytest.raises(IntegrityError, match=r"no size and hash for vocab\.txt"):
        hub.resolve(REPO)


def test_offline(fake: FakeHub, monkeypatch: pytest.MonkeyPatch, place: Path, waits: list[float]) -> None:
    model = hub.resolve(REPO)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        hub.resolve(REPO, offline=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(fake.requests)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        hub.resolve(REPO)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE") as caught:
        hub.download(model, pick(model), place)
    assert waits == []
    assert "unset HF_HUB_OFFLINE" in str(caught.value.hint)
    assert len(fake.requests) == asked


@pytest.mark.parametrize(
    "listing",
    [
        b"<html>Sign in to this network</html>",
        b"[]",
        b"{}",
        b'{"id": "org/model", "sha": null, "siblings": []}',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_answer_of_something_that_is_not_the_hub(fake: FakeHub, listing: bytes) -> None:
    fake.faults.listing = listing
    with pytest.raises(HubError, match="makes no sense") as caught:
        hub.resolve(REPO)
    assert fake.url in str(caught.value.hint)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_passing_failure_of_the_hub(fake: FakeHub, waits: list[float], status: int) -> None:
    fake.faults.statuses = [status, status]
    assert hub.resolve(REPO).repo == REPO
    assert waits == [1.0, 2.0]


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (400, HubError, "status 400"),
        (403, HubError, "refuses org/model"),
        (404, ModelNotFoundError, "not at the hub"),
        (429, HubError, "slow down"),
        (503, HubError, "status 503"),
    ],
)
def test_failure_that_does_not_pass(fake: FakeHub, status: int, error: type[MoeinfError], said: str) -> None:
    fake.faults.statuses = [status] * 9
    with pytest.raises(error, match=said) as caught:
        hub.resolve(REPO)
    assert caught.value.hint
    assert len(fake.requests) == (3 if status in (429, 503) else 1)


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"Retry-After": "30"}, 30.0),
        ({"Retry-After": "9999"}, 300.0),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 1.0),
        ({"RateLimit": '"api";r=0;t=42'}, 42.0),
        ({"RateLimit": '"api";r=7;t=42'}, 1.0),
    ],
)
def test_waits_as_long_as_the_hub_asks(
    fake: FakeHub, waits: list[float], headers: dict[str, str], wait_s: float
) -> None:
    fake.faults.statuses, fake.faults.status_headers = [429], headers
    hub.resolve(REPO)
    assert waits == [wait_s]


def test_no_network(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = f"http://127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", closed)
    with pytest.raises(HubError, match=f"the hub at {closed} cannot be reached") as caught:
        hub.resolve(REPO)
    assert "HTTPS_PROXY" in str(caught.value.hint)


def test_hub_that_never_answers(fake: FakeHub, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(HubError, match="cannot be reached"):
            hub.resolve(REPO)
    assert len(waits) == 2
    assert time.monotonic() - start < 5


# How files arrive


@pytest.mark.parametrize("path", sorted(FILES))
def test_downloads(fake: FakeHub, place: Path, path: str) -> None:
    fetch(place, path)
    assert list(place.parent.iterdir()) == [place]


def test_downloads_an_empty_file(fake: FakeHub, folder: Path, place: Path) -> None:
    write(folder, {"merges.txt": b""})
    model = hub.resolve(REPO)
    assert hub.download(model, pick(model, "merges.txt"), place).read_bytes() == b""


def test_small_file_that_comes_compressed(fake: FakeHub, place: Path) -> None:
    fake.faults.compresses = True
    fetch(place, "config.json")


def test_downloads_in_several_threads(fake: FakeHub, tmp_path: Path) -> None:
    model = hub.resolve(REPO)
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda file: hub.download(model, file, tmp_path / "d" / file.path), model.files))
    assert {path.name: path.read_bytes() for path in done} == FILES


def test_token_goes_to_the_hub_and_not_to_the_cdn(fake: FakeHub, monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    fake.private, fake.tokens = {REPO}, {"hf_good"}
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    fetch(place)
    assert [seen.headers["authorization"] for seen in fake.seen("hub")] == ["Bearer hf_good"] * 2
    (seen,) = fake.seen("cdn")
    assert not [value for value in seen.headers.values() if "hf_good" in value]


@pytest.mark.parametrize("token", [None, "hf_good"])
def test_gated_repo(fake: FakeHub, monkeypatch: pytest.MonkeyPatch, place: Path, token: str | None) -> None:
    fake.gated, fake.tokens = {REPO}, {"hf_good"}
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    model = hub.resolve(REPO)
    with pytest.raises(HubError, match="org/model is gated") as caught:
        hub.download(model, pick(model, "config.json"), place)
    assert f"accept the terms at {fake.url}/org/model" in str(caught.value.hint)
    assert "hf auth login" in str(caught.value.hint)


def test_gated_repo_after_its_terms_were_accepted(fake: FakeHub, monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    fake.gated, fake.tokens, fake.accepted = {REPO}, {"hf_good"}, {"hf_good"}
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    fetch(place)


def test_goes_on_inside_a_file(fake: FakeHub, place: Path) -> None:
    prepare_part(place, WEIGHTS[:100_000])
    fetch(place)
    assert ranges(fake) == ["bytes=100000-"]
    assert fake.body_bytes[f"{REPO}/model.safetensors"] == len(WEIGHTS) - 100_000


@pytest.mark.parametrize("suffix", [".part", ""])
def test_asks_for_nothing_when_all_is_there(fake: FakeHub, place: Path, suffix: str) -> None:
    place.parent.mkdir()
    place.with_name(place.name + suffix).write_bytes(WEIGHTS)
    fetch(place)
    assert fake.seen("cdn") == []


@pytest.mark.parametrize("found", [b"x" * 100_000, WEIGHTS + b"x", b"x" * len(WEIGHTS)])
def test_part_file_of_something_else(fake: FakeHub, place: Path, found: bytes) -> None:
    prepare_part(place, found)
    fetch(place)
    assert ranges(fake)[-1] is None


def test_connection_cut_in_the_middle(fake: FakeHub, place: Path, waits: list[float]) -> None:
    fake.faults.cuts = [3 * CHUNK + 5]
    fetch(place)
    assert ranges(fake) == [None, f"bytes={3 * CHUNK}-"]
    assert waits == [1.0]


def test_patience_is_not_used_up_while_bytes_arrive(fake: FakeHub, place: Path, waits: list[float]) -> None:
    fake.faults.cuts = [CHUNK, 0, 0, CHUNK, 0, 0, 0, CHUNK]
    fetch(place)
    assert waits == [1.0, 2.0, 4.0, 1.0, 2.0, 4.0, 8.0, 1.0]


def test_connection_cut_again_and_again(fake: FakeHub, place: Path, waits: list[float]) -> None:
    fake.faults.cuts = [2 * CHUNK, *[0] * 9]
    model = hub.resolve(REPO)
    with pytest.raises(HubError, match="cannot be reached") as caught:
        hub.download(model, pick(model), place)
    assert "goes on where it stopped" in str(caught.value.hint)
    assert waits == [1.0, 2.0, 4.0, 8.0]
    assert part_of(place).read_bytes() == WEIGHTS[: 2 * CHUNK]
    fake.faults.cuts = []
    fetch(place)
    assert ranges(fake)[-1] == f"bytes={2 * CHUNK}-"


def test_connection_that_stalls(
    fake: FakeHub, place: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    fake.faults.stalls = [2 * CHUNK]
    start = time.monotonic()
    fetch(place)
    assert time.monotonic() - start < 5
    assert ranges(fake) == [None, f"bytes={2 * CHUNK}-"]
    assert waits == [1.0]


def test_answer_that_ends_early_as_if_that_were_all(fake: FakeHub, place: Path) -> None:
    fake.faults.short_ends = [2 * CHUNK, 10]
    fetch(place)
    assert ranges(fake) == [None, f"bytes={2 * CHUNK}-", f"bytes={2 * CHUNK + 10}-"]


def test_answer_that_ends_early_every_time(fake: FakeHub, place: Path) -> None:
    fake.faults.short_ends = [0] * 9
    model = hub.resolve(REPO)
    with pytest.raises(HubError, match=f"ended after 0 of the {len(WEIGHTS)} bytes"):
        hub.download(model, pick(model), place)


def test_answer_that_does_not_end(fake: FakeHub, place: Path) -> None:
    model = hub.resolve(REPO)
    fake.faults.wrong_length, fake.faults.short_ends, fake.faults.ignores_range = 1, [len(WEIGHTS) + 1] * 9, True
    with pytest.raises(HubError, match="sends more than"):
        hub.download(model, pick(model), place)


@pytest.mark.parametrize("fault", ["ignores_range", "refuses_range", "shifts_range"])
def test_server_without_ranges(fake: FakeHub, place: Path, fault: str) -> None:
    setattr(fake.faults, fault, True)
    fake.faults.cuts = [3 * CHUNK]
    fetch(place)
    assert fake.body_bytes[f"{REPO}/model.safetensors"] >= len(WEIGHTS) + 3 * CHUNK


def test_server_without_ranges_that_cuts_every_time(fake: FakeHub, place: Path, waits: list[float]) -> None:
    fake.faults.ignores_range, fake.faults.cuts = True, [3 * CHUNK, *[CHUNK] * 9]
    model = hub.resolve(REPO)
    with pytest.raises(HubError):
        hub.download(model, pick(model), place)
    assert waits == [1.0, 2.0, 4.0, 8.0]
    assert part_of(place).read_bytes() == WEIGHTS[:CHUNK]


@pytest.mark.parametrize("ignores_range", [False, True])
def test_answer_of_the_wrong_length_costs_no_bytes_that_are_here(
    fake: FakeHub, place: Path, ignores_range: bool
) -> None:
    fake.faults.wrong_length, fake.faults.ignores_range = 7, ignores_range
    prepare_part(place, WEIGHTS[:100_000])
    model = hub.resolve(REPO)
    with pytest.raises(
        HubError, match=f"it has {len(WEIGHTS) + 7} bytes for model.safetensors, not the {len(WEIGHTS)}"
    ):
        hub.download(model, pick(model), place)
    assert part_of(place).read_bytes() == WEIGHTS[:100_000]


def test_web_page_in_place_of_a_file_costs_no_bytes_that_are_here(fake: FakeHub, place: Path) -> None:
    fake.faults.pages = [b"<html>Sign in to this network</html>"] * 9
    prepare_part(place, WEIGHTS[:100_000])
    model = hub.resolve(REPO)
    with pytest.raises(HubError, match=r"it is a web page, not model\.safetensors"):
        hub.download(model, pick(model), place)
    assert part_of(place).read_bytes() == WEIGHTS[:100_000]


@pytest.mark.parametrize("path", ["config.json", "model.safetensors"])
def test_flipped_bit_is_fetched_again(fake: FakeHub, place: Path, path: str) -> None:
    fake.faults.flips = 1
    fetch(place, path)
    assert fake.body_bytes[f"{REPO}/{path}"] == 2 * len(FILES[path])


@pytest.mark.parametrize("path", ["config.json", "model.safetensors"])
def test_bit_that_is_flipped_every_time(fake: FakeHub, place: Path, path: str) -> None:
    fake.faults.flips = 2
    model = hub.resolve(REPO)
    with pytest.raises(IntegrityError, match=f"{path} of org/model arrived damaged, twice"):
        hub.download(model, pick(model, path), place)
    assert list(place.parent.iterdir()) == []
    fetch(place, path)


def test_repo_whose_commit_changes(fake: FakeHub, place: Path) -> None:
    fake.faults.other_commit = "f" * 40
    model = hub.resolve(REPO)
    with pytest.raises(HubError, match="changed at the hub during the download") as caught:
        hub.download(model, pick(model), place)
    assert "again" in str(caught.value.hint)


def test_file_whose_hash_changes(fake: FakeHub, place: Path) -> None:
    fake.faults.other_etag = "f" * 64
    prepare_part(place, WEIGHTS[:1000])
    model = hub.resolve(REPO)
    with pytest.raises(HubError, match=r"model\.safetensors of org/model changed at the hub"):
        hub.download(model, pick(model), place)
    assert part_of(place).read_bytes() == WEIGHTS[:1000]


def test_branch_that_moves_during_the_pull(fake: FakeHub, folder: Path, place: Path) -> None:
    model = hub.resolve(REPO)
    write(folder, {"config.json": b"{}"})
    with pytest.raises(ModelNotFoundError, match=f"org/model has no revision '{model.commit}'"):
        hub.download(model, pick(model), place)


def test_file_that_vanishes(fake: FakeHub, place: Path) -> None:
    model = hub.resolve(REPO)
    with pytest.raises(HubError, match="changed at the hub during the download: Entry not found"):
        hub.download(model, RemoteFile("vocab.txt", 1, None, "0" * 40), place)


def test_passing_failure_during_a_download(fake: FakeHub, place: Path, waits: list[float]) -> None:
    model = hub.resolve(REPO)
    fake.faults.statuses = [500, 503, 429, 504]
    assert hub.download(model, pick(model), place).read_bytes() == WEIGHTS
    assert waits == [1.0, 2.0, 4.0, 8.0]


def test_disk_that_fails_at_any_operation(fake: FakeHub, tmp_path: Path) -> None:
    model = hub.resolve(REPO)
    for number in range(1, 99):
        place = tmp_path / str(number) / "file"
        disk = FailingDisk(number, errno.ENOSPC)
        with suppress(CapacityError):
            hub.download(model, pick(model), place, disk=disk)
        if not disk.has_failed:
            break
        assert hub.download(model, pick(model), place).read_bytes() == WEIGHTS
    assert number > 8


def test_full_disk_keeps_what_it_has(fake: FakeHub, place: Path) -> None:
    model = hub.resolve(REPO)
    # the folder, the file, two pieces, and half of the third
    with pytest.raises(CapacityError, match="no room left") as caught:
        hub.download(model, pick(model), place, disk=FailingDisk(5, errno.ENOSPC))
    assert "free some space" in str(caught.value.hint)
    assert part_of(place).read_bytes() == WEIGHTS[: 5 * CHUNK // 2]
    fetch(place)
    assert ranges(fake)[-1] == f"bytes={5 * CHUNK // 2}-"


class RecordingDisk(FileSystem):
    """A disk that notes what makes bytes and names durable, and what depends on it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def sync(self, descriptor: int) -> None:
        self.calls.append("sync")

    def commit(self, descriptor: int) -> None:
        self.calls.append("commit")

    def rename(self, source: Path, target: Path) -> None:
        self.calls.append("rename")
        super().rename(source, target)

    def sync_folder(self, path: Path) -> None:
        self.calls.append("sync_folder")


def test_bytes_are_durable_before_the_name_is(fake: FakeHub, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_SYNC_BYTES", 2 * CHUNK)
    disk = RecordingDisk()
    model = hub.resolve(REPO)
    hub.download(model, pick(model), place, disk=disk)
    assert disk.calls == ["sync", "sync", "commit", "rename", "sync_folder"]


# In a process of its own

DOWNLOAD = """
import sys
from pathlib import Path
from moeinf import hub
model = hub.resolve("org/model")
file = next(file for file in model.files if file.path == "model.safetensors")
hub.download(model, file, Path(sys.argv[1]))
"""


def start(program: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith(("HF_", "HTTP"))}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What a process prints that ends well."""
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    return stdout


def test_killed_download_goes_on_where_it_stopped(fake: FakeHub, folder: Path, place: Path) -> None:
    weights = random.Random(1).randbytes(4 * MIB)
    write(folder, {"model.safetensors": weights})
    fake.faults.stalls = [3 * MIB + 100]
    process = start(DOWNLOAD, str(place), **fake.environment)
    deadline = time.monotonic() + 60
    while not (part_of(place).exists() and part_of(place).stat().st_size == 3 * MIB):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    fake.released.set()
    assert not place.exists()
    finish(start(DOWNLOAD, str(place), **fake.environment))
    assert place.read_bytes() == weights
    assert ranges(fake) == [None, f"bytes={3 * MIB}-"]
    assert fake.body_bytes[f"{REPO}/model.safetensors"] == len(weights) + 100


def test_settings_come_from_the_environment(fake: FakeHub, place: Path) -> None:
    fake.private, fake.tokens = {REPO}, {"hf_good"}
    finish(start(DOWNLOAD, str(place), **fake.environment, HF_TOKEN="hf_good"))
    assert place.read_bytes() == WEIGHTS
    assert {seen.headers["authorization"] for seen in fake.seen("hub")} == {"Bearer hf_good"}


def test_offline_setting_comes_from_the_environment(fake: FakeHub) -> None:
    program = "from moeinf import hub, errors\ntry: hub.resolve('org/model')\nexcept errors.HubError as e: print(e)"
    assert "HF_HUB_OFFLINE" in finish(start(program, **fake.environment, HF_HUB_OFFLINE="1"))
    assert fake.requests == []


def test_asks_through_a_proxy(fake: FakeHub) -> None:
    program = "from moeinf import hub; print(hub.resolve('org/model').commit)"
    environment = {**fake.environment, "NO_PROXY": "", "no_proxy": ""}
    environment |= {"HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": fake.url, "http_proxy": fake.url}
    assert finish(start(program, **environment)) == fake.commit(REPO) + "\n"
    assert fake.requests[0].path.startswith("http://hub.invalid/api/models/org/model")
