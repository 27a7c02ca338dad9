"""How it is learnt: the loop, scoring, optimisation, checkpoints. Knows torch; not Hydra, not file names of a run."""
