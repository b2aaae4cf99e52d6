"""What a checkpoint is calibrated on: token sequences of the project's own texts and of made-up homes, and pictures.

`fit/` and `held/` have the texts: what weights are fitted to, and what the result is measured on. They share no topic.
"""

from iotd.convert.samples.own import read_lines
from iotd.convert.samples.pictures import pictures
from iotd.convert.samples.sequences import KINDS, OWN, Sequence, Texts, sequences

__all__ = ["KINDS", "OWN", "Sequence", "Texts", "pictures", "read_lines", "sequences"]
