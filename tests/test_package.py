"""Metadata, license, citation and changelog of the package."""

import ast
import hashlib
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml

from tljax.runtime.packages import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_the_license_file_matches_the_metadata():
    assert (PROJECT["license"], PROJECT["license-files"]) == ("Apache-2.0", ["LICENSE"])
    text = (ROOT / "LICENSE").read_bytes()
    # Of https://www.apache.org/licenses/LICENSE-2.0.txt, unchanged.
    digest = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert hashlib.sha256(text).hexdigest() == digest


def test_the_citation_matches_the_metadata():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "authors"} < citation.keys()
    same = {"title": "name", "version": "version", "license": "license", "abstract": "description"}
    assert {ours: citation[ours] for ours in same} == {
        ours: PROJECT[theirs] for ours, theirs in same.items()
    }


def test_the_changelog_lists_unreleased_changes_above_this_version():
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.findall(r"^## (\S+)", text, re.MULTILINE)[:2] == ["Unreleased", PROJECT["version"]]


def test_every_optional_package_is_in_the_extra_that_messages_name():
    declared = PROJECT["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert package in {re.split(r"[^\w-]", line)[0] for line in declared[extra]}


def test_every_package_imported_at_the_top_of_a_module_is_declared():
    """Optional packages and reference implementations are imported inside functions."""
    declared = {re.split(r"[^\w-]", line)[0].replace("_", "-") for line in PROJECT["dependencies"]}
    providers = packages_distributions()
    for path in (ROOT / "tljax").rglob("*.py"):
        body = ast.parse(path.read_text("utf-8")).body
        names = {
            alias.name for node in body if isinstance(node, ast.Import) for alias in node.names
        }
        names |= {node.module or "" for node in body if isinstance(node, ast.ImportFrom)}
        for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"tljax"}:
            owners = {owner.lower().replace("_", "-") for owner in providers[top]}
            assert owners & declared, f"{path.name} imports {top}"
