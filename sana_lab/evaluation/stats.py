"""The verb `stats`: reference statistics of a folder of real images, for distances to compare with."""

import argparse
from collections.abc import Iterator

from torch import Tensor

from sana_lab.config import experiments, specs
from sana_lab.config.paths import check_file
from sana_lab.data import importers
from sana_lab.evaluation.distances import reference
from sana_lab.evaluation.image_files import Skipped, batches
from sana_lab.evaluation.image_folder import captioned_files


def main(options: argparse.Namespace) -> None:
    """`sana-lab stats FOLDER --extractor SPEC --out FILE`."""
    check_file(options.out)
    extractor = specs.build("extractor", experiments.apply({}, [f"extractor={options.extractor}"])["extractor"])
    skipped = Skipped(options.folder)
    statistics = reference.compute(_images(options, skipped), extractor, features=options.features, batch=options.batch)
    reference.save(statistics, options.out)
    record = statistics.record
    print(f"{options.out}: {record['n']} pictures, sha256 {record['images_sha256'][:16]}")
    print("\n".join(f"skipped {name}: {why}" for name, why in skipped.reasons.items()), end="")


def _images(options: argparse.Namespace, skipped: Skipped) -> Iterator[Tensor]:
    """The images of a folder, of MJHQ-30K or of COCO, at their own sizes, in batches."""
    if options.layout == "mjhq":
        importers.mjhq(options.folder)
    if options.coco:
        importers.coco(options.coco, options.folder)
    return (images for images, _ in batches(captioned_files(options.folder), options.batch, skipped))
