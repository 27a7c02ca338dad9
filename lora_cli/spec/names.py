"""Values that keys take, and the bounds of numbers."""

from __future__ import annotations

SPLITS = ("train", "validation", "test")
VARIANTS = ("lora", "dora", "lora_fa", "vera", "dylora", "adalora", "full")
SCALINGS = ("alpha/r", "alpha/sqrt(r)")
INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "loftq")
BIASES = ("none", "all", "lora_only")
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
QUANTIZATIONS = ("none", "nf4", "int8")
OPTIMIZERS = ("adamw", "paged_adamw")
CACHES = ("off", "memory", "disk")
SCHEDULES = ("linear", "cosine", "constant")
TRACKERS = ("none", "tensorboard", "wandb", "mlflow")
METRICS = ("accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman")
TEXT_METRICS = (
    "bleu",
    "e2e_bleu",
    "nist",
    "meteor_exact_stem",
    "rouge1",
    "rouge2",
    "rougeL",
    "rougeLsum",
    "e2e_rougeL",
    "cider",
    "chrf",
    "ter",
    "exact_match",
)
FORMATS = ("columns", "e2e", "webnlg", "dart")
EXPORT_TARGETS = ("peft", "vllm", "sglang", "tgi", "lorax", "llamacpp", "loralib", "onnx")
BASE_KEYS = {"onnx": ("task", "model", "force_base"), "llamacpp": ("model",)}
"""Target of lora export → what it takes of the base model; no other target takes any of it."""
IMPORT_FORMATS = ("auto", "peft", "loralib", "torchtune")
COMBINE_METHODS = ("concat", "svd", "linear")
CHAT_TEMPLATES = ("tokenizer", "chatml", "plain")
BENCH_LAUNCHERS = ("isolated", "fused")
"""How the trainings of a benchmark run."""
LOSS_DOWNWARDS = ("loss", "perplexity", "ter")
"""Figures of which less is better."""
STATUSES = ("running", "finished", "failed", "interrupted")
RUN_ORDERS = ("started", "metric", "parameters", "time")
MAX_RANK = 4096
MAX_SCALING = 1e4
MAX_SEED = 2**63 - 1
