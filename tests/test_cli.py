"""The command line as transcripts: what is typed, all that comes back, and the exit code."""

from __future__ import annotations

import errno
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import moeinf
from cli_fakes import STATS, FakeEngine, make_byte_tokenizer, store_model
from cli_terminal import CTRL_C, CTRL_D, Terminal
from cli_transcripts import CommandLine
from families import make_checkpoint
from faults import FailingDisk
from moeinf.chat import complete
from moeinf.cli.output import INTERRUPTED
from moeinf.cli.reading import _open_history
from moeinf.errors import CapacityError, HubError, IntegrityError, MoeinfError, UnsupportedError, UsageError
from moeinf.manifest import Source, expert_path
from moeinf.origins import Download
from moeinf.pull import PullPlan
from moeinf.settings import EngineOptions
from moeinf.store import Store
from moeinf.trace import Trace
from moeinf.tracefile import write_trace
from moeinf.units import format_bytes
from packing import pack_mxfp4
from test_simulate import make_trace

SOURCE = Path(__file__).parents[1] / "src"


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    return CommandLine(tmp_path / "home", monkeypatch)


@pytest.fixture
def stored(cli: CommandLine) -> CommandLine:
    """A command line whose store has a model."""
    store_model(cli.home)
    return cli


@pytest.fixture
def engine(stored: CommandLine, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """What the stored model is loaded as."""
    fake = FakeEngine()
    monkeypatch.setitem(vars(moeinf), "load", lambda name, **options: fake)
    return fake


def damage(home: Path) -> None:
    (home / "models/tiny" / expert_path(0, 1)).write_bytes(b"")
    (home / "models/tiny/config.json").write_bytes(b"[]")


# What is there


def test_list_of_nothing(cli: CommandLine) -> None:
    cli.check("""
        $ moeinf list
        ! no models here yet; moeinf pull SOURCE brings one, and moeinf chat demo needs none
        = 0
    """)


def test_list(stored: CommandLine) -> None:
    store_model(stored.home, "other", "/home/me/other")
    stored.check("""
        $ moeinf list
        | NAME   ARCHITECTURE     EXPERTS         PRECISION  SIZE      SOURCE
        | other  TinyForCausalLM  2 x 2/3, top 2  float32    21.7 KiB  /home/me/other
        | tiny   TinyForCausalLM  2 x 2/3, top 2  float32    21.7 KiB  org/tiny
        = 0
    """)


def test_list_of_names(stored: CommandLine) -> None:
    stored.check("""
        $ moeinf list -q
        | tiny
        = 0
    """)


def test_list_as_json(stored: CommandLine) -> None:
    stdout, stderr, code = stored.run("list", "--json")
    assert (stderr, code) == ("", 0)
    assert json.loads(stdout) == {
        "schema": 1,
        "models": [
            {
                "name": "tiny",
                "architecture": "TinyForCausalLM",
                "model_type": "tiny",
                "layers": 2,
                "experts": 5,
                "token_experts": 4,
                "dtype": "float32",
                "precision": "float32",
                "stored_bytes": Store(stored.home).open("tiny").manifest.stored_bytes,
                "source": {"repo": "org/tiny", "commit": "c" * 40},
            }
        ],
        "unfinished": [],
    }


def test_list_shows_what_is_damaged_or_unfinished(stored: CommandLine) -> None:
    (stored.home / "models/tiny/moeinf.json").write_text("{")
    with Store(stored.home).incoming("half") as incoming:
        incoming.begin({"source": "org/half"})
    with pytest.raises(IntegrityError) as caught:
        Store(stored.home).open("tiny")
    stored.check(f"""
        $ moeinf list
        ! warning: {caught.value} ({caught.value.hint})
        ! half is only partly here: run the command that makes it again to go on, or `moeinf rm half`
        = 0
    """)


def test_show(stored: CommandLine) -> None:
    stored.check("""
        $ moeinf show org/tiny
        | name           tiny
        | source         org/tiny, commit cccccccccccccccccccccccccccccccccccccccc
        | architecture   TinyForCausalLM (tiny)
        | precision      float32, computed in float32
        | experts        5 (2 x 2/3, top 2)
        | context        up to 128 tokens
        | on disk        21.7 KiB in 7 files at HOME/models/tiny
        |   dense        440 B
        |   experts      1.25 KiB, 256 B each
        | KV cache       15.6 KiB per 1,000 tokens
        | a token reads  4 experts, 1.00 KiB, 80% of them all
        = 0
    """)


def test_show_as_json(stored: CommandLine) -> None:
    stdout, stderr, code = stored.run("show", "tiny", "--json")
    assert (stderr, code) == ("", 0)
    shown = json.loads(stdout)
    assert shown["schema"] == 1
    assert shown["path"] == "HOME/models/tiny"
    assert {key: shown[key] for key in ("dense_bytes", "experts_bytes", "expert_bytes", "token_bytes")} == {
        "dense_bytes": 440,
        "experts_bytes": 5 * 256,
        "expert_bytes": 256,
        "token_bytes": 4 * 256,
    }


def test_a_model_that_is_not_here(stored: CommandLine) -> None:
    stored.check("""
        $ moeinf show mixtral
        ! error: mixtral is not pulled
        ! hint: moeinf pull mixtral
        = 3
    """)


# Pull


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as the hub would have it, in a folder."""
    folder = tmp_path_factory.mktemp("hub") / "mix"
    make_checkpoint("mixtral", folder)
    return folder


def test_pull(cli: CommandLine, checkpoint: Path) -> None:
    first = cli.run("pull", str(checkpoint), "--name", "mine")
    size = format_bytes(Store(cli.home).open("mine").manifest.stored_bytes)
    assert first == (f"mine: MixtralForCausalLM, 2 x 8, top 2, {size}\n", "shard: 165 KiB\n", 0)
    cli.check(f"""
        $ moeinf pull {checkpoint} --name mine
        | mine: MixtralForCausalLM, 2 x 8, top 2, {size}
        ! mine is here already, from {checkpoint}
        = 0
    """)


def test_pull_quietly_and_as_json(cli: CommandLine, checkpoint: Path) -> None:
    assert cli.run("pull", str(checkpoint), "-q") == ("mix\n", "", 0)
    pulled, stderr, code = cli.run("pull", str(checkpoint), "--force", "--json")
    assert (json.loads(pulled), code) == (json.loads(cli.run("show", "mix", "--json")[0]), 0)
    assert stderr.startswith("shard: ")


@pytest.mark.parametrize(
    ("is_fast", "precision"), [(True, "bfloat16, packed without loss"), (False, "bfloat16")], ids=["fast", "slow"]
)
def test_pull_packs_unasked_where_that_is_computed_from(
    is_fast: bool, precision: str, cli: CommandLine, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeinf.kernels.computes_from_packed", lambda: is_fast)
    planned = json.loads(cli.run("pull", str(checkpoint), "--dry-run", "--json")[0])
    pulled = json.loads(cli.run("pull", str(checkpoint), "--json")[0])
    assert planned["precision"] == pulled["precision"] == precision


def test_pull_dry_run(cli: CommandLine, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    cli.check(f"""
        $ moeinf pull {checkpoint} --dry-run
        | name          mix
        | source        {checkpoint}
        | architecture  MixtralForCausalLM
        | precision     bfloat16
        | download      nothing
        | store         165 KiB
        | disk needed   165 KiB of 954 MiB free
        = 0
    """)
    stdout, stderr, code = cli.run("pull", str(checkpoint), "--dry-run", "--json")
    assert (stderr, code) == ("", 0)
    assert json.loads(stdout)["needed_bytes"] == json.loads(stdout)["store_bytes"]
    assert cli.run("list", "-q") == ("", "", 0)


def test_pull_dry_run_of_what_does_not_fit(cli: CommandLine, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    stdout, stderr, code = cli.run("pull", str(checkpoint), "--dry-run", "--json")
    assert json.loads(stdout)["has_room"] is False
    assert stderr.startswith("error: mix does not fit\nhint: free ")
    assert code == 5


def test_pull_dry_run_from_the_hub(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    files = (Download("model-1.safetensors", 3000), Download("model-2.safetensors", 500))
    plan = PullPlan("big", Source("org/big", "c" * 40), False, files, 4000, 7500, 10_000, is_estimate=True)
    monkeypatch.setattr("moeinf.cli.models.plan_pull", lambda source, **_: plan if source == "org/big" else None)
    cli.check("""
        $ moeinf pull org/big --dry-run
        | name                   big
        | source                 org/big
        | download               3.42 KiB in 2 files
        |   model-1.safetensors  2.93 KiB
        |   model-2.safetensors  500 B
        | store                  about 3.91 KiB
        | disk needed            about 7.32 KiB of 9.77 KiB free
        = 0
    """)


def test_pull_of_nothing(cli: CommandLine) -> None:
    cli.check("""
        $ moeinf pull mixtrall
        ! error: 'mixtrall' is no alias, no hub id and no folder
        ! hint: did you mean mixtral?
        = 3
    """)


# Quantize, quality


def test_quantize_run_and_show(cli: CommandLine, checkpoint: Path) -> None:
    cli.run("pull", str(checkpoint))
    cli.check("""
        $ moeinf quantize mix --experts int4 --name small
        | small: int4 experts (groups of 16), from bfloat16, 1.44 KiB each instead of 4.50 KiB
        ! look at dense weights: 9 matrices
        ! quantize: 16 experts
        ! what that costs in quality: moeinf quality small --against mix
        = 0
    """)
    shown = cli.run("show", "small")[0]
    assert "\nprecision      int4 experts (groups of 16), from bfloat16, computed in bfloat16\n" in shown
    assert "\nquality        not measured: moeinf quality small --against MODEL\n" in shown
    assert ["dense" in line for line in shown.splitlines() if line.endswith(", packed without loss")] == [True]
    assert "packed without loss" not in cli.run("show", "mix")[0]
    stderr = cli.run("run", "small", "Hi", "--stats", "--max-tokens", "4")[1]
    assert "small has int4 experts (groups of 16): it does not answer exactly as released\n" in stderr
    assert "\nint4 experts (groups of 16), computed by " in stderr
    assert stderr.endswith("quality not measured (moeinf quality)\n")


@pytest.mark.filterwarnings("ignore")  # transformers on the rotary embedding of a context as short as this
def test_experts_as_released_are_named_and_are_no_lesser_model(cli: CommandLine, tmp_path: Path) -> None:
    make_checkpoint("gpt_oss", tmp_path / "oss")
    pack_mxfp4(tmp_path / "oss")
    cli.run("pull", str(tmp_path / "oss"))
    shown = cli.run("show", "oss")[0]
    assert "\nprecision      mxfp4 experts (as released), computed in bfloat16\n" in shown
    assert "quality" not in shown
    stderr = cli.run("run", "oss", "Hi", "--stats", "--max-tokens", "4")[1]
    assert "does not answer exactly" not in stderr
    assert "quality" not in stderr
    assert "\nmxfp4 experts (as released), computed by " in stderr


def test_quality_is_kept_and_shown(cli: CommandLine, checkpoint: Path) -> None:
    cli.run("pull", str(checkpoint))
    cli.run("quantize", "mix", "--experts", "int8", "--name", "small")
    options = ["--max-prompts", "2", "--max-tokens", "8"]
    stdout, stderr, code = cli.run("quality", "small", "--against", "mix", "--json", *options)
    found = json.loads(stdout)
    assert (code, found["model"], found["against"], found["tokens"]) == (0, "small", "mix", 14)
    assert "mix: 2 prompts" in stderr
    shown = json.loads(cli.run("show", "small", "--json")[0])["quality"]
    assert shown == {key: found[key] for key in shown}
    line = f"{found['agreement']:.1%} of likeliest tokens are those of mix"
    assert line in cli.run("show", "small")[0]
    ran = cli.run("run", "small", "Hi", "--stats", "--max-tokens", "2")[1]
    assert ran.splitlines()[-1].startswith(line)


def test_a_calibrated_model_says_so(cli: CommandLine, checkpoint: Path, tmp_path: Path) -> None:
    cli.run("pull", str(checkpoint))
    texts = tmp_path / "texts.txt"
    texts.write_text("Once upon a time.\n\nThere was a model.\n\nIt had experts.\n")
    for most, tokens in ((None, 50), (2, 35)):
        options = ["--calibrate", str(texts), *(["--max-prompts", f"{most}"] if most else [])]
        stdout, stderr, code = cli.run("quantize", "mix", "--experts", "int4", "--name", f"small-{tokens}", *options)
        assert code == 0, stderr
        assert f"calibrated on {tokens} tokens of texts-" in stdout
        assert f"calibrating on {tokens} tokens of texts-" in stderr
        assert f"read: {most or 3} prompts" in stderr
    assert ", from bfloat16, calibrated on 50 tokens of texts-" in cli.run("show", "small-50")[0]
    found = cli.run("quality", "small-50", "--against", "mix", "--dtype", "float32", "--max-prompts", "2")[0]
    assert ", calibrated on 50 tokens of texts-" in found
    assert " of 2 texts, in float32\n" in found
    assert " tokens of default-held-out in float32\n" in cli.run("show", "small-50")[0]
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    stdout, stderr, code = cli.run("quantize", "mix", "--experts", "int4", "--name", "none", "--calibrate", str(empty))
    assert (stdout, code) == ("", 4)
    assert "empty.txt holds no prompts" in stderr


def test_what_quantize_and_quality_refuse(cli: CommandLine, checkpoint: Path) -> None:
    cli.run("pull", str(checkpoint))
    cli.check("""
        $ moeinf quantize mix --experts int3 --name small
        ! error: --experts int3 is not known
        ! hint: choose one of: lossless, int8, int4
        = 2
    """)
    cli.check("""
        $ moeinf quantize mix --experts int4 --name mix
        ! error: mix is the model itself
        ! hint: choose another --name, like mix-int4
        = 2
    """)
    cli.check("""
        $ moeinf quantize mix --experts int4 --name small --max-prompts 3
        ! error: --max-prompts says how many texts to calibrate with
        ! hint: add --calibrate, or leave it out
        = 2
    """)
    cli.check("""
        $ moeinf quantize mix --experts lossless --name small --calibrate default --max-prompts 3
        ! error: lossless experts lose nothing that a calibration could save
        ! hint: leave --calibrate out
        = 2
    """)
    cli.check("""
        $ moeinf quality mix --against mix
        ! error: mix cannot be compared with itself
        ! hint: name the model that it was made of
        = 2
    """)


def test_verify_of_quantised_experts_says_how_to_have_them_again(cli: CommandLine, checkpoint: Path) -> None:
    cli.run("pull", str(checkpoint), "--experts", "int4")
    (cli.home / "models/mix-int4" / expert_path(0, 1)).write_bytes(b"")
    hint = f"hint: moeinf pull {checkpoint} --name mix-int4 --experts int4 --force"
    assert cli.run("verify", "mix-int4")[1].splitlines()[-1] == hint


# Rm, verify


def test_rm_without_a_terminal_does_not_guess(stored: CommandLine) -> None:
    stored.check("""
        $ moeinf rm tiny
        ! error: not a terminal, so nobody can answer: remove tiny?
        ! hint: moeinf rm -y tiny
        = 2
    """)
    assert Store(stored.home).names() == ["tiny"]


def test_rm(stored: CommandLine) -> None:
    store_model(stored.home, "other")
    stored.check("""
        $ moeinf rm tiny other tiny -y
        | removed tiny
        | removed other
        = 0
    """)
    assert Store(stored.home).names() == []


def test_rm_says_what_is_gone_when_it_cannot_go_on(stored: CommandLine) -> None:
    store_model(stored.home, "other")
    with Store(stored.home).hold("other"):
        stored.check("""
            $ moeinf rm tiny other -y
            ! removed tiny, and nothing else
            ! error: other is busy: this process is using it
            ! hint: try again when it is done, or end it
            = 1
        """)
    assert Store(stored.home).names() == ["other"]


def test_rm_as_json(stored: CommandLine) -> None:
    stored.check("""
        $ moeinf rm -y --json org/tiny
        | {"schema": 1, "removed": ["tiny"]}
        = 0
    """)


def test_rm_removes_nothing_when_one_name_is_wrong(stored: CommandLine) -> None:
    stored.check("""
        $ moeinf rm -y tiny tinny
        ! error: no model is called 'tinny'
        ! hint: did you mean tiny?
        = 3
    """)
    assert Store(stored.home).names() == ["tiny"]


def test_rm_of_damaged_and_unfinished_models(stored: CommandLine) -> None:
    (stored.home / "models/tiny/moeinf.json").write_text("{")
    with Store(stored.home).incoming("half") as incoming:
        incoming.begin({"source": "org/half"})
    stored.check("""
        $ moeinf rm -y tiny half
        | removed tiny
        | removed half
        = 0
    """)


def test_verify(stored: CommandLine) -> None:
    stored.check("""
        $ moeinf verify tiny
        | tiny: 7 files, 21.7 KiB, all as they were written
        ! verify tiny: 21.7 KiB
        = 0
    """)


def test_verify_of_a_damaged_model(stored: CommandLine) -> None:
    damage(stored.home)
    stored.check("""
        $ moeinf verify tiny
        | config.json: has other bytes than were written
        | experts/L000/E001.safetensors: 0 B (0 bytes) instead of 4352 bytes
        ! verify tiny: 21.7 KiB
        ! error: tiny: 2 files are not as written
        ! hint: moeinf pull org/tiny --name tiny --force
        = 4
    """)
    stdout, _, code = stored.run("verify", "--json", "tiny")
    assert code == 4
    assert json.loads(stdout) == {
        "schema": 1,
        "model": "tiny",
        "ok": False,
        "problems": [
            {"path": "config.json", "what": "has other bytes than were written"},
            {"path": "experts/L000/E001.safetensors", "what": "0 B (0 bytes) instead of 4352 bytes"},
        ],
    }


def test_verify_of_a_damaged_model_that_a_pull_could_not_make(stored: CommandLine) -> None:
    damage(stored.home)
    path = stored.home / "models/tiny/moeinf.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "precision": "int4 experts, calibrated on 9 tokens of texts"}))
    hint = stored.run("verify", "tiny")[1].splitlines()[-1]
    assert hint == "hint: moeinf quantize org/tiny --name tiny --calibrate DATASET --force"


# Run


def test_run(engine: FakeEngine, stored: CommandLine) -> None:
    stored.check("""
        $ moeinf run tiny "How are you?"
        | Hello.
        ! loading tiny
        = 0
    """)
    assert engine.prompts == ["<user>How are you?<end><assistant>"]
    assert engine.is_closed


def test_run_puts_standard_input_after_the_prompt(engine: FakeEngine, stored: CommandLine) -> None:
    stored.check("""
        $ moeinf run -q tiny Sum:
        < one
        < two
        | Hello.
        = 0
    """)
    stored.check("""
        $ moeinf run -q tiny
        < only this
        | Hello.
        = 0
    """)
    assert engine.prompts == ["<user>Sum:\none\ntwo<end><assistant>", "<user>only this<end><assistant>"]


def test_run_keeps_the_answer_as_it_is(engine: FakeEngine, stored: CommandLine) -> None:
    engine.replies = ["# Grüße\n\n* [bold] \x1b[31m **你好**\n"]
    assert stored.run("run", "-q", "tiny", "Hi") == (engine.replies[0], "", 0)


def test_run_passes_options_on(stored: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    seen: dict[str, object] = {}

    def load(name: str, **options: object) -> FakeEngine:
        seen.update(options, name=name)
        return engine

    monkeypatch.setitem(vars(moeinf), "load", load)
    monkeypatch.setenv("MOEINF_THREADS", "3")
    (stored.home / "config.toml").write_text('threads = 5\nhost-memory = "1GiB"\ncontext = 7\n')
    line = "run -q org/tiny Hi --experts 25% --context 99 --system Brief. --max-tokens 3 --temperature 0.5 --top-p 0.9"
    stdout, stderr, code = stored.run(*line.split(), "--top-k", "4", "--seed", "1")
    assert (stdout, stderr, code) == ("Hel\n", "", 0)
    assert seen == {
        "name": "tiny",
        "device": "auto",
        "device_memory": None,
        "host_memory": "1GiB",
        "experts": "25%",
        "context": 99,
        "policy": "neighbour-use",
        "prefetch": "auto",
        "miss": "fetch",
        "kernels": "auto",
        "compile": "auto",
        "threads": 3,
    }
    assert engine.samplings == [moeinf.Sampling(max_tokens=3, temperature=0.5, top_p=0.9, top_k=4, seed=1)]
    assert engine.prompts == ["<system>Brief.<end><user>Hi<end><assistant>"]


def test_run_raw(engine: FakeEngine, stored: CommandLine) -> None:
    stored.check("""
        $ moeinf run tiny --raw "Once upon"
        | Hello.
        ! loading tiny
        = 0
    """)
    assert engine.prompts == ["Once upon"]
    stored.check("""
        $ moeinf run tiny --raw --system Be. "Once upon"
        ! error: --raw goes without a system prompt
        ! hint: leave out --raw or --system
        = 2
    """)


def test_run_of_a_model_without_template(engine: FakeEngine, stored: CommandLine) -> None:
    engine.tokenizer = make_byte_tokenizer(None)
    stored.check("""
        $ moeinf run tiny "Once upon"
        | Hello.
        ! loading tiny
        ! tiny has no chat template: it continues the prompt as it stands
        = 0
    """)
    assert engine.prompts == ["Once upon"]


def test_run_as_json(engine: FakeEngine, stored: CommandLine) -> None:
    stdout, stderr, code = stored.run("run", "tiny", "Hi", "--json")
    assert (stderr, code, stdout.count("\n")) == ("loading tiny\n", 0, 1)
    assert json.loads(stdout) == {
        "schema": 1,
        "model": "tiny",
        "prompt_tokens": len(engine.tokenizer.encode(engine.prompts[0])),
        "tokens": [*engine.tokenizer.encode("Hello."), engine.tokenizer.eos_token_id],
        "text": "Hello.",
        "finish_reason": "stop",
        "stats": STATS.to_dict(),
    }


def test_run_with_stats(engine: FakeEngine, stored: CommandLine) -> None:
    stored.check("""
        $ moeinf run tiny Hi --stats
        | Hello.
        ! loading tiny
        ! time to first token 250 ms · prompt 48.0 tokens/s · answer 8.0 tokens/s
        ! expert hit rate 62.5% of 24 in 3 host slots · disk to host 3.75 KiB · host to device 0 B · stalled 500 ms
        = 0
    """)
    stored.check("""
        $ moeinf run -q tiny Hi --stats
        | Hello.
        ! time to first token 250 ms · prompt 48.0 tokens/s · answer 8.0 tokens/s
        ! expert hit rate 62.5% of 24 in 3 host slots · disk to host 3.75 KiB · host to device 0 B · stalled 500 ms
        = 0
    """)


def test_an_answer_is_out_before_the_engine_closes(
    engine: FakeEngine, stored: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeEngine, "__exit__", interrupt)
    output, _, code = stored.run("run", "tiny", "Hi", "--json")
    assert (json.loads(output)["text"], code) == ("Hello.", 130)


def test_a_history_that_cannot_be_kept_stops_no_chat(tmp_path: Path) -> None:
    history = _open_history(tmp_path / "history/chat")
    shutil.rmtree(tmp_path / "history")
    history.append_string("what was typed")
    assert history.get_strings() == ["what was typed"]


def test_run_says_why_an_answer_was_cut(engine: FakeEngine, stored: CommandLine) -> None:
    stored.check("""
        $ moeinf run tiny Hi --max-tokens 4
        | Hell
        ! loading tiny
        ! the answer was cut at 4 tokens; --max-tokens sets that
        = 0
    """)
    engine.replies = ["o" * 500]
    stored.check(f"""
        $ moeinf run tiny Hi
        | {"o" * 195}
        ! loading tiny
        ! the answer was cut where the context of 200 tokens was full; --context sets that
        = 0
    """)
    engine.manifest.max_context = 200
    stored.check(f"""
        $ moeinf run tiny Hi
        | {"o" * 195}
        ! loading tiny
        ! the answer was cut where the context of 200 tokens was full; the model was made for no more
        = 0
    """)


def test_run_warns_of_too_few_slots(engine: FakeEngine, stored: CommandLine) -> None:
    engine.plan = FakeEngine(slots=3).plan
    stored.check("""
        $ moeinf run tiny Hi
        | Hello.
        ! loading tiny
        ! warning: 3 experts fit and one token asks for 4: hardly any is found in memory (--experts 4 would help)
        = 0
    """)


def interrupt_at(*steps: int) -> Callable[[int], None]:
    return lambda step: signal.raise_signal(signal.SIGINT) if step in steps else None


def test_an_interrupted_run_keeps_what_was_said(engine: FakeEngine, stored: CommandLine) -> None:
    engine.on_step = interrupt_at(3)
    stored.check("""
        $ moeinf run tiny Hi
        | Hel
        ! loading tiny
        = 130
    """)
    stdout, _, code = stored.run("run", "tiny", "Hi", "--json")
    assert code == 130
    assert {key: json.loads(stdout)[key] for key in ("text", "finish_reason")} == {
        "text": "Hel",
        "finish_reason": "interrupted",
    }


def test_two_interrupts_end_a_run_that_does_not_stop(engine: FakeEngine, stored: CommandLine) -> None:
    def press_twice(step: int) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    engine.on_step = press_twice
    stored.check("""
        $ moeinf run tiny Hi
        | Hel
        ! loading tiny
        = 130
    """)
    assert engine.is_closed


def test_a_run_that_was_started_to_ignore_interrupts_does(engine: FakeEngine, stored: CommandLine) -> None:
    engine.on_step = interrupt_at(3)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert stored.run("run", "-q", "tiny", "Hi") == ("Hello.\n", "", 0)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("end", ["return 3", "raise SystemExit(3)"])
def test_pythons_collector_leaves_what_libraries_made_alone(end: str) -> None:
    code = f"""
import gc
from moeinf import __main__, cli
def run():
    print(gc.get_threshold()[0] >= 100_000, gc.isenabled(), gc.get_freeze_count())
    {end}
cli.main = run
try:
    code = __main__.main()
except SystemExit as left:
    code = left.code
print(code, gc.get_freeze_count() > 1_000)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == ["True True 0", "3 True"]


def test_a_terminated_run_leaves_with_143(engine: FakeEngine, stored: CommandLine) -> None:
    engine.on_step = lambda step: signal.raise_signal(signal.SIGTERM) if step == 3 else None
    stored.check("""
        $ moeinf run tiny Hi
        | Hel
        ! loading tiny
        = 143
    """)
    assert engine.is_closed


def test_a_real_model_from_its_checkpoint_to_its_answer(cli: CommandLine, checkpoint: Path) -> None:
    assert cli.run("pull", str(checkpoint), "-q") == ("mix\n", "", 0)
    with moeinf.load("mix") as engine:
        expected = complete(engine, "hello", moeinf.Sampling(max_tokens=12, temperature=0))
    line = ["run", str(checkpoint), "hello", "--raw", "--temperature", "0", "--max-tokens", "12"]
    for slots in ("100%", "2"):
        stdout, _, code = cli.run(*line, "--json", "--experts", slots)
        said = json.loads(stdout)
        assert (said["model"], said["text"], code) == ("mix", expected.text, 0)
        assert said["tokens"] == list(expected.completion.tokens)
    stdout, stderr, code = cli.run(*line, "-q")
    assert (stdout.removesuffix("\n"), stderr, code) == (expected.text.removesuffix("\n"), "", 0)


# Chat


def test_chat(engine: FakeEngine, stored: CommandLine) -> None:
    engine.replies = ["One.", "Two.\n"]
    stored.check("""
        $ moeinf chat tiny
        < first
        <
        < second
        | One.
        | Two.
        ! loading tiny
        = 0
    """)
    assert engine.prompts[1] == "<user>first<end><assistant>One.<end><user>second<end><assistant>"


def test_chat_message_of_several_lines(engine: FakeEngine, stored: CommandLine) -> None:
    stored.check('''
        $ moeinf chat -q tiny
        < """one
        < /two
        <
        <   three"""
        < """
        < four
        < """
        < """/five"""
        < """"""
        < """six
        | Hello.
        | Hello.
        | Hello.
        ! warning: the last message was not closed with """ and was not sent
        = 0
    ''')
    users = [prompt.split("<user>")[-1].removesuffix("<end><assistant>") for prompt in engine.prompts]
    assert users == ["one\n/two\n\n  three", "four", "/five"]


def test_chat_commands(engine: FakeEngine, stored: CommandLine) -> None:
    stored.check("""
        $ moeinf chat tiny --temperature 0
        < /system Be brief.
        < /set temperature 0.7
        < /set max_tokens 3
        < /set seed default
        < Hi
        < /show
        < /stats
        < /set stats
        < /retry
        < /set stats off
        < /system
        < /clear
        < /show
        < /bye
        < never read
        | Hel
        | Hel
        ! loading tiny
        ! system prompt set
        ! temperature 0.7
        ! max_tokens 3
        ! seed default
        ! the answer was cut at 3 tokens; /set max_tokens sets that
        ! model     tiny
        ! system    Be brief.
        ! settings  max_tokens 3, temperature 0.7, top_p default, top_k default, seed default
        ! messages  2, 19 of 200 tokens
        ! time to first token 250 ms · prompt 48.0 tokens/s · answer 8.0 tokens/s
        ! expert hit rate 62.5% of 24 in 3 host slots · disk to host 3.75 KiB · host to device 0 B · stalled 500 ms
        ! stats on
        ! the answer was cut at 3 tokens; /set max_tokens sets that
        ! time to first token 250 ms · prompt 48.0 tokens/s · answer 8.0 tokens/s
        ! expert hit rate 62.5% of 24 in 3 host slots · disk to host 3.75 KiB · host to device 0 B · stalled 500 ms
        ! stats off
        ! no system prompt
        ! forgot what was said
        ! model     tiny
        ! system    none
        ! settings  max_tokens 3, temperature 0.7, top_p default, top_k default, seed default
        ! messages  0, 0 of 200 tokens
        = 0
    """)
    assert engine.samplings == [moeinf.Sampling(max_tokens=3, temperature=0.7)] * 2


def test_chat_help(engine: FakeEngine, stored: CommandLine) -> None:
    stored.check('''
        $ moeinf chat tiny
        < /help
        ! loading tiny
        ! /help            this list
        ! /clear           forget what was said
        ! /system [TEXT]   set the system prompt, or have none
        ! /set NAME VALUE  temperature, top_p, top_k, seed, max_tokens (or default); stats on, stats off
        ! /show            the model, the settings, and how full the context is
        ! /stats           what the last answer cost
        ! /save NAME       keep this chat under a name
        ! /load NAME       go on with a kept chat
        ! /retry           answer the last message again
        ! /bye             leave
        ! """              begins and ends a message of several lines
        = 0
    ''')


def test_chat_is_saved_and_loaded(engine: FakeEngine, stored: CommandLine) -> None:
    stored.check("""
        $ moeinf chat tiny --system Brief.
        < Hi
        < /save talk
        | Hello.
        ! loading tiny
        ! saved HOME/chats/talk.json
        = 0
    """)
    stored.check("""
        $ moeinf chat tiny
        < /load talk
        < /show
        < More
        | Hello.
        ! loading tiny
        ! loaded talk: 2 messages
        ! model     tiny
        ! system    Brief.
        ! settings  max_tokens default, temperature default, top_p default, top_k default, seed default
        ! messages  2, 21 of 200 tokens
        = 0
    """)
    assert engine.prompts[-1] == "<system>Brief.<end><user>Hi<end><assistant>Hello.<end><user>More<end><assistant>"


def test_a_chat_from_a_file_ends_at_the_first_mistake(engine: FakeEngine, stored: CommandLine) -> None:
    stored.check("""
        $ moeinf chat tiny
        < Hi
        < /hepl
        < never sent
        | Hello.
        ! loading tiny
        ! error: /hepl is no command
        ! hint: /help lists them; a message that starts with / goes in \"\"\"
        = 2
    """)
    assert len(engine.prompts) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set", "error: what is to be set?\nhint: /set knows temperature, top_p, top_k, seed, max_tokens, stats"),
        (
            "/set heat 3",
            "error: 'heat' cannot be set\nhint: /set knows temperature, top_p, top_k, seed, max_tokens, stats",
        ),
        ("/set temperature", "error: temperature must be a number or default, not ''"),
        ("/set temperature hot", "error: temperature must be a number or default, not 'hot'"),
        ("/set temperature -1", "error: temperature must be from 0 to 1000, not -1.0"),
        ("/set temperature nan", "error: temperature must be from 0 to 1000, not nan"),
        ("/set seed 99999999999999999999", f"error: seed must be from 0 to {2**63 - 1}, not 99999999999999999999"),
        ("/set top_p 2", "error: top p must be from 0 to 1, not 2.0"),
        ("/set top_k 1.5", "error: top_k must be a whole number or default, not '1.5'"),
        ("/set max_tokens 0", "error: max tokens must be 1 or more, not 0"),
        ("/set stats maybe", "error: stats are on or off, not 'maybe'"),
        ("/stats", "error: there is no answer yet"),
        ("/retry", "error: there is no answer to try again"),
        (
            "/save ../x",
            "error: '../x' cannot name a chat\nhint: use letters, digits, '-', '_' and '.', 200 bytes of them at most",
        ),
        ("/load x", "error: no chat is saved as 'x'\nhint: saved chats: none"),
    ],
)
def test_chat_commands_check_what_they_are_given(
    engine: FakeEngine, stored: CommandLine, line: str, message: str
) -> None:
    assert stored.run("chat", "-q", "tiny", given=f"{line}\n".encode()) == ("", f"{message}\n", 2)


