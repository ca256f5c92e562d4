"""The recall experiment's table and plot, drawn from its JSON alone."""

import json
import pathlib

from experiments.recall_settings import PAPER_TABLE, Setting
def report(out, made, preset): pass
