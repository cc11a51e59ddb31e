"""Images from blocks: every part times its calls is the whole, in operations; nothing stays allocated."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from sana_lab.bench.parts import STAGES, Part
from sana_lab.bench.probes import ProbeSettings
from sana_lab.bench.probes.image_blocks import Context
from sana_lab.config import specs
from sana_lab.config.specs import SpecError
from sana_lab.costs.flops import count_macs

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def probe(name: str, **options: Any) -> Any:
    return specs.build("probe", {"name": name, **options})


def macs_by_stage(parts: list[Part]) -> Counter[str]:
    """Operations of each part alone, times its calls."""
    macs: Counter[str] = Counter()
    for part in parts:
        with part.allocate() as call, torch.no_grad():
            macs[part.stage] += int(part.calls * count_macs(call))
    return macs


EXPERIMENTS = {
    "a VAE and one block": {},
    "DC-AE, a hybrid of four blocks, an interval of guidance": {
        "system.dit": {"depth": 4, "patch": 1, "attention": ["linear", {"name": "softmax", "head_dim": 8}]},
        "system.autoencoder": tiny.DCAE,
        "sampling": {"steps": 6, "guidance_interval": [0.2, 0.8]},
    },
    "an LLM that ignores its cache, no guidance": {
        "system.text_encoder": {**tiny.LLM, "layers": 3},
        "system.dit": {"depth": 3},
        "sampling": {"solver": "dpmpp", "steps": 3, "guidance": 1.0},
    },
}


@pytest.mark.parametrize("changes", EXPERIMENTS.values(), ids=EXPERIMENTS.keys())
def test_parts_times_their_calls_are_the_operations_of_the_image(here: Path, changes: dict[str, Any]):
    tiny.write_experiment(here, changes=changes)
    blocks = probe("image_blocks", experiment="tiny", size=64)
    parts, whole = blocks.parts(CPU), blocks.whole(CPU)
    assert macs_by_stage(parts) == macs_by_stage(whole)
    assert sum(macs_by_stage(parts).values()) / 1e12 == pytest.approx(blocks.count()["tmacs_image"], rel=1e-9)


def test_only_one_block_is_ever_allocated(here: Path):
    tiny.write_experiment(here, changes={"system.dit": {"depth": 4}, "system.text_encoder.layers": 3})
    blocks = probe("image_blocks", experiment="tiny", size=64)
    context = Context(blocks, CPU)
    parts = [*context.text(), *context.denoise(), *context.decode()]
    system = context.system
    assert all(p.is_meta for p in system.parameters())
    block = next(p for p in parts if "denoiser: Block" in p.name)
    assert block.calls == 2 * 4  # steps x depth
    with block.allocate():
        assert all(p.is_meta for p in system.parameters())
    assert {p.stage for p in parts} == set(STAGES)


def test_an_image_is_timed_from_blocks(here: Path):
    tiny.write_experiment(here)
    metrics = probe("image_blocks", experiment="tiny", size=64).measure(ProbeSettings(CPU, 2, 1))
    assert metrics["blocks_rounds"] == 2
    assert metrics["blocks_latency_s_low"] <= metrics["blocks_latency_s"] <= metrics["blocks_latency_s_high"]
    assert metrics["blocks_latency_s"] > metrics["blocks_denoise_s"] > 0


def test_a_denoiser_without_depth_is_refused(here: Path):
    (here / "flat_dit.py").write_text(
        "from sana_lab.models.dit import Dit\n"
        "class Flat(Dit):\n"
        "    def __init__(self, *, channels: int, text_dim: int) -> None:\n"
        "        super().__init__()\n"
        "    def forward(self, x, t, text, guidance=None):\n"
        "        return x\n"
    )
    experiment = tiny.EXPERIMENT.replace("{name: sana, dim: 32, depth: 1, cross_heads: 2}", "{name: 'flat_dit:Flat'}")
    tiny.write(here, "experiments/flat.yaml", experiment)
    with pytest.raises(SpecError, match="has no options depth and attention, of which blocks are multiplied; expected"):
        probe("image_blocks", experiment="flat")


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"best_of": 4, "best_by": "clip_shapes"}, "sampling.best_of is 4, which probe image_blocks does not time"),
        ({"pag": 3.0}, "sampling.pag is 3.0, .* expected 0, or probe image"),
        ({"quantize": "int8"}, "sampling.quantize is 'int8', .* expected none, or probe image"),
    ],
)
def test_sampling_that_blocks_do_not_show_is_refused(here, sampling, words):
    tiny.write_experiment(here)
    with pytest.raises(SpecError, match=words):
        probe("image_blocks", experiment="tiny", sampling=sampling)


@pytest.mark.parametrize(
    "name",
    [
        "sd3_medium",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("flux_dev", "flux_schnell", "pixart_sigma", "hunyuan_dit")),
    ],
)
def test_parts_of_a_pipeline_are_its_operations(name: str):
    pytest.importorskip("diffusers")
    blocks = probe("peer_blocks", pipeline=name, size=64, steps=3, toy=True)
    macs = macs_by_stage(blocks.parts(CPU))
    assert sum(macs.values()) / 1e12 == pytest.approx(blocks.count()["tmacs_image"], rel=1e-9)
