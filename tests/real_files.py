"""Real JPEG, Ogg and text files: in a folder ``shared/data`` of the checkout or around it."""

from pathlib import Path

import pytest

DATA = next((d for p in Path(__file__).parents if (d := p / "shared" / "data").is_dir()), None)
needs_real_files = pytest.mark.skipif(DATA is None, reason="the real files are not here")
