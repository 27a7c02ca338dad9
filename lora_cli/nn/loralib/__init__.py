"""loralib's classes and functions (microsoft/LoRA; PyPI loralib 0.1), its defects mended. Knows no other part of `nn`.

`import lora_cli.nn.loralib as lora` in place of `import loralib as lora` keeps a script as it is: the same names,
arguments, parameters, shapes and initial values from a seed, and the same files. docs/loralib.md has them side by side.

What differs: `weight` always holds the frozen weight. loralib writes the update into it in `eval()` and takes it out in
`train()`, which rounds twice, and adds it twice when a model is saved in between. Here both compute W x + s B A x, and
`merged_state_dict` gives the weights of a plain model.
"""

from lora_cli.nn.loralib.layers import Conv1d, Conv2d, Conv3d, ConvLoRA, Embedding, Linear, LoRALayer, MergedLinear
from lora_cli.nn.loralib.utils import lora_state_dict, mark_only_lora_as_trainable, merged_state_dict

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merged_state_dict",
]
