"""Translation edit rate: the work of mending a text. Knows texts only.

The search is Tercom's as sacreBLEU has it, and gives sacreBLEU's figure; it is written here because with several
references sacreBLEU's takes minutes for a test set. References that cannot be nearer than the best one so far are
left out early, and all shifts of one step are tried at once.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_cli.tasks.metrics import Undefined

__all__ = ["ter"]

_LONGEST_SHIFT = 10
_FURTHEST_SHIFT = 50
_MAX_SHIFTS_TRIED = 1000

Array = NDArray[Any]
Ids = list[int]
"""Words as numbers: comparing and stacking them is what takes the time."""


class _Shift(NamedTuple):
    """A block of words moved to another place, and the text that makes. Sorted as Tercom prefers them."""

    length: int
    minus_start: int
    minus_place: int
    words: Ids


def ter(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Translation edit rate in percent; lower is better, 0 is perfect, and over 100 is possible.

    Words inserted, left out and replaced, and blocks of words moved, to make of the text the nearest of its
    references, over the mean length of the references (Snover et al. 2006, 2006.amta-papers.25); the nearest is
    searched for greedily, shift by shift. As sacreBLEU by default: words are what white space separates, case is
    ignored. Unlike it there is no beam, which only texts over 25 words could meet.

    Raises:
        Undefined: no reference has a word.
    """
    num_edits, num_words = 0, 0.0
    for prediction, texts in zip(predictions, references, strict=True):
        ids: dict[str, int] = {}
        words, *targets = (
            [ids.setdefault(word, len(ids)) for word in text.lower().split()] for text in (prediction, *texts)
        )
        num_edits += _fewest_edits(words, targets)
        num_words += sum(map(len, targets)) / len(targets)
    if not num_words:
        raise Undefined("no reference has a word")
    return 100 * num_edits / num_words


def _fewest_edits(words: Ids, targets: Sequence[Ids]) -> int:
    floors = [_floor(words, target) for target in targets]
    fewest = len(words) + max(map(len, targets))
    for floor, target in sorted(zip(floors, targets, strict=True)):
        if floor >= fewest:
            break
        fewest = min(fewest, _edits(words, target, floor, fewest))
    return fewest


def _floor(words: Ids, target: Ids) -> int:
    """The edits there must be in whatever order the words are."""
    return max(len(words), len(target)) - (Counter(words) & Counter(target)).total()


def _edits(words: Ids, target: Ids, floor: int, limit: int) -> int:
    """Edits and shifts from `words` to `target`; some number from `limit` up if there are that many."""
    num_shifts = num_tried = 0
    wanted = np.array(target, dtype=np.int32)
    while True:
        table: list[Ids] = [row[0].tolist() for row in _rows(np.array([words], dtype=np.int32), wanted)]
        distance = table[-1][-1]
        if distance == floor or num_shifts + floor + 1 >= limit:
            return num_shifts + distance
        shifts = list(_shifts(words, target, table))
        num_tried += len(shifts)
        if not shifts or num_tried >= _MAX_SHIFTS_TRIED:
            return num_shifts + distance
        tried = np.array([shift.words for shift in shifts], dtype=np.int32)
        distances = deque(_rows(tried, wanted), maxlen=1).pop()[:, -1]
        if distances.min() >= distance:
            return num_shifts + distance
        words = max(shifts[place] for place in np.flatnonzero(distances == distances.min())).words
        num_shifts += 1


def _rows(texts: Array, target: Array) -> Iterator[Array]:
    """The edit distances' table of each row of `texts` (N, words), a row (N, 1 + wanted) for every beginning."""
    across = np.arange(len(target) + 1, dtype=np.int32)
    row = np.repeat(across[None], len(texts), axis=0)
    yield row
    for word in texts.T:
        cost = row + 1
        np.minimum(cost[:, 1:], row[:, :-1] + (word[:, None] != target), out=cost[:, 1:])
        row = np.minimum.accumulate(cost - across, axis=1) + across
        yield row


def _alignment(words: Ids, target: Ids, table: list[list[int]]) -> tuple[list[int], list[bool], list[bool]]:
    """(for each word of `target` the one of `words` that stands for it, or is before it; which of each are wrong).

    Of equally short ways the one that replaces, else removes, else inserts, from the end.
    """
    at, right_words, right_target = [0] * len(target), [False] * len(words), [False] * len(target)
    i, j = len(words), len(target)
    while i or j:
        if i and j and table[i][j] == table[i - 1][j - 1] + (words[i - 1] != target[j - 1]):
            i, j = i - 1, j - 1
            at[j] = i
            right_words[i] = right_target[j] = words[i] == target[j]
        elif i and table[i][j] == table[i - 1][j] + 1:
            i -= 1
        else:
            j -= 1
            at[j] = i - 1
    return at, right_words, right_target


def _shifts(words: Ids, target: Ids, table: list[list[int]]) -> Iterator[_Shift]:
    """Every move of words that are wrong where they are to where `target` has them and they are missing."""
    at, right_words, right_target = _alignment(words, target, table)
    for start, begin, length in _shared_blocks(words, target):
        if all(right_words[start : start + length]) or all(right_target[begin : begin + length]):
            continue
        if start <= at[begin] < start + length:
            continue
        places = (at[spot] + 1 if spot >= 0 else 0 for spot in range(begin - 1, begin + length))
        for place in dict.fromkeys(places):
            yield _Shift(length, -start, -place, _moved(words, start, length, place))


def _shared_blocks(words: Ids, target: Ids) -> Iterator[tuple[int, int, int]]:
    """(start in `words`, start in `target`, length) of every run of words that both have."""
    starts: dict[int, list[int]] = {}
    for begin, wanted in enumerate(target):
        starts.setdefault(wanted, []).append(begin)
    for start, word in enumerate(words):
        for begin in starts.get(word, ()):
            if abs(begin - start) > _FURTHEST_SHIFT:
                continue
            pairs = zip(words[start : start + _LONGEST_SHIFT], target[begin:], strict=False)
            for length, (here, there) in enumerate(pairs, 1):
                if here != there:
                    break
                yield start, begin, length


def _moved(words: Ids, start: int, length: int, place: int) -> Ids:
    rest = words[:start] + words[start + length :]
    # Tercom counts a place within the block from the block's start, one behind it in the whole text.
    place = place - length if place > start + length else place
    return rest[:place] + words[start : start + length] + rest[place:]
