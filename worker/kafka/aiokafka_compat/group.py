"""The consumer group: when its coordinator last answered, leaving it, and static membership."""

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Any, Final

from aiokafka import AIOKafkaConsumer
from aiokafka.client import ConnectionGroup
from aiokafka.errors import (
    BrokerResponseError,
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    KafkaError,
    NoError,
    NotCoordinatorForGroupError,
    for_code,
    kafka_errors,
)
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.group import JoinGroupRequest, LeaveGroupRequest, SyncGroupRequest
from aiokafka.protocol.types import Array, Boolean, Bytes, Int16, Int32, Schema, String

from worker.kafka.aiokafka_compat.metadata import inner_client
from worker.runtime.tasks import within

RETRY_S: Final = 0.1
NOT_THE_COORDINATOR = (GroupCoordinatorNotAvailableError, NotCoordinatorForGroupError, GroupLoadInProgressError)


class CoordinatorAnswers:
    """When the group's coordinator last answered a consumer, by ``clock``. Create it once the consumer has started.

    A broker that says it is not the coordinator, or not yet, has not answered; nor has one whose request fails.
    aiokafka keeps the time of the last good heartbeat to itself. Upstream would have to offer it.
    """

    def __init__(self, consumer: AIOKafkaConsumer, clock: Callable[[], float] = time.monotonic) -> None:
        self.at = clock()
        self.has_answered = False
        self.is_joining = False  # waits for a request that the coordinator answers only when every member has joined
        self._clock = clock
        coordinator = consumer._coordinator
        if coordinator is not None:
            self._send = coordinator._send_req
            coordinator._send_req = self._noted

    async def _noted(self, request: Any) -> Any:
        is_join = isinstance(request, JoinGroupRequest | SyncGroupRequest)
        self.is_joining = self.is_joining or is_join
        try:
            response = await self._send(request)
        finally:
            if is_join:
                self.is_joining = False
        # a commit's codes are its partitions', which do not count as an answer
        code = getattr(response, "error_code", GroupCoordinatorNotAvailableError.errno)
        if for_code(code) not in NOT_THE_COORDINATOR:
            self.has_answered, self.at = True, self._clock()
        return response


def background_tasks(consumer: AIOKafkaConsumer) -> dict[str, asyncio.Future[Any]]:
    """By name, the tasks that a started consumer needs as long as it lives. If one fails, aiokafka only logs it.

    Upstream would have to end the consumer, or to raise in ``getmany``.
    """
    return {
        "fetch": consumer._fetcher.error_future,
        "coordination": consumer._coordinator._coordination_task,
        "metadata": consumer._client._sync_task,
    }


async def leave_group(consumer: AIOKafkaConsumer, timeout_s: float) -> None:
    """Leaves the group on another connection than the group's own, which a join under way blocks.

    Does nothing for a static member, which keeps its place, and where no coordinator is known. Raises KafkaError, OSError
    and TimeoutError. Upstream would have to do it in ``stop``, whose LeaveGroup waits behind the JoinGroup.
    """
    coordinator = consumer._coordinator
    if coordinator is None or coordinator.coordinator_id is None or coordinator._group_instance_id is not None:
        return
    request = LeaveGroupRequest(coordinator.group_id, coordinator.member_id)
    sending = consumer._client.send(coordinator.coordinator_id, request, group=ConnectionGroup.DEFAULT)
    await within(timeout_s, sending)


# Static membership. Upstream would have to send the instance id with Heartbeat (v3) and OffsetCommit (v7), to know error
# 82, and to take it as final.


class FencedInstanceId(BrokerResponseError):  # type: ignore[misc]
    """Another member has joined the group with the same ``group_instance_id``."""

    errno = 82
    message = "FENCED_INSTANCE_ID"
    description = "Another member has joined the group with the same group instance id."


kafka_errors[FencedInstanceId.errno] = FencedInstanceId


class _DescribeGroupsResponse(Response):  # type: ignore[misc]
    API_KEY = 15
    API_VERSION = 4
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "groups",
            Array(
                ("error_code", Int16),
                ("group", String("utf-8")),
                ("state", String("utf-8")),
                ("protocol_type", String("utf-8")),
                ("protocol", String("utf-8")),
                (
                    "members",
                    Array(
                        ("member_id", String("utf-8")),
                        ("group_instance_id", String("utf-8")),
                        ("client_id", String("utf-8")),
                        ("client_host", String("utf-8")),
                        ("member_metadata", Bytes),
                        ("member_assignment", Bytes),
                    ),
                ),
                ("authorized_operations", Int32),
            ),
        ),
    )


