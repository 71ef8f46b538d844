"""The samples of a run that cannot be read: counted, named, and too many of them stop it."""

from __future__ import annotations

import fcntl
import json
import threading
from collections import Counter
from pathlib import Path

from uml_fast.data.source import DataError
from uml_fast.runtime.files import advice

DATA_ERRORS = "data_errors.jsonl"
"""Name of the file in a run's folder."""


class DataErrors:
    """Counts and names the samples that cannot be read; each once, however often it is tried.

    The file outlives the process: a resumed run goes on counting where it stopped, and all ranks of
    a run share one file, so that the limit holds for all of them together.

    Args:
        most: samples that may fail before the run stops.
        path: JSON lines file that names them; None: nowhere.

    Raises:
        DataError: the file cannot be read.
    """

    def __init__(self, most: int, path: Path | None = None) -> None:
        self.most, self.path = most, path
        self._lock = threading.Lock()
        self._seen: set[tuple[str, str]] = set()
        self._read_bytes = 0
        if path is not None and path.exists():
            try:
                with path.open("rb") as file:
                    self._take_in(file.read())
            except OSError as e:
                raise DataError(f"{path} cannot be read: {e.strerror}; make it readable") from e

    def __len__(self) -> int:
        return len(self._seen)

    def by_modality(self) -> Counter[str]:
        """Samples of each modality."""
        return Counter(source for source, _ in self._seen)

    def add(self, source: str, key: str, problem: str) -> None:
        """Note a sample.

        Raises:
            DataError: there are more than ``most``, or the file cannot be written.
        """
        with self._lock:
            if (source, key) not in self._seen:
                if self.path is not None:
                    self._append(self.path, source, key, problem)
                self._seen.add((source, key))
            if len(self._seen) > self.most:
                where = f"; all are named in {self.path}" if self.path else ""
                raise DataError(
                    f"{source}, sample {key}: {problem}. {len(self._seen)} samples cannot be read, "
                    f"data.max_errors is {self.most}{where}. Mend them, or allow more"
                )

    def _append(self, path: Path, source: str, key: str, problem: str) -> None:
        """Take in what other ranks wrote, and write the sample if none of them did."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(self._read_bytes)
                tail = self._take_in(file.read())
                if (source, key) in self._seen:
                    return
                line = json.dumps({"modality": source, "sample": key, "problem": problem}) + "\n"
                # a killed process may have left the beginning of a line
                content = (b"\n" if tail else b"") + line.encode()
                file.write(content)
                self._read_bytes += len(tail) + len(content)
        except OSError as e:
            raise DataError(
                f"{source}, sample {key}: {problem}; and {path} cannot be written: "
                f"{e.strerror or e}; {advice(e)}"
            ) from e

    def _take_in(self, content: bytes) -> bytes:
        """Count the samples of whole lines; returns what is behind the last one."""
        whole, end, tail = content.rpartition(b"\n")
        self._read_bytes += len(whole) + len(end)
        for text in whole.splitlines():
            try:
                line = json.loads(text)
                self._seen.add((str(line["modality"]), str(line["sample"])))
            except (ValueError, KeyError, TypeError):
                continue  # the beginning of a line, closed by a later process
        return tail
