"""What researchers add: pipelines as text, rewrites by pattern."""
