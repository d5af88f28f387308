"""Refuse every installation but `pip install -e .`.

A wheel would put the packages `common` and `studies` beside everybody else's, and leave out the launchers,
the YAML files and the data that the scripts find beside themselves.
"""

import sys

from setuptools import setup
from setuptools.command.build_py import build_py


class EditableOnly(build_py):
    def run(self):
        if not self.editable_mode:
            sys.exit(
                "error: only an editable installation works: pip install -e . (or no installation at all)"
            )
        super().run()


setup(cmdclass={"build_py": EditableOnly})