def test_an_interrupted_answer_is_kept_and_the_chat_goes_on(engine: FakeEngine, stored: CommandLine) -> None:
    engine.on_step = lambda step: interrupt_at(3)(step) if len(engine.prompts) == 1 else None
    stored.check("""
        $ moeinf chat tiny
        < first
        < second
        | Hel
        | Hello.
        ! loading tiny
        ! stopped; what was said is kept, /retry asks again
        = 0
    """)
    assert engine.prompts[1] == "<user>first<end><assistant>Hel<end><user>second<end><assistant>"


def test_two_interrupts_within_a_second_end_a_chat(engine: FakeEngine, stored: CommandLine) -> None:
    engine.on_step = interrupt_at(3)
    stored.check("""
        $ moeinf chat tiny
        < first
        < second
        < never sent
        | Hel
        | Hel
        ! loading tiny
        ! stopped; what was said is kept, /retry asks again
        = 130
    """)


# Trace and simulate


def traced(engine: FakeEngine, home: Path, patch: pytest.MonkeyPatch) -> Path:
    """Let `moeinf trace tiny` find a trace of two requests that ask for the same experts again and again; its place."""
    rows = [[[0, 1], [2, 3]], [[0, 2], [2, 3]]] * 6
    found = make_trace(rows, [True] + [False] * 5 + [True] + [False] * 5, [0] * 6 + [1] * 6)
    vars(engine)["manifest"] = Store(home).open("tiny").manifest

    def collect(_engine: object, _name: str, _prompts: object, path: Path, **_: object) -> Trace:
        write_trace(found, path)
        return found

    patch.setattr("moeinf.calibration.collect", collect)
    (home / "set.jsonl").write_text(
        '{"text": "One", "domain": "prose"}\n{"text": "1", "domain": "sums"}\n', encoding="utf-8"
    )
    return home / "models/tiny/traces/set-e1a9cc9e-2x64"


