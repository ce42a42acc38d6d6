"""Values that must be refused: by the chart's schema, by the chart's own sentences, or by the API server."""

from typing import NamedTuple


class WrongValue(NamedTuple):
    by: str  # "schema", "chart" or "server"
    says: str  # a part of what is said
    values: tuple[str, ...]  # as `helm --set-json` takes them


WRONG = [
    WrongValue("schema", "/replicas", ('replicas="three"',)),
    WrongValue("schema", "replica", ("replica=3",)),
    WrongValue("schema", "/device", ('device="tpu"',)),
    WrongValue("schema", "'bootstrap_server'", ('settings.bootstrap_server="kafka:9092"',)),
    WrongValue("schema", "/settings/delivery", ('settings.delivery="once"',)),
    WrongValue("schema", "/settings/linger_ms", ('settings.linger_ms="soon"',)),
    WrongValue("chart", "is a secret", ('settings.sasl_password="hunter2"',)),
    WrongValue("chart", "use a Job", ('settings.until="now"',)),
    WrongValue("schema", "/image/tag", ('image.tag="latest"',)),
    WrongValue("schema", "/files/http_token", ('files.http_token={"secret":"http"}',)),
    WrongValue("chart", "secrets under", ('env.HF_TOKEN="hf_secret"',)),
    WrongValue("schema", "/networkPolicy/brokers/ports", ('networkPolicy.brokers.ports=[{"port":70000}]',)),
    WrongValue("schema", "/networkPolicy/brokers/to", ("networkPolicy.brokers.to=[]",)),  # empty would be anywhere
    WrongValue("schema", "/podDisruptionBudget/maxUnavailable", ("podDisruptionBudget.maxUnavailable=0",)),
    WrongValue("schema", "/podDisruptionBudget/maxUnavailable", ('podDisruptionBudget.maxUnavailable="0%"',)),
    WrongValue("schema", "/monitoring/podMonitor/interval", ('monitoring.podMonitor.interval="often"',)),
    WrongValue("chart", "does not go with staticMembers", ("keda.enabled=true", "staticMembers=true")),
    WrongValue("chart", "there are 4 partitions", ("replicas=5", "partitions=4")),
    WrongValue("chart", "there are 4 partitions", ("keda.enabled=true", "keda.maxReplicas=5", "partitions=4")),
    WrongValue("chart", "killed while it drains", ("terminationGracePeriodSeconds=20",)),
    WrongValue("chart", "killed while it drains", ("settings.drain_timeout_s=60",)),
    WrongValue("chart", "back within its session", ("staticMembers=true", "settings.session_timeout_ms=30000")),
    WrongValue("chart", "needs service.enabled", ("ingress.enabled=true", 'ingress.hosts=["a.example"]')),
    WrongValue("chart", "does not open", ('settings.bootstrap_servers="kafka.kafka.svc:9099"',)),
    WrongValue("chart", "egress does not open", ('settings.schema_registry_url="https://registry.example"',)),
    WrongValue(
        "chart",
        "egress does not open",
        (
            'settings.oauth_token_url="https://login.example:8443/token"',
            'networkPolicy.egress=[{"ports":[{"port":443}]}]',
        ),
    ),
    WrongValue(
        "chart",
        "no such login",
        ('settings.sasl_mechanism="AWS_MSK_IAM"', 'settings.security_protocol="SASL_SSL"', "keda.enabled=true"),
    ),
    WrongValue(
        "chart",
        "would get no credentials",
        ('settings.sasl_mechanism="AWS_MSK_IAM"', 'networkPolicy.egress=[{"ports":[{"port":8081}]}]'),
    ),
    WrongValue("chart", "give one of them", ("cache.claim.create=true", 'cache.existingClaim="hub"')),
    WrongValue("server", "quantit", ('resources.limits.memory="2GB of it"',)),
    WrongValue("server", "must be less than or equal to memory limit", ('resources.requests.memory="4Gi"',)),
    WrongValue("server", "may not be 0 when", ('updateStrategy={"rollingUpdate":{"maxSurge":0,"maxUnavailable":0}}',)),
    WrongValue("server", "maxUnavailable", ('podDisruptionBudget.maxUnavailable="most"',)),
    WrongValue("server", "endPort", ('networkPolicy.brokers.ports=[{"port":9092},{"port":9999,"endPort":9}]',)),
    WrongValue("server", "RFC 1123", ("service.enabled=true", "ingress.enabled=true", 'ingress.hosts=["Not A Host"]')),
    WrongValue("server", "persistentVolumeClaims", ('model.volume={"persistentVolumeClaims":{"claimName":"models"}}',)),
    WrongValue("server", "nodeSelector", ('nodeSelector={"disk":"two words"}',)),
    WrongValue(
        "server",
        "scaleDown",
        ("keda.enabled=true", 'keda.scaleDown={"policies":"slowly"}'),
    ),
]
