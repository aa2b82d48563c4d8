"""Where content hashes lie: a growing map of many millions in bounded memory."""

import numpy as np


class HashIndex:
    """Places of sixteen-byte hashes: 24 bytes each, in a few sorted runs that grow by merging."""

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        return sum(len(places) for _, places in self._runs)

    def add(self, hashes: np.ndarray, places: np.ndarray) -> None:
        """Note where the hashes (uint8 [n, 16]) lie (int64 [n], 0 or more)."""
        run = _keys(hashes), places
        # A run is merged into one at most twice its size: each hash moves a few times in all.
        while self._runs and len(self._runs[-1][1]) <= 2 * len(run[1]):
            before = self._runs.pop()
            run = np.concatenate([before[0], run[0]]), np.concatenate([before[1], run[1]])
        order = np.argsort(run[0], kind="stable")
        self._runs.append((run[0][order], run[1][order]))

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """int64 [n]: the place of each hash, -1 where it is not there."""
        wanted, found = _keys(hashes), np.full(len(hashes), -1, np.int64)
        for keys, places in self._runs:
            if len(keys):
                at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
                found = np.where(keys[at] == wanted, places[at], found)
        return found


def _keys(hashes: np.ndarray) -> np.ndarray:
    # Byte strings sort fast; numpy drops their trailing zeros, which at one length loses nothing.
    return np.ascontiguousarray(hashes, np.uint8).reshape(-1, 16).view("S16")[:, 0]
