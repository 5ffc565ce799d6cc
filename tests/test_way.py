"""The drawings of the README are what their scripts draw, and say what is there."""

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "examples" / "pictures"


def test_the_way_of_a_photograph_is_what_its_script_draws():
    drawn = runpy.run_path(str(PICTURES / "way.py"))["drawing"]()
    assert (PICTURES / "way.svg").read_text("utf-8") == drawn
    ET.fromstring(drawn)


def test_the_way_of_a_photograph_names_files_that_exist():
    text = (PICTURES / "way.svg").read_text("utf-8")
    named = re.findall(r"\w+/\w+\.py", text)
    assert len(named) >= 8
    assert [name for name in named if not (ROOT / "tljax" / name).exists()] == []