class _DescribeGroupsStruct(RequestStruct):  # type: ignore[misc]
    API_KEY = 15
    API_VERSION = 4
    RESPONSE_TYPE = _DescribeGroupsResponse
    SCHEMA = Schema(("groups", Array(String("utf-8"))), ("include_authorized_operations", Boolean))


class DescribeGroup(Request[_DescribeGroupsStruct]):  # type: ignore[misc]
    """Asks for a group's members with their instance ids, which aiokafka's versions of it lack. Needs Kafka 2.4."""

    API_KEY = 15

    def __init__(self, group: str) -> None:
        self._group = group

    def build(self, request_struct_class: type[_DescribeGroupsStruct]) -> _DescribeGroupsStruct:
        return request_struct_class([self._group], False)


class InstanceIdTaken(KafkaError):  # type: ignore[misc]
    """Another member of the group now holds this process's ``group_instance_id``."""


class StaticMember:
    """The ``group_instance_id`` of all of a process's consumers: a member that was replaced never replaces its successor.

    Kafka gives the id to the member that joined with it last. The previous member then gets UNKNOWN_MEMBER_ID for
    heartbeats and commits, which in aiokafka carry no instance id, and aiokafka at once joins again as a new member. So
    before a consumer joins without a member id, it asks who holds the instance id. A join with a member id gets error 82.
    """

    def __init__(self, instance_id: str) -> None:
        self._instance_id = instance_id
        self._member_id = ""  # with which this process was last known to hold the id; "" if none, or not known

    def guard(self, consumer: AIOKafkaConsumer) -> None:
        """Guards a consumer that has started and not yet subscribed. Its ``getmany`` then raises InstanceIdTaken."""
        coordinator = consumer._coordinator
        rejoin = coordinator._do_rejoin_group

        async def rejoin_unless_replaced(subscription: Any) -> bool:
            if not await self._may_join(coordinator):
                return False
            try:
                is_joined: bool = await rejoin(subscription)
            except KafkaError as error:
                if FencedInstanceId.__name__ in str(error):  # aiokafka has turned it into a message
                    raise InstanceIdTaken from error
                raise
            finally:
                self._member_id = coordinator.member_id or self._member_id
            return is_joined

        coordinator._do_rejoin_group = rejoin_unless_replaced

    async def _may_join(self, coordinator: Any) -> bool:
        """False: try again. Raises InstanceIdTaken, and KafkaErrors that are not retriable."""
        if coordinator.member_id:
            return True  # the group itself refuses this member id if another has taken its place
        if self._member_id:
            try:
                holder = await self._holder(coordinator)
            except KafkaError as error:
                if not error.retriable:
                    raise
                coordinator.coordinator_dead()  # aiokafka looks it up again
                await asyncio.sleep(RETRY_S)
                return False
            if holder and holder != self._member_id:
                raise InstanceIdTaken
        # If the response to this join is lost, this process holds the instance id with a member id that it does not know.
        self._member_id = ""
        return True

    async def _holder(self, coordinator: Any) -> str:
        """The member id that has the instance id now; "" for none. Raises KafkaError."""
        try:
            response = await coordinator._send_req(DescribeGroup(coordinator.group_id))
        except NotImplementedError:  # Kafka 2.3 has static members, and does not tell who they are
            return ""
        return _holders(response).get(self._instance_id, "")


async def instance_ids(client: Any, group: str) -> Collection[str]:
    """The instance ids that members of a group hold, by an admin client; none before Kafka 2.4. Raises KafkaError."""
    try:
        return _holders(await inner_client(client).send(await client.find_coordinator(group), DescribeGroup(group)))
    except NotImplementedError:
        return ()


def _holders(response: Any) -> dict[str, str]:
    """The member ids by instance id. Raises KafkaError."""
    ((code, _, _, _, _, members, _),) = response.groups
    if (error := for_code(code)) is not NoError:
        raise error
    return {instance: member for member, instance, *_ in members if instance}
