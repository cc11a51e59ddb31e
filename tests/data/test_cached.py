"""`data: cached`: what is read is what the encoders gave; kills, damage and other encoders; exact continuation."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pictures
import torch
from omegaconf import OmegaConf

from sana_lab.checkpoints import weights
from sana_lab.checkpoints.build import build
from sana_lab.commands import cache
from sana_lab.config import experiments, specs
from sana_lab.config.specs import SpecError
from sana_lab.data.cached import Cached
from sana_lab.training import checks, train
from sana_lab.types import Part

NUMBERS = range(40)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with tars and weights."""
    folder = tmp_path_factory.mktemp("cached")
    tiny_pictures.tars(folder / "tars", NUMBERS)
    (folder / "parts.json").write_text(json.dumps(tiny_pictures.weights(folder)))
    return folder


@pytest.fixture
def spec(place, tmp_path):
    def spec(source: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        pictures = {
            "name": "pictures",
            "root": str(place / "tars"),
            "size": 32,
            "buckets": "sana",
            "multiple": 8,
            "batch": 4,
        }
        pictures |= {"held_out": 6, "index": str(tmp_path / "index"), **(source or {})}
        parts = json.loads((place / "parts.json").read_text())
        places = {"cache": str(tmp_path / "cache"), "shard": 8, "batch": 4, "workers": 0}
        return {"source": pictures, **parts, **places, **options}

    return spec


@pytest.fixture
def make(spec):
    def make(source: dict[str, Any] | None = None, **options: Any) -> Cached:
        data = Cached(**spec(source, **options))
        data.setup("fit")
        return data

    return make


def shard(data: Cached, number: int, kind: str = "latents") -> Path:
    store = getattr(data.stores, kind)
    return store.folder / f"{kind}-{number:05}.safetensors"


def times(data: Cached) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for s in data.stores.each() for p in s.folder.glob("*.safetensors")}


