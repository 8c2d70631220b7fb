"""Tests of `fhe_fx.ir`."""
