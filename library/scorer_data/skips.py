"""The report of what was left out."""

import logging

from library.scorer_data.records import Skipped

EXAMPLES = 3


class SkipReport:
    """Counts what was left out by its kind, with the first examples of each."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, list[str]]] = {}

    def add(self, skipped: Skipped) -> None:
        count, reasons = self._kinds.setdefault(skipped.kind or "other", (0, []))
        if len(reasons) < EXAMPLES:
            reasons.append(skipped.reason)
        self._kinds[skipped.kind or "other"] = (count + skipped.count, reasons)

    def __len__(self) -> int:
        """How many were left out."""
        return sum(count for count, _ in self._kinds.values())

    @property
    def counts(self) -> dict[str, int]:
        """How many of each kind, the most frequent first."""
        return {kind: count for kind, (count, _) in sorted(self._kinds.items(), key=lambda item: -item[1][0])}

    def first(self) -> str:
        """One example, of the most frequent kind; empty if nothing was left out."""
        return self._kinds[next(iter(self.counts))][1][0] if self._kinds else ""

    def __str__(self) -> str:
        """One line for each kind, the most frequent first, and its examples below it."""
        lines = [f"left out: {len(self):,}"]
        for kind, count in self.counts.items():
            lines.append(f"  {count:,}: {kind}")
            lines += [f"    {reason}" for reason in self._kinds[kind][1]]
        return "\n".join(lines)

    def log(self, logger: logging.Logger) -> None:
        """As a warning, if there is anything to say."""
        if self._kinds:
            logger.warning("%s", self)