class TestContent:
    @pytest.mark.parametrize("split", ["train", "val"])
    def test_is_what_the_encoders_give(self, make, split):
        data = make(dtype="float32", text_dtype="float32")
        autoencoder, encoder = (build(k, getattr(data, k)).eval() for k in ("autoencoder", "text_encoder"))
        batches = [data.train_batch(n) for n in range(9)] if split == "train" else list(data.val_dataloader())
        views = (
            [data.source.train_batch(n) for n in range(9)] if split == "train" else list(data.source.val_dataloader())
        )
        for batch, pictures in zip(batches, views, strict=True):
            with torch.no_grad():
                expected, text, null = autoencoder.encode(pictures.images), encoder(batch.prompts), encoder([""])
            torch.testing.assert_close(batch.latents, expected, atol=1e-5, rtol=1e-5)
            assert torch.equal(batch.text.mask, text.mask)
            wide = text.tokens * text.mask[:, :, None]
            torch.testing.assert_close(batch.text.tokens, wide, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(batch.null.tokens, null.tokens, atol=1e-5, rtol=1e-5)

    def test_stored_types_round_alone(self, make):
        whole, half = make(dtype="float32", text_dtype="float32"), make()
        a, b = whole.train_batch(3), half.train_batch(3)
        assert b.text.tokens.dtype == torch.bfloat16
        assert torch.equal(a.text.tokens.bfloat16(), b.text.tokens)
        assert torch.equal(a.latents.half().float(), b.latents)

    def test_captions_alone_without_a_text_encoder(self, make):
        batch = make(text_encoder=None).train_batch(0)
        assert batch.text is None
        assert len(batch.prompts) == 4

    def test_captions_by_score(self, make):
        """The second caption has 30, the first 20: below the threshold, and rare at a low temperature."""
        for choice in (
            {"rule": "uniform", "min_score": 25.0},
            {"rule": "softmax"},
            {"rule": "power", "temperature": 0.02},
        ):
            data = make(choice=choice)
            assert all(p.startswith("noise") for n in range(9) for p in data.train_batch(n).prompts)
        either = make(choice={"rule": "uniform"})
        assert {p.split()[0] for n in range(9) for p in either.train_batch(n).prompts} == {"noise", "a"}

    def test_ranks_share_each_batch(self, make):
        data = make(choice={"rule": "uniform"})
        for number in range(8):
            whole, parts = data.train_batch(number), [data.train_batch(number, Part(rank, 2)) for rank in range(2)]
            assert torch.equal(whole.latents, torch.cat([part.latents for part in parts]))
            assert whole.prompts == [prompt for part in parts for prompt in part.prompts]

    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
    def test_workers_make_the_same_batches(self, make):
        alone, shared = make(), make(workers=2)
        for a, b, _ in zip(alone.train_dataloader(), shared.train_dataloader(), range(12), strict=False):
            assert torch.equal(a.latents, b.latents)
            assert torch.equal(a.text.tokens, b.text.tokens)

    def test_pictures_beside_latents(self, make):
        data = make(images=True)
        assert torch.equal(data.train_batch(2).images, data.source.train_batch(2).images)

    def test_a_picture_beside_latents_that_breaks(self, make, tmp_path, capsys):
        """The next one takes its place with its latents and captions."""
        root = tiny_pictures.folder(tmp_path / "pictures", NUMBERS)
        data = make({"root": str(root), "unreadable": 0.1}, images=True, dtype="float32")
        row = int(data.selection("train").rows[0])
        (root / f"{row:05}.png").write_bytes(b"no picture")
        batches = [data.train_batch(n) for n in range(9)]
        assert "1 of 40 so far; the next picture takes its place" in capsys.readouterr().err
        autoencoder = build("autoencoder", data.autoencoder).eval()
        with torch.no_grad():
            for batch in batches:
                torch.testing.assert_close(batch.latents, autoencoder.encode(batch.images), atol=1e-5, rtol=1e-5)
        assert not any(f"a picture {row}" in batch.prompts for batch in batches)

    def test_items_of_several_buckets(self, make):
        with pytest.raises(ValueError, match="items of several buckets have no common shape"):
            make().batch_at(range(30))


class TestMaking:
    def test_nothing_is_encoded_twice(self, make):
        before = times(make())
        assert times(make(choice={"rule": "power"}, batch=2, seed=3)) == before

    def test_only_what_changed_is_encoded_anew(self, make, capsys):
        first = make()
        parts = {"text_encoder": {**first.text_encoder, "max_tokens": 12}}
        second = make(**parts)
        assert second.stores.latents.folder == first.stores.latents.folder
        assert second.stores.text.folder != first.stores.text.folder
        assert "text_encoder.max_tokens 16, not 12" in capsys.readouterr().err

    def test_a_cache_of_another_encoder_says_what_differs(self, make, spec):
        folder = make(text_encoder=None).stores.latents.folder
        assert make(text_encoder=None, cache=str(folder)).len_train == 34
        other = Cached(**spec({"size": 64}, text_encoder=None, cache=str(folder)))
        with pytest.raises(SpecError, match=r"was made with .*transform.size 32, not 64"):
            other.setup()

    def test_a_folder_of_caches_may_have_any_name(self, make, tmp_path):
        data = make(text_encoder=None, cache=str(tmp_path / "latents-of-mine"))
        assert data.stores.latents.folder.parent == tmp_path / "latents-of-mine"

    def test_encoders_without_weights(self, spec):
        bare = {k: v for k, v in spec()["autoencoder"].items() if k != "weights"}
        with pytest.raises(SpecError, match=r"autoencoder 'vae' has not learned anything yet; expected `weights`"):
            Cached(**spec(autoencoder=bare)).setup()

    def test_random_crops_are_refused(self, spec):
        with pytest.raises(SpecError, match=r"expected source.crop=center source.flip=false"):
            Cached(**spec({"flip": True})).setup()

    def test_an_interrupted_one_goes_on(self, make, spec, monkeypatch):
        data, done = Cached(**spec(text_encoder=None)), []

        def stop(what: str, rows: int) -> None:
            done.append(rows)
            if len(done) == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            data.fill(stop)
        assert not data.stores.latents.complete
        assert data.stores.latents.done() == 24
        before = times(data)
        whole = make(text_encoder=None)
        assert {name: t for name, t in times(whole).items() if name in before} == before
        assert whole.stores.latents.complete


class TestDamage:
    def test_a_truncated_shard_is_named_skipped_and_counted(self, make, capsys):
        path = shard(make(), 1)
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(ValueError, match=r"8 of 40 pictures are left out: .*latents-00001.safetensors; at most"):
            make()
        data = make(unreadable=0.2)
        assert data.len_train + data.len_val == 32
        assert f"8 of 40 pictures are left out: {path}" in capsys.readouterr().err
        rows = {*data.selection("train").rows.tolist(), *data.selection("val").rows.tolist()}
        assert rows == {*range(40)} - {*range(8, 16)}
        assert all(len(data.train_batch(n).prompts) == 4 for n in range(20))

    def test_a_shard_of_text_that_is_missing(self, make):
        shard(make(), 4, "text").unlink()
        assert {*make(unreadable=0.2).selection("train").rows.tolist()} <= {*range(32)}

    def test_it_is_made_again_to_the_last_bit(self, make):
        data = make()
        path, content = shard(data, 2), shard(data, 2).read_bytes()
        path.write_bytes(content[:-10])
        Cached.fill(make(unreadable=1.0))
        assert path.read_bytes() == content

    def test_verify_reads_all(self, make):
        data = make()
        assert {problem for store in data.stores.each() for _, problem in store.verify()} == {None}
        content = bytearray(shard(data, 3).read_bytes())
        content[-5] ^= 1
        shard(data, 3).write_bytes(content)
        problems = {name: problem for name, problem in data.stores.latents.verify() if problem}
        assert problems == {"latents-00003.safetensors": "has other content than was written"}

    def test_a_picture_that_broke_after_the_index(self, make, place, spec, tmp_path, capsys):
        root = tiny_pictures.folder(tmp_path / "pictures", range(40))
        data = Cached(**spec({"root": str(root)}, text_encoder=None, unreadable=0.1))
        data.source.setup()
        (root / "00005.png").write_bytes(b"no picture")
        data.setup()
        assert 5 not in [*data.selection("train").rows, *data.selection("val").rows]
        assert "1 of 40 pictures are left out: 00005.png (not an image" in capsys.readouterr().err

    def test_a_root_that_is_missing_for_a_while(self, spec, tmp_path):
        """Nothing is stored of it; when it is back, everything is encoded."""
        for root in (
            tiny_pictures.folder(tmp_path / "pictures", NUMBERS),
            tiny_pictures.tars(tmp_path / "tars", NUMBERS),
        ):
            Cached(**spec({"root": str(root)}, text_encoder=None)).source.setup()
            away = root.rename(tmp_path / "away")
            data = Cached(**spec({"root": str(root)}, text_encoder=None))
            with pytest.raises(SpecError, match=f"there is no .*{root.name}"):
                data.fill()
            assert not list(data.stores.latents.folder.glob("*.safetensors"))
            away.rename(root)
            data = Cached(**spec({"root": str(root)}, text_encoder=None))
            data.setup()
            assert data.len_train + data.len_val == 40

    def test_a_picture_that_could_be_read_again_is_repaired(self, spec, tmp_path):
        root = tiny_pictures.folder(tmp_path / "pictures", NUMBERS)
        options = {"text_encoder": None, "unreadable": 0.1}
        data, content = Cached(**spec({"root": str(root)}, **options)), (root / "00005.png").read_bytes()
        data.source.setup()
        (root / "00005.png").write_bytes(b"no picture")
        data.setup()
        problems = {name: problem for name, problem in data.stores.latents.verify() if problem}
        assert [*problems] == ["latents-00000.safetensors"]
        assert "lacks 1 pictures that could not be read: 00005.png" in problems["latents-00000.safetensors"]
        (root / "00005.png").write_bytes(content)
        data.stores.latents.discard("latents-00000.safetensors")
        data.fill()
        assert {problem for _, problem in data.stores.latents.verify()} == {None}


EXPERIMENT = """
system:
  name: dit
  dit: {name: sana, dim: 32, depth: 1, cross_heads: 2}
  warmup: 2
trainer: {max_steps: 14, accelerator: cpu, threads: 1, log_every: 1, validate_every: 6, checkpoint_every: 6}
"""


@pytest.fixture
def experiment(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "HOME", tmp_path / "runs")

    def experiment(**options: Any) -> Any:
        data = {"name": "cached", **spec(choice={"rule": "uniform"}, **options)}
        given = OmegaConf.to_container(OmegaConf.create(EXPERIMENT))
        given["system"] |= {kind: data[kind] for kind in ("autoencoder", "text_encoder")}
        path = tmp_path / "small.yaml"
        path.write_text(OmegaConf.to_yaml({**given, "data": data}))
        return experiments.load(str(path))

    return experiment


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.filterwarnings("ignore:.*fork"))])
def test_training_goes_on_in_mid_epoch_to_the_last_bit(experiment, tmp_path, workers):
    """34 items in four buckets are 8 or 9 batches an epoch: the checkpoint of step 6 is amid the first."""
    config = experiment(workers=workers)
    whole = weights.read(train.train(config))
    (tmp_path / "runs" / "models").rename(tmp_path / "whole")

    with pytest.raises(tiny_pictures.Stop):
        train.train(config, progress=tiny_pictures.stop_at_ten)
    assert [path.name for path in train.folder(config).glob("*.ckpt")] == ["step=6.ckpt"]
    resumed = weights.read(train.train(config))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_two_processes_go_on_to_the_last_bit_and_train_the_model_of_one(experiment, tmp_path):
    def trained() -> tuple[dict[str, torch.Tensor], Path]:
        home = train.folder(config)
        return weights.read(train.train(config, progress=print)), home

    config = experiment()
    single, home = trained()
    home.rename(tmp_path / "single")
    config["trainer"]["devices"] = 2
    whole, home = trained()
    home.rename(tmp_path / "whole")
    with pytest.raises(tiny_pictures.Stop):
        train.train(config, progress=tiny_pictures.stop_at_ten)
    assert [path.name for path in home.glob("*.ckpt")] == ["step=6.ckpt"]
    resumed, _ = trained()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert max(float((whole[name] - single[name]).abs().max()) for name in whole) < 1e-3


