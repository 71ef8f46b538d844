"""The launch files under examples/ are what their launchers take, and a dry run trains nothing."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from uml_fast import train

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["train_node.sh", "train.sbatch"])
def test_scripts_are_shell_and_their_torchrun_lines_parse(name: str) -> None:
    path = EXAMPLES / name
    bash = shutil.which("bash")
    assert bash is not None
    subprocess.run([bash, "-n", str(path)], check=True)
    text = re.sub(r"\\\n", " ", path.read_text())
    line = re.search(r"^exec (?:srun \S+ )?torchrun (.*)$", text, re.MULTILINE)
    assert line is not None
    words = [re.sub(r"^\$.*$", "2", w.strip('"')) for w in line[1].replace('"$@"', "").split()]
    args = get_args_parser().parse_args([*words, "gaussian"])
    assert args.training_script == "uml_fast.train" and args.module and args.max_restarts == 3
    assert args.training_script_args == ["gaussian"]


def test_sbatch_options_are_slurms() -> None:
    options = re.findall(r"^#SBATCH --([a-z-]+)", (EXAMPLES / "train.sbatch").read_text(), re.M)
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "signal", "requeue"} <= set(options)


FAKES = {
    "sbatch": 'PLAYED_GPUS=1 SLURM_JOB_NODELIST=one,two SLURM_JOB_NUM_NODES=2 exec bash "$@"',
    "scontrol": "echo localhost; echo localhost",
    "srun": 'shift; for node in 0 1; do "$@" & done; wait -n && wait -n',
    "torchrun": 'exec PYTHON -m torch.distributed.run "${@/#gpu/${PLAYED_GPUS:-2}}"',
}
"""Commands of a cluster of two nodes: this machine twice, with one rank each."""


def commands(page: str, section: str) -> list[str]:
    """The lines of the code block under a heading, without their comments."""
    text = (EXAMPLES.parent / page).read_text()
    block = re.search(rf"^#+ {section}\n+```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    return [line.partition("#")[0].strip() for line in block[1].splitlines()]


PAGES = (("README.md", "On a cluster"), ("docs/distributed.md", "Several processes, one model"))
WRITTEN = [line for page, section in PAGES for line in commands(page, section)]
SHORT = "--steps 20 --seeds 1 --eval.every 0"


@pytest.mark.slow
@pytest.mark.parametrize("line", sorted({w for w in WRITTEN if not w.startswith("kubectl")}))
def test_the_written_commands_do_what_they_say(line: str, tmp_path: Path) -> None:
    """Every line of the clusters' pages, as it stands, on a cluster that is played."""
    tools = tmp_path / "bin"
    tools.mkdir()
    script = "import sys; from uml_fast.cli import main; sys.exit(main())"
    fakes = FAKES | {"uml-fast": f'exec PYTHON -c "{script}" "$@"', "python": 'exec PYTHON "$@"'}
    for name, body in fakes.items():
        tool = tools / name
        tool.write_text(f"#!/bin/bash\n{body.replace('PYTHON', sys.executable)}\n")
        tool.chmod(0o755)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    line = line.replace("RECIPE --options", f"gaussian --out runs/here {SHORT}")
    if "gaussian --out" in line and SHORT not in line:
        line = f"{line} {SHORT}"
    if "--trace" in line:
        line = line.replace("uml_fast.train ", f"uml_fast.train gaussian {SHORT} ")
    environ = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(EXAMPLES.parent),
        "SLURM_JOB_ID": str(random.randrange(10_000)), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "another rank" not in done.stderr
    expected = {"plan": "what binds", "--dry-run": "pack of a rank"}
    said = next((text for word, text in expected.items() if word in line.split()), "report: ")
    assert done.stdout.count(said) == (2 if said == "pack of a rank" else 1), done.stdout
    if "--trace" in line:
        assert (tmp_path / "trace.json").stat().st_size and (
            tmp_path / "profile.json"
        ).stat().st_size
    elif said == "report: ":
        (folder,) = (tmp_path / "runs").iterdir()
        records = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        assert {r["ranks"] for r in records} == {2}


def test_the_kubernetes_job_starts_training_on_every_node() -> None:
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((EXAMPLES / "train_job.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    for kind in ("Master", "Worker"):
        replica = job["spec"]["pytorchReplicaSpecs"][kind]
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"  # the operator looks for this name
        parsed = get_args_parser().parse_args(container["command"][1:] + container["args"])
        assert parsed.training_script == "uml_fast.train" and parsed.module
        volumes = {v["name"] for v in replica["template"]["spec"]["volumes"]}
        assert {m["name"] for m in container["volumeMounts"]} == volumes


def test_a_dry_run_says_what_would_be_trained_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    out = ["--out", str(tmp_path / "run")]
    options = ["--dist.strategy", "fsdp", "--dist.shard-ranks", "2", "--dry-run"]
    assert train.main(["gaussian", *out, *options]) == 0
    text = capsys.readouterr().out
    assert "uml: 500 steps on 4 ranks (fsdp, weights in 2 parts), cpu" in text
    assert "pack of a rank: 1,024 rows (x 512, y 512); 4,096 a step" in text
    assert re.search(r"61,678 parameters.*\n +weights 0.1 MiB", text)
    assert "gathered weights, from forward until backward, 0.2 MiB" in text
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"3 ranks cannot be divided into groups of .* 2"):
        train.main(["gaussian", *out, *options])
