"""A yardstick for conversion: small real language models from PyPI, without the grid that they were shipped on."""
