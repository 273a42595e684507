"""What the documents say to type is what the contracts take."""

import re
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from holdfast.analytics.v1 import analytics_pb2, fraud_pb2, notification_pb2  # noqa: F401 - known to the pool
from holdfast.inventory.v1 import inventory_pb2  # noqa: F401
from holdfast.reservation.v1 import reservation_pb2  # noqa: F401

ROOT = Path(__file__).parents[2]
CALL = re.compile(r"grpcurl -plaintext -d '(\{.*?\})'[\s\\]+127\.0\.0\.1:PORT\s+([\w.]+)/(\w+)", re.DOTALL)
CALLS = [
    (file.name, *call)
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for call in CALL.findall(file.read_text())
]


@pytest.mark.parametrize(
    ("content", "service", "method"), [call[1:] for call in CALLS], ids=[f"{call[0]}-{call[3]}" for call in CALLS]
)
def test_a_documented_call_is_one_of_the_contract(content: str, service: str, method: str) -> None:
    """The service has the method, and the request takes the content; "..." stands for what is left out."""
    found = descriptor_pool.Default().FindServiceByName(service).methods_by_name[method]
    request = message_factory.GetMessageClass(found.input_type)()
    json_format.Parse(re.sub(r"\[ \.\.\. \]", "[]", content), request)


def test_there_are_documented_calls() -> None:
    """The search finds them."""
    assert {"README.md", "fraud.md", "notifications.md"} <= {file for file, *_ in CALLS}
