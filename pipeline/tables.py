"""A stage's answer as a table: its own columns beside those that it passes on untouched."""

from typing import Any

import pyarrow as pa

# A stage may turn a good row into a failed one, so these are always written anew.
_VERDICT = ("reason", "message")


def add_columns(table: pa.Table, rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """`table` in `schema`: the columns it lacks come from `rows`, one dict for each of its rows.

    The others are passed on as they are, so that what a user asked to keep stays bit-equal.
    """
    passed_on = set(table.column_names) - set(_VERDICT)
    columns = [
        table.column(field.name)
        if field.name in passed_on
        else pa.array([row.get(field.name) for row in rows], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)
