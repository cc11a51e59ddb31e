"""Extractors against the libraries that define them, on small random weights in the real formats."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sana_lab.config.specs import SpecError
from sana_lab.evaluation.extractors.clip import Clip
from sana_lab.evaluation.extractors.dinov2 import Dinov2
from sana_lab.evaluation.extractors.function import Function
from sana_lab.evaluation.extractors.inception import Inception

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def images(count: int = 2, height: int = 40, width: int = 40, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    vision = {**SMALL, "intermediate_size": 64}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SMALL)).save_pretrained(folder)
    return folder


class TestInception:
    def test_every_layer_and_the_logits_are_torch_fidelitys(self, inception_weights):
        layers = ["64", "192", "768", "2048", "logits_unbiased"]
        peer = FeatureExtractorInceptionV3("peer", layers, feature_extractor_weights_path=str(inception_weights))
        expected = dict(zip(layers, peer(images()), strict=True))
        ours = Inception(str(inception_weights))
        for layer in layers[:-1]:
            ours.layer = layer
            torch.testing.assert_close(ours.features(images()), expected[layer], rtol=1e-6, atol=1e-7)
        seen = ours.features_and_logits(images())
        torch.testing.assert_close(seen.features, expected["2048"], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(seen.logits, expected["logits_unbiased"], rtol=1e-6, atol=1e-6)

    def test_the_resize_is_what_is_asked_for_and_told(self, inception_weights):
        extractor = Inception(str(inception_weights), "64")
        plain = extractor.features(images(1))
        assert [extractor.identity()[k] for k in ("extractor", "layer", "resize")] == ["inception", "64", "tf1"]
        extractor.resize = "clean"
        assert not torch.allclose(extractor.features(images(1)), plain, rtol=1e-3)
        assert extractor.identity()["resize"] == "clean"

    def test_without_weights_it_says_which_and_what_still_works(self):
        with pytest.raises(FileNotFoundError, match=r"Inception needs its weights.*weights-inception.*other extractor"):
            Inception()


class TestClip:
    def test_is_transformers_own_on_what_its_processor_makes(self, clip_folder):
        """At its own size; the processor rounds to 8 bits after scaling, ours does not."""
        extractor = Clip(str(clip_folder))
        processor, network = CLIPImageProcessorPil.from_pretrained(clip_folder), CLIPModel.from_pretrained(clip_folder)
        small = images(2, 28, 28)
        pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in small]
        with torch.no_grad():
            expected = network.get_image_features(**processor(images=pictures, return_tensors="pt")).pooler_output
        found = extractor.features(small)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert found.shape == (2, extractor.dim) == (2, 24)

    def test_the_tower_alone_gives_the_same(self, clip_folder, tmp_path):
        whole = CLIPModel.from_pretrained(clip_folder)
        whole.config.vision_config.projection_dim = 24
        tower = CLIPVisionModelWithProjection(whole.config.vision_config)
        tower.load_state_dict({k: v for k, v in whole.state_dict().items() if k.startswith("vis")})
        tower.save_pretrained(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text((clip_folder / "preprocessor_config.json").read_text())
        torch.testing.assert_close(Clip(str(tmp_path)).features(images()), Clip(str(clip_folder)).features(images()))

    def test_normalize(self, clip_folder):
        plain, unit = (Clip(str(clip_folder), normalize=n) for n in (False, True))
        torch.testing.assert_close(
            unit.features(images()), torch.nn.functional.normalize(plain.features(images())), rtol=1e-5, atol=1e-6
        )
        assert plain.identity() != unit.identity()

    def test_any_shape_becomes_a_square(self, clip_folder):
        assert Clip(str(clip_folder)).features(images(1, 20, 50)).shape == (1, 24)

    def test_what_is_missing(self, clip_folder, dino_folder, tmp_path):
        with pytest.raises(SpecError, match=r"no folder .*nowhere"):
            Clip(str(tmp_path / "nowhere"))
        with pytest.raises(SpecError, match="holds a dinov2 model, expected a clip"):
            Clip(str(dino_folder))
        CLIPModel.from_pretrained(clip_folder).save_pretrained(tmp_path)
        with pytest.raises(SpecError, match=r"lacks a preprocessor_config.json with image_mean"):
            Clip(str(tmp_path))


class TestDinov2:
    def test_is_transformers_own_on_what_its_processor_makes(self, dino_folder):
        extractor = Dinov2(str(dino_folder), size=28)
        size = {"height": 28, "width": 28}
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        processor = BitImageProcessorPil(size=size, do_center_crop=False, image_mean=mean, image_std=std)
        network = Dinov2Model.from_pretrained(dino_folder).eval()
        small = images(2, 28, 28)
        pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in small]
        with torch.no_grad():
            expected = network(**processor(images=pictures, return_tensors="pt")).pooler_output
        found = extractor.features(small)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert found.shape == (2, extractor.dim) == (2, 32)

    def test_at_another_size_positions_are_interpolated(self, dino_folder):
        assert Dinov2(str(dino_folder)).features(images(1)).shape == (1, 32)
        assert Dinov2(str(dino_folder)).identity()["side"] == 224

    def test_a_picture_is_the_same_whatever_it_is_batched_with(self, dino_folder):
        extractor = Dinov2(str(dino_folder), size=28)
        torch.testing.assert_close(
            extractor.features(images(3))[1:2], extractor.features(images(3)[1:2]), rtol=1e-4, atol=1e-5
        )


def colours(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.float().mean((2, 3))


def scalar(pictures: torch.Tensor) -> float:
    return float(pictures.float().mean())


class TestFunction:
    def test_calls_it(self):
        extractor = Function(f"{__name__}:colours")
        np.testing.assert_allclose(extractor.features(images()), colours(images()))
        assert (extractor.dim, extractor.identity()["extractor"]) == (3, "colours")
        assert len(extractor.identity()["weights_sha256"]) == 64

    def test_another_version_is_another_extractor(self):
        one, two = (Function(f"{__name__}:colours", version=v).identity() for v in ("1", "2"))
        assert one != two

    def test_what_is_refused(self):
        with pytest.raises(SpecError, match="there is no module"):
            Function("nowhere:colours")
        with pytest.raises(SpecError, match="has no 'colour'; did you mean 'colours'"):
            Function(f"{__name__}:colour")
        with pytest.raises(SpecError, match="expected a function"):
            Function(f"{__name__}:SMALL")
        with pytest.raises(ValueError, match=r"gave float, expected a tensor \(B, D\)"):
            Function(f"{__name__}:scalar")
        with pytest.raises(ValueError, match=r"gave \(2, 3\) for 2 images, expected \(2, 4\)"):
            Function(f"{__name__}:colours", dim=4).features(images())


class TestTokens:
    """Features of cells, for representation alignment."""

    def test_inceptions_are_the_activations_whose_mean_are_the_features(self, inception_weights):
        extractor = Inception(str(inception_weights), "192")
        tokens = extractor.tokens(images())
        assert tokens.shape == (2, 35, 35, 192)
        torch.testing.assert_close(tokens.mean((1, 2)), extractor.features(images()), rtol=1e-4, atol=1e-5)

    def test_dinov2s_are_the_patches_without_the_class_token(self, dino_folder):
        extractor = Dinov2(str(dino_folder), size=42)
        states = extractor.network(pixel_values=torch.zeros(1, 3, 42, 42)).last_hidden_state
        tokens = extractor.tokens(images())
        assert (tokens.shape, states.shape) == ((2, 3, 3, 32), (1, 10, 32))
        torch.testing.assert_close(tokens[:1], extractor.tokens(images()[:1]), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(tokens[:, 0, 0], extractor.features(images()))

    def test_clips_have_the_norm_and_projection_of_the_pooled_token(self, clip_folder):
        extractor = Clip(str(clip_folder))
        outputs = extractor._outputs(images())
        with torch.no_grad():
            normed = extractor.network.vision_model.post_layernorm(outputs.last_hidden_state)
            torch.testing.assert_close(extractor.network.visual_projection(normed[:, 0]), extractor.features(images()))
            expected = extractor.network.visual_projection(normed[:, 1:]).reshape(2, 2, 2, 24)
        torch.testing.assert_close(extractor.tokens(images()), expected)

    def test_an_extractor_without_cells_has_one_token(self):
        tokens = Function(f"{__name__}:colours").tokens(images())
        assert tokens.shape == (2, 1, 1, 3)
        torch.testing.assert_close(tokens[:, 0, 0], colours(images()))
