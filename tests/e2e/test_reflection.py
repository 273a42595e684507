"""What tools ask a server that they know nothing of."""

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from deploy.local.supervisor import Supervisor

METHODS = [
    ("inventory-0", "holdfast.inventory.v1.InventoryService", "GetAvailability"),
    ("reservation-0", "holdfast.reservation.v1.ReservationService", "Reserve"),
    ("analytics-0", "holdfast.analytics.v1.AnalyticsService", "ReportSales"),
    ("analytics-0", "holdfast.analytics.v1.FraudService", "ListCases"),
    ("analytics-0", "holdfast.analytics.v1.NotificationService", "ListAlerts"),
]


@pytest.mark.parametrize(("pod", "service", "method"), METHODS)
async def test_services_and_methods_are_found_by_name(pods: Supervisor, pod: str, service: str, method: str) -> None:
    """The service is listed; it and its methods are found, as grpcurl and ghz ask for them; others are not."""
    file = service.replace(".", "/").rsplit("/", 1)[0]
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        *(
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
            for symbol in (service, f"{service}.{method}", f"{service}.Nothing")
        ),
    ]
    async with grpc.aio.insecure_channel(pods.pod(pod).address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        listed, by_service, by_method, nothing = [answer async for answer in stub.ServerReflectionInfo(iter(asked))]
    names = {found.name for found in listed.list_services_response.service}
    expected = {one for at, one, _ in METHODS if at == pod}
    assert names == expected | {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    for answer in (by_service, by_method):
        files = [FileDescriptorProto.FromString(f) for f in answer.file_descriptor_response.file_descriptor_proto]
        assert any(found.name.startswith(file) for found in files)
    assert nothing.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
