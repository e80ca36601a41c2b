"""How much memory a computation takes at most, from what is alive after each of its operations.

A few rows are computed, and twice as many; each operation's bytes are then read on in a line to any number of rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Live(TorchDispatchMode):
    """Within, the bytes of all tensors that are alive are noted after each operation in `after`, a storage once.

    held: tensors that were there before, and count for nothing.
    """

    def __init__(self, held: Iterable[Tensor] = ()):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in held}
        self.bytes = 0
        self.after: list[int] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self._meet(tensor)
        self.after.append(self.bytes)
        return made

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.bytes += size
            weakref.finalize(storage, self._lose, key, size)

    def _lose(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


def read_on(measure: Callable[[int], list[int]], rows: int, few: int) -> int:
    """The most bytes that are alive at once at `rows` rows. measure: rows → bytes after each operation; asked for `few`
    and twice as many, unless `rows` are no more than that."""
    if rows <= 2 * few:
        return max(measure(rows))
    once, twice = measure(few), measure(2 * few)
    if len(once) != len(twice):  # the operations depend on what was drawn: nothing to draw a line through
        return round(max(twice) * rows / (2 * few))
    return max(a + round((b - a) / few * (rows - few)) for a, b in zip(once, twice, strict=True))
