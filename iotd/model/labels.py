"""How probable each of a few labels is as the beginning of an answer: one run of the model a step, nothing is drawn.

Knows no clock: whoever drives it checks its deadline between steps.
"""

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from iotd.errors import InvalidInput
from iotd.events import Labels, LabelScore, Weighed
from iotd.model.decoder import CHUNK, Decoder
from iotd.model.head import MOST_ROWS
from iotd.model.state import State
from iotd.model.tokenizer import Tokenizer

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Path = tuple[int, ...]
"""Tokens from the beginning of the answer."""
MOST_CERTAIN = 1 - 2**-53
"""The largest probability below 1: what is left of a certainty is not nothing, as its logarithm is wanted."""


def label_paths(labels: Sequence[str], tokenizer: Tokenizer, shortlist: Ints | None) -> list[Path]:
    """Each label in the tokens that the tokenizer gives for it, one label or more.

    shortlist: the tokens that have logits, None where all have. Raises InvalidInput naming the label that has too many
    tokens, a token that no answer can have, or the tokens of another one.
    """
    paths: list[Path] = []
    for index, label in enumerate(labels):
        field, path = f"labels[{index}]", tuple(tokenizer.encode(label))
        if len(path) > CHUNK:
            raise InvalidInput(f"{field} takes {len(path)} tokens: at most {CHUNK} are scored", field=field)
        if shortlist is not None and len(unsaid := np.setdiff1d(path, shortlist)):
            missing = tokenizer.decode(unsaid[:1].tolist())
            raise InvalidInput(f"{field}: the words this model was converted for lack {missing!r}", field=field)
        if path in paths:
            raise InvalidInput(f"{field} and labels[{paths.index(path)}] are the same to the model", field=field)
        paths.append(path)
    return paths


class Weighing:
    """Labels weighed against each other as the beginning of what follows `state`, which stays as it is.

    A label's probability is that of its tokens one after the other, each from a softmax over all tokens; other ways to
    spell it are not looked for. Where it begins a longer label, token by token, the answers that go on to that one do
    not count for it: no answer counts twice. With length_normalized they do, as those scores are no parts of a whole.
    A single token takes no run, and labels that begin alike share theirs.
    """

    def __init__(
        self,
        decoder: Decoder,
        state: State,
        beside: State,
        logits: Floats,
        labels: Labels,
        paths: Sequence[Path],
    ) -> None:
        """logits: float32 [V] after the state's last token, all exact. beside: a state without rows to run ahead in."""
        self._decoder = decoder
        self._state = state
        self._beside = beside
        self._labels = labels
        self._paths = paths
        self._every_token = np.arange(len(logits))
        self._follows = _follows(paths)
        self._log_p: dict[Path, float] = {(): 0.0}
        """That the answer begins with these tokens."""
        self._runs = deque(_runs(self._follows))
        self._take((), logits)

    @property
    def done(self) -> bool:
        return not self._runs

    def step(self) -> None:
        """Run the model once. Raises ContextOverflow where the state has no room for the label."""
        path, n_rows = self._runs.popleft()
        rows = self._decoder.verify(self._state, self._beside, path, n_rows, only=self._every_token)
        for n, logits in enumerate(rows, len(path) - n_rows + 1):
            self._take(path[:n], logits)

    def result(self) -> Weighed:
        """Once it is done."""
        if self._labels.length_normalized:
            scores = [self._log_p[path] / len(path) for path in self._paths]
        else:
            own = self._own_log_p()
            scores = [own[path] for path in self._paths]
        rest = [_log_rest(map(math.exp, scores))] if self._labels.none_of_these else []
        probabilities = _softmax([*scores, *rest], self._labels.temperature)
        each = zip(self._labels.texts, probabilities, scores, strict=False)
        return Weighed(tuple(LabelScore(*score) for score in each), probabilities[-1] if rest else None)

    def _take(self, path: Path, logits: Floats) -> None:
        """float32 [V] after these tokens."""
        largest = logits.max()
        log_sum = float(largest) + math.log(np.exp(logits - largest, dtype=np.float64).sum())
        for token in self._follows[path]:
            self._log_p[*path, token] = self._log_p[path] + float(logits[token]) - log_sum

    def _own_log_p(self) -> dict[Path, float]:
        """That the answer begins with a label, and with no longer one that it begins."""
        own: dict[Path, float] = {}
        for path in sorted(self._paths, key=len, reverse=True):
            whole = self._log_p[path]
            longer = [math.exp(log_p - whole) for other, log_p in own.items() if other[: len(path)] == path]
            own[path] = whole + _log_rest(longer)
        return own


def run_sizes(paths: Sequence[Path]) -> list[int]:
    """Tokens that weighing them reads, in each of its runs."""
    return [len(path) for path, _ in _runs(_follows(paths))]


def _follows(paths: Sequence[Path]) -> dict[Path, set[int]]:
    """The tokens by which a label goes on behind each beginning that labels have."""
    follows: defaultdict[Path, set[int]] = defaultdict(set)
    for path in paths:
        for n, token in enumerate(path):
            follows[path[:n]].add(token)
    return follows


def _runs(beginnings: Iterable[Path]) -> Iterator[tuple[Path, int]]:
    """Tokens to read in each run, and behind how many of the last of them logits are wanted: once behind each path."""
    covered: set[Path] = set()
    for path in sorted(filter(None, beginnings), key=len, reverse=True):
        n_covered = next((n for n in range(len(path), 0, -1) if path[:n] in covered), 0)
        for begin in range(n_covered, len(path), MOST_ROWS):
            end = min(begin + MOST_ROWS, len(path))
            yield path[:end], end - begin
        covered.update(path[:n] for n in range(n_covered + 1, len(path) + 1))


def _log_rest(probabilities: Iterable[float]) -> float:
    """Of what is left of 1: a natural logarithm."""
    return math.log1p(-min(math.fsum(probabilities), MOST_CERTAIN))


def _softmax(scores: Sequence[float], temperature: float) -> list[float]:
    largest = max(scores)
    odds = [math.exp((score - largest) / temperature) for score in scores]
    whole = math.fsum(odds)
    return [each / whole for each in odds]
