"""Configuration of the gateway."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from services.gateway.inbox_config import AnyInbox
from services.gateway.tools_config import ToolsConfig
from steersman.config.base import FrozenModel, NonNegative, Positive, apply_overrides, load_model, read_yaml
from steersman.config.tls import ClientTls, Tls
from steersman.errors import ConfigError, meant

Seconds = Annotated[float, Field(gt=0)]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")]
Port = Annotated[int, Field(ge=0, le=65535)]


class BestOf(FrozenModel):
    """Several samples of every answer, of which the one with the highest reward is given (rejection sampling)."""

    n: Annotated[int, Field(ge=2, le=32)] = 4
    """Samples; each costs as many tokens as an answer, and nothing streams before all are there."""
    reward_endpoints: Annotated[list[str], Field(min_length=1)]
    """`host:port` of reward services."""
    reward_seconds: Seconds = 5.0
    """After this the first sample is the answer."""


class PolicyBackend(FrozenModel):
    """Where answers come from."""

    kind: Literal["steersman", "openai", "tgi"] = "steersman"
    """`steersman`: the policy service over gRPC; `openai`: any server with OpenAI's API, for example vLLM; `tgi`:
    text-generation-inference."""
    endpoints: Annotated[list[str], Field(min_length=1)] = ["127.0.0.1:50051"]
    """Replicas of the same model: `host:port` for gRPC, URLs for the others."""
    model: str | None = None
    """Name that an `openai` server knows the model by; None: the gateway's own."""
    api_key_env: str | None = None
    """Environment variable with the key for an `openai` or `tgi` server."""
    control_tokens: Literal["neutralise", "pass"] = "neutralise"
    """What becomes of text that spells a control token, where an `openai` or `tgi` server renders conversations itself:
    `neutralise` puts a space into it (`< |im_end|>`), `pass` trusts the server. The policy service needs neither."""
    tokenizer: Path | None = None
    """Folder with the tokenizer.json of the model that an `openai` or `tgi` server serves: its own control tokens are
    then known and every text is checked. None: those of the known families are."""
    tls: ClientTls | None = None
    """For gRPC; None: plain text."""
    connect_timeout_seconds: Seconds = 2.0
    """A replica that cannot be reached for this long is skipped."""
    probe_seconds: Seconds = 2.0
    """How often every replica is asked whether it is ready."""
    best_of: BestOf | None = None
    """None: one sample is the answer."""
    split: Path | None = None
    """File with a candidate and its share of the conversations, written by a controller or `steersman serve` and read
    again when it changes; it need not exist. None: there is never a candidate."""


class Defaults(FrozenModel):
    """What a request gets that does not say otherwise."""

    max_tokens: Positive = 512
    """Length of an answer."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    """Sampling temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling."""
    system_prompt: str | None = None
    """Put before conversations that bring no system message; None: nothing."""


class Limits(FrozenModel):
    """What keeps one caller, or all of them, from bringing the gateway down."""

    concurrent_answers: Positive = 256
    """Answers in generation at once."""
    queued_answers: NonNegative = 256
    """Requests that may wait for a place; the next one gets 429."""
    queue_seconds: Seconds = 10.0
    """Longest wait for a place."""
    body_bytes: Positive = 1_048_576
    """Largest request body."""
    body_seconds: Seconds = 20.0
    """Longest time to send it, and before it the headers."""
    messages: Positive = 256
    """Messages in one conversation."""
    message_chars: Positive = 100_000
    """Characters of all messages together."""
    choices: Positive = 8
    """Largest `n`."""
    max_tokens: Positive = 4096
    """Largest length of an answer."""
    answer_seconds: Seconds = 300.0
    """Longest time for one answer, until its last byte is taken."""
    feedback_per_minute: Positive = 120
    """Judgements from one network address without a key."""
    failed_logins_per_minute: Positive = 300
    """Wrong keys, sessions and customer tokens from one network address; beyond it gets 429."""


class MemoryConfig(FrozenModel):
    """Conversations that the gateway remembers for callers that send `conversation_id`."""

    turns: Positive = 40
    """The oldest fall out."""
    seconds: Positive = 86_400
    """A conversation is forgotten this long after its last turn."""


class Keeping(FrozenModel):
    """What is kept of answers, how long, and who agreed to training on them."""

    consent: bool | None = None
    """What counts where a request says nothing (field `consent`, or header `x-consent`); None, nobody was asked, is
    the same as no: the answer is never released as training data."""
    tenant_consent: dict[str, bool] = {}
    """The same for single tenants, who have their customers' agreement, or have refused it for all of them."""
    lookup_texts: bool = False
    """Keep what was read from business systems, too, and not only which records it was."""
    answer_days: Positive = 365
    """Answers and what was said about them are deleted this long after they were given."""
    evidence_days: Positive = 90
    """Token ids, log-probabilities and the texts of lookups are deleted this long after the answer."""
    audit_days: Positive = 730
    """Lines of the audit trail are deleted after this."""

    def consent_of(self, tenant: str, said: bool | None) -> bool | None:
        """What the request said, else the tenant's word, else everybody's."""
        return said if said is not None else self.tenant_consent.get(tenant, self.consent)


