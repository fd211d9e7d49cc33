"""The server keeps what its OpenAPI document promises, whatever a client makes of it."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from tests.serve.conftest import ColorModel, make_app

# A schema cannot say that bytes are a photo, so bytes that fit it may be refused with 422 all the same.
_EXCLUDED = [positive_data_acceptance]
# 413 is a refusal too: data that breaks the schema may be too many photos as well, which is told first.
_REFUSED = {"negative_data_rejection": {"expected-statuses": ["400", "401", "408", "413", "422"]}}
schema = schemathesis.openapi.from_asgi(
    "/openapi.json", make_app(ColorModel()), config=schemathesis.Config.from_dict({"checks": _REFUSED})
)
_SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@pytest.mark.filterwarnings("ignore")
@schema.parametrize()
@settings(max_examples=8, **_SETTINGS)
def test_every_answer_is_in_the_document(case):
    case.call_and_validate(excluded_checks=_EXCLUDED)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@schema.parametrize()
@settings(max_examples=300, **_SETTINGS)
def test_every_answer_is_in_the_document_for_many_requests(case):
    case.call_and_validate(excluded_checks=_EXCLUDED)
