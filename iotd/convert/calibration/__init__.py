"""What a checkpoint is calibrated on: token sequences of the project's own texts and of made-up homes, and pictures.

`fit/` and `held/` have the texts: what weights are fitted to, and what the result is measured on. They share no topic.
"""

from iotd.convert.calibration.own import read_lines
from iotd.convert.calibration.pictures import pictures
from iotd.convert.calibration.sequences import KINDS, OWN, Sequence, Texts, sequences

__all__ = ["KINDS", "OWN", "Sequence", "Texts", "pictures", "read_lines", "sequences"]
