"""Specs of parts: what a signature accepts and completes, and the messages of errors."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from torch import Tensor, nn

from sana_lab.config import registry, specs
from sana_lab.config.specs import RUNTIME, AsBefore, Spec, SpecError
from sana_lab.models.attention import Attention
from sana_lab.models.attention.linear import LinearAttention
from sana_lab.models.attention.softmax import SoftmaxAttention

GUEST = '''
"""A user's own module."""

from typing import Annotated, Any, Literal

from torch import Tensor, nn

from sana_lab.models.attention import Attention
from sana_lab.config.specs import RUNTIME, AsBefore, Spec


class Mean(Attention):
    """Every token gets the mean of the values, and every kind of option is here."""

    def __init__(
        self,
        head_dim: int = 8,
        power: float = 1.0,
        kind: Literal["plain", "gated", 3] = "plain",
        widths: list[int] = [1, 2],
        pair: tuple[int, float] = (1, 2.0),
        flag: bool = False,
        name_or_number: int | str | None = None,
        other: Annotated[Spec | None, "ffn"] = None,
        inner: Annotated[Spec, "attention"] = "softmax",
        chunk: Annotated[int, RUNTIME] = 64,
        late: Annotated[float, AsBefore(0.0)] = 0.0,
        *,
        dim: int,
    ) -> None:
        super().__init__(dim, head_dim, False)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v.mean(1, keepdim=True).expand_as(v)


class Later(Attention):
    """Its mathematics changed once; one option must be given."""

    version = 2

    def __init__(self, gain: float, *, dim: int) -> None:
        super().__init__(dim, dim, False)
        self.gain = gain

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.gain * v


class Unresolved(Attention):
    """Its annotations name something that is not there at run time."""

    def __init__(self, head_dim: "Nowhere" = 8, *, dim: int) -> None:
        super().__init__(dim, head_dim, False)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v


class Stranger(nn.Module):
    """No attention."""


def backwards(x: Tensor, velocity: Any, times: Tensor) -> Tensor:
    """No solver: its first parameters are in another order."""
    return x
