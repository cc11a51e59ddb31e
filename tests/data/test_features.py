"""`data: features`: what is kept is what the text encoder gives, once, beside the latents it belongs to."""

import os
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sana_lab.checkpoints.build import build
from sana_lab.config import specs
from sana_lab.data.features import Features
from sana_lab.data.latents import Latents
from sana_lab.systems.dit import without

VAE, T5, LLM = {**tiny.VAE, "middle_attention": False}, tiny.T5, {**tiny.LLM, "instruction": "draw this: "}
LONG = " and a small blue square" * 3


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, str]:
    """A file of weights per part, so that each building gives the same one."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for kind, spec in (("autoencoder", VAE), ("text_encoder", T5), ("text_encoder", LLM)):
        save_file(specs.build(kind, spec).state_dict(), folder / f"{spec['name']}.safetensors")
    return {path.stem: str(path) for path in folder.iterdir()}


@pytest.fixture
def make(weights, tmp_path):
    """Features of ten pictures, two held out, with two captions each; one caption is said of all."""
    root = tmp_path / "pictures"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"a circle{LONG[: 6 * i]}\na picture\n", "utf-8")

    def make(text: dict[str, Any] = T5, latents: dict[str, Any] | None = None, **options) -> Features:
        pictures = {"name": "folder", "root": str(root), "size": 16, "held_out": 2}
        spec = {"name": "latents", "source": pictures, "autoencoder": VAE | {"weights": weights["vae"]}}
        spec |= {"cache": str(tmp_path / "latents"), "batch": 3} | (latents or {})
        given = {"batch": 3, "cache": str(tmp_path / "features"), "shard": 4, **options}
        return Features(spec, {**text, "weights": weights[text["name"]]}, **given)

    return make


def files(data: Features) -> dict[str, int]:
    """Files of the cache and when they were written."""
    return {p.name: p.stat().st_mtime_ns for p in data.store.folder.iterdir() if p.suffix != ".lock"}


def same_text(a, b) -> bool:
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.mask, b.mask)


@pytest.mark.parametrize("text", [T5, LLM], ids=lambda spec: spec["name"])
def test_kept_features_are_those_of_the_encoder(make, text):
    data = make(text)
    encoder = build("text_encoder", data.text_encoder).eval()
    for split, indices in (("train", range(8)), ("val", range(2))):
        batch = data.batch_at(indices, split)
        with torch.no_grad():
            expected, null = encoder(batch.prompts), encoder([""])
        assert torch.equal(batch.text.mask, expected.mask)
        wide = expected.tokens * expected.mask[:, :, None]
        torch.testing.assert_close(batch.text.tokens, wide, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(batch.null.tokens, null.tokens, atol=1e-5, rtol=1e-5)
        assert batch.null.tokens.shape == (1, 1, 32)


def test_kept_features_of_an_adapter_are_those_that_it_gives(make, weights, tmp_path):
    spec = {"name": "adapter", "encoder": {**T5, "weights": weights["t5"]}, "width": 32}
    weights["adapter"] = str(tmp_path / "adapter.safetensors")
    save_file(tiny.build("text_encoder", spec, seed=2).state_dict(), weights["adapter"])
    data = make(spec)
    encoder, batch = build("text_encoder", data.text_encoder).eval(), data.batch_at(range(8), "train")
    with torch.no_grad():
        expected, null = encoder(batch.prompts), encoder([""])
    assert torch.equal(batch.text.mask, expected.mask)
    real = expected.mask
    torch.testing.assert_close(batch.text.tokens[real], expected.tokens[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.null.tokens, null.tokens, atol=1e-5, rtol=1e-5)


def test_batches_are_those_of_the_latents_with_text(make):
    data = make()
    latents: Latents = specs.build("data", data.source)
    own = [b for b, _ in zip(data.train_dataloader(), range(7), strict=False)]
    theirs = [
        b for b, _ in zip(latents.train_dataloader(), range(7), strict=False)
    ]  # 7 x 3 items pass two epochs' ends
    assert [b.prompts for b in own] == [b.prompts for b in theirs]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(own, theirs, strict=True))
    assert all(same_text(b.text, data.text_at(b.prompts)) for b in own)
    assert [b.prompts for b in data.val_dataloader()] == [b.prompts for b in latents.val_dataloader()]
    assert all(b.images is None for b in own)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_workers_make_the_same_batches(make):
    alone = [b for b, _ in zip(make().train_dataloader(), range(3), strict=False)]
    shared = [b for b, _ in zip(make(workers=2).train_dataloader(), range(3), strict=False)]
    for a, b in zip(alone, shared, strict=True):
        assert a.prompts == b.prompts
        assert torch.equal(a.latents, b.latents)
        assert same_text(a.text, b.text)


def test_text_is_as_long_as_the_longest_of_the_batch(make):
    data = make()
    short, long = data.text_at(["a picture"]), data.text_at(["a picture", "a circle and a small"])
    assert short.mask.sum(1).tolist() == [short.tokens.shape[1]]
    assert long.mask.sum(1).tolist() == [short.tokens.shape[1], long.tokens.shape[1]]
    assert torch.equal(long.tokens[0, : short.tokens.shape[1]], short.tokens[0])
    assert not long.tokens[0, short.tokens.shape[1] :].any()


def test_buckets_make_lengths_few_and_change_no_loss(make):
    """Captions of 2 to 16 tokens: lengths are multiples of 8, and padding is not looked at."""
    plain, rounded = make(), make(bucket=8)
    lengths = {b.text.tokens.shape[1] for b, _ in zip(rounded.train_dataloader(), range(7), strict=False)}
    assert lengths <= {8, 16}
    dit = specs.build("dit", tiny.DIT, channels=4, text_dim=32)
    for step in range(3):
        a, b = plain.train_batch(step), rounded.train_batch(step)
        n = a.text.tokens.shape[1]
        assert b.text.mask.sum(1).tolist() == a.text.mask.sum(1).tolist()
        assert torch.equal(b.text.tokens[:, :n], a.text.tokens)
        drop = torch.tensor([False, True, False])
        times, out = torch.tensor([0.1, 0.5, 0.9]), []
        for batch in (a, b):
            out.append(dit(batch.latents, times, without(batch.text, drop, batch.null)))
        torch.testing.assert_close(*out, rtol=1e-5, atol=1e-6)
    assert files(plain) == files(rounded)


def test_a_batch_is_a_function_of_its_own_seed_and_step(make):
    first = make(seed=1).train_batch(5).prompts
    assert make(seed=1, latents={"batch": 7}).train_batch(5).prompts == first
    assert make(seed=2).train_batch(5).prompts != first


def test_captions_that_nobody_said_are_refused(make):
    with pytest.raises(KeyError, match="a triangle"):
        make().text_at(["a triangle"])


class TestCache:
    def test_each_distinct_caption_is_encoded_once(self, make):
        data = make()
        kept = [captions[0] for captions in data.store.captions]
        assert len(kept) == len(set(kept))
        assert set(kept) == {"", "a picture", *(f"a circle{LONG[: 6 * i]}".strip() for i in range(10))}
        before = files(data)
        assert files(make(batch=2, seed=4)) == before

    def test_another_autoencoder_shares_the_text(self, make, tmp_path):
        before = files(make())
        other = {k: v + 1 for k, v in load_file(make().source["autoencoder"]["weights"]).items()}
        save_file(other, tmp_path / "other.safetensors")
        data = make(latents={"autoencoder": VAE | {"weights": str(tmp_path / "other.safetensors")}})
        assert files(data) == before
        assert data.latents.digest() != make().latents.digest()

    def test_whatever_changes_the_features_makes_another_set(self, make, weights, tmp_path):
        sets = [make(), make(LLM), make({**T5, "max_tokens": 8}), make(latents={"items": 4})]
        changed = {k: v + 1 for k, v in load_file(weights["t5"]).items()}
        save_file(changed, tmp_path / "t5.safetensors")
        sets.append(make())
        sets[-1].text_encoder = {**T5, "weights": str(tmp_path / "t5.safetensors")}
        assert len({data.store.folder for data in sets}) == 5

    @pytest.mark.parametrize("harm", ["cut", "gone"])
    def test_what_a_crash_left_out_is_made_again_and_no_more(self, make, harm):
        data = make()
        expected, before = data.batch_at(range(8)).text, files(data)
        cut = data.store.folder / "text-00001.safetensors"
        if harm == "cut":
            os.truncate(cut, cut.stat().st_size - 10)
        else:
            cut.unlink()
        again = make()
        assert same_text(again.batch_at(range(8)).text, expected)
        assert {name for name, when in files(again).items() if when != before[name]} == {cut.name, "text-00001.jsonl"}


@pytest.mark.parametrize("options", [{"batch": 0}, {"seed": -1}, {"shard": 0}, {"bucket": 0}, {"workers": -1}])
def test_numbers_out_of_range(make, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        make(**options)


def test_an_encoder_that_learned_nothing_is_refused(make):
    data = make()
    data.text_encoder = T5
    with pytest.raises(ValueError, match="'t5' has not learned anything yet; expected its `model` or `weights`"):
        data.setup()


def test_a_source_of_pictures_is_refused(weights):
    data = Features({"name": "shapes", "size": 16}, T5 | {"weights": weights["t5"]})
    with pytest.raises(ValueError, match="source is 'shapes', expected a 'latents'"):
        data.setup()


def test_a_spec_builds_one(make):
    data = make()
    spec = {"name": "features", "source": data.source, "text_encoder": data.text_encoder, "cache": str(data.cache)}
    assert specs.build("data", spec | {"shard": 4}).store.folder == data.store.folder
    with pytest.raises(specs.SpecError, match="did you mean 'text_encoder'"):
        specs.resolve("data", spec | {"text_encodr": "t5"})
