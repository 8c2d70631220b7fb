"""Calibration data, observed ranges, and which elements share a scale."""
