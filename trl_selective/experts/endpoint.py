"""A client for endpoints that speak OpenAI's protocol, and what to tell of a request that failed."""

import os
from typing import Any


def endpoint_client(base_url: str | None, *, timeout: float, max_retries: int, sends_key: bool = True) -> Any:
    """An `openai.OpenAI` for an endpoint that speaks its protocol. The key, if it wants one, is read from the variable OPENAI_API_KEY.

    Redirects are not followed: they would carry prompts to a place that nobody named.

    Args:
        base_url: such as "http://localhost:8000/v1".
        timeout: seconds that a request may take.
        max_retries: of a request that fails for a reason that may pass, with pauses that grow.
        sends_key: whether the endpoint gets the key.

    Raises:
        ImportError: if the package `openai` is missing.
    """
    try:
        from openai import DefaultHttpxClient, OpenAI
    except ImportError as error:
        raise ImportError(
            'Endpoints need the package openai, which is not installed: pip install "trl-selective[server]"'
        ) from error
    return OpenAI(
        base_url=base_url,
        # The library demands one, also for servers that do not.
        api_key=(sends_key and os.environ.get("OPENAI_API_KEY")) or "no-key",
        timeout=timeout,
        max_retries=max_retries,
        http_client=DefaultHttpxClient(follow_redirects=False),
    )


def failure_reason(error: Exception, client: Any, url_setting: str) -> str:
    """Why a request failed, in words that may be shown: a server may quote the key in its answer. Raise what you make of it `from None`, since
    a traceback would show the error itself.

    Args:
        error: of the library.
        client: as `endpoint_client` returns it.
        url_setting: the setting that a redirect has to be copied to.
    """
    reason = f"{type(error).__name__}: {error}".removesuffix(".") + "."
    response = getattr(error, "response", None)
    if response is not None and response.has_redirect_location:
        reason += f" It redirects to {response.headers['location']!r}, which is not followed: if that is right, give it as {url_setting}."
    return reason.replace(client.api_key, "<key>")
