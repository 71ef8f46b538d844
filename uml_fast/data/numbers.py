"""Handwritten numbers 00..99 as the target, with their spoken and written names, never paired.

An image shows two digits, and its class is the number: 100 classes with a few images each. To a
learner the classes are 100 symbols; it is not told that they are made of tens and units. Their
names say so: "thirty four" and "thirty five" share a word, which is what text and speech can teach.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import numpy as np

from uml_fast.config import DataConfig, RunConfig, require
from uml_fast.data.digits import SIDE, handwriting
from uml_fast.data.source import Source, Task
from uml_fast.data.speech import Voice, spoken

CLASSES = 100
_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEENS = (
    "ten", "eleven", "twelve", "thirteen", "fourteen",
    "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORDS = (*_ONES, *_TEENS, *_TENS, *"0123456789", "number", "the")
_TRAIN, _VALIDATION, _TEST = 11, 12, 13
_VOICES = (
    "en-us", "en-us+f1", "en-us+f2", "en-us+f3", "en-us+m1", "en-us+m3", "en-us+m4", "en-us+m7",
    "en-gb-scotland", "en-gb-scotland+f4", "en-gb-x-rp", "en-gb-x-rp+m2",
)  # fmt: skip


def name(number: int) -> str:
    """The English name of 0..99."""
    tens, ones = divmod(number, 10)
    if tens == 0:
        return _ONES[ones]
    if tens == 1:
        return _TEENS[ones]
    return _TENS[tens - 2] + (f" {_ONES[ones]}" if ones else "")


def phrasings(number: int) -> tuple[str, ...]:
    """The ways the text writes a number, words separated by spaces."""
    tens, ones = divmod(number, 10)
    full, figures = name(number), f"{tens} {ones}"
    return (
        full, f"{_ONES[tens]} {_ONES[ones]}", f"number {full}", f"the number {full}",
        figures, f"number {figures}",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class NumbersConfig(DataConfig):
    """Sources ``image``, ``text`` and ``audio`` of the numbers 00..99."""

    images_per_class: int = 2
    """Training images of each number."""
    validation_per_class: int = 5
    """Validation images of each number."""
    test_per_class: int = 15
    """Test images of each number."""
    utterances_per_class: int = 12
    """Times each number is spoken, every time with another voice, speed and pitch; at most 12."""
    sample_rate: int = 16000
    """Samples of speech per second."""
    row_samples: int = 640
    """Samples per audio row (token)."""

    def __post_init__(self) -> None:
        for field, value in (
            ("images_per_class", self.images_per_class),
            ("validation_per_class", self.validation_per_class),
            ("test_per_class", self.test_per_class),
        ):
            require(value >= 1, f"data.{field} is {value}; it must be >= 1")
        n = self.utterances_per_class
        require(
            1 <= n <= len(_VOICES),
            f"data.utterances_per_class is {n}; it must be in 1..{len(_VOICES)}",
        )

    @property
    def vocabulary(self) -> int:
        """Number of text ids."""
        return len(_WORDS)

    def load(self, seed: int, mode: str, run: RunConfig | None = None) -> Task:
        """The samples of one trial.

        ``seed`` splits the handwriting and draws the images; text and speech are the same for every
        seed, and both modes have the same images.

        Raises:
            ConfigError: a mode other than unimodal and uml.
            ModuleNotFoundError: scikit-learn, or for uml the speech library, is missing.
        """
        require(mode in ("unimodal", "uml"), f"mode {mode!r} is unknown; use unimodal or uml")
        image, validation, test = _images(self, seed)
        train = (image,) if mode == "unimodal" else (image, text(), speech(self))
        return Task(
            train=train,
            validation=validation,
            test=test,
            class_names=tuple(f"{n:02d}" for n in range(CLASSES)),
            baselines=_baselines(self, seed),
        )


def text() -> Source:
    """Every phrasing of every number: one int32 id per word; the keys are the texts."""
    said = [(n, phrase) for n in range(CLASSES) for phrase in phrasings(n)]
    ids = {word: i for i, word in enumerate(_WORDS)}
    samples = [np.array([[ids[w]] for w in phrase.split()], np.int32) for _, phrase in said]
    return Source.from_samples("text", samples, [n for n, _ in said], [p for _, p in said])


@functools.lru_cache(maxsize=2)
def speech(config: NumbersConfig) -> Source:
    """Every number spoken in several voices: int16 rows, the last one filled up with silence."""
    rng = np.random.default_rng(0)
    numbers, voices = [], []
    for number in range(CLASSES):
        for voice in _VOICES[: config.utterances_per_class]:
            numbers.append(number)
            speed, pitch = int(rng.integers(170, 280)), int(rng.integers(30, 70))
            voices.append(Voice(name=voice, words_per_minute=speed, pitch=pitch))
    waves = spoken([name(n) for n in numbers], voices, config.sample_rate)
    samples = [
        np.pad(w, (0, -len(w) % config.row_samples)).reshape(-1, config.row_samples) for w in waves
    ]
    keys = [f"{name(n)} ({v.name})" for n, v in zip(numbers, voices, strict=True)]
    return Source.from_samples("audio", samples, numbers, keys)


def describe(source: Source, i: int) -> str:
    """Sample ``i`` in words: the digits of an image, a text, or a sound's name and voice."""
    return source.key(i)


