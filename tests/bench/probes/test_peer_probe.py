"""Published pipelines, by their shapes: against stated parameters, closed forms, and calls of real networks."""

from typing import Any

import pytest
import torch

from sana_lab.bench.probes import ProbeSettings
from sana_lab.bench.probes.peer import extrapolate
from sana_lab.config import specs
from sana_lab.config.specs import SpecError
from sana_lab.peers import random_init
from sana_lab.peers.configs import PEERS

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STATED = {"flux_dev": 11.9, "flux_schnell": 11.9, "sd3_medium": 2.03, "pixart_sigma": 0.61, "hunyuan_dit": 1.5}
"""10^9 parameters of the denoisers: Black Forest Labs' card (12), SD3 (arXiv 2403.03206, 2), PixArt-Sigma
(arXiv 2403.04692, 0.6), Hunyuan-DiT (arXiv 2405.08748, 1.5); with the digits of SANA's Table 7 and of the weights."""

ENCODERS = {"flux_dev": 4.89, "sd3_medium": 5.58, "pixart_sigma": 4.76, "hunyuan_dit": 2.02}
"""10^9 parameters of all text encoders: T5-XXL 4.762, CLIP-L 0.123, CLIP-G 0.695; BERT 0.35 with mT5-XL 1.67."""


@pytest.mark.parametrize("name", PEERS)
def test_parameters_are_those_that_are_stated(name: str):
    peer = random_init.build(name, 1024, torch.device("meta"), torch.float32)
    found = random_init.count_parameters(peer)
    assert found["denoiser"] / 1e9 == pytest.approx(STATED[name], rel=0.005)
    if name in ENCODERS:
        text = sum(p.numel() for n, m in peer.networks.items() if n.startswith("text") for p in m.parameters())
        assert text / 1e9 == pytest.approx(ENCODERS[name], rel=0.005)


def probe(name: str, **options: Any) -> Any:
    return specs.build("probe", {"name": "peer", "pipeline": name, **options})


def flux_macs(image: int, text: int) -> int:
    """Of FLUX's blocks: joint attention over image and text, 19 of two streams and 38 of one; the ends beside."""
    d, n = 3072, image + text
    attention = 2 * n * n * d
    double = n * (4 * d * d + 8 * d * d) + attention + 2 * 6 * d * d  # modulation of either stream, once a picture
    single = n * (3 * d * d + 4 * d * d + 5 * d * d) + attention + 3 * d * d
    ends = image * 64 * d * 2 + text * 4096 * d + 2 * d * d  # latents in and out, text in, the last modulation
    embeds = 2 * (256 * d + d * d) + 768 * d + d * d  # time, guidance, pooled text
    return 19 * double + 38 * single + ends + embeds


def test_a_forward_of_flux_is_its_closed_form():
    found = probe("flux_dev", size=512, steps=1).count()
    assert (found["tokens"], found["text_tokens"], found["evaluations"]) == (1024, 512, 1)
    assert found["tmacs"] * 1e12 == flux_macs(1024, 512)


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [("flux_schnell", 256, 1), ("sd3_medium", 77 + 256, 2), ("pixart_sigma", 300, 2), ("hunyuan_dit", 77 + 256, 2)],
)
def test_texts_are_as_long_as_the_pipelines_pad_them_and_guidance_doubles_the_batch(name: str, text: int, rows: int):
    spec = PEERS[name]
    _, counts = random_init.count(name, "a cat", 256, 4, spec["guidance"], toy=True)
    assert (counts.text_tokens, counts.rows, counts.evaluations, counts.tokens) == (text, rows, 4, 256)
    assert counts.macs["denoise"] == 4 * rows * counts.forward


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "sd3_medium")) for n in PEERS])
def test_what_is_counted_on_the_meta_device_is_what_runs(name: str):
    """A toy pipeline with numbers: the same MACs as without, and images."""
    from sana_lab.bench.peer_stages import PeerSettings, count_peer

    guidance = PEERS[name]["guidance"]
    _, counts = random_init.count(name, "a cat", 64, 2, guidance, toy=True)
    peer = random_init.build(name, 64, torch.device("cpu"), torch.float32, toy=True)
    macs, _ = count_peer(peer, PeerSettings(64, 2, guidance, 1, 0), ["a cat"])
    for stage, count in counts.macs.items():
        assert count / 1e9 == pytest.approx(macs[stage], rel=1e-9), stage
    assert peer.sample(["a cat"], size=64, steps=2, guidance=guidance).shape == (1, 3, 64, 64)


def test_positions_of_sd3_reach_as_far_as_the_picture():
    transformer = PEERS["sd3_medium"]["components"]["transformer"]
    small, large = (random_init._fit_positions(transformer, size) for size in (1024, 4096))
    assert [p["config"]["pos_embed_max_size"] for p in (small, large)] == [192, 256]


def test_a_run_is_extended_by_the_time_of_its_steps():
    """Fixed 3 s and 0.5 s a step: seen through runs of 2 and 5 steps."""
    assert extrapolate(3 + 2 * 0.5, 3 + 5 * 0.5, 3, 50) == pytest.approx(3 + 50 * 0.5)


@pytest.mark.parametrize("measured", [pytest.param(None, marks=pytest.mark.slow), 1])
def test_a_toy_is_timed(measured: int | None):
    timed = probe("pixart_sigma", size=64, steps=4, toy=True, measured_steps=measured)
    found = timed.measure(ProbeSettings(torch.device("cpu"), 2, 0))
    assert found["latency_s_low"] <= found["latency_s"] <= found["latency_s_high"]
    assert found["images_per_s"] == pytest.approx(1 / found["latency_s"])
    assert found["peak_gib"] > 0


def test_an_unknown_pipeline_is_refused():
    with pytest.raises(SpecError, match="no pipeline is known as 'flux_def'; did you mean 'flux_dev'"):
        probe("flux_def")
