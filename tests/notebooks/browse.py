"""Read notebooks in JupyterLab as a learner does: opened in Chromium, run from the menu, a slider moved, photographed.

    python -m tests.notebooks.browse 04 --out shots     opens 04, Run > Run All Cells, moves its first slider
    python -m tests.notebooks.browse 00 04              without --out nothing is kept
    python -m tests.notebooks.browse 03 --out shots --whole   every screen from top to bottom, not only the pictures

Prints one JSON line a notebook: cells run, seconds they took, errors seen, whether the slider's picture changed, the
screenshots. The exit status is 1 if a cell failed or a slider changed nothing. Chromium has to be installed; it is not
downloaded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
LONG = 3_600_000  # milliseconds: notebooks train, and a machine may be busy
SETTINGS = {
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
}
UNFINISHED = (
    "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].filter(e => e.innerText.includes('*')).length"
)


@contextmanager
def lab(folder: Path) -> Iterator[str]:
    """JupyterLab over `folder`, on the loopback, without a token, with every cell of a notebook on the page."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as home:
        for name, values in SETTINGS.items():
            file = Path(home) / "settings" / name
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps(values), encoding="utf-8")
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
        command += ["--ip=127.0.0.1", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
        command += [f"--LabApp.user_settings_dir={home}/settings", f"--LabApp.workspaces_dir={home}/workspaces"]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(f"http://127.0.0.1:{port}/api", server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(60)


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Until the server answers."""
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit(f"JupyterLab left with status {server.returncode}")
        try:
            with urllib.request.urlopen(url):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("JupyterLab did not answer in two minutes")


def read(page: Any, url: str, name: str, out: Path | None, whole: bool) -> dict[str, Any]:
    """Open a notebook, run it from the menu, move its first slider; what was seen."""
    page.goto(f"{url}/lab/tree/{name}?reset", timeout=120_000)
    page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell", timeout=120_000)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=120_000)
    for _ in range(12):  # a kernel that has just said it is idle may not be connected to the page yet
        page.click("li.lm-MenuBar-item:has-text('Run')")
        page.click("li.lm-Menu-item[data-command='runmenu:run-all']")
        began = time.monotonic()
        page.wait_for_timeout(5000)
        if page.locator(".jp-Dialog").count():  # then it asks which kernel to take
            page.click(".jp-Dialog button.jp-mod-accept")
            page.wait_for_timeout(3000)
        if page.evaluate(f"{UNFINISHED} > 0"):
            break
    page.wait_for_function(f"{UNFINISHED} === 0", timeout=LONG)
    cells = page.locator(".jp-CodeCell").count()  # now: before the run not all of them are on the page
    seconds = round(time.monotonic() - began)
    found: dict[str, Any] = {"notebook": name, "cells": cells, "seconds": seconds, "shots": []}
    found["errors"] = page.locator(
        ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr'] .ansi-red-fg"
    ).count()
    found["errors"] += page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").count()
    pictures = page.locator(".jp-OutputArea-output img, .jp-OutputArea-output svg")
    found["pictures"] = pictures.count()
    slider = page.locator(".widget-slider .noUi-handle").first
    if page.locator(".widget-slider .noUi-handle").count():
        slider.scroll_into_view_if_needed()
        area = page.locator(".jp-CodeCell:has(.widget-slider)").first.locator(".jp-OutputArea").first
        before = area.inner_html()
        slider.focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        page.wait_for_function(
            "before => document.querySelector('.jp-CodeCell:has(.widget-slider) .jp-OutputArea').innerHTML !== before",
            arg=before,
        )
        page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=120_000)
        page.wait_for_timeout(1500)
        found["slider_changed"] = area.inner_html() != before
        shoot(page, slider, out, f"{name[:2]}-widget", found)
    if whole and out:
        scroll_through(page, out, name[:2], found)
    else:
        for number in range(pictures.count()):
            shoot(page, pictures.nth(number), out, f"{name[:2]}-{number:02d}", found)
    return found


def scroll_through(page: Any, out: Path, name: str, found: dict[str, Any]) -> None:
    """Every screen of the notebook, from top to bottom, each beginning a little above the end of the one before."""
    view = page.locator(".jp-Notebook .jp-WindowedPanel-outer").first
    top, bottom = 0, 1
    while top < bottom:
        step, bottom = view.evaluate(
            "(e, top) => { e.scrollTop = top; return [e.clientHeight - 60, e.scrollHeight]; }", top
        )
        page.wait_for_timeout(300)
        page.screenshot(path=out / f"{name}-{len(found['shots']):02d}.png")
        found["shots"].append(f"{name}-{len(found['shots']):02d}.png")
        top += step
        if top + 60 >= bottom:
            break


def shoot(page: Any, element: Any, out: Path | None, name: str, found: dict[str, Any]) -> None:
    """A picture of the window with `element` in its middle."""
    if out:
        element.evaluate("e => e.scrollIntoView({block: 'center'})")
        page.wait_for_timeout(300)
        page.screenshot(path=out / f"{name}.png")
        found["shots"].append(f"{name}.png")


def main() -> int:
    """Read the chosen notebooks; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="beginnings of notebooks' names: 00 04")
    parser.add_argument("--out", type=Path, help="a folder for screenshots")
    parser.add_argument("--whole", action="store_true", help="with --out: every screen from top to bottom")
    options = parser.parse_args()
    if not (chromium := shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")):
        raise SystemExit("Chromium is not installed (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    bad = 0
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(FOLDER, copy, dirs_exist_ok=True)
        with lab(Path(copy)) as url, sync_playwright() as play:
            browser = play.chromium.launch(
                executable_path=chromium, args=["--no-sandbox", "--disable-background-networking"]
            )
            for path in sorted(p for p in FOLDER.glob("*.ipynb") if p.name.startswith(tuple(options.names))):
                page = browser.new_page(viewport={"width": 1100, "height": 760})
                found = read(page, url, path.name, options.out, options.whole)
                print(json.dumps(found), flush=True)
                bad += bool(found["errors"]) or found.get("slider_changed") is False
                page.close()
            browser.close()
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
