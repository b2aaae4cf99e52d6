"""`python -m iotd` is the command `iotd`."""

from iotd.cli import main

if __name__ == "__main__":
    main()
