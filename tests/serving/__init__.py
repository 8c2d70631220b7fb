"""Tests of fhe_fx.serving."""
