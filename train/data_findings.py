"""What is in the shards of an experiment, as far as a few seconds can tell."""

from data import DataError
from data.inspect import example_sheet, few_images
from data.mixture import Mixture
from data.pictures import save_png
from data.remote import FileCache
from data.shards import ShardSet, verify
from train.config import Config
from train.findings import Findings

TARS_READ = 3  # of each set, against their sha256
PICTURES = 8
PATIENCE = 10  # seconds for a byte of a set that is remote; training waits longer, and tries again


def look_at_data(config: Config, findings: Findings) -> tuple[Mixture | None, ShardSet | None]:
    """What training and validation read; None of what is not sound."""
    cache = FileCache(config.data.cache, round(config.data.cache_gigabytes * 1e9), timeout=PATIENCE, retries=0)
    trained = [_is_sound("data.train", entry.path, cache, findings) for entry in config.data.train]
    validated = config.data.val is not None and _is_sound("data.val", config.data.val, cache, findings)
    train = Mixture.open(config.data.train, cache) if all(trained) else None
    val = ShardSet.open(config.data.val, cache) if validated else None
    if train:
        label_set = train.label_set
        findings.line(f"{len(train)} training images of {label_set.name}, {label_set.num_classes} classes")
        for warning in label_set.warnings():
            findings.warning(warning)
        _look_at_classes(train, findings)
    if val:
        findings.line(f"{len(val)} validation images")
        unseen = [name for name, pixels in zip(val.label_set.classes, val.pixel_counts, strict=True) if not pixels]
        if unseen:
            findings.warning(f"{val.location} shows no {', '.join(unseen)}: no score will tell how well it is learnt")
    pictured = {"train": train.members[0].shards if train else None, "val": val}
    for name, shards in pictured.items():
        if shards:
            path = config.output_dir / f"doctor_{name}.png"
            try:
                save_png(path, example_sheet(shards, PICTURES))
                findings.line(f"look at {path}: in `mirrored labels` a left eye has the colour of a left eye")
            except OSError as error:
                findings.error(f"output_dir: {error}")
                break
            except DataError as error:
                findings.error(f"data.{name}: {error}")
    findings.line(f"of each set {TARS_READ} tars at most were read against their sha256 (python -m data.inspect reads all)")
    return train, val


def _is_sound(key: str, location: str, cache: FileCache, findings: Findings) -> bool:
    try:
        problems = verify(location, cache, tars=TARS_READ)
    except DataError as error:
        findings.error(f"{key}: {error}")
        return False
    for problem in problems:
        findings.error(f"{key}: {problem}; copy it again or build the set again")
    return not problems


def _look_at_classes(train: Mixture, findings: Findings) -> None:
    rows = zip(train.label_set.classes, train.images_showing(), train.labelled.any(axis=0), strict=True)
    for name, count, is_labelled in rows:
        if is_labelled and count < few_images(len(train)):
            few = f"{name} is in {count} of {len(train)} training images"
            findings.warning(f"{few}; label more of it, or leave it out of the label set")
