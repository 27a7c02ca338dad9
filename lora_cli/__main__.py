"""python -m lora_cli: the same as `lora`."""

__all__ = ["start"]


def start() -> None:
    """The command `lora`: main() in a process of its own."""
    # Imported in here, since Ctrl-C may come before main() is there to answer it.
    try:
        from lora_cli.process import hurry, leave

        hurry()
        from lora_cli.cli import main

        leave(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    start()
