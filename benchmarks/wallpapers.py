"""Pictures of 3840 x 2160 pixels for the evaluation of autoencoders, from Debian's package of wallpapers.

    apt-get download plasma-workspace-wallpapers && dpkg-deb -x plasma-workspace-wallpapers_*.deb unpacked
    python benchmarks/wallpapers.py unpacked/usr/share/wallpapers wallpapers

writes every third wallpaper of at least that size to wallpapers/test, scaled and cropped to it, and squares of 256
pixels of all others, at most 2160 pixels high, to wallpapers/train. The largest file of each wallpaper is read. KDE's
Visual Design Group, GPL-2+ by the package's copyright file; nothing of them is in this repository.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SIZE = (3840, 2160)  # of test pictures, pixels
TILE, TILES = 256, 24  # side of a training square, and squares of each wallpaper


def largest(folder: Path) -> Path | None:
    """The file with the most pixels below contents/images; None without one."""
    paths = [p for p in sorted(folder.glob("contents/images/*")) if p.suffix in (".jpg", ".png") and p.is_file()]
    return max(paths, key=_pixels, default=None)


def _pixels(path: Path) -> int:
    with Image.open(path) as image:
        return image.width * image.height


def is_large(path: Path) -> bool:
    """Whether a file has at least the size of test pictures."""
    with Image.open(path) as image:
        return image.width >= SIZE[0] and image.height >= SIZE[1]


def squares(image: Image.Image, seed: int) -> list[Image.Image]:
    """Squares at random places, at the picture's own resolution."""
    corners = np.random.default_rng(seed).random((TILES, 2)) * (image.width - TILE, image.height - TILE)
    return [image.crop((x, y, x + TILE, y + TILE)) for x, y in corners.astype(int).tolist()]


def reduced(image: Image.Image) -> Image.Image:
    """At most as high as test pictures."""
    return ImageOps.contain(image, (10 * SIZE[0], SIZE[1])) if image.height > SIZE[1] else image


def write(source: Path, out: Path) -> tuple[list[str], list[str]]:
    """Write both folders; names of the wallpapers for training and for testing. ValueError without wallpapers."""
    files = {folder.name: path for folder in sorted(source.glob("*")) if (path := largest(folder))}
    test = [name for name, path in files.items() if is_large(path)][::3]
    if not test:
        raise ValueError(f"{source} holds no wallpaper of {SIZE[0]}x{SIZE[1]} pixels; expected usr/share/wallpapers")
    for part in ("train", "test"):
        (out / part).mkdir(parents=True, exist_ok=True)
    for seed, (name, path) in enumerate(files.items()):
        image = Image.open(path).convert("RGB")
        if name in test:
            ImageOps.fit(image, SIZE).save(out / "test" / f"{name}.png", compress_level=1)
        else:
            for i, square in enumerate(squares(reduced(image), seed)):
                square.save(out / "train" / f"{name}_{i:02}.png")
    return [name for name in files if name not in test], test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="usr/share/wallpapers of the unpacked package")
    parser.add_argument("out", type=Path, help="folder to write")
    options = parser.parse_args()
    train, test = write(options.source, options.out)
    print(f"{len(train)} wallpapers to train on, {len(test)} to test on: {', '.join(test)}")


if __name__ == "__main__":
    main()