@functools.lru_cache(maxsize=32)
def _images(config: NumbersConfig, seed: int) -> tuple[Source, Source, Source]:
    def part(part: str, stream: int, per_class: int) -> Source:
        rng = np.random.default_rng([seed, stream])
        return handwriting(part, seed).write(np.repeat(np.arange(CLASSES), per_class), 2, rng)

    return (
        part("train", _TRAIN, config.images_per_class),
        part("validation", _VALIDATION, config.validation_per_class),
        part("test", _TEST, config.test_per_class),
    )


@functools.lru_cache(maxsize=32)
def _baselines(config: NumbersConfig, seed: int) -> tuple[tuple[str, float], ...]:
    """Test accuracy of simple methods on the same images, each tuned on the validation part.

    The last one is told what no other learner here is: that a class is made of tens and units.
    """
    from sklearn.linear_model import LogisticRegression, RidgeClassifier
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    def flat(source: Source) -> np.ndarray:
        return source.rows.reshape(len(source), -1) / 127.5 - 1

    image, validation, test = _images(config, seed)
    x, y = flat(image), image.labels
    x_val, x_test = flat(validation), flat(test)
    families = {
        "nearest neighbour": [KNeighborsClassifier(1)],
        "ridge": [RidgeClassifier(alpha=a) for a in (1.0, 10.0, 100.0)],
        "logistic regression": [LogisticRegression(C=c, max_iter=300) for c in (0.01, 0.1, 1.0)],
        "kernel machine (RBF)": [SVC(C=10, gamma=g) for g in (0.003, 0.01, 0.03)],
    }
    found = []
    for family, models in families.items():
        with warnings.catch_warnings():
            # at one image per class scikit-learn wonders whether the labels are a measurement
            warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
            fitted = [m.fit(x, y) for m in models]
        best = max(fitted, key=lambda m: m.score(x_val, validation.labels))
        found.append((family, float(best.score(x_test, test.labels))))

    def reader(place: int, divisor: int) -> np.ndarray:
        def digit(images: np.ndarray) -> np.ndarray:
            return images.reshape(-1, SIDE, 2, SIDE)[:, :, place].reshape(-1, SIDE * SIDE)

        model = LogisticRegression(C=0.1, max_iter=300).fit(digit(x), y // divisor % 10)
        return np.asarray(model.predict(digit(x_test)))

    read = 10 * reader(0, 10) + reader(1, 1)
    found.append(("two digit readers, told the code", float((read == test.labels).mean())))
    return tuple(found)
