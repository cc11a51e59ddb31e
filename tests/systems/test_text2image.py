"""The full system on tiny real parts: flow matching, exact resumption, checkpoints, sampling."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from sana_lab import api
from sana_lab.config import specs
from sana_lab.data.stream import Endless
from sana_lab.diffusion.flow import Flow
from sana_lab.diffusion.sampling import Sampling, generator, noise_like
from sana_lab.models.dit import Dit
from sana_lab.shapes.data import Shapes
from sana_lab.systems.losses import bound, noised, repeated, squared_errors, velocity_losses
from sana_lab.systems.text2image import TextToImage
from sana_lab.types import Batch, Text

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*LeafSpec.*:FutureWarning"
    ),  # Lightning 2.6 asks torch >= 2.13 what it deprecated
    pytest.mark.filterwarnings("ignore:.*in eval mode"),  # frozen parts are, on purpose
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

PROMPTS = ["a red circle", "a photo of a blue square", "three stars"]
FAST = Sampling(solver="euler", steps=2, guidance=3.0)


def world(batch: int = 4) -> Shapes:
    return Shapes(size=16, batch=batch, held_out=8)


def trainer(steps: int, callbacks: list[Callback] | None = None, **options: Any) -> L.Trainer:
    given = {"gradient_clip_val": 1.0, "enable_checkpointing": bool(callbacks), "limit_val_batches": 0, **options}
    return tiny.trainer(steps, callbacks=callbacks, **given)


def fit(system: L.LightningModule, folder: Path, steps: int, path: Path | None = None) -> Path:
    """Train, keeping a checkpoint every six steps; the folder of checkpoints."""
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    trainer(steps, [keep]).fit(system, datamodule=world(), ckpt_path=path, weights_only=True)
    return folder


def state(system: TextToImage) -> dict[str, Tensor]:
    """All that training changes: raw and averaged weights."""
    averages = {f"average.{name}": value for name, value in system.average.values.items()}
    return {name: value.clone() for name, value in system.state_dict().items()} | averages


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[TextToImage, Path]:
    """A system after 12 steps, and its checkpoints of steps 6 and 12."""
    system = tiny.text2image(decay=0.5)
    return system, fit(system, tmp_path_factory.mktemp("whole"), 12)


@pytest.fixture(scope="module")
def still() -> TextToImage:
    """An untrained system to draw with."""
    return tiny.text2image().eval()


class TestTraining:
    @pytest.mark.filterwarnings("ignore:The dirpath has changed")
    def test_resumed_training_equals_unbroken_training_to_the_last_bit(self, trained, tmp_path):
        whole, folder = trained
        resumed = tiny.text2image(decay=0.5)
        fit(resumed, tmp_path, 12, folder / "step=6.ckpt")
        assert resumed.average.updates == whole.average.updates == 12
        assert_same(state(resumed), state(whole))

    def test_what_is_frozen_stays_and_what_trains_moves(self, trained):
        before, after = tiny.text2image().state_dict(), trained[0].state_dict()
        kinds = {name.split(".")[0] for name in before}
        still = {k for k in kinds if all(torch.equal(v, after[n]) for n, v in before.items() if n.startswith(k + "."))}
        assert (kinds, still) == ({"dit", "autoencoder", "text_encoder"}, {"autoencoder"})
        assert not any(m.training for m in trained[0].autoencoder.modules())

    @pytest.mark.parametrize("train_text", [None, False])
    def test_the_average_follows_all_that_trains_and_nothing_else(self, train_text):
        system = tiny.text2image(train_text=train_text)
        kinds = {name.split(".")[0] for name in system.average.values}
        assert kinds == ({"dit"} if train_text is False else {"dit", "text_encoder"})
        assert system.train().text_encoder.training == (train_text is None)

    def test_the_average_is_that_of_the_steps(self):
        system, seen = tiny.text2image(ema=0.5), []

        class Watch(Callback):
            def on_train_batch_start(self, trainer, module, *_):
                seen.append(module.dit.head.linear.bias.detach().clone())

        trainer(4, [Watch()], enable_checkpointing=False).fit(system, datamodule=world())
        seen.append(system.dit.head.linear.bias.detach())
        expected = seen[0]
        for n, value in enumerate(seen[1:], 1):
            decay = min(0.5, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(system.average.values["dit.head.linear.bias"], expected)

    def test_the_average_counts_steps_and_not_accumulated_batches(self):
        system = tiny.text2image()
        trainer(3, accumulate_grad_batches=2).fit(system, datamodule=world(2))
        assert system.average.updates == 3

    def test_the_rate_rises_and_falls(self):
        system, rates = tiny.text2image(warmup=4, decay=0.25, optimizer={"name": "sgd", "lr": 0.1}), []

        class Watch(Callback):
            def on_before_optimizer_step(self, trainer, module, optimizer):
                rates.append(optimizer.param_groups[0]["lr"])

        trainer(12, [Watch()], enable_checkpointing=False).fit(system, datamodule=world(1))
        assert rates == pytest.approx([0.025, 0.05, 0.075, *[0.1] * 7, 0.1 * 2 / 3, 0.1 / 3])

    def test_dropped_captions_are_the_empty_prompt(self):
        images, prompts = world().batch_at(range(4)).images, [*PROMPTS, "a cross"]
        said = [Batch(images, p) for p in (prompts, prompts[::-1], [""] * 4)]
        kept = [first_loss(tiny.text2image(text_dropout=0.0), batch) for batch in said]
        dropped = [first_loss(tiny.text2image(text_dropout=1.0), batch) for batch in said]
        assert len(set(kept)) == 3
        assert dropped == [kept[2]] * 3

    def test_validation_repeats_itself_and_its_bins_make_up_its_loss(self):
        system = tiny.text2image()
        runs = []
        for _ in range(2):
            run = trainer(1, limit_val_batches=1)
            run.validate(system, datamodule=Shapes(size=16, batch=16, held_out=16), verbose=False)
            runs.append({k: float(v) for k, v in run.callback_metrics.items()})
        assert runs[0] == runs[1]
        bins = [runs[0][f"val/loss_t{i}"] for i in range(4)]
        assert min(bins) <= runs[0]["val/loss"] <= max(bins)
        assert len(set(bins)) == 4


def first_loss(system: TextToImage, batch: Batch) -> float:
    run = trainer(1)
    run.fit(system, Endless(lambda _: batch, None), Endless(lambda _: batch, None))
    return float(run.callback_metrics["train/loss"])


class Constant(Dit):
    """A denoiser that was told the data, and may believe it."""

    channels, patch = 4, 1

    def __init__(self, data: Tensor, share: float) -> None:
        super().__init__()
        self.data, self.share = data, share

    def forward(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        return self.share * (x - self.data) / t.view(-1, 1, 1, 1)


def test_the_loss_is_the_squared_error_of_noise_minus_data():
    data, text = torch.randn(5, 4, 2, 2), Text(torch.zeros(5, 1, 8), torch.ones(5, 1, dtype=torch.bool))
    exact = velocity_losses(Constant(data, 1.0), Flow(), data, text, generator(3))
    torch.testing.assert_close(exact, torch.zeros(5), atol=1e-8, rtol=0)
    nothing = velocity_losses(Constant(data, 0.0), Flow(), data, text, generator(3))
    noise = torch.randn(data.shape, generator=generator(3))
    torch.testing.assert_close(nothing, (noise - data).square().flatten(1).mean(1))


class TestCheckpoints:
    @pytest.mark.parametrize("text", [tiny.LLM, tiny.T5])
    def test_frozen_parts_are_left_out(self, text, tmp_path):
        system = tiny.text2image(text_encoder=text)
        run = trainer(1)
        run.fit(system, datamodule=world())
        run.save_checkpoint(tmp_path / "a.ckpt")
        held = torch.load(tmp_path / "a.ckpt", weights_only=True)
        assert {name.split(".")[0] for name in held["state_dict"]} == {"dit", "text_encoder"}
        assert held["average"]["values"].keys() == {n for n, p in system.named_parameters() if p.requires_grad}

    def test_a_frozen_text_encoder_is_left_out_too(self, tmp_path):
        run = trainer(1)
        run.fit(tiny.text2image(train_text=False), datamodule=world())
        run.save_checkpoint(tmp_path / "a.ckpt")
        held = torch.load(tmp_path / "a.ckpt", weights_only=True)
        assert {name.split(".")[0] for name in held["state_dict"]} == {"dit"}
        assert api.load(str(tmp_path / "a.ckpt")).hparams.train_text is False

    def test_loading_gives_the_average(self, trained):
        system, folder = trained
        loaded = api.load(str(folder / "step=12.ckpt"))
        parameters = dict(loaded.named_parameters())
        assert_same({k: parameters[k].detach() for k in system.average.values}, system.average.values)
        assert not loaded.training
        with loaded.averaged():
            assert_same({k: parameters[k].detach() for k in system.average.values}, system.average.values)

    @pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict")  # those of the autoencoder
    def test_lightning_loads_raw_weights_to_train_on(self, trained):
        system, folder = trained
        torch.manual_seed(0)
        loaded = TextToImage.load_from_checkpoint(folder / "step=12.ckpt", weights_only=True)
        assert_same(state(loaded), state(system))

    def test_what_training_leaves_is_the_average(self, trained):
        system, _ = trained
        left = system.trained()
        assert_same({k: left[k] for k in system.average.values}, system.average.values)
        assert {name.split(".")[0] for name in left} == {"dit", "text_encoder"}

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (
                {"dit": {**tiny.DIT, "dim": 64}},
                r"fit TextToImage: .*dit\.patch_embed\.proj\.weight is \(32, 4, 1, 1\), expected \(64",
            ),
            ({"dit": {**tiny.DIT, "depth": 2}}, r"fit TextToImage: dit\.blocks\.1"),
            ({"train_text": False}, "fit TextToImage: text_encoder"),
        ],
    )
    def test_a_checkpoint_of_another_shape_is_refused(self, trained, options, words, tmp_path):
        with pytest.raises(ValueError, match=words):
            fit(tiny.text2image(**options), tmp_path, 12, trained[1] / "step=12.ckpt")


class TestSampling:
    def test_images_are_bytes(self, still):
        images = still.sample(PROMPTS, size=(16, 24), sampling=FAST)
        assert (images.dtype, images.shape) == (torch.uint8, (3, 3, 16, 24))
        assert not images.requires_grad
        assert len(images.unique()) > 20

    def test_an_image_depends_on_seed_and_index_alone(self, still):
        images = still.sample(PROMPTS, size=16, sampling=FAST, seed=5)
        small = still.sample(PROMPTS, size=16, sampling=FAST, seed=5, batch=1)
        alone = still.sample(PROMPTS[2:], size=16, sampling=FAST, seed=5, indices=[2])
        turned = still.sample(PROMPTS[::-1], size=16, sampling=FAST, seed=5, indices=[2, 1, 0])
        for other, part in ((small, images), (alone, images[2:]), (turned, images.flip(0))):
            assert (other.int() - part.int()).abs().max() <= 1  # of 255: sums of another batch round otherwise
        same = [still.sample(PROMPTS, size=16, sampling=FAST, seed=5).equal(images)]
        same += [still.sample(PROMPTS, size=16, sampling=FAST, seed=6).equal(images)]
        same += [still.sample(PROMPTS[2:], size=16, sampling=FAST, seed=5).equal(images[2:])]
        assert same == [True, False, False]

    @pytest.mark.parametrize("null", ["diffusers", "nvlabs"])
    def test_padding_to_the_longest_costs_the_denoiser_nothing(self, null):
        """Encoders that pad to their maximum: the same images, and captions cut to what prompts have."""
        images, lengths = [], []
        for options in ({}, {"pad_to_max": True}, {"pad_to_max": True, "cache": False}):
            system = tiny.text2image(
                text_encoder={**tiny.LLM, "null": null, "instruction": "a picture of ", **options}, train_text=False
            )
            system.eval().dit.blocks[0].cross.kv.register_forward_hook(lambda _, x, y: lengths.append(y.shape[1]))
            images.append(system.sample(PROMPTS, size=16, sampling=FAST, seed=5).int())
        assert all((other - images[0]).abs().max() <= 1 for other in images[1:])
        assert set(lengths) == ({8} if null == "nvlabs" else {8, 1})

    def test_one_euler_step_by_hand(self, still):
        """x - v with v = null + 3 (text - null), each half in a forward of its own."""
        noise = noise_like((4, 2, 2), 7, [0])
        with torch.no_grad():
            text, null = (still.dit(noise, torch.ones(1), still.text_encoder([p])) for p in ("a red ring", "fog"))
            image = still.autoencoder.decode(noise - (null + 3 * (text - null)))
        expected = ((image + 1) * 127.5).clamp(0, 255)
        drawn = still.sample(["a red ring"], size=16, sampling=Sampling("euler", 1, 3.0), seed=7, negative="fog")
        assert (drawn - expected).abs().max() < 0.51

    def test_negative_prompts_for_each_or_for_all(self, still):
        def at(negative):
            return still.sample(PROMPTS[:2], size=16, sampling=FAST, negative=negative)

        plain, one, each = at(""), at("a green ring"), at(["", "a green ring"])
        assert not plain.equal(one)
        assert (each[0].int() - plain[0].int()).abs().max() <= 1
        assert (each[1].int() - one[1].int()).abs().max() <= 1

    @pytest.mark.parametrize(("guidance", "rows"), [(1.0, 2), (3.0, 4)])
    def test_without_guidance_half_the_work_and_no_negative(self, still, guidance, rows):
        seen = []
        hook = still.dit.patch_embed.register_forward_hook(lambda _, arguments, __: seen.append(len(arguments[0])))
        sampling = Sampling("euler", 2, guidance)
        images = [still.sample(PROMPTS[:2], size=16, sampling=sampling, negative=n) for n in ("", "a ring")]
        hook.remove()
        assert seen == [rows] * 4
        assert images[0].equal(images[1]) == (guidance == 1)

    @pytest.mark.parametrize(
        ("size", "patch", "words"),
        [
            (20, 1, "20 x 20 is not a multiple of 8 .*nearest is 16 x 16"),
            ((16, 30), 1, "16 x 30 .*nearest is 16 x 32"),
            (24, 2, r"multiple of 16 \(autoencoder 8 x patch 2\)"),
            (0, 1, "nearest is 8 x 8"),
        ],
    )
    def test_sizes_that_do_not_divide(self, size, patch, words):
        with pytest.raises(ValueError, match=words):
            tiny.text2image(dit={**tiny.DIT, "patch": patch}).sample(PROMPTS, size=size, sampling=FAST)

    @pytest.mark.parametrize(
        ("prompts", "options", "words"),
        [
            ([], {}, "at least one text"),
            ("a red circle", {}, "expected a list"),
            ([3], {}, r"prompts is \[3\]"),
            (PROMPTS, {"negative": ["fog"]}, "3 prompts, 1 negative prompts"),
            (PROMPTS, {"indices": [1, 2]}, "2 indices"),
        ],
    )
    def test_prompts_that_are_none(self, still, prompts, options, words):
        with pytest.raises(ValueError, match=words):
            still.sample(prompts, size=16, sampling=FAST, **options)


def test_hyperparameters_rebuild_the_system():
    system = tiny.text2image()
    again = specs.build("system", {"name": "text2image", **system.hparams})
    assert again.state_dict().keys() == system.state_dict().keys()


def test_several_draws_are_the_pictures_repeated_with_their_text_read_once():
    system = tiny.text2image()
    latents, text = torch.randn(3, system.autoencoder.channels, 2, 2), system.encode_text(["a", "a red circle", ""])
    inputs = noised(system.flow, repeated(latents, 4), generator(3))
    losses = squared_errors(bound(system.dit, text, 4), system.flow, inputs)
    many = Text(text.tokens.repeat_interleave(4, 0), text.mask.repeat_interleave(4, 0))
    plain = velocity_losses(system.dit, system.flow, latents.repeat_interleave(4, 0), many, generator(3))
    torch.testing.assert_close(losses, plain)
    assert len(losses.unique()) == 12
    with pytest.raises(ValueError, match="draws is 0, expected at least 1"):
        tiny.text2image(draws=0)
