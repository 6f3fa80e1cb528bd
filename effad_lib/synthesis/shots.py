"""What a synthetic data set consists of: its settings, and the list of shots that follows from them."""

import hashlib
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from zlib import crc32

import numpy as np

from effad_lib.images import SMALLEST, check_size, find_images, image_size, read_image
from effad_lib.runs import resolve
from effad_lib.settings import Settings, SettingsError
from effad_lib.synthesis.rendering import (
    SyntheticImage,
    check_name,
    check_product,
    check_seed,
    check_severity,
    damage,
    defect_names,
    photograph_defects,
    render,
)
from effad_lib.synthesis.scene import SynthesisError

FEWEST_GOOD = 13
"""Good images that a detector needs: ten to train on and three held out."""

MOST_IMAGES = 200_000
"""Images of a data set: the manifest of more is longer than a file in JSON may be."""

DRAWING = 2
"""Raised with every change of what is drawn for a seed: data sets of another number are not taken for the same."""


@dataclass(frozen=True)
class Shot:
    """One image of a data set: where it goes, what is wrong with it, and what it is made from."""

    path: str
    defect: str = "good"
    seed: int = 0
    severity: float = 1.0
    source: str = ""  # the photograph it is made of, as a path below their folder

    @property
    def record(self) -> dict:
        """Its line in the manifest."""
        unused = {"source"} if not self.source else set()
        unused |= {"severity"} if self.defect == "good" else set()
        unused |= {"seed"} if self.source and self.defect == "good" else set()
        return {name: value for name, value in asdict(self).items() if name not in unused}


