"""Old name of studies/dia_pangu/warm_llm.py, as long as pruning's scripts call it."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[1] / "studies/dia_pangu/warm_llm.py"), run_name=__name__)
