"""An example plugin of fhe_fx."""
