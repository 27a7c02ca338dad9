"""lora serve: many adapters on one base, over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lora_cli.errors import LoraError, UserError
from lora_cli.screen import Screen, count, duration
from lora_cli.spec import ServeRun

__all__ = ["run"]

_PACKAGES = ("fastapi", "uvicorn", "httptools", "prometheus_client")


def run(spec: ServeRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> None:
    """Answer requests until a signal ends it.

    Raises:
        UserError: a run cannot be used, the address cannot be listened on, or packages are missing.
        KeyboardInterrupt: by the signal, after running requests have ended.
        LoraError: nothing can be computed any more.
    """
    if any(find_spec(name) is None for name in _PACKAGES):
        raise UserError("needs packages: pip install 'lora-cli[serve]'")
    from lora_cli.serving.adapters import Shelf
    from lora_cli.serving.server import Ending, address_of, allowed_hosts, listen, open_socket, read_token

    token, screen = read_token(spec.serve), Screen()
    with open_socket(spec.serve, token) as listener:
        shelf = Shelf(spec.runs, task=spec.task, model=spec.model)
        from lora_cli.engine.device import open_device
        from lora_cli.process import settle_down
        from lora_cli.serving.api import build_app
        from lora_cli.serving.pool import Pool
        from lora_cli.serving.scheduler import Scheduler

        device = open_device(spec.device)
        pool = Pool(
            shelf,
            device,
            max_adapters=spec.serve.max_adapters,
            max_bytes=spec.serve.max_bytes,
            watch=spec.serve.watch,
            force_base=spec.force_base,
            warn=screen.warning,
        )

        def started() -> None:
            print(address_of(listener), flush=True)
            names = ", ".join(list(pool.entries)[:6]) + (", …" if len(pool.entries) > 6 else "")
            screen.fact("adapters", f"{count(len(pool.entries))}: {names}")
            screen.fact("base", f"{pool.base.source} ({device})")

        scheduler = Scheduler(pool, batch_tokens=spec.serve.batch_tokens, max_queue=spec.serve.max_queue)
        hosts = allowed_hosts(spec.serve, token)
        app = build_app(scheduler, spec.serve, token=token, hosts=hosts, warn=screen.warning, started=started)
        settle_down()

        def waits(number: int) -> None:
            screen.fact("stopping", f"requests that still run: {number}; they get {duration(spec.serve.grace_s)}")

        ending = Ending(lambda: scheduler.stop(0.0), lambda: scheduler.failure is not None, waits)
        listen(app, listener, spec.serve, ending)
        if scheduler.failure is not None:
            raise LoraError(f"internal error, nothing can be computed any more: {scheduler.failure}")
