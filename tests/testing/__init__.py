"""What a pass is tested with."""
