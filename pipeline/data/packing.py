"""Documents into windows of T tokens: every token exactly once, under 1 % of padding.

A document of length L fills L // T windows of its own from its start; what is left of it,
L % T tokens, is packed with what is left of others by first-fit decreasing, so nothing is
cut that could stay whole (Ding et al., "Fewer Truncations Improve Language Modeling", 2024,
section 3). Where lengths do not fit each other (all of 0.6 T, say) the windows with the
largest gaps are given up: their documents are laid end to end and cut at each window's end.

Which lengths share a window depends on the lengths alone and is found once, class of equal
length by class: first-fit decreasing repeats a pattern of lengths until a class runs out, so
there are some thousand patterns however many documents there are. Which document of its
length stands where, and the order of the windows, is a permutation of (seed, epoch). Window
j of any epoch is therefore computed, not looked up, and an epoch has the same number of
windows as any other.

From the second epoch on a document of T tokens or more is cut elsewhere: it is turned like a ring
by a number of (seed, epoch, document), and the window over the seam holds its end and its beginning
as two pieces. Were it cut at the same places each time, a small corpus would be learned by heart
sooner.
"""

import bisect

import numpy as np

from chainrule.pipeline.data.order import permute, stream_key

CLASS_STREAM = 0xC1A55
TURN_STREAM = 0x7042


