"""Values that are kept while they are in use."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Kept(Generic[Key, Value]):
    """Values made when first asked for, of which the `limit` last used are kept."""

    def __init__(self, make: Callable[[Key], Value], limit: int) -> None:
        self._make, self._limit = make, limit
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def __getitem__(self, key: Key) -> Value:
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._values[key] = self._make(key)
        if len(self._values) > self._limit:
            self._values.popitem(last=False)
        return value
