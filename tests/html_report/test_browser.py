"""The page in a real browser, where there is one: nothing is said, nothing is asked for."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from vitcompress.html_report import write_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]


@pytest.fixture
def visit(tmp_path):
    """Open a page and return what the browser logged, asked for and showed."""

    def visit(page, width):
        shot, log = tmp_path / "shot.png", tmp_path / "net.json"
        found = subprocess.run(
            [
                *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"),
                *("--disable-background-networking", "--disable-component-update"),
                "--host-resolver-rules=MAP * ~NOTFOUND",  # nor may the browser's own leave
                *("--no-first-run", "--enable-logging=stderr", "--hide-scrollbars"),
                *(f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}"),
                *(f"--window-size={width},3000", f"--screenshot={shot}", page.as_uri()),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        said = [line for line in found.stderr.splitlines() if "CONSOLE" in line]
        # What the browser asks for itself has no origin.
        requests = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
        urls = [
            request["url"]
            for request in requests
            if request.get("initiator", "not an origin") != "not an origin"
        ]
        return said, urls, np.asarray(Image.open(shot).convert("RGB"))

    return visit


def test_a_page_that_speaks_and_asks_is_found_out(visit, tmp_path):
    page = tmp_path / "loud.html"
    page.write_text(
        '<script>console.log("hello")</script><img src="http://example.invalid/a.png">'
    )

    said, urls, _ = visit(page, 500)

    assert len(said) >= 1
    assert urls == ["http://example.invalid/a.png"]


@pytest.mark.parametrize("width", [500, 1280])
@pytest.mark.parametrize("which", ["swept", "named"])
def test_page_is_quiet_and_alone(request, visit, tmp_path, which, width):
    page = tmp_path / "report.html"
    write_report(request.getfixturevalue(which), page)

    said, urls, picture = visit(page, width)

    assert said == []
    assert urls == []
    # The drawings are there in their colours, and nothing reaches the right edge.
    blue = (np.abs(picture.astype(int) - (0x1F, 0x6F, 0xB2)).sum(axis=-1) < 12).sum()
    assert blue > 500
    assert np.unique(picture[:, -4:].reshape(-1, 3), axis=0).tolist() == [[255, 255, 255]]
