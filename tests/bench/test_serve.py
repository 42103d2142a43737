"""Continuous batching: who shares the batch, and being preempted, changes nothing."""

from __future__ import annotations

import pytest
import torch

from bench.lm import serve

Served = tuple[serve.TinyModel, list[serve.Request], serve.Server]


def small(seed: int, slots: int, preempt: float, count: int = 10) -> Served:
    torch.manual_seed(seed)
    model, generator = serve.TinyModel(embedding=16, heads=2, layers=2).eval(), torch.Generator().manual_seed(seed)
    requests = serve.traffic(count, generator)
    return model, requests, serve.serve(model, requests, slots, preempt, generator)


@pytest.mark.parametrize(("slots", "preempt"), [(1, 0.0), (3, 0.0), (3, 0.3), (12, 0.1)])
def test_every_request_is_what_it_is_alone(slots, preempt):
    model, requests, server = small(slots, slots, preempt)
    assert all(len(request.said) == request.wanted for request in requests)
    assert (server.preemptions > 0) == (preempt > 0)
    with torch.inference_mode():
        for request in requests:
            serve.check(model, request)


def test_the_check_notices_another_ones_memory(monkeypatch):
    """A preempted request that gets back the memory of nobody: the check must see it."""
    reorder = serve.MemoryState.reorder
    monkeypatch.setattr(serve.MemoryState, "reorder", lambda self, index: reorder(self.reset(), index))
    model, requests, _ = small(0, 3, 0.3)
    with torch.inference_mode(), pytest.raises(SystemExit, match="is not what it is alone"):
        for request in requests:
            serve.check(model, request)


def test_the_command(capsys):
    serve.main(["--requests", "4", "--slots", "2", "--preempt", "0.2"])
    assert "every request says what it says alone" in capsys.readouterr().out


def test_bad_arguments(capsys):
    with pytest.raises(SystemExit):
        serve.main(["--slots", "0"])
    assert "at least one" in capsys.readouterr().err
