"""Sphinx configuration: numpydoc, the pydata theme and a gallery run over `examples/`."""

import os
import sys
import warnings
from importlib import import_module
from pathlib import Path

import sciml
from sciml.methods import METHODS

HERE = Path(__file__).parent
DOMAINS = ("kernels", "layerwise", "graphs", "inverse", "inverse.seismic", "lm")

project = "sciml"
author = "the sciml developers"
project_copyright = "2026, the sciml developers"
version = release = sciml.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "numpydoc",
    "sphinx_gallery.gen_gallery",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "methods/table.rst", "**/GALLERY_HEADER.rst"]
html_theme = "pydata_sphinx_theme"
html_title = "sciml"
html_theme_options = {"show_prev_next": False, "secondary_sidebar_items": ["page-toc"]}

autosummary_generate = True
autodoc_typehints = "none"  # the numpydoc sections carry shapes as well as types
numpydoc_show_class_members = False

# The gallery runs the examples, so that every figure in the docs was drawn by the code shown.
os.environ.setdefault("MPLBACKEND", "agg")
warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"[\\/]plot_",
    "ignore_pattern": r"(^|[\\/])(?!plot_)[^\\/]*\.py$",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_memory": False,
    "plot_gallery": os.environ.get("SCIML_DOCS_GALLERY", "1") == "1",
    "min_reported_time": 5,
}


def write_pages_from_code():
    """Write the API page of each domain from its `__all__`, and the table of methods."""
    for domain in DOMAINS:
        package = import_module(f"sciml.{domain}")
        by_module: dict[str, list[str]] = {}
        for name in package.__all__:
            public = getattr(package, name)
            by_module.setdefault(getattr(public, "__module__", package.__name__), []).append(name)
        title = f"sciml.{domain}"
        lines = [title, "=" * len(title), "", package.__doc__.strip(), ""]
        lines += [f".. currentmodule:: {title}", ""]
        for module, names in by_module.items():
            heading = module.rpartition(".")[2].replace("_", " ").capitalize()
            summary = (sys.modules[module].__doc__ or "").strip().splitlines()[0]
            lines += [heading, "-" * len(heading), "", summary, ""]
            lines += [".. autosummary::", "   :toctree: generated", "   :nosignatures:", ""]
            lines += [f"   {name}" for name in sorted(names)] + [""]
        (HERE / "api" / f"{domain.replace('.', '_')}.rst").write_text(
            "\n".join(lines), encoding="utf-8"
        )

    rows = [".. list-table::", "   :header-rows: 1", "   :widths: 22 30 34 8", ""]
    rows += ["   * - Method", "     - Use it to", "     - Where (paper)", "     - Status"]
    for method in METHODS:
        module, _, name = method.where.partition(":")
        domain = module.rpartition(".")[0]
        rows += [
            f"   * - {method.name}",
            f"     - {method.use}",
            f"     - :obj:`~{domain}.{name}` ({method.paper})",
            f"     - {method.status}",
        ]
    (HERE / "methods" / "table.rst").write_text("\n".join(rows) + "\n", encoding="utf-8")


def skip_metadata_routing(app, what, name, obj, skip, options):
    """Leave out the request setters that scikit-learn adds to every estimator."""
    return skip or (name.startswith("set_") and name.endswith("_request"))


def setup(app):
    # Before Sphinx looks which pages there are.
    write_pages_from_code()
    app.connect("autodoc-skip-member", skip_metadata_routing)
