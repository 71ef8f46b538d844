"""Make shards of your files: ``python -m uml_fast.prepare KIND SOURCE OUT``."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from uml_fast.cli import run_main
from uml_fast.config import require
from uml_fast.data.prepare import arrays, audio, features, images, text
from uml_fast.data.prepare.arrays import Names, find_arrays
from uml_fast.data.prepare.build import PROBLEMS, Job, build
from uml_fast.data.prepare.folders import find_files
from uml_fast.data.prepare.items import Converter, Item
from uml_fast.data.prepare.listing import Found, Listing, order
from uml_fast.data.prepare.pool import usable_cores
from uml_fast.data.prepare.tables import FileColumns, TextColumns
from uml_fast.data.shards.lengths import UNITS

_AGAIN = "take out what cannot be used and give --overwrite: splits are drawn anew of what is left"

_DESCRIPTION = """Make WebDataset shards with an index and a manifest of your own files.

  python -m uml_fast.prepare images photos/ shards/photos       photos/CLASS/*.jpg
  python -m uml_fast.prepare images labels.csv shards/photos    columns file, label, split
  python -m uml_fast.prepare audio sounds.tar shards/sounds --sample-rate 16000
  python -m uml_fast.prepare text prompts.json shards/text      {"dog": ["A dog is ...", ...], ...}
  python -m uml_fast.prepare tokens prompts.json shards/text --tokenizer models/bert
  python -m uml_fast.prepare features mosi.pkl shards/vision --names.features vision

A killed run goes on where it stopped when the same command is given again. Inputs that cannot be
used are named in OUT/problems.jsonl. uml-fast inspect OUT shows what was made."""

_NO_MATTER = ("source", "out", "workers", "max_errors", "overwrite", "tokenizer")
"""Options that change nothing in a sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """What every kind of data has."""

    kind: ClassVar[str]

    source: Annotated[Path, tyro.conf.arg(metavar="SOURCE")]
    """Where the inputs are."""
    out: Annotated[Path, tyro.conf.arg(metavar="OUT")]
    """Folder for the shards."""
    split: str = "train=0.8,val=0.1,test=0.1"
    """Parts of the splits where the source has none; a hash of each name decides."""
    seed: int = 0
    """Seed of that hash and of the order of the samples."""
    shard_size_mib: float = 64
    """Size of a shard in MiB."""
    workers: int = field(default_factory=usable_cores)
    """Processes that convert; the shards are the same for any number."""
    max_errors: float = 0.01
    """Unusable inputs that are skipped before it stops: below 1 their part, else their number."""
    overwrite: bool = False
    """Replace shards of other inputs or options in the folder."""

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed is {self.seed}; it must be >= 0")
        require(self.workers >= 1, f"workers is {self.workers}; it must be >= 1")
        require(
            0 < self.shard_size_mib < 2**20,
            f"shard-size-mib is {self.shard_size_mib}; it must be positive",
        )
        require(0 <= self.max_errors < 2**53, f"max-errors is {self.max_errors}; it must be >= 0")

    def find(self) -> Found:
        """Look through the source."""
        raise NotImplementedError

    def converter(self, items: list[Item]) -> tuple[Converter, dict[str, Any]]:
        """What makes samples of the inputs, and what then holds for all of them."""
        raise NotImplementedError

    def job(self) -> Job:
        """List the inputs and say what is to be done with them.

        Raises:
            DataError: the source cannot be used.
            ConfigError: an option cannot be used.
        """
        require(
            self.out.resolve() != self.source.resolve(),
            f"source and out are both {self.out}; name another folder for the shards",
        )
        listing: Listing = order(self.find(), self.split, self.seed)
        items = [item for rows in listing.splits.values() for _, _, item in rows]
        converter, facts = self.converter(items)
        options = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self).items() if name not in _NO_MATTER
        }  # fmt: skip
        return Job(
            kind=self.kind, out=self.out, listing=listing, converter=converter, options=options,
            facts={"length_unit": list(UNITS[self.kind]), **facts},
            shard_bytes=int(self.shard_size_mib * 2**20), workers=self.workers,
            max_errors=self.max_errors, overwrite=self.overwrite,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Images(PrepareConfig):
    """Class folders of images (jpg, png, webp, bmp, ...), a tar file of them, or a CSV of files.

    Folders called train, val and test around the classes are kept as splits. Without classes, all
    images are unlabelled. jpg, png and webp keep their bytes unless a size is asked.
    """

    kind: ClassVar[str] = "images"

    resize: int = 0
    """Pixels of the shorter side; 0: as it is."""
    crop: bool = False
    """Cut the middle square of that size."""
    quality: int = 95
    """JPEG quality of what is resized."""
    columns: FileColumns = field(default_factory=FileColumns)
    """Names of the CSV's columns."""

    def __post_init__(self) -> None:
        # without arguments super() does not work in a dataclass with slots
        super(Images, self).__post_init__()
        require(self.resize >= 0, f"resize is {self.resize}; it must be >= 0")
        require(self.resize > 0 or not self.crop, "crop needs a size: --resize N --crop")
        require(1 <= self.quality <= 100, f"quality is {self.quality}; it must be in 1..100")

    def find(self) -> Found:
        """See ``PrepareConfig``."""
        return find_files(self.source, images.EXTENSIONS, self.columns)

    def converter(self, items: list[Item]) -> tuple[Converter, dict[str, Any]]:
        """See ``PrepareConfig``."""
        import PIL.Image  # noqa: F401 (before any process starts: a clear message if it is missing)

        return images.ImageConverter(self.resize, self.crop, self.quality), {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Audio(PrepareConfig):
    """Class folders of sounds (wav, flac, ogg, mp3, ...), a tar file of them, or a CSV of files.

    Several channels are mixed to one. Mono wav, flac and ogg of the right rate keep their bytes,
    all else is stored as 16-bit flac.
    """

    kind: ClassVar[str] = "audio"

    sample_rate: int = 0
    """Samples per second to resample to; 0: that of most files, and others are refused."""
    columns: FileColumns = field(default_factory=FileColumns)
    """Names of the CSV's columns."""

    def __post_init__(self) -> None:
        super(Audio, self).__post_init__()
        require(
            self.sample_rate == 0 or 1000 <= self.sample_rate <= audio.MAX_RATE,
            f"sample-rate is {self.sample_rate}; it must be in 1000..{audio.MAX_RATE} Hz",
        )

    def find(self) -> Found:
        """See ``PrepareConfig``."""
        return find_files(self.source, audio.EXTENSIONS, self.columns)

    def converter(self, items: list[Item]) -> tuple[Converter, dict[str, Any]]:
        """See ``PrepareConfig``."""
        import soundfile  # noqa: F401

        rate = self.sample_rate or audio.usual_rate(items)
        made = audio.AudioConverter(rate, resamples=self.sample_rate > 0)
        return made, {"sample_rate": rate}


@dataclass(frozen=True, kw_only=True, slots=True)
class Text(PrepareConfig):
    """Rows of a CSV, TSV, JSON lines or JSON table: text, label, split (if any), id (if any).

    A JSON object from class to list of sentences is read as well. A folder of several tables has
    one for each split.
    """

    kind: ClassVar[str] = "text"

    columns: TextColumns = field(default_factory=TextColumns)
    """Names of the table's columns."""

    def find(self) -> Found:
        """See ``PrepareConfig``."""
        return text.find_texts(self.source, self.columns)

    def converter(self, items: list[Item]) -> tuple[Converter, dict[str, Any]]:
        """See ``PrepareConfig``."""
        return text.TextConverter(), {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens(Text):
    """The same tables as token ids, for a language model: those of its tokenizer.json.

    The run's text modality then takes ids below the vocabulary (--modalities.N.vocabulary).
    """

    kind: ClassVar[str] = "tokens"

    tokenizer: Path | None = None
    """File tokenizer.json, or the folder of a model that holds one; it must be given."""
    max_tokens: int = 512
    """Tokens of a text at most, special ones among them; longer texts are cut."""

    def __post_init__(self) -> None:
        super(Tokens, self).__post_init__()
        require(self.tokenizer is not None, "tokens need a tokenizer: --tokenizer FILE_OR_FOLDER")
        require(self.max_tokens >= 4, f"max-tokens is {self.max_tokens}; it must be >= 4")

    def converter(self, items: list[Item]) -> tuple[Converter, dict[str, Any]]:
        """See ``PrepareConfig``."""
        assert self.tokenizer is not None
        file = text.tokenizer_file(self.tokenizer)
        size = text.load_tokenizer(file, self.max_tokens).get_vocab_size()
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        facts = {"vocabulary": size, "tokenizer_sha256": digest}
        return text.TokenConverter(file, self.max_tokens), facts


@dataclass(frozen=True, kw_only=True, slots=True)
class Features(PrepareConfig):
    """Arrays (n, features) or (n, rows, features) in .npy, .npz, a MultiBench pickle, or of
    uml_fast.extract (.safetensors), labels too.

    Ragged samples are rows and offsets, or a list of arrays in a pickle. Pickles are read
    without running anything in them. Class folders of one .npy a sample are read as well.
    """

    kind: ClassVar[str] = "features"

    names: Names = field(default_factory=Names)
    """Names of the arrays."""
    trim: bool = False
    """Cut off rows of zeros at either end: padding."""
    columns: FileColumns = field(default_factory=FileColumns)
    """Names of the CSV's columns."""

    def find(self) -> Found:
        """See ``PrepareConfig``."""
        source = self.source
        is_folder = source.is_dir() and not any(
            p.suffix.lower() in arrays.FILES for p in source.iterdir()
        )
        if is_folder or source.suffix.lower() in (".csv", ".tsv", ".tar"):
            return find_files(source, features.EXTENSIONS, self.columns)
        return find_arrays(source, self.names)

    def converter(self, items: list[Item]) -> tuple[Converter, dict[str, Any]]:
        """See ``PrepareConfig``."""
        width = features.usual_width(items)
        return features.FeatureConverter(width, self.trim), {"width": width}


def parse(argv: list[str] | None) -> PrepareConfig:
    """The options that the arguments ask for.

    Raises:
        ConfigError: an option has a value that cannot be.
        SystemExit: help was asked for (0), or an option is unknown or cannot be read (2).
    """
    kinds: Any = Images | Audio | Text | Tokens | Features
    return tyro.cli(
        kinds,
        args=sys.argv[1:] if argv is None else argv,
        prog="python -m uml_fast.prepare",
        description=_DESCRIPTION,
        config=(tyro.conf.PositionalRequiredArgs,),
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m uml_fast.prepare``; returns the exit status."""
    config = parse(argv)
    job = config.job()
    made = build(job)
    splits = ", ".join(f"{name} {s['samples']:,}" for name, s in made["splits"].items())
    classes = len(made["class_names"])
    print(f"{config.out}: {splits}; {classes} class{'' if classes == 1 else 'es'}")
    if classes < 2:
        print("training to tell classes apart takes two or more: a folder each, or a column label")
    for name in made["empty_classes"]:
        print(f"class {name!r} has no sample")
    skipped = sum(made["problems"].values())
    for name in job.listing.splits:
        split = made["splits"].get(name)
        if split is None:
            print(f"split {name} has no sample: none of its inputs can be used; {_AGAIN}")
            continue
        lacking = [c for c, n in split["classes"].items() if n == 0]
        lacking = [c for c in lacking if c not in made["empty_classes"]]
        if lacking:
            print(
                f"split {name} has no sample of {', '.join(lacking)}; add samples, or put some "
                "there: folders train, val and test around the classes, or a column split"
                + (f". {_AGAIN}" if skipped else "")
            )
    if skipped:
        kinds = ", ".join(f"{n} x {kind}" for kind, n in made["problems"].items())
        print(f"{skipped} inputs were skipped ({kinds}); see {config.out / PROBLEMS}")
    for note, n in made["notes"].items():
        print(f"{n} x {note}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
