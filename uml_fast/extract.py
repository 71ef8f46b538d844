"""Extract frozen features: ``python -m uml_fast.extract KIND SOURCE --out FOLDER``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import tyro
from torch import Tensor

from uml_fast.cli import run_main
from uml_fast.config import require
from uml_fast.data.decoding.decode import DecodeError, decode_of
from uml_fast.data.decoding.rows import rows_of
from uml_fast.data.prepare.items import Item
from uml_fast.data.prepare.listing import SPLIT_NAMES, natural_order
from uml_fast.data.prepare.tables import TextColumns
from uml_fast.data.prepare.text import find_texts
from uml_fast.data.shards.files import ShardSet, splits_of
from uml_fast.data.source import DataError, Source
from uml_fast.encoders import image, text
from uml_fast.encoders.audio import AudioEncoder
from uml_fast.encoders.extraction import Encoder, Sentences, Stored, extract
from uml_fast.encoders.networks import freeze
from uml_fast.encoders.patches import PatchEncoder
from uml_fast.encoders.plain import PlainEncoder
from uml_fast.encoders.sentences import SentenceEncoder
from uml_fast.encoders.sounds import SoundEncoder
from uml_fast.experiment.run import read_config
from uml_fast.experiment.trained import finished_trials, load_model
from uml_fast.runtime.device import resolve_device, resolve_dtype
from uml_fast.runtime.progress import StatusLine
from uml_fast.training.measure import embed, pack_source

_DESCRIPTION = """Extract the features of frozen encoders once, for heads that are trained on them.

  python -m uml_fast.extract image shards/photos --encoder timm/vit_small_patch14_dinov2.lvd142m --out feats
  python -m uml_fast.extract text prompts.json --encoder openlm-research/open_llama_3b_v2 --out feats
  python -m uml_fast.extract text shards/photos --template "a photo of a {}." --encoder gpt2 --out feats
  python -m uml_fast.extract image shards/photos --encoder runs/folders --out feats   a model trained here
  python -m uml_fast.extract image shards/photos --encoder patches --out feats        learned here, no download
  python -m uml_fast.train vision_text --data.where feats

