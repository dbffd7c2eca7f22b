"""What statements have in common that are run for one row or for hundreds."""

from __future__ import annotations

import re

_ARRAY = re.compile(r"\$\d+::(\w+\[\])")


def one_plan(statement: str) -> str:
    """A statement whose plan does not depend on how long the arrays are that it is given.

    PostgreSQL sees the arrays of a prepared statement when it plans it. Its general plan, made for ten
    rows, then seems too dear for one, and it makes a plan of its own for each run, which for our long
    statements takes as long as running them. What comes out of a subquery it does not see beforehand.
    """
    # With a type after it, since `any (select …)` would be a look through rows.
    return _ARRAY.sub(r"(select \g<0>)::\g<1>", statement)
