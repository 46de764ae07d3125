"""Tables from name to object: a clash is an error, and so is a miss, which names the nearest entry."""

from __future__ import annotations

from typing import Generic, TypeVar

from utils.errors import SpecError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named objects of one kind.

    Args:
        kind: the word for an entry in error sentences, e.g. `"module"`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str, obj: T) -> T:
        """Add an entry and return it.

        Raises:
            SpecError: the name is taken by another object.
        """
        if name in self._entries and self._entries[name] is not obj:
            raise SpecError(f"{self.kind} '{name}' is registered twice; choose another name for the second")
        self._entries[name] = obj
        return obj

    def get(self, name: str) -> T:
        """Return the entry of that name.

        Raises:
            SpecError: there is none; the nearest name is suggested.
        """
        if name not in self._entries:
            raise SpecError(f"unknown {self.kind} '{name}'{did_you_mean(name, self._entries)}")
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        """All names in the order of registration."""
        return tuple(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries
