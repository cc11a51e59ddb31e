"""The cost of a tiny real system against closed forms."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from sana_lab.bench import stages
from sana_lab.bench.bench import bench, bench_peer, main, main_peer, table
from sana_lab.bench.record import compile_mode
from sana_lab.bench.stages import evaluation_times
from sana_lab.config import experiments
from sana_lab.config.specs import SpecError
from sana_lab.costs import nvml
from sana_lab.diffusion.flow import Flow
from sana_lab.diffusion.sampling import Sampling
from sana_lab.models.text import TextEncoder
from sana_lab.peers.pipeline import Peer
from sana_lab.systems.text2image import TextToImage
from sana_lab.types import Text

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""diffusers' schedulers hand tensors to NumPy in a way that NumPy 2 is about to refuse."""

DIM, DEPTH, CHANNELS, LENGTH, TEXT = 64, 2, 4, 12, 24
TIME = 256 * DIM + DIM**2 + 6 * DIM**2
"""MACs of one time's modulation."""


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
        dit={**tiny.DIT, "dim": DIM, "depth": DEPTH, "cross_heads": 4, **dit},
        autoencoder={**tiny.VAE, "widths": [8, 8, 8], "latent": CHANNELS},
        text_encoder=f"{__name__}:Letters",
    )


def macs_of_a_forward(n: int) -> int:
    """Softmax attention, MLP of ratio 4, n tokens, one caption of LENGTH tokens."""
    attention = 4 * n * DIM**2 + 2 * n**2 * DIM
    cross = 2 * n * DIM**2 + 2 * LENGTH * DIM**2 + 2 * n * LENGTH * DIM
    mlp = 8 * n * DIM**2
    caption = LENGTH * (TEXT * DIM + DIM**2)
    ends = 2 * n * CHANNELS * DIM
    return DEPTH * (attention + cross + mlp) + TIME + caption + ends


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
    """Heun's five evaluations are at three times, whose modulation both halves share."""
    step = 2 * (macs_of_a_forward(64) - macs_of_text(1) - TIME)
    assert record["settings"]["evaluations"] == 5
    assert record["stages"]["denoise"]["gmacs"] * 1e9 == pytest.approx(5 * step + 3 * TIME + macs_of_text(2), abs=0.5)
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
    for stage in record["stages"].values():
        assert weights <= stage["resident_mib"] < stage["peak_mib"]
        assert stage["reserved_mib"] is None  # the CPU has no allocator of PyTorch's own
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


def test_percentiles_say_no_more_than_two_calls_can(record: dict[str, Any]):
    for stage in record["stages"].values():
        assert stage["n"] == 2
        assert stage["p50"]["value"] == stage["latency_s"]
        assert stage["p90"]["value"] is None
        assert stage["p99"]["high"] is None
    text = table(record)
    assert "p50 6, p90 36, p99 368; here 2, too few for p50, p90, p99" in text


def test_the_first_call_is_told_apart(record: dict[str, Any]):
    firsts = [record["stages"][name]["first_s"] for name in ("text", "denoise", "decode", "total")]
    assert all(first > 0 for first in firsts)
    assert firsts[3] == pytest.approx(sum(firsts[:3]))


def test_settings_hold_what_a_trustworthy_row_states(record: dict[str, Any]):
    settings = record["settings"]
    assert settings["dtype"] == settings["dtype"] | {"dit": "float32", "autoencoder": "float32"}
    assert set(settings["compile"].values()) == {"eager"}
    assert (settings["gpu"], settings["cuda"]) == (None, None)
    assert "no supported energy counter" in settings["driver_missing"]
    assert settings["rows_a_forward"] == "2 B"
    assert (record["prompt_tokens"], record["text_tokens"]) == (LENGTH, LENGTH)
    for key in ("cpu", "cores", "threads", "torch", "python", "platform", "sync", "inside", "warmup", "repeats"):
        assert settings[key] is not None


def test_compiled_networks_are_said_to_be():
    net = system().dit
    assert compile_mode(net) == "eager"
    net.blocks[0]._compiled_call_impl = net.blocks[0].forward  # as `compile()` does, which imports for seconds
    assert compile_mode(net) == "torch.compile"


def test_a_sweep_over_batches():
    found = bench(system(), Sampling("euler", 1), 16, repeats=1, max_batch=3)
    swept = found["sweep"]
    assert [trial["batch"] for trial in swept["trials"]] == [1, 2, 3]
    assert swept["ended_by"] == "the limit, 3"
    assert swept["images_per_s"] == max(trial["images_per_s"] for trial in swept["trials"])
    peaks = [trial["peak_mib"] for trial in swept["trials"]]
    assert peaks == sorted(peaks)
    assert json.loads(json.dumps(found)) == found
    assert f"at batch {swept['batch']}; ended by the limit, 3" in table(found)


def test_a_sweep_that_runs_out_of_memory(monkeypatch: pytest.MonkeyPatch):
    net = system()
    decode = net.autoencoder.decode

    def full(latents: torch.Tensor) -> torch.Tensor:
        if len(latents) > 2:
            raise torch.OutOfMemoryError("scripted")
        return decode(latents)

    monkeypatch.setattr(net.autoencoder, "decode", full)
    found = bench(net, Sampling("euler", 1), 16, repeats=1, max_batch=64)
    assert [trial["batch"] for trial in found["sweep"]["trials"]] == [1, 2]
    assert found["sweep"]["ended_by"] == "out of memory at batch 4: scripted"


