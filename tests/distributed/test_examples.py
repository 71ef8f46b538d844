"""The launch files under examples/ are what their launchers take, and a dry run trains nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
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
    line = re.search(r"^exec (?:srun )?torchrun (.*)$", text, re.MULTILINE)
    assert line is not None
    words = [re.sub(r"^\$.*$", "2", w.strip('"')) for w in line[1].replace('"$@"', "").split()]
    args = get_args_parser().parse_args([*words, "gaussian"])
    assert args.training_script == "uml_fast.train" and args.module and args.max_restarts == 3
    assert args.training_script_args == ["gaussian"]


def test_sbatch_options_are_slurms() -> None:
    options = re.findall(r"^#SBATCH --([a-z-]+)", (EXAMPLES / "train.sbatch").read_text(), re.M)
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "signal", "requeue"} <= set(options)


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
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"3 ranks cannot be divided into groups of .* 2"):
        train.main(["gaussian", *out, *options])
