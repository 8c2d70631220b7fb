"""Tests of `fhe_fx.backends`."""
