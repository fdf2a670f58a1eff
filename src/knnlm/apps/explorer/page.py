"""The explorer's page: served in parts, or as one standalone file."""

import base64
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from knnlm.apps.explorer.analysis import Analysis, read_passages

PAGE = "/explorer"
STYLES = ("page.css",)
SCRIPTS = ("mixture.js", "token_panel.js", "sliders.js", "overview.js", "chat.js", "page.js")
PAGE_PATHS = frozenset({PAGE, *(f"{PAGE}/{name}" for name in (*STYLES, *SCRIPTS))})
ANALYSIS, PASSAGES, DATASTORES = f"{PAGE}/analysis", f"{PAGE}/passages", f"{PAGE}/datastores"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The content security policy: only the page's own parts, and nothing inline."""
_SOURCES_KEPT = 5


@cache
def read_asset(name: str) -> str:
    """Return a file of the page, from the folder `static`."""
    return (Path(__file__).parent / "static" / name).read_text(encoding="utf-8")


def served_page() -> str:
    """Return the page that fetches its parts from the server."""
    styles = "".join(f'<link rel="stylesheet" href="{PAGE}/{name}">\n' for name in STYLES)
    scripts = "".join(f'<script src="{PAGE}/{name}"></script>\n' for name in SCRIPTS)
    return _fill_in(styles, "", scripts)


def standalone_page(analysis: Analysis) -> str:
    """Return a page that shows one analysis and needs neither a server nor a network.

    It includes the passages of each token's strongest neighbors.
    """
    plain = analysis.to_dict()
    rows = analysis.strongest_rows(_SOURCES_KEPT)
    for store, passages in zip(
        plain["datastores"], read_passages(analysis.lm, analysis.retrievers, rows), strict=True
    ):
        store["passages"] = passages
    style = "\n".join(read_asset(name) for name in STYLES)
    script = "\n".join(read_asset(name) for name in SCRIPTS)
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return _fill_in(
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{style}</style>\n',
        f'<script type="application/json" id="analysis">{_in_html(plain)}</script>\n',
        f"<script>{script}</script>\n",
    )


def _fill_in(head: str, data: str, scripts: str) -> str:
    page = read_asset("page.html")
    for place, content in [("head", head), ("data", data), ("scripts", scripts)]:
        before, _, after = page.partition(f"<!--{place}-->\n")
        page = before + content + after
    return page


def _in_html(plain: dict[str, Any]) -> str:
    """Return JSON that no HTML parser can take for markup."""
    return json.dumps(plain, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
