"""python -m lora_cli: the same as `lora`."""

from lora_cli.process import hurry, leave

__all__ = ["start"]


def start() -> None:
    """The command `lora`: main() in a process of its own."""
    hurry()
    from lora_cli.cli import main

    leave(main())


if __name__ == "__main__":
    start()
