"""Eight-bit denoisers against the definition, rounded by hand; torchao only does it faster."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from sana_lab.bench.bench import bench
from sana_lab.config import experiments, hashing, schema
from sana_lab.config.specs import SpecError
from sana_lab.costs.live_memory import LiveBytes, inner_tensors, module_tensors, tensor_bytes
from sana_lab.diffusion.sampling import Overflow, Sampling
from sana_lab.models.dit import Dit
from sana_lab.systems import quantize as module
from sana_lab.systems.quantize import layers, quantize, quantized
from sana_lab.systems.text2image import TextToImage
from sana_lab.training import checks
from sana_lab.types import Text

torchao = pytest.importorskip("torchao")

DIT = {**tiny.DIT, "dim": 64, "depth": 2}
KINDS = ("attention.qkv", "attention.proj", "cross.q", "cross.kv", "cross.proj", "ffn.expand", "ffn.project")


def make(**options: Any) -> Dit:
    return tiny.dit(DIT, **options)


def asked() -> tuple[Tensor, Tensor, Text]:
    random = torch.Generator().manual_seed(1)
    text = Text(torch.randn(2, 5, 12, generator=random), torch.arange(5) < torch.tensor([[3], [5]]))
    return torch.randn(2, 4, 6, 4, generator=random), torch.tensor([0.2, 0.9]), text


def rounded(x: Tensor) -> Tensor:
    """Each row in 255 even steps around zero."""
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x * (1 / scale)).round().clamp(-128, 127) * scale  # the largest, 127.5 steps, goes either way


class Rounded(nn.Module):
    """The definition: what a quantised layer stands for."""

    def __init__(self, layer: nn.Linear, activations: bool) -> None:
        super().__init__()
        self.in_features = layer.in_features
        self.weight, self.bias, self.activations = rounded(layer.weight.detach()), layer.bias, activations

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(rounded(x) if self.activations else x, self.weight, self.bias)


def by_hand(how: str) -> Dit:
    dit = make()
    for name in layers(dit, how):
        parent, _, last = name.rpartition(".")
        setattr(dit.get_submodule(parent), last, Rounded(dit.get_submodule(name), how == "w8a8"))
    return dit


@pytest.mark.parametrize("how", ["int8", "w8a8"])
@torch.no_grad()
def test_a_layer_is_what_rounding_by_hand_gives(how: str):
    ours, theirs, random = quantize(make(), how), by_hand(how), torch.Generator().manual_seed(3)
    for name in layers(make(), how):
        x = torch.randn(40, ours.get_submodule(name).in_features, generator=random)
        assert tiny.error(ours.get_submodule(name)(x), theirs.get_submodule(name)(x)) < 1e-6


@pytest.mark.parametrize(("how", "share"), [("int8", 1e-2), ("w8a8", 0.5)])
@torch.no_grad()
def test_a_velocity_is_as_far_as_rounding_takes_it(how: str, share: float):
    """Of w8a8 both are rounded anew in each layer, so that they part by less than what rounding itself does."""
    exact, expected, found = (dit(*asked()) for dit in (make(), by_hand(how), quantize(make(), how)))
    step = tiny.error(expected, exact)
    assert 1e-4 < step < 3e-3
    assert tiny.error(found, expected) < share * step


@pytest.mark.parametrize(("how", "kept"), [("int8", ()), ("w8a8", ("cross.kv",))])
@pytest.mark.parametrize("attention", ["linear", "softmax"])
@torch.no_grad()
def test_the_products_of_the_blocks_and_nothing_else(how: str, kept: tuple[str, ...], attention: str):
    dit = quantize(make(attention=attention), how)
    found = {n for n, m in dit.named_modules() if isinstance(m, nn.Linear) and type(m.weight) is not nn.Parameter}
    assert (
        found == {f"blocks.{i}.{kind}" for i in range(2) for kind in KINDS if kind not in kept} == {*layers(dit, how)}
    )
    assert dit(*asked()).isfinite().all()
    assert dit.quantized == how


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_stays_so(dtype: torch.dtype):
    x, t, text = asked()
    text = Text(text.tokens.to(dtype), text.mask)
    exact = make()(x, t, asked()[2])
    for how in ("int8", "w8a8"):
        out = quantize(make().to(dtype), how)(x.to(dtype), t.to(dtype), text)
        assert out.dtype == dtype
        assert tiny.error(out.float(), exact) < 3e-2


def test_it_weighs_what_int8_weighs():
    """A byte a weight, and a scale and a zero for each of its rows."""
    plainly, dit = make(), quantize(make(), "int8")
    chosen = [plainly.get_submodule(name).weight for name in layers(plainly, "int8")]
    saved = sum(3 * w.numel() for w in chosen) - sum(5 * len(w) for w in chosen)
    assert tensor_bytes(module_tensors([plainly])) / 2**20 - tensor_bytes(
        module_tensors([dit])
    ) / 2**20 == pytest.approx(saved / 2**20)
    given = asked()
    with torch.no_grad(), LiveBytes(module_tensors([dit])) as seen:
        dit(*given)
    inputs = [given[0], given[1], *given[2]]
    assert (seen.resident - tensor_bytes(inputs)) / 2**20 == pytest.approx(tensor_bytes(module_tensors([dit])) / 2**20)


def test_a_copy_shares_all_else_and_leaves_the_original():
    dit = make()
    before = dit(*asked())
    other = quantized(dit, "int8")
    assert (dit.quantized, other.quantized) == ("none", "int8")
    assert dit(*asked()).equal(before)
    shared = {n for n, p in other.named_parameters() if p is dict(dit.named_parameters())[n]}
    assert shared == {n for n, _ in dit.named_parameters()} - {f"{n}.weight" for n in layers(dit, "int8")}
    assert quantized(other, "int8") is other
    assert quantized(dit, "none") is dit


def test_twice_in_another_way():
    dit = quantize(make(), "int8")
    assert quantize(dit, "int8") is dit
    for how in ("w8a8", "none"):
        with pytest.raises(ValueError, match=f"quantised as 'int8' already, not '{how}'; load it again"):
            quantize(dit, how)


def test_an_unknown_way():
    with pytest.raises(ValueError, match=r"quantize is 'int4', expected none, int8, w8a8, fp8, .* or nvfp4_simulated"):
        quantize(make(), "int4")


def test_without_torchao(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    module.check("none")
    with pytest.raises(ImportError, match=r"quantize 'w8a8' needs torchao: pip install 'sana_lab\[quantize\]'"):
        quantize(make(), "w8a8")


def test_plain_tensors_are_their_own():
    x = torch.ones(2)
    assert [*inner_tensors(x)] == [x]


class TestSystem:
    HOW = Sampling("euler", 2, 3.0)

    @staticmethod
    def system() -> TextToImage:
        return tiny.text2image(dit=DIT).eval()

    @pytest.mark.parametrize("how", ["int8", "w8a8"])
    def test_settled_or_for_one_call_it_draws_the_same(self, how: str):
        system, asked = self.system(), Sampling("euler", 2, 3.0, quantize=how)
        once = system.sample(["a ring"], size=16, sampling=asked)
        assert system.dit.quantized == "none"
        plainly = system.sample(["a ring"], size=16, sampling=self.HOW)
        assert system.prepare_for_sampling(asked, "cpu").dit.quantized == how
        assert system.sample(["a ring"], size=16, sampling=asked).equal(once)
        assert (plainly.int() - once.int()).abs().max() <= 8
        with pytest.raises(ValueError, match="load it again"):
            system.sample(["a ring"], size=16, sampling=self.HOW)


class TestTrials:
    """A trial that quantises reuses the trained model, and is a trial of its own; one that offloads is the same."""

    KEYS = staticmethod(lambda *overrides: keys_of(experiments.load("shapes_sana", overrides)))

    def test_the_model_is_the_same_and_the_trial_is_not(self):
        model, trial = self.KEYS()
        for how in ("int8", "w8a8"):
            other, own = self.KEYS(f"sampling.quantize={how}")
            assert other == model
            assert own != trial
        assert self.KEYS("sampling.offload=true") == self.KEYS("sampling.quantize=none") == (model, trial)

    def test_a_wrong_word_is_told_as_the_experiment_loads(self):
        with pytest.raises(SpecError, match=r"sampling.quantize is 'int4' \(str\), expected one of .*mean 'int"):
            experiments.load("shapes_sana", ["sampling.quantize=int4"])

    def test_the_extra_is_asked_for_before_any_work(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(module, "installed", lambda: False)
        with pytest.raises(ImportError, match=r"sana_lab\[quantize\]"):
            checks.check(experiments.load("shapes_sana", ["sampling.quantize=int8"]))


def keys_of(experiment: dict[str, Any]) -> tuple[str, str]:
    return hashing.experiment_hash(experiment), hashing.trial_hash(schema.Trial({}, 0, experiment))


def test_bench_counts_in_full_what_it_times_in_eight_bits():
    system = TestSystem.system()
    plain, small = (bench(system, Sampling("euler", 1, 3.0, quantize=how), 16, repeats=1) for how in ("none", "w8a8"))
    assert system.dit.quantized == "w8a8"
    assert small["gmacs"] == pytest.approx(plain["gmacs"])
    assert small["stages"]["denoise"]["gmacs"] == pytest.approx(plain["stages"]["denoise"]["gmacs"])
    assert small["weights_mib"] < plain["weights_mib"]
    assert small["settings"]["sampling"]["quantize"] == "w8a8"


def test_a_float16_overflow_is_named_where_it_is_drawn():
    system, how = hot(torch.float16), Sampling("euler", 2, 3.0)
    with pytest.raises(Overflow, match=r"not finite in images 0, 1 of 2; float16 overflows above 65504"):
        system.sample(["a ring", "a cross"], size=16, sampling=how)
    assert hot(torch.bfloat16).sample(["a ring"], size=16, sampling=how).shape == (1, 3, 16, 16)


def hot(dtype: torch.dtype) -> TextToImage:
    """Its feed-forward makes 10^7 and more."""
    system = TestSystem.system()
    ffn = system.dit.to(dtype).blocks[0].ffn
    ffn.expand.bias.data.fill_(50.0)
    ffn.depthwise.weight.data.fill_(1.0)
    ffn.project.weight.data.fill_(100.0)
    return system