Writes FOLDER/<modality>-<split>.safetensors. What is there already is not made again; a killed run
goes on where it stopped."""  # noqa: E501


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractConfig:
    """What every kind has."""

    kind: ClassVar[str]

    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]]
    """Shards: a folder that prepare wrote, tar files, URLs."""
    out: Path
    """Folder for the features."""
    name: str = ""
    """Modality in the names of the files; empty: the kind."""
    batch: int = 64
    """Samples encoded at a time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "auto"
    """bf16, fp32 or auto: bf16 where the device multiplies it natively."""
    max_errors: int = 100
    """Samples that may be unreadable before it stops; they are named in a .jsonl file there."""

    def __post_init__(self) -> None:
        require(self.batch >= 1, f"batch is {self.batch}; it must be >= 1")
        require(self.max_errors >= 0, f"max-errors is {self.max_errors}; it must be >= 0")
        require(
            self.precision in ("auto", "bf16", "fp32"),
            f"precision is {self.precision!r}; it is auto, bf16 or fp32",
        )
        require(
            self.name == "" or self.name.isidentifier(),
            f"name is {self.name!r}; it must be a Python identifier",
        )

    @property
    def modality(self) -> str:
        """Name of the modality."""
        return self.name or self.kind

    def splits(self) -> Iterator[tuple[str, Stored]]:
        """Name and samples of each split; "train" where shards are not split."""
        for split in splits_of(self.source) or (None,):
            yield split or "train", ShardSet.open(self.source, split)

    def training(self) -> Stored:
        """The samples that an encoder may learn from; their labels are not read.

        Raises:
            DataError: there is no split "train".
        """
        found = dict(self.splits())
        if "train" not in found:
            raise DataError(f"{self.source} has no split 'train' to learn an encoder from")
        return found["train"]

    def encoder_on(self, device: torch.device, dtype: torch.dtype) -> Encoder:
        """The encoder."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, slots=True)
class Image(ExtractConfig):
    """Images: any network of timm or transformers, or a run folder of this project."""

    kind: ClassVar[str] = "image"

    encoder: str
    """timm/NAME, a name of the Hugging Face hub, a folder of either, a run folder; or patches: a
    dictionary learned from the training images here, without labels."""
    size: int = 224
    """Pixels of the square cut out of the middle, after its shorter side is resized to them."""
    norm: image.Norm = "model"
    """Mean and deviation of the pixels: the network's own, CLIP's (the paper's) or ImageNet's."""
    pool: image.Pool = "auto"
    """auto: as the network does it; cls, or mean of the patches."""

    def encoder_on(self, device: torch.device, dtype: torch.dtype) -> Encoder:
        """See ``ExtractConfig``."""
        if is_run(self.encoder):
            return OwnEncoder(Path(self.encoder), self.kind)
        if self.encoder == "patches":
            return PatchEncoder(self.training())
        return image.ImageEncoder(
            self.encoder, device, dtype, size=self.size, norm=self.norm, pool=self.pool
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Text(ExtractConfig):
    """Texts: any encoder or decoder of transformers.

    SOURCE is shards, or a table of texts and classes (.csv, .jsonl, .json, {"class": [texts]}).
    """

    kind: ClassVar[str] = "text"

    encoder: str
    """A name of the Hugging Face hub, a folder of transformers, a run folder; or sentences: TF-IDF
    and singular vectors learned from the training texts here, without labels."""
    pool: text.Pool = "auto"
    """auto: eot for CLIP, cls for encoders, mean of all tokens for decoders."""
    template: tuple[str, ...] = ()
    """Sentences with {} for the name of a class, in place of the texts of SOURCE; its classes are
    named. The paper's is "a photo of a {}."."""

    def splits(self) -> Iterator[tuple[str, Stored]]:
        """See ``ExtractConfig``; a table is one split."""
        path = Path(self.source)
        is_table = path.suffix.lower() in (".csv", ".tsv", ".jsonl", ".json") and path.is_file()
        if self.template:
            found = _table(path)["train"].class_names if is_table else _class_names(self.source)
            yield "train", _from_templates(self.template, found)
        elif is_table:
            yield from _table(path).items()
        else:
            yield from super(Text, self).splits()

    def encoder_on(self, device: torch.device, dtype: torch.dtype) -> Encoder:
        """See ``ExtractConfig``."""
        if is_run(self.encoder):
            return OwnEncoder(Path(self.encoder), self.kind)
        if self.encoder == "sentences":
            return SentenceEncoder(self.training())
        return text.TextEncoder(self.encoder, device, dtype, pool=self.pool)


@dataclass(frozen=True, kw_only=True, slots=True)
class Audio(ExtractConfig):
    """Sounds: an audio model of transformers, the mean of its last hidden states."""

    kind: ClassVar[str] = "audio"

    encoder: str
    """A name of the Hugging Face hub, a folder of transformers, a run folder; or mel: statistics of
    log-mel bands, nothing learned."""

    def encoder_on(self, device: torch.device, dtype: torch.dtype) -> Encoder:
        """See ``ExtractConfig``."""
        if is_run(self.encoder):
            return OwnEncoder(Path(self.encoder), self.kind)
        if self.encoder == "mel":
            return SoundEncoder()
        return AudioEncoder(self.encoder, device, dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Features(ExtractConfig):
    """Features that were made elsewhere, as shards of .npy: the mean of each sample's rows."""

    kind: ClassVar[str] = "features"

    def encoder_on(self, device: torch.device, dtype: torch.dtype) -> Encoder:
        """See ``ExtractConfig``."""
        _, samples = next(self.splits())
        return PlainEncoder(samples.payload(0))


def is_run(name: str) -> bool:
    """Whether an encoder's name is that of a run folder."""
    return (Path(name) / "run.json").is_file()


class OwnEncoder(Encoder):
    """The encoder of a run of this project: a modality's stem and the shared backbone.

    Args:
        folder: run folder with a finished trial; the model of mode uml is taken where there is one.
        kind: image, text or audio; the modality of the run that has this name.

    Raises:
        RunFolderError, CheckpointError: the folder holds no finished trial.
        DataError: the run has no such modality.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        read_config(folder)  # heads on features are no encoder
        trials = finished_trials(folder)
        mode, seed = next((t for t in trials if t[0] == "uml"), trials[0])
        model, config, _ = load_model(folder, mode, seed)
        if kind not in [m.name for m in config.modalities]:
            names = ", ".join(m.name for m in config.modalities)
            raise DataError(f"{folder} has no modality {kind}; its modalities are {names}")
        self._model = model
        self._device = next(model.parameters()).device
        _, weights = freeze(model, self._device, torch.float32)
        own = config.modality(kind)
        self._decode, self._writer = decode_of(own), rows_of(own)
        self.kind, self._name = self._writer.kind, kind
        self.width = model.backbone.embedding_width
        self.facts = {
            "name": f"{config.recipe} {mode} {seed} {kind}", "weights": weights,
        }  # fmt: skip

    def prepare(self, payloads: Sequence[bytes]) -> list[Any]:
        """Rows of each sample; see ``Encoder``."""
        return [self._rows(array) for array in self._decode(payloads)]

    def _rows(self, array: np.ndarray | DecodeError) -> np.ndarray | DecodeError:
        if isinstance(array, DecodeError):
            return array
        length = np.array([array.shape[:2] if self.kind == "images" else array.shape[:1]])
        rows = int(self._writer.rows(length)[0])
        if rows < 1:
            return DecodeError("empty: it has no row")
        out = np.empty((rows, self._writer.row_elems), self._writer.row_dtype)
        try:
            self._writer.write(array, out)
        except DecodeError as e:
            return e
        return out

    def encode(self, prepared: Sequence[Any]) -> Tensor:
        """fp32 (b, D); see ``Encoder``."""
        source = Source.from_samples(self._name, list(prepared))
        return torch.from_numpy(embed(self._model, pack_source(source, self._device)))


def _table(path: Path) -> dict[str, Sentences]:
    """The texts of a table by split, each with its class; "train" where it names none."""
    found = find_texts(path, TextColumns())
    if found.problems:
        p = found.problems[0]
        raise DataError(
            f"{path}: {len(found.problems)} rows cannot be used, such as {p.file}: {p.problem}"
        )
    names = natural_order({i.label for i in found.items if i.label is not None})
    if not names:
        raise DataError(f"{path}: no text has a class; add a column label")
    place = {name: number for number, name in enumerate(names)}
    splits: dict[str, list[Item]] = {}
    for item in found.items:
        name = (item.split or "train").lower()
        splits.setdefault(SPLIT_NAMES.get(name, name), []).append(item)
    return {
        split: Sentences(
            tuple(i.value for i in items),
            np.array([-1 if i.label is None else place[i.label] for i in items], np.int32), names,
        )
        for split, items in splits.items()
    }  # fmt: skip


def _class_names(source: str) -> tuple[str, ...]:
    split = next(iter(splits_of(source)), None)
    names = ShardSet.open(source, split).class_names
    if not names:
        raise DataError(f"{source} names no classes; a template needs them")
    return names


def _from_templates(templates: Sequence[str], names: Sequence[str]) -> Sentences:
    """A sentence of each template for every class; underscores of a name are spaces."""
    for t in templates:
        require("{}" in t, f"template {t!r} has no {{}} for the name of a class")
    texts = [t.replace("{}", n.replace("_", " ")) for n in names for t in templates]
    labels = np.repeat(np.arange(len(names), dtype=np.int32), len(templates))
    return Sentences(tuple(texts), labels, tuple(names))


def extract_all(config: ExtractConfig) -> list[Path]:
    """Write the features of every split; returns the files.

    Raises:
        DataError: source or encoder cannot be used, or too many samples cannot be read.
        ConfigError: the device is not there.
    """
    device = resolve_device(config.device)
    encoder = config.encoder_on(device, resolve_dtype(config.precision, device))
    status, paths = StatusLine(), []
    for split, samples in config.splits():
        path = config.out / f"{config.modality}-{split}.safetensors"
        made = extract(samples, encoder, path, max_errors=config.max_errors, batch=config.batch,
                       status=status)  # fmt: skip
        what = f"{len(samples):,} samples, {encoder.width} features" if made else "there already"
        status.note(f"{path}: {what}")
        paths.append(path)
    if encoder.cut:
        status.note(f"{encoder.cut:,} were longer than the encoder can take, and were cut")
    return paths


def parse(argv: list[str] | None) -> ExtractConfig:
    """The options that the arguments ask for.

    Raises:
        ConfigError: an option has a value that cannot be.
        SystemExit: help was asked for (0), or an option is unknown or cannot be read (2).
    """
    kinds: Any = Image | Text | Audio | Features
    return tyro.cli(
        kinds,
        args=sys.argv[1:] if argv is None else argv,
        prog="python -m uml_fast.extract",
        description=_DESCRIPTION,
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m uml_fast.extract``; returns the exit status."""
    extract_all(parse(argv))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
