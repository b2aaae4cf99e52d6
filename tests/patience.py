"""How long a test waits for what is to come."""

PATIENCE_S = 600.0
"""No wait lasts so long but one in vain. That says nothing of speed: a busy machine may take a minute for anything."""
