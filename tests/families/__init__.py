"""Parts of many models, lowered stage by stage."""
