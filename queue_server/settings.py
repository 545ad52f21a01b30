"""What the operator can set about the queue server and its workers."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AliasChoices, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from queue_server.addresses import Guard
from queue_server.redis_address import read_address, with_password
from queue_server.webhook_calls import read_secrets

_HOUR_S = 3600.0


class StoreSettings(BaseSettings):
    """What the queue server and the workers must agree on: where Redis is, how long things are kept."""

    model_config = SettingsConfigDict(env_prefix="QUEUE_", extra="ignore", populate_by_name=True)

    redis_url: str = Field(
        default="",
        validation_alias=AliasChoices("REDIS_URL", "redis_url"),
        description="Where Redis (6.2 or newer, or Valkey) is: `redis://[user:password@]host:port/db`, `rediss://…` for TLS, "
        "`unix:///path`, `redis+sentinel://host:port,host:port/service/db`. Empty: localhost at REDIS_PORT.",
    )
    redis_port: int = Field(
        default=6379,
        ge=1,
        le=65535,
        validation_alias=AliasChoices("REDIS_PORT", "redis_port"),
        description="Redis' port on this machine, when REDIS_URL is empty.",
    )
    redis_password: SecretStr = Field(
        default=SecretStr(""),
        validation_alias=AliasChoices("REDIS_PASSWORD", "redis_password"),
        description="REDIS_PASSWORD, or the file redis_password among the secrets: Redis' password, when REDIS_URL has none. "
        "Empty: it wants none.",
    )
    keep_ended_s: float = Field(
        default=24 * _HOUR_S, gt=0, description="Ended jobs and their results are kept this long."
    )
    keep_failed_s: float = Field(default=7 * 24 * _HOUR_S, gt=0, description="FAILED jobs are kept this long.")
    keep_request_id_s: float = Field(
        default=24 * _HOUR_S, gt=0, description="The same request_id gives the same job for this long."
    )
    keep_media_s: float = Field(default=_HOUR_S, gt=0, description="A file that no job needs is kept this long.")
    keep_failed_media_s: float = Field(
        default=24 * _HOUR_S,
        gt=0,
        description="The files of a job that did not succeed are kept this long after its end, for RetryJob.",
    )
    lease_s: float = Field(
        default=8.0, gt=0, description="A worker that has not been heard of for this long has lost its jobs to others."
    )
    client_window: int = Field(
        default=32,
        ge=1,
        le=1000,
        description="Of one client's waiting jobs so many are in line at once, the others behind those of other clients.",
    )
    client_running: int = Field(
        default=0,
        ge=0,
        description="Jobs of one client and queue that run at once; more wait, also for a free worker. 0: any number.",
    )

    @field_validator("redis_url")
    @classmethod
    def _readable(cls, url: str) -> str:
        if url:
            read_address(url)
        return url

    media_url: str = Field(
        default="",
        description="Where large files lie: `file:///dir` (which the queue server and all workers share), `s3://bucket/prefix`, "
        "`gs://…`, `az://…`; credentials, region and endpoint come from the usual variables (AWS_ACCESS_KEY_ID, AWS_ENDPOINT, "
        "GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME, …). Empty: all files lie in Redis.",
    )

    @field_validator("media_url")
    @classmethod
    def _names_a_store(cls, url: str) -> str:
        if url and not re.match(r"file:///.|(s3|s3a|gs|az|azure|adl|abfs|abfss)://[^/]", url):
            raise ValueError(
                "it must be file:///directory, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix"
            )
        return url

    media_inline_bytes: int = Field(
        default=2 << 20, ge=0, description="With QUEUE_MEDIA_URL: files of at most this size still lie in Redis."
    )
    max_redis_media_bytes: int = Field(
        default=64 << 20,
        ge=1,
        le=512 << 20,
        description="Bytes of one file in Redis, which bounds all without QUEUE_MEDIA_URL.",
    )
    max_media_bytes: int = Field(
        default=2 << 30, ge=1, le=64 << 30, description="Bytes of one file with QUEUE_MEDIA_URL."
    )

    @property
    def keep_ms(self) -> dict[str, int]:
        """How long things are kept, in milliseconds, as the scripts want it."""
        return {
            "ended_ms": round(self.keep_ended_s * 1000),
            "failed_ms": round(self.keep_failed_s * 1000),
            "media_ms": round(self.keep_media_s * 1000),
            "failed_media_ms": round(self.keep_failed_media_s * 1000),
            "request_id_ms": round(self.keep_request_id_s * 1000),
        }

    @property
    def share(self) -> dict[str, int]:
        """How clients share the workers, as the scripts want it."""
        return {"window": self.client_window, "running": self.client_running}

    @property
    def url(self) -> str:
        """Redis' URL, from REDIS_URL or REDIS_PORT, with the password: not to be shown."""
        url = self.redis_url or f"redis://127.0.0.1:{self.redis_port}/0"
        return with_password(url, self.redis_password.get_secret_value())