class Packing:
    """Windows over documents of given lengths; see the module."""

    def __init__(self, lengths: np.ndarray, context: int, max_waste: float = 0.01) -> None:
        """`lengths` int64 (N,), tokens of each document; `context` is T.

        Padding stays below `max_waste` of the tokens, up to the last window.
        """
        if context < 1:
            raise ValueError(f"a context of {context} tokens")
        self.context = context
        self._lengths = lengths
        full = lengths // context
        self._full_stop = np.cumsum(full)
        self._left = (lengths - full * context).astype(np.min_scalar_type(context))
        # Documents by what is left of them: class l is members[start[l]:start[l + 1]].
        self._members = np.argsort(self._left, kind="stable")
        counts = np.bincount(self._left, minlength=context + 1)
        self._class_start = np.concatenate([[0], np.cumsum(counts)])
        counts[0] = 0
        self.full = int(self._full_stop[-1]) if len(lengths) else 0
        patterns = first_fit_decreasing(counts, context)
        kept, given_up = _give_up_gaps(patterns, context, max_waste * float(lengths.sum()))
        self._lay_patterns(kept)
        self._lay_chain(given_up)
        self.windows = self.full + self.packed + self.chained
        self.tokens = int(lengths.sum())

    @property
    def waste(self) -> float:
        """Share of all positions that are padding."""
        return 1.0 - self.tokens / (self.windows * self.context) if self.windows else 0.0

    def _lay_patterns(self, patterns: list[tuple[list[tuple[int, int]], int]]) -> None:
        taken = np.zeros(self.context + 1, np.int64)
        stops, pieces = [], []
        pointers = [0]
        total = 0
        for pattern, uses in patterns:
            for length, times in pattern:
                pieces += [(length, times, int(taken[length]) + k) for k in range(times)]
                taken[length] += uses * times
            total += uses
            stops.append(total)
            pointers.append(len(pieces))
        self._taken = taken
        self.packed = total
        self._pattern_stop = np.array(stops, np.int64)
        self._pieces = np.array(pieces, np.int64).reshape(-1, 3)
        self._pointers = np.array(pointers, np.int64)

    def _lay_chain(self, patterns: list[tuple[list[tuple[int, int]], int]]) -> None:
        counts: dict[int, int] = {}
        for pattern, uses in patterns:
            for length, times in pattern:
                counts[length] = counts.get(length, 0) + uses * times
        self._runs: list[tuple[int, int, int, int]] = []  # first token, length, documents, taken
        token = 0
        for length, count in sorted(counts.items(), reverse=True):
            self._runs.append((token, length, count, int(self._taken[length])))
            token += length * count
        self._chain_tokens = token
        self._run_tokens = [run[0] for run in self._runs]
        self.chained = -(-token // self.context)

    def pieces(
        self, windows: np.ndarray, seed: int, epoch: int, shuffle: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What windows (m,) hold: (row, document, start, stop), int64, rows rising from 0.

        Piece by piece in the order of the window; [start, stop) are tokens of the document.
        """
        rows, classes, places, starts, lengths = [], [], [], [], []

        in_full = np.flatnonzero(windows < self.full)
        documents_of_full = np.searchsorted(self._full_stop, windows[in_full], side="right")
        before = np.where(documents_of_full > 0, self._full_stop[documents_of_full - 1], 0)
        full_starts = (windows[in_full] - before) * self.context

        in_packed = np.flatnonzero((windows >= self.full) & (windows < self.full + self.packed))
        numbers = windows[in_packed] - self.full
        pattern = np.searchsorted(self._pattern_stop, numbers, side="right")
        use = numbers - np.where(pattern > 0, self._pattern_stop[pattern - 1], 0)
        first, stop = self._pointers[pattern], self._pointers[pattern + 1]
        at = _ranges(first, stop)
        length, times, place = self._pieces[at].T
        rows.append(np.repeat(in_packed, stop - first))
        classes.append(length)
        places.append(place + np.repeat(use, stop - first) * times)
        starts.append(np.zeros_like(length))
        lengths.append(length)

        for row in np.flatnonzero(windows >= self.full + self.packed).tolist():
            number = int(windows[row]) - self.full - self.packed
            for one_class, one_place, start, count in self._chain(number):
                rows.append(np.array([row]))
                classes.append(np.array([one_class]))
                places.append(np.array([one_place]))
                starts.append(np.array([start]))
                lengths.append(np.array([count]))

        class_ = np.concatenate(classes)
        documents = self._documents(class_, np.concatenate(places), seed, epoch, shuffle)
        offset = (self._lengths[documents] // self.context) * self.context
        start_ = offset + np.concatenate(starts)
        row_ = np.concatenate([in_full, *rows])
        order = np.argsort(row_, kind="stable")
        document_ = np.concatenate([documents_of_full, documents])[order]
        begin = np.concatenate([full_starts, start_])[order]
        end = np.concatenate([full_starts + self.context, start_ + np.concatenate(lengths)])[order]
        if not shuffle or epoch == 0:
            return row_[order], document_, begin, end
        return self._turned(row_[order], document_, begin, end, stream_key(seed, epoch))

    def _turned(
        self,
        row: np.ndarray,
        document: np.ndarray,
        begin: np.ndarray,
        end: np.ndarray,
        key: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The pieces on documents turned like rings; those over a seam in two."""
        length = self._lengths[document]
        turn = (stream_key(TURN_STREAM, key, document) % length.astype(np.uint64)).astype(np.int64)
        turn[length < self.context] = 0  # short ones stay whole
        first = (begin + turn) % length
        stop = first + end - begin
        beyond = stop - length
        seams = np.flatnonzero(beyond > 0)
        order = np.argsort(np.concatenate([np.arange(len(row)), seams]), kind="stable")
        return (
            np.concatenate([row, row[seams]])[order],
            np.concatenate([document, document[seams]])[order],
            np.concatenate([first, np.zeros_like(seams)])[order],
            np.concatenate([np.minimum(stop, length), beyond[seams]])[order],
        )

    def _documents(
        self, classes: np.ndarray, places: np.ndarray, seed: int, epoch: int, shuffle: bool
    ) -> np.ndarray:
        start = self._class_start[classes]
        if shuffle and len(places):
            key = stream_key(seed, epoch, CLASS_STREAM, classes)
            places = permute(places, self._class_start[classes + 1] - start, key)
        return self._members[start + places]

    def _chain(self, window: int) -> list[tuple[int, int, int, int]]:
        """(class, place in it, start in the leftover, tokens) of a window of the chain."""
        token = window * self.context
        stop = min(token + self.context, self._chain_tokens)
        found = []
        while token < stop:
            run = bisect.bisect_right(self._run_tokens, token) - 1
            first, length, _, taken = self._runs[run]
            place, start = divmod(token - first, length)
            count = min(length - start, stop - token)
            found.append((length, taken + place, start, count))
            token += count
        return found


def first_fit_decreasing(
    counts: np.ndarray, context: int
) -> list[tuple[list[tuple[int, int]], int]]:
    """Bins of size `context` over counts[l] items of each length l, 0 < l < context.

    A list of (pattern, uses), a pattern being [(length, times), ...] of falling length. It is
    first-fit decreasing (each bin takes, over and over, the longest item that still fits),
    which repeats a bin as long as its items last.
    """
    left = {length: int(counts[length]) for length in np.flatnonzero(counts).tolist()}
    lengths = sorted(left)
    patterns = []
    while lengths:
        space = context
        pattern = []
        at = len(lengths) - 1
        while at >= 0:
            length = lengths[at]
            times = min(space // length, left[length])
            pattern.append((length, times))
            space -= times * length
            at = min(at, bisect.bisect_right(lengths, space)) - 1
        uses = min(left[length] // times for length, times in pattern)
        for length, times in pattern:
            left[length] -= uses * times
            if left[length] == 0:
                del lengths[bisect.bisect_left(lengths, length)]
        patterns.append((pattern, uses))
    return patterns


def _give_up_gaps(
    patterns: list[tuple[list[tuple[int, int]], int]], context: int, allowed: float
) -> tuple[list[tuple[list[tuple[int, int]], int]], list[tuple[list[tuple[int, int]], int]]]:
    """(patterns kept, patterns given up) so that the gaps kept are at most `allowed` tokens."""
    gaps = [context - sum(length * times for length, times in pattern) for pattern, _ in patterns]
    waste = sum(gap * uses for gap, (_, uses) in zip(gaps, patterns, strict=True))
    if waste <= allowed:
        return patterns, []
    given_up = []
    kept = list(patterns)
    # The chain's last window has a gap of its own, hence half of what is allowed.
    for number in sorted(range(len(patterns)), key=lambda k: (-gaps[k], k)):
        excess = waste - allowed / 2
        if excess <= 0 or gaps[number] == 0:
            break
        pattern, uses = patterns[number]
        moved = min(uses, int(-(-excess // gaps[number])))
        given_up.append((pattern, moved))
        kept[number] = (pattern, uses - moved)
        waste -= moved * gaps[number]
    return [(pattern, uses) for pattern, uses in kept if uses], given_up


def _ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """The concatenation of range(start, stop) for each pair."""
    sizes = stops - starts
    total = int(sizes.sum())
    if total == 0:
        return np.zeros(0, np.int64)
    ends = np.cumsum(sizes)
    return np.arange(total) - np.repeat(ends - sizes - starts, sizes)