class Meter:
    """A driver whose counter moves by five joules each time it is read."""

    def __init__(self) -> None:
        self.read = 0

    def joules(self) -> float:
        self.read += 1
        return 5.0 * self.read

    def facts(self) -> dict[str, Any]:
        return {"power_limit_w": 350}


def test_energy_by_stage_where_the_driver_counts_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nvml, "find_device", lambda device: (Meter(), ""))
    monkeypatch.setattr(stages, "clock_for", lambda device: lambda call: (call(), (1.0, None))[1])
    found = bench(system(), Sampling("euler", 1), 16, repeats=1, energy_s=2.0)
    used = {name: stage["energy_j"] for name, stage in found["stages"].items()}
    assert used == {"text": 2.5, "denoise": 2.5, "decode": 2.5, "total": 2.5}
    assert found["energy_j"] == 2.5
    assert found["settings"]["gpu"] == {"power_limit_w": 350}
    assert any("the driver's counter" in note for note in found["notes"])


def test_no_energy_says_why(record: dict[str, Any]):
    assert record["energy_j"] is None
    assert "energy_j: not measured: not requested" in record["notes"]
    found = bench(system(), Sampling("euler", 1), 16, repeats=1, energy_s=1.0)
    assert any("not measured: a cpu device has no supported energy counter" in note for note in found["notes"])


def test_measured_steps_stand_for_all():
    found = bench(system(), Sampling("euler", 40, 1.0), 16, repeats=2, measured_steps=3)
    stages = found["stages"]
    assert stages["total"]["latency_s"] == pytest.approx(
        sum(stages[s]["latency_s"] for s in ("text", "denoise", "decode"))
    )
    assert any("median of 3 evaluations times 40" in note for note in found["notes"])
    assert any("without guidance" in note for note in found["notes"][2:])
    assert "p90" in stages["text"]
    assert "p90" not in stages["denoise"]


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
    assert sum(evaluation_times(Sampling(solver, 7), Flow()).values()) == evaluations


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
        "dit": tiny.DIT,
        "autoencoder": {**tiny.VAE_2X, "weights": "no/such/file.safetensors"},
        "text_encoder": tiny.LLM,
    }
    sampling = {"solver": "euler", "steps": 2, "guidance": 3.0}
    system = {"name": "text2image", **parts}
    return complete(system, sampling=sampling, **options)


def complete(system: dict[str, Any], **options: Any) -> dict[str, Any]:
    defaults = {"sampling": {}, "trainer": {}, "eval": {}, "prompts": []}
    return experiments.complete({"system": system, "data": {"name": "shapes", "size": 16}, **defaults, **options})


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


# --- peers


@pytest.fixture(scope="module")
def peer_record() -> dict[str, Any]:
    import tiny_peers

    peer = Peer(tiny_peers.sana_pipeline())
    return bench_peer(peer, 32, steps=2, guidance=4.5, repeats=1, batch=2, max_batch=2)


def test_a_peers_record_has_the_same_columns(peer_record: dict[str, Any], record: dict[str, Any]):
    assert peer_record.keys() - {"sweep"} <= record.keys()
    assert peer_record["stages"].keys() == record["stages"].keys()
    for name, stage in peer_record["stages"].items():
        assert stage.keys() == record["stages"][name].keys()
        assert stage["peak_mib"] > peer_record["weights_mib"]
    assert json.loads(json.dumps(peer_record)) == peer_record
    assert [line.split()[0] for line in table(peer_record).splitlines()[2:6]] == ["text", "denoise", "decode", "total"]


def test_a_peers_work_is_the_sum_of_its_calls(peer_record: dict[str, Any]):
    """Two guided steps are four rows of the denoiser: four times what one call without guidance costs."""
    macs = {name: stage["gmacs"] for name, stage in peer_record["stages"].items()}
    assert macs["denoise"] == pytest.approx(4 * peer_record["gmacs"], rel=1e-6)
    assert macs["total"] == pytest.approx(macs["text"] + macs["denoise"] + macs["decode"])
    assert peer_record["gmacs_image"] == macs["total"]


def test_a_peers_parameters_and_latency(peer_record: dict[str, Any]):
    stage = peer_record["stages"]
    assert peer_record["params_m"] == pytest.approx(sum(stage[s]["params_m"] for s in ("text", "denoise", "decode")))
    assert stage["total"]["params_m"] == peer_record["params_m"]
    for each in stage.values():
        assert 0 < each["low_s"] <= each["latency_s"] <= each["high_s"]
        assert each["first_s"] > 0
    assert peer_record["settings"]["peer"]["pipeline"] == "SanaPipeline"
    assert [trial["batch"] for trial in peer_record["sweep"]["trials"]] == [1, 2]


def test_the_verb_measures_a_pipelines_folder(sana_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "peer.json"
    main_peer(str(sana_folder), size=32, batch=1, repeats=1, json_file=file, steps=2)
    record = json.loads(file.read_text())
    assert record["settings"]["peer"]["weights_sha256"].keys() >= {"vae/diffusion_pytorch_model.safetensors"}
    assert capsys.readouterr().out.strip() == table(record)
