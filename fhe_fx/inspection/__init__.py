"""Float beside integer at every node of an encrypted part: where its error comes from."""

from fhe_fx.inspection.inspect import inspect
from fhe_fx.inspection.results import Inspection, NodeErrors, RegionErrors

__all__ = ["Inspection", "NodeErrors", "RegionErrors", "inspect"]
