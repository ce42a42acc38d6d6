"""What aiokafka 0.14 lacks: requests of our own, and what is done to its private attributes.

Each item says why it is here, and what upstream would have to do for it to go.
"""

import asyncio
from typing import Any, Final

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import BrokerResponseError, KafkaError, NoError, for_code, kafka_errors
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Array, Boolean, Bytes, Int16, Int32, Schema, String

RETRY_S: Final = 0.1


# Upstream would have to end the consumer, or to raise in ``getmany``, where a task of its own fails.


def background_tasks(consumer: AIOKafkaConsumer) -> "dict[str, asyncio.Future[Any]]":
    """By name, the tasks of a started consumer that last as long as it does; that one has failed aiokafka only logs."""
    return {
        "fetch": consumer._fetcher.error_future,
        "coordination": consumer._coordinator._coordination_task,
        "metadata": consumer._client._sync_task,
    }


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
    """A group's members with their instance ids, which aiokafka's versions of this request do not tell. Kafka 2.4."""

    API_KEY = 15

    def __init__(self, group: str) -> None:
        self._group = group

    def build(self, request_struct_class: type[_DescribeGroupsStruct]) -> _DescribeGroupsStruct:
        return request_struct_class([self._group], False)


class InstanceIdTaken(KafkaError):  # type: ignore[misc]
    """Another member of the group holds this process's ``group_instance_id`` by now."""


class StaticMember:
    """A ``group_instance_id`` through all of a process's consumers: who was replaced never replaces its successor.

    Kafka gives the id to the member that joined with it last. The one before is told UNKNOWN_MEMBER_ID by heartbeats and
    commits, which with aiokafka carry no instance id, and aiokafka joins again at once, as a newcomer. So before a join
    that would be a newcomer's, this asks who holds the id. Error 82, the group's answer to other joins, needs no question.
    """

    def __init__(self, instance_id: str) -> None:
        self._instance_id = instance_id
        self._member_id = ""  # as which this process was last known to hold the id; "" for none, or while that is open

    def guard(self, consumer: AIOKafkaConsumer) -> None:
        """Of a consumer that is started, and has subscribed to nothing yet. It then meets InstanceIdTaken in ``getmany``."""
        coordinator = consumer._coordinator
        rejoin = coordinator._do_rejoin_group

        async def unless_replaced(subscription: Any) -> bool:
            if not await self._may_join(coordinator):
                return False
            try:
                is_joined: bool = await rejoin(subscription)
            except KafkaError as error:
                if FencedInstanceId.__name__ in str(error):  # aiokafka has made its name a text
                    raise InstanceIdTaken from error
                raise
            finally:
                self._member_id = coordinator.member_id or self._member_id
            return is_joined

        coordinator._do_rejoin_group = unless_replaced

    async def _may_join(self, coordinator: Any) -> bool:
        """False: to be tried again. Raises InstanceIdTaken."""
        if coordinator.member_id:
            return True  # as who it is: the group refuses it if another has taken its place
        if self._member_id:
            try:
                holder = await self._holder(coordinator)
            except KafkaError as error:
                if not error.retriable:
                    raise
                coordinator.coordinator_dead()  # it is looked up anew
                await asyncio.sleep(RETRY_S)
                return False
            if holder and holder != self._member_id:
                raise InstanceIdTaken
        # If the answer to this join is lost, it is this process that holds the id under a name that it does not know.
        self._member_id = ""
        return True

    async def _holder(self, coordinator: Any) -> str:
        """The member id that has the instance id now; "" for none. Raises KafkaError."""
        try:
            response = await coordinator._send_req(DescribeGroup(coordinator.group_id))
        except NotImplementedError:  # Kafka 2.3: it has static members, and does not tell who they are
            return ""
        ((code, _, _, _, _, members, _),) = response.groups
        if (error := for_code(code)) is not NoError:
            raise error
        return next((member for member, instance, *_ in members if instance == self._instance_id), "")
