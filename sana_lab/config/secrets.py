"""Secrets in a configuration: refused, since a configuration is stored in the database, beside weights and on cards."""

import os
import re
from typing import Any

from sana_lab.config.memo import reuse
from sana_lab.config.validation import SpecError

SECRET = re.compile(
    r"(^|_)(token|secret|secret_key|password|passwd|passphrase|api_?key|access_key|private_key|credentials?)$",
    re.IGNORECASE,
)
"""Name of an option or environment variable that holds a secret."""

VARIABLE = re.compile(r"oc\.env\s*:\s*([^,}\s]+)")
SHORTEST = 8  # characters of a variable's value that cannot be in a text by chance


def check(config: Any, title: str, path: str = "") -> None:
    """SpecError where a configuration reads, names or holds a secret; the secret itself is not in the message."""
    if isinstance(config, dict):
        for key, value in config.items():
            check(value, title, f"{path}.{key}" if path else str(key))
    elif isinstance(config, list | tuple):
        for i, value in enumerate(config):
            check(value, title, f"{path}[{i}]")
    elif isinstance(config, str) and (name := _secret(config, path)):
        raise SpecError(
            f"{title}: {path} holds the secret {name}, and a configuration is stored with its run and its weights; "
            "expected it in the environment alone, read by the code that needs it"
        )


def _secret(text: str, path: str) -> str | None:
    """The name of the secret in a value, or None."""
    if name := next((name for name in VARIABLE.findall(text) if SECRET.search(name)), None):
        return str(name)
    option = path.rpartition(".")[2].partition("[")[0]
    if text and SECRET.search(option):
        return option
    return next((name for name, value in reuse(("secrets",), _values).items() if value in text), None)


def _values() -> dict[str, str]:
    """Variables that hold a secret, with their values."""
    return {name: value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= SHORTEST}
