"""What a circuit costs, before and after it is compiled."""

from fhe_fx.report.cost import RegionCost, Report, report_on

__all__ = ["RegionCost", "Report", "report_on"]
