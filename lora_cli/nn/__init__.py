"""Low-rank adapters as an exact PyTorch library. Knows torch and LoraSpec; not transformers, tasks or run folders."""
