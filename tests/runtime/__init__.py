"""Tests of `fhe_fx.passes`."""
