"""`bench --memory`, and what is said where memory is full: scripted, as no test should fill a machine."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from sana_lab import __main__, api
from sana_lab.bench import bench, memory_advice
from sana_lab.bench.memory_advice import SamplingPass, training_advice
from sana_lab.bench.memory_table import memory_record, table
from sana_lab.config import experiments, specs
from sana_lab.config.specs import SpecError
from sana_lab.costs.out_of_memory import OutOfMemory, advise_on_out_of_memory, describe_out_of_memory
from sana_lab.diffusion.sampling import Sampling
from sana_lab.evaluation import evaluate
from sana_lab.pretrained import loading
from sana_lab.systems import text2image
from sana_lab.systems.offload import Offload
from sana_lab.systems.text2image import TextToImage
from sana_lab.training import train

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")


def experiment(*overrides: str) -> dict[str, Any]:
    return experiments.load("shapes_sana", overrides)


def full(*_: Any, **__: Any) -> Any:
    raise FULL


def system(**changes: Any) -> TextToImage:
    net: TextToImage = tiny.text2image().eval()
    net.experiment = {**experiment(), **changes}
    return net


class TestTable:
    @pytest.mark.slow
    def test_the_released_size_by_component(self, capsys: pytest.CaptureFixture[str], tmp_path: Path):
        """0.6B at 1024 px: parameters as published, two bytes each, and what the issue of memory comes down to."""
        pytest.importorskip("torchao")
        file = tmp_path / "memory.json"
        assert __main__.main(["bench", "sana_600m_1024", "--memory", "--json", str(file)]) == 0
        record = json.loads(file.read_text())
        parts, rows = record["components"], record["configurations"]
        assert {k: round(v["params_m"], 1) for k, v in parts.items()} == {
            "text_encoder": 2614.3,
            "dit": 591.7,
            "autoencoder": 312.3,
        }
        for one in parts.values():
            assert one["weights"] == pytest.approx(2e6 * one["params_m"] / 2**30, rel=1e-3)
        assert parts["dit"]["int8"] < 0.53 * parts["dit"]["weights"]
        assert rows["all on the device"]["free"]["8"] < 0 < rows["all on the device"]["free"]["16"]
        assert rows["+ offload"]["free"]["8"] > 1
        peaks = [row["peak"] for row in rows.values()]
        assert peaks[0] == max(peaks)
        printed = capsys.readouterr().out
        assert "computed, not measured on a GPU" in printed.splitlines()[0]
        assert [line.split()[0] for line in printed.splitlines()[2:5]] == [*parts]

    def test_without_torchao_its_rows_are_left_out_and_said_to_be(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("sana_lab.systems.quantize.installed", lambda: False)
        record = memory_record(experiment(), 64)
        assert not any("int8" in name or "w8a8" in name for name in record["configurations"])
        assert "needs torchao" in record["notes"][-1]
        assert "int8" not in record["components"]["dit"]
        assert "tile=1 alone" in table(record)

    def test_the_batch_counts(self):
        one, many = (
            memory_record(experiment(), 64, batch)["configurations"]["+ offload"]["activations"] for batch in (1, 4)
        )
        assert many["decode"] == pytest.approx(4 * one["decode"], rel=0.02)
        assert many["denoise"] > 3 * one["denoise"]

    def test_what_draws_no_images_has_none(self):
        with pytest.raises(SpecError, match=r"text2image system; this .* 'autoencoder'"):
            memory_record(experiments.load("shapes_vae_f8"))

    def test_of_a_model_that_is_no_experiment(self, capsys: pytest.CaptureFixture[str], sana_folder: Path):
        assert __main__.main(["bench", str(sana_folder), "--memory"]) == 1
        assert "for an experiment" in capsys.readouterr().err


class TestAdvice:
    def test_it_ends_the_line(self):
        with (
            pytest.raises(OutOfMemory) as caught,
            advise_on_out_of_memory(lambda: ["a", "b"]),
            describe_out_of_memory("decoding"),
        ):
            raise FULL
        assert str(caught.value) == (
            "out of memory while decoding: CUDA out of memory. Tried to allocate 2.00 GiB. a; b"
        )

    @pytest.mark.parametrize("error", [MemoryError(), FULL])
    def test_also_where_nobody_said_what_was_done(self, error: BaseException):
        with pytest.raises(OutOfMemory, match=r"^out of memory: .*\. a$"), advise_on_out_of_memory(lambda: ["a"]):
            raise error

    def test_other_errors_stay(self):
        with pytest.raises(KeyError), advise_on_out_of_memory(lambda: ["a"]):
            raise KeyError

    def test_drawing_says_what_would_fit(self):
        net = system()
        tips = SamplingPass(net, 64, 8, Sampling(), "eval.batch").advice()
        assert tips[0].startswith("computed peak: ")
        assert [tip.split(" ")[0] for tip in tips[1:3]] == ["eval.batch=1", "system.autoencoder.tile=2"]
        assert not any("offload" in tip for tip in tips)  # it is on the CPU

    def test_on_a_gpu_networks_can_visit(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(SamplingPass, "_device_type", lambda self: "cuda")
        net = system()
        tips = SamplingPass(net, 64, 1, Sampling(), "eval.batch").advice()
        named = [tip.rpartition(" GiB")[0].rpartition(" ")[0] for tip in tips[1:]]
        both = "sampling.offload=true with system.autoencoder.tile=2"
        assert named[:3] == ["system.autoencoder.tile=2", "sampling.offload=true", both]
        net.offload, net.autoencoder.tile = Offload("cpu"), 2
        assert not any(
            "offload" in tip or "tile" in tip for tip in SamplingPass(net, 64, 1, Sampling(), "n").advice()[1:]
        )

    def test_parts_that_cannot_be_counted_get_words(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(memory_advice, "MemoryCounter", full)
        assert SamplingPass(system(), 32, 8, Sampling(), "eval.batch").advice() == [
            "try a smaller eval.batch, system.autoencoder.tile=8, sampling.quantize=int8"
        ]

    def test_training_counts_what_the_batch_does_not_change(self):
        held, tips = training_advice(experiment("data.batch=64", "trainer.accumulate=2"))
        with torch.device("meta"):
            made = specs.build("system", experiment()["system"])
        trained = sum(p.numel() for m in (made.dit, made.text_encoder) for p in m.parameters())
        assert held.startswith(f"computed: {20 * trained / 2**30:.2f} GiB for weights, gradients")
        compact, _ = training_advice(experiment("data.batch=64", "system.optimizer={name: came}"))
        assert compact.startswith(
            f"computed: {16 * trained / 2**30:.2f} GiB for weights, gradients, the optimiser's state"
        )
        assert "data.batch=32 with trainer.accumulate=4" in tips
        assert "system.dit.checkpointing=true" in tips


class TestVerbs:
    """Each says in one line what it was doing and what would fit, and ends with 1."""

    def said(self, capsys: pytest.CaptureFixture[str], *words: str) -> str:
        assert __main__.main(list(words)) == 1
        error = capsys.readouterr().err.strip().splitlines()
        assert error[-1].startswith("sana-lab: out of memory")
        return error[-1]

    def test_sample(self, capsys, monkeypatch, here: Path):
        net = system()
        monkeypatch.setattr(api, "load", lambda *_: net)
        monkeypatch.setattr(net.autoencoder, "decode", full)
        line = self.said(capsys, "sample", "a ring", "a cross", "--out", str(here), "--set", "x=1")
        assert "while decoding 2 images of 64 x 64 pixels: CUDA out of memory. Tried to allocate 2.00 GiB" in line

    def test_eval(self, capsys, monkeypatch, here: Path):
        net = system(eval={**experiment()["eval"], "prompts_per_task": 1, "held_out": 4, "batch": 4})
        monkeypatch.setattr(loading, "open_model", lambda *_: net)
        monkeypatch.setattr(text2image, "guided", full)
        line = self.said(capsys, "eval", "shapes_sana")
        assert "while denoising 4 images of 64 x 64 pixels" in line
        assert "; eval.batch=1 " in line

    def test_bench(self, capsys, monkeypatch, here: Path):
        monkeypatch.setattr(bench, "bench_experiment", full)
        line = self.said(capsys, "bench", "shapes_sana", "--batch", "4")
        assert "computed peak: " in line
        assert "; --batch=1 " in line

    def test_train(self, monkeypatch, here: Path):
        monkeypatch.setattr(train, "_fit", full)
        with pytest.raises(OutOfMemory, match=r"memory: .* 2.00 GiB. computed: 0.0\d GiB for weights, .*; try data"):
            train.train(experiments.load("shapes_vae_f8", ["trainer.max_steps=3"]))

    def test_judging_reaches_it_from_python(self, monkeypatch):
        net = system()
        monkeypatch.setattr(net.text_encoder, "forward", full)
        with pytest.raises(OutOfMemory, match="while reading"):
            evaluate.evaluate(net)
