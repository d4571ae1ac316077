"""What a run is: its folder, configuration, log, checkpoints, panel, pictures and films.

Importing this package loads no torch, TensorBoard or rich; the functions that need them import them.
"""

from runs.config import Knob, UserError
from runs.folder import Run

__all__ = ["Knob", "Run", "UserError"]