@dataclass(frozen=True)
class SynthesisSettings(Settings):
    """Settings of a synthetic data set, drawn or made of one's own good photographs."""

    MAY_CHANGE = frozenset({"run_folder", "data_root", "workers", "overwrite", "detector_steps"})

    run_folder: str = "runs/synthesis"  # for figures; the data set goes to data_root
    product: str = "board"  # see `product_names`
    photographs: str = ""  # folder of good photographs to damage, in place of a product
    data_root: str = "data/synthetic"  # gets the folder <product>; the default is where dataset "synthetic" looks
    defects: list[str] = ()  # their names; [] takes all that the product can have
    image_size: list[int] = (256, 256)  # height and width in pixels, each at least 64; photographs keep theirs
    train: int = 200  # good images to train on; of photographs all that are not tested
    test_good: int = 40  # good test images
    test_per_defect: int = 20  # test images of each defect
    severity: list[float] = (0.4, 1.0)  # lowest and highest, above 0 (invisible) and at most 1 (obvious)
    seed: int = 0  # of everything random
    workers: int = 0  # that draw at the same time; 0 takes one for each core
    overwrite: bool = False  # replace another synthetic data set in the same folder
    detector_steps: int = 1000  # of the detector that notebook 01 tries the data set with; 0 leaves it out

    def check(self) -> None:
        check_product(self.product)
        check_size(self.image_size)
        check_seed(self.seed)
        for name in ("train", "test_good", "test_per_defect", "workers", "detector_steps"):
            self.require(getattr(self, name) >= 0, name, "a whole number of at least 0")
        self.require(len(set(self.defects)) == len(self.defects), "defects", "each name once")
        self.require(len(self.severity) == 2, "severity", "two numbers, the lowest and the highest")
        count = self.train + self.test_good + self.test_per_defect * len(self.defects or defect_names(self.product))
        if count > MOST_IMAGES:
            raise SettingsError(
                f"{count:,} images: a data set takes {MOST_IMAGES:,} at most. Make train = {self.train}, test_good = "
                f"{self.test_good} or test_per_defect = {self.test_per_defect} smaller."
            )
        for level in self.severity:
            check_severity(level)
        self.require(self.severity[0] <= self.severity[1], "severity", "the lowest first")
        if not self.photographs:
            for name in self.defects:
                check_name("defect", name, defect_names(self.product), f" of {self.product}")

    @property
    def folder(self) -> Path:
        """Where the data set is."""
        return resolve(self.data_root) / ("photographs" if self.photographs else self.product)

    @property
    def identity(self) -> dict:
        """The settings that decide what is in the data set, as the manifest keeps them."""
        values = {name: value for name, value in self.as_dict().items() if name not in self.MAY_CHANGE}
        unused = ("product", "image_size", "train") if self.photographs else ("photographs",)
        values = {name: value for name, value in values.items() if name not in unused}
        if self.photographs:
            values["photographs_sha256"] = self._digest
        return values | {"defects": self.defect_names, "drawing": DRAWING}

    @cached_property
    def defect_names(self) -> list[str]:
        """The names of the defects in it. Raises SynthesisError if a tested photograph cannot have one of them."""
        if not self.photographs:
            return list(self.defects) or defect_names(self.product)
        able = [photograph_defects(_picture(path)) for path in self._parts[1]]
        shared = [name for name in able[0] if all(name in other for other in able[1:])] if able else []
        for name in self.defects:
            check_name("defect", name, shared, f" of the photographs in {self.photographs}")
        return list(self.defects) or shared

    @cached_property
    def _parts(self) -> tuple[list[Path], list[Path]]:
        """The photographs to train on and those to test."""
        folder = resolve(self.photographs)
        paths = find_images(folder)
        if self.folder.is_relative_to(folder) or folder.is_relative_to(self.folder):
            raise SynthesisError(
                f"data_root = {self.data_root!r}: what is written to {self.folder} would mix with the photographs in "
                f"{folder}. Name a data_root outside of them."
            )
        if len(paths) < self.test_good + FEWEST_GOOD or not self.test_good:
            raise SynthesisError(
                f"test_good = {self.test_good}: {len(paths)} photographs are in {self.photographs}. At least one is "
                f"tested and {FEWEST_GOOD} are left to train on: take more photographs, or a smaller test_good."
            )
        for path in paths:
            if min(image_size(path)) < SMALLEST:
                raise SynthesisError(f"{path}: too small, each side takes {SMALLEST} pixels or more. Remove the file.")
        tested = set(np.random.default_rng(self.seed).permutation(len(paths))[: self.test_good].tolist())
        train = [path for index, path in enumerate(paths) if index not in tested]
        return train, [paths[index] for index in sorted(tested)]

    @cached_property
    def _digest(self) -> str:
        """Tells the photographs apart from others of the same folder."""
        digest = hashlib.sha256()
        for path in chain(*self._parts):
            digest.update(f"{self._below(path)} {path.stat().st_size} {crc32(path.read_bytes())}\n".encode())
        return digest.hexdigest()

    def plan(self) -> list[Shot]:
        """Return all shots. A drawn image i of a class depends on seed, class and i, not on how many there are."""
        if self.photographs:
            train, tested = self._parts
            good = [("train", index, path) for index, path in enumerate(train)]
            good += [("test", index, path) for index, path in enumerate(tested)]
            shots = [
                Shot(f"{part}/good/{index:03d}{path.suffix.lower()}", "good", 0, 1.0, self._below(path))
                for part, index, path in good
            ]
            sources = [self._below(tested[index % len(tested)]) for index in range(self.test_per_defect)]
        else:
            counts = {"train": self.train, "test": self.test_good}
            shots = [self._shot(part, "good", index) for part, count in counts.items() for index in range(count)]
            sources = [""] * self.test_per_defect
        return shots + [
            self._shot("test", defect, index, source)
            for defect in self.defect_names
            for index, source in enumerate(sources)
        ]

    def _shot(self, part: str, defect: str, index: int, source: str = "") -> Shot:
        name = "photograph" if source else self.product
        drawn = np.random.SeedSequence((self.seed, crc32(f"{name}/{part}/{defect}".encode()), index))
        seed, share = (int(word) for word in drawn.generate_state(2, np.uint32))
        lowest, highest = self.severity
        level = min(max(round(lowest + (highest - lowest) * share / 2**32, 4), lowest), highest)
        return Shot(f"{part}/{defect}/{index:03d}.png", defect, seed, level, source)

    def source(self, shot: Shot) -> Path:
        """Return the photograph that a shot is made of."""
        return resolve(self.photographs) / shot.source

    def _below(self, path: Path) -> str:
        return path.relative_to(resolve(self.photographs)).as_posix()

    def take(self, shot: Shot) -> SyntheticImage:
        """Return the image of a shot; equal shots give equal bytes."""
        if not shot.source:
            return render(
                self.product, shot.defect, size=tuple(self.image_size), seed=shot.seed, severity=shot.severity
            )
        picture = _picture(self.source(shot))
        if shot.defect == "good":
            nothing = np.zeros(picture.shape[:2], bool)
            return SyntheticImage(picture, nothing, picture, "photograph", "good", shot.seed)
        return damage(picture, shot.defect, seed=shot.seed, severity=shot.severity)


def _picture(path: Path) -> np.ndarray:
    return np.ascontiguousarray(read_image(path).transpose(1, 2, 0))
