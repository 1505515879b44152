"""Which steps make a mode, in order. One file a mode."""
