"""Real pictures that Debian packages ship: photographs, and clip-art by subject. Downloaded and unpacked, never installed.

    python -m benchmarks.package_pictures --data_dir output/real_pictures

Needs Debian's `apt-get download` and `dpkg-deb` (on another system, put the .deb files into DATA_DIR/packages). Writes

    DATA_DIR/photographs/*.png           about 250 photographs, 200 to 1024 pixels
    DATA_DIR/clipart/<subject>/*.png     about 2000 drawings of 15 subjects, up to 256 pixels

Two pictures that look the same (difference hash) are kept once, so that no test picture has a double among those trained on.

Licences: openclipart is in the public domain. The photographs are free under licences of their own (CC0, CC BY, CC BY-SA, GPL), which
each package lists in usr/share/doc/<package>/copyright; nothing of them is committed here.
"""

import argparse
import hashlib
import io
import shutil
import struct
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image
from tqdm import tqdm

from library.errors import UserError
from library.scorer_data.pictures import read_picture
from library.scorer_data.records import FilePicture

# Photographs among the files of a package, below usr/share; the others are drawings or patterns.
WALLPAPERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "mate-backgrounds": ("backgrounds/mate/nature/*.jpg",),
        "lomiri-wallpapers-16.04": ("backgrounds/[!awu]*.jpg",),
        "lomiri-wallpapers-20.04": ("backgrounds/Kleiber*.jpg",),
        "plasma-workspace-wallpapers": tuple(
            f"wallpapers/{name}/contents/images/2560x1600.jpg"
            for name in ("Path", "DarkestHour", "ColorfulCups", "EveningGlow", "Grey", "OneStandsOut", "BytheWater", "FallenLeaf", "Kite")
        ),
    }
)
# Qt resource files of an educational game, with WebP pictures in them.
PHOTO_RESOURCES = ("categorization", "erase", "explore_farm_animals", "explore_monuments", "explore_world_animals", "explore_world_music")
SUBJECTS: Mapping[str, str] = MappingProxyType(
    {
        "animals": "animals",
        "arrows": "shapes/arrows",
        "buildings": "buildings",
        "computers": "computer/hardware",
        "flags": "signs_and_symbols/flags",
        "food": "food",
        "map symbols": "signs_and_symbols/map_symbols",
        "maps": "geography",
        "music": "recreation/music",
        "office": "office",
        "people": "people",
        "plants": "plants",
        "sports": "recreation/sports",
        "tools": "tools",
        "transport": "transportation",
    }
)
MAX_PER_SUBJECT = 300
MIN_PHOTOGRAPH, MAX_PHOTOGRAPH, MAX_CLIPART = 200, 1024, 256  # pixels
SAME_BITS = 6  # of 64, up to which two difference hashes mean the same picture


def unpack(package: str, data_dir: Path) -> Path:
    """Download a Debian package unless it is there, unpack it, and return the folder that stands for usr/share."""
    packages, target = data_dir / "packages", data_dir / "unpacked" / package
    if not target.is_dir():
        packages.mkdir(parents=True, exist_ok=True)
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise UserError(f"there is no {tool} here; run this on Debian, where the packages with the pictures are")
        if not list(packages.glob(f"{package}_*.deb")):
            done = subprocess.run(["apt-get", "download", package], cwd=packages, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"apt-get download {package} failed ({done.stderr.strip()}); run apt-get update first")
        [archive] = packages.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)
    return target / "usr" / "share"


def difference_hash(picture: Image.Image) -> int:
    """64 bits: which of two neighbours is brighter, in the picture reduced to 9 x 8 greys."""
    grey = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(int)
    return int("".join("1" if bit else "0" for bit in (grey[:, 1:] > grey[:, :-1]).flatten()), 2)


class Seen:
    """Remembers pictures by their looks."""

    def __init__(self) -> None:
        self._hashes: list[tuple[int, tuple[float, ...]]] = []

    def is_new(self, picture: Image.Image) -> bool:
        """Whether no picture before looked like this one; remembers it. Flat pictures are told apart by their mean colour."""
        bits = difference_hash(picture)
        colour = tuple(np.asarray(picture.resize((4, 4), Image.Resampling.BOX)).astype(float).flatten() / 255)
        for other_bits, other_colour in self._hashes:
            if (bits ^ other_bits).bit_count() <= SAME_BITS and np.abs(np.subtract(colour, other_colour)).mean() < 0.05:
                return False
        self._hashes.append((bits, colour))
        return True


