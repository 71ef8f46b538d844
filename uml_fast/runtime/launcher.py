"""What a process tells torchrun of its end, so that the launcher shows it as the root cause."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path


def tell_launcher(message: str) -> None:
    """Leave ``message`` where torchrun looks for why a process failed; nothing without torchrun.

    torchrun prints it last, under "Root Cause"; without it there is only an exit code. The file is
    that of ``torch.distributed.elastic``'s ``record``, which would put a traceback there.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    said = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": said}))
