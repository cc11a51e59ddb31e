"""LoRA on a DiT: training of it alone, its file in diffusers' layout, and merging of such files."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sana_lab import __main__, api
from sana_lab.checkpoints import weights
from sana_lab.config import experiments, hashing
from sana_lab.config.specs import SpecError
from sana_lab.pretrained import lora
from sana_lab.systems import lora as lora_part
from sana_lab.systems.adapters import Factors
from sana_lab.systems.lora import Lora
from sana_lab.training import checks, train

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader")  # mlflow 3.17 with sqlalchemy 2.1

DIT = tiny.TWO_BLOCKS
KEY = "transformer.transformer_blocks.{}.attn1.to_k"  # of diffusers


def change(dit: Any, rank: int = 2, layers: tuple[str, ...] = Lora().targets) -> Factors:
    """Random factors of layers of every block."""
    random, factors = torch.Generator().manual_seed(3), {}
    for name, module in dit.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(tuple(layers)) and name.startswith("blocks."):
            n, m = module.weight.shape
            factors[name] = (torch.randn(rank, m, generator=random), torch.randn(n, rank, generator=random) / 10)
    return factors


def added(dit: nn.Module, factors: Factors) -> dict[str, Tensor]:
    state = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    for layer, (down, up) in factors.items():
        state[f"{layer}.weight"] += up @ down
    return state


class TestFiles:
    @pytest.mark.parametrize("layers", [Lora().targets, ["ffn.expand", "ffn.project", "attention.qkv"]])
    def test_what_is_written_is_merged(self, tmp_path, layers):
        dit = tiny.dit(DIT)
        factors = change(dit, layers=tuple(layers))
        expected = added(dit, factors)
        assert len(factors) == 2 * len(layers)
        lora.write(tmp_path / lora.FILE, dit, factors)
        lora.merge(dit, tmp_path)
        for name, tensor in dit.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)

    def test_the_strength_scales_and_is_undone_by_its_opposite(self, tmp_path):
        dit = tiny.dit(DIT)
        before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
        lora.write(tmp_path / "x.safetensors", dit, change(dit))
        lora.merge(dit, tmp_path / "x.safetensors", 0.5)
        assert not torch.equal(dit.state_dict()["blocks.0.cross.q.weight"], before["blocks.0.cross.q.weight"])
        lora.merge(dit, tmp_path / "x.safetensors", -0.5)
        torch.testing.assert_close(dict(dit.state_dict()), before, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("layers", [Lora().targets, ["ffn.expand", "ffn.project"]])
    def test_diffusers_reads_it_and_gives_the_same_velocity(self, tmp_path, layers):
        pytest.importorskip("peft")
        diffusers = pytest.importorskip("diffusers")
        from sana_lab.pretrained.export import export

        dit = tiny.dit(DIT)
        export(dit, tmp_path / "dit")
        lora.write(tmp_path / lora.FILE, dit, change(dit, layers=tuple(layers)))
        theirs = diffusers.SanaTransformer2DModel.from_pretrained(tmp_path / "dit")
        state = diffusers.SanaPipeline.lora_state_dict(str(tmp_path), weight_name=lora.FILE)
        theirs.load_lora_adapter(state, prefix="transformer")
        x, t, text = (
            tiny.latents(dtype=torch.float32),
            torch.tensor([0.25, 0.5]),
            tiny.caption([3, 5], dtype=torch.float32),
        )
        plain = dit(x, t, text)
        lora.merge(dit, tmp_path / lora.FILE)
        ours = dit(x, t, text)
        with torch.no_grad():
            output = theirs(x, text.tokens, 1000 * t, encoder_attention_mask=text.mask).sample
        assert tiny.error(ours, plain) > 0.01
        torch.testing.assert_close(output, ours, rtol=1e-3, atol=1e-4)

    def test_a_file_of_peft_has_its_scale_in_the_metadata(self, tmp_path):
        """alpha 4 at rank 2, of one of q, k and v alone."""
        dit, name = tiny.dit(DIT), KEY.format(1)
        a, b = torch.randn(2, 32), torch.randn(32, 2)
        about = {lora.METADATA: '{"transformer.r": 2, "transformer.lora_alpha": 4}'}
        save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / "x.safetensors", about)
        before = dit.blocks[1].attention.qkv.weight.detach().clone()
        lora.merge(dit, tmp_path / "x.safetensors")
        q, k, v = (dit.blocks[1].attention.qkv.weight.detach() - before).chunk(3)
        assert not q.any()
        assert not v.any()
        torch.testing.assert_close(k, 2 * b @ a, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("state", "words"),
        [
            (
                {"transformer.transformer_blocks.7.attn1.to_k.lora_A.weight": torch.zeros(2, 32)},
                "did you mean 'transformer.",
            ),
            (
                {
                    f"{KEY.format(1)}.lora_A.weight": torch.zeros(2, 8),
                    f"{KEY.format(1)}.lora_B.weight": torch.zeros(32, 2),
                },
                r"by a matrix of \(32, 8\), expected \(32, 32\)",
            ),
            ({"x.weight": torch.zeros(2)}, "holds x.weight; expected lora_A and lora_B of layers alone"),
        ],
    )
    def test_what_fits_nothing_is_said(self, tmp_path, state, words):
        save_file(state, tmp_path / "x.safetensors")
        with pytest.raises(SpecError, match=words):
            lora.merge(tiny.dit(DIT), tmp_path / "x.safetensors")

    def test_a_file_that_is_missing(self, tmp_path):
        with pytest.raises(SpecError, match="there is no LoRA file"):
            lora.merge(tiny.dit(DIT), tmp_path / "x.safetensors")


@pytest.fixture
def folder(here: Path) -> Path:
    every = {"trainer.max_steps": 4, "prompts": [], "data.size": 16}
    tiny.write_experiment(here, changes=every)
    return here


TUNED = [
    "parent.weights=experiment:tiny",
    "system.adapter={name: lora, rank: 2, alpha: 4.0}",
    "system.optimizer.lr=0.05",
]


class TestTraining:
    @pytest.fixture(autouse=True)
    def _peft(self) -> None:
        pytest.importorskip("peft")

    def test_it_trains_the_adapter_alone_and_leaves_it_merged_and_by_itself(self, folder):
        base = weights.read(train.train(experiments.load("tiny")))
        path = train.train(experiments.load("tiny", TUNED))
        tuned = weights.read(path)
        changed = {name for name in base if not torch.equal(base[name], tuned[name])}
        layers = {f"dit.blocks.0.{name}.weight" for name in Lora().targets}
        assert tuned.keys() == base.keys()
        assert changed == layers
        alone = load_file(path.parent / lora.FILE)
        assert len(alone) == 2 * 8  # q, k, v and output, twice
        restored = api.load("tiny")
        lora.merge(restored.dit, path.parent)
        for name, tensor in restored.dit.state_dict().items():
            torch.testing.assert_close(tensor, tuned[f"dit.{name}"], rtol=1e-5, atol=1e-6)

    def test_a_layer_that_diffusers_lacks_is_said_and_its_change_is_in_the_weights(self, folder, capsys):
        block = ["system.dit.attention=gated_delta"]
        first = train.train(experiments.load("tiny", block))
        words = [f"parent.weights={first}", "system.adapter={name: lora, rank: 2, targets: [attention.gates]}"]
        path = train.train(experiments.load("tiny", [*block, *TUNED, *words]))
        base = weights.read(first)
        tuned = weights.read(path)
        name = "dit.blocks.0.attention.gates.weight"
        assert not torch.equal(base[name], tuned[name])
        assert not (path.parent / lora.FILE).exists()
        assert f"no {lora.FILE}, as diffusers' DiT has no layer" in capsys.readouterr().err

    def test_a_killed_training_ends_as_an_unbroken_one(self, folder, monkeypatch):
        train.train(experiments.load("tiny"))
        experiment = experiments.load("tiny", [*TUNED, "trainer.checkpoint_every=2", "trainer.max_steps=12"])
        with pytest.raises(Stop):
            train.train(experiment, progress=stop)
        resumed = weights.read(train.train(experiment))
        first = weights.find_trained(experiments.load("tiny"), "tiny")
        monkeypatch.setattr(weights, "HOME", folder / "elsewhere")
        whole = weights.read(
            train.train(experiments.load("tiny", [*TUNED, f"parent.weights={first}", "trainer.max_steps=12"]))
        )
        assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())

    def test_the_verb_samples_with_it(self, folder, runs):
        train.train(experiments.load("tiny"))
        path = train.train(experiments.load("tiny", TUNED))
        words = ["sample", "a red circle", "--model", "tiny", "--size", "16"]
        assert __main__.main([*words, "--out", "plain"]) == 0
        assert __main__.main([*words, "--out", "tuned", "--lora", str(path.parent / lora.FILE)]) == 0
        assert __main__.main([*words, "--out", "none", "--lora", str(path.parent), "--lora-scale", "0"]) == 0
        plain, tuned, none = (api.Image.open(next(Path(name).glob("*.png"))) for name in ("plain", "tuned", "none"))
        assert plain.tobytes() == none.tobytes() != tuned.tobytes()
        assert '"lora": ' in tuned.text["sana_lab"]

    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            (["system.adapter=lora"], "this one has no weights; expected parent.weights, or system.dit.weights"),
            ([*TUNED, "system.train_text=true"], "system.adapter trains alone; expected null"),
            (
                [*TUNED, "system.adapter.targets=[attention.qvk]"],
                "ends in 'attention.qvk'; did you mean 'attention.qkv'",
            ),
        ],
    )
    def test_what_is_wrong_is_said_before_training(self, folder, overrides, words):
        with pytest.raises(SpecError, match=words):
            checks.check(experiments.load("tiny", overrides))


def test_without_peft_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setattr(lora_part.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"needs peft: pip install 'sana_lab\[lora\]'"):
        checks.check(experiments.load("tiny", ["system.adapter=lora"]))


def test_no_adapter_keeps_the_hash(folder):
    config = experiments.load("tiny")
    before = {**config, "system": {k: v for k, v in config["system"].items() if k not in ("adapter", "groups")}}
    assert hashing.experiment_hash(before) == hashing.experiment_hash(config)


class Stop(Exception):
    """Ends a training in a test."""


def stop(step: int, *_: object) -> None:
    if step >= 10:
        raise Stop
