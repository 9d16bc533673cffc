"""How `make docs` builds the guide and the API reference: the repository is the source, so that its links hold."""

from __future__ import annotations

import re
import shutil
import sys
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parent))

from docstrings import as_rest

import steerfm

project = "steerfm"
author = "The steerfm authors"
copyright = "the steerfm authors"
version = release = installed("steerfm")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.viewcode"]
root_doc = "README"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/*.md",
    "docs/api/*.md",
    "docs/notebooks/*.ipynb",
]
exclude_patterns = [
    ".*",
    "build",
    "dist",
    "runs",
    "maps",
    "wandb",
    "steerfm",
    "rewards",
    "recipes",
    "tests",
    "benchmarks",
]

myst_heading_anchors = 4
smartquotes = False  # what is written is shown
myst_links_external_new_tab = False
nb_execution_mode = "cache"
nb_execution_cache_path = "build/notebooks"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("State", "Times", "Values", "Images", "Indices")}
autosummary_generate = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
add_module_names = False
toc_object_entries_show_parents = "hide"
viewcode_line_numbers = True

html_theme = "furo"
html_title = f"steerfm {version}"
html_copy_source = False
html_show_sphinx = False

HOMES = {name: f"{home}.{name}" for home, names in steerfm._HOMES.items() for name in names}
ALIAS = re.compile(r"TypeAliasForwardRef\('(\w+)'\)")
GUIDE = """

```{toctree}
:hidden:
:caption: Guide
Methods <docs/methods>
Steering <docs/steering>
Fine-tuning <docs/finetuning>
The taxonomy <docs/taxonomy>
Data <docs/data>
Conditions <docs/conditions>
Pretrained models <docs/pretrained>
Memory <docs/memory>
Metrics <docs/metrics>
Rewards <docs/rewards>
Recipes <docs/recipes>
Several processes <docs/scaling>
Comparing runs <docs/comparing>
Reliability <docs/reliability>
Trust <docs/trust>
Benchmarks <docs/benchmarks>
Fine-tuning, all figures <docs/finetuning_exact>
```

```{toctree}
:hidden:
:caption: Notebooks
Three ways of sampling <docs/notebooks/comparing>
A reward of your own <docs/notebooks/own_reward>
```

```{toctree}
:hidden:
:caption: Reference
docs/api/index
CONTRIBUTING
CHANGELOG
```
"""


class PublicNames(SphinxDirective):
    """List what `from steerfm import ...` gives, each with its first line and a link."""

    def run(self) -> list[Any]:
        """Return a table made by autosummary."""
        names = "\n".join(f"   ~{HOMES[name]}" for name in sorted(HOMES, key=str.lower))
        return self.parse_text_to_nodes(f".. autosummary::\n   :nosignatures:\n\n{names}\n")


def setup(app: Sphinx) -> None:
    """Add what Sphinx lacks: our docstrings, the README as the landing page, and its second name."""
    app.add_directive("public-names", PublicNames)
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("autodoc-process-signature", _signature)
    app.connect("source-read", _landing)
    app.connect("build-finished", _index)


def _docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = as_rest(lines, HOMES)


def _signature(app: Sphinx, what: str, name: str, obj: object, options: object, arguments: str, returned: str) -> Any:
    """Name tensors by what they hold also inside unions, and leave out the arguments that a protocol has not."""
    if getattr(obj, "_is_protocol", False):
        return "", returned
    return tuple(text and ALIAS.sub(r"\1", text) for text in (arguments, returned))


def _landing(app: Sphinx, name: str, source: list[str]) -> None:
    """Give the README the table of contents that it has no room for on GitHub."""
    if name == root_doc:
        source[0] += GUIDE


def _index(app: Sphinx, error: Exception | None) -> None:
    """Let the landing page be found under the name that servers and people look for."""
    if error is None:
        shutil.copyfile(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))
