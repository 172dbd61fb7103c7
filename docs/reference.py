"""Build the reference of all public names from their docstrings: ``python docs/reference.py FOLDER``, or ``make docs``.

A warning, of a name that does not resolve or an annotation that cannot be read, is an error.
"""

import sys
import warnings
from pathlib import Path

import pdoc

import lte


def build(folder: Path) -> None:
    for name in lte.__all__:
        getattr(lte, name)  # public names load when first used
    pdoc.render.configure(docformat="google", show_source=False, footer_text=f"lte {lte.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc("lte", "!lte.", output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
