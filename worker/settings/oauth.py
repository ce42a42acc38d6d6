"""Which settings of a login by token go together."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator

from worker.settings.values import pairs

BY_PASSWORD: Final = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
BY_TOKEN: Final = ("OAUTHBEARER", "AWS_MSK_IAM")
OF_THE_ENDPOINT: Final = ("oauth_client_id", "oauth_scope", "oauth_audience", "oauth_ca_file")
EXTENSION: Final = re.compile(r"(?!auth=)[A-Za-z]+=[!-~ ]+")  # RFC 7628, section 3.1


def _token_url(value: str) -> str:
    try:
        url = urlsplit(value)
        is_right = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:  # of a port or an IPv6 address
        is_right = False
    if not is_right or url.username is not None or url.fragment or not value.isprintable() or " " in value:
        raise ValueError("it should be a URL such as https://id.example.com/oauth2/token, without a user or a password")
    return value


def _extensions(value: str) -> str:
    fault = "it should be NAME=VALUE, separated by commas; each name should have letters alone, and not be auth"
    try:
        found = pairs(value)
    except ValueError:
        raise ValueError(fault) from None
    if not found or not all(EXTENSION.fullmatch("=".join(each)) for each in found):
        raise ValueError(fault)
    if len(dict(found)) < len(found):
        raise ValueError("it should name each extension once")
    return value


TokenUrl = Annotated[str, AfterValidator(_token_url)]
Extensions = Annotated[str, AfterValidator(_extensions)]


def oauth_fault(given: Mapping[str, Any]) -> str | None:
    """What is wrong with these settings of a login by token, by name, together; None if nothing is."""
    mechanism, url, file = given["sasl_mechanism"], given["oauth_token_url"], given["oauth_token_file"]
    oauth = [
        name
        for name in ("oauth_token_url", "oauth_token_file", *OF_THE_ENDPOINT, "oauth_extensions")
        if given[name] is not None
    ]
    if oauth and mechanism != "OAUTHBEARER":
        return f"{oauth[0]} goes with sasl_mechanism OAUTHBEARER"
    if mechanism == "AWS_MSK_IAM" and given["security_protocol"] != "SASL_SSL":
        return "sasl_mechanism AWS_MSK_IAM goes with security_protocol SASL_SSL: MSK takes it by TLS alone"
    if mechanism in BY_TOKEN and given["sasl_username"]:
        return f"sasl_username goes with sasl_mechanism {', '.join(BY_PASSWORD)}; a token names its user itself"
    if mechanism != "OAUTHBEARER":
        return None
    if url and file:
        return "oauth_token_url and oauth_token_file: set one of them, not both"
    if file and (needless := next((name for name in OF_THE_ENDPOINT if given[name] is not None), None)):
        return f"{needless} goes with oauth_token_url"
    if not file and not (url and given["oauth_client_id"] and given["oauth_client_secret"]):
        return (
            "sasl_mechanism OAUTHBEARER needs oauth_token_file; or oauth_token_url, oauth_client_id, and "
            "oauth_client_secret from WORKER_OAUTH_CLIENT_SECRET or …_FILE"
        )
    if given["oauth_ca_file"] and not url.startswith("https:"):
        return "oauth_ca_file goes with an oauth_token_url that begins with https:"
    return None
