"""Options that several commands share: logs, the model, how to reach the brokers, what is known of events."""

from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import CliSuppress

from worker.settings.base import Settings
from worker.settings.oauth import BY_PASSWORD, Extensions, TokenUrl, oauth_fault
from worker.settings.types import (
    INT32,
    Device,
    FieldPath,
    InputFormats,
    LabelScores,
    LogLevel,
    ModelLabels,
    PemFile,
    Servers,
    TokenPath,
    Topic,
)
from worker.settings.values import DEFAULT_INPUT_FORMAT, revision_fault

DEFAULT_MODEL = "cointegrated/rubert-tiny-sentiment-balanced"
MAX_WINDOWS = 8


class LogSettings(Settings):
    log_level: LogLevel = Field("info", description="least severe level logged")
    log_format: Literal["auto", "console", "json"] = Field("auto", description="auto: console on a terminal, else json")


class CheckpointSettings(LogSettings):
    model: str = Field(
        DEFAULT_MODEL,
        description="checkpoint: a folder (named with / or ./ in front), a name on the hub, or builtin (small, for trials)",
    )
    revision: str | None = Field(None, description="the hub's branch, tag or commit; default: the newest")
    model_labels: ModelLabels | None = Field(
        None,
        description="names that the model's labels have in results, such as LABEL_0=negative,LABEL_1=neutral; a label that "
        "is not listed keeps its own",
    )
    label_scores: LabelScores | None = Field(
        None,
        description="each label's weight in the score, which is the sum of probabilities times weights: "
        "1 star=-1,2 stars=-0.5,…; a label that is not listed has the weight 0; default: -1, 0, 1 for negative, neutral, "
        "positive, and no score for other labels",
    )
    activation: Literal["auto", "sigmoid", "softmax"] = Field(
        "auto",
        description="how logits become probabilities; auto: sigmoid for the labels negative, neutral, positive, as on the "
        "default model's card; for other labels sigmoid if problem_type in config.json is multi_label_classification, else "
        "softmax",
    )
    threshold: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="results have one more field, labels, with all labels whose probability is at least this; it needs "
        "activation sigmoid",
    )
    normalize: Literal["nfc", "none"] = Field(
        "nfc",
        description="nfc: before a text is tokenized, stress marks are dropped and letters composed (й, ё of two "
        "characters); none: it is left as it is, as on the default model's card",
    )
    long_text: Literal["truncate", "windows"] = Field(
        "truncate",
        description="how a text longer than the model's maximum (512 tokens for the default model) is scored; truncate: by "
        "its beginning alone; windows: it is split into windows that overlap by 64 tokens, and their probabilities are "
        "averaged",
    )
    max_windows: int = Field(
        MAX_WINDOWS,
        ge=1,
        le=64,
        description="with long_text=windows: the most windows of a text that are scored; the rest of the text is not",
    )
    device: Device = Field("auto", description="auto (cuda where torch finds a GPU, else cpu), cpu, cuda, cuda:N")
    cpu_threads: Annotated[int, Field(ge=1, le=1_024)] | Literal["auto"] = Field(
        "auto", description="threads of the model on a CPU; auto: measured at the start"
    )
    cuda_pass: Literal["padded", "unpadded", "auto"] = Field(
        "padded",
        description="how a GPU computes the texts of a pass; padded: each is padded to the length of the longest; unpadded: "
        "one behind another without padding, if torch is 2.10 or later, the device has compute capability 8.0 or later, "
        "dtype is float16 or bfloat16, the model is of BERT's family and the logits agree on the shipped reviews, else "
        "padded; auto: unpadded if that is faster, too",
    )

    @model_validator(mode="after")
    def _has_a_revision(self) -> Self:
        fault = revision_fault(self.model, self.revision)
        if fault:
            raise ValueError(fault)
        return self


class ModelSettings(CheckpointSettings):
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto",
        description="numbers that the model computes with; auto: on a CPU float32, on a GPU float16 where 99.9 % of labels "
        "are expected to stay, by the shipped reviews, else float32 with TF32; int8: on a CPU alone, by ONNX Runtime; "
        "bfloat16, float16: by torch (extra torch); all but plain float32 may change a label now and then",
    )
    backend: Literal["auto", "torch", "onnx"] = Field(
        "auto",
        description="what computes the model on a CPU; auto: ONNX Runtime, and torch (extra torch) for what that cannot "
        "compute; on a GPU torch computes",
    )
    max_batch_tokens: Annotated[int, Field(ge=1, le=INT32)] | Literal["auto"] = Field(
        "auto", description="tokens in one pass of the model, padding included; auto: measured at the start"
    )


