"""lora_cli.nn in a loop of one's own: adapt two layers of a torch model, train, save, load into a fresh copy, merge."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from lora_cli.nn import fingerprint, inject, load_adapter, merge, parameter_groups, save_adapter
from lora_cli.spec import LoraSpec


class Regressor(nn.Module):
    """A small network that stands for a pretrained one; `head` is what the task adds to it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 8) → (..., 1)."""
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


def main() -> None:
    """Print the loss before and after, and how far the saved and the merged model are from the trained one."""
    model, x = Regressor(), torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    target = x.sum(-1, keepdim=True).sin()
    base = fingerprint(model, fresh=["head"])
    spec = LoraSpec(r=4, alpha=8, targets=["up", "down"])
    injection = inject(model, spec, groups={}, fresh=["head"], seed=0)
    print(f"{injection.num_trainable} of {injection.num_total} parameters train")

    optimizer = torch.optim.AdamW(parameter_groups(model, injection, lr=1e-2, head_lr=None, weight_decay=0.0))
    losses = []
    for _ in range(200):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.1e} → {losses[-1]:.1e}")

    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        save_adapter(
            model, injection, adapter, base_name=None, revision=None, task_type=None, fingerprint=base, extra={}
        )
        loaded = Regressor()
        load_adapter(loaded, adapter, fresh=["head"], fingerprint=base)
    print(f"saved and loaded: outputs differ by {(loaded(x) - model(x)).abs().max():.1g}")
    merge(loaded)
    print(f"merged: outputs differ by {(loaded(x) - model(x)).abs().max():.1g}")


if __name__ == "__main__":
    main()
