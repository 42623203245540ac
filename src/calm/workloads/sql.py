"""Whether two SQL queries ask the same, by their clauses and not by their letters.

Both are parsed as SQLite and brought to one form: identifiers in lower case, aliases replaced by what they stand
for, inner joins' conditions and WHERE as one set of conjuncts, comparisons in one direction. Then select items,
tables, conjuncts and groups are compared as sets, ORDER BY and LIMIT as they stand: the exact set match of
Spider (Yu et al. 2018, arXiv 1809.08887), but with values. It is stricter than running both queries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from calm.errors import BadInput

if TYPE_CHECKING:
    from sqlglot import exp

MAX_CHARS = 4_000
DIALECT = "sqlite"


def same_query(right: str, answer: str) -> bool:
    """False where the answer holds no query that can be parsed. Never raises on any text.

    Raises BadInput when sqlglot is not installed.
    """
    try:
        import sqlglot  # noqa: F401
    except ImportError:
        raise BadInput("judging SQL needs: pip install 'calm-orchestrator[bench]'", field="queries") from None
    try:
        return _equal(statement_in(right), statement_in(answer))
    except (Exception, RecursionError):  # a parser of others on any text: what it cannot read is wrong
        return False


def statement_in(answer: str) -> str:
    """The first statement: of the code block if there is one, from SELECT or WITH to `;` or a blank line."""
    text = answer[:MAX_CHARS]
    if fenced := re.search(r"```(?:\w+[ \t]*\n)?(.*?)(?:```|\Z)", text, re.DOTALL):
        text = fenced[1]
    start = re.search(r"(?im)^[^\w\n]*(select|with)\b", text) or re.search(r"(?i)\bselect\b", text)
    text = text[start.start() :] if start else ""
    return re.split(r";|\n\s*\n", text, maxsplit=1)[0].strip()


def _equal(right: str, answer: str) -> bool:
    if not right or not answer:
        return False
    from sqlglot import exp

    trees = (_parse(right), _parse(answer))
    plain = {name for tree in trees for name in _unquoted(tree)}
    for tree in trees:
        _settle_names(tree, plain)
    bare = {column.name for tree in trees for column in _columns(tree) if not column.table}
    return all(isinstance(tree, exp.Query) for tree in trees) and _form(trees[0], bare) == _form(
        trees[1], bare
    )


def _parse(statement: str) -> exp.Expr:
    import sqlglot

    return sqlglot.parse_one(re.sub(r"`|\[(\w+)\]", r"\1", statement), dialect=DIALECT)


# --- names ------------------------------------------------------------------------------------------


def _columns(tree: exp.Expr) -> list[exp.Column]:
    from sqlglot import exp

    return list(tree.find_all(exp.Column))


def _unquoted(tree: exp.Expr) -> set[str]:
    from sqlglot import exp

    return {name.name.lower() for name in tree.find_all(exp.Identifier) if not name.args.get("quoted")}


def _settle_names(tree: exp.Expr, plain: set[str]) -> None:
    """In place: all names in lower case and unquoted, aliases replaced.

    What is in double quotes and no name elsewhere is a string, as SQLite reads it.
    """
    from sqlglot import exp

    for column in _columns(tree):
        name = column.this
        if not column.table and name.args.get("quoted") and name.name.lower() not in plain:
            column.replace(exp.Literal.string(name.name))
    for name in tree.find_all(exp.Identifier):
        name.set("this", name.name.lower())
        name.set("quoted", False)
    for key in tree.find_all(exp.Ordered):
        key.set("desc", bool(key.args.get("desc")))
    for select in tree.find_all(exp.Select):
        _resolve_items(select)
    _resolve_tables(tree)


def _resolve_items(select: exp.Select) -> None:
    """ORDER BY, GROUP BY and HAVING by what an alias or a number stands for; select items without aliases."""
    from sqlglot import exp

    aliases = {item.alias: item.this for item in select.expressions if isinstance(item, exp.Alias)}
    clauses = [clause for key in ("order", "group", "having") if (clause := select.args.get(key))]
    for column in [column for clause in clauses for column in _columns(clause)]:
        if not column.table and column.name in aliases:
            column.replace(aliases[column.name].copy())
    items = [item.unalias() for item in select.expressions]
    select.set("expressions", items)
    for clause in clauses:
        for key in clause.expressions:
            _resolve_number(key.this if isinstance(key, exp.Ordered) else key, items)


def _resolve_number(key: exp.Expr, items: Sequence[exp.Expr]) -> None:
    """`ORDER BY 2` is by the second item."""
    from sqlglot import exp

    if isinstance(key, exp.Literal) and key.is_int and 1 <= int(key.name) <= len(items):
        key.replace(items[int(key.name) - 1].copy())


def _resolve_tables(tree: exp.Expr) -> None:
    """Table aliases replaced by the table's name; of a table that is joined to itself by name and number."""
    from sqlglot import exp

    names: dict[int, dict[str, str]] = {}
    """By select: what its FROM and JOINs call their tables."""
    for table in list(tree.find_all(exp.Table)):
        scope = names.setdefault(id(table.find_ancestor(exp.Select)), {})
        again = sum(name.partition("#")[0] == table.name for name in scope.values())
        name = f"{table.name}#{again + 1}" if again else table.name
        scope[table.alias or table.name] = name
        table.set("alias", None)
        table.set("this", exp.to_identifier(name))
    for column in _columns(tree):
        if column.table and (found := _table_meant(column, names)):
            column.set("table", exp.to_identifier(found))


