"""Files of torch.save from elsewhere: archives that unpack to more than they hold are refused before they are read."""

import zipfile
from pathlib import Path


def check_archive(path: Path) -> None:
    """ValueError for an archive that unpacks to more than the file holds; torch.save compresses nothing."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} is cut short or is no file of torch.save: {reason}") from error
    compressed = next((e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED), None)
    size, room = sum(entry.file_size for entry in entries), path.stat().st_size
    if compressed or size > room:
        what = f"compresses {compressed}" if compressed else f"says it holds {size:,} bytes in {room:,}"
        raise ValueError(f"{path} is refused: it {what}, which torch.save does not; ask for a safetensors file")
