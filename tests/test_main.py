"""The command line: quick help, resolved experiments on a dry run, and one clear line for each mistake."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from omegaconf import OmegaConf
from PIL import Image

from sana_lab import __main__
from sana_lab.config import experiments, hashing

VERBS = tuple(__main__.VERBS)
TWO = "title: Two\nbase: tiny\naxes: {attention: {softmax: {system.dit.attention: softmax}, linear: }}\n"
HELP = """
import sys, time
from sana_lab.__main__ import main
try:
    main({arguments!r})
except SystemExit as end:
    assert not end.code
import json
print(json.dumps([time.process_time(), sorted(name for name in sys.modules if "." not in name)]), file=sys.stderr)
"""


@pytest.fixture
def folder(here: Path) -> Path:
    tiny.write_experiment(here, changes={"data.size": 16, "trainer.max_steps": 2})
    tiny.write(here, "ablations/two.yaml", TWO)
    return here


def failing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What an unsuccessful command says: one line, not a traceback."""
    assert __main__.main(arguments) == 1
    output = capsys.readouterr().err
    assert output.startswith("sana-lab: ")
    assert output.count("\n") == 1
    return output


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What argparse says of a command that it cannot parse."""
    with pytest.raises(SystemExit) as end:
        __main__.main(arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


# --- help


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["profile", "--help"]])
def test_help_answers_at_once_and_imports_nothing_heavy(arguments: list[str]):
    """0.07 s of CPU time on a quiet core; the bar is 0.3, and busy machines get three times as much."""
    done = subprocess.run(
        [sys.executable, "-c", HELP.format(arguments=arguments)], capture_output=True, text=True, check=True
    )
    seconds, modules = json.loads(done.stderr)
    assert not {"torch", "lightning", "transformers", "mlflow", "omegaconf", "numpy", "tqdm"} & set(modules)
    assert seconds < 0.9
    assert "usage: sana-lab" in done.stdout


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit):
        __main__.main(["--help"])
    output = capsys.readouterr().out
    assert not [verb for verb in VERBS if not re.search(rf"\n    {verb}\s", output)]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys):
    with pytest.raises(SystemExit) as end:
        __main__.main([verb, "--help"])
    assert end.value.code == 0
    assert f"usage: sana-lab {verb}" in capsys.readouterr().out


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "sana_lab", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "invalid choice: 'nonsense'" in done.stderr


# --- what cannot be parsed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "VERB"),
        (["trian", "tiny"], "invalid choice: 'trian'"),
        (["train", "tiny", "--dry"], "--dry"),
        (["train", "tiny", "--dry-run", "seed"], "seed"),
        (["sample", "a red circle"], "--out"),
        (["sample", "a red circle", "--out", "x", "--seed", "one"], "invalid int value: 'one'"),
        (["ui", "seed=3"], "seed=3"),
    ],
)
def test_commands_that_do_not_parse(arguments: list[str], words: str, capsys):
    assert words in refused(arguments, capsys)


def test_overrides_and_options_come_in_any_order():
    expected = ["seed=1", "trainer.max_steps=2"]
    for arguments in (
        ["train", "tiny", "seed=1", "trainer.max_steps=2", "--dry-run"],
        ["train", "tiny", "seed=1", "--dry-run", "trainer.max_steps=2"],
        ["train", "--dry-run", "tiny", "seed=1", "trainer.max_steps=2"],
    ):
        options = __main__.parse(arguments)
        assert (options.experiment, options.overrides, options.dry_run) == ("tiny", expected, True)


# --- dry runs


def test_dry_run_prints_the_resolved_experiment_and_leaves_nothing(folder: Path, capsys):
    assert __main__.main(["train", "tiny", "--dry-run", "trainer.max_steps=7"]) == 0
    output = capsys.readouterr().out
    expected = experiments.load("tiny", ["trainer.max_steps=7"])
    assert OmegaConf.to_container(OmegaConf.create(output)) == expected
    assert hashing.experiment_hash(expected) in output
    assert "trained: no" in output
    assert sorted(p.name for p in folder.iterdir()) == ["ablations", "experiments"]


def test_what_a_dry_run_printed_is_an_experiment_again(folder: Path, capsys):
    __main__.main(["train", "tiny", "--dry-run", "system.dit.attention=softmax"])
    (folder / "again.yaml").write_text(capsys.readouterr().out)
    again = experiments.load("again.yaml")
    assert hashing.experiment_hash(again) == hashing.experiment_hash(
        experiments.load("tiny", ["system.dit.attention=softmax"])
    )


def test_dry_run_names_pictures_that_are_left_out(folder: Path, capsys):
    Image.new("RGB", (8, 8)).save(folder / "good.png")
    (folder / "broken.png").touch()
    data = [f"data={{name: folder, root: {folder}, size: 16, caption: ''}}"]
    with pytest.warns(UserWarning, match=r"skipped 1 of 2 files: 'broken.png'"):
        assert __main__.main(["train", "tiny", "--dry-run", *data]) == 0


def test_dry_run_of_an_ablation_lists_its_trials(folder: Path, capsys):
    assert __main__.main(["ablate", "two", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "softmax" in output
    assert "linear" in output
    assert not list(folder.glob("runs/models/*"))


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "tyni"], ("there is no experiment 'tyni'", "did you mean 'tiny'?")),
        (["train", "tiny", "system.dit.atention=linear"], ("has no option 'atention'", "did you mean 'attention'?")),
        (["train", "tiny", "system.dit.attention=os:system"], ("'os:system' is no attention",)),
        (["train", "tiny", "trainer.max_steps=few"], ("trainer.max_steps is 'few'", "expected int")),
        (["train", "tiny", "seed"], ("override 'seed'", "key=value")),
        (["train", "tiny", "data.size=15"], ("15 is not a multiple of 8", "the nearest is 16")),
        (["train", "tiny", "system.dit.dim=30"], ("30 is not a multiple",)),
        (["train", "tiny", "system.autoencoder=experiment:tny"], ("there is no experiment 'tny'",)),
        (["ablate", "nothing_of_that_name"], ("there is no ablation 'nothing_of_that_name'",)),
        (["table", "nothing_of_that_name"], ("there is no ablation 'nothing_of_that_name'",)),
        (["eval", "tiny"], ("'tiny' is not trained yet", "sana-lab train tiny")),
        (["bench", "tinny"], ("there is no experiment 'tinny'",)),
        (["sample", "a red circle", "--out", "o", "--model", "tiny"], ("'tiny' is not trained yet",)),
        (["sample", " ", "--out", "o", "--model", "tiny"], ("prompt ' ' is empty",)),
        (["sample", "a", "--out", "experiments/tiny.yaml/o", "--model", "tiny"], ("cannot write to",)),
        (["sample", "a", "--out", "o", "--model", "no.ckpt"], ("there is no checkpoint 'no.ckpt'",)),
        (["sample", "a", "--out", "/sys", "--model", "tiny"], ("cannot write to /sys",)),
        (["eval", "tiny", "--json", "/proc/x.json"], ("cannot write /proc/x.json",)),
        (["eval", "tiny", "--json", "experiments"], ("cannot write experiments: it is a folder, expected a file",)),
        (["bench", "tiny", "--json", "experiments"], ("cannot write experiments: it is a folder",)),
        (["table", "two", "--out", "/proc/x"], ("cannot write to /proc/x",)),
        (["ablate", "two", "--out", "/proc/x"], ("cannot write to /proc/x",)),
        (["train", "tiny", "trainer.max_steps=-1"], ("trainer.max_steps is -1 (int), expected int in [0, ",)),
        (["ui"], ("runs",)),
    ],
)
def test_mistakes_end_in_one_line(folder: Path, arguments: list[str], words: tuple[str, ...], capsys):
    output = failing(arguments, capsys)
    assert not [w for w in words if w not in output], output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "x", "--out", "o", "--size", "0"], "--size is 0 (int), expected int in [1, 32768]; the nearest"),
        (["sample", "x", "--out", "o", "--seed", "-1"], "--seed is -1 (int)"),
        (["sample", "x", "--out", "o", "--model", "tiny", "--variant", "nope"], "chooses among the files"),
        (["bench", "tiny", "--size", "-8"], "--size is -8 (int)"),
        (["bench", "tiny", "--guidance", "nan"], "--guidance is nan (float)"),
        (["bench", "tiny", "--steps", "5"], "--steps is for a diffusers pipeline; expected sampling.steps=5"),
        (["ablate", "two", "--workers", "0"], "--workers is 0 (int), expected int in [1, 1024]; the nearest is 1"),
        (["profile", "tiny", "--top", "0"], "--top is 0 (int)"),
        (["train", "tiny", "system.warmup=-1"], "tiny.system.warmup is -1 (int), expected int in [0, 100000000]"),
        (["train", "tiny", "seed=4294967296"], "tiny.seed is 4294967296 (int)"),
        (["train", "tiny", "system.dit.ffn.ratio=.nan"], "ratio is nan (float), expected float in (0, 1024]"),
        (["train", "tiny", "system.dit.dim=1000000000"], "dim is 1000000000 (int), expected int in [1, 65536]"),
        (["train", "tiny", "system.autoencoder.widths=[]"], "widths is [] (list)"),
    ],
)
def test_numbers_out_of_range_and_options_of_others(folder: Path, arguments: list[str], words: str, capsys):
    assert words in failing(arguments, capsys)


def test_ctrl_c_is_no_error_of_ours(folder: Path, monkeypatch, capsys):
    def pressed(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "_run", pressed)
    assert __main__.main(["train", "tiny"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


MISTYPED = """
import sys
from sana_lab.__main__ import main
assert main({arguments!r}) == 1
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "tyni"],
        ["train", "tiny", "seed"],
        ["eval", "tyni"],
        ["bench", "tyni"],
        ["profile", "tyni"],
        ["sample", "a", "--out", "o", "--model", "tyni"],
        ["ablate", "tow"],
        ["table", "tow"],
    ],
)
def test_a_mistyped_name_is_told_before_torch_is_imported(folder: Path, arguments: list[str]):
    done = subprocess.run([sys.executable, "-c", MISTYPED.format(arguments=arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("sana-lab: ")
    assert not (folder / "o").exists()


def test_a_disk_that_fails_is_told_in_one_line(folder: Path, monkeypatch, capsys):
    """Also where a library writes."""
    monkeypatch.setattr(__main__, "_run", lambda _: json.loads(Path("/proc/nothing").read_text()))
    assert failing(["train", "tiny"], capsys) == "sana-lab: /proc/nothing: No such file or directory\n"


def test_a_bug_keeps_its_traceback(tmp_path: Path, monkeypatch):
    """Also where the folder above happens to be called sana_lab."""
    path = tmp_path / "sana_lab" / "library.py"
    path.parent.mkdir()
    path.write_text("def run(_):\n    raise ValueError('deep inside')\n")
    scope: dict = {}
    exec(compile(path.read_text(), path, "exec"), scope)
    monkeypatch.setattr(__main__, "_run", scope["run"])
    with pytest.raises(ValueError, match="deep inside"):
        __main__.main(["train", "shapes"])


def test_what_torchao_and_its_users_say_of_each_other_is_not_repeated(caplog):
    """It is in the way wherever torchao is installed; all else that they log is output."""
    with pytest.raises(SystemExit):
        __main__.main(["--help"])
    __main__.main(["eval", "no_such_experiment"])
    log = logging.getLogger("torch.utils._pytree")
    log.warning("%s is an Enum subclass and is now natively supported", "KernelPreference")
    log.warning("another thing")
    assert [r.message for r in caplog.records if r.name == log.name] == ["another thing"]
