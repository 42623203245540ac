"""The model registry: metadata files -> one validated, immutable Fleet.

A card that is wrong is named with its file, field and reason while the others serve on, because an operator
edits the fleet of a running server. Everything here is pure apart from reading and writing the files;
watching the directory is `calm.sources.watch`.
"""

from calm.registry.files import remove_card, write_card
from calm.registry.fleet import Fleet, FleetChange, FleetLoad, diff, keep_previous, load_fleet, read_card
from calm.registry.problems import CardProblem
from calm.registry.reference import (
    FileReference,
    HfReference,
    NpmReference,
    PypiReference,
    Reference,
    UrlReference,
    parse_reference,
)
from calm.registry.schema import card_schema

__all__ = [
    "CardProblem",
    "FileReference",
    "Fleet",
    "FleetChange",
    "FleetLoad",
    "HfReference",
    "NpmReference",
    "PypiReference",
    "Reference",
    "UrlReference",
    "card_schema",
    "diff",
    "keep_previous",
    "load_fleet",
    "parse_reference",
    "read_card",
    "remove_card",
    "write_card",
]