'''


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that is nobody's but the user's."""
    (tmp_path / "guest_parts.py").write_text(GUEST)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "guest_parts", raising=False)
    return "guest_parts"


def message(call: Callable[[], object]) -> str:
    with pytest.raises(SpecError) as caught:
        call()
    return str(caught.value)


# --- what is right


def test_name_alone_is_completed_with_every_default():
    resolved = specs.resolve("attention", "linear")
    assert resolved == {"name": "linear", "head_dim": 32, "qk_norm": False, "eps": 1e-8, "backend": "auto"}


def test_options_given_are_kept_and_resolving_twice_changes_nothing():
    resolved = specs.resolve("attention", {"name": "linear", "eps": 1, "head_dim": 8})
    assert (resolved["eps"], resolved["head_dim"]) == (1.0, 8)
    assert isinstance(resolved["eps"], float)
    assert specs.resolve("attention", resolved) == resolved


def test_the_given_spec_is_left_as_it_was():
    spec = {"name": "sana", "attention": {"name": "linear", "head_dim": 8}}
    specs.resolve("dit", spec)["attention"]["head_dim"] = 99
    assert spec == {"name": "sana", "attention": {"name": "linear", "head_dim": 8}}


def test_inner_specs_are_resolved_all_the_way_down():
    resolved = specs.resolve("system", {"name": "text2image", "dit": {"name": "sana", "ffn": "mlp"}})
    assert resolved["dit"]["ffn"] == {"name": "mlp", "ratio": 4.0}
    assert resolved["dit"]["attention"]["name"] == "linear"
    assert resolved["optimizer"]["name"] == "adamw"


def test_inner_options_without_a_name_are_the_default_parts():
    resolved = specs.resolve("system", {"name": "text2image", "optimizer": {"lr": 0.5}, "dit": {"ffn": {"ratio": 2}}})
    assert (resolved["optimizer"]["name"], resolved["optimizer"]["lr"]) == ("adamw", 0.5)
    assert resolved["dit"]["ffn"] == {"name": "mix", "ratio": 2.0, "kernel": 3, "backend": "auto"}


def test_build_supplies_what_code_knows_and_remembers_the_spec():
    torch.manual_seed(0)
    dit = specs.build("dit", {"name": "sana", "dim": 32, "depth": 1, "cross_heads": 2}, channels=4, text_dim=6)
    assert (dit.channels, dit.blocks[0].attention.qkv.in_features) == (4, 32)
    again = specs.build("dit", dit.spec, channels=4, text_dim=6)
    assert again.spec == dit.spec
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in dit.state_dict().items()}


def test_a_function_comes_with_its_options_bound():
    solver = specs.build("solver", {"name": "dpmpp", "order": 1})
    x = torch.ones(2, 1, 1, 1)
    times = torch.tensor([0.8, 0.4, 0.0])
    assert torch.allclose(solver(lambda x, t: x, x, times), specs.build("solver", "euler")(lambda x, t: x, x, times))


def test_foreign_parts_need_no_wrapper():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = specs.build("optimizer", {"name": "adamw", "lr": 0.25, "betas": [0.5, 0.75]}, params=[weight])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["lr"] == 0.25
    assert tuple(optimizer.defaults["betas"]) == (0.5, 0.75)


def test_what_code_supplies_is_no_option():
    assert "dim" not in specs.options("attention", LinearAttention)
    assert "params" not in specs.options("optimizer", torch.optim.SGD)
    assert list(specs.options("solver", specs.find("solver", "dpmpp"))) == ["order"]
    assert "has no option 'dim'" in message(lambda: specs.resolve("attention", {"name": "linear", "dim": 8}))


def test_a_part_of_ones_own_needs_no_line_in_the_table(guest):
    part = specs.build("attention", {"name": f"{guest}:Mean", "power": 2}, dim=16)
    assert type(part).__name__ == "Mean"
    assert isinstance(part, Attention)
    assert part(torch.randn(1, 2, 2, 16)).shape == (1, 2, 2, 16)


def test_every_sort_of_option_is_accepted_as_plain_data(guest):
    given = {
        "power": 3,
        "kind": 3,
        "widths": (4, 5, 6),
        "pair": [7, 8],
        "flag": True,
        "name_or_number": "x",
        "other": "mlp",
        "inner": {"name": "linear"},
    }
    resolved = specs.resolve("attention", {"name": f"{guest}:Mean", **given})
    assert resolved["power"] == 3.0
    assert resolved["kind"] == 3
    assert resolved["widths"] == [4, 5, 6]
    assert resolved["pair"] == [7, 8.0]
    assert resolved["other"] == {"name": "mlp", "ratio": 4.0}
    assert resolved["inner"]["eps"] == 1e-8
    assert specs.resolve("attention", f"{guest}:Mean")["other"] is None


def test_defaults_are_not_shared_between_specs(guest):
    specs.resolve("attention", f"{guest}:Mean")["widths"].append(3)
    assert specs.resolve("attention", f"{guest}:Mean")["widths"] == [1, 2]


def test_annotations_that_do_not_resolve_are_not_checked(guest):
    assert specs.resolve("attention", {"name": f"{guest}:Unresolved", "head_dim": 4})["head_dim"] == 4


def test_weights_are_an_option_of_what_has_weights():
    assert specs.resolve("autoencoder", {"name": "vae", "weights": "a.safetensors"})["weights"] == "a.safetensors"
    assert "weights" not in specs.resolve("autoencoder", {"name": "vae", "weights": None})
    assert "has no option 'weights'" in message(lambda: specs.resolve("attention", {"name": "linear", "weights": "a"}))


# --- errors: given, expected, nearest


@pytest.mark.parametrize(
    ("kind", "spec", "words"),
    [
        ("attention", "liner", ("no attention is called 'liner'", "did you mean 'linear'?")),
        (
            "attention",
            "zzzz",
            ("no attention is called 'zzzz'", "there is: conv, gated_delta, gated_linear, linear, mean, mhla, softmax"),
        ),
        ("attenton", "linear", ("no kind of part is called 'attenton'", "did you mean 'attention'?")),
        (
            "attention",
            {"name": "linear", "ep": 1e-6},
            ("attention 'linear' has no option 'ep'", "did you mean 'eps'?", "[attention.ep]"),
        ),
        (
            "attention",
            {"name": "linear", "backend": "tritn"},
            ("attention.backend is 'tritn' (str)", 'one of "auto", "torch", "triton"', "did you mean 'triton'?"),
        ),
        ("attention", {"name": "linear", "eps": "small"}, ("attention.eps is 'small' (str)", "expected float")),
        ("attention", {"name": "linear", "head_dim": 8.0}, ("attention.head_dim is 8.0 (float)", "expected int")),
        ("attention", {"name": "linear", "head_dim": True}, ("attention.head_dim is True (bool)", "expected int")),
        ("attention", {"name": "linear", "qk_norm": 1}, ("attention.qk_norm is 1 (int)", "expected bool")),
        ("attention", {"name": "linear", "eps": None}, ("attention.eps is None", "expected float")),
        (
            "attention",
            {"eps": 1e-6},
            (
                "expected a name or a mapping with a 'name'",
                "there is: conv, gated_delta, gated_linear, linear, mean, mhla, softmax",
            ),
        ),
        ("attention", None, ("attention is None", "expected a name or a mapping")),
        ("attention", ["linear"], ("attention is ['linear']", "expected a name or a mapping")),
        ("attention", "", ("attention is ''", "expected a name or a mapping")),
        (
            "dit",
            {"name": "sana", "attention": {"name": "linear", "ep": 1}},
            ("attention 'linear' has no option 'ep'", "did you mean 'eps'?", "[dit.attention.ep]"),
        ),
        (
            "system",
            {"name": "text2image", "dit": {"name": "sana", "ffn": "mixx"}},
            ("no ffn is called 'mixx'", "did you mean 'mix'?"),
        ),
        ("solver", {"name": "dpmpp", "order": 4}, ("solver.order is 4 (int)", "one of 1, 2, 3")),
        ("solver", "dpmp", ("no solver is called 'dpmp'", "did you mean 'dpmpp'?")),
        (
            "attention",
            "os:system",
            ("'os:system' is no attention", "a subclass of sana_lab.models.attention.Mixer"),
        ),
        ("attention", "torch.nn:Linear", ("'torch.nn:Linear' is no attention", "sana_lab.models.attention.Mixer")),
        ("solver", "os:system", ("'os:system' is no solver", "begins (velocity, x, times, ...)")),
        ("solver", "torch.nn:Linear", ("'torch.nn:Linear' is no solver",)),
        ("attention", "nowhere_at_all:Thing", ("nowhere_at_all", "there is no module")),
        ("attention", "sana_lab.models.attention:Nope", ("'sana_lab.models.attention' has no 'Nope'",)),
        ("data", "sana_lab.models.dit.sana:Sana", ("is no data", "sana_lab.data.DataModule")),
        ("autoencoder", {"name": "vae", "weights": 3}, ("autoencoder.weights is 3 (int)", "expected str")),
        ("dit", "experiment:shapes", ("dit is 'experiment:shapes'", "sana_lab.build")),
        ("attention", "experiment:shapes", ("attention is 'experiment:shapes'", "autoencoder, dit, text_encoder")),
    ],
)
def test_wrong_specs(kind: str, spec: Any, words: tuple[str, ...]):
    error = message(lambda: specs.resolve(kind, spec))
    assert not [w for w in words if w not in error], error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"widths": 3}, ("attention.widths is 3 (int)", "expected list[int]")),
        ({"widths": [1, "a"]}, ("attention.widths[1] is 'a'", "expected int")),
        ({"pair": [1]}, ("attention.pair is [1]", "expected tuple[int, float]")),
        ({"kind": "gate"}, ("did you mean 'gated'?",)),
        ({"kind": True}, ("attention.kind is True",)),
        ({"kind": 3.0}, ("attention.kind is 3.0",)),
        ({"pair": [1, "x"]}, ("attention.pair[1] is 'x' (str)", "expected float")),
        ({"power": True}, ("attention.power is True (bool)", "expected float")),
        ({"widths": {"a": 1}}, ("attention.widths is {'a': 1} (dict)",)),
        ({"flag": "yes"}, ("attention.flag is 'yes' (str)", "expected bool")),
        ({"name_or_number": 1.5}, ("attention.name_or_number is 1.5 (float)", "int | str | None")),
        ({"other": "mx"}, ("no ffn is called 'mx'",)),
        ({"inner": None}, ("attention.inner is None",)),
    ],
)
def test_wrong_options_of_every_sort(guest, options: dict[str, Any], words: tuple[str, ...]):
    error = message(lambda: specs.resolve("attention", {"name": f"{guest}:Mean", **options}))
    assert not [w for w in words if w not in error], error


def test_what_must_be_given_is_asked_for(guest):
    error = message(lambda: specs.resolve("attention", f"{guest}:Later"))
    assert "needs 'gain' (float)" in error
    assert "[attention.gain]" in error


def test_guests_of_another_kind_are_turned_away(guest):
    assert "is no attention" in message(lambda: specs.resolve("attention", f"{guest}:Stranger"))
    assert "is no solver" in message(lambda: specs.resolve("solver", f"{guest}:backwards"))


ABSTRACT = [kind for kind in registry.BASES if inspect.isabstract(specs._import(registry.BASES[kind]))]


def test_which_kinds_have_an_interface():
    assert {"attention", "dit", "autoencoder", "text_encoder", "data", "measure", "system"} <= set(ABSTRACT)


@pytest.mark.parametrize("kind", ABSTRACT)
def test_a_guest_that_lacks_methods_is_refused_while_it_resolves(tmp_path, monkeypatch, kind: str):
    module, _, name = registry.BASES[kind].partition(":")
    (tmp_path / f"half_{kind}.py").write_text(f"from {module} import {name}\n\n\nclass Half({name}): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    error = message(lambda: specs.resolve(kind, f"half_{kind}:Half"))
    assert "lacks" in error
    assert not [m for m in specs._import(registry.BASES[kind]).__abstractmethods__ if m not in error], error


def test_a_guest_whose_own_import_fails_is_not_called_absent(tmp_path, monkeypatch):
    (tmp_path / "broken_guest.py").write_text("import a_library_that_is_not_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_here"):
        specs.find("attention", "broken_guest:Thing")


# --- identity


def test_canonical_leaves_out_how_and_keeps_what(guest):
    plain = specs.canonical("attention", f"{guest}:Mean")
    assert specs.canonical("attention", {"name": f"{guest}:Mean", "chunk": 7}) == plain
    assert specs.canonical("attention", {"name": f"{guest}:Mean", "late": 0.0}) == plain
    assert specs.canonical("attention", {"name": f"{guest}:Mean", "late": 0.5}) != plain
    assert specs.canonical("attention", {"name": f"{guest}:Mean", "power": 2}) != plain
    assert "chunk" not in plain
    assert "late" not in plain
    backend = {"name": "linear", "backend": "torch"}
    assert specs.canonical("attention", backend) == specs.canonical("attention", "linear")


def test_canonical_looks_inside_and_counts_versions(guest):
    with_backend = {"name": "sana", "attention": {"name": "linear", "backend": "torch"}, "checkpointing": True}
    assert specs.canonical("dit", with_backend) == specs.canonical("dit", "sana")
    assert specs.canonical("dit", {"name": "sana", "attention": "softmax"}) != specs.canonical("dit", "sana")
    assert specs.canonical("attention", {"name": f"{guest}:Later", "gain": 1})["version"] == 2
    assert specs.canonical("autoencoder", {"name": "vae", "weights": "a"})["weights"] == "a"


# --- records


@dataclass
class Inner:
    """Nested options."""

    size: int = 3
    kind: Literal["a", "b"] = "a"


@dataclass
class Outer:
    """A record with a record, a spec and a must."""

    must: str
    inner: Inner = field(default_factory=Inner)
    attention: Annotated[Spec, "attention"] = "linear"
    fast: Annotated[bool, RUNTIME] = False
    late: Annotated[int, AsBefore(0)] = 0


def test_records_are_completed_like_parts():
    done = specs.complete(specs.fields(Outer), {"must": "x", "inner": {"size": 4}}, "outer", "outer")
    assert done["inner"] == {"size": 4, "kind": "a"}
    assert done["attention"]["name"] == "linear"
    assert list(specs.fields(Outer)) == ["must", "inner", "attention", "fast", "late"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, ("outer needs 'must' (str)",)),
        ({"must": "x", "iner": {}}, ("outer has no option 'iner'", "did you mean 'inner'?")),
        ({"must": "x", "inner": {"siz": 1}}, ("outer.inner has no option 'siz'", "did you mean 'size'?")),
        ({"must": "x", "inner": 3}, ("outer.inner is 3", "expected a mapping of size, kind")),
        ({"must": "x", "inner": {"kind": "c"}}, ("outer.inner.kind is 'c'", 'one of "a", "b"')),
    ],
)
def test_wrong_records(given: dict[str, Any], words: tuple[str, ...]):
    error = message(lambda: specs.complete(specs.fields(Outer), given, "outer", "outer"))
    assert not [w for w in words if w not in error], error


def test_nearest_answers_or_lists():
    assert specs.nearest("sofmax", ["linear", "softmax"]) == "did you mean 'softmax'?"
    assert specs.nearest("q", ["linear", "softmax"]) == "there is: linear, softmax"
    assert specs.nearest("q", []) == "there is: nothing"


def test_name_of():
    assert specs.name_of("linear") == specs.name_of({"name": "linear", "eps": 1}) == "linear"


def test_the_table_says_which_class_a_name_is():
    assert specs.find("attention", "softmax") is SoftmaxAttention
    assert specs.find("attention", "sana_lab.models.attention.linear:LinearAttention") is LinearAttention


def test_solvers_take_tensors_first():
    for name in {*registry.TABLE["solver"]} - {"scm"}:  # which takes fresh noise too
        out = specs.build("solver", name)(lambda x, t: torch.zeros_like(x), torch.ones(1, 1, 1, 1), Tensor([1.0, 0.0]))
        assert out.shape == (1, 1, 1, 1)
