"""Lets the tests of this folder import the models' configurations and start ranks."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "models"), str(TESTS / "distributed" / "testing")]
