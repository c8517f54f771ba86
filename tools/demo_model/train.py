"""Trains the demo model, or goes on where a run stopped: `python -m tools.demo_model train`.

The learning rate follows the progress of the run, which is the largest share used of the limits given: tokens, minutes
of work, or the time of day. So the rate has decayed at the end whatever the speed was. SIGTERM saves and stops.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tools.demo_model import domains
from tools.demo_model.batches import Batches, load_tokens, validation_rows
from tools.demo_model.fast import FastModel, load_kernels
from tools.demo_model.model import Shape, Weights, balance_pull, initial_weights, loss
from tools.demo_model.optimizer import Optimizer, Rates

__all__ = ["add_arguments", "load_checkpoint", "run"]

LOG_STEPS = 10
WARM_UP_STEPS = 40
EARLY_PHASE = 0.15  # progress until which a step takes half the rows: early gradients agree, more steps help more
DECAY_START = 0.4  # share of the run at the full learning rate
FINAL_PHASE = 0.78  # progress from which the mixture leans towards facts and sums; stories are learned by then
FINAL_BOOST = {"facts": 1.4, "maths": 1.3, "chat": 1.3, "smalltalk": 1.1, "stories": 0.5}
LOAD_MEMORY = 0.9  # of the running share of choices per expert
LONGEST_STEP_S = 30.0  # a step that took longer was paused; no more of it counts as work


class Model(Protocol):
    """One worker's view of the model: model.loss, by autograd or by hand."""

    def losses(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each target, and choices per expert."""
        ...

    def step(self, tokens: Tensor, grads: Weights, pull: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Adds gradients to `grads`; returns what `losses` does."""
        ...


class PlainModel:
    """The reference form, by autograd, on any device."""

    def __init__(self, shape: Shape, weights: Weights) -> None:
        self.shape = shape
        self.weights = weights

    @torch.no_grad()
    def losses(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See Model."""
        _, losses, counts = loss(self.shape, self.weights, tokens.to(self.weights["embed"].device), None, 1)
        return losses.cpu(), counts.cpu()

    def step(self, tokens: Tensor, grads: Weights, pull: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """See Model."""
        device = self.weights["embed"].device
        leaves = {name: weight.detach().requires_grad_() for name, weight in self.weights.items()}
        objective, losses, counts = loss(self.shape, leaves, tokens.to(device), pull.to(device), total)
        objective.backward()  # type: ignore[no-untyped-call]
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                grads[name].add_(leaf.grad)
        return losses.cpu(), counts.cpu()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint, if there is one")
    parser.add_argument("--until", metavar="HH:MM", help="time of day at which the run ends")
    parser.add_argument("--minutes", type=float, help="minutes of work for the whole run; pauses do not count")
    parser.add_argument("--tokens", type=float, help="tokens for the whole run, in millions")
    parser.add_argument("--layers", type=int, default=Shape().layers)
    parser.add_argument("--experts", type=int, default=Shape().experts)
    parser.add_argument("--top-k", type=int, default=Shape().top_k)
    parser.add_argument("--intermediate", type=int, default=Shape().intermediate)
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--rows", type=int, default=32, help="rows per step")
    parser.add_argument("--micro-rows", type=int, default=4, help="rows that a worker takes at a time")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads, one micro-batch each")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for the plain PyTorch form")
    parser.add_argument("--balance", type=float, default=0.04, help="coefficient of the balance loss")
    parser.add_argument("--muon-rate", type=float, default=Rates().muon)
    parser.add_argument("--adam-rate", type=float, default=Rates().adam)
    parser.add_argument("--every", type=float, default=10, help="minutes between checkpoints and validations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="autograd instead of the C++ kernels")


def keep_memory() -> None:
    """Asks glibc to keep freed memory: mapping it anew costs a fifth of the time."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((-8, 1), (-3, 32 << 20), (-1, 2**31 - 1), (-2, 256 << 20)):  # arenas, mmap, trim, top pad
        mallopt(option, value)


@dataclass(slots=True)
class Clock:
    """Progress of the run, from zero to one."""

    minutes: float | None
    until: float | None
    million_tokens: float | None
    begun: float  # when this process started, and the progress it started from
    begun_at: float
    work_s: float

    def progress(self, tokens: int) -> float:
        """Largest share used of the limits."""
        shares = [self.begun_at]
        if self.minutes is not None:
            shares.append(self.work_s / 60 / self.minutes)
        if self.million_tokens is not None:
            shares.append(tokens / 1e6 / self.million_tokens)
        if self.until is not None:
            passed = (time.time() - self.begun) / max(1.0, self.until - self.begun)
            shares.append(self.begun_at + (1 - self.begun_at) * passed)
        return min(1.0, max(shares))


def time_of_day(text: str) -> float:
    """Next moment at which the clock shows HH:MM, in seconds since the epoch."""
    hour, minute = (int(part) for part in text.split(":"))
    now = datetime.datetime.now()
    moment = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return (moment if moment > now else moment + datetime.timedelta(days=1)).timestamp()


def rate_factor(step: int, progress: float) -> float:
    """Share of the peak learning rate: warm-up, plateau, then a straight line to nearly zero."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, max(0.01, (1 - progress) / (1 - DECAY_START)))


def mixture(progress: float) -> dict[str, float]:
    """Weight of each domain."""
    boost = FINAL_BOOST if progress >= FINAL_PHASE else {}
    return {name: weight * boost.get(name, 1.0) for name, weight in domains.WEIGHTS.items()}


def load_checkpoint(work: Path) -> dict[str, Any]:
    """The latest checkpoint of a work folder."""
    checkpoint: dict[str, Any] = torch.load(work / "checkpoints" / "latest.pt", map_location="cpu", weights_only=True)
    return checkpoint


class Trainer:
    """Owns the weights, the workers and the state of the run."""

    def __init__(self, arguments: argparse.Namespace, checkpoint: dict[str, Any] | None) -> None:
        self.work: Path = arguments.work
        self.arguments = arguments
        self.log_file = (self.work / "train.log").open("a", encoding="utf-8")
        self.shape = Shape(**checkpoint["shape"]) if checkpoint else _shape(arguments)
        self.step, self.tokens, self.stopping = 0, 0, False
        master = checkpoint["master"] if checkpoint else initial_weights(self.shape, arguments.seed)
        self.master: Weights = {name: weight.to(arguments.device) for name, weight in master.items()}
        self.weights: Weights = {name: weight.bfloat16() for name, weight in self.master.items()}
        rates = Rates(muon=arguments.muon_rate, adam=arguments.adam_rate)
        self.optimizer = Optimizer(self.shape, self.master, self.weights, rates)
        self.load = torch.full((self.shape.layers, self.shape.experts), 1 / self.shape.experts)
        self.batches = Batches(load_tokens(self.work, "train", domains.NAMES), arguments.length, arguments.seed)
        until = time_of_day(arguments.until) if arguments.until else None
        self.clock = Clock(arguments.minutes, until, arguments.tokens, time.time(), 0.0, 0.0)
        if checkpoint:
            self._restore(checkpoint)
        self.models = self._models()
        self.grads = [{name: torch.zeros_like(weight) for name, weight in self.master.items()} for _ in self.models]
        self.pool = ThreadPoolExecutor(len(self.models))
        self._log(f"{self.shape} {self.shape.parameters / 1e6:.2f} M parameters, {len(self.models)} workers")
        missing = set(domains.NAMES) - set(self.batches.names)
        self._log(f"domains without tokens: {sorted(missing)}" if missing else "all domains have tokens")

    def _models(self) -> list[Model]:
        if self.arguments.plain or self.arguments.device != "cpu":
            return [PlainModel(self.shape, self.weights)]
        try:
            kernels = load_kernels(self.work / "kernels")
        except (OSError, RuntimeError) as error:  # no compiler, no ninja, or a compiler that fails
            self._log(f"no fast kernels, autograd instead: {error}")
            return [PlainModel(self.shape, self.weights)]
        torch.set_num_threads(1)
        return [
            FastModel(kernels, self.shape, self.weights, self.arguments.length) for _ in range(self.arguments.workers)
        ]

    def train(self) -> None:
        """Steps until the run is over or a signal asks to stop."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        losses: list[float] = []
        logged, logged_tokens, saved = time.time(), self.tokens, time.time()
        while not self.stopping and (progress := self.clock.progress(self.tokens)) < 1:
            started = time.time()
            losses.append(self._train_step(progress))
            self.clock.work_s += min(time.time() - started, LONGEST_STEP_S)
            if self.step % LOG_STEPS == 0:
                speed = (self.tokens - logged_tokens) / (time.time() - logged)
                self._report(progress, float(np.mean(losses)), speed)
                logged, logged_tokens, losses = time.time(), self.tokens, []
            if time.time() - saved > 60 * self.arguments.every:
                self.save()
                self.validate()
                saved = time.time()
        self.save()
        if not self.stopping:
            self.validate()

    def _train_step(self, progress: float) -> float:
        arguments = self.arguments
        row_count: int = arguments.rows if progress >= EARLY_PHASE else max(1, arguments.rows // 2)
        rows = self.batches.batch(self.step, row_count, mixture(progress))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.step))
        queue: SimpleQueue[Tensor] = SimpleQueue()
        for part in torch.split(rows[order], arguments.micro_rows):
            queue.put(part)
        total: int = row_count * arguments.length
        pull = balance_pull(self.shape, self.load, arguments.balance, total)
        results: list[list[tuple[float, Tensor]]] = list(
            self.pool.map(lambda worker: self._work(worker, queue, pull, total), range(len(self.models)))
        )
        counts = torch.stack([count for result in results for _, count in result]).sum(0).float()
        self.load.lerp_(counts / counts.sum(-1, keepdim=True), 1 - LOAD_MEMORY)
        self._run(self.optimizer.jobs(self.grads, self.step, rate_factor(self.step, progress)))
        self.step += 1
        self.tokens += total
        return sum((value for result in results for value, _ in result), 0.0) / total

    def _work(self, worker: int, queue: SimpleQueue[Tensor], pull: Tensor, total: int) -> list[tuple[float, Tensor]]:
        """Takes micro-batches until none is left: a worker whose core is busy with something else takes fewer."""
        grads = self.grads[worker]
        done: list[tuple[float, Tensor]] = []
        for grad in grads.values():
            grad.zero_()
        while True:
            try:
                rows = queue.get_nowait()
            except Empty:
                return done
            losses, counts = self.models[worker].step(rows, grads, pull, total)
            done.append((float(losses.sum()), counts))

    def _run(self, jobs: list[Callable[[], None]]) -> None:
        for done in [self.pool.submit(job) for job in jobs]:
            done.result()

    def validate(self, rows: int = 16) -> dict[str, float]:
        """Loss per domain on held-out rows, logged."""
        parts = load_tokens(self.work, "val", domains.NAMES)
        chosen = {
            name: validation_rows(tokens, self.arguments.length, rows)
            for name, tokens in parts.items()
            if len(tokens) > self.arguments.length
        }
        queue: SimpleQueue[tuple[str, Tensor]] = SimpleQueue()
        for name, tokens in chosen.items():
            queue.put((name, tokens))
        losses: dict[str, float] = {}

        def work(worker: int) -> None:
            while True:
                try:
                    name, tokens = queue.get_nowait()
                except Empty:
                    return
                losses[name] = float(self.models[worker].losses(tokens)[0].mean())

        list(self.pool.map(work, range(len(self.models))))
        real = [losses[name] for name in domains.REAL if name in losses]
        every = " ".join(f"{name} {losses[name]:.3f}" for name in domains.NAMES if name in losses)
        self._log(f"validation step {self.step} tokens {self.tokens / 1e6:.2f}M real {np.mean(real):.4f} {every}")
        return losses

    def save(self) -> None:
        """Writes checkpoints/latest.pt in one piece; the one before stays as previous.pt."""
        folder = self.work / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        latest, fresh = folder / "latest.pt", folder / "latest.pt.part"
        state = {
            "shape": self.shape.to_dict(),
            "master": self.master,
            "optimizer": self.optimizer.state(),
            "step": self.step,
            "tokens": self.tokens,
            "load": self.load,
            "seed": self.arguments.seed,
            "drawn": self.batches.drawn,
            "progress": self.clock.progress(self.tokens),
            "work_s": self.clock.work_s,
        }
        with fresh.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if latest.exists():
            os.replace(latest, folder / "previous.pt")
        os.replace(fresh, latest)
        self._log(f"saved step {self.step} tokens {self.tokens / 1e6:.2f}M")

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        self.optimizer.load_state(checkpoint["optimizer"])
        self.step, self.tokens = checkpoint["step"], checkpoint["tokens"]
        self.load = checkpoint["load"]
        self.batches.seed = checkpoint["seed"]
        self.batches.drawn.update({n: c for n, c in checkpoint["drawn"].items() if n in self.batches.drawn})
        self.clock.begun_at, self.clock.work_s = checkpoint["progress"], checkpoint["work_s"]

    def _report(self, progress: float, mean_loss: float, speed: float) -> None:
        relative = self.load * self.shape.experts
        balance = float((relative * self.load).sum(-1).mean())
        self._log(
            f"step {self.step} tokens {self.tokens / 1e6:.2f}M progress {progress:.3f} loss {mean_loss:.4f} "
            f"rate {rate_factor(self.step, progress):.3f} balance {balance:.3f} "
            f"load {float(relative.min()):.2f}..{float(relative.max()):.2f} {speed:.0f} tokens/s"
        )

    def _log(self, text: str) -> None:
        line = f"{datetime.datetime.now():%H:%M:%S} {text}\n"
        for stream in (self.log_file, sys.stdout):
            stream.write(line)
            stream.flush()

    def _stop(self, number: int, frame: object) -> None:
        self.stopping = True


def _shape(arguments: argparse.Namespace) -> Shape:
    return Shape(
        layers=arguments.layers, experts=arguments.experts, top_k=arguments.top_k, intermediate=arguments.intermediate
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    if arguments.until is None and arguments.minutes is None and arguments.tokens is None:
        sys.stderr.write("give the run an end: --tokens, --minutes or --until\n")
        return 2
    keep_memory()
    has_checkpoint = (arguments.work / "checkpoints" / "latest.pt").exists()
    if has_checkpoint and not arguments.resume:
        sys.stderr.write(f"{arguments.work} holds a checkpoint: go on with --resume, or choose another --work\n")
        return 2
    Trainer(arguments, load_checkpoint(arguments.work) if has_checkpoint else None).train()
    return 0
