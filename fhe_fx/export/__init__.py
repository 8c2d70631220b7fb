"""Circuits written to disk, and read back: the client's part, the server's, and a manifest."""
