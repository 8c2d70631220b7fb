"""For passes of one's own: pipelines as text and files, and rewrites by pattern."""

from fhe_fx.extend.rewrite import Match, Rewrite
from fhe_fx.extend.text import make_pass, parse_pipeline, read_pipeline

__all__ = ["Match", "Rewrite", "make_pass", "parse_pipeline", "read_pipeline"]
