"""Photographs for `data: folder` without a download, from installed packages, with captions.

    python benchmarks/photographs.py OUT

writes OUT/*.png|jpg unchanged (grey and colour, 172 to 1411 pixels) and OUT/captions.jsonl, with several hand-written
captions each. The files come from scikit-image, scikit-learn and matplotlib, which document their sources and licences;
missing files are skipped and listed.
"""

import argparse
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

SKIMAGE, SKLEARN, MATPLOTLIB = "skimage/data", "sklearn/datasets/images", "matplotlib/mpl-data/sample_data"

CAPTIONS: dict[str, tuple[str, ...]] = {
    f"{SKIMAGE}/astronaut.png": (
        "a portrait of a smiling woman in an orange space suit",
        "an astronaut with short hair in front of a flag and a model of a space shuttle",
        "a photo of an astronaut in an orange suit beside a black helmet",
        "a woman astronaut smiles at the camera",
    ),
    f"{SKIMAGE}/camera.png": (
        "a black and white photo of a man with a camera on a tripod",
        "a man in a dark coat looks through a camera on a lawn",
        "a photographer at work, tall buildings far behind him",
        "a cameraman in black and white",
    ),
    f"{SKIMAGE}/chelsea.png": (
        "a close-up of the face of a tabby cat",
        "a brown striped cat with green eyes",
        "a photo of a cat",
        "a cat with long whiskers looks to the right",
    ),
    f"{SKIMAGE}/coffee.png": (
        "a cup of espresso on a red saucer",
        "a photo of a cup of coffee with a spoon on a wooden table",
        "coffee in a red and white cup seen from above",
        "a red cup and saucer on brown wood",
    ),
    f"{SKIMAGE}/coins.png": (
        "four rows of old coins on a dark background",
        "a black and white photo of ancient coins",
        "many worn Greek coins lie in rows",
        "old round coins in grey",
    ),
    f"{SKIMAGE}/rocket.jpg": (
        "a white rocket on its launch pad at dusk",
        "a photo of a rocket between steel towers",
        "a rocket stands under a dark blue sky, bright lamps at its foot",
        "a launch pad with a rocket in the evening",
    ),
    f"{SKIMAGE}/motorcycle_left.png": (
        "a red motorcycle in a garage",
        "a photo of a red motorcycle with a black seat",
        "a motorcycle stands in front of shelves with boxes",
        "a parked red motorbike seen from its right side",
    ),
    f"{SKIMAGE}/brick.png": (
        "a brick wall in black and white",
        "grey bricks with light joints",
        "a texture of long dark bricks",
    ),
    f"{SKIMAGE}/grass.png": (
        "a lawn in black and white",
        "grey blades of grass seen from above",
        "a texture of grass with small leaves",
    ),
    f"{SKIMAGE}/gravel.png": (
        "gravel in black and white",
        "many small grey stones",
        "a texture of gravel seen from above",
    ),
    f"{SKIMAGE}/moon.png": (
        "the surface of the moon with a round crater",
        "a black and white photo of the moon's surface",
        "grey ground of the moon with craters and dark hollows",
    ),
    f"{SKIMAGE}/hubble_deep_field.jpg": (
        "many galaxies on a black sky",
        "a photo of deep space with small bright galaxies",
        "a telescope's picture of stars and galaxies, orange, white and blue on black",
    ),
    f"{SKIMAGE}/retina.jpg": (
        "the back of an eye with red blood vessels",
        "a medical photo of a retina",
        "an orange disc with branching vessels and a bright spot on the left, on black",
    ),
    f"{SKIMAGE}/ihc.png": (
        "stained tissue under a microscope, brown and blue",
        "a microscope photo of brown glands among blue cells",
        "a slice of tissue with brown and pale blue cells",
    ),
    f"{SKIMAGE}/page.png": (
        "a photo of a printed page in black and white",
        "a page of text about region-based segmentation",
        "black print on grey paper",
    ),
    f"{SKIMAGE}/text.png": (
        "handwritten formulas on paper",
        "a black and white photo of mathematics written by hand",
        "handwriting on lined paper seen at an angle",
    ),
    f"{SKLEARN}/china.jpg": (
        "a Chinese tower with tiled roofs above a lake",
        "a photo of a pagoda among green trees",
        "a red and green temple under a clear sky",
        "an old Chinese building, water in the background",
    ),
    f"{SKLEARN}/flower.jpg": (
        "an orange dahlia on a dark green background",
        "a photo of a flower",
        "a round orange flower in bloom",
        "a close-up of a dahlia with many petals",
    ),
    f"{MATPLOTLIB}/grace_hopper.jpg": (
        "a portrait of a woman in a navy uniform with a cap and glasses",
        "an elderly woman in a dark uniform in front of a flag",
        "a photo of a navy officer with medal ribbons",
        "an officer with glasses before a blue background",
    ),
}


def carried(source: str) -> Path | None:
    """Path of this file in an installed package; None if missing."""
    package, _, rest = source.partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / rest
    return path if path.is_file() else None


def write(out: Path) -> list[str]:
    """Copy the photographs and write their manifest; return the names of those not installed."""
    out.mkdir(parents=True, exist_ok=True)
    paths = {source: path for source in CAPTIONS if (path := carried(source))}
    for path in paths.values():
        shutil.copyfile(path, out / path.name)
    rows = [json.dumps({"file_name": path.name, "captions": CAPTIONS[source]}) for source, path in paths.items()]
    (out / "captions.jsonl").write_text("".join(row + "\n" for row in rows), "utf-8")
    return [source for source in CAPTIONS if source not in paths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    out = parser.parse_args().out
    missing = write(out)
    print(f"{len(CAPTIONS) - len(missing)} photographs in {out}" + (f"; not installed: {missing}" if missing else ""))


if __name__ == "__main__":
    main()
