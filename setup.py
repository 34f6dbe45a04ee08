"""Adds the autoload line (a `.pth` file) to wheels and editable installs; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

AUTOLOAD = "lceval-autoload.pth"


class BuildWithAutoload(build_py):
    """build_py that also puts the `.pth` file at the root of the wheel, which becomes site-packages."""

    def run(self) -> None:
        super().run()
        root = self.build_lib
        if self.editable_mode:
            # An editable wheel leaves build_lib out; install_lib is the folder that it is packed from.
            root = self.get_finalized_command("install").install_lib
        self.copy_file(AUTOLOAD, str(Path(root) / AUTOLOAD))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, str(Path(self.build_lib) / AUTOLOAD)]


setup(cmdclass={"build_py": BuildWithAutoload})
