"""lora: fine-tuning of transformers with low-rank adapters."""

__version__ = "0.1.0"
