"""What looks wrong in an audit, and what to do about it, in words. Knows figures only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from lora_cli.tasks.audit import Audit, Padding, Part, SplitAudit

__all__ = ["concerns"]

_LOPSIDED = 0.8
"""Share of one label above which accuracy says little."""
_WASTED = 0.15
"""Share of padding that is worth a word."""
_ROUND = 8
"""Suggested lengths are multiples of this."""
_COUNTED: tuple[tuple[Callable[[SplitAudit], tuple[int, int]], str], ...] = (
    (lambda split: (split.empty_inputs, split.rows), "rows have an empty input: leave them out of the data"),
    (lambda split: (split.empty_answers, split.examples), "answers are empty: the model learns to say nothing"),
    (lambda split: (split.repeated, split.rows), "rows stand there more than once"),
    (lambda split: (split.contradictory, split.examples), "rows read the same as another one with another label"),
    (lambda split: (split.unknown_tokens, split.tokens), "tokens stand for text that the model's vocabulary lacks"),
    (
        lambda split: (split.unlabelled, split.rows + split.unlabelled),
        "rows have no gold label (-1) and are left out",
    ),
)
"""How to count something in a split, of how many; what it is."""


def concerns(audit: Audit) -> list[str]:
    """One line for each thing that looks wrong, with the key that mends it where there is one."""
    lines = [*_of_cuts(audit), *_of_leaks(audit)]
    for counted, what in _COUNTED:
        if shares := _shares({name: counted(split) for name, split in audit.splits.items()}):
            lines.append(f"{shares} {what}")
    return [*lines, *_of_labels(audit), *_of_padding(audit.padding)]


def _of_cuts(audit: Audit) -> Iterator[str]:
    for part in audit.splits["train"].parts:
        cut = [split.parts[part] for split in audit.splits.values() if split.parts[part].cut]
        if cut:
            shares = _shares({name: (split.parts[part].cut, split.examples) for name, split in audit.splits.items()})
            yield f"{shares} examples lose some of their {part}{_remedy(cut)}"


def _of_leaks(audit: Audit) -> Iterator[str]:
    for name, split in audit.splits.items():
        for other, shared in split.shared.items():
            if shared:
                yield f"{_share(shared, split.rows)} {name} inputs stand in {other} as well: its scores flatter"


def _remedy(parts: Sequence[Part]) -> str:
    """What to set for parts of one name, of which some are cut."""
    limit, room = parts[0].limit, parts[0].room
    if limit == room:
        return f" at {limit:,} tokens, all that the model has positions for"
    p99, most = (max(getattr(part.tokens, name) for part in parts) for name in ("p99", "most"))
    wanted = min(room, _rounded(p99) if p99 > limit else _rounded(most))
    keeps = "all" if wanted >= most else "99 %" if wanted >= p99 else "more"
    return f" at {limit:,} tokens: {parts[0].key}={wanted} keeps {keeps} whole"


def _of_labels(audit: Audit) -> Iterator[str]:
    labels = audit.splits["train"].labels
    if not labels:
        return
    if missing := [name for name, count in labels.items() if not count]:
        yield f"no train row has the label {', '.join(missing)}: it cannot be learnt"
    most, total = max(labels, key=labels.__getitem__), sum(labels.values())
    if labels[most] > _LOPSIDED * total:
        yield f"{_percent(labels[most] / total)} of train are {most}: accuracy says little, matthews or macro_f1 more"


def _of_padding(padding: Padding) -> Iterator[str]:
    if padding.is_packed or padding.planned < _WASTED:
        return
    said = f"{_percent(padding.planned)} of what the training computes is padding"
    if padding.window == 1:
        yield f"{said}: train.length_window=32 sorts batches by length"
    else:
        yield f"{said}: a larger train.length_window or a smaller train.batch_size pads less"


def _shares(counts: Mapping[str, tuple[int, int]]) -> str:
    """Those counts that are not 0, with the names of their splits."""
    return ", ".join(f"{_share(count, total)} {name}" for name, (count, total) in counts.items() if count)


def _share(count: int, total: int) -> str:
    return f"{count:,} of {total:,} ({_percent(count / max(1, total))})"


def _percent(share: float) -> str:
    """Without decimals where these say nothing; some is never told as none, nor most as all."""
    digits = 0 if 0.01 <= share <= 0.99 or share == 1 else 1
    return "under 0.1 %" if 0 < share < 0.001 else f"{100 * share:.{digits}f} %"


def _rounded(tokens: float) -> int:
    return math.ceil(tokens / _ROUND) * _ROUND
