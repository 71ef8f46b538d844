"""MultiBench's data sets as they are in its files, or generated ones of the same layout."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from uml_fast.config import DataConfig, ModalityConfig, RunConfig, require
from uml_fast.data.multibench_files import BENCHMARKS, Dataset, read_benchmark
from uml_fast.data.multibench_made import write_benchmark
from uml_fast.data.source import DataError, Source, Task, say_once
from uml_fast.modalities.features import FeaturesConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class MultibenchConfig(DataConfig):
    """One data set of MultiBench: its file, and which of its modalities are used."""

    dataset: Dataset
    """Which data set; it fixes keys, splits and classes."""
    modalities: tuple[str, ...] = ("vision", "text")
    """Modalities of the run; audio is there too, but not in the paper's runs."""
    folder: Path = Path("data/multibench")
    """Where the benchmark's files are."""
    file: Path | None = None
    """The file, where it has another name or place."""
    generate: bool = False
    """Use generated data of the same layout instead, kept in FOLDER/generated: to try the recipe.
    Its numbers say nothing about the real data set."""

    def __post_init__(self) -> None:
        known = BENCHMARKS[self.dataset].sizes
        unknown = [m for m in self.modalities if m not in known]
        require(
            not unknown and len(self.modalities) >= 1,
            f"data.modalities is {list(self.modalities)}; {self.dataset} has {', '.join(known)}",
        )
        require(
            self.file is None or not self.generate,
            "data.file and data.generate exclude each other; take one",
        )

    def present(self, given: tuple[ModalityConfig, ...]) -> tuple[ModalityConfig, ...]:
        """What ``modalities`` names: as the run has it, else with the paper's features."""
        known = {m.name: m for m in given}
        return tuple(known.get(name) or features(self.dataset, name) for name in self.modalities)

    def only(self, names: tuple[str, ...]) -> MultibenchConfig:
        """The same data set with these modalities alone."""
        return dataclasses.replace(self, modalities=names)

    def path(self) -> Path:
        """The file that is read; generated data are written where they are not there yet.

        Raises:
            DataError: there is no such file, or a generated one cannot be written.
        """
        benchmark = BENCHMARKS[self.dataset]
        if self.generate:
            made = Path(self.folder) / "generated" / benchmark.files[0]
            if not made.exists():
                write_benchmark(made, self.dataset)
            say_once(f"{made} is generated: its numbers say nothing about {benchmark.title}")
            return made
        if self.file is not None:
            candidates, place = [Path(self.file)], str(self.file)
        else:
            candidates = [Path(self.folder) / name for name in benchmark.files]
            place = f"{' or '.join(benchmark.files)} in {self.folder}"
        found = next((p for p in candidates if p.is_file()), None)
        if found is None:
            source = (
                "it is made from MIMIC-III (physionet.org, access on request) as MultiBench says"
                if self.dataset == "mimic"
                else "MultiBench (github.com/pliang279/MultiBench) names its download"
            )
            raise DataError(
                f"{benchmark.title}: there is no {place}; {source}. "
                "Give it with --data.file FILE, or try the recipe on generated data of the same "
                "layout: --data.generate"
            )
        return found

    def load(self, seed: int, mode: str, run: RunConfig | None = None) -> Task:
        """The samples of the run's modalities, the same for every seed.

        Raises:
            DataError: as ``path`` and ``read_benchmark``, or rows of another size than the run's.
        """
        require(run is not None, "MultiBench is read for the modalities of a run; none is given")
        assert run is not None
        path = self.path()
        splits = read_benchmark(path, self.dataset)
        for i, modality in enumerate(run.modalities):
            there, taken = splits["train"][modality.name], getattr(modality, "size", None)
            if taken != there.row_elems:
                raise DataError(
                    f"{path}: {modality.name} has {there.row_elems} features, the run takes "
                    f"{taken}; is it another version of the file? Its size is an option: "
                    f"modalities.{i}.size"
                )

        def sources(split: str) -> tuple[Source, ...]:
            return tuple(splits[split][m.name] for m in run.modalities)  # type: ignore[index]

        return Task(
            train=sources("train"),
            validation=splits["validation"][run.target],
            test=splits["test"][run.target],
            class_names=BENCHMARKS[self.dataset].classes,
            aligned=tuple(zip(sources("validation"), sources("test"), strict=True)),
        )


def features(dataset: Dataset, name: str) -> FeaturesConfig:
    """A modality with the features of paper 1.2; MIMIC's vectors are autoencoded.

    Shares are such that a pack holds about as many samples of each modality.
    """
    benchmark = BENCHMARKS[dataset]
    return FeaturesConfig(
        name=name, size=benchmark.sizes[name], vector=name == "static",
        standardise=name in benchmark.normalised, share=24.0 if name == "series" else 1.0,
    )  # fmt: skip