def test_what_the_engine_has_to_say_is_said(stored: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(notes=("the collection is damaged",), save_error=CapacityError("no room left"))
    monkeypatch.setitem(vars(moeinf), "load", lambda *_, **__: engine)
    stored.check("""
        $ moeinf run tiny Hi
        | Hello.
        ! loading tiny
        ! warning: the collection is damaged
        ! warning: what was learned about tiny is not saved: no room left
        = 0
    """)


def test_trace(engine: FakeEngine, stored: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    traced(engine, stored.home, monkeypatch)
    monkeypatch.chdir(stored.home)
    stored.check("""
        $ moeinf trace tiny --dataset set.jsonl
        | requests                      2, of 12 tokens together
        | a request uses                42% of all experts
        | used again by the next token  75% (even use would give 33%)
        |   within 4 tokens             100% (even use would give 80%)
        | next experts named rightly    85% by this request's uses so far
        |                               75% by the token before
        |                               33% by chance
        |
        | DOMAIN  REQUESTS  DISTANCE WITHIN  TO OTHERS
        | prose   1         none             0.00
        | sums    1         none             0.00
        |
        | HIT RATE AT      2 (17%)  3 (25%)  6 (50%)  9 (75%)
        | belady           0.0%     50.0%    97.5%    97.5%
        | expected-use     0.0%     47.5%    97.5%    97.5%
        | lfru             0.0%     47.5%    97.5%    97.5%
        | lfu              0.0%     47.5%    97.5%    97.5%
        | neighbour-use    0.0%     47.5%    97.5%    97.5%
        | activation       0.0%     40.0%    97.5%    97.5%
        | activation-eamc  0.0%     40.0%    97.5%    97.5%
        | random           0.0%     35.0%    97.5%    97.5%
        | layer-lru        0.0%     25.0%    97.5%    97.5%
        | least-stale      0.0%     25.0%    97.5%    97.5%
        | llru             0.0%     25.0%    97.5%    97.5%
        | lru              0.0%     25.0%    97.5%    97.5%
        |
        | With 5 experts (42% of all, 1.25 KiB) in memory, 97.5% of what decoding asks for is found there, and 26 B are read from disk per token.
        | With half, 2 experts (512 B), 0.0% is found, and 1.00 KiB are read per token.
        | What 2 requests used is known at the next start, and fills the cache then.
        |
        | HOME/models/tiny/traces/set-e1a9cc9e-2x64.html
        | HOME/models/tiny/traces/set-e1a9cc9e-2x64.safetensors
        ! loading tiny
        ! replay tiny: 60 replays
        ! drawing the report
        = 0
    """)  # noqa: E501
    page = (stored.home / "models/tiny/traces/set-e1a9cc9e-2x64.html").read_text(encoding="utf-8")
    assert "moeinf trace tiny --dataset set.jsonl --max-prompts 2 --max-tokens 64" in page


def test_a_model_s_folder_that_cannot_be_written_is_no_surprise(
    engine: FakeEngine, stored: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = traced(engine, stored.home, monkeypatch)
    path.parent.write_text("no folder")  # root may write to any folder
    monkeypatch.chdir(stored.home)
    stored.check("""
        $ moeinf trace tiny --dataset set.jsonl
        ! loading tiny
        ! error: no access to HOME/models/tiny/traces: File exists
        ! hint: change its permissions, or set MOEINF_HOME to a folder that you may write to
        = 2
    """)


def test_trace_quietly_and_as_json(engine: FakeEngine, stored: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    path = traced(engine, stored.home, monkeypatch)
    arguments = ["trace", "tiny", "--dataset", str(stored.home / "set.jsonl")]
    names = ["hit-rates", "activation", "domains", "distances", "reuse"]
    pictures = [f"HOME/models/tiny/traces/set-e1a9cc9e-2x64-{name}.png" for name in names]
    assert stored.run(*arguments, "-q") == ("HOME/models/tiny/traces/set-e1a9cc9e-2x64.safetensors\n", "", 0)
    data = json.loads(stored.run(*arguments, "--json")[0])
    assert data.keys() == {
        *("schema", "model", "trace", "routing", "domains", "replayed", "replays", "recommendation"),
        *("learned_requests", "page", "pictures"),
    }
    assert data["pictures"] == pictures
    assert (data["recommendation"]["slots"], data["recommendation"]["bytes"]) == (5, 5 * 256)
    assert {file.name for file in path.parent.iterdir()} == {
        Path(name).name for name in (data["trace"], data["page"], *pictures)
    }


def test_a_full_disk_after_a_trace_does_not_lose_it(
    engine: FakeEngine, stored: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = traced(engine, stored.home, monkeypatch)
    monkeypatch.setattr("moeinf.page.FileSystem", lambda: FailingDisk(1, errno.ENOSPC, for_ever=True))
    monkeypatch.chdir(stored.home)
    found = stored.transcript("moeinf trace tiny --dataset set.jsonl").splitlines()
    assert found[-3].startswith("! error: the report could not be kept: no room left to write HOME/models/tiny/traces/")
    assert found[-2:] == [
        "! hint: the trace itself is whole: moeinf simulate HOME/models/tiny/traces/set-e1a9cc9e-2x64.safetensors",
        "= 5",
    ]
    assert [file.name for file in path.parent.iterdir()] == ["set-e1a9cc9e-2x64.safetensors"]
    assert stored.run("simulate", f"{path}.safetensors", "--policy", "lru", "-q")[1:] == ("", 0)


def test_simulate(engine: FakeEngine, stored: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    traced(engine, stored.home, monkeypatch)
    monkeypatch.chdir(stored.home)
    stored.run("trace", "tiny", "--dataset", "set.jsonl", "-q")
    monkeypatch.chdir(stored.home / "models/tiny/traces")
    stored.check("""
        $ moeinf simulate set-e1a9cc9e-2x64.safetensors --policy lru,expected-use,belady --fraction 10,50%
        | HIT RATE AT   2 (17%)  6 (50%)
        | belady        0.0%     97.5%
        | expected-use  0.0%     97.5%
        | lru           0.0%     97.5%
        ! replay set-e1a9cc9e-2x64.safetensors: 6 replays
        = 0
    """)
    stored.check("""
        $ moeinf simulate set-e1a9cc9e-2x64.safetensors --slots 3 --policy lru --plot rates.png
        | HIT RATE AT  3 (25%)
        | lru          25.0%
        | rates.png
        ! replay set-e1a9cc9e-2x64.safetensors: 1 replays
        = 0
    """)
    stored.check("""
        $ moeinf simulate set-e1a9cc9e-2x64.safetensors --slots 1
        ! error: set-e1a9cc9e-2x64.safetensors: --slots 1 experts is below the 2 that a layer asks for at once
        ! hint: choose from 2 to 12
        = 2
    """)
    stored.check("""
        $ moeinf simulate set-e1a9cc9e-2x64.safetensors --fraction 120%
        ! error: --fraction '120%' is no list of shares up to 100%
        ! hint: write it like 10,25,50%
        = 2
    """)
    stored.check("""
        $ moeinf simulate set-e1a9cc9e-2x64.safetensors --plot rates.gif
        ! error: --plot rates.gif: the name does not say which kind of picture
        ! hint: end it in .pdf, .png, .svg
        = 2
    """)


# Mistakes and their exit codes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("frobnicate", "error: No such command 'frobnicate'\nhint: moeinf --help\n"),
        ("run", "error: Missing argument 'MODEL'\nhint: moeinf run --help\n"),
        ("run tiny Hi --xyz", "error: No such option: --xyz\nhint: moeinf run --help\n"),
        ("list --json -q", "error: --json and --quiet exclude each other\nhint: leave one of them out\n"),
        (
            "run tiny Hi --prefetch maybe",
            "error: --prefetch maybe is not known\nhint: choose one of: auto, eam, gate, off\n",
        ),
        ("run tiny Hi --context 0", "error: --context must be 1 or more, not 0\n"),
        (
            "run tiny",
            'error: there is no prompt\nhint: moeinf run tiny "Why is the sky blue?", or moeinf chat tiny to talk\n',
        ),
    ],
)
def test_usage_errors(stored: CommandLine, line: str, message: str) -> None:
    assert stored.run(*line.split()) == ("", message, 2)


def test_input_that_is_not_utf8(engine: FakeEngine, stored: CommandLine) -> None:
    message = "error: standard input is not valid UTF-8: byte 0xff\n"
    assert stored.run("run", "-q", "tiny", given=b"a\xff") == ("", message, 2)
    assert stored.run("chat", "-q", "tiny", given=b"a\xff\n") == ("", message, 2)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (IntegrityError("E003 is short", hint="pull again"), 4),
        (CapacityError("too big", hint="give it more"), 5),
        (HubError("no answer", hint="try later"), 6),
        (UnsupportedError("no pickles", hint="find another"), 7),
        (MoeinfError("busy", hint="wait"), 1),
    ],
)
def test_each_error_has_its_exit_code(
    stored: CommandLine, monkeypatch: pytest.MonkeyPatch, error: MoeinfError, code: int
) -> None:
    monkeypatch.setitem(vars(moeinf), "load", raiser(error))
    assert stored.run("run", "-q", "tiny", "Hi") == ("", f"error: {error}\nhint: {error.hint}\n", code)


def raiser(error: BaseException) -> Callable[..., object]:
    def fail(*_: object, **__: object) -> object:
        raise error

    return fail


def test_the_unexpected_has_no_traceback_unless_asked_for(stored: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(moeinf), "load", raiser(KeyError("x")))
    stored.check("""
        $ moeinf run -q tiny Hi
        ! error: KeyError: 'x'
        ! hint: MOEINF_DEBUG=1 shows where this comes from
        = 1
    """)
    monkeypatch.setenv("MOEINF_DEBUG", "1")
    _, stderr, code = stored.run("run", "-q", "tiny", "Hi")
    assert code == 1
    assert stderr.startswith("Traceback (most recent call last):")
    assert stderr.endswith("error: KeyError: 'x'\nhint: MOEINF_DEBUG=1 shows where this comes from\n")


def test_an_interrupt_outside_an_answer_is_quiet(stored: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(moeinf), "load", raiser(KeyboardInterrupt()))
    assert stored.run("run", "-q", "tiny", "Hi") == ("", "", 130)


# Terminals


def test_nothing_that_goes_wrong_ends_a_chat(stored: CommandLine) -> None:
    with Terminal(stored.home, "chat", "tiny") as terminal:
        terminal.expect(">>>")
        terminal.press("break\r")
        terminal.expect("RuntimeError: broken")
        terminal.expect(">>>")
        terminal.press("count\r")
        terminal.expect("0 1 2 3 4")
        terminal.press(CTRL_C)
        terminal.expect(">>>")
        terminal.press(CTRL_D)
        assert terminal.wait() == 0


def test_chat_in_a_terminal(stored: CommandLine) -> None:
    history = stored.home / "history/chat"
    history.parent.mkdir()
    history.touch(0o644)
    with Terminal(stored.home, "chat", "tiny") as terminal:
        terminal.expect("tiny: all 5 experts in memory. /help lists the commands, Ctrl-D leaves.")
        terminal.expect(">>>")
        terminal.press("count\r")
        terminal.expect("0 1 2 3 4")
        terminal.press(CTRL_C)
        terminal.expect("stopped; what was said is kept")
        terminal.expect(">>>")
        terminal.press("/sho\t")
        terminal.expect("/sho")
        terminal.expect("w")
        terminal.press("\r")
        terminal.expect("messages  2, ")
        terminal.expect(">>>")
        terminal.press("/bad\r")
        terminal.expect("error:\x1b[0m /bad is no command")
        terminal.expect(">>>")
        terminal.press('"""two\r')
        terminal.expect("...")
        terminal.press('lines"""\r')
        terminal.expect("0 1 2 3 4")
        time.sleep(1.1)  # a second Ctrl-C within a second of the first would leave
        terminal.press(CTRL_C)
        terminal.expect("stopped; what was said is kept")
        terminal.expect(">>>")
        terminal.press(CTRL_D)
        assert terminal.wait() == 0
    assert history.stat().st_mode & 0o777 == 0o600
    assert "+count\n" in history.read_text()


def test_two_interrupts_leave_a_chat_in_a_terminal(stored: CommandLine) -> None:
    with Terminal(stored.home, "chat", "tiny", environ={"NO_COLOR": "1"}) as terminal:
        terminal.expect(">>>")
        terminal.press(CTRL_C)
        terminal.expect("Ctrl-C again or Ctrl-D to leave")
        terminal.expect(">>>")
        time.sleep(1.1)
        terminal.press("count\r")
        terminal.expect("0 1 2 3 4")
        # On a busy machine, two signals may come as one or a second apart: so there are more, also while it ends.
        assert terminal.wait(pressing=CTRL_C) == 130


def test_rm_asks_in_a_terminal(stored: CommandLine) -> None:
    for answer, code, left in (("\r", 1, ["tiny"]), ("y\r", 0, [])):
        with Terminal(stored.home, "rm", "tiny") as terminal:
            terminal.expect("remove tiny? [y/N] ")
            terminal.press(answer)
            assert terminal.wait() == code
        assert Store(stored.home).names() == left


# Processes


def spawn(home: Path, *args: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "MOEINF_HOME": str(home), **environ},
    )


def test_what_needs_no_model_imports_nothing_slow(stored: CommandLine) -> None:
    script = """
import sys
from moeinf.cli import main
for line in ("--help", "run --help", "list", "show tiny", "verify tiny", "rm -y tiny"):
    assert main(line.split()) == 0
    slow = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "rich", "prompt_toolkit", "jinja2"}
    assert not slow & set(sys.modules), (line, slow & set(sys.modules))
"""
    process = spawn(stored.home, "-c", script)
    _, stderr = process.communicate()
    assert (process.returncode, stderr) == (0, "verify tiny: 21.7 KiB\n")


def test_ctrl_c_while_the_program_starts_is_quiet(stored: CommandLine) -> None:
    """Python takes a quarter of a second to read the commands; what a Ctrl-C meets there is no code of ours."""
    (stored.home / "sitecustomize.py").write_text("import os, signal, sys, threading\n" + _PRESS)
    path = f"{stored.home}{os.pathsep}{SOURCE}"
    process = spawn(stored.home, "-m", "moeinf", "list", PYTHONPATH=path)
    stdout, stderr = process.communicate()
    assert (stdout, stderr, process.returncode) == ("", "", -signal.SIGINT)


def test_ctrl_c_while_a_model_is_loaded_ends_the_process(stored: CommandLine) -> None:
    """Whatever libraries make of a KeyboardInterrupt in their imports."""
    script = """
import os, signal, time
import moeinf
from moeinf.cli import main

def load(*_, **__):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    except BaseException:
        print("passed over")

signal.signal(signal.SIGINT, signal.default_int_handler)
vars(moeinf)["load"] = load
main(["run", "tiny", "Hello"])
"""
    process = spawn(stored.home, "-c", script)
    stdout, stderr = process.communicate()
    assert (stdout, stderr, process.returncode) == ("", "loading tiny\n", INTERRUPTED)


_PRESS = """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "moeinf.cli":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(stored: CommandLine, closed: str) -> None:
    environ = {**os.environ, "PYTHONPATH": str(SOURCE), "MOEINF_HOME": str(stored.home)}
    for command, code in (("list", 0), ("show nothing", 3), ("rm tiny", 2), ("run nothing hi", 3)):
        line = f"{sys.executable} -m moeinf {command} {closed}"
        process = subprocess.run(line, shell=True, capture_output=True, text=True, check=False, env=environ)
        assert process.returncode == code
        assert "AttributeError" not in process.stderr


@pytest.mark.parametrize("asked", ["list", "--help"])
def test_nobody_reads_the_output(stored: CommandLine, asked: str) -> None:
    process = spawn(stored.home, "-m", "moeinf", asked)
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)
    process.stderr.close()


def test_a_full_disk_behind_the_output_is_told(stored: CommandLine) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "moeinf", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(SOURCE), "MOEINF_HOME": str(stored.home)},
        )
    assert process.returncode == 5
    assert process.stderr == "error: the output cannot be written: No space left on device\n"


def test_a_locale_that_cannot_show_the_answer(stored: CommandLine) -> None:
    store_model(stored.home, "other", "/home/me/größer")
    process = spawn(stored.home, "-m", "moeinf", "list", PYTHONIOENCODING="ascii")
    stdout, _ = process.communicate()
    assert process.returncode == 0
    assert "/home/me/gr??er" in stdout


# Help, version, completion, reference


def test_help_begins_with_two_examples(cli: CommandLine) -> None:
    commands = [
        [],
        *([name] for name in ("pull", "list", "show", "rm", "verify", "run", "chat", "profile", "trace", "simulate")),
    ]
    for command in commands:
        stdout, stderr, code = cli.run(*command, "--help")
        lines = stdout.splitlines()
        assert (stderr, code) == ("", 0)
        assert lines[0].startswith(" ".join(["Usage: moeinf", *command]))
        for example in lines[2:4]:
            assert f"{example} ".startswith(" ".join(["  moeinf", *command, ""]))
        assert lines[4] == ""


def test_no_command_shows_the_help(cli: CommandLine) -> None:
    assert cli.run() == cli.run("--help")


def test_version(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: f"1.2.3 of {name}")
    cli.check("""
        $ moeinf --version
        | moeinf 1.2.3 of moeinf
        = 0
    """)


@pytest.mark.parametrize(
    ("shell", "words", "expected"),
    [
        ("bash", "moeinf run t", "tiny\ntoy"),
        ("bash", "moeinf rm toy ti", "tiny"),
        ("bash", "moeinf pull mixtral-8x22b", "mixtral-8x22b-instruct"),
        ("zsh", "moeinf chat ti", "_arguments '*: :((\"tiny\"))'"),
        ("fish", "moeinf show ti", "tiny"),
        ("fish", "moeinf pull mixtral-8x22b", "mixtral-8x22b-instruct\tMixtral 8x22B, follows instructions"),
    ],
)
def test_completion(
    stored: CommandLine, monkeypatch: pytest.MonkeyPatch, shell: str, words: str, expected: str
) -> None:
    store_model(stored.home, "toy")
    monkeypatch.setenv("_MOEINF_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", words)
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    assert stored.run() == (f"{expected}\n", "", 0)


def test_completion_says_nothing_about_a_store_it_cannot_read(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "names", raiser(PermissionError()))
    monkeypatch.setenv("_MOEINF_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "moeinf run ti")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert cli.run() == ("\n", "", 0)


def test_the_reference_is_what_the_commands_say() -> None:
    script = runpy.run_path(str(SOURCE.parent / "scripts/generate_cli_docs.py"))
    page = script["PATH"].read_text(encoding="utf-8")
    assert page == script["render"](), "docs/cli.md is stale: run scripts/generate_cli_docs.py"


@pytest.mark.parametrize("name", ["prefetch", "miss", "kernels", "compile"])
def test_the_choices_in_the_help_are_those_that_are_taken(name: str) -> None:
    nonsense: dict[str, Any] = {name: "nonsense"}
    with pytest.raises(UsageError) as caught:
        EngineOptions(**nonsense)
    choices = str(caught.value.hint).removeprefix("choose one of: ").replace(", ", "\\|")
    assert f"`--{name} {choices}`" in (SOURCE.parent / "docs/cli.md").read_text(encoding="utf-8")
