"""What inference engines make of an adapter: loads, loads wrongly, refused. Knows settings and names, runs no engine.

Read from the documentation and the sources of the engines, which stand with each rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_cli.errors import listed
from lora_cli.nn.peft_tensors import PREFIX
from lora_cli.nn.stored import StoredAdapter

__all__ = ["ENGINES", "LOADS", "NOTE", "REFUSED", "WRONG", "Rule", "Verdict", "passport", "traits"]

LOADS, WRONG, REFUSED = "loads", "loads wrongly", "refused"
NOTE = "from the engines' documentation and sources, read in November 2026; no engine was run"


@dataclass(frozen=True)
class Rule:
    """What one engine does with one trait of an adapter."""

    verdict: str
    """`LOADS` where it is a condition only."""
    why: str
    """What happens, and where that was read."""


@dataclass(frozen=True)
class Verdict:
    """What one engine does with an adapter."""

    verdict: str
    """The worst of what its rules say."""
    why: tuple[str, ...]
    """A reason for each rule that applies."""


_VLLM = "vllm/lora/peft_helper.py"
_TGI = "server/text_generation_server/adapters/lora.py"
_LLAMA = "llama.cpp's convert_lora_to_gguf.py"


def _only_linear(source: str) -> dict[str, Rule]:
    unused = f"only A and B of linear layers are used, the rest is left out without a word ({source})"
    rules = {trait: Rule(WRONG, unused) for trait in ("dora", "whole", "biases", "embeddings", "convolutions", "rows")}
    uneven = Rule(WRONG, f"one rank and one alpha for all layers ({source})")
    return rules | {"ranks": uneven, "alphas": uneven}


ENGINES: Mapping[str, Mapping[str, Rule]] = {
    "peft": {"geometry": Rule(WRONG, "its A has neither dilation nor a mode of padding (tuners/lora/layer.py, 0.21)")},
    "vllm": {
        "whole": Rule(REFUSED, f"modules_to_save must be null ({_VLLM})"),
        "dora": Rule(REFUSED, f"no DoRA ({_VLLM})"),
        "biases": Rule(REFUSED, "no trained bias of the base is known (vllm/lora/utils.py)"),
        "rows": Rule(REFUSED, "the tensor's name is not known (vllm/lora/utils.py)"),
        "convolutions": Rule(REFUSED, "no convolution can be adapted (vllm/lora/utils.py)"),
        "ranks": Rule(WRONG, f"rank_pattern is not read, the scale uses the one r ({_VLLM})"),
        "alphas": Rule(WRONG, f"alpha_pattern is not read ({_VLLM})"),
        "rslora": Rule(LOADS, "right for dense models, wrong for experts (vllm-project/vllm#55545)"),
        "high": Rule(LOADS, "start it with --max-lora-rank of at least r; its default is 16"),
    },
    "sglang": {
        "rslora": Rule(WRONG, "use_rslora is ignored: too weak by a factor of √r (sgl-project/sglang#40835)"),
        **{
            trait: Rule(REFUSED, "read for admission only (srt/lora/lora_config.py)")
            for trait in ("dora", "ranks", "alphas")
        },
        **{
            trait: Rule(REFUSED, "not known to be taken: target_modules, r and lora_alpha are what is read")
            for trait in ("whole", "biases", "rows", "convolutions", "embeddings")
        },
    },
    "tgi": _only_linear(_TGI),
    "lorax": _only_linear(_TGI),
    "llamacpp": {
        **{
            trait: Rule(REFUSED, f"{_LLAMA} stops at a tensor that is not A or B")
            for trait in ("dora", "whole", "biases", "rows", "convolutions")
        },
        "rslora": Rule(WRONG, f"{_LLAMA} takes lora_alpha only, the scale is alpha/r (src/llama-adapter.h)"),
        "alphas": Rule(WRONG, f"{_LLAMA} takes lora_alpha only (src/llama-adapter.h)"),
        "always": Rule(LOADS, f"after {_LLAMA}, which needs the base model's config"),
    },
    "loralib": {"always": Rule(REFUSED, "other names and no config; lora export target=loralib writes its own file")},
}
"""Engine → trait → what it does with it. A trait without a rule is taken as it is."""

_ORDER = (LOADS, WRONG, REFUSED)


def traits(stored: StoredAdapter) -> dict[str, str]:
    """What an adapter has beside plain factors of one rank and scaling: trait → in words, with names."""
    config, layers = stored.config, stored.layers
    others: dict[str, list[str]] = {"rows": [], "biases": [], "whole": []}
    for key in stored.others:
        others[_kind_of(key, stored)].append(key)
    unlike = stored.facts.get("unlike_peft", {})
    found = {
        "dora": ("DoRA's magnitudes", bool(stored.magnitudes)),
        "whole": (f"modules trained whole ({_names(others['whole'])})", bool(others["whole"])),
        "biases": (f"trained biases ({_names(others['biases'])})", bool(others["biases"])),
        "rows": (f"rows of new tokens ({_names(others['rows'])})", bool(others["rows"])),
        "embeddings": (_of_kind(stored, "embeddings"), any(layer.is_embedding for layer in layers.values())),
        "convolutions": (_of_kind(stored, "convolutions"), any(layer.is_convolution for layer in layers.values())),
        "geometry": (f"dilated or padded convolutions ({listed([*unlike], 60)})", bool(unlike)),
        "ranks": ("ranks that differ", len({layer.r for layer in layers.values()}) > 1),
        "alphas": ("an alpha_pattern", bool(config.get("alpha_pattern"))),
        "rslora": ("scaling alpha/√r", bool(config.get("use_rslora"))),
        "high": ("a rank above 16", any(layer.r > 16 for layer in layers.values())),
    }
    return {trait: text for trait, (text, is_there) in found.items() if is_there}


def passport(stored: StoredAdapter) -> dict[str, Verdict]:
    """Engine → what it does with the folder of this adapter in PEFT's format."""
    found = [*traits(stored), "always"]
    verdicts = {}
    for engine, rules in ENGINES.items():
        apply = [rules[trait] for trait in found if trait in rules]
        worst = max((rule.verdict for rule in apply), key=_ORDER.index, default=LOADS)
        why = dict.fromkeys(rule.why for rule in apply if rule.verdict == worst)
        verdicts[engine] = Verdict(worst, tuple(why))
    return verdicts


def _kind_of(key: str, stored: StoredAdapter) -> str:
    """What a tensor beside the factors is: a trait."""
    if key.endswith(".trainable_tokens_delta"):
        return "rows"
    module, _, parameter = key.removeprefix(PREFIX).rpartition(".")
    saved = stored.config.get("modules_to_save") or ()
    is_saved = any(f".{name}." in f".{module}." for name in saved) or f"{PREFIX}{module}.weight" in stored.others
    return "biases" if parameter == "bias" and not is_saved else "whole"


def _names(keys: list[str]) -> str:
    modules = dict.fromkeys(key.removeprefix(PREFIX).rpartition(".")[0] for key in keys)
    return listed(list(modules), 60)


def _of_kind(stored: StoredAdapter, kind: str) -> str:
    test = "is_embedding" if kind == "embeddings" else "is_convolution"
    return f"{kind} ({listed([name for name, layer in stored.layers.items() if getattr(layer, test)], 60)})"
