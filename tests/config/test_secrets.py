"""Secrets are refused before anything of them is stored."""

from pathlib import Path

import pytest
import tiny

from sana_lab.config import experiments
from sana_lab.config.validation import SpecError

NAMES = ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "OPENAI_API_KEY", "WANDB_APIKEY", "CLIENT_SECRET"]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_reads_no_secret(here: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "value-of-the-secret")
    for prompt in (f"${{oc.env:{name}}}", "a value-of-the-secret"):
        (here / "a.yaml").write_text(tiny.EXPERIMENT.partition("prompts:")[0] + f"prompts: ['{prompt}']\n")
        with pytest.raises(SpecError, match=rf"prompts\[0\] holds the secret {name}") as caught:
            experiments.load("a.yaml")
        assert "value-of-the-secret" not in str(caught.value)


def test_other_options_are_no_secrets(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NAME_OF_IT", "a red circle")
    monkeypatch.setenv("MAX_TOKENS", "a red circle")
    recipe = tiny.EXPERIMENT.partition("prompts:")[0] + "prompts: ['${oc.env:NAME_OF_IT}']\n"
    (here / "a.yaml").write_text(recipe)
    config = experiments.load("a.yaml")
    assert config["prompts"] == ["a red circle"]


def test_an_option_called_token_is_a_secret(here: Path):
    (here / "a.yaml").write_text(tiny.EXPERIMENT)
    with pytest.raises(SpecError, match=r"data\.hub_token holds the secret hub_token"):
        experiments.load("a.yaml", ["data.hub_token=abc"])
