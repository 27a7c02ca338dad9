"""lora: fine-tuning of transformers with low-rank adapters."""

__version__ = "0.1.0"

__all__ = ["__version__", "load", "load_many"]


def __getattr__(name: str) -> object:
    # torch is imported when a model is wanted, and not before.
    if name not in ("load", "load_many"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("lora_cli.serving.models"), name)
