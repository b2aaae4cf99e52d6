"""Operations: logs, systemd, readings of the board, checks before the start, measurements."""
