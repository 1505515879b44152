"""What a wave makes of Prefect's refusals, and of options that its runs would not hear of."""

from __future__ import annotations

import httpx
import pytest

from tasks.children import refusal


def answer(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://prefect/api/deployments/1/create_flow_run")
    return httpx.HTTPStatusError("", request=request, response=httpx.Response(status, text="'toolkit' is required"))


@pytest.mark.parametrize("status", [404, 409, 422])
def test_what_prefect_refuses_it_is_not_asked_for_again(status: int) -> None:
    words = refusal(answer(status))
    assert str(status) in words and "'toolkit' is required" in words


@pytest.mark.parametrize("error", [answer(500), answer(503), answer(429), httpx.ConnectError("gone")])
def test_a_server_that_is_busy_or_gone_is_asked_again(error: Exception) -> None:
    assert refusal(error) == ""
