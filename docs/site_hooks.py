"""Hooks of the site: pictures of benchmarks/results, which pages show by relative links, are part of it."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = "](../benchmarks/results/"


def on_files(files: Files, config: Any) -> Files:
    """Add each picture that a page shows."""
    for page in list(files.documentation_pages()):
        for name in re.findall(re.escape(OUTSIDE) + r"([^)#]+\.png)\)", page.content_string):
            place = f"benchmarks/results/{name}"
            if files.get_file_from_path(place) is None:
                files.append(File(place, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point pictures at their place in the site."""
    return markdown.replace(OUTSIDE, "](benchmarks/results/")
