"""Pages and pictures of programs: folded by module, step by step through the passes."""

from fhe_fx.report.page.drawing import LEVELS, drawing, to_svg
from fhe_fx.report.page.page import Measure, to_page
from fhe_fx.report.page.snapshots import read_snapshots

__all__ = ["LEVELS", "Measure", "drawing", "read_snapshots", "to_page", "to_svg"]
