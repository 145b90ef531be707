"""A client of OpenAI-compatible HTTP endpoints: JSON there and back, tried again where another try may help."""

from __future__ import annotations

import http.client
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import UsageError

_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT = 60.0


class Endpoint:
    """One server.

    Args:
        url: up to and including /v1.
        key: sent as a bearer token.
        timeout: seconds for one request.
        retries: tries after the first.
        sleep: waits; replaced in tests.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise UsageError(f"url={url!r}: expected http:// or https://")
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._timeout, self._retries, self._sleep = timeout, retries, sleep

    def post(self, path: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """Send JSON, return the JSON object that answers.

        Raises:
            UsageError: a refusal, or no answer after all tries; the message holds the server's own words.
        """
        request = urllib.request.Request(
            self.url + path, data=json.dumps(content).encode("utf-8"), headers=self._headers, method="POST"
        )
        reason, wait = "", 0.0
        for attempt in range(self._retries + 1):
            if attempt:
                self._sleep(wait)
            wait = min(_LONGEST_WAIT, 2.0**attempt) * (0.5 + random.random() / 2)
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as response:
                    answer = json.loads(response.read())
                if isinstance(answer, dict):
                    return answer
                reason = f"the answer is {type(answer).__name__}, not a JSON object"
            except urllib.error.HTTPError as error:
                words = error.read().decode("utf-8", "replace").strip()[:300]
                reason = f"HTTP {error.code} {error.reason}: {words}"
                if error.code not in _AGAIN:
                    raise UsageError(f"{self.url}{path} refused the request: {reason}") from None
                wait = _retry_after(error.headers.get("Retry-After"), wait)
            except (OSError, http.client.HTTPException, ValueError) as error:  # refused, timed out, cut off, not JSON
                reason = f"{type(error).__name__}: {getattr(error, 'reason', None) or error}"
        raise UsageError(
            f"{self.url}{path} did not answer in {self._retries + 1} tries ({reason}); what was judged is kept: "
            "the same command goes on"
        )


def _retry_after(value: str | None, otherwise: float) -> float:
    """Seconds that the server asks to wait, within reason; dates are not read."""
    try:
        return min(_LONGEST_WAIT, max(0.0, float(value or "")))
    except ValueError:
        return otherwise
