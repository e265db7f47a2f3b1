"""Open the page of a run in a browser: it is drawn without an error and fits 400 pixels."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from bidfmkd_fast.reporting import read_facts, write_page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="neither chromium nor chromium-browser is on PATH"
)
OLD = Path(__file__).parents[1] / "old_folders" / "run"

# The page stands unchanged in a frame of a given width, whose document this page may measure.
MEASURING = """<!DOCTYPE html><body>
<iframe id="page" style="width: {width}px; height: 900px; border: 0"
srcdoc="{page}"></iframe><script>
document.getElementById("page").onload = function () {{
  const root = this.contentDocument.documentElement
  document.body.dataset.widths = root.scrollWidth + " of " + root.clientWidth
}}
</script>"""


def browse(page: Path, tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the browser on `page` without a window, with a profile of its own."""
    profile = tmp_path / "profile"
    return subprocess.run(
        [
            *(str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--user-data-dir={profile}", "--enable-logging=stderr", *options, page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )


def widths(page: str, width: int, tmp_path: Path) -> tuple[int, int]:
    """Return the width that a page takes, and the width that it has, in a frame of `width`."""
    measuring = tmp_path / "measuring.html"
    measuring.write_text(MEASURING.format(width=width, page=html.escape(page)), encoding="utf-8")
    done = browse(measuring, tmp_path, "--dump-dom")
    found = re.search(r'data-widths="(\d+) of (\d+)"', done.stdout)
    assert found is not None, done.stderr
    return int(found[1]), int(found[2])


def test_the_page_is_drawn_without_an_error(made_page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    done = browse(made_page, tmp_path, f"--screenshot={picture}", "--window-size=1280,2000")
    assert "CONSOLE" not in done.stderr, done.stderr
    with Image.open(picture) as image:
        assert image.size == (1280, 2000)
        colours = image.convert("RGB").getcolors(1 << 24)
        assert colours is not None and len(colours) > 100
        blue = sum(n for n, colour in colours if colour == (0, 114, 178))  # the bars of queries
    assert blue > 1000


def test_an_error_is_seen(tmp_path: Path) -> None:
    """Check that the test above can fail: a page that wants what its policy forbids is reported."""
    page = tmp_path / "page.html"
    page.write_text(
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'">'
        "<script>alert(1)</script>"
    )
    done = browse(page, tmp_path, f"--screenshot={tmp_path / 'page.png'}")
    assert "CONSOLE" in done.stderr


@pytest.mark.parametrize("of", ["run", "old run"])
def test_the_page_does_not_scroll_sideways(of: str, made_page: Path, tmp_path: Path) -> None:
    page = made_page
    if of == "old run":
        page = write_page(read_facts(OLD), tmp_path / "page.html", f"next: bidfmkd {'x' * 300}")
    assert widths(page.read_text(encoding="utf-8"), 400, tmp_path) == (400, 400)


def test_a_wide_page_is_noticed(tmp_path: Path) -> None:
    assert widths('<div style="width: 700px">wide</div>', 400, tmp_path)[0] >= 700