def _table_meant(column: exp.Column, names: Mapping[int, Mapping[str, str]]) -> str | None:
    """In its own select, else in the one around it; None for a name that nothing introduces."""
    from sqlglot import exp

    select = column.find_ancestor(exp.Select)
    while select is not None:
        if found := names.get(id(select), {}).get(column.table):
            return found
        select = select.find_ancestor(exp.Select)
    return None


# --- the one form -----------------------------------------------------------------------------------


def _form(tree: exp.Expr, bare: set[str]) -> str:
    """A text that is equal for queries of equal clauses. Selects are replaced by theirs, innermost first."""
    from sqlglot import exp

    for column in _columns(tree):
        if column.name in bare:
            column.set("table", None)
    holder = exp.Paren(this=tree)
    for select in reversed(list(holder.find_all(exp.Select))):
        select.replace(exp.Literal.string(_clauses(select)))
    return str(holder.sql(DIALECT, normalize_functions="upper"))


def _clauses(select: exp.Select) -> str:
    args = select.args
    tables, conditions = _sources(select)
    clauses = (
        "distinct" if args.get("distinct") else "",
        sorted(_text(item) for item in select.expressions),
        sorted(tables),
        sorted({*conditions, *_conjuncts(args.get("where"))}),
        sorted(_text(item) for item in (args["group"].expressions if args.get("group") else ())),
        sorted(_conjuncts(args.get("having"))),
        [_text(item) for item in (args["order"].expressions if args.get("order") else ())],
        _text(args.get("limit")),
        _text(args.get("offset")),
        _text(args.get("with_")),
    )
    return repr(clauses)


def _sources(select: exp.Select) -> tuple[list[str], list[str]]:
    """(tables, conditions of inner joins); an outer join stays one piece, as its side and condition matter."""
    from sqlglot import exp

    first = select.args.get("from_")
    tables = [_text(first.this)] if first else []
    conditions: list[str] = []
    for join in select.args.get("joins") or ():
        if join.side or not isinstance(join, exp.Join):
            tables.append(_text(join))
            continue
        tables.append(_text(join.this))
        conditions += _conjuncts(join.args.get("on"))
        conditions += [f"using {_text(name)}" for name in join.args.get("using") or ()]
    return tables, conditions


def _conjuncts(clause: exp.Expr | None) -> list[str]:
    """The parts of a condition that AND holds together."""
    from sqlglot import exp

    if clause is None:
        return []
    condition = (clause.this if isinstance(clause, exp.Where | exp.Having) else clause).unnest()
    if isinstance(condition, exp.And):
        return _conjuncts(condition.this) + _conjuncts(condition.expression)
    return [_comparison(condition)]


def _comparison(part: exp.Expr) -> str:
    """In one direction: `a > b` as `b < a`, and `=` and `<>` with their sides in order."""
    from sqlglot import exp

    if not isinstance(part, exp.EQ | exp.NEQ | exp.GT | exp.GTE | exp.LT | exp.LTE):
        return _text(part)
    left, right = _text(part.this), _text(part.expression)
    if isinstance(part, exp.GT | exp.GTE):
        return f"{right} {'<' if isinstance(part, exp.GT) else '<='} {left}"
    if isinstance(part, exp.LT | exp.LTE):
        return f"{left} {'<' if isinstance(part, exp.LT) else '<='} {right}"
    return f" {'=' if isinstance(part, exp.EQ) else '<>'} ".join(sorted((left, right)))


def _text(node: exp.Expr | None) -> str:
    return node.sql(DIALECT, normalize_functions="upper") if node is not None else ""