class QueueSettings(StoreSettings):
    """Settings of the queue server; environment variables are named QUEUE_… unless said otherwise."""

    port: int = Field(
        default=2003,
        ge=0,
        le=65535,
        validation_alias=AliasChoices("QUEUE_WORKER_PORT", "port"),
        description="QUEUE_WORKER_PORT: gRPC and HTTP on one port. 0: any free one.",
    )
    max_depth: int = Field(default=100_000, ge=1, description="Jobs that wait, QUEUED and SCHEDULED; more are refused.")
    max_queue_depth: int = Field(default=100_000, ge=1, description="The same for each queue.")
    max_client_depth: int = Field(default=50_000, ge=1, description="The same for each client, over all queues.")
    max_bytes: int = Field(
        default=100 << 30,
        ge=1,
        description="Bytes of the work and files of jobs that have not ended; more are refused.",
    )
    max_queue_bytes: int = Field(default=100 << 30, ge=1, description="The same for each queue.")
    max_client_bytes: int = Field(default=50 << 30, ge=1, description="The same for each client, over all queues.")
    max_queues: int = Field(default=100, ge=1, description="Different queue names; more are refused.")
    max_image_bytes: int = Field(default=20_000_000, ge=1, description="Bytes of one image.")
    max_request_bytes: int = Field(default=60 << 20, ge=1, description="Bytes of one submission, images included.")
    max_memory_share: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Submissions are refused while Redis uses more than this share of its maxmemory.",
    )
    max_watchers: int = Field(default=1000, ge=1, description="WatchJob calls at once; more are refused.")
    default_max_attempts: int = Field(default=3, ge=1, le=20, description="Attempts of a job that does not say.")
    max_attempts_by_kind: dict[str, Annotated[int, Field(ge=1, le=20)]] = Field(
        default={}, description='The same for single kinds of work, as JSON: `{"video": 2}`.'
    )
    store_timeout_s: float = Field(
        default=2.0, gt=0, description="Redis must answer within this time, otherwise UNAVAILABLE."
    )
    sweep_s: float = Field(
        default=1.0,
        gt=0,
        description="Due, lost, overdue and expired jobs are looked for this often; the clock of not_before_time.",
    )
    overdue_s: float = Field(
        default=8.0, gt=0, description="A job whose message nobody has is sent again after this time."
    )

    max_uploads: int = Field(
        default=16,
        ge=1,
        description="Files that are uploaded at once, each with up to 32 MB of memory; more are refused.",
    )
    upload_idle_s: float = Field(
        default=30.0, gt=0, le=100, description="An upload of which nothing has come for this long is given up."
    )
    upload_s: float = Field(default=3600.0, gt=0, description="An upload that takes longer is given up.")
    media_sweep_s: float = Field(
        default=10.0,
        gt=0,
        description="With QUEUE_MEDIA_URL: how often files whose lifetime has passed are deleted there.",
    )

    webhook_secret: SecretStr = Field(
        default=SecretStr(""),
        description="Signs webhooks: `whsec_` and the base64 of 24 to 64 bytes. Several, separated by commas, all sign, so that "
        "receivers can change from one to the next. Empty: jobs with a webhook are refused.",
    )
    webhook_allowed_hosts: str = Field(
        default="",
        description="Where webhooks may go besides public addresses over https, separated by commas: `host`, `host:port`, "
        "`10.0.0.0/8`; http and any port are allowed there too.",
    )
    webhook_tries: int = Field(
        default=8, ge=1, le=50, description="Tries of one webhook; the last is about 12 h after the first."
    )
    webhook_retry_s: float = Field(
        default=5.0, gt=0, description="The wait before a webhook's second try; six times as long each time, up to 5 h."
    )
    webhook_timeout_s: float = Field(
        default=15.0, gt=0, le=60, description="A receiver of webhooks must answer by then."
    )

    @field_validator("webhook_secret")
    @classmethod
    def _signs(cls, secret: SecretStr) -> SecretStr:
        read_secrets(secret.get_secret_value())
        return secret

    @field_validator("webhook_allowed_hosts")
    @classmethod
    def _names_hosts(cls, hosts: str) -> str:
        Guard(hosts.split(","))
        return hosts

    @property
    def terms(self) -> dict[str, object]:
        """What every script is told."""
        return {"keep": self.keep_ms, "share": self.share, "limits": self.limits}

    @field_validator("max_attempts_by_kind")
    @classmethod
    def _check_kinds(cls, attempts: dict[str, int]) -> dict[str, int]:
        from queue_server.work import KINDS  # here, because work has settings of its own to know

        if unknown := set(attempts) - set(KINDS):
            raise ValueError(f"There is no kind of work {min(unknown)!r}; there are {', '.join(KINDS)}.")
        return attempts

    def attempts_of(self, kind: str) -> int:
        """Attempts of a job of this kind that does not say."""
        return self.max_attempts_by_kind.get(kind, self.default_max_attempts)

    @property
    def limits(self) -> dict[str, int]:
        """What there may be at most, as the scripts want it."""
        return {
            "depth": self.max_depth,
            "queue_depth": self.max_queue_depth,
            "client_depth": self.max_client_depth,
            "bytes": self.max_bytes,
            "queue_bytes": self.max_queue_bytes,
            "client_bytes": self.max_client_bytes,
            "queues": self.max_queues,
        }


