"""The cost of a tiny real system against closed forms."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sana_lab import config
from sana_lab.bench import bench, count_evaluations, evaluation_times, main, table
from sana_lab.diffusion.flow import Flow
from sana_lab.diffusion.sampling import Sampling
from sana_lab.parts import SpecError
from sana_lab.systems.text2image import TextToImage
from sana_lab.text import TextEncoder
from sana_lab.types import Text

DIM, DEPTH, CHANNELS, LENGTH, TEXT = 64, 2, 4, 12, 24


class Letters(TextEncoder):
    """One row of a table per letter."""

    dim = TEXT
    max_tokens = LENGTH
    pretrained = False

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(128, TEXT)

    def forward(self, prompts: Sequence[str]) -> Text:
        codes = torch.tensor([[ord(c) % 128 for c in p[:LENGTH].ljust(LENGTH)] for p in prompts])
        return Text(self.table(codes), torch.ones_like(codes, dtype=torch.bool))


def system(**dit: Any) -> TextToImage:
    return TextToImage(
        dit={"name": "sana", "dim": DIM, "depth": DEPTH, "cross_heads": 4, **dit},
        autoencoder={"name": "vae", "widths": [8, 8, 8], "depth": 1, "latent": CHANNELS, "groups": 4},
        text_encoder=f"{__name__}:Letters",
    )


def macs_of_a_forward(n: int) -> int:
    """Softmax attention, MLP of ratio 4, n tokens, one caption of LENGTH tokens."""
    attention = 4 * n * DIM**2 + 2 * n**2 * DIM
    cross = 2 * n * DIM**2 + 2 * LENGTH * DIM**2 + 2 * n * LENGTH * DIM
    mlp = 8 * n * DIM**2
    time = 256 * DIM + DIM**2 + 6 * DIM**2
    caption = LENGTH * (TEXT * DIM + DIM**2)
    ends = 2 * n * CHANNELS * DIM
    return DEPTH * (attention + cross + mlp) + time + caption + ends


def macs_of_text(rows: int) -> int:
    """Caption projection, keys and values: what is prepared once."""
    return rows * LENGTH * (TEXT * DIM + DIM**2 + DEPTH * 2 * DIM**2)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return bench(system(attention="softmax", ffn="mlp"), Sampling("heun", 3, 4.5), 32, repeats=2)


def test_macs_are_the_closed_form(record: dict[str, Any]):
    assert record["tokens"] == 64
    assert record["gmacs"] * 1e9 == pytest.approx(macs_of_a_forward(64), abs=0.5)


def test_macs_of_a_guided_pair_are_the_papers_counting(record: dict[str, Any]):
    """Two rows of the closed form with 300 caption tokens, less the products of queries with the caption's keys."""
    longer = 300 - LENGTH
    caption = longer * (TEXT * DIM + DIM**2 + DEPTH * 2 * DIM**2)
    row = macs_of_a_forward(64) - DEPTH * 2 * 64 * LENGTH * DIM + caption
    assert record["tmacs_pair"] * 1e12 == pytest.approx(2 * row, abs=0.5)
    assert any("Table 8" in note for note in record["notes"])


def test_macs_of_an_image_count_both_halves_of_guidance_and_prepare_once(record: dict[str, Any]):
    step = 2 * (macs_of_a_forward(64) - macs_of_text(1))
    assert record["settings"]["evaluations"] == 5
    assert record["stages"]["denoise"]["gmacs"] * 1e9 == pytest.approx(5 * step + macs_of_text(2), abs=0.5)
    assert record["stages"]["text"]["gmacs"] == 0  # a table look-up multiplies nothing
    assert record["gmacs_image"] == pytest.approx(sum(record["stages"][s]["gmacs"] for s in ("denoise", "decode")))


def test_parameters_by_stage(record: dict[str, Any]):
    found = {name: stage["params_m"] for name, stage in record["stages"].items()}
    assert found["text"] * 1e6 == 128 * TEXT
    assert found["total"] == record["params_m"] == pytest.approx(found["text"] + found["denoise"] + found["decode"])
    assert record["stages"]["decode"]["trainable_m"] == 0


def test_peaks_hold_the_weights_of_all_stages(record: dict[str, Any]):
    net = system(attention="softmax", ffn="mlp")
    held = [t for m in (net.text_encoder, net.dit, net.autoencoder) for t in (*m.parameters(), *m.buffers())]
    weights = sum(t.numel() for t in held) * 4 / 2**20
    assert record["weights_mib"] == pytest.approx(weights)
    peaks = {name: stage["peak_mib"] for name, stage in record["stages"].items()}
    activation = 8 * 32 * 32 * 4 / 2**20  # the decoder's last width at full size
    assert peaks["decode"] > weights + 2 * activation
    assert peaks["total"] == max(peaks.values()) == record["peak_mib"]


def test_latency_and_throughput_at_batch_one_are_one_number(record: dict[str, Any]):
    assert record["images_per_s"] == pytest.approx(1 / record["latency_s"])
    for stage in record["stages"].values():
        assert 0 < stage["low_s"] <= stage["latency_s"] <= stage["high_s"]


def test_a_record_is_plain_data_with_its_definitions(record: dict[str, Any]):
    assert json.loads(json.dumps(record)) == record
    text = table(record)
    assert "3 heun steps, 5 evaluations" in text
    assert [line.split()[0] for line in text.splitlines()[2:6]] == ["text", "denoise", "decode", "total"]


