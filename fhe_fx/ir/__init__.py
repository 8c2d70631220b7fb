"""The dialect: operators, value types, programs, printer and verifier."""

from fhe_fx.ir.build import Builder, elementwise
from fhe_fx.ir.program import Note, Program
from fhe_fx.ir.types import ValueType
from fhe_fx.ir.verify import verify

__all__ = ["Builder", "Note", "Program", "ValueType", "elementwise", "verify"]
