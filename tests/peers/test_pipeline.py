"""Tiny random pipelines of diffusers behind the lab's interface."""

import inspect
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny_peers
import torch

from sana_lab.config.specs import SpecError
from sana_lab.diffusion.sampling import noise_like
from sana_lab.peers.pipeline import Peer, is_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""diffusers' schedulers hand tensors to NumPy in a way that NumPy 2 is about to refuse."""


@pytest.fixture(scope="module", params=["sana", "stable diffusion"])
def peer(request: pytest.FixtureRequest) -> Peer:
    return Peer(tiny_peers.sana_pipeline() if request.param == "sana" else tiny_peers.stable_diffusion())


@pytest.fixture(scope="module")
def sana() -> Peer:
    return Peer(tiny_peers.sana_pipeline())


PROMPTS = ["a red circle", "two blue squares", "a cat"]


def generate(peer: Peer, prompts: list[str] = PROMPTS, **options: Any) -> torch.Tensor:
    return peer.sample(prompts, **{"size": 32, "steps": 2, "guidance": 3.0, **options})


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for the rounding of other batch shapes."""
    return bool((a.int() - b.int()).abs().max() <= 1)


# --- sampling


def test_images_are_bytes_of_the_size_asked_for(peer: Peer):
    images = generate(peer, size=(32, 64))
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (3, 3, 32, 64))
    assert images.float().std() > 1


def test_an_image_depends_on_its_index_and_not_on_its_batch(peer: Peer):
    """Also where the scheduler draws noise of its own at every step."""
    whole = generate(peer, seed=3)
    assert near(generate(peer, seed=3, batch=1), whole)
    assert near(generate(peer, PROMPTS[1:2], seed=3, indices=[1]), whole[1:2])
    assert not near(generate(peer, PROMPTS[1:2], seed=3, indices=[7]), whole[1:2])
    assert not near(generate(peer, seed=4), whole)


def test_the_pipelines_own_call_with_our_latents_draws_the_same(sana: Peer):
    ours = generate(sana, seed=5)
    latents = noise_like(sana.latent_shape(32), 5, [0, 1, 2])
    how = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
    theirs = sana.pipeline(PROMPTS, latents=latents, use_resolution_binning=False, **how).images
    assert torch.equal(ours, (theirs * 255).round().byte())


def test_the_first_noise_is_ours_and_later_noise_is_other():
    peer, calls = Peer(tiny_peers.stable_diffusion()), []
    prepare = peer.pipeline.prepare_latents

    def watched(*args: Any) -> torch.Tensor:
        calls.append(args)
        return prepare(*args)

    peer.pipeline.prepare_latents = watched
    generate(peer, PROMPTS[:1], seed=2, indices=[6])
    generators, latents = calls[0][-2], calls[0][-1]
    assert torch.equal(latents, noise_like((4, 16, 16), 2, [6]))
    assert generators[0].initial_seed() != torch.Generator().initial_seed()
    again = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(generators[0].initial_seed()))
    assert not torch.equal(again, latents[0])


def test_guidance_steps_and_the_negative_prompt_matter(sana: Peer):
    plain = generate(sana)
    for change in ({"guidance": 6.0}, {"steps": 3}, {"negative": "a blue square"}):
        assert not near(generate(sana, **change), plain)
    each = generate(sana, negative=["", "a blue square", ""])
    assert near(each[0], plain[0])
    assert not near(each[1], plain[1])


def test_steps_and_guidance_left_out_are_the_pipelines_own(sana: Peer):
    own = sana.sample(PROMPTS[:1], size=32)
    assert torch.equal(own, sana.sample(PROMPTS[:1], size=32, steps=20, guidance=4.5))


def test_half_precision(sana: Peer):
    pipeline = tiny_peers.sana_pipeline().to(torch.bfloat16)
    assert generate(Peer(pipeline)).shape == (3, 3, 32, 32)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one text"),
        ("a red circle", {}, "expected a list"),
        (["a", "b"], {"indices": [1]}, "2 prompts, 2 negative prompts and 1 indices"),
        (["a"], {"negative": ["", ""]}, "1 prompts, 2 negative prompts"),
    ],
)
def test_wrong_requests(sana: Peer, prompts: Any, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        generate(sana, prompts, **options)


# --- pipelines of other kinds


class Bare:
    """The least that a pipeline has, with a signature and latents of its own."""

    components: ClassVar[dict[str, Any]] = {}
    device = torch.device("cpu")

    def set_progress_bar_config(self, **_: Any) -> None:
        pass

    def output(self, images: torch.Tensor) -> Any:
        return type("Output", (), {"images": images})


class Packed(Bare):
    """Draws its latents itself, one generator an image."""

    def __call__(self, prompt: list[str], height: int, width: int, generator: Any = None) -> Any:
        return self.output(torch.stack([torch.rand(3, height, width, generator=g) for g in generator]))


class Wild(Bare):
    """Draws from the global state."""

    def __call__(self, prompt: list[str], height: int, width: int, num_inference_steps: int = 1) -> Any:
        return self.output(torch.rand(len(prompt), 3, height, width))


def test_latents_of_another_shape_come_from_generators():
    peer = Peer(Packed())
    assert peer.noise == "generators"
    whole = peer.sample(PROMPTS, size=8)
    assert torch.equal(peer.sample(PROMPTS[1:2], size=8, indices=[1]), whole[1:2])


def test_noise_from_the_global_state_is_repeated_and_leaves_it_alone():
    peer = Peer(Wild())
    assert peer.noise == "global"
    state = torch.get_rng_state()
    assert torch.equal(peer.sample(PROMPTS, size=8), peer.sample(PROMPTS, size=8))
    assert not torch.equal(peer.sample(PROMPTS, size=8), peer.sample(PROMPTS, size=8, seed=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_pipeline_cannot_be_told():
    with pytest.raises(ValueError, match="Wild takes no guidance_scale, negative_prompt"):
        Peer(Wild()).sample(PROMPTS, size=8, guidance=2.0, negative="blue")
    with pytest.raises(SpecError, match="Upscaler takes no prompt"):
        Peer(type("Upscaler", (Bare,), {"__call__": lambda self, image: image})())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 4, 3, 8, 8), r"gave a Tensor \(1, 4, 3, 8, 8\), expected images \(1, 3, H, W\)"),
        (["a picture"], r"gave a list \(\), expected"),
        (torch.full((1, 3, 8, 8), torch.nan), "not finite; try another dtype than torch.float32"),
    ],
)
def test_outputs_that_are_no_images(images: Any, message: str):
    class Broken(Bare):
        def __call__(self, prompt: list[str], height: int, width: int) -> Any:
            return self.output(images)

    with pytest.raises(ValueError, match=message):
        Peer(Broken()).sample(["a"], size=8)


# --- loading


def test_a_folder_is_loaded_and_draws_as_the_pipeline_that_was_saved(sana_folder: Path, sana: Peer):
    loaded = Peer.load(sana_folder)
    assert torch.equal(generate(loaded), generate(sana))
    identity = loaded.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert (identity["pipeline"], identity["noise"]) == ("SanaPipeline", "latents")
    assert identity["scheduler"]["flow_shift"] == 3.0
    assert set(identity["dtype"].values()) == {"float32"}
    assert len(identity["weights_sha256"]) == 3
    assert sana.identity()["weights_sha256"] is None
    assert is_pipeline(sana_folder)
    assert is_pipeline("someone/some-model")
    assert not is_pipeline(sana_folder / "vae")


def test_a_dtype_of_choice(sana_folder: Path):
    assert set(Peer.load(sana_folder, dtype=torch.bfloat16).identity()["dtype"].values()) == {"bfloat16"}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "no diffusers pipeline: it has no model_index.json"),
        (
            {"_class_name": "SanaPipeline", "vae": ["evil_guest", "Vae"]},
            r"vae is \['evil_guest', 'Vae'\], code from outside",
        ),
        ({"_class_name": "SanaPipeline", "vae": ["os.path", "join"]}, "code from outside diffusers and transformers"),
        ({"_class_name": ["own", "Pipeline"]}, "code from a folder is not run"),
        ({"_class_name": "NoSuchPipeline"}, "cannot be loaded as a diffusers pipeline"),
    ],
)
def test_folders_that_are_no_pipeline(tmp_path: Path, index: Any, message: str):
    if index is not None:
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(SpecError, match=message):
        Peer.load(tmp_path)


def test_pickles_are_not_read(tmp_path: Path):
    folder = tiny_peers.saved(tiny_peers.sana_pipeline(), tmp_path / "pipeline", safe_serialization=False)
    with pytest.raises(SpecError, match="cannot be loaded"):
        Peer.load(folder)


# --- stages


def test_stages_by_the_usual_names(peer: Peer):
    stages = {stage: list(networks) for stage, networks in peer.stages().items()}
    denoiser = "unet" if "unet" in peer.networks else "transformer"
    assert stages == {"text": ["text_encoder"], "denoise": [denoiser], "decode": ["vae"]}
    assert peer.stage_of("text_encoder_3") == "text"
    assert peer.stage_of("safety_checker") is None


def test_every_call_of_a_network_is_seen_and_nothing_is_left_behind(peer: Peer):
    plain, calls = generate(peer), []
    before = {name: set(vars(network)) for name, network in peer.networks.items()}

    def watch(stage: str, call: Any) -> Any:
        calls.append(stage)
        return call()

    with peer.watching(watch):
        assert "hidden_states" in str(inspect.signature(peer.denoiser.forward)) or "sample" in str(
            inspect.signature(peer.denoiser.forward)
        )
        watched = generate(peer)
    assert torch.equal(watched, plain)
    assert calls.count("denoise") == 2
    assert calls.count("decode") == 1
    assert calls.index("text") < calls.index("denoise") < calls.index("decode")
    assert {name: set(vars(network)) for name, network in peer.networks.items()} == before


def test_a_method_that_was_replaced_before_is_put_back(sana: Peer):
    vae = sana.pipeline.vae
    own = vae.decode
    vae.decode = own
    with sana.watching(lambda stage, call: call()):
        assert vae.decode is not own
    assert vars(vae)["decode"] is own
    del vae.decode