def test_measured_steps_stand_for_all():
    found = bench(system(), Sampling("euler", 40, 1.0), 16, repeats=2, measured_steps=3)
    stages = found["stages"]
    assert stages["total"]["latency_s"] == pytest.approx(
        sum(stages[s]["latency_s"] for s in ("text", "denoise", "decode"))
    )
    assert any("median of 3 evaluations times 40" in note for note in found["notes"])
    assert any("without guidance" in note for note in found["notes"][2:])


def test_a_batch_needs_more_memory_and_leaves_macs_alone():
    one, four = (bench(system(), Sampling("euler", 1), 32, batch, repeats=1, warmup=0) for batch in (1, 4))
    assert four["peak_mib"] - four["weights_mib"] > 3 * (one["peak_mib"] - one["weights_mib"])
    assert four["gmacs"] == one["gmacs"]
    assert four["gmacs_image"] == one["gmacs_image"]


def test_modes_are_put_back_and_nothing_is_trained():
    net = system()
    net.dit.train()
    net.autoencoder.eval()
    before = {k: v.clone() for k, v in net.dit.state_dict().items()}
    bench(net, Sampling("euler", 1), 16, repeats=1, warmup=0)
    assert net.dit.training
    assert not net.autoencoder.training
    assert all(torch.equal(v, before[k]) for k, v in net.dit.state_dict().items())
    assert all(p.grad is None for p in net.dit.parameters())


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 7), ("heun", 13), ("dpmpp", 7), ("rf_solver", 14)])
def test_evaluations_of_each_solver(solver: str, evaluations: int):
    assert count_evaluations(Sampling(solver, 7), Flow()) == evaluations


def test_guidance_in_an_interval_is_paid_for_there_alone():
    """Ten steps without a shift see t 1.0 to 0.1; four of them lie from 0.25 to 0.65."""
    net, plain = system(), Sampling("euler", 10, 3.0, shift=1.0)
    times = evaluation_times(replace(plain, guidance_interval=(0.25, 0.65)), Flow())
    assert [(round(t, 3), n) for t, n in times.items()] == [(0.6, 4), (1.0, 6)]
    runs = [replace(plain, guidance_interval=i) for i in (None, (0.25, 0.65), (0.0, 0.05))]
    runs.append(replace(plain, guidance=1.0))
    found = [bench(net, run, 16, repeats=1, measured_steps=1, warmup=0) for run in runs]
    every, some, none, alone = (f["stages"]["denoise"]["gmacs"] for f in found)
    assert every > some > none >= alone
    assert some - none == pytest.approx(0.4 * (every - alone), rel=0.1)
    assert any("2 B each from t 0.25 to 0.65, of B elsewhere" in note for note in found[1]["notes"])


@pytest.mark.parametrize(
    ("size", "batch", "prompts", "message"),
    [
        (30, 1, ["a"], "nearest is 32 x 32"),
        (0, 1, ["a"], "nearest is 8 x 8"),
        (32, 0, ["a"], "at least 1"),
        (32, 1, [], "at least one text"),
        (32, 1, "a red circle", "a list"),
    ],
)
def test_what_cannot_be_measured(size: int, batch: int, prompts: Any, message: str):
    with pytest.raises(ValueError, match=message):
        bench(system(patch=2), Sampling(), size, batch, prompts)


def experiment(**options: Any) -> dict[str, Any]:
    parts = {
        "dit": {"name": "sana", "dim": DIM, "depth": 1, "cross_heads": 4},
        "autoencoder": {"name": "dcae", "widths": [8, 16], "encoder_depths": [1, 1], "decoder_depths": [1, 1]},
        "text_encoder": {"name": "llm", "width": 16, "layers": 1, "max_tokens": 16},
    }
    parts["autoencoder"] |= {"attention_stages": 1, "head_dim": 8, "latent": 4, "weights": "no/such/file.safetensors"}
    sampling = {"solver": "euler", "steps": 2, "guidance": 3.0}
    system = {"name": "text2image", **parts}
    return complete(system, sampling=sampling, **options)


def complete(system: dict[str, Any], **options: Any) -> dict[str, Any]:
    defaults = {"sampling": {}, "trainer": {}, "eval": {}, "prompts": []}
    return config.complete({"system": system, "data": {"name": "shapes", "size": 16}, **defaults, **options})


def test_the_verb_needs_no_weights_and_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "bench.json"
    main(experiment(eval={"bench_steps": 1}), size=None, batch=2, repeats=1, json_file=file)
    record = json.loads(file.read_text())
    assert (record["size"], record["batch"], record["tokens"]) == (16, 2, 64)
    assert record["settings"]["sampling"]["solver"] == {"name": "euler"}
    assert record["stages"]["text"]["gmacs"] > 0
    assert capsys.readouterr().out.strip() == table(record)


def test_the_verb_refuses_before_it_measures(tmp_path: Path):
    with pytest.raises(ValueError, match="there is no folder"):
        main(experiment(), size=None, batch=1, repeats=1, json_file=tmp_path / "missing" / "bench.json")
    alone = complete({"name": "autoencoder", "autoencoder": "vae"})
    with pytest.raises(SpecError, match="trains 'autoencoder'"):
        main(alone, size=None, batch=1, repeats=1, json_file=None)