class WorkerSettings(StoreSettings):
    """Settings of a worker process; environment variables are named QUEUE_… unless said otherwise."""

    vision_address: str = Field(
        default="localhost:2001",
        description="The vision server: `host:port`, `grpcs://host:port` for TLS, or a gRPC target.",
    )
    worker_threads: int = Field(default=8, ge=1, le=256, description="Jobs that one worker process runs at once.")
    images_in_flight: int = Field(
        default=4, ge=1, le=64, description="Images of one job that are at the vision server at once."
    )
    vision_call_s: float = Field(
        default=300.0, gt=0, description="A call to the vision server that takes longer has failed."
    )
    vision_connect_s: float = Field(
        default=5.0, gt=0, description="The vision server must be reachable within this time when an attempt begins."
    )
    renew_s: float = Field(
        default=2.0, gt=0, description="How often a running job's lease is renewed; well below the lease."
    )
    watch_s: float = Field(
        default=0.2, gt=0, description="How often running jobs are looked at for a request to cancel."
    )
    retry_first_s: float = Field(default=1.0, gt=0, description="The wait before the first retry; doubled each time.")
    retry_limit_s: float = Field(default=60.0, gt=0, description="The longest wait before a retry.")
    circuit_limit_s: float = Field(
        default=15.0,
        gt=0,
        description="While the vision server is away or full, no job is begun for at most this long at a time.",
    )
    max_result_bytes: int = Field(
        default=48 << 20, ge=1, description="Bytes of one result; a larger one fails the job."
    )
    stop_s: float = Field(
        default=10.0, gt=0, description="On SIGTERM the running jobs are given back within this time."
    )
    log_level: str = Field(
        default="info",
        validation_alias=AliasChoices("SERVING_LOG_LEVEL", "log_level"),
        description="SERVING_LOG_LEVEL: debug, info, warning or error.",
    )
    log_format: str = Field(
        default="auto",
        validation_alias=AliasChoices("SERVING_LOG_FORMAT", "log_format"),
        description="SERVING_LOG_FORMAT: auto, json or console.",
    )
    image_patience_s: float = Field(
        default=60.0,
        gt=0,
        description="While the vision server says that it is full, a job of many images that has begun waits and sends fewer at "
        "once; after this long without an answer it is given back, at no cost.",
    )
    video_max_frames: int = Field(
        default=250_000, ge=1, description="Frames of one video that are looked at; it is read no further."
    )
    video_max_pixels: int = Field(
        default=35_000_000,
        ge=1,
        description="Pixels of one frame of a video; 8K has 33 million. Larger ones fail the job.",
    )
    video_max_temp_bytes: int = Field(
        default=8 << 30, ge=1, description="Disk that the results of one video may take while they are made."
    )
    video_stall_s: float = Field(
        default=30.0, gt=0, description="A video of which no frame comes for this long cannot be read."
    )
    video_threads: int = Field(default=2, ge=1, le=64, description="Threads that decode one video; as many encode it.")
    video_frames_in_flight: int = Field(
        default=16, ge=1, le=1024, description="Frames of one video that are at the vision server at once."
    )
