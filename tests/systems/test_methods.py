"""Training with methods: exact resumption, averages and weights without them, their own rates, what does not fit."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from sana_lab import api
from sana_lab.config import experiments, hashing, specs
from sana_lab.config.specs import SpecError
from sana_lab.methods import Method, Step
from sana_lab.models.dit import Dit
from sana_lab.shapes.data import Shapes
from sana_lab.systems.text2image import TextToImage
from sana_lab.training import checks
from sana_lab.types import Batch, Text

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6 with torch >= 2.13
    pytest.mark.filterwarnings("ignore:.*in eval mode"),  # frozen parts are, on purpose
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

TREAD = {"name": "tread", "start": 0, "stop": 1}
REFERENCE = "system.method={name: repa, teacher: {weights: 'experiment:teacher'}}"
REPA = {"name": "repa", "hidden": 8, "lr": 0.01}


def system(method: Any, **options: Any) -> TextToImage:
    return tiny.text2image(method=method, dit=tiny.TWO_BLOCKS, **options)


def fit(module: L.LightningModule, steps: int, folder: Path | None = None, path: Path | None = None) -> L.Trainer:
    """Train on pictures of 16 pixels (2 x 2 tokens), with a checkpoint every two steps if there is a folder."""
    keep: list[Callback] = [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)]
    options = {"callbacks": keep if folder else None, "enable_checkpointing": bool(folder)}
    run = tiny.trainer(steps, limit_val_batches=0, gradient_clip_val=1.0, **options)
    data = Shapes(size=16, batch=4, held_out=8)
    run.fit(module, datamodule=data, ckpt_path=None if path is None else str(path), weights_only=True)
    return run


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextToImage, Path, dict[str, float]]:
    """A system after 4 steps with alignment and routing, its checkpoints of steps 2 and 4, and its last losses."""
    whole, folder = system([REPA, TREAD]), tmp_path_factory.mktemp("whole")
    run = fit(whole, 4, folder)
    return whole, folder, {name: float(value) for name, value in run.callback_metrics.items()}


def test_resumed_training_equals_unbroken_training_methods_included(trained, tmp_path: Path):
    whole, folder, _ = trained
    resumed = system([REPA, TREAD])
    fit(resumed, 4, tmp_path, folder / "step=2.ckpt")
    assert any(name.startswith("methods.0.projector") for name in whole.state_dict())
    assert_same(resumed.state_dict(), whole.state_dict())
    assert_same(resumed.average.values, whole.average.values)


def test_without_intervals_meanflow_trains_as_flow_matching_does_and_resumes_exactly(tmp_path: Path):
    """To the last bit: the same losses as without a method, and an unbroken training from its checkpoint of step 2."""
    network, never = {**tiny.TWO_BLOCKS, "mean_velocity": True}, {"name": "meanflow", "share": 0.0, "power": 0.0}
    losses = []
    for method in (None, never):
        module = tiny.text2image(method=method, dit=network)
        losses.append(float(fit(module, 3).callback_metrics["train/loss"]))
    assert losses[0] == losses[1]
    intervals = {"name": "meanflow", "share": 0.7, "guidance": 2.0, "warmup": 3}
    whole, resumed = (tiny.text2image(method=intervals, dit=network) for _ in range(2))
    fit(whole, 4, tmp_path)
    fit(resumed, 4, tmp_path / "again", tmp_path / "step=2.ckpt")
    assert int(resumed.methods[0].batches) == 4
    assert_same(resumed.state_dict(), whole.state_dict())
    assert_same(resumed.average.values, whole.average.values)
    assert not torch.equal(whole.state_dict()["dit.interval_embed.mlp.2.weight"], torch.zeros(32, 32))


def test_terms_are_logged_and_weighted(trained):
    losses = trained[2]
    assert losses["train/loss"] == pytest.approx(losses["train/objective"] + 0.5 * losses["train/repa"], rel=1e-5)


def test_methods_are_in_no_average_and_no_weights(trained):
    whole, folder, _ = trained
    plain = system(None)
    assert whole.average.values.keys() == plain.average.values.keys()
    assert whole.trained().keys() == plain.trained().keys()
    checkpoint = torch.load(folder / "step=4.ckpt", weights_only=True)
    assert any(name.startswith("methods.") for name in checkpoint["state_dict"])
    raw = {name: p.detach().clone() for name, p in whole.named_parameters()}
    with whole.averaged():
        moved = {name.split(".")[0] for name, p in whole.named_parameters() if not torch.equal(p, raw[name])}
    assert moved == {"dit", "text_encoder"}
    assert_same(dict(whole.named_parameters()), raw)


def test_a_checkpoint_is_loaded_for_sampling_without_methods(trained):
    whole, folder, _ = trained
    loaded = api.load(str(folder / "step=4.ckpt"))
    assert len(loaded.methods) == 0
    torch.testing.assert_close(loaded.dit.head.linear.bias, whole.average.values["dit.head.linear.bias"])


def test_the_model_starts_as_without_methods():
    plain, other = system(None), system([REPA, "dispersive"])
    before = torch.get_rng_state()
    other.build_methods(16, 4)
    assert torch.equal(torch.get_rng_state(), before)
    state = {name: value for name, value in other.state_dict().items() if not name.startswith("methods.")}
    assert_same(state, plain.state_dict())
    again = system([REPA, "dispersive"])
    again.build_methods(16, 4)
    assert_same(other.state_dict(), again.state_dict())


@pytest.mark.parametrize("optimizer", [{"name": "adamw", "lr": 0.1}, {"name": "muon", "lr": 0.1}])
def test_own_learning_rates_rise_and_fall_with_the_others(optimizer: dict[str, Any]):
    rates: list[float] = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[-1]["lr"])
            assert {len(g["params"]) for g in optimizer.param_groups[-1:]} == {6}

    module = system(REPA, warmup=2, optimizer=optimizer)
    run = tiny.trainer(3, limit_val_batches=0, callbacks=[Watch()])
    run.fit(module, datamodule=Shapes(size=16, batch=4, held_out=8))
    assert rates == pytest.approx([0.005, 0.01, 0.01])
    parameters = [p for group in run.optimizers[0].param_groups for p in group["params"]]
    assert len(parameters) == len({*parameters}) == len([p for p in module.parameters() if p.requires_grad])


def test_several_draws_and_equal_methods_combine():
    module = system([REPA, {**REPA, "block": 1}, "contrastive", "direction", "dispersive"], draws=2)
    run = fit(module, 1)
    names = {name.removeprefix("train/") for name in run.callback_metrics}
    assert names >= {"repa", "repa_2", "contrastive", "direction", "dispersive", "objective", "loss"}


def test_routing_is_for_training_alone():
    """Validation gives the losses of the model without a route."""
    values = []
    for method in (None, TREAD):
        module = system(method)
        run = tiny.trainer(1, limit_val_batches=1)
        run.validate(module, datamodule=Shapes(size=16, batch=4, held_out=4), verbose=False)
        values.append(float(run.callback_metrics["val/loss"]))
    assert values[0] == values[1]


class Takes(Method):
    """A term under a name that is taken."""

    def losses(self, step: Step) -> dict[str, Tensor]:
        return {"loss": step.prediction.mean()}


class Idle(Method):
    """Neither a term nor a change."""


class Opaque(Dit):
    """A DiT that offers no hidden states."""

    def __init__(self, *, channels: int, text_dim: int) -> None:
        super().__init__()
        self.channels, self.text_dim, self.patch = channels, text_dim, 1
        self.layer = torch.nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        return self.layer(x)


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="has a term 'loss', a name that is taken already"):
        fit(system(f"{__name__}:Takes"), 1)


def test_a_dit_without_hidden_states_still_has_terms_of_its_prediction():
    run = fit(tiny.text2image(dit=f"{__name__}:Opaque", method="contrastive"), 1)
    assert "train/contrastive" in run.callback_metrics


def test_images_are_those_of_the_batch_or_decoded():
    module, images = system(None), torch.rand(2, 3, 16, 16) * 2 - 1
    latents = module.latents_of(Batch(images, ["a", "b"]))
    assert module.images_of(Batch(images, ["a", "b"]), latents) is images
    decoded = module.images_of(Batch(None, ["a", "b"], latents), latents)
    assert torch.equal(decoded, module.autoencoder.decode(latents).clamp(-1, 1))
    assert not decoded.requires_grad


# --- while the experiment loads


def experiment(here: Path, *overrides: str) -> Any:
    tiny.write_experiment(here, changes={"system.dit.depth": 2})
    return experiments.load("tiny", overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["system.method={name: repa, block: 7}"], "method 'repa' uses block 7, and the DiT has blocks 0 to 1"),
        (["system.method=irepa", "data.size=8"], "expected a teacher with more, or method repa"),
        (["system.method={name: repa, fit: exact}"], "has 8 x 8 tokens, and the DiT 4 x 4; expected the same grid"),
        (["system.method={name: tread, stop: 3}"], "and the DiT has 2 blocks; expected 0 <= start < stop <= 2"),
        (["system.method=repo"], "no method is called 'repo'; did you mean 'repa'"),
        (["system.method=[contrastive, {name: repa, wait: 1}]"], "no option 'wait'.*system.method\\[1\\]"),
        ([f"system.method={__name__}:Idle"], "has neither `losses` nor `wrap`"),
        ([f"system.dit={__name__}:Opaque", "system.method=repa"], "dit Opaque offers no hidden states"),
        (["system.method=contrastive", "data.batch=1"], "data.batch is 1; expected at least 2"),
        (["system.objective=ddpm", "system.prediction=data"], "system.prediction is 'data', an option of objective"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(here: Path, overrides: list[str], words: str):
    with pytest.raises(SpecError, match=words):
        checks.check(experiment(here, *overrides))


def test_what_fits_is_checked_without_weights_of_the_model(here: Path):
    checks.check(experiment(here, "system.method=[repa, irepa, dispersive, {name: tread, start: 0, stop: 1}]"))


def test_routing_and_compiled_blocks_exclude_each_other(here: Path):
    loaded = experiment(here, "system.method={name: tread, start: 0, stop: 1}", "trainer.compile=true")
    with torch.device("meta"):
        module = specs.build("system", loaded["system"])
    with pytest.raises(SpecError, match=r"changes the forward pass of blocks, and trainer\.compile is true"):
        checks.check_methods(loaded, module, module.methods)


def test_a_teacher_that_is_trained_first_is_not_read_before(here: Path):
    tiny.write_experiment(here, "teacher", "base: shapes_attributes\nseed: 7\n")
    loaded = experiment(here, REFERENCE)
    checks.check(loaded)
    assert experiments.prerequisites(loaded) == ["teacher"]


def test_hashes_stay_without_methods_and_do_not_depend_on_how_one_is_given(here: Path):
    def hashed(*overrides: str) -> str:
        return hashing.experiment_hash(experiment(here, *overrides))

    plain = specs.canonical("system", experiment(here)["system"])
    assert not {"method", "prediction", "weighting"} & plain.keys()
    assert hashed() == hashed("system.method=[]") == hashed("system.method=null")
    assert hashed("system.method=repa") == hashed("system.method=[{name: repa, weight: 0.5}]")
    assert hashed("system.method=repa") == hashed("system.method={name: repa, teacher: {device: cpu}}")
    different = [hashed(f"system.method={m}") for m in ("repa", "{name: repa, block: 0}", "[repa, tread]", "[tread]")]
    assert len({hashed(), *different}) == 5


FEATURES = {
    "system": {"name": "dit", "dit": tiny.TWO_BLOCKS, "autoencoder": tiny.VAE, "text_encoder": tiny.T5},
    "data": {"name": "features", "text_encoder": tiny.T5},
}


def test_a_system_on_cached_features_needs_their_images():
    latents = {"name": "latents", "source": {"name": "shapes", "size": 32}, "autoencoder": tiny.VAE, "items": 8}
    for images, refused in ((False, True), (True, False)):
        data = {**FEATURES["data"], "source": {**latents, "images": images}}
        assert checks.gives_images(specs.resolve("data", data)) == images
        module = specs.build("system", {**FEATURES["system"], "method": "repa"})
        if refused:
            with pytest.raises(SpecError, match="expected images: true of data latents, or system: text2image"):
                module.build_methods(32, 4, images)
        else:
            module.build_methods(32, 4, images)
            assert len(module.methods) == 1
