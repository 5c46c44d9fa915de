"""Replacing an attribute for a while."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """Replaces an attribute inside a `with`.

    Args:
      owner: A module or a class.
      name: The attribute.
      new: Its value inside.

    Yields:
      Nothing.
    """
    old = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)
