"""Which layout a folder has."""

from pathlib import Path

from sana_lab.config.validation import SpecError
from sana_lab.data import arrow
from sana_lab.data.columns import FILE_COLUMNS, IMAGE_COLUMNS, MANIFESTS
from sana_lab.data.layouts import below, tables_below
from sana_lab.data.tables import column


def layout_of(root: Path) -> str:
    """The registered name of the layout of a folder or file. SpecError where there is none."""
    check(root)
    if root.is_dir() and (root / "meta_data.json").is_file():
        return "mjhq"
    if below(root, [".tar"]) and (root.is_dir() or root.suffix == ".tar"):
        return "tars"
    return _of_tables(root) or "folder"


def check(root: Path) -> None:
    """SpecError where there is no such folder or file."""
    if not root.exists():
        raise SpecError(f"there is no {str(root)!r}; expected a folder of pictures, tars or tables, or a manifest")


def _of_tables(root: Path) -> str | None:
    names = tables_below(root) if root.is_dir() or root.suffix in (".parquet", ".arrow") else []
    if not names or (root.is_dir() and any((root / name).is_file() for name in MANIFESTS)):
        return None
    columns = arrow.Table(root / names[0]).columns
    has = {column(name) for name in columns}
    if has & {*FILE_COLUMNS} and not any(columns.values()):
        return "folder"
    return "tables" if has & {*IMAGE_COLUMNS} else "pd12m" if "url" in has else None
