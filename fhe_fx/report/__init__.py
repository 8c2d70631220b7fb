"""What a circuit costs, before and after it is compiled."""

from fhe_fx.report.cost import Report, report_on

__all__ = ["Report", "report_on"]
