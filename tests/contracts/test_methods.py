"""The table of methods, the code and the README say the same."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

import sciml
from sciml.methods import METHODS, table

ROOT = Path(__file__).parents[2]
DOMAINS = ("graphs", "inverse", "inverse.seismic", "kernels", "layerwise", "lm")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_row_names_something_public(method):
    module, _, name = method.where.partition(":")
    public = getattr(import_module(module), name)
    assert public.__doc__
    domain = import_module(module.rpartition(".")[0])
    assert getattr(domain, name) is public
    assert name in domain.__all__


def test_names_are_unique_and_statuses_known():
    names = [method.name for method in METHODS]
    assert len(set(names)) == len(names)
    assert {method.status for method in METHODS} <= {"stable", "beta", "partial"}


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_estimator_module_has_a_row(domain):
    package = import_module(f"sciml.{domain}")
    listed = {method.where.partition(":")[0] for method in METHODS}
    for name in package.__all__:
        public = getattr(package, name)
        if inspect.isclass(public) and hasattr(public, "fit"):
            assert public.__module__ in listed, f"{name} ({public.__module__}) has no row"


def test_readme_holds_the_table():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table() in readme, "run `python -m sciml.methods README.md`"


def test_changelog_knows_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(sciml.__version__)}\b", changelog, re.MULTILINE)
