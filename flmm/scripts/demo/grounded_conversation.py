"""Upstream's name of the demo: see grounded_conversation_demo.py."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).with_name("grounded_conversation_demo.py")), run_name=__name__)
