"""Every option of every system trains through the verb `train`, all under one MLflow store."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import tiny_emoji
import torch
from safetensors.torch import save_file

from sana_lab import __main__
from sana_lab.checkpoints import weights
from sana_lab.config import experiments, registry, schema, specs
from sana_lab.models.autoencoders.losses import vgg_stages
from sana_lab.tracking.store import Store

TRAINER = (
    "trainer: {max_steps: 3, accelerator: cpu, threads: 1, log_every: 1, validate_every: 2, checkpoint_every: 2}\n"
)
SYSTEMS = {
    "autoencoder": f"system: {{name: autoencoder, autoencoder: {tiny.VAE}}}\n"
    f"data: {{name: shapes, size: 32, batch: 64, held_out: 4}}\n{TRAINER}",
    "text2image": tiny.EXPERIMENT,
    "dit": f"""
system: {{name: dit, dit: {tiny.DIT}, autoencoder: {tiny.VAE}, text_encoder: {tiny.T5}}}
data:
  name: features
  source:
    name: latents
    source: {{name: shapes, size: 32, held_out: 4}}
    items: 8
    autoencoder: {{weights: vae.safetensors, {str(tiny.VAE)[1:]}
  text_encoder: {{weights: t5.safetensors, {str(tiny.T5)[1:]}
  batch: 4
{TRAINER}""",
    "attributes": f"system: attributes\ndata: {{name: shapes, batch: 4, held_out: 4}}\n{TRAINER}",
    "emoji_features": f"system: emoji_features\ndata: {{name: emoji, size: 64, batch: 4}}\n{TRAINER}",
    "clip": f"system: clip\ndata: {{name: shapes, batch: 4, held_out: 4}}\n{TRAINER}",
}
FLOW = "dit.depth=2 optimizer=sgd shift=2 start=0.9 text_dropout=0.5 warmup=1 decay=0.5 ema=0.5 seed=1 draws=2"
CLIP = "width=32 layers=1 text_layers=1 heads=2 patch=16 dim=8 max_tokens=16 negatives=1 attributes=0.5 optimizer=adam"
CASES = {
    "reconstruction": "autoencoder autoencoder.latent=2 l1=0.5 l2=1 kl=1e-5 latent_noise=0.1 lr=0.002 betas=[0.8,0.9] "
    "warmup=1 schedule=constant ema=0.5 seed=3 normalise=scale",
    "middle layers": "autoencoder trains=middle",
    "structured latents": "autoencoder front_channels=2 equivariance=0.5",
    "adversarial": "autoencoder adversarial=0.1 adversarial_start=1 discriminator_width=4",
    "lpips": "autoencoder lpips=0.1 lpips_weights=vgg16.pth",
    "flow": f"text2image {FLOW} model_time=released train_text=false autoencoder.depth=2 text_encoder.layers=2",
    "adapter": "text2image dit.weights=dit.safetensors adapter=lora",
    "text alone": "text2image dit.weights=dit.safetensors train_dit=false train_text=true",
    "adapter on features": "dit dit.weights=dit.safetensors adapter=lora",
    "ddpm": "text2image objective=ddpm train_text=true",
    "method": "text2image method=contrastive prediction=data weighting=min_snr groups={'*bias':{\"weight_decay\":0}}",
    "flow on features": f"dit {FLOW} model_time=released autoencoder.depth=2 text_encoder.layers=2",
    "ddpm on features": "dit objective=ddpm",
    "method on features": "dit method=contrastive prediction=data weighting=min_snr "
    "groups={'*bias':{\"weight_decay\":0}}",
    "attributes": "attributes widths=[8,8,8] optimizer=sgd warmup=1 decay=0.1 ema=0.5",
    "emoji features": "emoji_features widths=[8,8,8,8] dim=8 drawings=512 scale=8 attributes=0.2 optimizer=sgd "
    "warmup=1 decay=0.1 ema=0.5 seed=2",
    "clip": f"clip {CLIP} warmup=1 decay=0.1 ema=0.5 seed=2",
}
"""Title -> system and options; each option of a system is in one of its cases."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Path]:
    """A working directory with an experiment for each system, one store, and the weights of what does not train."""
    root = tmp_path_factory.mktemp("options")
    tiny.write(root, "runs/mlflow.db", "")
    shutil.copy(empty_database, root / "runs/mlflow.db")
    for name, text in SYSTEMS.items():
        tiny.write(root, f"experiments/{name}.yaml", text)
    for kind, spec in (("autoencoder", tiny.VAE), ("text_encoder", tiny.T5)):
        save_file(tiny.build(kind, spec).state_dict(), root / f"{spec['name']}.safetensors")
    save_file(tiny.text2image(text_encoder=tiny.T5).dit.state_dict(), root / "dit.safetensors")
    torch.save(vgg_features(), root / "vgg16.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        tiny_emoji.write(root / "emoji", patch)
        yield root


def vgg_features() -> dict[str, torch.Tensor]:
    """Random weights under torchvision's names."""
    stages = vgg_stages(((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)))
    layers = [layer for stage in stages for layer in stage]
    return {f"features.{i}.{k}": v for i, layer in enumerate(layers) for k, v in layer.state_dict().items()}


def options(system: str) -> set[str]:
    """The options that some case of a system gives."""
    words = [word for case in CASES.values() if case.split()[0] == system for word in case.split()[1:]]
    return {word.split("=")[0].split(".")[0] for word in words}


@pytest.mark.parametrize("system", registry.TABLE["system"])
def test_every_option_is_in_a_case(system):
    names = specs.options("system", specs.find("system", system)).keys()
    assert names - options(system) == set()


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")  # mlflow with sqlalchemy 2.1
@pytest.mark.parametrize("title", CASES)
def test_options_train_through_the_verb(folder, title):
    if title.startswith("adapter"):
        pytest.importorskip("peft")
    name, *changes = CASES[title].split()
    overrides = ["trainer.max_steps=3", *(f"system.{change}" for change in changes)]
    assert __main__.main(["train", name, *overrides]) == 0
    experiment: schema.Config = experiments.load(name, overrides)
    card = weights.card(weights.find_trained(experiment, name))
    assert card["steps"] == 3 == steps_of(experiment) + 1
    assert "train/loss" in card["measured"]
    assert any(key.startswith("val/") for key in card["measured"])


def steps_of(experiment: schema.Config) -> int:
    """The last step in the curve of the losses of an experiment's run, from 0."""
    from sana_lab.config import hashing

    store = Store("runs")
    (run,) = store.find("training", {"sana.model": hashing.experiment_hash(experiment)})
    assert run.status == "FINISHED"
    return store.history(run.id, "train/loss")[-1][0]
