"""The page of ``entrgi serve``: the report's template, style and program, with a form in front and live data behind."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
from importlib import resources
from typing import Any

from .. import report

# The page speaks to its own server and to nobody else. Of scripts, only its own one runs.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)
_TITLE = {"title": "EntRGi: watch it steer", "heading": report.HEADING}


def build(about: dict[str, Any]) -> str:
    """The HTML of ``/``.

    Args:
        about: what is served, plain JSON values: "model", "rewards" (names), "methods" (labels by key), "defaults" and
            "limits" of the settings that have a slider, "examples" (prompts), "note" and "key" (whether a key is asked
            for). They reach the document as text alone.
    """
    return report.build_page(
        _TITLE | about,
        _asset("form.html"),
        policy=html.escape(_policy(), quote=False),
        first="results",
        results="",
        style=report.page_style() + _asset("live.css"),
        script=_script(),
    )


def headers() -> dict[str, str]:
    """HTTP headers that go with the page: its content security policy, which forbids to frame it too."""
    return {"Content-Security-Policy": f"{_policy()}; frame-ancestors 'none'"}


def report_template() -> str:
    """A report without its data. The page puts a finished comparison in, in the browser, before it saves it."""
    return report.build_page({"title": report.TITLE, "heading": report.HEADING})


@functools.cache
def _policy() -> str:
    # The browser hashes all that stands between the tags: in the template, a line break before and after.
    digest = hashlib.sha256(f"\n{_script()}\n".encode()).digest()
    return _POLICY.format(digest=base64.b64encode(digest).decode())


def _script() -> str:
    return report.page_script() + "\n" + _asset("live.js")


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
