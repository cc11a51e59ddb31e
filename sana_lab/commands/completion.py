"""Shell completion: `eval "$(sana-lab completion bash)"`. The shell asks the hidden verb `complete` for words."""

from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Iterable, Sequence

from sana_lab.config import experiments, registry

SCRIPTS = {
    "bash": """_sana_lab() {
  local IFS=$'\\n'
  COMPREPLY=($(sana-lab complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _sana_lab sana-lab
""",
    "zsh": """#compdef sana-lab
_sana_lab() { compadd -- ${(f)"$(sana-lab complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)"} || _files }
compdef _sana_lab sana-lab
""",
    "fish": """complete -c sana-lab -a '(sana-lab complete -- (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'
""",
}
"""Shell -> the script that it evaluates."""

FIRST = {
    **dict.fromkeys(("train", "cache", "eval", "bench", "profile", "export"), "experiments"),
    **dict.fromkeys(("ablate", "table", "ship", "pack"), "ablations"),
}
"""Verb -> the kind of recipe that its first argument names."""


def complete(parser: ArgumentParser, words: Sequence[str]) -> list[str]:
    """The words that may stand in place of the last of `words`, of which a part is typed, or nothing."""
    *before, prefix = words or [""]
    return sorted(word for word in set(_candidates(_verbs(parser), before, prefix)) if word.startswith(prefix))


def _verbs(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    return next(dict(a.choices) for a in parser._actions if isinstance(a, _SubParsersAction))


def _candidates(verbs: dict[str, ArgumentParser], before: Sequence[str], prefix: str) -> Iterable[str]:
    if not before:
        return [*verbs, "--help", "--version"]
    verb, *rest = before
    if verb not in verbs:
        return []
    if prefix.startswith("-"):
        return [option for action in verbs[verb]._actions for option in action.option_strings]
    if verb == "parts":
        return registry.TABLE if not rest else registry.TABLE.get(rest[0], {})
    if rest:
        return []
    choices = next((a.choices for a in verbs[verb]._actions if not a.option_strings and a.choices), None)
    return [*choices] if choices else experiments.available(FIRST[verb]) if verb in FIRST else []
