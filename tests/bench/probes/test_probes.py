"""Probes of text encoders and attentions: what they count and what they time, against closed forms."""

from itertools import cycle
from typing import Any

import pytest
import tiny
import torch

from sana_lab.bench.probes import ProbeSettings
from sana_lab.bench.probes.attention import compare
from sana_lab.config import registry, specs
from sana_lab.config.specs import SpecError
from sana_lab.costs.flops import count_macs
from sana_lab.costs.timing import Call

CPU = torch.device("cpu")


def probe(name: str, **options: Any) -> Any:
    return specs.build("probe", {"name": name, **options})


# --- text


@pytest.mark.parametrize(
    ("encoder", "stated"),
    [
        ({"name": "t5", "model": "google/t5-v1_1-xxl"}, 4762),
        ({"name": "t5", "model": "google/t5-v1_1-large"}, 341),
        ({"name": "llm", "model": "google/gemma-2-2b-it"}, 2614),
        ({"name": "llm", "model": "google/gemma-2b-it"}, 2506),
    ],
)
def test_text_encoders_have_the_papers_parameters(encoder: dict[str, str], stated: int):
    found = probe("text", encoder=encoder).count()
    assert round(found["text_params_m"]) == stated
    assert found["text_tokens"] == 300


def test_macs_of_t5_are_its_closed_form():
    """Attention without biases over 300 tokens, and the gated feed-forward, in 24 layers."""
    found = probe("text", encoder={"name": "t5", "model": "google/t5-v1_1-large"}).count()
    n, d, hidden = 300, 1024, 2816
    assert found["text_gmacs"] * 1e9 == 24 * (4 * n * d * d + 2 * n * n * d + 3 * n * d * hidden)


def test_a_small_text_encoder_is_timed():
    found = probe("text", encoder=tiny.T5, batch=2).measure(ProbeSettings(CPU, 2, 1))
    assert 0 < found["text_s_low"] <= found["text_s"] <= found["text_s_high"]
    assert found["peak_gib"] > 0


# --- attention


def test_macs_of_both_attentions_are_their_closed_forms():
    found = probe("attention", tokens=64, dim=64, depth=1).count()
    n, d, heads, width = 64, 64, 2, 32
    assert found["softmax_core_gmacs"] * 1e9 == 2 * n * n * d
    assert found["linear_core_gmacs"] * 1e9 == heads * n * (2 * width * width + width)
    assert found["softmax_step_gmacs"] - found["linear_step_gmacs"] == pytest.approx(
        found["softmax_core_gmacs"] - found["linear_core_gmacs"]
    )


def test_both_attentions_are_timed_in_every_scope():
    found = probe("attention", tokens=16, dim=32, depth=1, cross_heads=2).measure(ProbeSettings(CPU, 3, 0))
    for scope in ("core", "core_train", "layer", "step"):
        assert found[f"{scope}_noise"] >= 0
        for name in ("softmax", "linear"):
            assert (
                0 < found[f"{name}_{scope}_ms_low"] <= found[f"{name}_{scope}_ms"] <= found[f"{name}_{scope}_ms_high"]
            )


def told(*rounds: tuple[float, float, float]) -> Any:
    """A clock that says what it is told: of one call each first, for the number of calls, then round by round."""
    times = cycle([1.0, 1.0, 1.0, *(t for one in rounds for t in one)])

    def clock(call: Call) -> tuple[float, None]:
        call()
        return next(times), None

    return clock


def test_a_ratio_is_the_median_over_rounds_with_its_bounds():
    pair: dict[str, Call] = {"a": lambda: None, "b": lambda: None}
    found = compare(pair, ProbeSettings(CPU, 3, 0), told((4.0, 2.0, 4.0), (6.0, 2.0, 4.1), (3.0, 1.0, 3.0)))
    assert (found.ratio, found.low, found.high) == (3.0, 2.0, 3.0)
    assert (found.first.median_s, found.second.median_s) == (4.0, 2.0)
    assert found.noise == 0


def test_no_ratio_where_the_first_differs_from_itself():
    """By its least times, of three rounds: 4 and 5 s."""
    pair: dict[str, Call] = {"a": lambda: None, "b": lambda: None}
    found = compare(pair, ProbeSettings(CPU, 3, 0), told((4.0, 2.0, 5.0), (6.0, 2.0, 6.0), (5.0, 1.0, 5.0)))
    assert found.ratio is None
    assert found.noise == pytest.approx(0.2)
    plain = found.columns("core", ("softmax", "linear"))
    assert "core_ratio" not in plain
    assert plain["softmax_core_ms"] == 5000.0


@pytest.mark.parametrize("name", sorted(registry.TABLE["attention"]))
def test_any_mixer_is_counted_and_timed(name: str):
    mixer = probe("mixer", mixer=name, tokens=16, dim=32)
    counts = mixer.count()
    layer = specs.build("attention", name, dim=32)
    assert round(counts["params_m"] * 1e6) == sum(p.numel() for p in layer.parameters())
    assert round(counts["gmacs"] * 1e9) == count_macs(lambda: layer(torch.zeros(1, 4, 4, 32)))
    times = mixer.measure(ProbeSettings(CPU, 3, 0))
    for metric in ("layer_ms", "layer_train_ms"):
        assert 0 < times[f"{metric}_low"] <= times[metric] <= times[f"{metric}_high"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"second": "conv"}, "attention 'conv' mixes no q, k and v; expected such as softmax; probe mixer takes any"),
        ({"tokens": 1000}, "tokens is 1000, expected a square number, such as 1024"),
        ({"second": "softmax"}, "both attentions are 'softmax', expected two of different names"),
    ],
)
def test_wrong_pairs(options: dict[str, Any], words: str):
    with pytest.raises(SpecError, match=words):
        probe("attention", **options)