class ConnectionSettings(LogSettings):
    """How to reach the brokers."""

    bootstrap_servers: Servers = Field("localhost:9092", description="brokers, host:port, separated by commas")
    client_id: str = Field("sentiment-worker", description="name of this client in the brokers' logs")
    request_timeout_ms: int = Field(30_000, ge=1_000, le=INT32, description="timeout of one request to a broker, ms")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how to talk to the brokers"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER", "AWS_MSK_IAM"] | None = Field(
        None,
        description="how to log in; OAUTHBEARER: by a token, from oauth_token_url or oauth_token_file; AWS_MSK_IAM: to "
        "Amazon MSK, with AWS's credentials (extra aws)",
    )
    sasl_username: str | None = Field(
        None,
        description="who logs in; the password is in WORKER_SASL_PASSWORD or the file WORKER_SASL_PASSWORD_FILE names",
    )
    sasl_password: CliSuppress[SecretStr | None] = None
    ssl_cafile: PemFile | None = Field(
        None, description="authorities that sign the brokers' certificates, PEM; default: the system's"
    )
    ssl_certfile: PemFile | None = Field(None, description="this client's certificate, PEM")
    ssl_keyfile: PemFile | None = Field(
        None,
        description="this client's key, PEM; its password, if it has one, is in WORKER_SSL_KEY_PASSWORD or the file "
        "WORKER_SSL_KEY_PASSWORD_FILE names",
    )
    ssl_key_password: CliSuppress[SecretStr | None] = None
    oauth_token_url: TokenUrl | None = Field(
        None, description="token endpoint of the OAuth provider, which gives tokens by client credentials"
    )
    oauth_client_id: str | None = Field(
        None,
        description="client that asks oauth_token_url for tokens; its secret is in WORKER_OAUTH_CLIENT_SECRET or the file "
        "WORKER_OAUTH_CLIENT_SECRET_FILE names",
    )
    oauth_client_secret: CliSuppress[SecretStr | None] = None
    oauth_scope: str | None = Field(None, description="scope to ask for, several separated by spaces")
    oauth_audience: str | None = Field(
        None,
        description="audience to ask for, where the provider takes it as a parameter; others put it in by themselves",
    )
    oauth_ca_file: PemFile | None = Field(
        None, description="authorities that sign the certificate of oauth_token_url, PEM; default: the system's"
    )
    oauth_token_file: TokenPath | None = Field(
        None, description="file with a token, which something else renews; it is read for each new connection"
    )
    oauth_extensions: Extensions | None = Field(
        None,
        description="SASL extensions that the brokers want with the token, NAME=VALUE, separated by commas, such as "
        "logicalCluster=lkc-1,identityPoolId=pool-2",
    )

    @model_validator(mode="after")
    def _is_secured_as_a_whole(self) -> Self:
        if self.security_protocol.startswith("SASL") != (self.sasl_mechanism is not None):
            raise ValueError(
                "sasl_mechanism goes with security_protocol SASL_PLAINTEXT or SASL_SSL: set both or neither"
            )
        if fault := oauth_fault(dict(self)):
            raise ValueError(fault)
        if self.sasl_mechanism in BY_PASSWORD and not (self.sasl_username and self.sasl_password):
            raise ValueError(
                "sasl_mechanism needs sasl_username, and sasl_password from WORKER_SASL_PASSWORD or …_FILE"
            )
        if self.sasl_username and not self.sasl_mechanism:
            raise ValueError("sasl_username goes with sasl_mechanism and security_protocol SASL_PLAINTEXT or SASL_SSL")
        for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
            if getattr(self, name) and not self.security_protocol.endswith("SSL"):
                raise ValueError(
                    f"{name} goes with security_protocol SSL or SASL_SSL; without them nothing is encrypted"
                )
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ValueError("ssl_keyfile needs ssl_certfile")
        return self


class EventSettings(ConnectionSettings):
    """What both the worker and a replay know about events."""

    dead_letter_topic: Topic = Field("sentiment.dead-letter", description="topic for what cannot be scored")
    group_id: str = Field("sentiment-worker", description="consumer group")
    input_format: InputFormats = Field(
        DEFAULT_INPUT_FORMAT,
        description="what values are; json: an object with text; text: UTF-8; avro: a record in Confluent's framing, whose "
        "schema is in the registry; by topic: reviews=avro,posts=text, and json for the others",
    )
    id_field: FieldPath = Field("id", description="where the event's id is; a dotted path reaches inside")
