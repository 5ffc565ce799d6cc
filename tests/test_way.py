"""The drawing way.svg matches its script and names files that exist."""

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "examples" / "pictures"


def test_the_drawing_is_the_output_of_its_script():
    drawn = runpy.run_path(str(PICTURES / "way.py"))["drawing"]()
    assert (PICTURES / "way.svg").read_text("utf-8") == drawn
    ET.fromstring(drawn)


def test_every_file_named_in_the_drawing_exists():
    text = (PICTURES / "way.svg").read_text("utf-8")
    files = re.findall(r"\w+/\w+\.py", text)
    assert len(files) >= 8
    assert [name for name in files if not (ROOT / "tljax" / name).exists()] == []