class JwtIssuer(FrozenModel):
    """Who vouches for end customers with signed tokens."""

    issuer: str
    """Claim `iss`."""
    audience: str
    """Claim `aud`."""
    jwks: str
    """URL or file with the public keys (RFC 7517)."""
    algorithms: Annotated[
        list[Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]],
        Field(min_length=1),
    ] = ["RS256", "ES256", "EdDSA"]
    """Accepted signatures; only with public keys."""
    customer_claim: str = "sub"
    """Claim with the customer's key in the business systems."""
    tenants: list[str] = []
    """Tenants whose customers it may name; empty: all."""
    leeway_seconds: Annotated[float, Field(ge=0, le=300)] = 30.0
    """Allowed difference of the clocks."""
    refresh_seconds: Seconds = 300.0
    """How old the keys may get."""
    lookup_seconds: Seconds = 10.0
    """An unknown key id makes the gateway look for new keys, at most this often."""


class SignedHeader(FrozenModel):
    """A trusted back end names the customer and signs it."""

    secret_env: str
    """Environment variable with the shared secret, at least 32 characters."""
    max_age_seconds: Seconds = 300.0
    """A signature is good for this long."""


class IdentityConfig(FrozenModel):
    """How end customers are recognised. Nothing configured: nobody is, and no customer's records are read."""

    jwt: list[JwtIssuer] = []
    signed_header: SignedHeader | None = None
    local_customer: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Whoever asks without a token is this customer: for trials, and only on a loopback address."""


class Cors(FrozenModel):
    """Pages of other origins that may call the API from a browser, with a key and never with a session."""

    origins: Annotated[list[Annotated[str, Field(pattern=r"^(\*|https?://[A-Za-z0-9.\[\]:-]+)$")]], Field(min_length=1)]
    """As a browser sends them, `https://shop.example.com`; `*`: any."""
    max_age_seconds: NonNegative = 600
    """How long a browser may keep what it was told."""


class EmbeddingModel(FrozenModel):
    """A model that `/v1/embeddings` serves."""

    name: ModelName
    """As callers name it."""
    endpoints: Annotated[list[str], Field(min_length=1)]
    """`host:port` of embedding services, or of policy services with `embeddings`; replicas of the same model."""
    seconds: Seconds = 60.0
    """Longest time for a request."""
    tls: ClientTls | None = None
    """None: plain text."""


class ServedModel(FrozenModel):
    """A further model behind the gateway, by its own name."""

    name: ModelName
    """As callers name it."""
    aliases: list[ModelName] = []
    """Other names that are accepted."""
    policy: PolicyBackend
    """Where its answers come from."""
    deployment: str | None = None
    """Stored with its answers; None: its name, so that no release gate counts them as another's."""
    fallback: list[ModelName] = []
    """Models that answer, in this order, while this one is not ready, is full, or fails before its first token."""
    cost: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """What a token of it counts against the quotas and budgets of keys."""


class Route(FrozenModel):
    """A name behind which several models share the conversations."""

    name: ModelName
    """As callers name it."""
    weights: Annotated[dict[ModelName, Annotated[float, Field(gt=0, le=1e6)]], Field(min_length=1)]
    """Share of each model, as its part of the sum. A conversation keeps the model that answered it first."""


class Telemetry(FrozenModel):
    """OpenTelemetry traces after the GenAI conventions; texts are never in them."""

    otlp_endpoint: str | None = None
    """OTLP over HTTP, for example http://collector:4318/v1/traces; None: no traces."""