def webp_pictures(resource: Path) -> Iterator[Image.Image]:
    """The opaque pictures in a Qt resource file, which holds WebP files whole: "RIFF", their size, "WEBP"."""
    content, start = resource.read_bytes(), 0
    while (start := content.find(b"RIFF", start)) >= 0:
        if content[start + 8 : start + 12] == b"WEBP":
            size = 8 + struct.unpack("<I", content[start + 4 : start + 8])[0]
            with Image.open(io.BytesIO(content[start : start + size])) as picture:
                if picture.mode == "RGB":
                    yield picture.convert("RGB")
        start += 4


def all_photographs(data_dir: Path) -> Iterator[tuple[str, Image.Image]]:
    for package, patterns in WALLPAPERS.items():
        folder = unpack(package, data_dir)
        for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
            name = path.parents[2].name if path.stem == "2560x1600" else path.stem
            yield name, read_picture(FilePicture(path))
    folder = unpack("gcompris-qt-data", data_dir) / "gcompris-qt" / "rcc"
    for resource in PHOTO_RESOURCES:
        for number, picture in enumerate(webp_pictures(folder / f"{resource}.rcc")):
            yield f"{resource}-{number:03d}", picture


def photographs(data_dir: Path) -> list[Path]:
    """Photographs as PNG files, no two alike; made at the first call."""
    folder = data_dir / "photographs"
    if not folder.is_dir():
        seen, unfinished = Seen(), _fresh(data_dir / "photographs.part")
        for name, picture in tqdm(all_photographs(data_dir), desc="photographs", unit="picture"):
            if min(picture.size) >= MIN_PHOTOGRAPH and seen.is_new(picture):
                picture.thumbnail((MAX_PHOTOGRAPH, MAX_PHOTOGRAPH), Image.Resampling.LANCZOS)
                picture.save(unfinished / f"{name}.png")
        unfinished.rename(folder)
    return sorted(folder.glob("*.png"))


def clipart(data_dir: Path) -> list[tuple[Path, str]]:
    """Drawings on white as PNG files, no two alike, each with its subject; made at the first call."""
    folder = data_dir / "clipart"
    if not folder.is_dir():
        seen, unfinished = Seen(), _fresh(data_dir / "clipart.part")
        source = unpack("openclipart-png", data_dir) / "openclipart" / "png"
        for subject, below in SUBJECTS.items():
            (unfinished / subject).mkdir()
            files = [path for path in by_hash((source / below).rglob("*.png")) if not path.is_symlink()]
            count = 0
            for path in tqdm(files, desc=subject, unit="picture"):
                try:
                    picture = read_picture(FilePicture(path))
                except UserError:
                    continue
                if count < MAX_PER_SUBJECT and seen.is_new(picture):
                    picture.thumbnail((MAX_CLIPART, MAX_CLIPART), Image.Resampling.LANCZOS)
                    picture.save(unfinished / subject / f"{count:03d}-{path.stem}.png")
                    count += 1
        unfinished.rename(folder)
    return [(path, path.parent.name) for path in sorted(folder.glob("*/*.png"))]


def by_hash(paths: Iterable[Path]) -> list[Path]:
    """In an order that depends on the file names alone and has nothing to do with what they show."""
    return sorted(paths, key=lambda path: hashlib.sha256(path.name.encode()).digest())


def split(paths: Iterable[Path], num_test: int) -> tuple[list[Path], list[Path]]:
    """Training and test pictures, the same in every run."""
    ordered = by_hash(paths)
    return ordered[num_test:], ordered[:num_test]


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=Path("output/real_pictures"))
    args = parser.parse_args()
    print(f"{len(photographs(args.data_dir))} photographs")
    drawings = clipart(args.data_dir)
    for subject in SUBJECTS:
        print(f"{sum(label == subject for _, label in drawings):4d} {subject}")


if __name__ == "__main__":
    main()
