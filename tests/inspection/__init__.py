"""Tests of fhe_fx.inspection."""
