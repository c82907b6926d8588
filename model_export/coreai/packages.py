"""Whether Core AI's packages are installed, and how to get them."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from fastvlm.common.errors import UserError

PACKAGES = ("coreai-core", "coreai-torch")


def check_installed() -> None:
    """Raise UserError where a package of the extra `coreai` is missing, with how to install it."""
    missing = []
    for name in PACKAGES:
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        raise UserError(f"Core AI: {', '.join(missing)}: not installed: {remedy()}")


def remedy() -> str:
    """How to install them here, or that they can't be."""
    machine = platform.machine()
    if (sys.platform, machine) not in (("linux", "x86_64"), ("darwin", "arm64")):
        return (
            f"Apple publishes them for Linux on x86-64 and for macOS 26 on Apple silicon alone, not for"
            f" {platform.system()} on {machine}: export there"
        )
    return "`make setup EXTRAS=coreai`, or `pip install '.[coreai]'`, in a checkout of this project"