def test_methods_train_on_batches_that_are_not_square(experiment):
    """Pictures in four buckets, so that tokens are 4 x 4 and otherwise; the teacher has 8 x 8."""
    experiment(images=True)
    fit = "fit: interpolate, block: 0"
    methods = f"[{{name: repa, {fit}}}, {{name: irepa, {fit}}}, {{name: tread, start: 0, stop: 1}}]"
    config = experiments.load("small.yaml", [f"system.method={methods}"])
    checks.check(config)
    assert weights.read(train.train(config))
    data = specs.build("data", config["data"])
    data.setup("fit")
    assert len({data.train_batch(number).latents.shape[2:] for number in range(9)}) > 2


def test_alignment_that_fits_no_bucket_is_refused_before_training(experiment):
    experiment(images=True)
    words = "method 'repa': teacher 'shapes', in the aspect-ratio bucket of .* pixels, has 8 x 8 .*fit: interpolate"
    with pytest.raises(SpecError, match=words):
        checks.check(experiments.load("small.yaml", ["system.method={name: repa, block: 0}"]))


def test_the_verb_encodes_verifies_and_repairs(experiment, tmp_path, capsys):
    experiment()
    trained: list[str] = []
    assert cache.main("small.yaml", [], trained.append) == 0
    assert "34 items to train on, 6 held out; 81 rows encoded" in capsys.readouterr().out
    assert cache.main("small.yaml", [], trained.append, verify=True) == 0
    assert "11 shards, 0 broken" in capsys.readouterr().out
    path = next((tmp_path / "cache").glob("text-*/text-00002.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
    assert cache.main("small.yaml", [], trained.append, verify=True) == 1
    assert "text-00002.safetensors has other content than was written" in capsys.readouterr().err
    assert cache.main("small.yaml", [], trained.append, repair=True) == 0
    assert path.read_bytes() == content
    assert trained == []


def test_what_the_verb_refuses(experiment):
    experiment()
    with pytest.raises(SpecError, match=r"data 'shapes' is not encoded before training; expected one of cached"):
        cache.main("small.yaml", ["data={name: shapes, size: 32}"], print)
    with pytest.raises(SpecError, match="--processes is 0; expected at least 1"):
        cache.main("small.yaml", [], print, processes=0)
    with pytest.raises(SpecError, match=r"`multiple` of data 'pictures', 4 is not a multiple of 8"):
        cache.main("small.yaml", ["data.source.multiple=4"], print)


def test_verify_trains_nothing(experiment, monkeypatch):
    experiment()
    trained: list[str] = []
    monkeypatch.setattr(experiments, "prerequisites", lambda given: ["vae"])
    monkeypatch.setattr(weights, "ready", lambda given: None)
    monkeypatch.setattr(cache.experiments, "load", lambda name, *_: {"data": {"name": "cached"}})
    monkeypatch.setattr(cache, "check", lambda given: None)
    with pytest.raises(SpecError, match="experiment 'vae' encodes this data and is not trained; nothing to verify"):
        cache.main("small.yaml", [], trained.append, verify=True)
    assert trained == []


def test_a_process_that_fails_is_reported_while_others_work(monkeypatch):
    """The other process goes on until the report is read."""
    reported = threading.Event()

    def work(spec: Any, number: int, processes: int) -> None:
        if number == 0:
            raise ValueError("no space")
        assert reported.wait(20)

    class Report:
        def write(self, text: str) -> None:
            if "a process of the encoding failed: no space" in text:
                reported.set()

        def flush(self) -> None:
            pass

    monkeypatch.setattr(cache, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count))
    monkeypatch.setattr(cache, "_work", work)
    monkeypatch.setattr(cache, "_progress", lambda stores: contextlib.nullcontext(lambda: None))
    monkeypatch.setattr(cache.sys, "stderr", Report())
    with pytest.raises(ValueError, match="no space"):
        cache._start({}, [], 2)
    assert reported.is_set()


@pytest.mark.slow
def test_killed_processes_of_the_verb_leave_a_cache_that_goes_on(experiment, tmp_path):
    experiment(shard=1)
    command = [sys.executable, "-m", "sana_lab", "cache", "small.yaml", "--processes", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
    folder = tmp_path / "cache"
    while len(list(folder.glob("latents-*/*.safetensors"))) < 3 and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*/*.safetensors")}
    assert 3 <= len(before) < 80
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "34 items to train on, 6 held out" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in before} == before
    subprocess.run([*command[:5], "--verify"], cwd=tmp_path, check=True)
    path = next(folder.glob("latents-*/latents-00003.safetensors"))
    content = bytearray(path.read_bytes())
    path.write_bytes(bytes([*content[:-1], content[-1] ^ 1]))
    checked = subprocess.run([*command[:5], "--verify"], cwd=tmp_path, capture_output=True, text=True)
    assert (checked.returncode, "latents-00003.safetensors has other content" in checked.stderr) == (1, True)
    subprocess.run([*command[:5], "--repair"], cwd=tmp_path, check=True)
    assert path.read_bytes() == bytes(content)


def test_numbers_of_a_batch_are_not_written_to_by_another(make):
    data = make()
    first = data.train_batch(0)
    copy = first.latents.clone(), first.text.tokens.clone()
    data.train_batch(1)
    assert torch.equal(first.latents, copy[0])
    assert torch.equal(first.text.tokens, copy[1])
    assert np.isfinite(first.latents.numpy()).all()


def test_bytes_to_write_are_those_of_latents_and_at_most_those_of_text(spec):
    data = Cached(**spec())
    latents, text, _ = data.stores
    missing = data.bytes_to_write()
    data.setup("fit")
    facts = {s: s.table.meta for s in (latents, text)}
    stored = {s.folder: int(s.table["length"][:].sum()) * m["width"] * 2 for s, m in facts.items()}
    assert missing[latents.folder] == stored[latents.folder]
    assert 0 < missing[text.folder] <= stored[text.folder]
    assert data.bytes_to_write() == {latents.folder: 0, text.folder: 0}
