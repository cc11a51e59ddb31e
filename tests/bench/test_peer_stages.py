"""Measurements of a pipeline by stage, on tiny pipelines of diffusers."""

import math
import time
from typing import Any

import pytest
import tiny_peers
import torch
from torch import nn

from sana_lab.bench import peer_stages
from sana_lab.bench.peer_stages import PeerSettings, measure_peer, time_stages
from sana_lab.costs.live_memory import Memory
from sana_lab.peers.pipeline import Peer

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["a red circle"]


@pytest.fixture(scope="module")
def sana() -> Peer:
    return Peer(tiny_peers.sana_pipeline())


def test_time_is_that_of_the_networks(sana: Peer):
    """A clock that gives each call one second: as many seconds as calls."""
    seen = time_stages(sana, PeerSettings(32, 2, 3.0, 1, 0, clock=lambda call: (call(), (1.0, None))[1]), PROMPTS)
    assert seen.seconds == {stage: float(count) for stage, count in seen.calls.items()}
    assert seen.calls == {"text": 2, "denoise": 2, "decode": 1}


def test_a_network_that_is_slower_takes_longer(monkeypatch: pytest.MonkeyPatch, sana: Peer):
    decode = sana.pipeline.vae.decode
    monkeypatch.setattr(sana.pipeline.vae, "decode", lambda *a, **k: (time.sleep(0.1), decode(*a, **k))[1])
    costs, tokens = measure_peer(sana, PeerSettings(32, 1, 1.0, 1, 1), PROMPTS, PROMPTS)
    seconds = {name: each.median for name, each in costs.latency.items()}
    assert seconds["decode"] > 0.1
    assert seconds["total"] > 0.1
    assert tokens is not None
    assert tokens > 5


class Unusual:
    """A pipeline whose network has a name of its own."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.components = {"dreamer": nn.Linear(4, 4, bias=False)}

    def set_progress_bar_config(self, **_: Any) -> None:
        pass

    def __call__(self, prompt: list[str], height: int, width: int, generator: Any = None) -> Any:
        rows = self.components["dreamer"](torch.rand(3 * height * width // 4, 4, generator=generator[0]))
        return type("Output", (), {"images": rows.sigmoid().view(1, 3, height, width)})


def test_a_network_without_a_usual_name_counts_in_the_total():
    peer = Peer(Unusual())
    assert peer.stages() == {}
    costs, tokens = measure_peer(peer, PeerSettings(8, None, None, 1, 0), PROMPTS, PROMPTS)
    assert costs.latency.keys() == costs.memory.keys() == {"total"}
    assert costs.gmacs["total"] * 1e9 == pytest.approx(3 * 8 * 8 * 4)
    assert math.isnan(costs.gmacs["forward"])
    assert tokens is None


def test_memory_is_watched_once_a_stage(monkeypatch: pytest.MonkeyPatch, sana: Peer):
    calls = []

    def scripted(call: Any, device: Any, resident: Any) -> Memory:
        calls.append(1)
        call()
        return Memory(len(calls), 0, None, "scripted")

    monkeypatch.setattr(peer_stages, "peak_memory", scripted)
    found = peer_stages.memory_by_stage(sana, PeerSettings(32, 2, 3.0, 1, 0), PROMPTS)
    assert {name: memory.peak_bytes for name, memory in found.items()} == {
        "text": 1,
        "denoise": 2,
        "decode": 3,
        "total": 4,
    }
