"""UML against the unimodal run over paired seeds: trains a recipe and keeps its summary as rows.

python -m bench.accuracy numbers --seeds 10      writes bench/results/accuracy_numbers.json
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from bench.harness import RESULTS
from uml_fast.cli import parse, run_main
from uml_fast.train import train


def main(argv: list[str] | None = None) -> int:
    """Train the recipe in a temporary folder and write its summary; returns the exit status."""
    config = parse(argv, "python -m bench.accuracy")
    with tempfile.TemporaryDirectory() as folder:
        run = train(dataclasses.replace(config, out=Path(folder) / "run", resume="never"))
        if run is None:
            return 1
        summary = json.loads((run / "summary.json").read_text())
        config_json = json.loads((run / "run.json").read_text())["config"]
    path = RESULTS / f"accuracy_{config.recipe}.json"
    path.write_text(json.dumps(summary | {"config": config_json}, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
