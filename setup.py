"""Puts the autoload line where Python reads it at start-up; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

AUTOLOAD = "lceval-autoload.pth"


class BuildWithAutoload(build_py):
    """build_py that also puts the `.pth` file at the root of the wheel."""

    def run(self) -> None:
        super().run()
        self.copy_file(AUTOLOAD, str(Path(self.build_lib) / AUTOLOAD))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib) / AUTOLOAD)]


setup(cmdclass={"build_py": BuildWithAutoload})
