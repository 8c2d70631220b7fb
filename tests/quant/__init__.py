"""Tests of `fhe_fx.quant`."""
