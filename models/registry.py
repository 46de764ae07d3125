"""Registry of named objects with errors for duplicate and unknown names."""

from __future__ import annotations

from typing import Generic, TypeVar

from utils.errors import SpecError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Mapping from names to objects.

    Args:
        kind: what an entry is called in error messages, e.g. `"module"`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str, obj: T) -> T:
        """Add an entry and return it.

        Raises:
            SpecError: the name is registered for another object.
        """
        if name in self._entries and self._entries[name] is not obj:
            raise SpecError(f"{self.kind} '{name}' is already registered; choose another name")
        self._entries[name] = obj
        return obj

    def get(self, name: str) -> T:
        """Return the entry registered under `name`.

        Raises:
            SpecError: the name is unknown; the nearest name is suggested.
        """
        if name not in self._entries:
            raise SpecError(f"unknown {self.kind} '{name}'{did_you_mean(name, self._entries)}")
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        """Return all names in the order of registration."""
        return tuple(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries
