"""Continuous batching with slots, as a server would do it; every request is checked against its lone run.

    python -m bench.lm.serve [--requests 48] [--slots 8] [--preempt 0.05] [--seed 0]

Requests arrive over time, wait for a slot, are prefilled alone, join the batch, and leave it when they have
said what they were asked for. Now and then one is preempted: its memory is copied out of the pool, its slot goes
to another, and later it is put back into whichever slot is free. A batch has as many rows as there are slots;
rows that have nothing to do carry slot -1. The whole memory of a request is O(log n) vectors a layer, so that
preempting one moves kilobytes.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from bench.errors import InputError
from bench.extras import need, tqdm
from lmn_kernels import LogarithmicMemory, MemoryState

from . import arguments

TOLERANCE = 1e-5


class TinyModel(nn.Module):
    """Token embedding → blocks → norm → head."""

    def __init__(self, symbols: int = 65, embedding: int = 32, heads: int = 4, bank: int = 2, layers: int = 4):
        super().__init__()
        self.embedding = nn.Embedding(symbols, embedding)
        self.blocks = nn.ModuleList(
            LogarithmicMemory(embedding, heads, bank, init="variance_preserving") for _ in range(layers)
        )
        self.norm = nn.RMSNorm(embedding)
        self.head = nn.Linear(embedding, symbols)

    def layers(self) -> list[LogarithmicMemory]:
        return cast(list[LogarithmicMemory], list(self.blocks))

    def prefill(self, ids: Tensor) -> tuple[Tensor, list[MemoryState]]:
        """``ids [1, L]`` → logits ``[1, symbols]`` behind the prompt, and a state for each layer."""
        x, states = self.embedding(ids), []
        for layer in self.layers():
            x, state = layer.prefill(x)
            states.append(state)
        return self.head(self.norm(x[:, -1])), states


@dataclass
class Request:
    """What was asked, and what has been said so far."""

    number: int
    arrival: int
    prompt: list[int]
    wanted: int
    said: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    kept: list[MemoryState] | None = None  # of a preempted request

    def take(self, logits: Tensor) -> None:
        self.logits.append(logits.clone())
        self.said.append(int(logits.argmax()))

    @property
    def done(self) -> bool:
        return len(self.said) >= self.wanted


class Server:
    """A model with a pool of slots for each layer.

    Args:
        model: its layers' steps go through `LogarithmicMemory.step_`.
        slots: requests that can be under way at once.
        max_position: the longest a request may get, prompt included.
    """

    def __init__(self, model: TinyModel, slots: int, max_position: int):
        self.model = model
        self.pools = [layer.init_state(slots, max_position=max_position) for layer in model.layers()]
        self.running: list[Request | None] = [None] * slots
        self.waiting: deque[Request] = deque()
        self.steps = self.rows = self.preemptions = 0

    def admit(self) -> None:
        """Requests that wait go into free slots: their prompt is read, or their memory put back."""
        for slot, there in enumerate(self.running):
            if there is not None or not self.waiting:
                continue
            request = self.waiting.popleft()
            if request.kept is None:
                logits, states = self.model.prefill(torch.tensor([request.prompt]))
                request.take(logits[0])
            else:
                states, request.kept = request.kept, None
            for pool, state in zip(self.pools, states, strict=True):
                pool.restore(state, torch.tensor([slot]))
            self.running[slot] = request

    def preempt(self, slot: int) -> None:
        """Copy a request's memory out of the pool and send it to the end of the queue."""
        request = self.running[slot]
        assert request is not None
        request.kept = [pool.reorder(torch.tensor([slot])) for pool in self.pools]
        self.running[slot] = None
        self.waiting.append(request)
        self.preemptions += 1

    def step(self) -> list[Request]:
        """One token for every request that is under way; returns those that are done."""
        done = []
        for slot, request in enumerate(self.running):
            if request is not None and request.done:
                done.append(request)
                self.running[slot] = None
        busy = [request is not None for request in self.running]
        if not any(busy):
            return done
        slots = torch.tensor([slot if there else -1 for slot, there in enumerate(busy)])
        ids = torch.tensor([request.said[-1] if request is not None else 0 for request in self.running])
        x = self.model.embedding(ids[:, None])
        for layer, pool in zip(self.model.layers(), self.pools, strict=True):
            x = layer.step_(x, pool, slots)
        logits = self.model.head(self.model.norm(x[:, 0]))
        for request, row in zip(self.running, logits, strict=True):
            if request is not None:
                request.take(row)
        self.steps += 1
        self.rows += sum(busy)
        return done


