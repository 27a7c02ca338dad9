"""What a training takes on this machine, from a few of its own steps in a process that is thrown away.

Imports what `lora train` does before its clock runs, and no more: the time that torch takes is part of the answer.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli import isolation
from lora_cli.disk import write_atomic
from lora_cli.errors import TrainingFailure
from lora_cli.process import hurry
from lora_cli.spec import TrainRun

if TYPE_CHECKING:
    from lora_cli.sampled_steps import Measured

__all__ = ["measure"]


def measure(spec: TrainRun, *, seconds: float) -> Measured:
    """Take some steps of the training `spec`, for about so many seconds.

    Raises:
        TrainingFailure: it fails, out of memory perhaps; the text is what it said.
    """
    with tempfile.TemporaryDirectory(prefix="lora-plan-") as name:
        folder = Path(name)
        output, result = folder / "output.txt", folder / "measured.json"
        # Not forked: what a process that starts by itself holds of its libraries is a large part of the peak.
        code = isolation.spawned(_work, spec, seconds, folder, output, result)
        if not result.exists():
            how = isolation.last_line(output) or f"ended with {code}, out of memory perhaps"
            raise TrainingFailure(f"the measured steps failed: {how}")
        from lora_cli.sampled_steps import Measured

        return Measured(**json.loads(result.read_text(encoding="utf-8")))


def _work(spec: TrainRun, seconds: float, folder: Path, output: Path, result: Path) -> None:
    # As a command that trains starts; else its imports would be foretold to take longer.
    hurry()
    isolation.settle([Path(os.devnull), output, output], Path.cwd(), dict(os.environ))
    # What composed the configuration stays in the memory of a command that trains.
    import_module("hydra.core.plugins").Plugins.instance()
    started = time.perf_counter()
    from lora_cli.sampled_steps import measured

    found = measured(spec, seconds=seconds, folder=folder, started=started)
    write_atomic(result, json.dumps(dataclasses.asdict(found)))
