"""Open every page of the built site in headless Chromium, at the widths of a phone and of a desktop.

``python tests/browse.py docs/_build/html`` fails on a console error, a missing picture, a formula that is not set, a
dead internal link, anything fetched from elsewhere, a page wider than its window, or a search that finds nothing.
``make docs-test`` runs it on a fresh build. ``--screenshots FOLDER`` leaves a picture of each page, light and dark.

Chromium is the one on PATH, or that of the variable CHROMIUM.
"""

import argparse
import functools
import http.server
import os
import shutil
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

WIDTHS = {390: 844, 1280: 900}
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SEARCHED = "antithetic"
NO_BROWSER = """\
No Chromium was found: neither CHROMIUM nor PATH has one ({names}).
Install it with the system's package manager (`apt-get install chromium`, `brew install --cask chromium`), or give
CHROMIUM=PATH."""

# What a page says of itself once it is loaded; formulas are elements of MathML, which have a size where they are set.
LOOK = """() => {
    const size = e => { const b = e.getBoundingClientRect(); return b.width * b.height; };
    const problems = [];
    for (const image of document.images)
        if (image.checkVisibility() && !(image.complete && image.naturalWidth > 0))
            problems.push(`a picture is missing: ${image.src}`);
    for (const formula of document.querySelectorAll("math"))
        if (formula.checkVisibility() && size(formula) < 20) problems.push(`not set: ${formula.textContent}`);
        else if (formula.querySelector("merror") || formula.textContent.includes("\\\\"))
            problems.push(`not understood: ${formula.textContent}`);
    const text = [...document.querySelectorAll("article p, article li, article td")].map(
        e => [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join(""));
    for (const line of text)
        if (/\\$[^$]*[\\\\^_{][^$]*\\$|\\\\[a-z]+\\{|:math:|:class:|:func:/.test(line))
            problems.push(`left as source: ${line}`);
    const wide = document.documentElement.scrollWidth - innerWidth;
    if (wide > 1) problems.push(`${wide} pixels wider than the window`);
    return problems;
}"""


class Page(HTMLParser):
    """The links, pictures, other resources and anchors of a page."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.resources = {""}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload"):
            self.resources.append(found["href"])
        elif tag in ("img", "script", "source", "iframe") and found.get("src"):
            self.resources.append(found["src"])


def dead_links(root):
    """Links and resources that lead nowhere, and resources from elsewhere."""
    pages = {path.relative_to(root).as_posix(): Page(path.read_text(encoding="utf-8")) for path in root.rglob("*.html")}
    for name, page in sorted(pages.items()):
        for url in page.resources:
            if urlsplit(url).scheme not in ("", "data"):
                yield f"{name}: is fetched from elsewhere: {url}"
        for url in page.links + page.resources:
            if urlsplit(url).scheme:
                continue
            target, anchor = urldefrag(urljoin(name, url))
            target = unquote(urlsplit(target).path) or name
            if not (root / target).is_file():
                yield f"{name}: leads nowhere: {url}"
            elif target in pages and unquote(anchor) not in pages[target].anchors:
                yield f"{name}: no such place: {url}"


def chromium():
    """The path of the browser."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not found or not Path(found).exists():
        sys.exit(NO_BROWSER.format(names=", ".join(NAMES)))
    return found


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves the folder and says nothing."""

    def log_message(self, *args):
        pass


def serve(root):
    """A server of the folder on a free port, and its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}/"


def seen_in_browser(root, screenshots):
    """What the browser complains of."""
    from playwright.sync_api import sync_playwright

    server, address = serve(root)
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.html"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for width, height in WIDTHS.items():
            context = browser.new_context(viewport={"width": width, "height": height})
            for name in names:
                yield from look(context, address, name, width, screenshots)
            yield from search(context, address, width)
            context.close()
        browser.close()
    server.shutdown()


def look(context, address, name, width, screenshots):
    """Open one page, and turn it dark."""
    page, problems = context.new_page(), []
    page.on("console", lambda m: problems.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("response", lambda r: problems.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    page.on("request", lambda r: None if r.url.startswith((address, "data:")) else problems.append(f"asks {r.url}"))
    page.goto(address + name, wait_until="load")
    page.evaluate("document.querySelectorAll('img[loading=lazy]').forEach(i => i.loading = 'eager')")
    page.wait_for_function("[...document.images].every(i => i.complete)")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        problems += page.evaluate(LOOK)
        if screenshots:
            file = screenshots / f"{width}-{scheme}" / name.replace("/", "-").replace(".html", ".png")
            file.parent.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=file, full_page=True)
    page.close()
    yield from (f"{name} at {width}: {problem}" for problem in problems)


def search(context, address, width):
    """Search for a word as a reader would."""
    page = context.new_page()
    page.goto(f"{address}search.html?q={SEARCHED}")
    try:
        page.wait_for_selector("#search-results li a", timeout=20_000)
    except Exception as error:
        yield f"search at {width}: nothing found for {SEARCHED!r}: {str(error).splitlines()[0]}"
    page.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--screenshots", type=Path)
    given = parser.parse_args()
    pages = len(list(given.root.rglob("*.html")))
    if not pages:
        sys.exit(f"{given.root} has no pages: build them with `make docs`.")
    problems = [*dead_links(given.root), *seen_in_browser(given.root, given.screenshots)]
    print(*dict.fromkeys(problems), sep="\n")
    print(f"{pages} pages at {len(WIDTHS)} widths, light and dark: {len(problems)} problems")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