class GatewayConfig(FrozenModel):
    host: str = "127.0.0.1"
    """Address to listen on; `0.0.0.0` in a pod."""
    port: Port = 8080
    """REST port; 0: any free one."""
    grpc_port: Port = 8081
    """gRPC port; 0: any free one."""
    metrics_port: Port | None = None
    """Prometheus metrics without a key, for a scraper inside the cluster; None: only `/metrics`, which wants the
    scope `operate`."""
    model: ModelName = "steersman"
    """Name of the model that the gateway serves, and that answers where a question names none."""
    model_aliases: list[ModelName] = []
    """Other names that are accepted."""
    suggestions: Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=12)] = []
    """Questions to click on the chat page."""
    report: Path | None = None
    """HTML file with the report of the run whose model is served; who operates reads it at `/report`."""
    embed_origins: list[Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.*-]+(:[0-9]+)?$")]] = []
    """Sites whose pages may hold the chat by `/widget.js`, for example `https://www.example.com`; empty: none."""
    fallback: list[ModelName] = []
    """Names out of `models` that answer, in this order, while `model` is not ready, is full, or fails before its first
    token."""
    cost: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """What a token of `model` counts against the quotas and budgets of keys."""
    models: list[ServedModel] = []
    """Further models, by names of their own."""
    routes: list[Route] = []
    """Names whose conversations several models share by weight."""
    deployment: str = ""
    """Stored with every answer, for example champion or candidate: what a release gate compares."""
    policy: PolicyBackend = PolicyBackend()
    embeddings: list[EmbeddingModel] = []
    """What turns texts into vectors; empty: nothing."""
    defaults: Defaults = Defaults()
    limits: Limits = Limits()
    tls: Tls | None = None
    """Certificate for REST and gRPC; with `clientCa` clients must show one, too (mTLS)."""
    database: str | None = None
    """URL of the database; None: a temporary SQLite file, forgotten when the gateway stops."""
    trusted_proxies: NonNegative = 0
    """Own proxies before the gateway that add to `x-forwarded-for`; without it every client behind one has its address,
    and shares what one address may."""
    allowed_hosts: list[str] | None = None
    """Names that requests may be for (header `host`, without port; `*.example.com` for all below), so that a page
    elsewhere cannot reach this gateway through a browser by a name of its own (DNS rebinding). None: where only this
    machine reaches the gateway none, elsewhere any. Addresses and names without a dot are always good."""
    cors: Cors | None = None
    """None: only pages of this gateway may call it."""
    secret_file: Path | None = None
    """File with the secret that feedback tokens, sessions and pseudonyms are keyed with, made with mode 0600 when it is
    not there. None: beside a SQLite file, or in PostgreSQL, where whoever may read the table can forge sessions."""
    secret_env: str | None = None
    """Environment variable with that secret, at least 32 characters; goes before the file."""
    database_env: str | None = None
    """Environment variable with that URL, where it holds a password; it wins."""
    require_api_key: bool | None = None
    """None: yes, unless only this machine can reach the gateway."""
    identity: IdentityConfig = IdentityConfig()
    memory: MemoryConfig = MemoryConfig()
    keeping: Keeping = Keeping()
    tools: ToolsConfig = ToolsConfig()
    inboxes: list[AnyInbox] = []
    """Ticket systems whose webhooks come in at `/hooks/NAME` and whose tickets are answered."""
    telemetry: Telemetry = Telemetry()
    drain_seconds: Seconds = 30.0
    """How long running streams may still take after SIGTERM."""

    @model_validator(mode="after")
    def _local_customers_stay_local(self) -> GatewayConfig:
        if self.identity.local_customer is not None and not is_loopback(self.host):
            raise ValueError(
                f"identity.localCustomer makes everybody that customer, but host {self.host} can be reached from "
                "outside; use jwt or signedHeader, or host: 127.0.0.1"
            )
        return self

    @model_validator(mode="after")
    def _names_are_models(self) -> GatewayConfig:
        models = [self.model, *(model.name for model in self.models)]
        others = [alias for model in self.models for alias in model.aliases] + [route.name for route in self.routes]
        names = [*models, *self.model_aliases, *others, *(model.name for model in self.embeddings)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"the name {twice!r} is given twice; give every model, alias and route a name of its own")
        for field, owner, named in (
            ("fallback", self.model, self.fallback),
            *((f"models.{model.name}.fallback", model.name, model.fallback) for model in self.models),
            *((f"routes.{route.name}.weights", None, list(route.weights)) for route in self.routes),
        ):
            for name in named:
                if name == owner or name not in models:
                    others = [model for model in models if model != owner]
                    choice = f"{', '.join(others) or 'further models'}{meant(name, others)}"
                    raise ValueError(f"{field} names {name!r}; choose from {choice}")
        return self

    @model_validator(mode="after")
    def _inboxes_are_told_apart(self) -> GatewayConfig:
        names = [inbox.name for inbox in self.inboxes]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"inboxes: the name {twice!r} is given twice; it is the path of the webhook")
        models = [self.model, *self.model_aliases, *(name for one in self.models for name in (one.name, *one.aliases))]
        models += [route.name for route in self.routes]
        for inbox in self.inboxes:
            if inbox.model and inbox.model not in models:
                choice = f"{', '.join(models)}{meant(inbox.model, models)}"
                raise ValueError(f"inboxes.{inbox.name}.model names {inbox.model!r}; choose from {choice}")
        return self

    @property
    def database_url(self) -> str | None:
        """Of the database; ConfigError when its environment variable is not set."""
        if self.database_env is None:
            return self.database
        url = os.environ.get(self.database_env)
        if not url:
            raise ConfigError(f"databaseEnv: {self.database_env} is not set; put the database's URL there")
        return url

    @property
    def auth_required(self) -> bool:
        return not is_loopback(self.host) if self.require_api_key is None else self.require_api_key

    @property
    def hosts(self) -> list[str] | None:
        """Names that requests may be for; None: any."""
        if self.allowed_hosts is None and is_loopback(self.host):
            return ["*.localhost"]
        return self.allowed_hosts


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_config(path: Path | None, overrides: list[str]) -> GatewayConfig:
    """Reads a YAML file (None: all defaults) with `a.b=c` overrides on top."""
    data = apply_overrides(read_yaml(path) if path else {}, overrides)
    return load_model(GatewayConfig, data, str(path or "gateway configuration"))
