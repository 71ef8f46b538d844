"""timm and transformers import beside any build of torchvision."""

import importlib.util
import subprocess
import sys

import pytest


def test_timm_builds_a_model_in_a_fresh_process() -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    code = (
        "from uml_fast.runtime.foreign import import_timm\n"
        "import torch\n"
        "timm = import_timm()\n"
        "model = timm.create_model('vit_tiny_patch16_224', depth=1, num_classes=3)\n"
        "print(tuple(model(torch.zeros(1, 3, 224, 224)).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "(1, 3)", done.stderr


def test_transformers_builds_a_model_in_a_fresh_process() -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    code = (
        "from uml_fast.runtime.foreign import import_transformers\n"
        "transformers = import_transformers()\n"
        "config = transformers.Dinov2Config(hidden_size=8, num_hidden_layers=1,"
        " num_attention_heads=1)\n"
        "print(transformers.Dinov2Model(config).config.hidden_size)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "8", done.stderr
