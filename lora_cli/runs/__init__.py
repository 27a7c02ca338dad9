"""What stays on disk. Knows nothing of tensors or of Hydra."""
