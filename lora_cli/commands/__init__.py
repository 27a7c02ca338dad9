"""One file per verb; each `run(spec)` is the story of what the verb does."""