def alone(model: TinyModel, request: Request) -> list[Tensor]:
    """The logits that the request gets when nobody else is there."""
    logits, states = model.prefill(torch.tensor([request.prompt]))
    found = [logits[0]]
    while len(found) < request.wanted:
        x = model.embedding(torch.tensor([[int(found[-1].argmax())]]))
        for index, layer in enumerate(model.layers()):
            x, states[index] = layer.step(x, states[index])
        found.append(model.head(model.norm(x[:, 0]))[0])
    return found


def check(model: TinyModel, request: Request) -> float:
    """The largest difference of a request's logits from those of its lone run.

    Raises:
        SystemExit: another token was said, or the logits differ by more than rounding.
    """
    expected = alone(model, request)
    worst = max(float((a - b).abs().max()) for a, b in zip(request.logits, expected, strict=True))
    scale = max(float(row.abs().max()) for row in expected)
    if request.said != [int(row.argmax()) for row in expected] or not worst <= TOLERANCE * scale:
        raise SystemExit(f"request {request.number} is not what it is alone: its logits differ by {worst:.3g}")
    return worst


def traffic(count: int, generator: torch.Generator, symbols: int = 65) -> list[Request]:
    """Requests that arrive one after the other, prompts of 1 to 60 tokens, answers of 1 to 80."""

    def draw(low: int, high: int, size: int = 1) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    arrival, requests = 0, []
    for number in range(count):
        arrival += draw(0, 6)[0]
        requests.append(Request(number, arrival, draw(0, symbols, draw(1, 61)[0]), draw(1, 81)[0]))
    return requests


@torch.inference_mode()
def serve(
    model: TinyModel, requests: Sequence[Request], slots: int, preempt: float, generator: torch.Generator
) -> Server:
    """Run the requests to their end.

    Args:
        requests: by arrival.
        slots: of the pool.
        preempt: chance a step that one of the running requests is preempted.
    """
    longest = max(len(request.prompt) + request.wanted for request in requests)
    server, due, clock, done = Server(model, slots, longest), deque(requests), 0, 0
    with tqdm(total=len(requests), desc="serve", disable=None) as bar:
        while done < len(requests):
            while due and due[0].arrival <= clock:
                server.waiting.append(due.popleft())
            server.admit()
            busy = [slot for slot, request in enumerate(server.running) if request is not None and not request.done]
            if busy and float(torch.rand((), generator=generator)) < preempt:
                server.preempt(busy[int(torch.randint(len(busy), (), generator=generator))])
            finished = len(server.step())
            done += finished
            bar.update(finished)
            clock += 1
    return server


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lm.serve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--slots", type=int, default=8, help="requests that are under way at once")
    parser.add_argument("--preempt", type=float, default=0.05, help="chance of a preemption a step")
    parser.add_argument("--seed", type=arguments.seed, default=0)
    options = parser.parse_args(argv)
    if options.requests < 1 or options.slots < 1 or not 0 <= options.preempt < 1:
        parser.error("expected at least one request and one slot, and a chance in 0 … 1")
    try:
        need("tqdm")
    except InputError as error:
        parser.error(str(error))
    torch.manual_seed(options.seed)
    model, generator = TinyModel().eval(), torch.Generator().manual_seed(options.seed)
    requests = traffic(options.requests, generator)
    begin = time.perf_counter()
    server = serve(model, requests, options.slots, options.preempt, generator)
    seconds = time.perf_counter() - begin
    with torch.inference_mode():
        worst = max(check(model, request) for request in requests)
    said, kept = sum(len(request.said) for request in requests), sum(pool.nbytes for pool in server.pools)
    print(
        f"{len(requests)} requests, {said} tokens in {seconds:.2f} s ({said / seconds:,.0f} a second), "
        f"{server.rows / max(server.steps, 1):.1f} of {options.slots} slots busy, {server.preemptions} preemptions, "
        f"pool of {kept:,} bytes"
    )
    print(f"every request says what it says alone; logits differ by at most {worst:.2g}")


if __name__ == "__main__":
    main()
