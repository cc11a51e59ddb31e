"""Several seeds of noise: which images are drawn, how they are grouped, and what the report says of each seed."""

from collections.abc import Sequence

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from sana_lab.config import experiments, hashing
from sana_lab.config.schema import Trial
from sana_lab.evaluation import Measure, Report, evaluate, noise_seeds
from sana_lab.evaluation.run_measures import Source, run
from sana_lab.intervals import clustered_share
from sana_lab.report import significance
from sana_lab.types import Json

ROWS = [{"prompt": f"picture {i}"} for i in range(5)]


class Numbers(Measure):
    """The numbers that images are filled with, two for each prompt and seed."""

    def __init__(self, seeds: int = 1) -> None:
        self.rows, self.images_per_prompt = ROWS, 2 * seeds
        self.values: list[float] = []
        self.prompts: list[str] = []

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        self.values += images[:, 0, 0, 0].tolist()
        self.prompts += [row["prompt"] for row in rows]

    def report(self) -> Report:
        return Report({"number": clustered_share(self.values, self.prompts)}, {}, {"number": self.values})


def painter(seed: int, calls: list[tuple[int, int]]):
    """Fills image i with 100 seed + i, and keeps (seed, images) of each call."""

    def paint(prompts: list[str], indices: list[int]) -> Tensor:
        calls.append((seed, len(indices)))
        return torch.tensor([100 * seed + i for i in indices], dtype=torch.uint8)[:, None, None, None].expand(
            -1, 3, 4, 4
        )

    return paint


@pytest.mark.parametrize("batch", [1, 3, 4, 64])
def test_images_of_a_prompt_stay_together_whatever_the_batch(batch: int):
    calls: list[tuple[int, int]] = []
    measure = Numbers(seeds=2)
    run({"a": measure}, Source(painter(0, calls), other_seeds=[painter(1, calls)]), batch)
    expected = [[2 * i, 2 * i + 1, 100 + 2 * i, 100 + 2 * i + 1] for i in range(5)]
    assert measure.values == [value for row in expected for value in row]
    assert measure.prompts == [row["prompt"] for row in ROWS for _ in range(4)]
    if batch == 4:
        assert calls == [(0, 4), (1, 4), (0, 4), (1, 4), (0, 2), (1, 2)]


def test_the_report_has_the_value_of_each_seed():
    measure = Numbers(seeds=2)
    report = run({"a": measure}, Source(painter(0, []), other_seeds=[painter(1, [])]), 8)["a"]
    assert noise_seeds.values_by_seed(report, 4, 2) == {"number": [4.5, 104.5]}


def test_a_measure_expects_so_many_times_its_images_per_prompt():
    spec = {"name": "geneval", "detector": "shapes", "prompts_per_task": 1, "images_per_prompt": 2}
    one, three = (noise_seeds.build_measure(spec, n) for n in (1, 3))
    assert (one.images_per_prompt, three.images_per_prompt) == (2, 6)
    assert three.report.__self__.verdicts.coverage.images_per_prompt == 6
    assert noise_seeds.build_measure("clip_shapes", 3).images_per_prompt == 3


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Json]:
    """By number of seeds; of one model, untrained."""
    folder = tmp_path_factory.mktemp("noise")
    tiny.write_experiment(folder, changes={"eval.prompts_per_task": 2})
    reports = {}
    for n in (1, 3):
        overrides = [f"eval.noise_seeds={n}", "eval.batch=5"]
        config = experiments.load(str(folder / "experiments/tiny.yaml"), overrides)
        system = tiny.text2image(**{k: v for k, v in config["system"].items() if k != "name"}).eval()
        system.experiment = config
        reports[n] = evaluate.evaluate(system)
    return reports


class TestOfASystem:
    def test_the_first_seed_is_the_evaluation_with_it_alone(self, reports: dict[int, Json]):
        one, three = (r["per_image"]["geneval_correct_images"]["values"] for r in (reports[1], reports[3]))
        assert one == np.reshape(three, (-1, 3, 1))[:, 0].ravel().tolist()
        assert reports[3]["geneval"]["images"] == 3 * reports[1]["geneval"]["images"]
        assert reports[3]["measures"]["geneval"]["settings"]["partial"] is False

    def test_seeds_and_their_values_are_in_the_report(self, reports: dict[int, Json]):
        by_seed = reports[3]["by_noise_seed"]
        assert by_seed["seeds"] == [43, 44, 45]
        value = reports[3]["measures"]["geneval"]["values"]["geneval"]["value"]
        assert np.mean(by_seed["values"]["geneval"]) == pytest.approx(value)
        assert "by_noise_seed" not in reports[1]

    def test_other_numbers_of_seeds_are_not_paired(self, reports: dict[int, Json]):
        assert significance.paired(reports[1], reports[3], "geneval") is None
        assert reports[1]["per_image"]["geneval"]["drawn"] != reports[3]["per_image"]["geneval"]["drawn"]


def test_one_seed_keeps_the_hash_of_a_trial(here):
    tiny.write_experiment(here)
    keys = [
        hashing.trial_hash(Trial({}, 0, experiments.load("tiny", overrides)))
        for overrides in ([], ["eval.noise_seeds=1"], ["eval.noise_seeds=2"])
    ]
    assert keys[0] == keys[1] != keys[2]
