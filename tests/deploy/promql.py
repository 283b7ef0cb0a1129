"""Reads PromQL: which metrics an expression names."""

from __future__ import annotations

import re
from collections.abc import Iterator

import promql_parser as promql

_GRAFANA_INTERVAL = re.compile(r"\$__(rate_)?interval")


def metrics_of(expression: str) -> set[str]:
    """The names of all metrics in an expression, which may hold Grafana's variables.

    Raises: ValueError for what is not PromQL, or for a selector without a name.
    """
    parsed = promql.parse(_GRAFANA_INTERVAL.sub("5m", expression))
    names = set()
    for selector in _selectors(parsed):
        if selector.name is None:
            raise ValueError(f"a selector without a name in {expression}")
        names.add(selector.name)
    return names


def _selectors(node: promql.Expr) -> Iterator[promql.VectorSelector]:
    if isinstance(node, promql.VectorSelector):
        yield node
    elif isinstance(node, promql.MatrixSelector):
        yield node.vector_selector
    elif isinstance(node, promql.BinaryExpr):
        yield from _selectors(node.lhs)
        yield from _selectors(node.rhs)
    elif isinstance(node, promql.Call):
        for argument in node.args:
            yield from _selectors(argument)
    elif isinstance(
        node, promql.AggregateExpr | promql.SubqueryExpr | promql.ParenExpr | promql.UnaryExpr
    ):
        yield from _selectors(node.expr)
    else:
        assert isinstance(node, promql.NumberLiteral | promql.StringLiteral), type(node)
