"""From archives to a trained text-to-image system and its measures, on tiny parts; and the recipes that ship."""

from pathlib import Path

import pytest
import tiny
import torch

from sana_lab.ablation import plan, runner
from sana_lab.ablation.jobs import untrained
from sana_lab.ablation.record import TrialRecord
from sana_lab.checkpoints import weights
from sana_lab.config import experiments
from sana_lab.emoji.data import Emoji
from sana_lab.emoji.networks import Features
from sana_lab.evaluation.evaluate import evaluate
from sana_lab.training.train import train

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]

REAL = Path(__file__).parents[2] / "emoji"


def test_archives_to_measures(emoji: Path, here: Path):
    torch.manual_seed(0)
    state = {f"network.{k}": v for k, v in Features((8, 8, 8, 16), 16).state_dict().items()}
    system = {"name": "emoji_features", "widths": [8, 8, 8, 16], "dim": 16}
    weights.write(here / "features.safetensors", state, {"config": {"system": system}})
    source = {"name": "emoji", "held_out": 0.4}
    measures = [
        {"name": "emoji", "data": source, "weights": "features.safetensors"},
        {"name": "distances", "extractor": {"name": "emoji", "weights": "features.safetensors"}},
    ]
    changes = {
        "data": {"name": "latents", "source": source, "autoencoder": "${system.autoencoder}", "batch": 4},
        "system.text_encoder.max_tokens": 64,
        "eval.measures": measures,
        "eval.bench_size": 64,
        "prompts": ["nail polish: dark skin tone, Noto"],
        "trainer.max_steps": 2,
    }
    tiny.write_experiment(here, changes=changes)
    train(experiments.load("tiny"))
    report = evaluate("tiny")
    rows = Emoji(held_out=0.4).len_val
    values = report["measures"]["emoji"]["values"]
    assert values.keys() >= {"emoji_tone", "emoji_recall", "emoji_recall_all", "emoji_concept"}
    assert values["emoji_tone"]["value"] == 0
    assert len(report["per_image"]["emoji_recall"]["values"]) == rows
    assert report["measures"]["distances"]["values"]["fd_emoji"]["value"] > 0
    assert report["reference"]["n"] == rows


def test_an_ablation_trains_the_networks_of_its_measures_first(here: Path):
    trials = plan.load("emoji_autoencoder").trials
    names = untrained([TrialRecord(trial, "key", "model", None) for trial in trials])
    assert {"emoji_vae_f8", "emoji_dcae_f32", "emoji_features"} == set(names)


def test_an_ablation_without_archives_says_how_to_fetch_them_before_any_work(runs: Path):
    with pytest.raises(
        ValueError, match=r"there is no emoji/emoji-datasource-google-16\.0\.0\.tgz; fetch it: .*npm pack"
    ):
        runner.main("emoji_autoencoder")
    assert not (runs / "sweeps").exists()


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real archives in emoji/")
def test_half_of_the_shipped_prompts_are_held_out():
    data = Emoji(str(REAL))
    prompts = experiments.load("emoji")["prompts"]
    held_out = set(data.prompts_at(range(data.len_val), "val"))
    trained = {f"{data.drawing(i).label}, {style}" for i in range(data.len_train) for style in ("Noto", "Twemoji")}
    assert [prompt in held_out for prompt in prompts] == [True] * 4 + [False] * 4
    assert [prompt in trained for prompt in prompts] == [False] * 4 + [True] * 4
