"""Tests of fhe_fx/evaluate."""
