"""Tokenizers on disk, and a tiny one of our own. Knows transformers; nothing of models or tasks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.errors import ConfigError, LoraError, ModelError, printable
from lora_cli.lean_imports import from_transformers, lean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["add_tokens", "build_tiny_tokenizer", "explained", "load_tokenizer", "quiet", "save_tokenizer"]

_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spm.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer whose files lie in `folder`, from these files alone; without a pad token it pads with its end mark.

    Raises:
        ModelError: the files are missing or damaged, or there is no token to pad with.
    """
    # Without this, transformers builds a tokenizer of five special tokens from a config alone.
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ModelError(f"{printable(folder)}: no tokenizer there (tokenizer.json, vocab.txt or a .model file)")
    load = partial(
        from_transformers("AutoTokenizer").from_pretrained, local_files_only=True, trust_remote_code=trust_remote_code
    )
    with quiet(), explained(folder, "tokenizer"):
        tokenizer = lean(lambda: load(str(folder)))
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{printable(folder)}: the tokenizer has neither a pad token nor an end mark to pad with")
        # Decoders are trained without padding; the attention mask hides it, whatever token it is.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer's files, such that `load_tokenizer(folder)` gives the same one."""
    with quiet():
        tokenizer.save_pretrained(str(folder))


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> dict[int, str]:
    """Teach `tokenizer` new tokens, each with one number wherever it stands in a text. Returns number → token.

    They are no special tokens: decoding keeps them.

    Raises:
        ConfigError: it knows one already.
    """
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    for token in tokens:
        if token in known:
            raise ConfigError("model.add_tokens", token, f"the tokenizer knows it already, as number {known[token]}")
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    return {int(tokenizer.convert_tokens_to_ids(token)): token for token in tokens}


def build_tiny_tokenizer(*, token_types: bool) -> PreTrainedTokenizerBase:
    """One token per byte and five special ones: no text is unknown and nothing has to be learnt or fetched.

    `token_types` also marks which text of a pair a token is of. The special tokens come in
    RoBERTa's order, so that the pad token is not number 0 by accident of the family.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"cls_token": "[CLS]", "pad_token": "[PAD]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    special |= {"mask_token": "[MASK]"}
    tokens = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {token: position for position, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if token_types else ["input_ids", "attention_mask"]
    # Of a decoder, the same two marks begin and end a text.
    ends = {"bos_token": special["cls_token"], "eos_token": special["sep_token"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **special, **ends)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from writing on the terminal: progress bars, load reports, warnings."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def explained(where: Path, what: str) -> Iterator[None]:
    """Turn whatever transformers raises over damaged files into one line that names the folder."""
    try:
        yield
    except (LoraError, MemoryError):
        raise
    except Exception as error:
        # Seen: OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError, AssertionError,
        # and a bare Exception from the Rust tokenizers. No narrower class covers them.
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        text = f"its {what} cannot be loaded ({type(error).__name__}: {printable(reason, 100)})"
        raise ModelError(f"{printable(where)}: {text}") from error
