"""Where Hydra looks for plug-ins, and finds those of lora: the launchers isolated and fused, the sweeper optuna."""

from hydra.core.config_store import ConfigStore

from lora_cli.launchers import Fused, Isolated
from lora_cli.sweepers import Search

__all__ = ["Fused", "Isolated", "Search"]

ConfigStore.instance().store(
    group="hydra/launcher",
    name="isolated",
    node={"_target_": "hydra_plugins.lora.Isolated", "n_jobs": 1},
    provider="lora",
)
ConfigStore.instance().store(
    group="hydra/launcher",
    name="fused",
    node={"_target_": "hydra_plugins.lora.Fused", "n_jobs": 1, "adapters": 16, "mixed": None},
    provider="lora",
)
ConfigStore.instance().store(
    group="hydra/sweeper",
    name="optuna",
    node={"_target_": "hydra_plugins.lora.Search", "trials": 20, "seed": 0, "prune": True},
    provider="lora",
)
