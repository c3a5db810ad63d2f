"""The frame of pandas that prints the columns that matter; imported where pandas is installed only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pandas

from paced_fast.api.tables import as_text, chosen, shown_rows


class Frame(pandas.DataFrame):
    """A DataFrame, and so are the parts taken from it; only what it prints is another."""

    _metadata: ClassVar = ["_main"]  # pyright: ignore[reportIncompatibleVariableOverride]  # goes on to a part
    _main: tuple[str, ...] = ()

    @property
    def _constructor(self) -> type[Frame]:
        return Frame

    def __repr__(self) -> str:
        """The columns that have room, and where the others are."""
        if not self._is_plain:
            return super().__repr__()
        values = self.astype(object)  # else a whole number becomes a fraction beside fractions
        rows = [[label, *values.iloc[i]] for i, label in shown_rows(list(self.index))]
        return as_text(list(self.columns), rows, self._main, total=len(self), others="list(table.columns)")

    def _repr_html_(self) -> str | None:
        """The columns that matter, for a notebook, and where the others are."""
        names = chosen(list(self.columns), self._main) if self._is_plain else []
        if not names or len(names) == len(self.columns):
            return super()._repr_html_()
        html = pandas.DataFrame(self)[names]._repr_html_()  # pyright: ignore[reportCallIssue]
        left = len(self.columns) - len(names)
        return html and f"{html}<p>{left} more columns: <code>list(table.columns)</code></p>"

    @property
    def _is_plain(self) -> bool:
        """Whether columns are told apart by a text each, as they are unless the user regrouped them."""
        return self.columns.is_unique and all(isinstance(name, str) for name in self.columns) and self.size > 0


def frame(rows: Sequence[Mapping[str, Any]], main: Sequence[str]) -> Frame:
    """The rows as a frame; `main` as in `tables.table`."""
    made = Frame(list(rows))
    made._main = tuple(main)
    return made
