"""What nearly every command needs, imported once by the process that jobs are forked from."""

from importlib import import_module

from lora_cli.lean_imports import lean
from lora_cli.process import hurry, settle_down

_MODULES = ("lora_cli.cli", "lora_cli.experiment", "hydra.main", "transformers.models.auto.tokenization_auto")
_FAMILIES = ("bert", "gpt2", "llama", "t5")
"""Whose code has all that the others import of torch and transformers."""

hurry()
for _name in _MODULES:
    import_module(_name)
lean(lambda: [import_module(f"transformers.models.{family}.modeling_{family}") for family in _FAMILIES])
settle_down()
