"""Thousands of valid and invalid requests, generated from the server's own schema: none may cause an internal error."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode

from tests.serve.conftest import RunningServer

EXAMPLES = 350
"""Requests of each kind to each endpoint, about."""


@pytest.mark.slow
def test_generated_requests_never_give_status_500(server: RunningServer) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    posts = [operation for operation in operations if operation.method.upper() == "POST"]
    assert {operation.path for operation in posts} == {
        "/chat",
        "/v1/chat/completions",
        "/v1/audio/speech",
        "/v1/audio/transcriptions",
        "/v1/responses",
    }
    answered: Counter[int] = Counter()
    with requests.Session() as session:
        for operation in posts:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

                def send(case: Any) -> None:
                    if isinstance(case.body, dict) and answered.total() % 3:
                        # A generated model name would be refused before anything else is checked.
                        case.body["model"] = "small"
                    response = case.call(session=session, timeout=60)
                    answered[response.status_code] += 1
                    assert response.status_code < 500, response.text
                    if response.status_code >= 400:
                        error = response.json()["error"]
                        assert error["message"]
                        assert error["type"] == "invalid_request_error"

                quiet = settings(
                    max_examples=EXAMPLES,
                    deadline=None,
                    derandomize=True,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                )
                quiet(given(case=operation.as_strategy(generation_mode=mode))(send))()
    assert answered.total() >= 2000
    assert answered[200] >= 20
    assert answered[400] >= 500
    server.wait_until_idle()
    assert server.service.engine.num_active == 0
    assert (
        server.call("/v1/chat/completions", {"model": "small", "messages": [{"role": "user", "content": "a"}]})[0]
        == 200
    )
