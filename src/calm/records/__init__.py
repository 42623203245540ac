"""The frozen records that cross seams between the rooms of CALM.

One request, in the order its records are made:

    Ask -> Features + Snapshot -> Estimate per model -> Decision -> Lease -> Outcome ( -> Feedback )

Units stand in names: `_s` seconds, `_bytes`, `_j` joules, `_usd`. What is unknown is None, never 0:
a model of unknown energy must not win for costing nothing. Times called `at_s` or `arrived_s` are the
monotonic clock's; `wall_s` is Unix time.
"""

from calm.records.base import (
    Capability,
    Kind,
    MeterKind,
    OutcomeStatus,
    Placement,
    Privacy,
    Record,
    Residency,
    Strict,
    Vector,
)
from calm.records.card import (
    ChatSpec,
    ConvertSpec,
    EngineSpec,
    FieldSpec,
    ModelCard,
    PriceSpec,
    PriorSpec,
    SandboxSpec,
    SourceSpec,
)
from calm.records.decision import Belief, Candidate, Decision, Estimate, History, Refusal, Term
from calm.records.execution import AdapterFile, Endpoint, Feedback, Lease, LeaseRequest, Outcome, Reading
from calm.records.knowledge import KnowledgeSummary, MeterSummary, ModelSummary, StoredRequest
from calm.records.request import FORM, Ask, Features, Weights, Wishes
from calm.records.state import Forecast, GpuState, ModelState, PlacementPlan, Snapshot

__all__ = [
    "FORM",
    "AdapterFile",
    "Ask",
    "Belief",
    "Candidate",
    "Capability",
    "ChatSpec",
    "ConvertSpec",
    "Decision",
    "Endpoint",
    "EngineSpec",
    "Estimate",
    "Features",
    "Feedback",
    "FieldSpec",
    "Forecast",
    "GpuState",
    "History",
    "Kind",
    "KnowledgeSummary",
    "Lease",
    "LeaseRequest",
    "MeterKind",
    "MeterSummary",
    "ModelCard",
    "ModelState",
    "ModelSummary",
    "Outcome",
    "OutcomeStatus",
    "Placement",
    "PlacementPlan",
    "PriceSpec",
    "PriorSpec",
    "Privacy",
    "Reading",
    "Record",
    "Refusal",
    "Residency",
    "SandboxSpec",
    "Snapshot",
    "SourceSpec",
    "StoredRequest",
    "Strict",
    "Term",
    "Vector",
    "Weights",
    "Wishes",
]
