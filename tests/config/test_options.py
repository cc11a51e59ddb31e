"""Options in words: comments read from the source, types, defaults, the verb `parts` and the generated page."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from sana_lab import __main__
from sana_lab.config import options, options_page, registry, specs
from sana_lab.config.specs import RUNTIME, AsBefore, Option, Spec

PENDING: set[str] = set()
"""Modules with options that have no comment yet. This set only shrinks."""

OURS = [(k, n) for k, names in registry.TABLE.items() for n, target in names.items() if target.startswith("sana_lab.")]


# fmt: off
class Part:
    """A part. Of two sentences."""

    def __init__(
        self,
        width: int,  # channels
        # Number of blocks,
        # each with a residual.
        depth: int = 2,
        kind: Annotated[Literal["a", "b"], RUNTIME] = "a",  # which of two
        inner: Annotated[Spec | None, "attention"] = None,
        sizes: tuple[int, ...] = (
            1,
            2,
        ),  # pixels a side
        one: int = 1, two: int = 2,  # ambiguous
        *,
        late: Annotated[float, AsBefore(0.0)] = 1.0,  # added later
    ) -> None:
        pass  # not an option
# fmt: on


@dataclass
class Base:
    """A record."""

    name: str  # what it is called


@dataclass
class Record(Base):
    """A record with one more field."""

    # Where it lies.
    places: list[str] = field(default_factory=list)


def test_comments_are_beside_options_or_above_them():
    assert options.comments(Part) == {
        "width": "channels",
        "depth": "Number of blocks, each with a residual.",
        "kind": "which of two",
        "sizes": "pixels a side",
        "late": "added later",
    }
    assert options.comments(Record) == {"name": "what it is called", "places": "Where it lies."}
    assert options.comments(len) == {}


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "int"),
        (str | None, "text | null"),
        (Literal["auto", 3], "auto | 3"),
        (Annotated[Spec, "attention"], "attention"),
        (Annotated[Spec | None, "ffn", AsBefore(None)], "ffn | null"),
        (list[Annotated[Spec, "measure"]], "list of measure"),
        (tuple[int, ...], "list of int"),
        (tuple[float, float] | None, "[float, float] | null"),
        (dict[str, Any], "mapping"),
        (Annotated[bool | Literal["selective"], RUNTIME], "true | false | selective"),
    ],
)
def test_types_in_words(annotation: Any, words: str):
    assert options.type_words(annotation) == words


def test_defaults_in_words():
    values = {None: "null", False: "false", 0.5: "0.5", "": '""', "x": "x", (1, 2): "[1, 2]"}
    assert {v: options.default_words(Option(Any, v)) for v in values} == values
    assert options.default_words(specs.options("", Part)["width"]) == "required"


def test_a_part_of_a_library_names_its_documentation():
    rows = {row.name: row for row in options.describe_part("optimizer", "adamw")}
    assert "torch.optim.AdamW" in rows["lr"].meaning


def test_a_preset_shows_its_own_defaults():
    rows = {row.name: row for row in options.describe_part("autoencoder", "dcae_f64c128_in_1_0")}
    assert (rows["latent"].default, rows["weights"].default) == ("128", "null")


# --- what is ours


@pytest.mark.parametrize(("kind", "name"), OURS)
def test_every_option_of_a_part_has_a_comment(kind: str, name: str):
    bare = [row.name for row in options.describe_part(kind, name) if not row.meaning.partition(" [in no hash")[0]]
    pending = registry.TABLE[kind][name].partition(":")[0].removeprefix("sana_lab.") in PENDING
    assert bare == [] or pending


@pytest.mark.parametrize("name", options.SECTIONS)
def test_every_option_of_a_section_has_a_comment(name: str):
    assert [row.name for row in options.describe_section(name) if not row.meaning.partition(" [in no hash")[0]] == []


@pytest.mark.parametrize(("kind", "name"), OURS)
def test_every_part_has_a_sentence_that_needs_no_import(kind: str, name: str):
    assert 10 < len(options.summary(kind, name)) < 200


def test_the_page_is_that_of_the_source():
    """Where it differs: `make docs`."""
    assert registry.KINDS.keys() == registry.TABLE.keys()
    assert options_page.PAGE.read_text() == options_page.page()


# --- the verb


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("attention", "text_encoder", "trainer", "efficiency")),
        (["attention"], ("softmax", "linear")),
        (["autoencoder"], ("vae", "dcae", "dcae_f32c32_sana_1_1", "32x", "32 latent channels")),
        (["trainer"], ("max_steps", "1000", "precision", "bf16-mixed")),
        (["solver", "dpmpp"], ("order", "1 | 2 | 3")),
        (["solver", "euler"], ("no options",)),
        (["attention", "sana_lab.models.attention.linear:LinearAttention"], ("head_dim",)),
    ],
)
def test_parts_lists(arguments: list[str], words: tuple[str, ...], capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert __main__.main(["parts", *arguments]) == 0
    output = capsys.readouterr().out
    assert not [word for word in words if word not in output]
    assert max(map(len, output.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["atention"], "did you mean 'attention'?"),
        (["trainr"], "did you mean 'trainer'?"),
        (["attention", "liner"], "did you mean 'linear'?"),
        (["autoencoder", "dcae_f32c32_sana"], "did you mean 'dcae_f32c32_sana_1_"),
        (["trainer", "max_steps"], "no kind of part is called 'trainer'"),
    ],
)
def test_parts_that_are_not_there(arguments: list[str], words: str, capsys):
    assert __main__.main(["parts", *arguments]) == 1
    assert words in capsys.readouterr().err
