"""scikit-build-core, with the sources of the library in the sdist.

The package lies inside the library's tree, and an sdist holds what lies below the package: the tree is copied to
`library` for as long as the sdist is made. CMakeLists.txt takes the library from there where it is, else from the tree
around.
"""

import pathlib
import shutil

from scikit_build_core.build import *  # noqa: F403  The other hooks as they are.
from scikit_build_core import build

HERE = pathlib.Path(__file__).resolve().parent
TREE = HERE.parents[1]
PARTS = ("CMakeLists.txt", "LICENSE", "README.md", "api", "kernels", "memory", "runtime")


def build_sdist(sdist_directory, config_settings=None):
    library = HERE / "library"
    if library.exists():  # an sdist of what was an sdist
        return build.build_sdist(sdist_directory, config_settings)
    try:
        library.mkdir()
        for part in PARTS:
            if (TREE / part).is_dir():
                shutil.copytree(TREE / part, library / part, ignore=shutil.ignore_patterns("python", "__pycache__"))
            else:
                shutil.copy2(TREE / part, library / part)
        return build.build_sdist(sdist_directory, config_settings)
    finally:
        shutil.rmtree(library, ignore_errors=True)
