"""CALM: a self-adaptive orchestrator for a fleet of small language models behind one endpoint."""

__version__ = "0.1.0"
